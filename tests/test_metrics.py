"""The scores against naive versions written straight from their definitions."""

import itertools
import math

import numpy as np
import pytest

from aldm import metrics
from aldm.errors import UserError


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    reference = rng.random((9, 7, 8))
    return reference, np.clip(reference + 0.1 * rng.standard_normal(reference.shape), 0, 1)


def naive_ssim_map(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Wang et al. 2004, voxel by voxel, over the mirrored 11^3 neighbourhood with its full 3D weights."""
    axis = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    weights = axis[:, None, None] * axis[None, :, None] * axis[None, None, :]
    weights /= weights.sum()
    padded_x, padded_y = (np.pad(a, 5, mode="symmetric") for a in (x, y))
    result = np.empty(x.shape)
    for i, j, k in itertools.product(*map(range, x.shape)):
        a, b = (p[i : i + 11, j : j + 11, k : k + 11] for p in (padded_x, padded_y))
        mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
        var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
        covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
        luminance = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
        structure = (2 * covariance + 0.03**2) / (var_a + var_b + 0.03**2)
        result[i, j, k] = luminance * structure
    return result


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


def test_score_gives_the_same_as_the_single_functions(pair):
    mask = np.zeros(pair[0].shape, bool)
    mask[2:5, 1:4, 3:6] = True
    scores = metrics.score(*pair, {"volume": None, "brain": mask})
    for name, region in (("volume", None), ("brain", mask)):
        assert scores[name].psnr_db == metrics.psnr_db(*pair, region)
        assert scores[name].nmse == metrics.nmse(*pair, region)
        assert scores[name].ssim == metrics.ssim(*pair, region)


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
    for function in (metrics.psnr_db, metrics.nmse, metrics.ssim):
        with pytest.raises(UserError, match=words):
            function(*arguments)
