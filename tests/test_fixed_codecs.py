"""Codecs in closed form against what their definitions say."""

import numpy as np
import pytest

from aldm.data.store import VolumeStore
from aldm.fixed_codecs import DIFFERENCES, LOW_PASS, blocks_of, fit_linear, fixed_codecs, from_blocks, truncated_haar


def volume(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


def block_means(x: np.ndarray, side: int) -> np.ndarray:
    return blocks_of(x, side).mean(axis=1).reshape([length // side for length in x.shape])


def repeated(x: np.ndarray, side: int) -> np.ndarray:
    return np.kron(x, np.ones((side, side, side)))


def test_blocks_hold_neighbours_and_go_back() -> None:
    x = volume(4, 8, 12)
    rows = blocks_of(x, 4)
    assert rows.shape == (6, 64)
    np.testing.assert_array_equal(rows[4].reshape(4, 4, 4), x[0:4, 4:8, 4:8])
    np.testing.assert_array_equal(from_blocks(rows, x.shape), x)


@pytest.mark.parametrize("levels", [1, 2])
def test_the_low_pass_is_the_mean_of_each_block(levels: int) -> None:
    x = volume(4, 8, 12)
    expected = repeated(block_means(x, 2**levels), 2**levels)
    np.testing.assert_allclose(truncated_haar(x, levels, LOW_PASS), expected, atol=1e-6)


def test_low_pass_and_differences_are_the_plane_nearest_to_each_block() -> None:
    x = volume(4, 4, 4)
    places = np.indices((2, 2, 2)).reshape(3, 8) - 0.5
    design = np.vstack([np.ones(8), places]).T  # the least squares fit of a + b X + c Y + d Z
    rows = blocks_of(x, 2) @ (design @ np.linalg.pinv(design)).T
    np.testing.assert_allclose(truncated_haar(x, 1, DIFFERENCES), from_blocks(rows, x.shape), atol=1e-6)
    coarse = truncated_haar(block_means(x, 2).astype(np.float32), 1, DIFFERENCES)
    np.testing.assert_allclose(truncated_haar(x, 2, DIFFERENCES), repeated(coarse, 2), atol=1e-6)


def test_the_linear_codec_loses_the_variances_that_it_leaves_out(ixi_store: VolumeStore) -> None:
    codec = fit_linear(ixi_store, 4)
    volumes = [
        ixi_store.volume(record.subject_id, modality)
        for record in ixi_store.subjects("train")
        for modality in record.modalities
    ]
    rows = np.vstack([blocks_of(x, 4) for x in volumes])
    singular = np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False)
    np.testing.assert_allclose(codec.variances, singular**2 / len(rows), atol=1e-9)
    for kept in (1, 4, 64):
        errors = np.concatenate([blocks_of(x - codec.reconstruct(x, kept), 4) for x in volumes])
        np.testing.assert_allclose((errors**2).sum(axis=1).mean(), codec.variances[kept:].sum(), rtol=1e-4, atol=1e-6)


def test_each_codec_keeps_as_many_scalars_as_it_says(ixi_store: VolumeStore) -> None:
    """Its reconstructions of random volumes span that many dimensions (the linear ones' beside their mean)."""
    shape = ixi_store.preprocess.spatial_shape
    rng = np.random.default_rng(0)
    codecs = fixed_codecs(ixi_store)
    assert [name for name in codecs if name.startswith("linear")] == [f"linear {r}:1" for r in (4, 8, 16, 64)]
    x = rng.uniform(-1, 1, shape).astype(np.float32)
    np.testing.assert_allclose(codecs["haar"].reconstruct(x), x, atol=1e-6)
    for name, codec in codecs.items():
        made = [codec.reconstruct(rng.uniform(-1, 1, shape).astype(np.float32)) for _ in range(8)]
        side = 8 if name.startswith("linear") else 4
        rows = np.vstack([blocks_of(y, side) for y in made])
        rows = rows - rows[0]
        assert np.linalg.matrix_rank(rows, tol=1e-3) == min(round(codec.scalars_per_voxel * side**3), len(rows) - 1), (
            name
        )
