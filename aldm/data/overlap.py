"""Do a subject's files lie on each other? Shared fields of view, and labels that fall outside or between voxels."""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from aldm.data.volume import Volume, resample
from aldm.errors import UserError

MIN_OVERLAP = 1 / 3
"""Of the smaller of two fields of view. Centred boxes of which one begins at the origin share an eighth."""
_FIELD_SAMPLES = 24
"""Points along each axis of a field of view that are looked at."""


def shared_field_of_view(first: Volume, second: Volume) -> float:
    """Return the share of the smaller field of view that both cover, 0 to 1, oblique or not, to about 4 %."""
    smaller, larger = sorted((first, second), key=_millilitres)
    steps = [(np.arange(_FIELD_SAMPLES) + 0.5) / _FIELD_SAMPLES * n - 0.5 for n in smaller.data.shape]
    return float(_inside(np.stack(np.meshgrid(*steps, indexing="ij"), axis=-1).reshape(-1, 3), smaller, larger).mean())


def check_not_the_same(volumes: Mapping[str, Volume]) -> None:
    """Refuse volumes of different modalities that are one and the same.

    Args:
        volumes: name -> volume.

    Raises:
        UserError: two have the same voxels.
    """
    for (name, volume), (other, second) in combinations(volumes.items(), 2):
        if np.array_equal(volume.data, second.data):
            raise UserError(f"{name} and {other} have the same voxels: give each modality a volume of its own")


def check_one_place(volumes: Mapping[str, Volume]) -> None:
    """Refuse volumes of one head that do not lie on each other.

    Args:
        volumes: name -> volume; the others are compared with the first.

    Raises:
        UserError: less than a third of the smaller field of view is shared.
    """
    (first, fixed), *others = volumes.items()
    for name, volume in others:
        shared = shared_field_of_view(fixed, volume)
        if shared < MIN_OVERLAP:
            raise UserError(
                f"{name} lies elsewhere than {first}: {shared:.0%} of the smaller field of view is in both, wanted "
                f"{MIN_OVERLAP:.0%}; their affines have to place them in one head: register them first"
            )


def labels_inside(labels: Volume, volume: Volume) -> tuple[int, int]:
    """Return how many labelled voxels lie inside a volume's field of view, and how many there are."""
    inside = _inside(np.argwhere(labels.data > 0), labels, volume)
    return int(inside.sum()), len(inside)


def lost_labels(labels: Volume, affine: np.ndarray, shape: Sequence[int]) -> dict[int, int]:
    """Return label -> voxels of the labels that have none left on another grid."""
    values, counts = np.unique(labels.data[labels.data > 0], return_counts=True)
    kept = np.unique(resample(labels, affine, shape, order="nearest").data)
    return {int(value): int(count) for value, count in zip(values, counts, strict=True) if value not in kept}


def _inside(index: np.ndarray, of: Volume, volume: Volume) -> np.ndarray:
    """Whether each voxel index (N, 3) of one volume lies in the field of view of another."""
    to_volume = np.linalg.inv(volume.affine) @ of.affine
    there = index @ to_volume[:3, :3].T + to_volume[:3, 3]
    return np.asarray(((there >= -0.501) & (there <= np.array(volume.data.shape) - 0.499)).all(axis=1))


def _millilitres(volume: Volume) -> float:
    return volume.data.size * float(abs(np.linalg.det(volume.affine[:3, :3]))) / 1000
