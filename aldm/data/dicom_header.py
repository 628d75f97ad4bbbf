"""MR series in DICOM: the grid that their headers describe, checked before any voxel is read."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from aldm.data.dicom_files import PATIENT_TAGS, Slice, damage_of, decimals, whole_number
from aldm.data.nifti_header import NiftiSource, source_of
from aldm.errors import UserError

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])
_DEFLATED = "1.2.840.10008.1.2.1.99"
_SAME = 1e-4
"""Numbers of two slices that differ by no more are the same, however they are spelled (mm, or direction cosines)."""
_RESIDUAL_MM = 0.05
"""So far a slice may lie from the straight line through all of them: positions are often written to 0.1 mm."""
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
    description: str = field(repr=False)
    """Series Description: free text, which may name anybody."""
    patient: tuple[tuple[str, Any], ...] = field(repr=False)
    """Who and which study: (keyword, value), copied into a derived series only when the caller asks to."""
    study_uid: str = field(repr=False)
    frame_of_reference_uid: str = field(repr=False)
    anonymous_study_uid: str = field(repr=False)
    """New with each reading: derived series of one reading that do not name the patient share it."""
    anonymous_frame_of_reference_uid: str = field(repr=False)
    images: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    """SOP Class and Instance UID of each of its files; a derived series that joins the study refers to them."""
    notes: tuple[str, ...] = ()
    """What else lay in the folder and was left out."""

    def as_nifti(self) -> NiftiSource:
        """Return the same grid as the source of a NIfTI file."""
        return replace(source_of(self.affine, self.shape, self.folder), notes=self.notes)


def checked_series(folder: Path, slices: Sequence[Slice], max_voxels: int) -> tuple[DicomSource, list[Slice]]:
    """Check that the slices make one volume; return its description and the slices in the order of its z axis.

    Raises:
        UserError: they do not, or a header's values are damaged.
    """
    with damage_of(folder):
        return _checked_series(folder, slices, max_voxels)


def _checked_series(folder: Path, slices: Sequence[Slice], max_voxels: int) -> tuple[DicomSource, list[Slice]]:
    from pydicom.uid import generate_uid

    for item in slices:
        _check_mr_slice(item)
    _check_same_grid(folder, slices)
    cosines, spacing = decimals(slices[0], "ImageOrientationPatient", 6), decimals(slices[0], "PixelSpacing", 2)
    row, column = np.array(cosines[:3]), np.array(cosines[3:])
    if abs(row @ row - 1) > 1e-2 or abs(column @ column - 1) > 1e-2 or abs(row @ column) > 1e-2 or min(spacing) <= 0:
        raise UserError(f"{folder}: orientation {cosines} and pixel spacing {spacing} mm make no grid")
    row, column = row / np.linalg.norm(row), column / np.linalg.norm(column)
    normal = np.cross(row, column)
    placed = [(np.array(decimals(item, "ImagePositionPatient", 3)), item) for item in slices]
    placed.sort(key=lambda one: float(one[0] @ normal))
    ordered = [item for _, item in placed]
    origin, step = _fitted_line(folder, np.array([position for position, _ in placed]), ordered, normal)
    shape = (whole_number(slices[0], "Columns", 0), whole_number(slices[0], "Rows", 0), len(placed))
    if math.prod(shape) > max_voxels:
        raise UserError(f"{folder}: {'x'.join(map(str, shape))} voxels, the limit is {max_voxels:,}")
    affine = np.eye(4)
    affine[:3, :3] = _LPS_TO_RAS @ np.stack([row * spacing[1], column * spacing[0], step], axis=1)
    affine[:3, 3] = _LPS_TO_RAS @ origin
    header = ordered[0].header
    source = DicomSource(
        folder=folder,
        shape=shape,
        affine=affine,
        positions=tuple(_texts(item.header.ImagePositionPatient) for item in ordered),  # type: ignore[misc]
        orientation_cosines=_texts(header.ImageOrientationPatient),
        pixel_spacing=_texts(header.PixelSpacing),  # type: ignore[arg-type]
        slice_thickness=_thickness(ordered[0]),
        patient_position=_code(header.get("PatientPosition"), _PATIENT_POSITIONS),
        body_part=_code(header.get("BodyPartExamined"), _BODY_PARTS),
        description=str(header.get("SeriesDescription") or ""),
        patient=tuple((keyword, header[keyword].value) for keyword in PATIENT_TAGS if keyword in header),
        study_uid=str(header.get("StudyInstanceUID") or generate_uid()),
        frame_of_reference_uid=str(header.get("FrameOfReferenceUID") or generate_uid()),
        anonymous_study_uid=generate_uid(),
        anonymous_frame_of_reference_uid=generate_uid(),
        images=_images(ordered),
    )
    return source, ordered


def _images(slices: Sequence[Slice]) -> tuple[tuple[str, str], ...]:
    """Return the UIDs of the files that slices come from, once each; of a file without them nothing."""
    uids = [tuple(str(item.header.get(name) or "") for name in ("SOPClassUID", "SOPInstanceUID")) for item in slices]
    return tuple((kind, instance) for kind, instance in dict.fromkeys(uids) if kind and instance)


def _check_mr_slice(item: Slice) -> None:
    header = item.header
    if header.get("Modality") != "MR":
        raise UserError(f"{item.path}: modality is {str(header.get('Modality') or 'not given')[:16]}, wanted MR")
    if _is_mosaic(header):
        raise UserError(
            f"{item.path}: a mosaic (all slices of a volume as tiles of one picture), wanted one file a slice; convert "
            "it to NIfTI, for example with dcm2niix"
        )
    if item.frame is None and whole_number(item, "NumberOfFrames", 1) > 1:
        raise UserError(
            f"{item.path}: a multi-frame image that does not say where its frames lie, wanted an enhanced MR image or "
            "one file a slice; convert it to NIfTI, for example with dcm2niix"
        )
    if whole_number(item, "SamplesPerPixel", 1) != 1:
        raise UserError(f"{item.path}: a colour image, wanted one intensity per voxel")
    _check_pixels(item)


def _is_mosaic(header: Any) -> bool:
    """Whether a Siemens scanner has put a volume's slices side by side (Image Type, or Number Of Images In Mosaic)."""
    kinds = header.get("ImageType") or ()
    if "MOSAIC" in ([kinds] if isinstance(kinds, str) else list(kinds)):
        return True
    blocks = range(0x10, 0x20)
    made = [block for block in blocks if "SIEMENS MR HEADER" in str(header.get((0x0019, block), ""))]
    return any((0x0019, (block << 8) + 0x0A) in header for block in made)


def _check_pixels(item: Slice) -> None:
    """See that all voxels of an uncompressed file are there: GDCM reads what is missing as something."""
    header = item.header
    voxels = header.get_item("PixelData", keep_deferred=True)
    rows, columns = (whole_number(item, keyword, 0) for keyword in ("Rows", "Columns"))
    if header.file_meta.TransferSyntaxUID.is_compressed:
        return
    frames = whole_number(item, "NumberOfFrames", 1)
    wanted = frames * (rows * columns * whole_number(item, "BitsAllocated", 16) // 8)
    there = voxels.length
    if header.file_meta.TransferSyntaxUID != _DEFLATED:  # places in such a file are those of what it inflates to
        there = min(there, item.size - voxels.value_tell)
    if there < wanted:
        raise UserError(f"{item.path}: truncated, {wanted:,} bytes of voxels wanted, {there:,} there")


def _check_same_grid(folder: Path, slices: Sequence[Slice]) -> None:
    """See that the slices agree on their size, spacing and orientation, as numbers."""
    for keyword, count in (("Rows", 1), ("Columns", 1), ("PixelSpacing", 2), ("ImageOrientationPatient", 6)):
        values = np.array([decimals(item, keyword, count) for item in slices])
        apart = np.abs(values - np.median(values, axis=0)).max(axis=1)
        if apart.max() > _SAME:
            texts = [str(slices[index].header.get(keyword)) for index in (int(apart.argmin()), int(apart.argmax()))]
            raise UserError(
                f"{folder}: the slices differ in {keyword} ({' and '.join(texts)}), wanted one grid: a localizer or a "
                "second volume is among them"
            )


def _fitted_line(
    folder: Path, positions: np.ndarray, slices: Sequence[Slice], normal: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return where the first slice lies and the vector to the next, LPS mm, by least squares through all positions.

    Raises:
        UserError: a slice lies too far from that line; the message says which.
    """
    if len(positions) < 2:
        raise UserError(f"{folder}: a single slice, wanted a volume of at least 2: the folder of a series")
    index = np.arange(len(positions)) - (len(positions) - 1) / 2
    centre = positions.mean(axis=0)
    step = index @ (positions - centre) / (index @ index)
    along = positions @ normal
    gaps = np.diff(along)
    if gaps.min() < 1e-3:
        first = int(gaps.argmin())
        raise UserError(
            f"{folder}: {slices[first].name} and {slices[first + 1].name} lie at the same place; a series with several "
            "echoes, phases or repetitions is not one volume: keep one of them"
        )
    residual = positions - centre - index[:, None] * step
    tolerance = min(1.1 * _RESIDUAL_MM, 0.16 * float(step @ normal))  # a missing slice is 0.25 steps or more
    if np.abs(residual @ normal).max() > tolerance:
        _refuse_gaps(folder, gaps, slices)
    drift = step - (step @ normal) * normal
    sheared = np.linalg.norm(drift) > 0.02 * (step @ normal) and np.linalg.norm(drift) * index[-1] > tolerance
    if sheared or np.abs(residual).max() > tolerance:
        raise UserError(f"{folder}: the slices are shifted against each other in their plane; wanted a straight stack")
    return centre + index[0] * step, step


def _refuse_gaps(folder: Path, gaps: np.ndarray, slices: Sequence[Slice]) -> None:
    usual = float(np.median(gaps))
    worst = int(np.abs(gaps - usual).argmax())
    missing = round(float(gaps[worst]) / usual) - 1
    guess = f": {missing} slice{'s' * (missing > 1)} missing" if missing > 0 else ""
    raise UserError(
        f"{folder}: {gaps[worst]:.3f} mm between {slices[worst].name} and {slices[worst + 1].name}, {usual:.3f} mm "
        f"between the others{guess}; wanted even spacing"
    )


def _thickness(item: Slice) -> str | None:
    if item.header.get("SliceThickness") in (None, ""):
        return None
    decimals(item, "SliceThickness", 1)
    return _texts([item.header.SliceThickness])[0]


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
