"""The intensity map and histogram matching on volumes whose maps and distributions are known."""

from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from aldm.data.store import VolumeStore
from aldm.references import BINS, bins_of, conditional_mean, fit_references, match_histogram

SHAPE = (16, 14, 12)
WIDTH = 2 / BINS


class Volumes:
    """A store of volumes in memory, all of its subjects for training: subject -> modality -> volume."""

    def __init__(self, subjects: dict[str, dict[str, np.ndarray]]) -> None:
        self.data = subjects

    def subjects(self, split: str) -> list[SimpleNamespace]:
        assert split == "train"
        return [SimpleNamespace(subject_id=name, modalities=tuple(own)) for name, own in self.data.items()]

    def volume(self, subject_id: str, modality: str) -> np.ndarray:
        return self.data[subject_id][modality]

    def mask(self, subject_id: str) -> np.ndarray:
        return ball()


def store_of(**subjects: dict[str, np.ndarray]) -> VolumeStore:
    return cast(VolumeStore, Volumes(subjects))


def ball() -> np.ndarray:
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, size) for size in SHAPE), indexing="ij"))
    return np.asarray((grid**2).sum(axis=0) < 1)


def drawn(seed: int, low: float = -1.0, high: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(low, high, SHAPE).astype(np.float32)


def bent(x: np.ndarray) -> np.ndarray:
    """A map that is not monotone, of slope at most 3."""
    return np.asarray(0.9 * np.cos(3 * x))


def made(store: VolumeStore, x: np.ndarray, source: str = "t1", target: str = "t2") -> dict[str, np.ndarray]:
    return dict(fit_references(store, [(source, target)]).predictions(x, ball(), source, target))


def test_a_pointwise_map_without_noise_is_recovered_to_a_bin_s_width() -> None:
    sources = {name: drawn(seed) for seed, name in enumerate("abc")}
    outside = np.where(ball(), 0, 0.7)  # what lies outside the mask must not count
    store = store_of(**{name: {"t1": x, "t2": bent(x) + outside} for name, x in sources.items()})
    x = drawn(9)
    result = made(store, x)["intensity-map"]
    mask = ball()
    assert np.abs(result - bent(x))[mask].max() < 3 * WIDTH
    np.testing.assert_array_equal(result[~mask], x[~mask])


def test_no_other_map_of_the_bins_has_a_smaller_squared_error() -> None:
    """The residual of a least-squares fit is orthogonal to all that was fitted: to the indicator of every bin."""
    mask, rng = ball(), np.random.default_rng(0)
    subjects = {n: {"t1": drawn(s), "t2": bent(drawn(s)) + rng.normal(0, 0.3, SHAPE)} for s, n in enumerate("abcd")}
    store = store_of(**subjects)
    residual, bins = [], []
    for own in subjects.values():
        residual.append((own["t2"] - made(store, own["t1"])["intensity-map"])[mask])
        bins.append(bins_of(own["t1"][mask]))
    sums = np.bincount(np.concatenate(bins), np.concatenate(residual), minlength=BINS)
    np.testing.assert_allclose(sums, 0, atol=1e-4)


def test_empty_bins_lie_between_their_neighbours() -> None:
    counts, sums = np.zeros(BINS), np.zeros(BINS)
    counts[[10, 20]], sums[[10, 20]] = (2, 4), (1.0, -2.0)
    values = conditional_mean(counts, sums)
    np.testing.assert_allclose(values[[0, 10, 15, 20, BINS - 1]], [0.5, 0.5, 0.0, -0.5, -0.5])


def test_every_intensity_has_the_bin_that_holds_it() -> None:
    x = drawn(1).ravel()
    bins = bins_of(x)
    assert (x >= -1 + bins * WIDTH).all()
    assert (x < -1 + (bins + 1) * WIDTH).all()
    np.testing.assert_array_equal(bins_of(np.array([-1.5, -1, 1, 1.5])), [0, 0, BINS - 1, BINS - 1])


def test_a_matched_volume_has_the_training_split_s_quantiles() -> None:
    mask = ball()
    targets = {"a": drawn(0, -0.9, 0.1) ** 3, "b": drawn(1, -0.2, 0.8), "c": drawn(2, 0.3, 0.4)}
    store = store_of(**{name: {"t1": drawn(7), "t2": y} for name, y in targets.items()})
    x = np.exp(drawn(9)) / 3
    result = made(store, x)["histogram-matching"]
    shares = np.linspace(0.02, 0.98, 25)
    pooled = np.concatenate([y[mask] for y in targets.values()])  # equal masks: the mean of the distributions
    wanted = np.quantile(pooled, shares)
    np.testing.assert_allclose(np.quantile(result[mask], shares), wanted, atol=2 * WIDTH)
    np.testing.assert_array_equal(result[~mask], x[~mask])
    order = np.argsort(x[mask])
    assert (np.diff(result[mask][order]) >= 0).all()


def test_equal_intensities_stay_equal_and_flat_ends_of_the_histogram_are_not_used() -> None:
    histogram = np.zeros(BINS)
    histogram[100:110] = 0.1
    x = np.repeat([0.5, -0.5, 0.0], (50, 30, 20))
    result = match_histogram(x, histogram)
    assert len(np.unique(result)) == 3
    low = -1 + 100 * WIDTH
    np.testing.assert_allclose(np.unique(result), low + 10 * WIDTH * np.array([0.15, 0.4, 0.75]))


def test_modalities_that_nobody_has_together_get_no_map(caplog: pytest.LogCaptureFixture) -> None:
    store = store_of(a={"t1": drawn(0)}, b={"t2": drawn(1)})
    assert set(made(store, drawn(2))) == {"histogram-matching"}
    assert "no training subject has both t1 and t2" in caplog.text


def test_a_store_s_references_are_those_of_its_training_subjects(ixi_store: VolumeStore) -> None:
    """Mean target over all training voxels of a bin, and the mean of the subjects' histograms, read in one piece."""
    found = fit_references(ixi_store, [("t1", "pd"), ("pd", "t1")])
    names = [record.subject_id for record in ixi_store.subjects("train")]
    masks = [ixi_store.mask(name) for name in names]
    t1, pd = ([ixi_store.volume(n, m)[mask] for n, mask in zip(names, masks, strict=True)] for m in ("t1", "pd"))
    bins, values = bins_of(np.concatenate(t1)), np.concatenate(pd)
    for index in np.unique(bins)[::20]:
        assert found.maps["t1", "pd"][index] == pytest.approx(values[bins == index].mean(), abs=1e-6)
    histograms = [np.histogram(y, BINS, (-1, 1))[0] / y.size for y in pd]
    np.testing.assert_allclose(found.histograms["pd"], np.mean(histograms, axis=0), atol=1e-4)
