"""Dice, HD95 and volumes of a segmentation, against what they say they are."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from aldm.errors import UserError
from aldm.segmentation import Overlap, TrueStructure, surface

SPACING_MM = (1.0, 2.5, 3.0)
SHAPE = (9, 11, 7)


def blobs(seed: int, threshold: float = 0.05) -> np.ndarray:
    """Return a rough structure, some of which touches the box's border."""
    return gaussian_filter(np.random.default_rng(seed).normal(size=SHAPE), 1) > threshold


def naive_surface(mask: np.ndarray) -> list[tuple[int, ...]]:
    found = []
    for place in map(tuple, np.argwhere(mask)):
        for axis in range(3):
            for step in (-1, 1):
                beside = tuple(index + step * (axis == i) for i, index in enumerate(place))
                inside = all(0 <= index < side for index, side in zip(beside, mask.shape, strict=True))
                if not inside or not mask[beside]:
                    found.append(place)
    return list(dict.fromkeys(found))


def naive(true: np.ndarray, found: np.ndarray) -> Overlap:
    both = sum(bool(a and b) for a, b in zip(true.flat, found.flat, strict=True))
    sizes = [sum(map(bool, mask.flat)) for mask in (true, found)]
    surfaces = [naive_surface(mask) for mask in (true, found)]
    directed = []
    for one, other in (surfaces, surfaces[::-1]):
        nearest = [min(math.dist(np.multiply(a, SPACING_MM), np.multiply(b, SPACING_MM)) for b in other) for a in one]
        directed.append(np.percentile(nearest, 95))
    ml = math.prod(SPACING_MM) / 1000
    return Overlap(2 * both / sum(sizes), max(directed), sizes[1] * ml, abs(sizes[1] - sizes[0]) * ml)


def values(overlap: Overlap) -> tuple[float, ...]:
    return overlap.dice, overlap.hd95_mm, overlap.volume_ml, overlap.volume_error_ml


@pytest.mark.parametrize("thresholds", [(0.05, 0.05), (0.05, 0.3), (0.4, 0.0)])
def test_the_scores_are_those_of_a_naive_version(thresholds: tuple[float, float]) -> None:
    true, found = (blobs(seed, threshold) for seed, threshold in enumerate(thresholds))
    assert values(TrueStructure(true, SPACING_MM).score(found)) == pytest.approx(values(naive(true, found)))
    assert values(TrueStructure(found, SPACING_MM).score(true))[:2] == pytest.approx(values(naive(true, found))[:2])
    assert set(map(tuple, np.argwhere(surface(true)))) == set(naive_surface(true))


@pytest.mark.slow  # what takes long is MONAI's import
def test_dice_and_hd95_are_monai_s() -> None:
    from monai.metrics import compute_dice, compute_hausdorff_distance

    true, found = blobs(0), blobs(1, 0.2)
    pair = [torch.from_numpy(mask.astype(np.float32))[None, None] for mask in (found, true)]
    ours = TrueStructure(true, SPACING_MM).score(found)
    assert ours.dice == pytest.approx(float(compute_dice(*pair)))
    theirs = compute_hausdorff_distance(*pair, include_background=True, percentile=95, spacing=SPACING_MM)
    assert ours.hd95_mm == pytest.approx(float(theirs), rel=1e-6)


def test_a_structure_against_itself_is_perfect_and_a_shift_is_as_far_as_it_goes() -> None:
    true, moved = (np.zeros((16, 16, 16), bool) for _ in range(2))
    true[3:8, 4:9, 5:9], moved[5:10, 4:9, 5:9] = True, True
    ml = 100 * math.prod(SPACING_MM) / 1000
    assert values(TrueStructure(true, SPACING_MM).score(true)) == pytest.approx((1, 0, ml, 0))
    assert values(TrueStructure(true, SPACING_MM).score(moved)) == pytest.approx((0.6, 2, ml, 0))


def test_what_is_empty_costs_the_diagonal_or_says_nothing() -> None:
    some, none = blobs(0), np.zeros(SHAPE, bool)
    diagonal = math.dist((0, 0, 0), np.multiply(SHAPE, SPACING_MM))
    ml = np.count_nonzero(some) * math.prod(SPACING_MM) / 1000
    assert values(TrueStructure(some, SPACING_MM).score(none)) == pytest.approx((0, diagonal, 0, ml))
    assert values(TrueStructure(none, SPACING_MM).score(some)) == pytest.approx((0, diagonal, ml, ml))
    assert values(TrueStructure(none, SPACING_MM).score(none)) == pytest.approx((math.nan, math.nan, 0, 0), nan_ok=True)


@pytest.mark.parametrize("found", [np.zeros((9, 11, 8), bool), np.zeros(SHAPE, np.uint8)])
def test_another_shape_or_kind_is_refused(found: np.ndarray) -> None:
    with pytest.raises(UserError, match="wanted bool of"):
        TrueStructure(blobs(0), SPACING_MM).score(found)
