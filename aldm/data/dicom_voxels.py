"""MR series in DICOM: the voxels of slices whose headers have been checked."""

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from aldm.data.dicom_codestream import is_self_describing, picture_size
from aldm.data.dicom_files import Slice, damage_of, decimals, guessed_syntax, open_dicom, whole_number
from aldm.errors import UserError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_KEPT = ("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel")
_BYTES, _WORDS = "1.2.840.10008.5.1.4.1.1.7.2", "1.2.840.10008.5.1.4.1.1.7.3"
"""Multi-frame grayscale secondary capture, of bytes and of words: stored values and nothing that would change them."""


def read_voxels(folder: Path, slices: Sequence[Slice], shape: tuple[int, int, int]) -> np.ndarray:
    """Return the voxels (X, Y, Z), float32, of the slices in that order.

    Stored values are scaled by each slice's rescale slope and intercept. Where the smallest value is shown white
    (MONOCHROME1) they are turned around. Padding becomes background: 0, or the lowest of the other voxels below 0.

    Raises:
        UserError: a file's voxels cannot be read, or they are not what its header says.
    """
    files: dict[Path, list[int]] = {}
    for index, item in enumerate(slices):
        files.setdefault(item.path, []).append(index)
    data, padding = np.empty(shape, np.float32), np.zeros(shape, bool)
    for path, indices in files.items():
        stored = _stored_values(folder, path, [slices[index] for index in indices])
        if stored.shape[1:] != (shape[1], shape[0]):
            raise UserError(f"{path}: the voxels make {stored.shape[:0:-1]}, the headers {shape[:2]}: it is damaged")
        for index, values in zip(indices, stored, strict=True):
            with damage_of(path):
                padding[:, :, index] = _padding(slices[index].header, values).T
                slope, intercept = _rescale(slices[index])
            data[:, :, index] = (values.astype(np.float64) * slope + intercept).T
    if any(str(item.header.get("PhotometricInterpretation")) == "MONOCHROME1" for item in slices):
        data = _turned_around(data, slices)
    if padding.any() and not padding.all():
        data[padding] = min(0.0, float(data[~padding].min()))
    return data


def _rescale(item: Slice) -> tuple[float, float]:
    """Return Rescale Slope and Intercept: 1 and 0 where they are missing, and a slope of 1 for the slope 0."""
    missing = (None, "")
    slope = 1.0 if item.header.get("RescaleSlope") in missing else decimals(item, "RescaleSlope", 1)[0]
    intercept = 0.0 if item.header.get("RescaleIntercept") in missing else decimals(item, "RescaleIntercept", 1)[0]
    return slope or 1.0, intercept


def _padding(header: "Dataset", stored: np.ndarray) -> np.ndarray:
    """Return where a slice is padding: stored values from Pixel Padding Value to its limit (PS3.3, C.7.5.1.1.2)."""
    value = header.get("PixelPaddingValue")
    if not isinstance(value, int):
        return np.zeros(stored.shape, bool)
    limit = header.get("PixelPaddingRangeLimit")
    low, high = sorted((value, limit if isinstance(limit, int) else value))
    return (stored >= low) & (stored <= high)


def _turned_around(data: np.ndarray, slices: Sequence[Slice]) -> np.ndarray:
    """Return MONOCHROME1 voxels as MONOCHROME2: the range of the stored values turned around, one number for all."""
    mirrors = []
    for item in slices:
        bits = whole_number(item, "BitsStored", whole_number(item, "BitsAllocated", 16))
        ends = -1 if whole_number(item, "PixelRepresentation", 0) else 2**bits - 1  # lowest and highest together
        slope, intercept = _rescale(item)
        mirrors.append(slope * ends + 2 * intercept)
    return np.asarray(np.float32(max(mirrors)) - data)


def _stored_values(folder: Path, path: Path, slices: Sequence[Slice]) -> np.ndarray:
    """Return the stored values (slices, rows, columns) of slices of one file."""
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # they would go to stderr, with values of the headers
    with tempfile.TemporaryDirectory(prefix="aldm-") as scratch:
        bare = Path(scratch) / "voxels.dcm"
        with damage_of(path):
            stripped = _stripped(path, [item.frame or 0 for item in slices])
        try:
            stripped.save_as(bare, enforce_file_format=True)
        except OSError as error:
            raise UserError(f"cannot write to {scratch}, where temporary files go: {error.strerror}") from error
        try:
            stored = sitk.GetArrayFromImage(sitk.ReadImage(str(bare)))
        except RuntimeError as error:
            reason = re.sub(r"\(0x\w+\)|\s+", " ", str(error).strip().splitlines()[-1]).replace(str(bare), path.name)
            raise UserError(
                f"{folder}: the voxels of {path.name} cannot be read, it is damaged or cut off: {reason}"
            ) from error
    stored = stored.reshape(-1, *stored.shape[-2:])
    if len(stored) != len(slices):
        raise UserError(f"{path}: {len(stored)} frames of voxels, wanted {len(slices)}: it is damaged")
    return stored


def _stripped(path: Path, frames: Sequence[int]) -> "Dataset":
    """Return frames of a file as an image that holds their stored values, as they are encoded, and nothing else."""
    import pydicom
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.encaps import encapsulate, generate_frames
    from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, generate_uid

    with open_dicom(path) as stream:
        whole = pydicom.dcmread(stream, specific_tags=[*_KEPT, "NumberOfFrames", "PixelData"])
    syntax = whole.file_meta.get("TransferSyntaxUID") or guessed_syntax(whole)
    made = Dataset()
    for keyword in _KEPT:
        if keyword in whole:
            made[keyword] = whole[keyword]
    bits = int(whole.BitsAllocated)
    count = int(whole.get("NumberOfFrames") or 1)
    if pydicom.uid.UID(syntax).is_encapsulated:
        encoded = list(generate_frames(whole.PixelData, number_of_frames=count))
        _check_streams(path, [encoded[frame] for frame in frames], whole)
        made.PixelData = encapsulate([encoded[frame] for frame in frames])
        made["PixelData"].VR, made["PixelData"].is_undefined_length = "OB", True
    else:
        size = made.Rows * made.Columns * bits // 8
        made.PixelData = b"".join(whole.PixelData[frame * size : (frame + 1) * size] for frame in frames)
        made.PixelData += bytes(len(made.PixelData) % 2)
        made["PixelData"].VR = "OB" if bits == 8 else "OW"
    made.NumberOfFrames, made.PhotometricInterpretation = len(frames), "MONOCHROME2"
    made.SOPClassUID, made.SOPInstanceUID = _BYTES if bits == 8 else _WORDS, generate_uid()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian if syntax == DeflatedExplicitVRLittleEndian else syntax
    return made


def _check_streams(path: Path, streams: Sequence[bytes], header: "Dataset") -> None:
    """See that compressed frames are as large as the header says, before a decoder takes memory for them."""
    if not is_self_describing(header.file_meta.TransferSyntaxUID):
        return
    for stream in streams:
        size = picture_size(stream)
        if size != (1, header.Rows, header.Columns):
            found = "no size" if size is None else f"{size[2]}x{size[1]} of {size[0]} component(s)"
            raise UserError(
                f"{path}: its compressed voxels claim {found}, the header {header.Columns}x{header.Rows}: it is damaged"
            )
