"""From volumes as they were scanned to the model's grid and intensities, and back.

All volumes of a subject are resampled once, through their affines, onto one RAS-aligned grid; an interval of their
intensities becomes [-1, 1]; boxes of the model's size are cut out so that they hold the foreground. The record of it
undoes it.
Arrays are X Y Z of RAS+ volumes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from aldm.config import PreprocessConfig, Shape
from aldm.data.bias import BiasField, corrected
from aldm.data.boxes import centred_box, cover, head_box, share_outside
from aldm.data.foreground import Foreground, brain_mask, find_foreground, mask_on_grid, own_masks
from aldm.data.intensity import clipped_share, intensity_range, rescale
from aldm.data.modalities import sort_modalities
from aldm.data.volume import MAX_VOXELS, Volume, crop_or_pad, resample, shifted
from aldm.errors import UserError
from aldm.likeness import features


@dataclass(frozen=True)
class PreprocessRecord:
    """What prepare_volume did, as plain numbers (JSON takes it)."""

    grid_affine: tuple[tuple[float, ...], ...]
    """(4, 4) voxel -> world RAS, mm, of the whole resampled grid."""
    grid_shape: Shape
    """Voxels of the whole resampled grid."""
    boxes: tuple[Shape, ...]
    """Voxel of the whole grid at which each box of the model's shape begins; may be negative (padding)."""
    share_outside: float
    """Share of the foreground, 0 to 1, that lies in none of the boxes."""
    low: float
    """Intensity that became -1."""
    high: float
    """Intensity that became +1."""
    background: float | None = None
    """Intensity of the constant background of a masked volume; None where there is none."""
    bias: BiasField | None = None
    """What the volume was divided by; None where its shading was left alone."""
    features: tuple[tuple[float, ...], ...] = ()
    """Of each volume, what tells how unlike the training data it is (`likeness.features`) in the box of a store."""

    def to_dict(self) -> dict[str, Any]:
        """Return the record as dictionaries and lists."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PreprocessRecord":
        """Undo to_dict."""
        return cls(
            grid_affine=tuple(tuple(float(v) for v in row) for row in values["grid_affine"]),
            grid_shape=_shape(values["grid_shape"]),
            boxes=tuple(_shape(box) for box in values["boxes"]),
            share_outside=float(values["share_outside"]),
            low=float(values["low"]),
            high=float(values["high"]),
            background=None if values["background"] is None else float(values["background"]),
            bias=None if values["bias"] is None else BiasField.from_dict(values["bias"]),
            features=tuple(tuple(float(value) for value in row) for row in values.get("features", ())),
        )


@dataclass(frozen=True)
class Clipped:
    """Shares, 0 to 1, of the voxels of a volume that were darker than -1 or brighter than +1."""

    mask: float
    """Of the region that scores are taken over."""
    seg: float | None
    """Of what is labelled in the segmentation; None without one."""


@dataclass(frozen=True, eq=False)
class PreparedSubject:
    """All volumes of a subject on one grid."""

    volumes: dict[str, np.ndarray]
    """Modality -> whole resampled grid, float32 in [-1, 1]."""
    records: dict[str, PreprocessRecord]
    """Modality -> record; grid and box are the same in all."""
    mask: np.ndarray
    """bool, whole grid: the brain, or the foreground where no brain is marked off."""
    region: str
    """What `mask` is: brain or foreground."""
    seg: np.ndarray | None
    """uint8 labels, whole grid, or None."""
    clipped: dict[str, Clipped]
    """Modality -> how much of its contrast was lost."""
    tissue: np.ndarray | None = None
    """uint8, whole grid, 1 CSF, 2 grey, 3 white matter, or None."""


def model_grid(
    volumes: Sequence[Volume], config: PreprocessConfig, *, max_voxels: int = MAX_VOXELS
) -> tuple[np.ndarray, Shape]:
    """Return affine and shape of the RAS-aligned grid at `spacing_mm` that covers the first volume's field of view.

    The edges of its voxels lie at whole steps from one corner of the volume's own voxels, that nearest to the world's
    origin: so the same head is sampled at the same places however far the file is padded or cropped, and a reference
    that lies on an RAS-aligned grid of that spacing keeps its voxels as they are. The other volumes are resampled onto
    it.

    Raises:
        UserError: the grid would have more than `max_voxels` voxels.
    """
    reference = volumes[0]
    spacing = np.array(config.spacing_mm)
    size = np.array(reference.data.shape)
    corners = np.array(np.meshgrid(*([-0.5, n - 0.5] for n in size), indexing="ij")).reshape(3, 8)
    world = reference.affine[:3, :3] @ corners + reference.affine[:3, 3:]
    low, high = world.min(axis=1), world.max(axis=1)
    corner = _fixed_corner(reference.affine)
    first = np.floor((low - corner) / spacing + 1e-2)
    sides = np.maximum(1, np.ceil((high - corner) / spacing - 1e-2) - first).tolist()
    if not math.prod(sides) <= max_voxels:
        field = " x ".join(f"{side:g}" for side in high - low)
        raise UserError(
            f"a field of view of {field} mm at a spacing of {' x '.join(map(str, config.spacing_mm))} mm is a grid of "
            f"{' x '.join(f'{side:.9g}' for side in sides)} = {math.prod(sides):.9g} voxels, wanted at most "
            f"{max_voxels:,}: take a larger spacing, or cut the volume down"
        )
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = corner + spacing * (first + 0.5)
    return affine, _shape(sides)


def _fixed_corner(affine: np.ndarray) -> np.ndarray:
    """Return the corner of a grid's voxels, continued beyond its ends, that is nearest to the origin; (3,) mm.

    An origin in the middle of a voxel is as near to two corners: rounding does not decide between them.
    """
    origin = np.linalg.solve(affine[:3, :3], -affine[:3, 3])
    return np.asarray(affine[:3, :3] @ (np.floor(origin + 1 - 1e-3) - 0.5) + affine[:3, 3])


def prepare_subject(
    volumes: Mapping[str, Volume],
    config: PreprocessConfig,
    *,
    mask: Volume | None = None,
    seg: Volume | None = None,
    tissue: Volume | None = None,
    max_voxels: int = MAX_VOXELS,
) -> PreparedSubject:
    """Put all volumes of a subject on one grid, with one box, laid for the head (`head_box`).

    The reference is the first modality in the vocabulary's order: the grid covers its field of view, and `mask`, `seg`
    and `tissue` are in its world coordinates. With `register` rigid the other volumes are aligned to it first, which
    changes their affine alone: everything is interpolated once.

    Raises:
        UserError: no contrast in a volume, an empty mask, or a grid of more than `max_voxels`.
    """
    names = sort_modalities(volumes)
    aligned = {name: volumes[name] for name in names}
    if config.register == "rigid":
        from aldm.data.registration import register_rigid

        for name in names[1:]:
            aligned[name] = register_rigid(aligned[names[0]], aligned[name])
    affine, shape = model_grid([aligned[names[0]]], config, max_voxels=max_voxels)
    found = {name: find_foreground(volume) for name, volume in aligned.items()}
    inside, region = brain_mask(list(found.values()), mask, affine, shape)
    box = head_box(inside, config.spatial_shape, config.spacing_mm)
    outside = share_outside(inside, np.eye(4), [box], config.spatial_shape)
    labels, tissues = (
        None if each is None else resample(each, affine, shape, order="nearest").data.astype(np.uint8)
        for each in (seg, tissue)
    )
    scaled, records, clipped = {}, {}, {}
    for name in names:
        try:
            data, low, high, bias = _on_grid(found[name], config, affine, shape, box)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        dark = found.pop(name).background
        in_seg = None if labels is None else clipped_share(data[labels > 0], low, high)
        clipped[name] = Clipped(clipped_share(data[inside], low, high), in_seg)
        scaled[name] = rescale(data, low, high)
        measured = features(crop_or_pad(Volume(scaled[name], affine), box, config.spatial_shape, -1).data)
        records[name] = PreprocessRecord(_rows(affine), shape, (box,), outside, low, high, dark, bias, (measured,))
    return PreparedSubject(scaled, records, inside, region, labels, clipped, tissues)


def prepare_volume(
    volume: Volume, config: PreprocessConfig, *, stride: int = 1, max_boxes: int | None = None
) -> tuple[list[np.ndarray], PreprocessRecord]:
    """Return one volume as model input, and the record that undoes it: `prepare_volumes` of it alone.

    Returns:
        boxes, each (spatial_shape) float32 in [-1, 1], and the record.
    """
    arrays, record = prepare_volumes([volume], config, stride=stride, max_boxes=max_boxes)
    return arrays[0], record


def prepare_volumes(
    volumes: Sequence[Volume], config: PreprocessConfig, *, stride: int = 1, max_boxes: int | None = None
) -> tuple[list[list[np.ndarray]], PreprocessRecord]:
    """Return several volumes of one head as model input, all on one grid, and the record that undoes it.

    The foreground of all of them lies in one box where it fits into one, else in as many as it takes; all boxes of a
    volume are scaled alike, by its own foreground, as in `prepare_subject`.

    Args:
        volumes: RAS+, any spacing, any units; aligned by their affines. The grid covers the first one's field of view.
        config: the model's.
        stride: where there are several boxes they differ by multiples of so many voxels.
        max_boxes: refuse a volume that takes more; None sets no limit.

    Returns:
        of each volume its boxes, each (spatial_shape) float32 in [-1, 1], and the record, whose intensities and
        background are the first volume's.

    Raises:
        UserError: a volume has no contrast, the grid is too large, or it takes too many boxes.
    """
    affine, shape = model_grid(volumes, config)
    found, box = [find_foreground(volume) for volume in volumes], config.spatial_shape
    mask = _own_mask(found, affine, shape)
    boxes = _boxes_of(found, mask, affine, box, stride)
    if max_boxes is not None and len(boxes) > max_boxes:
        raise UserError(
            f"this volume takes {len(boxes)} boxes of the model's {' x '.join(map(str, box))} voxels, the limit is "
            f"{max_boxes}: cut it down to the head, or ask for fewer steps, samples or targets"
        )
    outside = share_outside(_united(found), np.linalg.inv(affine) @ volumes[0].affine, boxes, box)
    scaled_by = head_box(mask, box, config.spacing_mm)  # the box that a store would have
    arrays, records, measured = [], [], []
    for one in found:
        data, low, high, bias = _on_grid(one, config, affine, shape, scaled_by)
        whole = Volume(data, affine)
        own = [rescale(crop_or_pad(whole, start, box, low).data, low, high) for start in boxes]
        arrays.append(own)
        head = own[0] if boxes == (scaled_by,) else rescale(crop_or_pad(whole, scaled_by, box, low).data, low, high)
        measured.append(features(head))
        records.append(PreprocessRecord(_rows(affine), shape, boxes, outside, low, high, one.background, bias))
    return arrays, replace(records[0], features=tuple(measured))


def count_boxes(volume: Volume, config: PreprocessConfig, *, stride: int = 1) -> int:
    """Return how many boxes prepare_volume will cut."""
    affine, shape = model_grid([volume], config)
    found = [find_foreground(volume)]
    return len(_boxes_of(found, _own_mask(found, affine, shape), affine, config.spatial_shape, stride))


def _own_mask(found: Sequence[Foreground], affine: np.ndarray, shape: Shape) -> np.ndarray:
    masks, region = own_masks(found, None)
    return mask_on_grid(masks, region, affine, shape)


def _boxes_of(
    found: Sequence[Foreground], mask: np.ndarray, affine: np.ndarray, box: Shape, stride: int
) -> tuple[Shape, ...]:
    """Return the boxes that hold every voxel of the volumes' foreground; `mask` is that on the grid."""
    to_grid = np.linalg.inv(affine) @ found[0].volume.affine
    return cover(_united(found), to_grid, centred_box(mask, box), box, stride)


def _united(found: Sequence[Foreground]) -> np.ndarray:
    """Return where any of the volumes shows the patient, on the first one's own grid."""
    first = found[0]
    united = first.mask
    for other in found[1:]:
        mask = Volume(other.mask.astype(np.float32), other.volume.affine)
        united = united | (resample(mask, first.volume.affine, first.mask.shape).data >= 0.5)
    return united


def _on_grid(
    found: Foreground, config: PreprocessConfig, affine: np.ndarray, shape: Shape, start: Shape
) -> tuple[np.ndarray, float, float, BiasField | None]:
    """Return a volume on the whole grid, not rescaled yet, what becomes -1 and +1, and the shading taken from it.

    Its own foreground decides on its intensities, with or without a mask file and whatever other volumes there are: so
    a volume is prepared alike for a training and alone.
    """
    bias = None
    if config.bias_correction == "n4":
        found, bias = corrected(found)
    if config.intensity == "paper":
        volume, dark = found.with_background()
        data = resample(volume, affine, shape, fill=dark, reach=0.5).data
        values = crop_or_pad(Volume(data, affine), start, config.spatial_shape, dark).data
    else:
        data = resample(found.volume, affine, shape, fill=found.dark, reach=0.5).data
        values = data[_own_mask([found], affine, shape)]
    air = None if found.stripped or config.intensity == "paper" else found.dark
    return data, *intensity_range(values, config.intensity, air), bias


def restore(array: np.ndarray, record: PreprocessRecord, volume: Volume, *, fill: float) -> np.ndarray:
    """Return an array of the region that the boxes cover on `volume`'s own grid, float32, linearly interpolated.

    Args:
        array: the boxes as one (`blend`), in any intensities.
        record: from prepare_volume(volume).
        volume: whose grid is wanted.
        fill: value outside the region.
    """
    start = np.array(record.boxes).min(axis=0).tolist()
    region = Volume(array.astype(np.float32, copy=False), shifted(np.array(record.grid_affine), start))
    return resample(region, volume.affine, volume.data.shape, fill=fill).data


def _shape(values: Sequence[int] | np.ndarray) -> Shape:
    x, y, z = (int(v) for v in values)
    return x, y, z


def _rows(affine: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(v) for v in row) for row in affine)
