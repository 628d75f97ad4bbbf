"""The scores against naive versions written straight from their definitions."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from aldm import metrics
from aldm.errors import UserError
from aldm.similarity import ms_ssim_scales


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    reference = rng.random((9, 7, 8))
    return reference, np.clip(reference + 0.1 * rng.standard_normal(reference.shape), 0, 1)


def naive_ssim_map(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return SSIM at every voxel."""
    luminance, structure = naive_factors(x, y)
    return luminance * structure


def naive_factors(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Wang et al. 2004, voxel by voxel, over the mirrored 11^3 neighbourhood with its full 3D weights."""
    axis = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    weights = axis[:, None, None] * axis[None, :, None] * axis[None, None, :]
    weights /= weights.sum()
    padded_x, padded_y = (np.pad(a, 5, mode="symmetric") for a in (x, y))
    luminance, structure = np.empty(x.shape), np.empty(x.shape)
    for i, j, k in itertools.product(*map(range, x.shape)):
        a, b = (p[i : i + 11, j : j + 11, k : k + 11] for p in (padded_x, padded_y))
        mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
        var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
        covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
        luminance[i, j, k] = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
        structure[i, j, k] = (2 * covariance + 0.03**2) / (var_a + var_b + 0.03**2)
    return luminance, structure


def test_ssim_map_equals_the_definition(pair):
    np.testing.assert_allclose(metrics.ssim_map(*pair), naive_ssim_map(*pair), atol=1e-12)


def test_ssim_of_one_voxel_thin_volumes_mirrors_more_than_once():
    rng = np.random.default_rng(1)
    x, y = rng.random((2, 3, 4)), rng.random((2, 3, 4))
    np.testing.assert_allclose(metrics.ssim_map(x, y), naive_ssim_map(x, y), atol=1e-12)


def test_masked_ssim_is_the_mean_of_the_map_over_the_mask(pair):
    mask = np.random.default_rng(2).random(pair[0].shape) < 0.3
    assert metrics.ssim(*pair, mask) == pytest.approx(naive_ssim_map(*pair)[mask].mean(), abs=1e-12)
    assert metrics.ssim(*pair) == pytest.approx(naive_ssim_map(*pair).mean(), abs=1e-12)


def test_psnr_and_nmse_equal_their_definitions(pair):
    reference, image = pair
    mask = np.random.default_rng(3).random(reference.shape) < 0.4
    for region in (None, mask):
        x = [float(v) for v in (reference if region is None else reference[region]).ravel()]
        y = [float(v) for v in (image if region is None else image[region]).ravel()]
        errors = math.fsum((a - b) ** 2 for a, b in zip(x, y, strict=True))
        assert metrics.psnr_db(reference, image, region) == pytest.approx(10 * math.log10(len(x) / errors))
        assert metrics.nmse(reference, image, region) == pytest.approx(errors / math.fsum(a * a for a in x))


def test_known_values():
    reference = np.full((4, 4, 4), 0.5)
    assert metrics.psnr_db(reference, reference + 0.1) == pytest.approx(20.0)  # MSE .01
    assert metrics.nmse(reference, reference + 0.1) == pytest.approx(0.04)  # .01 / .25
    assert metrics.psnr_db(reference, reference) == math.inf
    assert metrics.nmse(reference, reference) == 0
    assert metrics.ssim(reference, reference) == pytest.approx(1)
    assert metrics.nmse(np.zeros((2, 2, 2)), np.ones((2, 2, 2))) == math.inf


def test_float32_input_is_scored_in_float64(pair):
    reference, image = (a.astype(np.float32) for a in pair)
    assert metrics.ssim(reference, image) == metrics.ssim(reference.astype(float), image.astype(float))
    assert metrics.psnr_db(reference, image) == metrics.psnr_db(reference.astype(float), image.astype(float))
    assert metrics.mae(reference, image) == metrics.mae(reference.astype(float), image.astype(float))


def test_score_gives_the_same_as_the_single_functions(pair):
    mask = np.zeros(pair[0].shape, bool)
    mask[2:5, 1:4, 3:6] = True
    scores = metrics.score(*pair, {"volume": None, "brain": mask})
    for name, region in (("volume", None), ("brain", mask)):
        assert scores[name].psnr_db == metrics.psnr_db(*pair, region)
        assert scores[name].nmse == metrics.nmse(*pair, region)
        assert scores[name].mae == metrics.mae(*pair, region)
        assert scores[name].ssim == pytest.approx(metrics.ssim(*pair, region), abs=1e-5)  # float32 filters
        for score in ("ms_ssim", "nmi", "sharpness"):
            assert getattr(scores[name], score) == getattr(metrics, score)(*pair, region)


def smooth_pair(shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return two images that are alike on coarse scales more than on fine ones."""
    rng = np.random.default_rng(4)
    x = gaussian_filter(rng.random(shape), 2)
    x = (x - x.min()) / (x.max() - x.min())
    return x, np.clip(0.9 * x + 0.05 * rng.standard_normal(shape), 0, 1)


def test_mae_equals_its_definition(pair):
    reference, image = pair
    mask = np.random.default_rng(3).random(reference.shape) < 0.4
    for region in (None, mask):
        errors = [abs(float(a - b)) for a, b in zip(reference[region].flat, image[region].flat, strict=True)]
        assert metrics.mae(reference, image, region) == pytest.approx(math.fsum(errors) / len(errors))


@pytest.mark.parametrize(("shape", "weights"), [((21, 22, 23), (0.0448, 0.2856)), ((20, 21, 22), (0.0448,))])
def test_ms_ssim_equals_its_definition(shape, weights):
    """Two scales where the second has 11 voxels, one where it would have 10; the region's share of a coarse voxel."""
    x, y = smooth_pair(shape)
    mask = np.zeros(shape, bool)
    mask[3:12, 5:18, 4:9] = True
    assert ms_ssim_scales(shape) == len(weights)
    factors = []
    a, b = x, y
    for _ in weights:
        factors.append(naive_factors(a, b))
        a, b = naive_halve(a), naive_halve(b)
    for region in (None, mask):
        share, expected = np.ones(shape) if region is None else region.astype(float), 1.0
        for (luminance, structure), weight in zip(factors, weights, strict=True):
            factor = luminance * structure if structure is factors[-1][1] else structure
            expected *= np.average(factor, weights=share) ** (weight / sum(weights))
            share = naive_halve(share)
        assert metrics.ms_ssim(x, y, region) == pytest.approx(expected, abs=1e-5)


def naive_halve(x: np.ndarray) -> np.ndarray:
    """Mean of the voxels that there are in every block of 2 x 2 x 2."""
    result = np.empty([-(-side // 2) for side in x.shape])
    for place in itertools.product(*map(range, result.shape)):
        result[place] = x[tuple(slice(2 * i, 2 * i + 2) for i in place)].mean()
    return result


def test_ms_ssim_takes_five_scales_of_a_volume_at_1_mm():
    assert [ms_ssim_scales((side,) * 3) for side in (1, 20, 21, 56, 192, 400)] == [1, 1, 2, 3, 5, 5]
    assert ms_ssim_scales((192, 192, 144)) == 4


def test_structure_that_is_inverted_has_an_ms_ssim_of_zero():
    x, _ = smooth_pair((24, 24, 24))
    assert metrics.ms_ssim(x, 1 - x) == 0


def test_nmi_equals_its_definition(pair):
    reference, image = pair
    mask = np.random.default_rng(5).random(reference.shape) < 0.5
    for region in (None, mask):
        x = [int(v * 64) for v in reference[region].flat]
        y = [min(int(v * 64), 63) for v in image[region].flat]  # an intensity of 1 is in the last bin
        entropies = [
            -math.fsum(n / len(x) * math.log(n / len(x)) for n in Counter(each).values())
            for each in (x, y, list(zip(x, y, strict=True)))
        ]
        assert metrics.nmi(reference, image, region) == pytest.approx((entropies[0] + entropies[1]) / entropies[2])


def test_nmi_knows_no_intensities():
    """Any one-to-one map of the bins has the most; images that know nothing of each other the least."""
    x = np.random.default_rng(6).integers(0, 64, (20, 20, 20)) / 64 + 1 / 128
    assert metrics.nmi(x, 1 - x) == pytest.approx(2)
    assert metrics.nmi(x, np.full_like(x, 0.5)) == pytest.approx(1)
    assert math.isnan(metrics.nmi(np.full_like(x, 0.5), np.full_like(x, 0.2)))


def test_sharpness_equals_its_definition(pair):
    reference, image = pair
    mask = np.random.default_rng(7).random(reference.shape) < 0.5

    def energy(x: np.ndarray, place: tuple[int, ...]) -> float:
        total = 0.0
        for axis, i in enumerate(place):
            low, high = max(i - 1, 0), min(i + 1, x.shape[axis] - 1)
            ends = [x[(*place[:axis], end, *place[axis + 1 :])] for end in (low, high)]
            total += ((ends[1] - ends[0]) / (high - low)) ** 2
        return total

    for region in (np.ones(reference.shape, bool), mask):
        sums = [math.fsum(energy(x, tuple(p)) for p in np.argwhere(region)) for x in (image, reference)]
        assert metrics.sharpness(reference, image, region) == pytest.approx(sums[0] / sums[1], rel=1e-5)


def test_sharpness_falls_with_blur_and_is_the_square_of_a_gain():
    x, _ = smooth_pair((12, 13, 14))
    assert metrics.sharpness(x, gaussian_filter(x, 1)) < 0.9
    assert metrics.sharpness(x, 0.5 * x + 0.25) == pytest.approx(0.25, rel=1e-5)
    assert metrics.sharpness(np.zeros_like(x), x) == math.inf
    assert math.isnan(metrics.sharpness(np.zeros_like(x), np.ones_like(x)))
    assert metrics.sharpness(x[:1], x[:1]) == pytest.approx(1)  # an axis of one voxel has no gradient


def test_edges_are_the_tenth_of_the_inner_voxels_where_the_gradient_is_largest():
    rng = np.random.default_rng(8)
    x, mask = rng.random((16, 17, 18)), np.zeros((16, 17, 18), bool)
    mask[2:14, 3:15, 2:16] = True
    x[~mask] = -5.0  # the outline would have the largest gradients of all
    inner = np.zeros_like(mask)
    inner[3:13, 4:14, 3:15] = True
    found = metrics.edges(x, mask)
    assert found.sum() == inner.sum() // 10
    energy = sum(g**2 for g in np.gradient(x))
    assert not (found & ~inner).any()
    assert energy[found].min() > energy[inner & ~found].max()
    assert not metrics.edges(np.ones_like(x), mask).any()
    assert not metrics.edges(x, np.zeros_like(mask)).any()


def test_to_unit_maps_and_clips():
    np.testing.assert_allclose(metrics.to_unit(np.array([-2.0, -1, 0, 1, 3])), [0, 0, 0.5, 1, 1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, y, m: (x, y[1:], m), "shape"),
        (lambda x, y, m: (x, y, m[1:]), "mask"),
        (lambda x, y, m: (x, y, m.astype(np.uint8)), "bool"),
        (lambda x, y, m: (x, y, np.zeros_like(m)), "empty"),
        (lambda x, y, m: (x, np.where(m, np.nan, y), m), "NaN"),
    ],
)
def test_what_has_no_score_is_refused(pair, change, words):
    arguments = change(*pair, np.ones(pair[0].shape, bool))
    every = (metrics.psnr_db, metrics.nmse, metrics.ssim, metrics.mae, metrics.ms_ssim, metrics.nmi, metrics.sharpness)
    for function in every:
        with pytest.raises(UserError, match=words):
            function(*arguments)
