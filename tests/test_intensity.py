"""What an intensity means: neither the field of view nor the units nor the background's value move it."""

import json
from dataclasses import replace

import numpy as np
import pytest

from aldm.config import PreprocessConfig
from aldm.data.bias import BiasField, corrected, n4, shaded
from aldm.data.foreground import (
    AIR_FRACTION,
    MIN_SOLIDITY,
    air_and_threshold,
    constant_background,
    find_foreground,
    head_foreground,
    mask_on_grid,
)
from aldm.data.intensity import clipped_share, intensity_range, rescale, unscale
from aldm.data.phantom import simulate_subject
from aldm.data.preprocess import PreprocessRecord, prepare_subject, prepare_volume
from aldm.data.volume import Volume, shifted, to_ras
from aldm.errors import UserError

SPACING = (6.0, 6.0, 6.0)
CONFIG = PreprocessConfig(spacing_mm=SPACING, spatial_shape=(40, 40, 32))
PAPER = replace(CONFIG, intensity="paper")


@pytest.fixture(scope="module")
def brats() -> dict[str, Volume]:
    """A skull-stripped subject with a tumour, and its labels."""
    return {name: to_ras(v.data, v.affine) for name, v in simulate_subject(3, 0, "brats", 4.0).items()}


@pytest.fixture(scope="module")
def heads() -> dict[str, Volume]:
    """A subject with noise around the head."""
    return {name: to_ras(v.data, v.affine) for name, v in simulate_subject(3, 0, "ixi", 4.0).items()}


def padded(volume: Volume, width: int) -> Volume:
    """More air: what is at the corner of the field of view goes on around it."""
    air = volume.data[:3, :3, :3].ravel()
    data = np.random.default_rng(0).choice(air, tuple(n + 2 * width for n in volume.data.shape))
    data[width:-width, width:-width, width:-width] = volume.data
    return Volume(data, shifted(volume.affine, (-width,) * 3))


def cropped(volume: Volume, fraction: float) -> Volume:
    start = [round(n * (1 - fraction) / 2) for n in volume.data.shape]
    inner = tuple(slice(s, n - s) for s, n in zip(start, volume.data.shape, strict=True))
    return Volume(np.ascontiguousarray(volume.data[inner]), shifted(volume.affine, start))


def z_scored(volume: Volume) -> Volume:
    """As a pipeline leaves it: the brain to mean 0 and deviation 1, the background still 0."""
    brain = volume.data != 0
    data = np.zeros_like(volume.data)
    data[brain] = (volume.data[brain] - volume.data[brain].mean()) / volume.data[brain].std()
    return Volume(data, volume.affine)


def ranges(volume: Volume, config: PreprocessConfig = CONFIG) -> tuple[float, float]:
    _, record = prepare_volume(volume, config)
    return record.low, record.high


# ------------------------------------------------------------------------------------------------------------ the rules


@pytest.mark.parametrize(
    ("rule", "top", "brightest"), [("tissue", 10 + 2 * (9500 - 10), 0.06), ("foreground", 10 + 1.25 * 9980, 0.61)]
)
def test_a_rule_leaves_its_part_of_the_range_for_what_is_brighter(rule, top, brightest):
    values = np.random.default_rng(0).permutation(np.arange(10_001)).astype(np.float32)
    low, high = intensity_range(values, rule)
    assert (low, high) == (10, pytest.approx(top))
    scaled = rescale(values, low, high)
    assert scaled.dtype == np.float32
    assert scaled.max() < brightest
    np.testing.assert_allclose(unscale(scaled, low, high), np.maximum(values, 10), atol=1e-2)
    assert clipped_share(values, low, high) == pytest.approx(10 / 10_001)
    assert clipped_share(values[:0], low, high) == 0
    assert clipped_share(np.arange(5), 1, 3) == 0.4, "the ends of the range are in it"


def test_the_paper_s_rule_takes_percentiles_of_the_model_s_box(brats):
    (x,), record = prepare_volume(brats["t2"], PAPER)
    values = unscale(x, record.low, record.high)
    assert record.low == 0, "the background is in the box"
    assert np.mean(x == 1) == pytest.approx(0.005, abs=5e-4)
    assert values.max() == pytest.approx(record.high)
    assert intensity_range(np.arange(1001.0), "paper") == (5, 995)


def test_a_lesion_does_not_move_healthy_tissue(brats):
    """A bright ball of 2 % of the brain: the 99.9th percentile lies in it, the 95th beside it."""
    volume = brats["t1ce"]
    brain = np.argwhere(volume.data > 0)
    distance = np.linalg.norm(brain - np.median(brain, axis=0), axis=1)
    inside = tuple(brain[distance <= np.percentile(distance, 2)].T)
    healthy = volume.data.copy()
    healthy[inside] = np.median(volume.data[volume.data > 0])
    ill = healthy.copy()
    ill[inside] *= 3

    def width(data: np.ndarray, rule: str) -> float:
        low, high = ranges(Volume(data, volume.affine), replace(CONFIG, intensity=rule))
        return high - low

    assert width(ill, "tissue") == pytest.approx(width(healthy, "tissue"), rel=0.05)
    assert width(ill, "foreground") > 1.3 * width(healthy, "foreground")


@pytest.mark.parametrize("config", [CONFIG, PAPER])
def test_a_volume_with_almost_one_value_has_no_contrast(config):
    data = np.zeros((30, 30, 30), np.float32)
    data[:3, :3, :3] = 9
    with pytest.raises(UserError, match="no contrast"):
        prepare_volume(Volume(data, np.diag([*SPACING, 1.0])), config)


# ---------------------------------------------------------------------------------- field of view, units and background


@pytest.mark.parametrize("modality", ["t1", "t2", "pd"])
def test_air_in_view_changes_nothing(heads, modality):
    volume = heads[modality]
    low, high = ranges(volume)
    for other in (padded(volume, 12), cropped(volume, 0.76)):
        other_low, other_high = ranges(other)
        assert (other_high - other_low) / (high - low) == pytest.approx(1, abs=0.03)  # grids lie otherwise
        assert abs(other_low - low) < 0.02 * (high - low)
    before = find_foreground(volume).mask
    after = cropped(Volume(find_foreground(padded(volume, 12)).mask, volume.affine), 1).data[12:-12, 12:-12, 12:-12]
    assert np.mean(before != after) < 1e-3, "the mask itself does not depend on it"


def test_a_masked_volume_s_field_of_view_changes_nothing(brats):
    for name in ("t1", "t1ce", "t2", "flair"):
        low, high = ranges(brats[name])
        zeros = Volume(np.pad(brats[name].data, 15), shifted(brats[name].affine, (-15,) * 3))
        assert ranges(zeros) == pytest.approx((low, high), rel=0.02, abs=0.01 * high)


@pytest.mark.parametrize("modality", ["t1", "t1ce", "t2", "flair"])
def test_a_z_scored_brain_with_background_0_is_what_the_raw_one_is(brats, modality):
    (raw,), _ = prepare_volume(brats[modality], CONFIG)
    (scored,), record = prepare_volume(z_scored(brats[modality]), CONFIG)
    assert np.abs(scored - raw).max() < 0.01 * 2
    assert record.background == 0
    assert record.low < 0, "the background lies in the middle of the values"
    changed = Volume(brats[modality].data * 0.37 - 500, brats[modality].affine)
    assert np.abs(prepare_volume(changed, CONFIG)[0][0] - raw).max() < 0.01 * 2


@pytest.mark.parametrize("modality", ["t1", "t2", "pd"])
@pytest.mark.parametrize(("slope", "intercept"), [(1.0, -500.0), (0.004, -2.0), (37.0, 5.0)])
def test_the_units_of_a_whole_head_change_nothing(heads, modality, slope, intercept):
    (raw,), _ = prepare_volume(heads[modality], CONFIG)
    volume = Volume(heads[modality].data * np.float32(slope) + np.float32(intercept), heads[modality].affine)
    assert np.abs(prepare_volume(volume, CONFIG)[0][0] - raw).max() < 0.01 * 2


def test_a_subject_and_its_volumes_alone_are_prepared_alike(brats):
    volumes = {name: volume for name, volume in brats.items() if name not in ("seg", "tissue")}
    prepared = prepare_subject(
        volumes, CONFIG, mask=Volume((volumes["t1"].data > 300) * np.float32(1), brats["t1"].affine)
    )
    for name, volume in volumes.items():
        record = prepared.records[name]
        assert (record.low, record.high) == ranges(volume), "whatever mask the scores are taken over"


def test_a_background_is_constant_surrounds_the_rest_and_fills_space(brats, heads):
    data = brats["t2"].data
    np.testing.assert_array_equal(constant_background(data), data == 0)
    holed = data.copy()
    middle = tuple(slice(n // 2, n // 2 + 2) for n in data.shape)
    holed[middle] = 0
    assert not constant_background(holed)[middle].any(), "an enclosed hole belongs to the brain"
    assert constant_background(heads["t2"].data) is None
    noise = np.random.default_rng(0).integers(0, 2, (40, 40, 40)).astype(np.float32)
    noise[15:25, 15:25, 15:25] = 30
    assert constant_background(noise) is None, "half of the air is 0, but not a mask"
    assert constant_background(np.zeros((5, 5, 5), np.float32)) is None


def test_a_background_is_as_solid_as_its_voxels_have_neighbours() -> None:
    """Counted one by one, with bright voxels strewn over the air or over every other plane of an axis."""
    rng, shape, verdicts = np.random.default_rng(0), (5, 6, 7), []
    for case in range(63):
        data = rng.random(shape).astype(np.float32) + 1
        if case < 3:
            np.moveaxis(data, case, 0)[::2] = 0
        else:
            data[rng.random(shape) > 0.08] = 0
        dark = data == 0
        next_too = total = 0
        for place in np.argwhere(dark):  # all are connected: a voxel has 26 neighbours
            for axis in range(3):
                after = place + np.eye(3, dtype=int)[axis]
                if after[axis] < shape[axis]:
                    total, next_too = total + 1, next_too + int(dark[tuple(after)])
        verdicts.append(next_too >= MIN_SOLIDITY * total)
        if case < 3:  # planes that touch a face
            assert not verdicts[-1]
        found = constant_background(data)
        assert (found is not None) is verdicts[-1]
        assert found is None or (found == dark).all()
    assert 10 < sum(verdicts) < 50


def test_air_and_threshold_of_a_few_values(monkeypatch: pytest.MonkeyPatch) -> None:
    one_dark = np.full((3, 3, 3), 100.0, np.float32)
    one_dark[1, 1, 1] = 0
    assert air_and_threshold(one_dark) == (0, pytest.approx(100 * AIR_FRACTION))
    assert air_and_threshold(np.full((3, 3, 3), 5.0, np.float32)) == (5, 5)
    many = np.random.default_rng(0).gamma(0.5, 100, (30, 30, 30)).astype(np.float32)
    few = air_and_threshold(many[::3, ::3, ::3])
    monkeypatch.setattr("aldm.data.foreground._SAMPLES", 1000)
    assert air_and_threshold(many) == few, "of a large volume, as many voxels as are needed, along all axes alike"


def test_half_of_a_voxel_of_the_grid_in_a_mask_is_enough() -> None:
    mask, halfway, less = Volume(np.zeros((8, 8, 8), np.float32), np.eye(4)), np.eye(4), np.eye(4)
    mask.data[2:6] = 1
    halfway[0, 3], less[0, 3] = 0.5, 0.45
    assert np.flatnonzero(mask_on_grid([mask], "brain", halfway, (7, 1, 1))).tolist() == [1, 2, 3, 4, 5]
    assert np.flatnonzero(mask_on_grid([mask], "brain", less, (7, 1, 1))).tolist() == [2, 3, 4, 5]


# -------------------------------------------------------------------------------------------------------------- lesions


def test_lesions_stay_apart_and_what_is_clipped_is_counted(brats):
    volumes = {name: volume for name, volume in brats.items() if name not in ("seg", "tissue")}
    prepared = prepare_subject(volumes, CONFIG, seg=brats["seg"])
    paper = prepare_subject(volumes, PAPER, seg=brats["seg"])
    assert prepared.seg is not None
    for name, x in prepared.volumes.items():
        clipped = prepared.clipped[name]
        assert clipped.seg is not None
        assert clipped.seg < 0.01, f"{name}: no lesion is a plateau"
        assert np.mean(x[prepared.seg > 0] == 1) <= clipped.seg
        assert 0 < clipped.mask < 0.005
    enhancing = prepared.volumes["t1ce"][prepared.seg == 4]
    assert enhancing.std() > 0.05
    assert np.mean(paper.volumes["t1ce"][prepared.seg == 4] == 1) > 0.4, "the paper's rule makes it one"
    assert paper.clipped["flair"].seg > 0.2
    assert prepare_subject(volumes, CONFIG).clipped["t1"].seg is None


# ----------------------------------------------------------------------------------------------------------------- bias


def shading(volume: Volume, strength: float) -> np.ndarray:
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in volume.data.shape), indexing="ij")
    return np.exp(strength * (0.6 * x - 0.5 * y + 0.4 * z**2)).astype(np.float32)


def test_n4_finds_a_known_shading(brats):
    """The simulated scan has a slight shading of its own, so the difference of two answers is compared."""
    volume = brats["t1"]
    found = find_foreground(volume)
    strong = Volume(volume.data * shading(volume, 0.5), volume.affine)
    fields = [np.log(n4(v, found.mask, zero=0.0).on(v.affine, v.data.shape)) for v in (volume, strong)]
    got, wanted = (f[found.mask] - f[found.mask].mean() for f in (fields[1] - fields[0], np.log(shading(volume, 0.5))))
    assert np.corrcoef(got, wanted)[0, 1] > 0.95
    assert np.std(got - wanted) < 0.45 * np.std(wanted)


def test_a_correction_is_undone_exactly(brats):
    found = find_foreground(Volume(brats["t1"].data * shading(brats["t1"], 0.5), brats["t1"].affine))
    flat, field = corrected(found)
    assert np.abs(flat.volume.data - found.volume.data)[found.mask].max() > 50
    back = shaded(flat.volume.data, flat.volume.affine, field, field.zero)
    np.testing.assert_allclose(back[found.mask], found.volume.data[found.mask], rtol=1e-5)
    again = BiasField.from_dict(json.loads(json.dumps({**field.__dict__})))
    assert again == field


def test_a_bias_correction_is_kept_in_the_record(brats):
    config = replace(CONFIG, bias_correction="n4")
    strong = Volume(brats["t1"].data * shading(brats["t1"], 0.5), brats["t1"].affine)
    (x,), record = prepare_volume(strong, config)
    assert record.bias is not None
    assert PreprocessRecord.from_dict(json.loads(json.dumps(record.to_dict()))) == record
    assert prepare_volume(brats["t1"], CONFIG)[1].bias is None
    (flat,), _ = prepare_volume(brats["t1"], config)
    (plain,), _ = prepare_volume(strong, CONFIG)
    inside = flat > -1
    assert np.abs(x - flat)[inside].mean() < 0.5 * np.abs(plain - flat)[inside].mean()


def test_an_intensity_between_air_and_tissue_is_on_one_side_in_all_units() -> None:
    """Between air at 10 and tissue at 50 a quarter of the way is the intensity 20 itself."""
    data = np.full((20, 20, 20), 10.0, np.float32)
    data[4:16, 4:16, 4:16] = 20
    data[6:14, 6:14, 6:14] = 50
    data[::4] -= 1.0 * (data[::4] == 10)  # air is no constant background
    wanted, _ = head_foreground(data)
    for scale, shift in [(1 / 7, -3.1), (0.013, 1e3), (17.3, -512.7), (1 / 3, 0.1)]:
        np.testing.assert_array_equal(head_foreground((data * scale + shift).astype(np.float32))[0], wanted)
