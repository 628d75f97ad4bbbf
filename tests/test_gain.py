"""The fitted gain against what it must undo, and against a grid of other gains."""

import numpy as np
import pytest

from aldm.gain import with_fitted_gain
from aldm.metrics import Truth

SHAPE = (14, 17, 12)


def head() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(3)
    mask = np.zeros(SHAPE, bool)
    mask[2:-2, 3:-2, 1:-3] = True
    return generator.uniform(0.2, 0.5, SHAPE) * mask, mask


def polynomial(weights: np.ndarray) -> np.ndarray:
    """Order 2 of the position in [-1, 1]."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, side) for side in SHAPE), indexing="ij")
    terms = (np.ones(SHAPE), x, y, z, x * x, y * y, z * z, x * y, x * z, y * z)
    return np.einsum("t,txyz->xyz", weights, np.stack(terms))


def test_a_gain_of_second_order_is_undone():
    truth, mask = head()
    gain = polynomial(np.array([1.2, 0.1, -0.2, 0.15, 0.05, -0.1, 0.1, 0.02, -0.05, 0.08]))
    assert with_fitted_gain(truth, truth / gain, mask) == pytest.approx(truth, abs=1e-12)


def test_no_gain_nearby_is_better():
    truth, mask = head()
    image = np.clip(truth + np.random.default_rng(4).normal(0, 0.1, SHAPE), 0.01, 1) * mask
    best = with_fitted_gain(truth, image, mask)
    error = np.mean((best - truth)[mask] ** 2)
    fitted = np.divide(best, image, out=np.ones(SHAPE), where=mask)
    for term in range(10):
        for size in (-0.02, 0.02):
            weights = np.zeros(10)
            weights[term] = size
            other = image * (fitted + polynomial(weights))
            assert np.mean((other - truth)[mask] ** 2) > error


def test_outside_the_mask_nothing_changes_and_black_stays_black():
    truth, mask = head()
    image = np.random.default_rng(5).uniform(0, 1, SHAPE)
    assert np.array_equal(with_fitted_gain(truth, image, mask)[~mask], image[~mask])
    assert not with_fitted_gain(truth, np.zeros(SHAPE), mask).any()


def test_scores_after_a_gain_are_those_of_the_image_with_it():
    truth, mask = head()
    image = np.clip(0.7 * truth + 0.05 * np.random.default_rng(6).uniform(size=SHAPE), 0, 1)
    scorer = Truth(truth, {"volume": None, "brain": mask})
    after = scorer.after_gain(image, "brain")
    expected = scorer.score(with_fitted_gain(truth, image, mask))["brain"]
    assert after == pytest.approx({"gain_psnr_db": expected.psnr_db, "gain_ssim": expected.ssim}, abs=1e-5)
    assert after["gain_psnr_db"] > scorer.score(image)["brain"].psnr_db + 3
