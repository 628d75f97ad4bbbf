"""The files of MR series in DICOM: which they are, and their headers, read without their voxels."""

import contextlib
import io
import logging
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from aldm.errors import UserError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

PIXEL_DATA, _PER_FRAME = 0x7FE00010, 0x52009230
PATIENT_TAGS = (
    *("PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex", "PatientAge", "PatientWeight"),
    *("StudyDate", "StudyTime", "StudyID", "StudyDescription", "AccessionNumber", "ReferringPhysicianName"),
    "SpecificCharacterSet",
)
_SERIES_TAGS = (
    *("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID", "Modality"),
    *("SeriesNumber", "SeriesDescription", "BodyPartExamined", "PatientPosition", "ImageType"),
)
_GRID_TAGS = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "NumberOfFrames")
_PIXEL_TAGS = (
    *("Rows", "Columns", "BitsAllocated", "BitsStored", "PixelRepresentation", "SamplesPerPixel"),
    *("PhotometricInterpretation", "PixelPaddingValue", "PixelPaddingRangeLimit", "RescaleSlope", "RescaleIntercept"),
)
_REPEATED_TAGS = (
    *("TemporalPositionIdentifier", "EchoTime", "EchoNumbers", "InversionTime", "TriggerTime", "DiffusionBValue"),
    *("DiffusionGradientOrientation", "ComplexImageComponent", "AcquisitionNumber"),
)
"""What tells the slices of several volumes in one series from each other."""
_FRAME_TAGS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "DimensionIndexSequence")
_MOSAIC_TAGS = tuple(tag for block in range(0x10, 0x20) for tag in (0x00190000 + block, 0x0019000A + (block << 8)))
"""Of each place that a manufacturer's block may have in group 0019: its creator and its element 0A."""
SUFFIXES = (".dcm", ".dicom", ".ima")
"""Names that end so promise a DICOM file; those of DICOM files may end in anything."""
_ELEMENT_KINDS = (b"UL", b"OB", b"UI", b"CS", b"DA", b"TM", b"LO", b"SH", b"DT", b"ST", b"SQ")


@dataclass(frozen=True, eq=False)
class Slice:
    """One slice: a file, or a frame of one."""

    path: Path
    header: "Dataset"
    """What the file says of this slice, under the attributes of MR Image Storage; no voxels."""
    size: int
    """Bytes of the file."""
    frame: int | None = None
    """Which frame of an enhanced file, from 0; None for a file of one slice."""

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return self.path.name if self.frame is None else f"frame {self.frame + 1} of {self.path.name}"


def is_dicom(path: Path) -> bool:
    """Whether the file begins like DICOM part 10, with or without its preamble, and is not the index of a disc."""
    if not path.is_file() or path.name.upper() == "DICOMDIR" or path.name.startswith("._"):
        return False
    try:
        with path.open("rb") as stream:
            start = stream.read(132)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    return start[128:] == b"DICM" or _lacks_preamble(start)


def _lacks_preamble(start: bytes) -> bool:
    """Whether a file begins with what stands after the 128 bytes of the preamble, or with the first element."""
    if start[:4] == b"DICM":
        return True
    group, element, length = (int.from_bytes(start[at : at + size], "little") for at, size in ((0, 2), (2, 2), (4, 4)))
    if group not in (0x0002, 0x0008) or element > 0x0018 or len(start) < 132:
        return False
    return start[4:6] in _ELEMENT_KINDS or (length <= 64 and length % 2 == 0)


def open_dicom(path: Path) -> BinaryIO:
    """Open a file so that it begins with a preamble, whether it has one or not."""
    with path.open("rb") as stream:
        start = stream.read(132)
        if start[128:] == b"DICM":
            return path.open("rb")
        stream.seek(4 if start[:4] == b"DICM" else 0)
        return io.BytesIO(bytes(128) + b"DICM" + stream.read())


def read_headers(folder: Path, *, patient: bool = True) -> tuple[list[Slice], str]:
    """Return the image files of a folder (or one file), and what is to be said of others, which are left out.

    Voxels are left on the disk.

    Args:
        folder: of the series, or a file.
        patient: read who and which study as well; a caller that must not know leaves it out.

    Raises:
        UserError: no DICOM file, or one whose header cannot be read; it names the file and none of its values.
    """
    found: list[Slice] = []
    others: list[str] = []
    for path in _files(folder):
        with damage_of(path):
            item = _slice(path, patient)
            kind = _other_object(item.header)
            if kind is not None:
                others.append(kind)
                continue
            sides = [whole_number(item, keyword, 0) for keyword in ("Rows", "Columns")]
            if min(sides) < 1 or "PixelData" not in item.header:
                raise UserError(f"{path}: a DICOM file without an image; take it out of the folder")
            found.append(item)
    if not found:
        raise UserError(f"{folder}: no image among its DICOM files; wanted a folder with the files of one MR series")
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(others).items()))
    return found, f"left out what holds no image: {kinds}" if others else ""


def _files(folder: Path) -> list[Path]:
    if folder.is_file() and is_dicom(folder):
        return [folder]
    if not folder.is_dir():
        raise UserError(f"{folder}: wanted a folder with the files of one DICOM series")
    files = []
    for path in sorted(folder.iterdir()):
        if is_dicom(path):
            files.append(path)
        elif path.is_file() and path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
            raise UserError(
                f"{path}: named like a DICOM file, but it does not begin like one: it is damaged; get it again, or "
                "take it out of the folder"
            )
    if not files:
        raise UserError(f"{folder}: no DICOM file in it; wanted a folder with the files of one MR series")
    return files


def _slice(path: Path, patient: bool) -> Slice:
    import pydicom

    tags = [*_SERIES_TAGS, *_GRID_TAGS, *_PIXEL_TAGS, *_REPEATED_TAGS, *_FRAME_TAGS, *_MOSAIC_TAGS, "PixelData"]
    with open_dicom(path) as stream:
        header = pydicom.dcmread(stream, defer_size=4096, specific_tags=[*tags, *(PATIENT_TAGS if patient else ())])
        for tag in list(header.keys()):  # each value is converted here, or the file is refused
            if tag not in (PIXEL_DATA, _PER_FRAME):
                header[tag]
        size = stream.seek(0, io.SEEK_END)
    if "TransferSyntaxUID" not in header.file_meta:
        if len(header.file_meta):
            raise UserError(f"{path}: damaged DICOM file: it names no transfer syntax")
        header.file_meta.TransferSyntaxUID = guessed_syntax(header)
    _ = header.file_meta.TransferSyntaxUID.is_compressed
    return Slice(path, header, size)


def guessed_syntax(header: "Dataset") -> str:
    """Return the transfer syntax of a file that is nothing but its data set."""
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

    is_implicit, _ = header.original_encoding
    return ImplicitVRLittleEndian if is_implicit else ExplicitVRLittleEndian


def _other_object(header: "Dataset") -> str | None:
    """Return what an object is that holds no image, such as a presentation state; None for an image."""
    from pydicom.uid import UID

    uid = UID(str(header.get("SOPClassUID") or ""))
    if uid.name != uid and uid.type == "SOP Class":
        return None if "Image" in uid.name else uid.name.removesuffix(" Storage")
    pixels = [keyword for keyword in ("Rows", "Columns", "PixelData") if keyword in header]
    return None if pixels or not uid else "an object of its manufacturer"


@contextlib.contextmanager
def damage_of(path: Path) -> Iterator[None]:
    """Make a UserError of whatever a header's values raise where they are read or converted; keep them out of the log.

    pydicom raises many kinds of exceptions on damaged files, and puts values into their words and into warnings.
    """
    log = logging.getLogger("pydicom")
    level = log.level
    try:
        log.setLevel(logging.CRITICAL + 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{path}: damaged DICOM file: its header cannot be read ({type(error).__name__}); get it again, or take it "
            "out of the folder"
        ) from error
    finally:
        log.setLevel(level)


def whole_number(item: Slice, keyword: str, default: int) -> int:
    """Return a whole number of a header, or say that it is none or several."""
    value = item.header.get(keyword)
    if value is None or value == "":
        return default
    if not isinstance(value, int):  # IS is an int of pydicom's own
        raise UserError(f"{item.path}: damaged DICOM file: {keyword} is not one whole number")
    return int(value)


def decimals(item: Slice, keyword: str, count: int) -> list[float]:
    """Return a decimal string attribute as numbers, or say that the file does not have it."""
    value = item.header.get(keyword)
    items = [] if value is None else [*value] if isinstance(value, Iterable) else [value]
    try:
        numbers = [float(item) for item in items]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        said = "missing" if not items else f"{len(items)} values" if len(items) != count else "not numbers"
        raise UserError(f"{item.path}: {keyword} is {said}, wanted {count} numbers: the file has no geometry")
    return numbers
