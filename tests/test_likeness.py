"""How unlike a volume is to the training data: the features, the Gaussians, and what a model says of odd volumes."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from aldm import likeness
from aldm.errors import UserError
from aldm.likeness import GROUPS, MIN_VOLUMES, NUM_FEATURES, Likeness, Statistics, features, fit_statistics

NAMES = [name for names in GROUPS.values() for name in names]


def named(x: np.ndarray) -> dict[str, float]:
    return dict(zip(NAMES, features(x), strict=True))


def lopsided(shape: tuple[int, int, int] = (24, 28, 20)) -> np.ndarray:
    """An egg that is brighter to one side of every axis."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    radius = np.sqrt(np.square(grid * np.array([1.2, 1.1, 1.3])[:, None, None, None]).sum(axis=0))
    inside = radius < 0.8 + 0.15 * grid[1] - 0.1 * grid[2]
    return np.where(inside, 0.1 + 0.3 * grid[1] + 0.2 * grid[2] + 0.1 * np.sin(9 * grid[0]), -1).astype(np.float32)


def test_the_features_of_a_cuboid_are_what_the_book_says() -> None:
    x = np.full((16, 16, 16), -1, np.float32)
    x[2:10, 4:12, 6:14] = 0.5
    found = named(x)
    assert found["share of the box"] == 0.125
    assert [found[f"centre {axis}"] for axis in "xyz"] == pytest.approx([-0.125, 0, 0.125], abs=1e-6)
    assert found["spread y"] == pytest.approx(np.sqrt((8**2 - 1) / 12) / 16, rel=1e-4)
    assert [found["tilt xy"], found["moment yyy"]] == pytest.approx([0, 0], abs=1e-5)
    assert found["bright moment xx"] == pytest.approx(1, rel=1e-4)
    assert {found[f"quantile {percent} %"] for percent in likeness.QUANTILES} == {0.5}
    assert found["mean of shell 0"] == 0.5
    assert found["level 1 band xyz"] == -6, "there is nothing of it"


@pytest.mark.parametrize("band", ["x", "y", "xy", "z", "xz", "yz", "xyz"])
def test_a_grating_is_in_its_own_band(band: str) -> None:
    signs = np.ones((16, 16, 16), np.float32)
    for axis in band:
        signs *= np.array([1, -1] * 8, np.float32).reshape([-1 if one == axis else 1 for one in "xyz"])
    found = named(0.3 + 0.1 * signs)
    assert found[f"level 1 band {band}"] == pytest.approx(np.log10(8 * 0.01), abs=1e-3)
    assert all(found[name] == -6 for name in GROUPS["texture"] if name != f"level 1 band {band}")


def test_turned_over_the_odd_moments_change_their_sign_and_nothing_else() -> None:
    x = lopsided()
    upright, turned = named(x), named(x[:, ::-1, ::-1])
    axes = {name: name.split()[-1] for name in NAMES if "spread" not in name and "band" not in name}
    odd = {name for name, own in axes.items() if (own.count("y") + own.count("z")) % 2}
    for name in NAMES:
        sign = -1 if name in odd else 1
        assert turned[name] == pytest.approx(sign * upright[name], abs=2e-4), name
    assert abs(upright["bright moment y"]) > 0.05
    assert abs(upright["moment yyy"]) > 0.001


@pytest.mark.parametrize("value", [-1.0, 1.0, -0.8])
def test_any_volume_has_finite_features(value: float) -> None:
    assert len(NAMES) == NUM_FEATURES == len(features(np.full((7, 6, 9), value)))
    assert np.isfinite(features(np.full((7, 6, 9), value))).all()
    single = np.full((8, 8, 8), -1.0)
    single[3, 4, 5] = value
    assert np.isfinite(features(single)).all()


def test_of_a_large_volume_fewer_voxels_tell_about_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x = lopsided((48, 56, 40))
    every = features(x)
    monkeypatch.setattr(likeness, "MOST_VOXELS", x.size // 8)
    np.testing.assert_allclose(features(x), every, atol=0.03)
    assert features(x) != every


# ---------------------------------------------------------------------------------------------------------- statistics


def drawn(number: int, shift: float = 0.0, seed: int = 0) -> np.ndarray:
    """Rows whose features go together."""
    generator = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(NUM_FEATURES, NUM_FEATURES)) + 3 * np.eye(NUM_FEATURES)
    return shift + generator.normal(size=(number, NUM_FEATURES)) @ mixing


def fitted(number: int = 60) -> Statistics:
    found = fit_statistics({"t1": drawn(number), "t2": drawn(number, 20, 1)}, {"t1": drawn(5, seed=2)})
    assert found is not None
    return found


def test_the_shrunken_correlation_is_the_rule_of_schaefer_and_strimmer() -> None:
    z = np.random.default_rng(0).normal(size=(30, 4))
    z[:, 1] += z[:, 0]
    z = (z - z.mean(axis=0)) / z.std(axis=0)
    number, size = z.shape
    chance = square = 0.0
    for i in range(size):
        for j in range(size):
            if i != j:
                w = z[:, i] * z[:, j]
                chance += np.square(w - w.mean()).sum() / (number * (number - 1))
                square += w.mean() ** 2
    wanted = (1 - chance / square) * np.corrcoef(z.T)
    np.fill_diagonal(wanted, 1)
    np.testing.assert_allclose(likeness.shrunken_correlation(z), wanted, atol=1e-12)


def test_the_distance_is_that_of_mahalanobis_in_each_group() -> None:
    found, rows = fitted(), drawn(3, seed=5)
    start = 0
    for group, names in enumerate(GROUPS.values()):
        part = slice(start, start + len(names))
        start += len(names)
        std = found.stds["t1"][part]
        inverse = np.linalg.inv(found.correlations[group] * np.outer(std, std))
        off = rows[:, part] - found.means["t1"][part]
        wanted = np.sqrt(np.einsum("ni,ij,nj->n", off, inverse, off) / len(names)) / found.limits["t1"][group]
        np.testing.assert_allclose(found.distances("t1", rows)[:, group], wanted, rtol=1e-6)


def test_it_looks_like_what_makes_its_contrast_and_texture_likeliest() -> None:
    found, row = fitted(), drawn(1, 9, seed=5)[0]
    start, wanted = 0, dict.fromkeys(found.means, 0.0)
    for group, names in GROUPS.items():
        part = slice(start, start + len(names))
        start += len(names)
        for kind in wanted if group in ("contrast", "texture") else ():
            std, correlation = found.stds[kind][part], found.correlations[list(GROUPS).index(group)]
            gaussian = multivariate_normal(found.means[kind][part], correlation * np.outer(std, std))
            wanted[kind] += float(gaussian.logpdf(row[part]))
    got = {kind: found.log_likelihood(kind, row.tolist()) for kind in wanted}
    assert got["t1"] - got["t2"] == pytest.approx(wanted["t1"] - wanted["t2"], rel=1e-6)
    measured = found.measure(row.tolist(), "t1")
    assert measured is not None
    assert measured.looks_like == max(wanted, key=wanted.__getitem__)


def test_volumes_of_the_kind_stay_below_one_and_others_do_not() -> None:
    found = fitted()
    fresh = found.distances("t1", drawn(400, seed=7)).max(axis=1)
    assert (fresh < 1).mean() > 0.97
    assert found.distances("t1", drawn(50, 20, seed=8)).max(axis=1).min() > 1
    other = found.measure(drawn(1, 20, seed=9)[0].tolist(), "t1")
    assert other is not None
    assert other.is_unlike
    assert other.looks_like == "t2"
    assert "it looks more like t2" in other.words()
    assert "`accept_unlike`" in other.words()


def test_the_nearest_of_a_modalitys_kinds_counts() -> None:
    """Whole heads beside skull-stripped ones: each is like its own, and what lies between them is like neither."""
    kinds = {"t1 brain": drawn(40), "t1 foreground": drawn(40, 40, 1), "t2": drawn(40, 20, 2)}
    found = fit_statistics(kinds, {})
    assert found is not None
    for shift, seed in ((0, 3), (40, 4)):
        own = found.measure(drawn(1, shift, seed)[0].tolist(), "t1")
        assert own is not None
        assert not own.is_unlike
        assert (own.source, own.looks_like) == ("t1", "t1")
    between = found.measure(drawn(1, 20, 5)[0].tolist(), "t1")
    assert between is not None
    assert between.is_unlike
    assert between.looks_like == "t2"
    again = Statistics.from_dict(json.loads(json.dumps(found.to_dict())), "config.json")
    assert again is not None
    assert again.measure(drawn(1, 20, 5)[0].tolist(), "t1") == between


def test_it_says_in_what_a_volume_differs() -> None:
    found = fitted()
    row = found.means["t1"].copy()
    row[-1] += 50 * found.stds["t1"][-1]
    measured = found.measure(row.tolist(), "t1")
    assert measured is not None
    assert measured.differs_in == "texture"
    assert found.measure(row.tolist(), "pd") is None, "it knows no pd"
    assert found.measure(row[:-1].tolist(), "t1") is None, "features of another version"


def test_too_few_volumes_have_no_statistics() -> None:
    rows = drawn(MIN_VOLUMES)
    assert fit_statistics({"t1": rows[:-1]}, {}) is None
    assert fit_statistics({"t1": rows[:, :-1]}, {}) is None, "features of another version"
    found = fit_statistics({"t1": rows, "t2": rows[:-1]}, {})
    assert found is not None
    assert set(found.means) == {"t1"}


def test_statistics_go_through_json_and_are_small() -> None:
    found = fitted()
    text = json.dumps(found.to_dict())
    assert sum(len(one) for part in found.to_dict()["modalities"].values() for one in part.values()) == 2 * 112
    assert sum(map(len, found.to_dict()["correlations"])) == 354
    assert len(text) < 6000
    again = Statistics.from_dict(json.loads(text), "config.json")
    assert again is not None
    rows = drawn(20, 5, seed=3)
    np.testing.assert_allclose(again.distances("t1", rows), found.distances("t1", rows), rtol=0.01)


def test_statistics_of_another_version_are_none_and_damaged_ones_are_refused() -> None:
    values: dict[str, Any] = fitted().to_dict()
    assert Statistics.from_dict({**values, "correlations": values["correlations"][:-1]}, "c") is None
    broken = {**values, "modalities": {"t1": {**values["modalities"]["t1"], "std": [1.0, 2.0]}}}
    with pytest.raises(UserError, match=r"c is damaged: data\.likeness cannot be used"):
        Statistics.from_dict(broken, "c")
    with pytest.raises(UserError, match=r"it lacks t1\.limits"):
        Statistics.from_dict({**values, "modalities": {"t1": {"mean": [], "std": []}}}, "c")
    with pytest.raises(UserError, match=r"data\.likeness cannot be used"):
        Statistics.from_dict({**values, "correlations": [[2.0] * len(one) for one in values["correlations"]]}, "c")


def test_only_what_lies_beyond_the_limit_is_unlike() -> None:
    at = Likeness(1.0, "t1", "shape", "t1")
    assert not at.is_unlike
    assert replace(at, distance=1.001).is_unlike
    assert "looks more like" not in at.words()
