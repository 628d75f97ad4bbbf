"""The slow shading that a receive coil leaves on a volume: found by N4, divided out, and multiplied back.

N4 (Tustison et al. 2010, N4ITK: improved N3 bias correction) fits a cubic B-spline to the logarithm of the shading.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import ndimage

from aldm.data.foreground import Foreground, darkened
from aldm.data.registration import to_sitk
from aldm.data.volume import Volume
from aldm.errors import UserError

SHRUNK_MM = 8.0
"""N4 looks at every nth voxel, about so far apart: the shading is far smoother."""
_LEVELS, _ITERATIONS = 3, 50
_LATTICE = 13  # samples along a side; the finest of three levels has 4 spans, so 3 samples a span


@dataclass(frozen=True)
class BiasField:
    """A smooth factor: exp of a cubic spline through the values of a coarse lattice that spans the volume."""

    affine: tuple[tuple[float, ...], ...]
    """(4, 4) lattice index -> world RAS, mm."""
    log_values: tuple[tuple[tuple[float, ...], ...], ...]
    """(13, 13, 13); their mean over the foreground is 0, so intensities keep their units."""
    zero: float
    """The intensity that no shading changes."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "BiasField":
        """Undo dataclasses.asdict, JSON in between or not."""
        return cls(
            affine=tuple(tuple(map(float, row)) for row in values["affine"]),
            log_values=tuple(tuple(tuple(map(float, row)) for row in plane) for plane in values["log_values"]),
            zero=float(values["zero"]),
        )

    def on(self, affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Return the factor on a grid, (shape) float32; its edge goes on outside the lattice."""
        matrix = np.linalg.inv(np.array(self.affine)) @ affine
        lattice = np.array(self.log_values, np.float64)
        field = ndimage.affine_transform(
            lattice, matrix[:3, :3], matrix[:3, 3], output_shape=shape, output=np.float32, order=3, mode="nearest"
        )
        return np.exp(field, out=field)


def corrected(found: Foreground) -> tuple[Foreground, BiasField]:
    """Return the volume without its shading, and the shading.

    Raises:
        UserError: N4 cannot be run on it.
    """
    field = n4(found.volume, found.mask, zero=min(0.0, found.dark))
    volume = found.volume
    flat = (volume.data - np.float32(field.zero)) / field.on(volume.affine, volume.data.shape) + np.float32(field.zero)
    changed = Volume(flat, volume.affine)
    if found.outside is None or not found.stripped:
        return replace(found, volume=changed), field
    changed, dark = darkened(changed, found.outside)
    return replace(found, volume=changed, dark=dark), field


def shaded(data: np.ndarray, affine: np.ndarray, field: BiasField, zero: float) -> np.ndarray:
    """Multiply the shading onto a volume (X, Y, Z) whose intensity `zero` no shading changes."""
    return (data - np.float32(zero)) * field.on(affine, data.shape) + np.float32(zero)


def n4(volume: Volume, mask: np.ndarray, *, zero: float) -> BiasField:
    """Return the shading of a volume inside its mask, the same on every run (one thread).

    Args:
        volume: its intensities are `zero` where nothing shines.
        mask: (X, Y, Z) bool, where to look.

    Raises:
        UserError: N4 fails.
    """
    import SimpleITK as sitk

    steps = [max(1, round(SHRUNK_MM / side)) for side in volume.spacing_mm]
    lifted = np.maximum(volume.data - np.float32(zero), np.float32(1e-6))
    filtered = sitk.N4BiasFieldCorrectionImageFilter()
    filtered.SetNumberOfThreads(1)
    filtered.SetMaximumNumberOfIterations([_ITERATIONS] * _LEVELS)
    try:
        filtered.Execute(
            sitk.Shrink(to_sitk(Volume(lifted, volume.affine)), steps),
            sitk.Shrink(to_sitk(Volume(mask.astype(np.uint8), volume.affine)), steps),
        )
        sides = np.array(volume.data.shape)
        affine = volume.affine @ np.diag([*((sides - 1) / (_LATTICE - 1)), 1.0])
        lattice = to_sitk(Volume(np.zeros((_LATTICE,) * 3, np.float32), affine))
        field = sitk.GetArrayFromImage(filtered.GetLogBiasFieldAsImage(lattice)).transpose(2, 1, 0)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"N4 failed ({reason}); try preprocess.bias_correction none") from error
    plain = BiasField(tuple(map(tuple, affine.tolist())), _nested(field), zero)
    mean = float(np.log(plain.on(volume.affine, volume.data.shape)[mask]).mean())
    return replace(plain, log_values=_nested(field - mean))


def _nested(values: np.ndarray) -> tuple[tuple[tuple[float, ...], ...], ...]:
    return tuple(tuple(tuple(row) for row in plane) for plane in np.round(values.astype(np.float64), 7).tolist())
