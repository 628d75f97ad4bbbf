"""Boxes of the model's shape: they hold everything, are few and even, and their results have no seams."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aldm.data.boxes import blend, centred_box, cover, head_box, region_of, share_outside

GRID = (40, 44, 48)


def solid(low, high, shape=GRID):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = True
    return mask


def held_by(boxes, shape, grid=GRID):
    """How many boxes hold each voxel of a grid, counted one by one."""
    count = np.zeros(grid, int)
    for box in boxes:
        count[tuple(slice(max(0, b), max(0, b + n)) for b, n in zip(box, shape, strict=True))] += 1
    return count


ends = st.tuples(st.integers(0, 18), st.integers(1, 20))


@settings(max_examples=60, deadline=None)
@given(spans=st.tuples(ends, ends, ends), shape=st.tuples(*[st.integers(4, 30)] * 3), stride=st.sampled_from([1, 2, 4]))
def test_boxes_hold_every_voxel_and_are_few_and_even(spans, shape, stride):
    low, high = [a for a, _ in spans], [a + n for a, n in spans]
    mask = solid(low, high)
    boxes = cover(mask, np.eye(4), centred_box(mask, shape), shape, stride)
    assert (held_by(boxes, shape)[mask] > 0).all()
    assert share_outside(mask, np.eye(4), boxes, shape) == 0
    for axis in range(3):
        starts = sorted({box[axis] for box in boxes})
        size, length = shape[axis], spans[axis][1]
        gaps = np.diff(starts)
        if length <= size:
            assert starts == [centred_box(mask, shape)[axis]]
            continue
        assert not (gaps % stride).any()
        assert (gaps <= max(stride, 0.75 * size)).all(), "they overlap by a quarter"
        assert np.ptp(gaps) <= stride
        reach = max(1, int(0.75 * size) // stride) * stride
        assert (len(starts) - 2) * reach < length - size + 2 * stride, "one fewer would not do"
        assert not (starts[0] - centred_box(mask, shape)[axis]) % stride, "a network sees all as it would see one"
        outer = (low[axis] - starts[0], starts[-1] + size - high[axis])
        assert min(outer) >= 0
        assert abs(outer[0] - outer[1]) <= stride


def test_a_box_with_nothing_in_it_is_left_out():
    mask = solid((0, 0, 24), (40, 44, 48)) | solid((14, 14, 0), (26, 26, 24))  # a head on a thin neck
    shape = (20, 24, 24)
    boxes = cover(mask, np.eye(4), centred_box(mask, shape), shape, 1)
    assert (held_by(boxes, shape)[mask] > 0).all()
    far = solid((0, 0, 0), (4, 4, 4)) | solid((36, 40, 44), (40, 44, 48))
    boxes = cover(far, np.eye(4), centred_box(far, shape), shape, 1)
    assert (held_by(boxes, shape)[far] > 0).all()
    assert len(boxes) == 2


def test_the_mask_may_lie_on_another_grid():
    turn = np.linalg.qr(np.array([[9.0, 2, 1], [-2, 9, 2], [1, -2, 9]]))[0]
    turn *= np.sign(np.diag(turn))
    to_grid = np.eye(4)
    to_grid[:3, :3], to_grid[:3, 3] = turn * 0.7, (5, 9, 1)
    mask = solid((3, 2, 4), (37, 40, 41))
    shape = (16, 18, 14)
    boxes = cover(mask, to_grid, (0, 0, 0), shape, 2)
    places = np.argwhere(mask) @ to_grid[:3, :3].T + to_grid[:3, 3]
    low, high = (np.array(boxes)[:, None] - 0.501, np.array(boxes)[:, None] + np.array(shape) - 0.499)
    assert ((places >= low) & (places <= high)).all(axis=2).any(axis=0).all()
    one = boxes[:1]
    expected = 1 - ((places >= low[:1]) & (places <= high[:1])).all(axis=2).any(axis=0).mean()
    assert share_outside(mask, to_grid, one, shape) == pytest.approx(expected)
    assert 0.5 < expected < 1


@pytest.mark.parametrize("shape", [(16, 20, 18), (40, 44, 26), (24, 44, 48)])
def test_pieces_of_a_volume_put_together_are_the_volume(shape):
    volume = np.random.default_rng(0).normal(size=GRID).astype(np.float32)
    full = np.ones(GRID, bool)
    boxes = cover(full, np.eye(4), centred_box(full, shape), shape, 2)
    start, whole = region_of(boxes, shape)
    padded = np.pad(volume, 8, constant_values=3.0)
    parts = [padded[tuple(slice(b + 8, b + 8 + n) for b, n in zip(box, shape, strict=True))] for box in boxes]
    assert len(boxes) > 1
    result = blend(parts, boxes, -9)
    assert result.shape == whole
    expected = padded[tuple(slice(s + 8, s + 8 + n) for s, n in zip(start, whole, strict=True))]
    np.testing.assert_allclose(result, expected, atol=2e-6)
    np.testing.assert_allclose(blend([np.full(shape, 0.7, np.float32)] * len(boxes), boxes, -9), 0.7, atol=1e-6)


def test_where_one_box_lies_the_result_is_its_own_and_between_them_it_is_smooth():
    shape, boxes = (4, 4, 16), [(0, 0, 0), (0, 0, 10)]
    result = blend([np.zeros(shape, np.float32), np.ones(shape, np.float32)], boxes, -1)[1, 1]
    assert (result[:10] == 0).all()
    assert (result[16:] == 1).all()
    steps = np.diff(result)
    assert (steps >= 0).all()
    assert steps.max() < 0.35
    assert steps[[9, 15]].max() < 0.05, "no step where a box begins or ends"
    alone = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    assert blend([alone], [(-3, 2, 5)], -1).tobytes() == alone.tobytes()
    apart = blend([np.ones(shape, np.float32)] * 2, [(0, 0, 0), (8, 0, 0)], -1)
    assert (apart[4:8] == -1).all(), "background where no box lies"


# ---------------------------------------------------------------------------------------------------- a store's one box


def test_a_head_with_its_neck_keeps_the_vertex():
    neck, head, nose = (16, 14, 0), (6, 4, 24), (18, 34, 26)
    mask = solid(neck, (24, 26, 24)) | solid(head, (34, 34, 46)) | solid(nose, (22, 44, 30))
    shape = (30, 44, 26)
    box = head_box(mask, shape, (4.0, 4.0, 4.0))
    assert box[2] + shape[2] == 46, "the box ends at the vertex"
    assert (held_by([box], shape)[:, :, 20:][mask[:, :, 20:]] == 1).all()
    narrow = head_box(mask, (30, 34, 26), (6.0, 6.0, 6.0))
    assert narrow[1] == 2, "one that is too short for the nose is centred on the upper head, from 4 to 34"
    assert share_outside(mask, np.eye(4), [box], shape) == pytest.approx(mask[:, :, :20].sum() / mask.sum())


def test_a_head_that_fits_lies_in_the_middle():
    mask = solid((6, 4, 20), (34, 34, 46))
    for shape in ((30, 34, 28), (28, 30, 26), (64, 64, 64)):
        assert head_box(mask, shape, (4.0, 4.0, 4.0)) == centred_box(mask, shape)
        assert share_outside(mask, np.eye(4), [centred_box(mask, shape)], shape) == 0
