"""Boxes of the model's shape on a grid: where they lie so that nothing is lost, and how their results become one.

A box is named by the voxel that it starts at; it reaches half a voxel beyond its outer voxel centres. Arrays are X Y Z
of RAS+ volumes, so the last axis points to the vertex.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np

from aldm.config import Shape

MIN_OVERLAP = 0.25
"""Share of a side that neighbouring boxes have in common at least: a network sees too little at the edge of its box."""
MARGIN = 1 / 16
"""Share of a side that boxes reach beyond the foreground, where no more boxes come of it: skin may be dark."""
UPPER_HEAD_MM = 90.0
"""So far below the vertex there is brain, and neither nose nor shoulders widen the head."""
MAX_OUTSIDE = 0.005
"""Share of the foreground outside a store's box from which it is said."""


def bounds(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first and the last voxel (3,) of a mask's bounding box; the mask is not empty."""
    inside = [np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis))) for axis in range(3)]
    return np.array([one[0] for one in inside]), np.array([one[-1] for one in inside])


def centred_box(mask: np.ndarray, shape: Sequence[int]) -> Shape:
    """Return the box of `shape` voxels that is centred on the mask's bounding box."""
    return _centred(*bounds(mask), shape)


def head_box(mask: np.ndarray, shape: Sequence[int], spacing_mm: Sequence[float]) -> Shape:
    """Return the box for a head, which may be larger than the box.

    Along an axis where the mask fits it is centred. A mask that is too long from top to bottom (a head with its neck)
    loses its lower end: the box ends at the vertex. One that is too wide is centred on the upper 90 mm.
    """
    first, last = bounds(mask)
    start_z = _centred(first, last, shape)[2]
    if last[2] + 1 - first[2] > shape[2]:
        start_z = int(last[2]) + 1 - shape[2]
    first, last = bounds(mask[:, :, max(start_z, 0) : start_z + shape[2]])
    upper_first, upper_last = bounds(mask[:, :, max(0, _top(mask) - round(UPPER_HEAD_MM / spacing_mm[2])) :])
    for axis in (0, 1):
        if last[axis] + 1 - first[axis] > shape[axis]:
            first[axis], last[axis] = upper_first[axis], upper_last[axis]
    return (*_centred(first, last, shape)[:2], start_z)


def cover(mask: np.ndarray, to_grid: np.ndarray, centre: Shape, shape: Shape, stride: int) -> tuple[Shape, ...]:
    """Return as few boxes as hold every voxel of a mask, evenly spread over it.

    Args:
        mask: on the volume's own grid, not empty.
        to_grid: (4, 4) voxel of that grid -> voxel of the grid that the boxes are on.
        centre: the box to take along an axis where it holds the mask.
        shape: voxels of a box.
        stride: boxes differ by multiples of so many voxels, from each other and from `centre`: where a network's answer
            moves with its input by such steps alone, all of them say the same of a voxel.
    """
    first, last = np.full(3, np.inf), np.full(3, -np.inf)
    for places in _places(mask, to_grid):
        first, last = np.minimum(first, places.min(axis=0)), np.maximum(last, places.max(axis=0))
    low, high = np.floor(first + 0.5).astype(int), np.ceil(last - 0.5).astype(int)
    axes = [
        [begin] if begin <= lo and hi < begin + size else _spread(lo, hi, size, stride, begin)
        for begin, lo, hi, size in zip(centre, low.tolist(), high.tolist(), shape, strict=True)
    ]
    boxes = [(x, y, z) for x, y, z in product(*axes)]
    if len(boxes) < 3:
        return tuple(boxes)
    holds = np.zeros(len(boxes), bool)
    for places in _places(mask, to_grid):
        holds |= [_inside(places, box, shape).any() for box in boxes]
    return tuple(box for box, wanted in zip(boxes, holds, strict=True) if wanted)


def share_outside(mask: np.ndarray, to_grid: np.ndarray, boxes: Sequence[Shape], shape: Shape) -> float:
    """Return the share, 0 to 1, of a mask's voxels whose centres lie in none of the boxes; arguments as in `cover`."""
    outside = total = 0
    for places in _places(mask, to_grid):
        held = np.zeros(len(places), bool)
        for box in boxes:
            held |= _inside(places, box, shape)
        outside, total = outside + int(np.count_nonzero(~held)), total + len(places)
    return outside / total


def region_of(boxes: Sequence[Shape], shape: Shape) -> tuple[Shape, Shape]:
    """Return start and shape of the smallest box that holds all of them."""
    starts = np.array(boxes)
    start, end = starts.min(axis=0), starts.max(axis=0) + shape
    return _triple(start), _triple(end - start)


def blend(parts: Sequence[np.ndarray], boxes: Sequence[Shape], fill: float) -> np.ndarray:
    """Return the weighted mean of what each box holds, on the region that they cover together (`region_of`), float32.

    The weight of a box falls as sin^2 from its middle to its edges, along each axis, and the weights of all boxes at a
    voxel sum to 1. So the result has no seam where a box ends, and where there is one box it is that box's.

    Args:
        parts: (shape) of each box.
        boxes: their starts.
        fill: value of what lies in no box.
    """
    if len(parts) == 1:
        return parts[0].astype(np.float32, copy=False)
    shape = _triple(parts[0].shape)
    start, whole = region_of(boxes, shape)
    total, weights = np.zeros(whole, np.float32), np.zeros(whole, np.float32)
    for part, box in zip(parts, boxes, strict=True):
        sides = [_weights(axis, boxes, box, shape[axis]) for axis in range(3)]
        weight = (sides[0][:, None, None] * sides[1][:, None] * sides[2]).astype(np.float32)
        place = tuple(slice(b - s, b - s + n) for b, s, n in zip(box, start, shape, strict=True))
        total[place] += weight * part
        weights[place] += weight
    np.divide(total, weights, out=total, where=weights > 0)
    total[weights == 0] = fill
    return total


def _weights(axis: int, boxes: Sequence[Shape], box: Shape, size: int) -> np.ndarray:
    """Return the weight (size,) of a box along an axis; over the starts that there are on this axis they sum to 1."""
    window = np.sin(np.pi * (np.arange(size) + 0.5) / size) ** 2
    total = np.zeros(size)
    for begin in {other[axis] for other in boxes}:
        shift = begin - box[axis]
        if abs(shift) < size:
            low, high = max(0, shift), min(size, size + shift)
            total[low:high] += window[low - shift : high - shift]
    return window / total


def _spread(low: int, high: int, size: int, stride: int, phase: int) -> list[int]:
    """Return the starts along one axis: they cover low to high, and what is near where there is room.

    They differ from `phase` by multiples of `stride`.
    """
    begin = low - (low - phase) % stride
    steps = max(0, math.ceil((high + 1 - begin - size) / stride))  # from the first start to the last, in strides
    longest = max(1, int(size * (1 - MIN_OVERLAP)) // stride)
    pieces = math.ceil(steps / longest)
    spare = min(pieces * longest - steps, int(2 * MARGIN * size) // stride)
    before, after = low - begin, begin + steps * stride + size - 1 - high
    begin -= stride * ((spare + (before < after)) // 2)
    steps += spare
    return [begin + stride * ((steps * piece) // max(1, pieces)) for piece in range(pieces + 1)]


def _places(mask: np.ndarray, to_grid: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the places (N, 3) of a mask's voxels on the boxes' grid, plane by plane."""
    for x, plane in enumerate(mask):
        inside = np.argwhere(plane)
        if len(inside):
            yield inside @ to_grid[:3, 1:3].T + (x * to_grid[:3, 0] + to_grid[:3, 3])


def _inside(places: np.ndarray, box: Shape, shape: Shape) -> np.ndarray:
    low = np.array(box) - 0.501  # as resample() has the end of a field of view
    return np.asarray(((places >= low) & (places <= low + np.array(shape) + 0.002)).all(axis=1))


def _centred(first: np.ndarray, last: np.ndarray, shape: Sequence[int]) -> Shape:
    return _triple([math.floor((a + b + 1 - size) / 2) for a, b, size in zip(first, last, shape, strict=True)])


def _top(mask: np.ndarray) -> int:
    return int(bounds(mask)[1][2]) + 1


def _triple(values: Sequence[int] | np.ndarray) -> Shape:
    x, y, z = (int(value) for value in values)
    return x, y, z
