"""Which voxels of a volume show the patient: masks of the brain or of the whole head.

None of it depends on how much air the field of view holds, nor on the units of the intensities. Arrays are X Y Z of
RAS+ volumes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from aldm.data.intensity import PERCENTILES
from aldm.data.volume import Volume, connected_to_faces, resample
from aldm.errors import UserError

MAX_BRAIN_ML = 2500.0
"""No brain is larger, so what is larger and not background is a head."""
MIN_BORDER_FRACTION = 0.2
"""Share of the field of view's six faces from which a value may be that of a masked background."""
MIN_SOLIDITY = 0.9
"""Share of a masked background's voxels whose next voxel is background too: noise that is often 0 has less."""
AIR_FRACTION = 0.2501
"""How far from air to tissue the threshold between them lies: a little over a quarter, so that between two integers it
lies on none, where rounding would decide on all voxels of an intensity."""
_SAMPLES, _MAX_ROUNDS = 1_000_000, 50


@dataclass(frozen=True, eq=False)
class Foreground:
    """A volume, with what shows the patient told from the rest."""

    volume: Volume
    """A constant background is `dark` in it: a masked volume's background may lie in the middle of its values."""
    mask: np.ndarray
    """bool: the brain where the volume is skull-stripped, else the head."""
    stripped: bool
    """Everything but a brain was masked."""
    outside: np.ndarray | None
    """bool: the constant background, or None where there is none."""
    background: float | None
    """Its value in the file."""
    dark: float
    """Value of what is darker than the patient: of a skull-stripped volume what its background was given, else air."""

    def with_background(self) -> tuple[Volume, float]:
        """Return the volume with a constant background as it is in the file, and the value of what is background."""
        if self.outside is None or self.background is None:
            return self.volume, self.dark
        data = np.where(self.outside, np.float32(self.background), self.volume.data)
        return Volume(data, self.volume.affine), self.background


def find_foreground(volume: Volume) -> Foreground:
    """Tell the patient from the background.

    A constant background (`constant_background`) that leaves at most 2,500 ml makes the volume skull-stripped, and the
    rest is the brain. Otherwise the foreground is the head (`head_foreground`).
    """
    outside = constant_background(volume.data)
    if outside is None:
        mask, air = head_foreground(volume.data)
        return Foreground(volume, mask, False, None, None, air)
    value = float(volume.data[outside][0])
    filled, dark = darkened(volume, outside)
    voxel_ml = float(abs(np.linalg.det(volume.affine[:3, :3]))) / 1000
    stripped = (outside.size - int(np.count_nonzero(outside))) * voxel_ml <= MAX_BRAIN_ML
    mask, dark = (~outside, dark) if stripped else head_foreground(filled.data)
    return Foreground(filled, mask, stripped, outside, value, dark)


def darkened(volume: Volume, outside: np.ndarray) -> tuple[Volume, float]:
    """Return the volume with its background as dark as the darkest of the rest, and that value."""
    dark = float(np.percentile(volume.data[~outside], PERCENTILES["tissue"][0]))
    return Volume(np.where(outside, np.float32(dark), volume.data), volume.affine), dark


def constant_background(data: np.ndarray) -> np.ndarray | None:
    """Return where a volume has one constant value that surrounds the rest, as bool; None where it has no such.

    It is the commonest value of the six faces of the field of view, at least a fifth of them, and it fills space: what
    is connected to the faces, edges and corners included. An enclosed hole of the same value belongs to the patient.
    """
    faces = np.concatenate([data.take(index, axis=axis).ravel() for axis in range(3) for index in (0, -1)])
    values, counts = np.unique(faces, return_counts=True)
    commonest = int(counts.argmax())
    if counts[commonest] < MIN_BORDER_FRACTION * faces.size:
        return None
    outside = connected_to_faces(data == values[commonest], np.ones((3, 3, 3)))
    next_too = [
        np.count_nonzero(outside[1:] & outside[:-1]) for outside in (np.moveaxis(outside, a, 0) for a in range(3))
    ]
    first = [np.count_nonzero(np.moveaxis(outside, axis, 0)[:-1]) for axis in range(3)]
    if outside.all() or sum(next_too) < MIN_SOLIDITY * sum(first):
        return None
    return outside


def head_foreground(data: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the largest component that is brighter than air and what it encloses, as bool, and air's intensity."""
    air, threshold = air_and_threshold(data)
    bright = data > threshold
    if not bright.any():
        return np.asarray(data > data.min()), air
    return ~connected_to_faces(~_largest_component(bright)), air


def air_and_threshold(data: np.ndarray) -> tuple[float, float]:
    """Return the intensity of air, and the threshold above which there is tissue.

    The threshold lies a quarter of the way from air, the median of what is not above it, to the median of what is.
    That is Ridler and Calvard's iterative selection (1978) with medians, which do not move with the amount of air, and
    with a quarter instead of a half: bone, fluid and muscle are dark, but not as dark as air.
    """
    step = max(1, round((data.size / _SAMPLES) ** (1 / 3)))
    values = np.sort(data[::step, ::step, ::step], axis=None)
    air, threshold = float(values[0]), float(values[0] + np.percentile(values, 99.5)) / 2
    below = -1
    for _ in range(_MAX_ROUNDS):
        before, below = below, int(np.searchsorted(values, threshold, side="right"))
        if below == before or not 0 < below < len(values):
            break
        air, tissue = float(values[below // 2]), float(values[(below + len(values)) // 2])
        threshold = air + AIR_FRACTION * (tissue - air)
    return air, threshold


def brain_mask(
    volumes: Sequence[Foreground], given_mask: Volume | None, affine: np.ndarray, shape: Sequence[int]
) -> tuple[np.ndarray, str]:
    """Return the region that scores are taken over, on the grid (affine, shape), and its name: `own_masks` united.

    Raises:
        UserError: the mask is empty on the grid.
    """
    masks, region = own_masks(volumes, given_mask)
    return mask_on_grid(masks, region, affine, shape), region


def own_masks(volumes: Sequence[Foreground], given_mask: Volume | None) -> tuple[list[Volume], str]:
    """Return masks, 0 or 1, each on the grid of the volume that it was found in, and what they are masks of.

    The given mask where there is one (brain). Else each volume's own: brain where all of them are skull-stripped,
    otherwise foreground. What is dark in one modality is bright in another.
    """
    if given_mask is not None:
        return [Volume((given_mask.data != 0).astype(np.float32), given_mask.affine)], "brain"
    masks = [Volume(found.mask.astype(np.float32), found.volume.affine) for found in volumes]
    return masks, "brain" if all(found.stripped for found in volumes) else "foreground"


def mask_on_grid(masks: Sequence[Volume], region: str, affine: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Return where at least half of a voxel of the grid (affine, shape) lies in any of the masks.

    Raises:
        UserError: nowhere.
    """
    united = np.zeros(tuple(shape), bool)
    for mask in masks:
        united |= resample(mask, affine, shape).data >= 0.5
    if not united.any():
        raise UserError(f"the {region} mask is empty on the model's grid: it lies outside the volume, or is too small")
    return united


def _largest_component(mask: np.ndarray) -> np.ndarray:
    labels, count = ndimage.label(mask)
    if count == 1:
        return mask
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return np.asarray(labels == int(sizes.argmax()))
