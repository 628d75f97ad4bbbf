"""MR series in DICOM: what their headers say, checked before any voxel is read."""

import contextlib
import logging
import math
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aldm.data.nifti_header import NiftiSource, source_of
from aldm.errors import UserError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_PIXEL_DATA = 0x7FE00010
_DESCRIPTION = "SeriesDescription"
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])
_HEADER_TAGS = (
    *("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID", "Modality"),
    *(
        "Rows",
        "Columns",
        "BitsAllocated",
        "SamplesPerPixel",
        "NumberOfFrames",
        "ImagePositionPatient",
        "ImageOrientationPatient",
    ),
    *("PixelSpacing", "SliceThickness", "BodyPartExamined", "PatientPosition"),
)
_PATIENT_TAGS = (
    *("PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex", "PatientAge", "PatientWeight"),
    *("StudyDate", "StudyTime", "StudyID", "StudyDescription", "AccessionNumber", "ReferringPhysicianName"),
    "SpecificCharacterSet",
)
_PATIENT_POSITIONS = re.compile("[HF]F[PS]|[HF]FD[RL]|[LR]F[PS]|[AP]FD[RL]")
"""The defined terms of Patient Position (PS3.3, C.7.3.1.1.2)."""
_BODY_PARTS = re.compile(
    "ABDOMEN|ANKLE|AORTA|ARM|BRAIN|BREAST|CAROTID|CHEST|COCCYX|[CLST]SPINE|EAR|ELBOW|EXTREMITY|EYE|FOOT|HAND|HEAD|"
    "HEADNECK|HEART|HIP|IAC|JAW|KIDNEY|KNEE|LEG|LIVER|MAXILLA|NECK|ORBIT|PANCREAS|PAROTID|PELVIS|PITUITARY|PROSTATE|"
    "SELLA|SHOULDER|SKULL|SPINE|TMJ|UTERUS|WHOLEBODY|WRIST"
)
"""Codes of Body Part Examined (PS3.16, annex L) that MR series use: in many files the attribute is free text."""


@dataclass(frozen=True, eq=False)
class DicomSource:
    """What is needed to write a derived series on exactly the grid of a series, in the series' own axis order.

    Array axes: x along a row (column number), y down the columns (row number), z over the slices in the order of
    `positions`, along the normal of the slices.
    """

    folder: Path
    shape: tuple[int, int, int]
    affine: np.ndarray
    """(4, 4) voxel -> world RAS, mm."""
    positions: tuple[tuple[str, str, str], ...]
    """Image Position (Patient) of each slice, LPS mm, as the files write it."""
    orientation_cosines: tuple[str, ...]
    """Image Orientation (Patient), as the files write it."""
    pixel_spacing: tuple[str, str]
    """Pixel Spacing, mm, as the files write it: between rows, between columns."""
    slice_thickness: str | None
    patient_position: str
    body_part: str
    patient: tuple[tuple[str, Any], ...] = field(repr=False)
    """Who and which study: (keyword, value), copied into a derived series only when the caller asks to."""
    study_uid: str = field(repr=False)
    frame_of_reference_uid: str = field(repr=False)
    anonymous_study_uid: str = field(repr=False)
    """New with each reading: derived series of one reading that do not name the patient share it."""
    anonymous_frame_of_reference_uid: str = field(repr=False)

    def as_nifti(self) -> NiftiSource:
        """Return the same grid as the source of a NIfTI file."""
        return source_of(self.affine, self.shape, self.folder)


def is_dicom(path: Path) -> bool:
    """Whether the file begins like DICOM part 10 and is not the index of a disc."""
    if not path.is_file() or path.name.upper() == "DICOMDIR":
        return False
    try:
        with path.open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_headers(folder: Path, *, patient: bool = True) -> "list[tuple[Path, Dataset]]":
    """Return (file, header) of every DICOM file of the folder; voxels are left on the disk.

    Args:
        folder: the series.
        patient: read who and which study as well; a caller that must not know leaves it out.

    Raises:
        UserError: no DICOM file, or one whose header cannot be read; it names the file and none of its values.
    """
    import pydicom

    if not folder.is_dir():
        raise UserError(f"{folder}: wanted a folder with the files of one DICOM series")
    files = [path for path in sorted(folder.iterdir()) if is_dicom(path)]
    if not files:
        raise UserError(f"{folder}: no DICOM file in it; wanted a folder with the files of one MR series")
    tags = [*_HEADER_TAGS, *(_PATIENT_TAGS if patient else ()), "PixelData"]
    headers = []
    for path in files:
        with _damage_of(path):
            header = pydicom.dcmread(path, defer_size=4096, specific_tags=tags)
            for tag in list(header.keys()):  # each value is converted here, or the file is refused
                if tag != _PIXEL_DATA:
                    header[tag]
            if "TransferSyntaxUID" not in header.file_meta:
                raise UserError(f"{path}: damaged DICOM file: it names no transfer syntax")
            _ = header.file_meta.TransferSyntaxUID.is_compressed
        headers.append((path, header))
    return headers


def series_description(folder: Path) -> str:
    """Return what the first file of a series says that it shows; free text, which may name anybody."""
    import pydicom

    path = next(path for path in sorted(folder.iterdir()) if is_dicom(path))
    with _damage_of(path):
        return str(pydicom.dcmread(path, defer_size=4096, specific_tags=["SeriesDescription"]).get(_DESCRIPTION, ""))


@contextlib.contextmanager
def _damage_of(path: Path) -> Iterator[None]:
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


def checked_series(
    folder: Path, slices: "list[tuple[Path, Dataset]]", max_voxels: int
) -> tuple[DicomSource, list[Path]]:
    """Check that the slices make one volume; return its description and the files in the order of its z axis.

    Raises:
        UserError: they do not, or a header's values are damaged.
    """
    with _damage_of(folder):
        return _checked_series(folder, slices, max_voxels)


def _checked_series(
    folder: Path, slices: "list[tuple[Path, Dataset]]", max_voxels: int
) -> tuple[DicomSource, list[Path]]:
    from pydicom.uid import generate_uid

    _check_one_mr_series(folder, slices)
    first = slices[0][1]
    for keyword in ("Rows", "Columns", "PixelSpacing", "ImageOrientationPatient"):
        values = {str(header.get(keyword)) for _, header in slices}
        if len(values) > 1:
            raise UserError(
                f"{folder}: the slices differ in {keyword} ({' and '.join(sorted(values)[:2])}), wanted one grid: "
                "a localizer or a second volume is among them"
            )
    cosines = _decimals(slices[0][0], first, "ImageOrientationPatient", 6)
    spacing = _decimals(slices[0][0], first, "PixelSpacing", 2)
    row, column = np.array(cosines[:3]), np.array(cosines[3:])
    if abs(row @ row - 1) > 1e-2 or abs(column @ column - 1) > 1e-2 or abs(row @ column) > 1e-2 or min(spacing) <= 0:
        raise UserError(f"{folder}: orientation {cosines} and pixel spacing {spacing} mm make no grid")
    row, column = row / np.linalg.norm(row), column / np.linalg.norm(column)
    normal = np.cross(row, column)
    placed = [(np.array(_decimals(path, header, "ImagePositionPatient", 3)), path, header) for path, header in slices]
    placed.sort(key=lambda item: float(item[0] @ normal))
    step = _checked_step(folder, [item[0] for item in placed], [item[1] for item in placed], normal)
    shape = (_whole(*slices[0], "Columns", 0), _whole(*slices[0], "Rows", 0), len(placed))
    if math.prod(shape) > max_voxels:
        raise UserError(f"{folder}: {'x'.join(map(str, shape))} voxels, the limit is {max_voxels:,}")
    affine = np.eye(4)
    affine[:3, :3] = _LPS_TO_RAS @ np.stack([row * spacing[1], column * spacing[0], step], axis=1)
    affine[:3, 3] = _LPS_TO_RAS @ placed[0][0]
    header = placed[0][2]
    source = DicomSource(
        folder=folder,
        shape=shape,
        affine=affine,
        positions=tuple(_texts(item[2].ImagePositionPatient) for item in placed),  # type: ignore[misc]
        orientation_cosines=_texts(header.ImageOrientationPatient),
        pixel_spacing=_texts(header.PixelSpacing),  # type: ignore[arg-type]
        slice_thickness=_thickness(placed[0][1], header),
        patient_position=_code(header.get("PatientPosition"), _PATIENT_POSITIONS),
        body_part=_code(header.get("BodyPartExamined"), _BODY_PARTS),
        patient=tuple((keyword, header[keyword].value) for keyword in _PATIENT_TAGS if keyword in header),
        study_uid=str(header.get("StudyInstanceUID") or generate_uid()),
        frame_of_reference_uid=str(header.get("FrameOfReferenceUID") or generate_uid()),
        anonymous_study_uid=generate_uid(),
        anonymous_frame_of_reference_uid=generate_uid(),
    )
    return source, [item[1] for item in placed]


def _check_one_mr_series(folder: Path, slices: "list[tuple[Path, Dataset]]") -> None:
    for path, header in slices:
        if header.get("Modality") != "MR":
            raise UserError(f"{path}: modality is {str(header.get('Modality') or 'not given')[:16]}, wanted MR")
        if _whole(path, header, "NumberOfFrames", 1) > 1:
            raise UserError(
                f"{path}: an enhanced (multi-frame) image, wanted one file a slice; convert it to NIfTI, for example "
                "with dcm2niix"
            )
        if _whole(path, header, "SamplesPerPixel", 1) != 1:
            raise UserError(f"{path}: a colour image, wanted one intensity per voxel")
        _check_pixels(path, header)
    series: dict[str, list[Path]] = {}
    for path, header in slices:
        series.setdefault(str(header.get("SeriesInstanceUID")), []).append(path)
    if len(series) > 1:
        found = ", ".join(f"{len(paths)} files like {paths[0].name}" for paths in series.values())
        raise UserError(f"{folder}: {len(series)} series in one folder ({found}); give each one a folder of its own")


def _check_pixels(path: Path, header: "Dataset") -> None:
    """See that all voxels of an uncompressed slice are there: GDCM reads what is missing as something."""
    voxels = header.get_item("PixelData", keep_deferred=True)
    rows, columns = (_whole(path, header, keyword, 0) for keyword in ("Rows", "Columns"))
    if voxels is None or min(rows, columns) < 1:
        raise UserError(f"{path}: a DICOM file without an image; take it out of the folder")
    if header.file_meta.TransferSyntaxUID.is_compressed:
        return
    wanted = rows * columns * _whole(path, header, "BitsAllocated", 16) // 8
    there = min(voxels.length, path.stat().st_size - voxels.value_tell)
    if there < wanted:
        raise UserError(f"{path}: truncated, {wanted:,} bytes of voxels wanted, {there:,} there")


def _checked_step(folder: Path, positions: list[np.ndarray], files: list[Path], normal: np.ndarray) -> np.ndarray:
    """Return the vector from one slice to the next, LPS mm, or say which slice is out of step."""
    if len(positions) < 2:
        raise UserError(f"{folder}: a single slice, wanted a volume of at least 2")
    gaps = np.diff(np.array(positions) @ normal)
    usual = float(np.median(gaps))
    tolerance = max(0.02 * abs(usual), 2e-3)
    for index, gap in enumerate(gaps):
        pair = f"{files[index].name} and {files[index + 1].name}"
        if gap < 1e-3:
            raise UserError(
                f"{folder}: {pair} lie at the same place; a series with several echoes, phases or repetitions is not "
                "one volume: keep one of them"
            )
        if abs(gap - usual) > tolerance:
            missing = round(gap / usual) - 1
            guess = f": {missing} slice{'s' * (missing > 1)} missing" if missing > 0 else ""
            raise UserError(
                f"{folder}: {gap:.3f} mm between {pair}, {usual:.3f} mm between the others{guess}; wanted even spacing"
            )
    step = (positions[-1] - positions[0]) / (len(positions) - 1)
    sideways = np.array(positions) - positions[0] - np.arange(len(positions))[:, None] * step
    if np.linalg.norm(step - (step @ normal) * normal) > tolerance or np.abs(sideways).max() > tolerance:
        raise UserError(f"{folder}: the slices are shifted against each other in their plane; wanted a straight stack")
    return step


def _whole(path: Path, header: "Dataset", keyword: str, default: int) -> int:
    """Return a whole number of a header, or say that it is none or several."""
    value = header.get(keyword)
    if value is None or value == "":
        return default
    if not isinstance(value, int):  # IS is an int of pydicom's own
        raise UserError(f"{path}: damaged DICOM file: {keyword} is not one whole number")
    return int(value)


def _decimals(path: Path, header: "Dataset", keyword: str, count: int) -> list[float]:
    """Return a decimal string attribute as numbers, or say that the file does not have it."""
    value = header.get(keyword)
    items = [] if value is None else [*value] if isinstance(value, Iterable) else [value]
    try:
        numbers = [float(item) for item in items]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        said = "missing" if not items else f"{len(items)} values" if len(items) != count else "not numbers"
        raise UserError(f"{path}: {keyword} is {said}, wanted {count} numbers: the file has no geometry")
    return numbers


def _thickness(path: Path, header: "Dataset") -> str | None:
    if header.get("SliceThickness") in (None, ""):
        return None
    _decimals(path, header, "SliceThickness", 1)
    return _texts([header.SliceThickness])[0]


def _code(value: Any, known: re.Pattern[str]) -> str:
    """Return a code that is among the known ones; anything else is somebody's own words and is not copied."""
    text = str(value or "").strip().upper()
    return text if known.fullmatch(text) else ""


def _texts(values: Iterable[Any]) -> tuple[str, ...]:
    """Decimal strings exactly as the file has them; those that are longer than DICOM allows are rounded to fit."""
    texts = (str(getattr(value, "original_string", value)).strip() for value in values)
    return tuple(text if len(text) <= 16 else decimal_string(float(text)) for text in texts)


def decimal_string(value: float) -> str:
    """The number in the 16 characters that a decimal string may have."""
    for digits in range(16, 0, -1):
        text = f"{value:.{digits}g}"
        if len(text) <= 16:
            return text
    raise AssertionError(f"{value} does not fit a decimal string")
