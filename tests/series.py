"""DICOM series that many tests use: acquired ones, and what makes them unusable."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from aldm.data.dicom import MR_IMAGE_STORAGE
from aldm.data.phantom_anatomy import rotation

SHAPE = (7, 6, 5)  # columns, rows, slices
SPACING_MM = (0.9, 1.1, 2.5)  # between columns, rows, slices
Edit = Callable[[int, Dataset], None]


def make_series(
    folder: Path, *, angles: tuple[float, float, float] = (0, 0, 0), edit: Edit | None = None
) -> np.ndarray:
    """Write an acquired MR series in shuffled file order; return its values (columns, rows, slices), scaled."""
    folder.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(0).integers(0, 4000, SHAPE)
    directions = rotation(np.deg2rad(angles))
    series, study, frame = generate_uid(), generate_uid(), generate_uid()
    for k in range(SHAPE[2]):
        made = Dataset()
        made.PatientName, made.PatientID, made.PatientBirthDate = "Doe^Jane", "ID-4711", "19700101"
        made.StudyDate, made.AccessionNumber, made.InstitutionName = "20200202", "A1", "St. Elsewhere"
        made.Modality, made.SOPClassUID, made.SOPInstanceUID = "MR", MR_IMAGE_STORAGE, generate_uid()
        made.SeriesInstanceUID, made.StudyInstanceUID, made.FrameOfReferenceUID = series, study, frame
        made.PatientPosition, made.BodyPartExamined, made.SliceThickness = "HFS", "BRAIN", "2.4"
        made.private_block(0x0029, "SOMEONE", create=True).add_new(1, "LO", "secret")
        position = np.array([-31.4, 22.25, 10.125]) + directions[:, 2] * SPACING_MM[2] * k
        made.ImagePositionPatient = [f"{value:.8g}" for value in position]
        made.ImageOrientationPatient = [f"{value:.8g}" for value in (*directions[:, 0], *directions[:, 1])]
        made.PixelSpacing = [SPACING_MM[1], SPACING_MM[0]]
        made.Columns, made.Rows = SHAPE[:2]
        made.SamplesPerPixel, made.PhotometricInterpretation, made.PixelRepresentation = 1, "MONOCHROME2", 0
        made.BitsAllocated, made.BitsStored, made.HighBit = 16, 12, 11
        made.RescaleSlope, made.RescaleIntercept = [(1, 0), (0.5, -10.25)][k % 2]  # scanners do change it by slice
        made.PixelData = np.ascontiguousarray(values[:, :, k].T).astype("<u2").tobytes()
        made.file_meta = FileMetaDataset()
        made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        if edit is not None:
            edit(k, made)
        made.save_as(folder / f"IM{(3 * k) % SHAPE[2]}.dcm", enforce_file_format=True)
    slopes = np.array([[1, 0.5][k % 2] for k in range(SHAPE[2])])
    intercepts = np.array([[0, -10.25][k % 2] for k in range(SHAPE[2])])
    return values * slopes + intercepts


def eight_times(_: int, header: Dataset) -> None:
    """Make the series as large as a head."""
    for name in ("ImagePositionPatient", "PixelSpacing"):
        setattr(header, name, [8 * float(value) for value in header[name].value])
    header.SliceThickness = 8 * float(header.SliceThickness)


def in_the_head(k: int, header: Dataset) -> None:
    """Make a series as large as the head of test_any_sources, and place it there."""
    eight_times(k, header)
    header.ImagePositionPatient = [-110, -150, 30 + 20 * k]


def on_slice(slice_number: int, **values: object) -> Edit:
    """Set attributes in one slice."""

    def edit(k: int, header: Dataset) -> None:
        if k == slice_number:
            for keyword, value in values.items():
                setattr(header, keyword, value)

    return edit


UNUSABLE: list[tuple[Edit, str]] = [
    (on_slice(2, SeriesInstanceUID=generate_uid()), "2 series in one folder"),
    (on_slice(3, Modality="CT"), "modality is CT, wanted MR"),
    (on_slice(1, NumberOfFrames=4), "multi-frame"),
    (on_slice(1, SamplesPerPixel=3), "colour"),
    (on_slice(1, PixelSpacing=[2, 2]), "differ in PixelSpacing"),
    (on_slice(1, ImageOrientationPatient=[0, 1, 0, 1, 0, 0]), "differ in ImageOrientationPatient"),
    (on_slice(2, ImagePositionPatient=[-31.4, 22.25, 14.0]), "wanted even spacing"),
    (on_slice(2, ImagePositionPatient=[-31.4, 22.25, 12.625]), "lie at the same place"),
    (on_slice(2, ImagePositionPatient=[-29.4, 22.25, 15.125]), "shifted against each other"),
    (on_slice(2, ImagePositionPatient=None), "ImagePositionPatient is missing, wanted 3 numbers"),
    (on_slice(2, PixelData=b"\0\0"), "truncated, 84 bytes of voxels wanted, 2 there"),
    (on_slice(2, Rows=None), "without an image|differ in Rows"),
    (on_slice(1, Rows=[6, 6]), "differ in Rows|Rows is not one whole number"),
    (on_slice(1, SamplesPerPixel=[1, 1]), "SamplesPerPixel is not one whole number"),
    (on_slice(0, SliceThickness=["1", "2"]), "SliceThickness is 2 values, wanted 1"),
]
"""What makes a series unusable, and words of the error."""

SYNTAX = b"\x02\x00\x10\x00UI"  # TransferSyntaxUID
POSITION = b"\x20\x00\x32\x00DS"  # ImagePositionPatient
NAME = b"\x10\x00\x10\x00PN"  # PatientName
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "no transfer syntax": lambda whole: whole.replace(SYNTAX, b"\x02\x00\x11\x00UI"),
    "an invalid transfer syntax": lambda whole: whole.replace(b"1.2.840.10008.1.2.1\0", b"Doe^Jane".ljust(20, b"\0")),
    "a position that is a word": lambda whole: whole.replace(b"-31.4\\22.25", b"Doe^J\\22.25"),
    "an unknown kind of value": lambda whole: whole.replace(POSITION, POSITION[:4] + b"Q?"),
    "a number of another length": lambda whole: whole.replace(
        b"\x28\x00\x10\x00US\x02\x00", b"\x28\x00\x10\x00US\x01\x00"
    ),
    "a length beyond the file": lambda whole: whole.replace(NAME + b"\x08\x00", NAME + b"\xf0\xff"),
}
"""What may happen to the bytes of a file."""


def add_other_object(folder: Path, name: str, sop_class: str) -> None:
    """Put an object without an image beside a series."""
    header = Dataset()
    header.SOPClassUID, header.SOPInstanceUID, header.SeriesInstanceUID = sop_class, generate_uid(), generate_uid()
    header.Modality, header.PatientName = "PR", "Doe^Jane"
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.save_as(folder / name, enforce_file_format=True)
