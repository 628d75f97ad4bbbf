"""MR series in DICOM: read into an RAS+ volume, and a derived series written on exactly the same grid.

Headers are read with pydicom, voxels with SimpleITK (every transfer syntax that GDCM knows). A derived series says in
each file that it is synthetic, carries new UIDs and no private element, and names the patient only when asked to.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from aldm import __version__
from aldm.data.dicom_enhanced import frames_of, is_enhanced
from aldm.data.dicom_files import Slice, damage_of, is_dicom, read_headers
from aldm.data.dicom_header import DicomSource, checked_series, decimal_string
from aldm.data.dicom_series import SeriesVolume, chosen_volume, volumes_of
from aldm.data.dicom_voxels import read_voxels
from aldm.data.nifti_header import MAX_VOXELS, is_nifti_name
from aldm.data.volume import Volume, to_ras, to_source_orientation
from aldm.errors import UserError
from aldm.files import atomic_folder

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

logger = logging.getLogger(__name__)

MR_IMAGE_STORAGE = "1.2.840.10008.5.1.4.1.1.4"
FIRST_FILE = "SYNTHETIC_0001.dcm"
"""Name of the first file of every series written here."""


def is_series_folder(path: str | Path) -> bool:
    """Tell whether a folder holds a DICOM file (not in a folder below it)."""
    path = Path(path)
    return path.is_dir() and any(is_dicom(file) for file in sorted(path.iterdir()))


def is_series(path: str | Path) -> bool:
    """Tell whether a path is one for `read_series`: a folder or a DICOM file, and no NIfTI file by its name."""
    path = Path(path)
    return not is_nifti_name(path) and (path.is_dir() or is_dicom(path))


def list_series(folder: str | Path, *, max_voxels: int = MAX_VOXELS, patient: bool = True) -> list[SeriesVolume]:
    """Return the volumes that a folder of DICOM files (or one file) holds; voxels are left on the disk.

    Raises:
        UserError: no image in DICOM, or a damaged header.
    """
    return _volumes(Path(folder), max_voxels, patient)[0]


def series_description(
    folder: str | Path, *, series: str | None = None, max_voxels: int = MAX_VOXELS, patient: bool = True
) -> str:
    """Return what a series says that it shows, before its voxels are read; free text, which may name anybody.

    Raises:
        UserError: as `list_series`, and none or several volumes meant by `series`.
    """
    volumes, _ = _volumes(Path(folder), max_voxels, patient)
    return chosen_volume(volumes, series, folder, names=patient).description


def _volumes(folder: Path, max_voxels: int, patient: bool) -> tuple[list[SeriesVolume], str]:
    """Return what a folder holds, and what is to be said of what was left out."""
    slices: list[Slice] = []
    items, note = read_headers(folder, patient=patient)
    for item in items:
        with damage_of(item.path):
            slices += frames_of(item, max_voxels) if is_enhanced(item) else [item]
    with damage_of(folder):
        return volumes_of(slices), note


def read_series(
    folder: str | Path, *, series: str | None = None, max_voxels: int = MAX_VOXELS, patient: bool = True
) -> tuple[Volume, DicomSource]:
    """Read an MR series as an RAS+ volume in float32, rescale slope and intercept applied.

    Files that are not DICOM are passed over, as are folders below; presentation states, reports and other objects
    without an image are left out, which `notes` of the source says.

    Args:
        folder: the series, one file a slice or enhanced (multi-frame); or one enhanced file.
        series: which one where there are several: the Series Number (5; 5.2 for the second of its volumes), the Series
            Instance UID, or a part of the Series Description.
        max_voxels: limit that the headers are checked against before anything is allocated.
        patient: read who and which study as well, for `write_series(keep_patient=True)`; without it no message repeats
            a description either.

    Raises:
        UserError: no image in DICOM, none or several volumes meant by `series` (the message lists them), another
            modality than MR, mosaics, colour images, multi-frame images without functional groups, a damaged file, a
            single slice, slices that are missing, uneven, doubled or sheared, or a volume without contrast.
    """
    folder = Path(folder)
    volumes, note = _volumes(folder, max_voxels, patient)
    chosen = chosen_volume(volumes, series, folder, names=patient)
    source, slices = checked_series(folder, chosen.slices, max_voxels)
    data = read_voxels(folder, slices, source.shape)
    low, high = float(data.min()), float(data.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UserError(f"{folder}: some voxels are NaN or infinite, wanted finite numbers")
    if low == high:
        raise UserError(f"{folder}: every voxel is {low:g} (constant), so there is nothing to see in it")
    if note:
        logger.warning("%s: %s", folder, note)
        source = replace(source, notes=(note,))
    return to_ras(data, source.affine), source


# ------------------------------------------------------------------------------------------------------------ writing


def write_series(
    folder: str | Path,
    data: np.ndarray,
    source: DicomSource,
    *,
    description: str,
    derivation: str = "",
    keep_patient: bool = False,
    others: Sequence[DicomSource] = (),
    series_number: int = 9000,
    overwrite: bool = False,
) -> list[Path]:
    """Write a synthetic MR series, one file a slice, on exactly the source's grid; return the files in slice order.

    Values are kept as 16-bit numbers with one rescale slope and intercept: exact to 1 / 131,070 of their range.

    Args:
        folder: folder to make; it appears whole or not at all.
        data: (X, Y, Z) in the axes of the RAS+ volume that `read_series` returned, finite.
        source: the grid, from `read_series`.
        description: what the series shows, such as "t2 from t1"; the Series Description is "SYNTHETIC " and this.
        derivation: how it was made, for Derivation Description.
        keep_patient: join the source's study, refer to its images, and copy who the patient is. Otherwise no attribute
            of the source but its geometry, patient position and body part is copied, and study and frame of reference
            are new.
        others: what else it was made of, which `keep_patient` refers to as well.
        series_number: Series Number.
        overwrite: replace a series that this function wrote.

    Raises:
        UserError: the folder cannot be written, or holds something else.
    """
    from pydicom.uid import generate_uid

    assert np.isfinite(data).all(), "voxels must be finite"
    slope, intercept, stored = _quantised(to_source_orientation(data, source.as_nifti()))
    assert stored.shape == source.shape, (stored.shape, source.shape)
    low, high = (float(value) for value in np.percentile(data, (0.5, 99.5)))
    common = _common_attributes(source, description, derivation, keep_patient)
    if keep_patient:
        common.SourceImageSequence = [_reference(*uids) for each in (source, *others) for uids in each.images]
    common.SeriesInstanceUID = generate_uid()
    common.SeriesNumber = series_number
    common.RescaleSlope, common.RescaleIntercept, common.RescaleType = slope, intercept, "US"
    common.WindowCenter = decimal_string((low + high) / 2)
    common.WindowWidth = decimal_string(max(high - low, 1e-6))
    names = [FIRST_FILE.replace("0001", f"{index + 1:04d}") for index in range(source.shape[2])]
    with atomic_folder(folder, overwrite, marker=FIRST_FILE) as temporary:
        for index, name in enumerate(names):
            _write_slice(temporary / name, common, source, index, stored[:, :, index])
    return [Path(folder) / name for name in names]


def _reference(sop_class_uid: str, sop_instance_uid: str) -> "Dataset":
    """Return an item of Source Image Sequence."""
    from pydicom.config import disable_value_validation
    from pydicom.dataset import Dataset

    item = Dataset()
    with disable_value_validation():  # as the source says
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class_uid, sop_instance_uid
    return item


def _quantised(data: np.ndarray) -> tuple[str, str, np.ndarray]:
    """Return slope and intercept as decimal strings, and the uint16 values that they map back to `data`."""
    low, high = float(data.min()), float(data.max())
    intercept = decimal_string(low)
    slope = decimal_string((high - float(intercept)) / 65535 if high > low else 1.0)
    values = (data.astype(np.float64) - float(intercept)) / float(slope)  # with the rounded numbers that are written
    return slope, intercept, np.clip(np.rint(values), 0, 65535).astype(np.uint16)


def _common_attributes(source: DicomSource, description: str, derivation: str, keep_patient: bool) -> "Dataset":
    """Return what all slices share."""
    from pydicom.config import disable_value_validation
    from pydicom.dataset import Dataset

    made = Dataset()
    made.SpecificCharacterSet = "ISO_IR 192"
    made.PatientName, made.PatientID, made.PatientBirthDate, made.PatientSex = "SYNTHETIC", "SYNTHETIC", "", ""
    made.StudyDate, made.StudyTime, made.StudyID, made.AccessionNumber, made.ReferringPhysicianName = ("",) * 5
    made.StudyInstanceUID = source.anonymous_study_uid
    made.FrameOfReferenceUID = source.anonymous_frame_of_reference_uid
    made.PatientIdentityRemoved = "YES"
    made.DeidentificationMethod = "Nothing kept but the grid, patient position and body part"
    if keep_patient:
        del made.PatientIdentityRemoved, made.DeidentificationMethod
        made.StudyInstanceUID, made.FrameOfReferenceUID = source.study_uid, source.frame_of_reference_uid
        with disable_value_validation():  # what the source says is kept, valid or not
            for keyword, value in source.patient:
                setattr(made, keyword, value)
    made.SOPClassUID = MR_IMAGE_STORAGE
    made.Modality = "MR"
    made.ImageType = ["DERIVED", "SECONDARY", "OTHER"]
    made.SyntheticData = "YES"
    made.SeriesDescription = f"SYNTHETIC {description}"[:64]
    made.DerivationDescription = f"SYNTHETIC image, not acquired. {derivation}".strip()[:1024]
    made.ImageComments = "SYNTHETIC: for research use only, not for diagnosis"
    made.ContentQualification = "RESEARCH"
    made.BurnedInAnnotation = "NO"
    made.Manufacturer, made.ManufacturerModelName, made.SoftwareVersions = "aldm", "aldm", __version__
    made.BodyPartExamined, made.PatientPosition = source.body_part, source.patient_position
    made.PositionReferenceIndicator = ""
    made.ScanningSequence, made.SequenceVariant, made.ScanOptions = "RM", "NONE", ""
    made.MRAcquisitionType, made.EchoTime, made.RepetitionTime, made.EchoTrainLength = "3D", None, None, None
    made.SliceThickness = source.slice_thickness
    made.SpacingBetweenSlices = decimal_string(float(np.linalg.norm(source.affine[:3, 2])))
    made.ImageOrientationPatient = list(source.orientation_cosines)
    made.PixelSpacing = list(source.pixel_spacing)
    made.Columns, made.Rows = source.shape[:2]
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
    made.BitsAllocated, made.BitsStored, made.HighBit, made.PixelRepresentation = 16, 16, 15, 0
    return made


def _write_slice(path: Path, common: "Dataset", source: DicomSource, index: int, stored: np.ndarray) -> None:
    """Write one slice; `stored` is (X, Y) uint16."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    made = Dataset()
    made.update(common)
    made.SOPInstanceUID = generate_uid()
    made.InstanceNumber = index + 1
    made.ImagePositionPatient = list(source.positions[index])
    made.PixelData = np.ascontiguousarray(stored.T).astype("<u2").tobytes()
    made.file_meta = FileMetaDataset()
    made.file_meta.MediaStorageSOPClassUID = MR_IMAGE_STORAGE
    made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.save_as(path, enforce_file_format=True)
