"""Which voxels of a volume show the patient: masks of the brain or of the whole head.

Arrays are X Y Z of RAS+ volumes.
"""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from aldm.data.volume import Volume, resample
from aldm.errors import UserError

MAX_BRAIN_ML = 2500.0
"""No brain is larger, so what is larger and not zero is a head."""
MIN_ZERO_FRACTION = 0.2
"""Share of exact zeros from which a background counts as masked."""


def brain_mask(
    volumes: Sequence[Volume], given_mask: Volume | None, affine: np.ndarray, shape: Sequence[int]
) -> tuple[np.ndarray, str]:
    """Return the region that scores are taken over, on the grid (affine, shape), and its name: `own_masks` united.

    Raises:
        UserError: the mask is empty on the grid.
    """
    masks, region = own_masks(volumes, given_mask)
    return mask_on_grid(masks, region, affine, shape), region


def own_masks(volumes: Sequence[Volume], given_mask: Volume | None) -> tuple[list[Volume], str]:
    """Return masks, 0 or 1, each on the grid of the volume that it was found in, and what they are masks of.

    The given mask where there is one (region brain). Else, where every volume is skull-stripped (at least 20 % of its
    voxels are exactly zero and the others fill at most 2,500 ml), the voxels that are not zero in any of them (brain).
    Else, of each volume, what lies above Otsu's threshold, its largest component and what that encloses: what is dark
    in one modality is bright in another (foreground).
    """
    if given_mask is not None:
        return [Volume((given_mask.data != 0).astype(np.float32), given_mask.affine)], "brain"
    stripped = all(_is_skull_stripped(volume) for volume in volumes)
    masks = [volume.data != 0 if stripped else _otsu_foreground(volume.data) for volume in volumes]
    found = [Volume(mask.astype(np.float32), volume.affine) for mask, volume in zip(masks, volumes, strict=True)]
    return found, "brain" if stripped else "foreground"


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


def _is_skull_stripped(volume: Volume) -> bool:
    inside = int(np.count_nonzero(volume.data))
    volume_ml = inside * float(abs(np.linalg.det(volume.affine[:3, :3]))) / 1000
    return inside <= (1 - MIN_ZERO_FRACTION) * volume.data.size and volume_ml <= MAX_BRAIN_ML


def _otsu_foreground(data: np.ndarray) -> np.ndarray:
    """Return the largest bright component and what it encloses, as bool (Otsu 1979; threshold from 256 bins)."""
    top = float(np.percentile(data, 99.5))
    counts, edges = np.histogram(data, bins=256, range=(float(data.min()), max(top, float(data.min()) + 1e-6)))
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    sums = np.cumsum(counts * centres)
    mean_below = sums / np.maximum(below, 1)
    mean_above = (sums[-1] - sums) / np.maximum(above, 1)
    between = below.astype(np.float64) * above * (mean_below - mean_above) ** 2
    bright = data > edges[int(np.argmax(between)) + 1]
    if not bright.any():
        return data > data.min()
    largest = _largest_component(bright)
    outside, count = ndimage.label(~largest)
    borders = [outside.take(index, axis=axis).ravel() for axis in range(3) for index in (0, -1)]
    open_labels = np.zeros(count + 1, bool)
    open_labels[np.concatenate(borders)] = True
    open_labels[0] = False
    return ~open_labels[outside]


def _largest_component(mask: np.ndarray) -> np.ndarray:
    labels, count = ndimage.label(mask)
    if count == 1:
        return mask
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return np.asarray(labels == int(sizes.argmax()))
