"""A translation on its way: a volume in boxes, what is asked of each, and the results put together on the own grid.

Arrays are X Y Z of RAS+ volumes, intensities in the models in [-1, 1].
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from aldm.config import PreprocessConfig, Shape
from aldm.data.bias import shaded
from aldm.data.boxes import blend, region_of
from aldm.data.foreground import constant_background
from aldm.data.intensity import unscale
from aldm.data.modalities import sort_modalities
from aldm.data.nifti_header import NiftiSource
from aldm.data.preprocess import PreprocessRecord, model_grid, restore
from aldm.data.volume import Volume, save_nifti, to_source_orientation
from aldm.diffusion import NoiseWindow
from aldm.errors import UserError
from aldm.memory import gigabytes
from aldm.predictors import MemoryLimit
from aldm.provenance import describe

SEVERAL = "+"
"""Between the names of several sources, where they stand in one word."""
BLENDING_BYTES = 20
"""Memory of making one of several boxes' results, per voxel of the region that they cover together."""
MAP_BLENDING_BYTES = 8
"""The same of a map beside the result."""
BOX_BYTES = 8
"""Memory of what is kept of a box until all are made, per voxel: the mean, and a copy on the way."""
NUM_MAPS = 2
"""What may lie beside the mean: spread and uncertainty."""
PART_BYTES = 4
"""The same of the code of a source, and of a map beside the mean."""
PREPARATION_BYTES = 24
"""Memory of putting a volume on the model's grid and back, per voxel of the larger grid (measured: 13 to 22)."""


class BoxResult(NamedTuple):
    """What was made of one box, (spatial_shape) float32, for intensities in [-1, 1]."""

    mean: np.ndarray
    """Of the samples, in [-1, 1]."""
    spread: np.ndarray | None
    """Standard deviation of the samples; None for one sample."""
    half_width: np.ndarray | None
    """Half of the calibrated interval around the mean; None where the model has no calibration for it."""


@dataclass(frozen=True, eq=False)
class Translation:
    """A translated volume on the grid of the volume that it was made from."""

    volume: Volume
    """float32, scaled as `intensity` in the provenance says."""
    uncertainty: np.ndarray | None
    """(X, Y, Z) float32 in the volume's own units: half of the calibrated interval that the truth lies in, with the
    probability that the provenance names; None where the model has no calibration for it."""
    spread: np.ndarray | None
    """(X, Y, Z) float32 in the volume's own units: voxelwise standard deviation of the samples; None for one sample. It
    is not calibrated: it says how far apart the samples are, not how far from the truth."""
    provenance: dict[str, Any]
    """How it was made: JSON-able."""

    def save(self, path: str | Path, grid: NiftiSource, *, overwrite: bool = False) -> None:
        """Write the volume to a NIfTI file.

        Args:
            path: ends with .nii or .nii.gz.
            grid: that and the orientation of the volume it was made from, from `load_nifti`.
            overwrite: replace a file that is there.

        Raises:
            UserError: the file is there, or cannot be written.
        """
        data = to_source_orientation(self.volume.data, grid)
        save_nifti(path, data, grid, description=describe(self.provenance), overwrite=overwrite)


@dataclass(frozen=True, eq=False)
class Encoded:
    """A volume, ready to be translated."""

    codes: tuple[Mapping[str, Tensor], ...]
    """Of each of its boxes, source modality -> what `Translator.encode` returned, that of the record's volume first."""
    record: PreprocessRecord
    """How the boxes lie in the volume."""
    shape: Shape
    """Voxels of a box."""
    stride: int
    """Voxels to a step on the grid of a code."""

    def requests(self, target: str, seed: int) -> list["Request"]:
        """Return what `Translator.translate_batch` has to make for one target, a request a box."""
        boxes = self.record.boxes
        if len(boxes) == 1:
            return [Request(self.codes[0], target, seed)]
        start, whole = region_of(boxes, self.shape)
        windows = [(self._steps(whole), self._steps(np.subtract(box, start))) for box in boxes]
        return [Request(codes, target, seed, at) for codes, at in zip(self.codes, windows, strict=True)]

    def _steps(self, voxels: Shape | np.ndarray) -> Shape:
        x, y, z = (int(count) // self.stride for count in voxels)
        return x, y, z


@dataclass(frozen=True, eq=False)
class Request:
    """One box of one volume, for `Translator.translate_batch`."""

    codes: Mapping[str, Tensor]
    """Source modality -> what `Translator.encode` returned; several where the model takes any sources."""
    target: str
    seed: int
    """Of the first sample; sample i has seed + i."""
    window: tuple[Shape, Shape] | None = None
    """Sides of the code of all the volume's boxes together, and where this one begins; None: it is the only one."""

    @property
    def source(self) -> str:
        """The sources in one word, such as t1+t2, in the order of the vocabulary."""
        return SEVERAL.join(sort_modalities(self.codes))

    def noise(self, generator: torch.Generator) -> torch.Generator | NoiseWindow:
        """Return where a sample's noise comes from: boxes that overlap have the same noise there."""
        return generator if self.window is None else NoiseWindow(generator, *self.window)


def on_own_grid(
    results: Sequence[BoxResult],
    record: PreprocessRecord,
    volume: Volume,
    low: float,
    high: float,
    background: float,
) -> BoxResult:
    """Return the results of all boxes as one, on the volume's own grid: mean in [low, high], the others to its scale.

    Where boxes overlap the standard deviation is the weighted mean of theirs. They see the same noise there, so their
    samples vary together; if they did not wholly, this is more than the truth, never less. The same is done with half
    widths: an interval half as wide around each of two means holds their mean too.

    Args:
        results: a box each, in the order of `record.boxes`.
        record: how the boxes lie.
        volume: what they were cut from.
        low, high: intensities of -1 and +1.
        background: what a masked volume has outside its mask.
    """
    # outside the boxes nothing was predicted: background
    mean = blend([one.mean for one in results], record.boxes, -1)
    data = restore(unscale(mean, low, high), record, volume, fill=low)
    if record.bias is not None:  # the shading that was taken from the source is the result's too
        data = shaded(data, volume.affine, record.bias, min(0.0, low))
    outside = None if record.background is None else constant_background(volume.data)
    if outside is not None:  # a masked volume's result is masked alike
        data[outside] = background

    def beside(parts: Sequence[np.ndarray | None]) -> np.ndarray | None:
        """Put what lies beside the mean, in units of half the range, on the same grid."""
        found = [part for part in parts if part is not None]
        if not found:
            return None
        whole = restore(blend(found, record.boxes, 0) * ((high - low) / 2), record, volume, fill=0.0)
        if record.bias is not None:
            whole = shaded(whole, volume.affine, record.bias, 0.0)
        if outside is not None:
            whole[outside] = 0.0
        return whole

    return BoxResult(data, beside([one.spread for one in results]), beside([one.half_width for one in results]))


def check_room(volumes: Sequence[Volume], config: PreprocessConfig, limit: MemoryLimit) -> None:
    """Refuse volumes whose preparation would break the limit."""
    _, grid = model_grid(volumes, config)
    voxels = sum(max(volume.data.size, math.prod(grid)) for volume in volumes)
    needed, left = PREPARATION_BYTES * voxels, limit.left()
    if needed > left:
        raise UserError(
            f"`max_memory_gb` {gigabytes(limit.max_bytes)} is too little to prepare {voxels:,} voxels: that needs "
            f"{gigabytes(needed)} GB and {gigabytes(left)} GB are left; give at least "
            f"{gigabytes(limit.max_bytes + needed - left)}"
        )


def check_room_to_blend(
    record: PreprocessRecord, shape: Shape, num_sources: int, needed_bytes: int, limit: MemoryLimit
) -> None:
    """Refuse a volume in several boxes whose results, held together, would break the limit.

    Args:
        record: how they lie.
        shape: voxels of one.
        num_sources: volumes that are translated together.
        needed_bytes: what translating one of them takes.
        limit: the limit.
    """
    region = math.prod(region_of(record.boxes, shape)[1])
    a_box = (BOX_BYTES + PART_BYTES * (num_sources + NUM_MAPS)) * math.prod(shape)
    needed = (BLENDING_BYTES + MAP_BLENDING_BYTES) * region + a_box * len(record.boxes) + needed_bytes
    left = limit.left()
    if needed > left:
        raise UserError(
            f"`max_memory_gb` {gigabytes(limit.max_bytes)} is too little for the {len(record.boxes)} boxes that hold "
            f"this volume: they need {gigabytes(needed)} GB and {gigabytes(left)} GB are left; give at least "
            f"{gigabytes(limit.max_bytes + needed - left)}"
        )
