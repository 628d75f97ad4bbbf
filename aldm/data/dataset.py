"""Training samples: volumes, pairs of volumes, pairs of latents. Arrays become float32 tensors C X Y Z.

No sample keeps a random state: `sample(index, generator)` makes all its choices from the generator that it is given.
"""

from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from aldm.config import Shape
from aldm.data.modalities import modality_index
from aldm.data.store import VolumeStore
from aldm.errors import UserError
from aldm.randomness import shuffled

if TYPE_CHECKING:
    from aldm.latents import LatentStore


class Samples(Protocol):
    """A split's samples; an epoch is one pass over the indices."""

    def __len__(self) -> int:
        """Return the number of samples in an epoch."""

    def sample(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """Return a sample: tensors without a batch axis, whole numbers for ids, and its `subject_id`."""


_order = lru_cache(maxsize=4)(shuffled)


def batch_places(length: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Return the indices of the batch of a step.

    The samples of all epochs stand in one row, each epoch in its own order, and are cut into batches; so every sample
    is seen once an epoch, and a batch may hold the end of one epoch and the beginning of the next.
    """
    places = range(step * batch_size, (step + 1) * batch_size)
    return [_order(length, seed, place // length)[place % length] for place in places]


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack samples: tensors gain a batch axis, whole numbers become an int64 tensor, everything else a list."""

    def together(values: list[Any]) -> Any:
        if isinstance(values[0], Tensor):
            return torch.stack(values)
        return torch.tensor(values) if isinstance(values[0], int) else values

    return {key: together([sample[key] for sample in samples]) for key in samples[0]}


class VolumeSamples:
    """Single volumes for stage 1: every modality of every subject once an epoch.

    A sample is {volume: (1, X, Y, Z) in [-1, 1], subject_id, modality}.

    Args:
        store: prepared volumes.
        split: train, validation or test.
        modalities: those of the model; a subject's others are left out.
        crop: voxels of a random crop; None takes the whole volume.
        flip_probability: probability of a flip along each axis, in training.

    Raises:
        UserError: the crop is larger than the volumes.
    """

    def __init__(
        self,
        store: VolumeStore,
        split: str,
        modalities: tuple[str, ...],
        crop: Shape | None = None,
        flip_probability: float = 0.0,
    ) -> None:
        self._store = store
        self._crop = checked_crop(crop, store.preprocess.spatial_shape)
        self._flip_probability = flip_probability if split == "train" else 0.0
        self._volumes = [
            (subject.subject_id, modality)
            for subject in store.subjects(split)
            for modality in modalities
            if modality in subject.modalities
        ]

    def __len__(self) -> int:
        return len(self._volumes)

    def sample(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """Return one volume, cropped and flipped at random."""
        subject_id, modality = self._volumes[index]
        volume = torch.from_numpy(self._store.volume(subject_id, modality))[None]
        (volume,) = crop_and_flip([volume], self._crop, self._flip_probability, generator)
        return {"volume": volume, "subject_id": subject_id, "modality": modality}


class LatentPairs:
    """Pairs of latents of one subject, source = target included: one pair per subject and epoch.

    A sample is {z_source, z_target: (C, x, y, z) standardised, source, target: ids, subject_id, flip}. Where the
    store of latents holds flipped variants, one is drawn, the same for source and target.

    Args:
        latents: encoded volumes.
        split: train, validation or test.
        modalities: those of the model; ids count through them.
        same_modality_fraction: share of training pairs with source = target; None draws both ends evenly. Pairs of the
            other splits are of two different modalities: the diagonal, near perfect, would drown them in any mean.
    """

    def __init__(
        self,
        latents: "LatentStore",
        split: str,
        modalities: tuple[str, ...],
        same_modality_fraction: float | None = None,
    ) -> None:
        self._latents = latents
        self._modalities = modalities
        self._fraction = same_modality_fraction if split == "train" else 0.0
        self._flips = latents.num_flips if split == "train" else 1
        self._subjects = _with_modalities(latents, split, modalities)

    def __len__(self) -> int:
        return len(self._subjects)

    def sample(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """Return one random pair of a subject's latents."""
        subject_id, own = self._subjects[index]
        source, target = draw_pair(own, self._fraction, generator)
        flip = int(torch.randint(self._flips, (), generator=generator))
        return {
            "z_source": torch.from_numpy(self._latents.latent(subject_id, source, flip)),
            "z_target": torch.from_numpy(self._latents.latent(subject_id, target, flip)),
            "source": modality_index(source, self._modalities),
            "target": modality_index(target, self._modalities),
            "subject_id": subject_id,
            "flip": flip,
        }


class VolumePairs:
    """Pairs of volumes of one subject, source = target included: one pair per subject and epoch.

    A sample is {source_volume, target_volume: (1, X, Y, Z) in [-1, 1], source, target: ids, subject_id}; both volumes
    are cropped and flipped alike.

    Args:
        store: prepared volumes.
        split: train, validation or test.
        modalities: those of the model; ids count through them.
        crop: voxels of a random crop; None takes the whole volume.
        flip_probability: probability of a flip along each axis, in training.
        same_modality_fraction: share of training pairs with source = target; None draws both ends evenly. Pairs of the
            other splits are of two different modalities: the diagonal, near perfect, would drown them in any mean.

    Raises:
        UserError: the crop is larger than the volumes.
    """

    def __init__(
        self,
        store: VolumeStore,
        split: str,
        modalities: tuple[str, ...],
        crop: Shape | None = None,
        flip_probability: float = 0.0,
        same_modality_fraction: float | None = None,
    ) -> None:
        self._store = store
        self._modalities = modalities
        self._crop = checked_crop(crop, store.preprocess.spatial_shape)
        self._flip_probability = flip_probability if split == "train" else 0.0
        self._fraction = same_modality_fraction if split == "train" else 0.0
        self._subjects = _with_modalities(store, split, modalities)

    def __len__(self) -> int:
        return len(self._subjects)

    def sample(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """Return one random pair of a subject's volumes."""
        subject_id, own = self._subjects[index]
        source, target = draw_pair(own, self._fraction, generator)
        volumes = [torch.from_numpy(self._store.volume(subject_id, modality))[None] for modality in (source, target)]
        volumes = crop_and_flip(volumes, self._crop, self._flip_probability, generator)
        return {
            "source_volume": volumes[0],
            "target_volume": volumes[1],
            "source": modality_index(source, self._modalities),
            "target": modality_index(target, self._modalities),
            "subject_id": subject_id,
        }


def draw_pair(
    modalities: tuple[str, ...], same_modality_fraction: float | None, generator: torch.Generator
) -> tuple[str, str]:
    """Draw (source, target) from a subject's modalities.

    With a fraction, source = target in that share of the draws and a pair of two different ones in the others; without,
    both are drawn evenly. A subject with one modality always gives the pair of it with itself.
    """
    number = len(modalities)
    source, other = torch.randint(number, (2,), generator=generator).tolist()
    if same_modality_fraction is None:
        return modalities[source], modalities[other]
    same = float(torch.rand((), generator=generator)) < same_modality_fraction
    if same or number == 1:
        return modalities[source], modalities[source]
    step = 1 + int(torch.randint(number - 1, (), generator=generator))
    return modalities[source], modalities[(source + step) % number]


def crop_and_flip(
    volumes: list[Tensor], crop: Shape | None, flip_probability: float, generator: torch.Generator
) -> list[Tensor]:
    """Cut the same random box out of each (C, X, Y, Z) and flip it along the same random axes."""
    if crop is not None:
        room = [side - wanted for side, wanted in zip(volumes[0].shape[1:], crop, strict=True)]
        start = [int(torch.randint(space + 1, (), generator=generator)) for space in room]
        box = (slice(None), *(slice(first, first + side) for first, side in zip(start, crop, strict=True)))
        volumes = [volume[box] for volume in volumes]
    flips = torch.rand(3, generator=generator) < flip_probability
    axes = [axis + 1 for axis in range(3) if flips[axis]]
    return [volume.flip(axes) if axes else volume.contiguous() for volume in volumes]


def checked_crop(crop: Shape | None, spatial_shape: Shape) -> Shape | None:
    """Return the crop, None where it is the whole volume.

    Raises:
        UserError: it is larger than the volume along an axis.
    """
    if crop is not None and any(side > whole for side, whole in zip(crop, spatial_shape, strict=True)):
        raise UserError(
            f"the crop of {' x '.join(map(str, crop))} voxels does not fit into the store's volumes of "
            f"{' x '.join(map(str, spatial_shape))}: give a smaller --crop, or --crop full"
        )
    return None if crop == spatial_shape else crop


def _with_modalities(
    store: "VolumeStore | LatentStore", split: str, modalities: tuple[str, ...]
) -> list[tuple[str, tuple[str, ...]]]:
    """Return the subjects of a split that have any of the modalities, with those they have."""
    own = [
        (subject.subject_id, tuple(name for name in modalities if name in subject.modalities))
        for subject in store.subjects(split)
    ]
    return [(subject_id, names) for subject_id, names in own if names]
