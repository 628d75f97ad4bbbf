from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aldm.config import PreprocessConfig
from aldm.data.boxes import blend, centred_box
from aldm.data.foreground import brain_mask, find_foreground
from aldm.data.intensity import PERCENTILES, unscale
from aldm.data.preprocess import (
    count_boxes,
    model_grid,
    prepare_subject,
    prepare_volume,
    prepare_volumes,
    restore,
)
from aldm.data.registration import register_rigid
from aldm.data.volume import Volume, crop_or_pad, resample, shifted
from aldm.errors import UserError

CONFIG = PreprocessConfig(spacing_mm=(4.0, 4.0, 4.0), spatial_shape=(40, 48, 40))
TURN = np.array([[0.98, -0.17, 0.1], [0.17, 0.98, 0.05], [-0.1, -0.03, 0.99]])


def head(affine, shape, *, noise=5.0, centre=(3.0, -4.0, 6.0), radii_mm=(70.0, 85.0, 65.0), seed=0):
    """A smooth ellipsoid with structure, defined in world coordinates, seen on any grid; zero outside without noise."""
    index = np.indices(shape).reshape(3, -1)
    world = affine[:3, :3] @ index + affine[:3, 3:]
    x, y, z = (world - np.array(centre)[:, None]) / np.array(radii_mm)[:, None]
    inside = 1 / (1 + np.exp(np.clip(40 * (np.sqrt(x**2 + y**2 + z**2) - 1), -50, 50)))
    texture = 100 + 25 * np.sin(3 * x + 1) * np.cos(4 * y) + 20 * np.sin(5 * z + y)
    data = (inside * texture).reshape(shape)
    data[data < 0.5] = 0
    if noise:
        data += np.abs(np.random.default_rng(seed).normal(0, noise, shape))
    return Volume(data.astype(np.float32), affine)


def centred(spacing, shape, turn=None, middle=(0.0, 0.0, 0.0)):
    affine = np.eye(4)
    affine[:3, :3] = (np.eye(3) if turn is None else np.linalg.qr(turn)[0] @ np.diag([-1, -1, 1])) @ np.diag(spacing)
    affine[:3, 3] = np.array(middle) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


STRIPPED = head(centred((4.0, 4, 4), (60, 60, 44)), (60, 60, 44), noise=0, radii_mm=(60, 75, 55))


# ----------------------------------------------------------------------------------------------------------------- grid


def test_an_aligned_volume_of_the_same_spacing_keeps_its_voxels():
    affine, shape = model_grid([STRIPPED], CONFIG)
    assert shape == STRIPPED.data.shape
    np.testing.assert_allclose(affine, STRIPPED.affine, atol=1e-9)
    np.testing.assert_array_equal(resample(STRIPPED, affine, shape).data, STRIPPED.data)


turns = st.lists(st.floats(-0.4, 0.4), min_size=9, max_size=9)
spacings = st.tuples(*[st.floats(0.7, 6.0)] * 3)


@settings(max_examples=40, deadline=None)
@given(turn=turns, spacing=spacings, target=spacings, shape=st.tuples(*[st.integers(1, 14)] * 3))
def test_the_grid_is_ras_aligned_and_covers_the_field_of_view(turn, spacing, target, shape):
    turn = np.linalg.qr(np.eye(3) + np.array(turn).reshape(3, 3) / 2)[0]
    turn = turn * np.sign(np.diag(turn))
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag(spacing)
    grid, size = model_grid([Volume(np.zeros(shape, np.float32), affine)], replace(CONFIG, spacing_mm=target))
    np.testing.assert_allclose(grid[:3, :3], np.diag(target), atol=1e-12)
    corners = np.array(list(product(*((-0.5, n - 0.5) for n in shape))))
    index = ((affine[:3, :3] @ corners.T + affine[:3, 3:]) - grid[:3, 3:]) / np.array(target)[:, None]
    assert (index >= -0.52).all()
    assert (index <= np.array(size)[:, None] - 0.48).all()
    assert (index.min(axis=1) < 0.52).all(), "no larger than it has to be"
    assert (index.max(axis=1) > np.array(size) - 1.52).all()


offsets = st.tuples(*[st.floats(-200, 200) | st.integers(-20, 20).map(lambda halves: halves / 2)] * 3)


@settings(max_examples=60, deadline=None)
@given(turn=turns, spacing=spacings, target=spacings, offset=offsets, start=st.tuples(*[st.integers(-9, 9)] * 3))
def test_the_grid_stays_where_it_is_when_a_file_is_padded_or_cropped(turn, spacing, target, offset, start):
    turn = np.linalg.qr(np.eye(3) + np.array(turn).reshape(3, 3) / 2)[0]
    affine = np.eye(4)
    affine[:3, :3] = turn * np.sign(np.diag(turn)) @ np.diag(spacing)
    affine[:3, 3] = affine[:3, :3] @ offset
    config, data = replace(CONFIG, spacing_mm=target), np.zeros((12, 13, 14), np.float32)
    one = model_grid([Volume(data, affine)], config)[0]
    rounded = shifted(affine, start).astype(np.float32).astype(np.float64)  # as NIfTI stores it
    other = model_grid([Volume(data[2:, :8], rounded)], config)[0]
    steps = (other - one)[:3, 3] / target
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-3)


@pytest.mark.parametrize("turn", [None, TURN])
def test_a_padded_and_a_cropped_file_give_the_same_model_input(turn):
    """All have the same head in view; what is cropped and padded is air."""
    shape, start, small = (70, 77, 69), (3, 4, 5), (65, 72, 62)
    volume = head(centred((3.3, 3.2, 3.4), shape, turn), shape, noise=0)
    wanted, record = prepare_volume(volume, CONFIG)
    padded = Volume(np.pad(volume.data, ((3, 4), (5, 6), (8, 7))), shifted(volume.affine, (-3, -5, -8)))
    for changed in (padded, crop_or_pad(volume, start, small, 0)):
        got, other = prepare_volume(changed, CONFIG)
        assert (other.low, other.high) == pytest.approx((record.low, record.high), rel=1e-6)
        np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_the_grid_hangs_on_the_voxel_corner_that_is_nearest_to_the_origin():
    """Voxels of 4 mm whose corners lie at 1.5 + 4 k mm: the nearest to 0 is 1.5, and 5 mm steps go from there."""
    volume = Volume(np.zeros((20, 20, 20), np.float32), np.diag([4.0, 4.0, 4.0, 1.0]))
    for shift in (3.5, 3.5 - 40, 3.5 + 40):  # of the first voxel's centre
        volume.affine[:3, 3] = shift
        affine, _ = model_grid([volume], PreprocessConfig(spacing_mm=(5.0, 5.0, 5.0)))
        np.testing.assert_allclose((affine[:3, 3] - 2.5 - 1.5) % 5, 0, atol=1e-9)
    for rounding in (-1e-6, 0, 1e-6):  # the middle of a voxel is as near to two corners: the lower one
        volume.affine[:3, 3] = rounding
        affine, _ = model_grid([volume], PreprocessConfig(spacing_mm=(5.0, 5.0, 5.0)))
        np.testing.assert_allclose((affine[:3, 3] - 2.5 + 2 + 2.5) % 5, 2.5, atol=1e-5)


def test_two_boxes_come_back_where_they_were_cut():
    config = replace(CONFIG, spatial_shape=(24, 60, 44))
    arrays, record = prepare_volume(STRIPPED, config)
    assert len(record.boxes) == count_boxes(STRIPPED, config) == 2
    region = unscale(blend(arrays, record.boxes, -1), record.low, record.high)
    back = restore(region, record, STRIPPED, fill=record.low)
    wanted = STRIPPED.data.clip(record.low, record.high)
    inside = find_foreground(STRIPPED).mask
    np.testing.assert_allclose(back[inside], wanted[inside], atol=0.05)


def test_the_boxes_of_several_volumes_hold_the_foreground_of_each():
    lower, front = (Volume(STRIPPED.data.copy(), STRIPPED.affine) for _ in range(2))
    lower.data[:, :, 20:] = 0
    front.data[:, :25] = 0
    config = replace(CONFIG, spatial_shape=(40, 48, 22))
    assert len(prepare_volume(lower, config)[1].boxes) == 1
    for volumes in ([lower, STRIPPED], [lower, front], [lower, lower, front]):
        arrays, record = prepare_volumes(volumes, config)
        assert len(record.boxes) == 2
        assert [len(boxes) for boxes in arrays] == [2] * len(volumes)


def test_tissue_at_the_end_of_the_field_of_view_is_not_mixed_with_air():
    data = np.full((50, 60, 41), 100, np.float32)
    data[0] += np.arange(41) % 2
    volume = Volume(data, np.diag([1.0, 1, 1, 1]))
    assert (resample(volume, *model_grid([volume], CONFIG), fill=0, reach=0.5).data > 99).all()


def test_a_grid_beyond_the_limit_is_refused_before_it_is_made():
    with pytest.raises(
        UserError, match=r"240 x 240 x 176 mm at a spacing of 0\.01 x 0\.01 x 0\.01 mm is a grid of 24000"
    ):
        prepare_volume(STRIPPED, replace(CONFIG, spacing_mm=(0.01, 0.01, 0.01)))
    far = Volume(STRIPPED.data, np.diag([1e200, 1e200, 1e200, 1]))
    with pytest.raises(UserError, match="wanted at most 134,217,728: take a larger spacing, or cut the volume down"):
        model_grid([far], CONFIG)
    count = STRIPPED.data.size
    assert model_grid([STRIPPED], CONFIG, max_voxels=count)[1] == STRIPPED.data.shape
    with pytest.raises(UserError, match=f"wanted at most {count - 1:,}"):
        model_grid([STRIPPED], CONFIG, max_voxels=count - 1)


def test_a_volume_that_takes_more_boxes_than_allowed_is_refused() -> None:
    config = replace(CONFIG, spatial_shape=(20, 24, 20))
    count = len(prepare_volume(STRIPPED, config)[0])
    assert count > 1
    assert len(prepare_volume(STRIPPED, config, max_boxes=count)[0]) == count
    with pytest.raises(UserError, match=f"takes {count} boxes of .* the limit is {count - 1}: cut it down"):
        prepare_volume(STRIPPED, config, max_boxes=count - 1)


# ---------------------------------------------------------------------------------------------------------------- masks


def test_skull_stripped_data_give_the_voxels_that_are_not_zero():
    mask, region = brain_mask([find_foreground(STRIPPED)], None, STRIPPED.affine, STRIPPED.data.shape)
    assert region == "brain"
    np.testing.assert_array_equal(mask, STRIPPED.data != 0)


def test_a_noisy_background_gives_the_foreground():
    shape = (60, 64, 60)
    noisy, clean = (head(centred((4.0, 4, 4), shape), shape, noise=level) for level in (5, 0))
    mask, region = brain_mask([find_foreground(noisy)], None, noisy.affine, shape)
    assert region == "foreground"
    wanted = clean.data > 25
    assert 2 * (mask & wanted).sum() / (mask.sum() + wanted.sum()) > 0.98


def test_the_foreground_is_one_piece_without_holes():
    shape = (60, 64, 60)
    volume = head(centred((4.0, 4, 4), shape), shape)
    volume.data[2:6, 2:6, 2:6] = 150  # a bright thing beside the head
    volume.data[28:34, 28:34, 28:34] = 1  # a ventricle
    mask, _ = brain_mask([find_foreground(volume)], None, volume.affine, shape)
    assert not mask[:8, :8, :8].any()
    assert mask[28:34, 28:34, 28:34].all()


def test_a_masked_head_is_too_large_for_a_brain():
    shape = (60, 64, 60)
    volume = head(centred((4.0, 4, 4), shape), shape, noise=0, radii_mm=(85, 105, 100))
    assert brain_mask([find_foreground(volume)], None, volume.affine, shape)[1] == "foreground"


def test_a_given_mask_wins_and_follows_its_affine():
    given_mask = np.zeros((30, 30, 22), np.float32)
    given_mask[10:20, 8:18, 6:12] = 1
    affine = shifted(np.diag([8.0, 8, 8, 1]) @ np.eye(4), (-15, -15, -11))
    mask, region = brain_mask(
        [find_foreground(STRIPPED)], Volume(given_mask, affine), STRIPPED.affine, STRIPPED.data.shape
    )
    assert region == "brain"
    index = np.argwhere(mask)
    world_low, world_high = (STRIPPED.affine @ [*edge, 1] for edge in (index.min(0) - 0.5, index.max(0) + 0.5))
    np.testing.assert_allclose(world_low[:3], (affine @ [9.5, 7.5, 5.5, 1])[:3], atol=4.1)
    np.testing.assert_allclose(world_high[:3], (affine @ [19.5, 17.5, 11.5, 1])[:3], atol=4.1)
    far = Volume(given_mask, shifted(affine, (500, 0, 0)))
    with pytest.raises(UserError, match="empty"):
        brain_mask([find_foreground(STRIPPED)], far, STRIPPED.affine, STRIPPED.data.shape)


boxes = st.tuples(st.integers(0, 20), st.integers(1, 12))


@settings(max_examples=50, deadline=None)
@given(boxes=st.tuples(boxes, boxes, boxes), shape=st.tuples(*[st.integers(1, 50)] * 3))
def test_the_box_is_centred_on_the_mask(boxes, shape):
    mask = np.zeros((32, 32, 32), bool)
    mask[tuple(slice(start, start + size) for start, size in boxes)] = True
    for start, (low, size), wanted in zip(centred_box(mask, shape), boxes, shape, strict=True):
        before, after = low - start, start + wanted - (low + size)
        assert before - after in (0, 1), "as much room on both sides, to a voxel"


# ------------------------------------------------------------------------------------------------- there and back again


def test_what_becomes_minus_1_is_air_and_by_the_paper_a_percentile_of_the_box() -> None:
    shape = (60, 64, 60)
    volume = head(centred((4.0, 4, 4), shape), shape)
    _, record = prepare_volume(volume, CONFIG)
    assert record.low == find_foreground(volume).dark
    _, record = prepare_volume(volume, replace(CONFIG, intensity="paper"))
    box = crop_or_pad(volume, record.boxes[0], CONFIG.spatial_shape, 0).data
    assert record.low == pytest.approx(np.percentile(box, PERCENTILES["paper"][0]))


def test_restore_undoes_prepare_where_nothing_was_interpolated():
    (array,), record = prepare_volume(STRIPPED, CONFIG)
    assert array.shape == CONFIG.spatial_shape
    assert array.dtype == np.float32
    assert array.min() == -1
    assert 0 < array.max() < 0.25, "half of the range is left for what is brighter"
    back = restore(unscale(array, record.low, record.high), record, STRIPPED, fill=record.low)
    np.testing.assert_allclose(back, np.clip(STRIPPED.data, record.low, record.high), atol=1e-3)


@pytest.mark.parametrize(
    ("spacing", "shape", "turn"),
    [
        ((3.0, 3, 3), (70, 78, 66), None),
        ((2.5, 3.5, 5.0), (82, 64, 40), TURN),
        ((5.0, 5.0, 6.0), (42, 46, 34), TURN.T),
        ((1.8, 7.0, 1.8), (110, 34, 110), TURN),
    ],
)
def test_restore_undoes_prepare_on_other_grids(spacing, shape, turn):
    volume = head(centred(spacing, shape, turn), shape, noise=0)
    (array,), record = prepare_volume(volume, replace(CONFIG, spatial_shape=(44, 52, 44)))
    back = restore(unscale(array, record.low, record.high), record, volume, fill=0)
    assert back.shape == volume.data.shape
    inner = volume.data > 60  # away from the edge, which no 4 mm grid can carry
    error = np.abs(back - np.clip(volume.data, record.low, record.high))[inner]
    assert error.mean() < 0.03 * volume.data[inner].mean()
    correlation = np.corrcoef(back[inner], volume.data[inner])[0, 1]
    assert correlation > 0.95


def test_restore_fills_outside_the_box():
    (array,), record = prepare_volume(STRIPPED, CONFIG)
    back = restore(np.ones_like(array), record, STRIPPED, fill=-7)
    expected = np.full(STRIPPED.data.shape, -7, np.float32)
    places = zip(record.boxes[0], CONFIG.spatial_shape, strict=True)
    expected[tuple(slice(max(0, start), start + side) for start, side in places)] = 1
    np.testing.assert_array_equal(back, expected)


# ------------------------------------------------------------------------------------------------------------- subjects


def test_volumes_on_their_own_grids_come_to_lie_on_each_other():
    sagittal, axial = (76, 80, 60), (64, 64, 48)
    first = head(centred((3.0, 3, 4), sagittal), sagittal, noise=0, radii_mm=(60, 75, 55))
    second = head(centred((4.0, 3.5, 4.5), axial, TURN, middle=(4, 2, -3)), axial, noise=0, radii_mm=(60, 75, 55))
    prepared = prepare_subject({"t2": second, "t1": first}, CONFIG)
    assert list(prepared.volumes) == ["t1", "t2"]
    assert prepared.region == "brain"
    one, two = prepared.records["t1"], prepared.records["t2"]
    assert (one.grid_affine, one.grid_shape, one.boxes) == (two.grid_affine, two.grid_shape, two.boxes)
    assert one.grid_shape == model_grid([first], CONFIG)[1], "the first modality of the vocabulary is the reference"
    brain = prepared.mask
    assert np.abs(prepared.volumes["t1"] - prepared.volumes["t2"])[brain].mean() < 0.06
    (alone,), record = prepare_volume(first, CONFIG)
    whole = Volume(prepared.volumes["t1"], np.array(one.grid_affine))
    (start,) = record.boxes
    np.testing.assert_allclose(crop_or_pad(whole, start, CONFIG.spatial_shape, -1).data, alone, atol=1e-5)


def test_segmentation_and_mask_follow_the_grid():
    labels = np.zeros(STRIPPED.data.shape, np.float32)
    labels[20:30, 20:35, 15:25] = 4
    prepared = prepare_subject(
        {"t1": STRIPPED},
        CONFIG,
        seg=Volume(labels, STRIPPED.affine),
        mask=Volume((labels > 0) * np.float32(1), STRIPPED.affine),
    )
    assert prepared.seg is not None
    assert prepared.seg.dtype == np.uint8
    np.testing.assert_array_equal(prepared.seg, labels)
    np.testing.assert_array_equal(prepared.mask, labels > 0)


def test_a_subject_says_how_much_was_clipped_of_the_mask_and_of_what_is_labelled() -> None:
    data, labels = STRIPPED.data.copy(), np.zeros_like(STRIPPED.data)
    labels[28:32, 28:32, 20:22] = 4
    data[28:30, 28:32, 20:22] = 1000  # half of it is too bright
    prepared = prepare_subject({"t1": Volume(data, STRIPPED.affine)}, CONFIG, seg=Volume(labels, STRIPPED.affine))
    record, clipped = prepared.records["t1"], prepared.clipped["t1"]
    lost = (data < record.low) | (data > record.high)
    assert clipped.seg == lost[labels > 0].mean() == 0.5
    assert clipped.mask == lost[prepared.mask].mean()
    assert prepare_subject({"t1": STRIPPED}, CONFIG).clipped["t1"].seg is None


def test_rigid_registration_finds_a_known_motion():
    shape = (44, 48, 40)
    fixed = head(centred((5.0, 5, 5), shape), shape, noise=1)
    angle = np.deg2rad(6)
    motion = np.eye(4)
    motion[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    motion[:3, 3] = 6, -4, 5
    other = head(centred((5.0, 5, 5), shape), shape, noise=1, seed=1)
    moved = Volume(np.sqrt(other.data), motion @ other.affine)  # another contrast, elsewhere in the world
    registered = register_rigid(fixed, moved)
    np.testing.assert_array_equal(registered.data, moved.data)
    corners = np.array([[i, j, k, 1] for i in (8, 36) for j in (8, 40) for k in (8, 32)]).T
    before, after = (np.linalg.norm(((v.affine - other.affine) @ corners)[:3], axis=0) for v in (moved, registered))
    assert before.min() > 4
    assert after.max() < 2.5, "half a voxel"
    np.testing.assert_array_equal(register_rigid(fixed, moved).affine, registered.affine)


def test_registration_is_part_of_preparing_a_subject():
    shape = (36, 40, 32)
    fixed = head(centred((6.0, 6, 6), shape), shape, noise=1)
    volumes = {"t1": fixed, "t2": Volume(fixed.data, shifted(fixed.affine, (2, 0, -1)))}

    def distance(register):
        config = replace(CONFIG, register=register, spacing_mm=(6.0, 6.0, 6.0))
        prepared = prepare_subject(volumes, config)
        return np.abs(prepared.volumes["t1"] - prepared.volumes["t2"]).mean()

    assert distance("rigid") < 0.2 * distance("none")


def test_volumes_that_do_not_overlap_cannot_be_registered():
    with pytest.raises(UserError, match="registration failed"):
        register_rigid(STRIPPED, Volume(STRIPPED.data, shifted(STRIPPED.affine, (500, 0, 0))))


# --------------------------------------------------------------------------------------------------- values below zero


@pytest.mark.parametrize("intensity", ["tissue", "paper"])
@pytest.mark.parametrize("turn", [None, TURN])
def test_what_nobody_scanned_is_as_dark_as_air_whatever_air_is(intensity, turn):
    """Beyond the field of view, where a box reaches over it and where an oblique grid's corners are: -1."""
    shape, config = (44, 48, 40), replace(CONFIG, spatial_shape=(72, 72, 64), intensity=intensity)
    volume = head(centred((4.0, 4, 4), shape, turn), shape, noise=0, radii_mm=(60, 75, 55))
    low = Volume(volume.data - np.float32(500), volume.affine)
    (wanted,), record = prepare_volume(volume, config)
    (got,), below = prepare_volume(low, config)
    np.testing.assert_allclose(got, wanted, atol=1e-3)
    assert (below.low, below.high) == pytest.approx((record.low - 500, record.high - 500), abs=0.01)
    index = np.indices(config.spatial_shape).reshape(3, -1)
    affine = shifted(np.array(record.grid_affine), record.boxes[0])
    world = affine[:3, :3] @ index + affine[:3, 3:]
    place = np.linalg.inv(volume.affine) @ np.vstack([world, np.ones(world.shape[1])])
    outside = ((place[:3] < -0.6) | (place[:3] > np.array(shape)[:, None] - 0.4)).any(axis=0)
    assert outside.sum() > 1000
    assert (got.reshape(-1)[outside] == -1).all()
    assert (wanted.reshape(-1)[outside] == -1).all()
