"""How well a segmentation agrees with the true one: Dice, 95th percentile of the surface distances, volume.

Masks are X Y Z bool. A structure that neither of two masks has says nothing: its Dice and distance are NaN, which
means leave out. Where one of two masks alone is empty, Dice is 0 and the distance is the diagonal of the box, as in
BraTS's own evaluation (374 mm there).
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import distance_transform_edt
from scipy.spatial import cKDTree

from aldm.errors import UserError

PERCENTILE = 95.0


@dataclass(frozen=True)
class Overlap:
    """What a segmented volume has of one structure. NaN is a score that is not defined."""

    dice: float = math.nan
    """2 |A and B| / (|A| + |B|), in [0, 1]; higher is better."""
    hd95_mm: float = math.nan
    """95th percentile of the distances between the surfaces, mm; lower is better."""
    volume_ml: float = math.nan
    """Volume of what was segmented, ml."""
    volume_error_ml: float = math.nan
    """How far that is from the true volume, ml; lower is better."""


class TrueStructure:
    """Where a structure truly is, with all that scoring many segmentations against it takes of it alone."""

    def __init__(self, mask: np.ndarray, spacing_mm: tuple[float, float, float]) -> None:
        """Measure the true mask once.

        Args:
            mask: X Y Z bool; may be empty.
            spacing_mm: sides of a voxel, mm.
        """
        self.mask, self._spacing_mm = mask, spacing_mm
        self._count = int(np.count_nonzero(mask))
        self._voxel_ml = math.prod(spacing_mm) / 1000
        self._surface = surface(mask)
        self._distance_mm = distance_transform_edt(~self._surface, sampling=spacing_mm) if self._count else None

    def score(self, found: np.ndarray) -> Overlap:
        """Return the scores of a segmentation (X Y Z bool).

        Raises:
            UserError: another shape, or no bool.
        """
        if found.shape != self.mask.shape or found.dtype != bool:
            raise UserError(f"the segmentation is {found.dtype} of {found.shape}, wanted bool of {self.mask.shape}")
        count = int(np.count_nonzero(found))
        volume_ml, error_ml = count * self._voxel_ml, abs(count - self._count) * self._voxel_ml
        if not count and not self._count:
            return Overlap(volume_ml=0.0, volume_error_ml=0.0)
        dice = 2 * int(np.count_nonzero(found & self.mask)) / (count + self._count)
        hd95_mm = float(np.linalg.norm(np.multiply(found.shape, self._spacing_mm)))
        if count and self._count:
            hd95_mm = self._hd95_mm(found)
        return Overlap(dice, hd95_mm, volume_ml, error_ml)

    def _hd95_mm(self, found: np.ndarray) -> float:
        """Return the larger of both directions' 95th percentiles, mm, neither mask being empty.

        Of the true surface only what the other does not share is looked up: the rest is 0 away from it.
        """
        assert self._distance_mm is not None, "there is a true surface"
        border = surface(found)
        there_mm = self._distance_mm[border]
        tree = cKDTree(np.argwhere(border) * self._spacing_mm, compact_nodes=False, balanced_tree=False)
        back_mm = np.zeros(np.count_nonzero(self._surface))
        apart = np.argwhere(self._surface & ~border) * self._spacing_mm
        back_mm[: len(apart)] = tree.query(apart)[0]
        return max(float(np.percentile(distances, PERCENTILE)) for distances in (there_mm, back_mm))


def surface(mask: np.ndarray) -> np.ndarray:
    """Return the mask's voxels with a face towards the outside, X Y Z bool; what lies beyond the box is outside."""
    inner = mask.copy()
    for axis in range(mask.ndim):
        own, whole = np.moveaxis(inner, axis, 0), np.moveaxis(mask, axis, 0)
        own[1:] &= whole[:-1]
        own[:-1] &= whole[1:]
        own[0], own[-1] = False, False
    found: np.ndarray = mask & ~inner
    return found
