"""A volume with its geometry: crop, pad, resample, and NIfTI files read with suspicion and written exactly.

Arrays are X Y Z of an RAS+ volume; an affine maps voxel indices to world RAS coordinates in mm, voxel centres at whole
indices.
"""

import contextlib
import gzip
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import nibabel
import numpy as np
from nibabel.spatialimages import HeaderDataError
from scipy import ndimage

from aldm.data.nifti_header import MAX_VOXELS as MAX_VOXELS
from aldm.data.nifti_header import NiftiSource as NiftiSource
from aldm.data.nifti_header import is_nifti_name, open_nifti, read_header, read_voxels
from aldm.errors import UserError
from aldm.files import atomic_path

logger = logging.getLogger(__name__)

_RAS = nibabel.orientations.axcodes2ornt("RAS")


@dataclass(frozen=True, eq=False)
class Volume:
    """A scalar volume: `data` (X, Y, Z) float32 and `affine` (4, 4) float64, voxel index -> world RAS in mm."""

    data: np.ndarray
    affine: np.ndarray
    num_nan: int = 0
    """Voxels around the patient that were NaN in the file and are as dark as the darkest here."""

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between neighbouring voxels along each array axis, mm."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(x), float(y), float(z)

    @property
    def orientation(self) -> str:
        """Anatomical direction of each array axis, such as RAS or LPS."""
        return "".join(nibabel.aff2axcodes(self.affine))


# --------------------------------------------------------------------------------------------------------- geometry


def one_grid(volumes: Iterable[Volume]) -> bool:
    """Whether all volumes have the same affine and shape."""
    first, *rest = volumes
    return all(volume.data.shape == first.data.shape and np.array_equal(volume.affine, first.affine) for volume in rest)


def crop_or_pad(volume: Volume, start: Sequence[int], shape: Sequence[int], fill: float) -> Volume:
    """Return the box of `shape` voxels that begins at voxel `start` (may be negative); `fill` outside the volume."""
    data = np.full(tuple(shape), fill, volume.data.dtype)
    low = [max(0, s) for s in start]
    high = [max(lo, min(n, s + m)) for lo, n, s, m in zip(low, volume.data.shape, start, shape, strict=True)]
    inner = tuple(slice(lo - s, hi - s) for lo, hi, s in zip(low, high, start, strict=True))
    if all(lo < hi for lo, hi in zip(low, high, strict=True)):
        data[inner] = volume.data[tuple(slice(lo, hi) for lo, hi in zip(low, high, strict=True))]
    return Volume(data, shifted(volume.affine, start))


def shifted(affine: np.ndarray, start: Sequence[int]) -> np.ndarray:
    """Return the affine of the box that begins at voxel `start`."""
    moved = np.array(affine, np.float64)
    moved[:3, 3] += affine[:3, :3] @ np.asarray(start, np.float64)
    return moved


def resample(
    volume: Volume,
    affine: np.ndarray,
    shape: Sequence[int],
    *,
    order: str = "linear",
    fill: float = 0.0,
    reach: float = 0.0,
) -> Volume:
    """Sample a volume on another grid.

    Where the new grid is coarser, a Gaussian takes away what it cannot carry: per axis of the volume, sigma^2 =
    (f^2 - 1) / (8 ln 2) in voxels with f = new step / old step, which matches the point spread functions of the two
    grids (Cardoso et al. 2015, Scale factor point spread function matching). A grid that differs by whole voxels is
    cropped or padded, so nothing is interpolated.

    Args:
        volume: what is sampled.
        affine: (4, 4) voxel -> world RAS in mm of the new grid.
        shape: voxels of the new grid.
        order: linear, or nearest (labels; no Gaussian).
        fill: value outside the volume's field of view, which ends half a voxel beyond the outer voxel centres.
        reach: so many voxels of the new grid beyond its end there is what is at its end; 0.5 gives a value to every
            voxel that lies partly in it.
    """
    assert order in ("linear", "nearest"), order
    shape = tuple(int(n) for n in shape)
    # index on the new grid -> index in the volume; rounded, so that the last bits are the same on every run
    matrix = np.round(np.linalg.inv(volume.affine) @ affine, 10)
    start = np.rint(matrix[:3, 3])
    drift = np.abs(matrix[:3, :3] - np.eye(3)) @ (np.array(shape) - 1) + np.abs(matrix[:3, 3] - start)
    if drift.max() < 1e-3:
        return Volume(crop_or_pad(volume, start.astype(int).tolist(), shape, fill).data, np.array(affine, np.float64))
    linear, offset = matrix[:3, :3], matrix[:3, 3]
    data = volume.data
    if order == "linear":
        step = np.linalg.norm(linear, axis=1)
        sigma = np.sqrt(np.maximum(step**2 - 1, 0) / (8 * math.log(2)))
        if sigma.max() > 0.05:
            data = ndimage.gaussian_filter(data, sigma, mode="nearest")
    diagonal = np.abs(linear - np.diag(np.diag(linear))) @ np.array(shape) < 1e-3
    sampled = ndimage.affine_transform(
        data,
        np.diag(linear) if diagonal.all() else linear,
        offset,
        output_shape=shape,
        output=data.dtype,
        order=1 if order == "linear" else 0,
        mode="nearest",
        prefilter=False,
    )
    _fill_outside(sampled, linear, offset, volume.data.shape, fill, reach)
    return Volume(sampled, np.array(affine, np.float64))


def _fill_outside(
    sampled: np.ndarray, linear: np.ndarray, offset: np.ndarray, shape: tuple[int, ...], fill: float, reach: float
) -> None:
    """Set to `fill`, in place, what was sampled outside the field of view of a volume of `shape`."""
    beyond = 0.501 + reach * np.linalg.norm(linear, axis=1)
    steps = [np.arange(n, dtype=np.float64) for n in sampled.shape]
    for x in range(sampled.shape[0]):
        outside = np.zeros(sampled.shape[1:], bool)
        for axis in range(3):
            along_y = linear[axis, 0] * x + linear[axis, 1] * steps[1] + offset[axis]
            index = along_y[:, None] + linear[axis, 2] * steps[2]
            outside |= (index < -beyond[axis]) | (index > shape[axis] - 1 + beyond[axis])
        sampled[x][outside] = fill


def connected_to_faces(mask: np.ndarray, structure: np.ndarray | None = None) -> np.ndarray:
    """Return the components of a mask (X, Y, Z) that touch the faces of the field of view, as bool.

    Args:
        mask: bool.
        structure: which neighbours are connected (scipy.ndimage.label); None takes those that share a face.
    """
    labels, count = ndimage.label(mask, structure)
    touching = np.zeros(count + 1, bool)
    for axis in range(3):
        for index in (0, -1):
            touching[np.unique(labels.take(index, axis=axis))] = True
    touching[0] = False
    return np.asarray(touching[labels])


def to_ras(data: np.ndarray, affine: np.ndarray) -> Volume:
    """Return the volume with its axes flipped and permuted so that they run R, A, S; nothing is resampled."""
    orientation = nibabel.io_orientation(affine)
    turned = nibabel.apply_orientation(data, orientation)
    return Volume(
        np.ascontiguousarray(turned, np.float32), affine @ nibabel.orientations.inv_ornt_aff(orientation, data.shape)
    )


def to_source_orientation(volume_ras: np.ndarray, source: NiftiSource) -> np.ndarray:
    """Return data of an RAS+ volume in the axis order and direction of `source` (undoes what load_nifti did)."""
    turn = nibabel.orientations.ornt_transform(_RAS, nibabel.io_orientation(source.affine))
    return np.asarray(nibabel.apply_orientation(volume_ras, turn))


# ------------------------------------------------------------------------------------------------------------- NIfTI


def load_nifti(
    path: str | Path, *, max_voxels: int = MAX_VOXELS, allow_constant: bool = False
) -> tuple[Volume, NiftiSource]:
    """Read a NIfTI-1 or -2 file (.nii, .nii.gz) as an RAS+ volume in float32, scale factors applied.

    Args:
        path: the file.
        max_voxels: limit that the header is checked against before anything is allocated.
        allow_constant: take a volume without contrast (an empty label map).

    Raises:
        UserError: anything about the file that makes it unusable: missing, not NIfTI, truncated, more data than the
            header says, too large, not 3D (trailing axes of length 1 are dropped), complex or RGB voxels, infinite
            voxels, NaN elsewhere than around the patient, constant or all zero, singular affine.
    """
    path = Path(path)
    with open_nifti(path) as stream:
        source = read_header(stream, path, max_voxels)
        raw = read_voxels(stream, source)
    try:
        slope, inter = source.parsed_header().get_slope_inter()
    except HeaderDataError as error:
        raise UserError(f"{path}: bad scale factors in the header: {error}") from error
    small = raw.dtype.itemsize <= 2 or raw.dtype.type is np.float32  # these are exact in float32
    data: np.ndarray = raw.astype(np.float32 if small else np.float64, copy=False)
    if slope is not None and (slope != 1 or inter != 0):
        data = data * data.dtype.type(slope) + data.dtype.type(inter)
    with np.errstate(over="ignore"):
        data = data.astype(np.float32, copy=False)
    low, high = float(data.min()), float(data.max())
    num_nan = 0
    if not (math.isfinite(low) and math.isfinite(high)):
        num_nan = _darken_nan(data, path)
        low, high = float(data.min()), float(data.max())
    if low == high and not allow_constant:
        what = "every voxel is zero" if low == 0 else f"every voxel is {low:g} (constant)"
        raise UserError(f"{path}: {what}, so there is nothing to see in it")
    return replace(to_ras(data, source.affine), num_nan=num_nan), source


def _darken_nan(data: np.ndarray, path: Path) -> int:
    """Give NaN voxels that surround the patient the least value, in place, and return how many there are.

    Raises:
        UserError: infinite voxels, or NaN that is not connected to the faces of the field of view.
    """
    nan = np.isnan(data)
    infinite = int(data.size - np.isfinite(data).sum() - nan.sum())
    if infinite or nan.all():
        found = f"{infinite} of {data.size} voxels are infinite" if infinite else "every voxel is NaN"
        raise UserError(f"{path}: {found}, wanted finite numbers")
    around = connected_to_faces(nan, np.ones((3, 3, 3)))
    inside = int(nan.sum() - around.sum())
    if inside:
        raise UserError(
            f"{path}: {inside} of {data.size} voxels are NaN inside the patient, wanted finite numbers there (NaN "
            "around the patient is taken as background): fill them, such as with fslmaths -nan"
        )
    data[nan] = np.nanmin(data)
    num_nan = int(nan.sum())
    logger.warning("%s: %d of %d voxels are NaN around the patient: taken as background", path, num_nan, data.size)
    return num_nan


def read_source(path: str | Path, *, max_voxels: int = MAX_VOXELS) -> NiftiSource:
    """Read and check the header alone; raises UserError like load_nifti."""
    with open_nifti(Path(path)) as stream:
        return read_header(stream, Path(path), max_voxels)


def save_nifti(
    path: str | Path,
    data_on_source_grid: np.ndarray,
    source: NiftiSource,
    *,
    description: str = "",
    overwrite: bool = False,
) -> None:
    """Write float32 voxels on exactly the source's grid: its shape, affine, qform and sform with codes, and units.

    The file appears under its name only when it is whole.

    Args:
        path: .nii or .nii.gz.
        data_on_source_grid: (X, Y, Z) in the source's own axis order (to_source_orientation).
        source: the grid.
        description: `descrip` of the header, cut at 79 bytes.
        overwrite: replace an existing file.

    Raises:
        UserError: another suffix, an existing file without `overwrite`, a folder that cannot be written, a full disk.
    """
    path = Path(path)
    if not is_nifti_name(path):
        raise UserError(f"{path}: wanted a name that ends in .nii or .nii.gz")
    assert data_on_source_grid.shape == source.shape, (data_on_source_grid.shape, source.shape)
    header = source.parsed_header()
    header.set_data_dtype(np.float32)
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["cal_min"] = header["cal_max"] = header["intent_code"] = 0
    header["intent_name"] = b""
    header["descrip"] = description.encode("ascii", "replace")[:79]
    header["vox_offset"] = len(header.binaryblock) + 4
    header["magic"] = b"n+1" if len(header.binaryblock) == 348 else b"n+2\0\r\n\032\n"
    with atomic_path(path, overwrite=overwrite) as temporary, contextlib.ExitStack() as stack:
        stream: IO[bytes] = stack.enter_context(temporary.open("wb"))
        if path.name.lower().endswith(".gz"):  # 4: a third of the time of 9, 3 % larger
            zipped = gzip.GzipFile(filename="", mode="wb", compresslevel=4, fileobj=stream, mtime=0)
            stream = stack.enter_context(zipped)  # type: ignore[arg-type]
        stream.write(header.binaryblock + b"\0\0\0\0")
        for index in range(source.shape[2]):  # slice by slice: a copy of a large volume is not for nothing
            stream.write(np.asarray(data_on_source_grid[:, :, index], np.float32).tobytes(order="F"))
