"""From volumes as they were scanned to the model's grid and intensities, and back.

All volumes of a subject are resampled once, through their affines, onto one RAS-aligned grid; an interval of their
intensities becomes [-1, 1]; a box of the model's size is cut out around the foreground. The record of it undoes it.
Arrays are X Y Z of RAS+ volumes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from aldm.config import PreprocessConfig, Shape
from aldm.data.bias import BiasField, corrected
from aldm.data.foreground import Foreground, brain_mask, find_foreground, mask_on_grid, own_masks
from aldm.data.intensity import clipped_share, intensity_range, rescale
from aldm.data.modalities import sort_modalities
from aldm.data.volume import MAX_VOXELS, Volume, crop_or_pad, resample, shifted
from aldm.errors import UserError


@dataclass(frozen=True)
class PreprocessRecord:
    """What prepare_volume did, as plain numbers (JSON takes it)."""

    grid_affine: tuple[tuple[float, ...], ...]
    """(4, 4) voxel -> world RAS, mm, of the whole resampled grid."""
    grid_shape: Shape
    """Voxels of the whole resampled grid."""
    crop_start: Shape
    """Voxel of the whole grid at which the model's box begins; may be negative (padding)."""
    low: float
    """Intensity that became -1."""
    high: float
    """Intensity that became +1."""
    background: float | None = None
    """Intensity of the constant background of a masked volume; None where there is none."""
    bias: BiasField | None = None
    """What the volume was divided by; None where its shading was left alone."""

    @property
    def crop_affine(self) -> np.ndarray:
        """(4, 4) voxel -> world RAS, mm, of the model's box."""
        return shifted(np.array(self.grid_affine), self.crop_start)

    def to_dict(self) -> dict[str, Any]:
        """Return the record as dictionaries and lists."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PreprocessRecord":
        """Undo to_dict."""
        return cls(
            grid_affine=tuple(tuple(float(v) for v in row) for row in values["grid_affine"]),
            grid_shape=_shape(values["grid_shape"]),
            crop_start=_shape(values["crop_start"]),
            low=float(values["low"]),
            high=float(values["high"]),
            background=None if values["background"] is None else float(values["background"]),
            bias=None if values["bias"] is None else BiasField.from_dict(values["bias"]),
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


def model_grid(
    volumes: Sequence[Volume], config: PreprocessConfig, *, max_voxels: int = MAX_VOXELS
) -> tuple[np.ndarray, Shape]:
    """Return affine and shape of the RAS-aligned grid at `spacing_mm` that covers the first volume's field of view.

    The grid is centred on the field of view (voxel edges included), so a reference that already lies on an RAS-aligned
    grid of that spacing keeps its voxels as they are. The other volumes are resampled onto it.

    Raises:
        UserError: the grid would have more than `max_voxels` voxels.
    """
    reference = volumes[0]
    spacing = np.array(config.spacing_mm)
    size = np.array(reference.data.shape)
    corners = np.array(np.meshgrid(*([-0.5, n - 0.5] for n in size), indexing="ij")).reshape(3, 8)
    world = reference.affine[:3, :3] @ corners + reference.affine[:3, 3:]
    extent, centre = world.max(axis=1) - world.min(axis=1), (world.max(axis=1) + world.min(axis=1)) / 2
    sides = np.maximum(1, np.ceil(extent / spacing - 1e-2)).tolist()
    if not math.prod(sides) <= max_voxels:
        field = " x ".join(f"{side:g}" for side in extent)
        raise UserError(
            f"a field of view of {field} mm at a spacing of {' x '.join(map(str, config.spacing_mm))} mm is a grid of "
            f"{' x '.join(f'{side:.9g}' for side in sides)} = {math.prod(sides):.9g} voxels, wanted at most "
            f"{max_voxels:,}: take a larger spacing, or cut the volume down"
        )
    shape = np.array(sides, int)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = centre - spacing * (shape - 1) / 2
    return affine, _shape(shape)


def crop_box(mask: np.ndarray, shape: Sequence[int]) -> Shape:
    """Return the start of the box of `shape` voxels that is centred on the mask's bounding box (may be negative)."""
    start = []
    for axis, size in enumerate(shape):
        inside = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
        start.append(math.floor((int(inside[0]) + int(inside[-1]) + 1 - size) / 2))
    return _shape(start)


def prepare_subject(
    volumes: Mapping[str, Volume],
    config: PreprocessConfig,
    *,
    mask: Volume | None = None,
    seg: Volume | None = None,
    max_voxels: int = MAX_VOXELS,
) -> PreparedSubject:
    """Put all volumes of a subject on one grid, with one crop box.

    The reference is the first modality in the vocabulary's order: the grid covers its field of view, and `mask` and
    `seg` are in its world coordinates. With `register` rigid the other volumes are aligned to it first, which changes
    their affine alone: everything is interpolated once.

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
    start = crop_box(inside, config.spatial_shape)
    labels = None
    if seg is not None:
        labels = resample(seg, affine, shape, order="nearest").data.astype(np.uint8)
    scaled, records, clipped = {}, {}, {}
    for name in names:
        try:
            data, records[name] = _on_grid(found.pop(name), config, affine, shape, start)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        low, high = records[name].low, records[name].high
        in_seg = None if labels is None else clipped_share(data[labels > 0], low, high)
        clipped[name] = Clipped(clipped_share(data[inside], low, high), in_seg)
        scaled[name] = rescale(data, low, high)
    return PreparedSubject(scaled, records, inside, region, labels, clipped)


def prepare_volume(volume: Volume, config: PreprocessConfig) -> tuple[np.ndarray, PreprocessRecord]:
    """Return one volume as model input, (spatial_shape) float32 in [-1, 1], and the record that undoes it.

    Raises:
        UserError: the volume has no contrast, or its grid is too large.
    """
    affine, shape = model_grid([volume], config)
    found = find_foreground(volume)
    mask, _ = brain_mask([found], None, affine, shape)
    start = crop_box(mask, config.spatial_shape)
    data, record = _on_grid(found, config, affine, shape, start)
    box = crop_or_pad(Volume(data, affine), start, config.spatial_shape, record.low).data
    return rescale(box, record.low, record.high), record


def _on_grid(
    found: Foreground, config: PreprocessConfig, affine: np.ndarray, shape: Shape, start: Shape
) -> tuple[np.ndarray, PreprocessRecord]:
    """Return a volume on the whole grid, not rescaled yet, and its record.

    Its own foreground decides on its intensities, with or without a mask file and whatever other volumes there are: so
    a volume is prepared alike for a training and alone.
    """
    bias = None
    if config.bias_correction == "n4":
        found, bias = corrected(found)
    if config.intensity == "paper":
        volume, dark = found.with_background()
        data = resample(volume, affine, shape, fill=dark).data
        values = crop_or_pad(Volume(data, affine), start, config.spatial_shape, dark).data
    else:
        data = resample(found.volume, affine, shape, fill=found.dark).data
        masks, region = own_masks([found], None)
        values = data[mask_on_grid(masks, region, affine, shape)]
    air = None if found.stripped or config.intensity == "paper" else found.dark
    low, high = intensity_range(values, config.intensity, air)
    return data, PreprocessRecord(_rows(affine), shape, start, low, high, found.background, bias)


def restore(array: np.ndarray, record: PreprocessRecord, volume: Volume, *, fill: float) -> np.ndarray:
    """Return an array of the model's box on `volume`'s own grid, float32, linearly interpolated.

    Args:
        array: (spatial_shape), in any intensities.
        record: from prepare_volume(volume).
        volume: whose grid is wanted.
        fill: value outside the model's box.
    """
    box = Volume(array.astype(np.float32, copy=False), record.crop_affine)
    return resample(box, volume.affine, volume.data.shape, fill=fill).data


def _shape(values: Sequence[int] | np.ndarray) -> Shape:
    x, y, z = (int(v) for v in values)
    return x, y, z


def _rows(affine: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(v) for v in row) for row in affine)
