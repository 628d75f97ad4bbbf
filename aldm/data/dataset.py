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

Pair = tuple[str, str]
EMPTY = -0.999
"""A slice whose largest intensity is not above this shows nothing."""
_TRIES = 8


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
        pair: (source, target), where only these are to be seen; None draws from all pairs.

    Raises:
        UserError: no subject of the training split has both ends of the pair.
    """

    def __init__(
        self,
        latents: "LatentStore",
        split: str,
        modalities: tuple[str, ...],
        same_modality_fraction: float | None = None,
        pair: Pair | None = None,
    ) -> None:
        self._latents = latents
        self._modalities = modalities
        self._fraction = same_modality_fraction if split == "train" else 0.0
        self._flips = latents.num_flips if split == "train" else 1
        self._pair = pair
        self._subjects = _with_modalities(latents, split, modalities, pair)

    def __len__(self) -> int:
        return len(self._subjects)

    def sample(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """Return one random pair of a subject's latents."""
        subject_id, own = self._subjects[index]
        source, target = self._pair or draw_pair(own, self._fraction, generator)
        flip = int(torch.randint(self._flips, (), generator=generator))
        return {
            "z_source": torch.from_numpy(self._latents.latent(subject_id, source, flip)),
            "z_target": torch.from_numpy(self._latents.latent(subject_id, target, flip)),
            "source": modality_index(source, self._modalities),
            "target": modality_index(target, self._modalities),
            "subject_id": subject_id,
            "flip": flip,
        }


class LatentTargets:
    """A source latent and those of all other modalities of the subject: one source per subject and epoch.

    A sample is {z_source: (C, x, y, z), z_targets: (M C, x, y, z) standardised, modality by modality, 0 where there is
    none, wanted: (M,) 1 for each modality that the subject has, but the source, else 0, source: id, subject_id, flip}.

    Args:
        latents, split, modalities: see LatentPairs.
        pair: (source, target), where only these are to be seen; None draws the source from all that a subject has.

    Raises:
        UserError: no subject of the training split has both ends of the pair.
    """

    def __init__(
        self, latents: "LatentStore", split: str, modalities: tuple[str, ...], pair: Pair | None = None
    ) -> None:
        self._latents = latents
        self._modalities = modalities
        self._pair = pair
        subjects = _with_modalities(latents, split, modalities, pair)
        self._subjects = [(subject_id, own) for subject_id, own in subjects if len(own) > 1]

    def __len__(self) -> int:
        return len(self._subjects)

    def sample(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """Return a subject's latents, a random one of them the source."""
        subject_id, own = self._subjects[index]
        source = self._pair[0] if self._pair else own[int(torch.randint(len(own), (), generator=generator))]
        flip = int(torch.randint(self._latents.num_flips, (), generator=generator))
        z_source = torch.from_numpy(self._latents.latent(subject_id, source, flip))
        targets = self._pair[1:] if self._pair else [name for name in own if name != source]
        z_targets = torch.zeros(len(self._modalities), *z_source.shape)
        wanted = torch.zeros(len(self._modalities))
        for target in targets:
            place = modality_index(target, self._modalities)
            z_targets[place] = torch.from_numpy(self._latents.latent(subject_id, target, flip))
            wanted[place] = 1
        return {
            "z_source": z_source,
            "z_targets": z_targets.flatten(0, 1),
            "wanted": wanted,
            "source": modality_index(source, self._modalities),
            "subject_id": subject_id,
            "flip": flip,
        }


class LatentSubsets:
    """All latents of a subject, a random part of them the sources: one draw per subject and epoch.

    Half of the draws have one source; the others two or more, each number being as likely, and at least one modality is
    left to be predicted. A sample is {z: (M C, x, y, z) standardised, modality by modality, 0 where there is none,
    given, wanted: (M,) 1 for the sources, and for the subject's other modalities, else 0, sources: ids, ascending,
    subject_id, flip}.

    Args:
        latents, split, modalities: see LatentPairs.

    Raises:
        UserError: no subject of the training split has two of the modalities.
    """

    def __init__(self, latents: "LatentStore", split: str, modalities: tuple[str, ...]) -> None:
        self._latents = latents
        self._modalities = modalities
        subjects = _with_modalities(latents, split, modalities)
        self._subjects = [(subject_id, own) for subject_id, own in subjects if len(own) > 1]
        if not self._subjects:
            raise UserError(
                f"no subject of the {split} split has two of {', '.join(modalities)}: nothing to learn from"
            )

    def __len__(self) -> int:
        return len(self._subjects)

    def sample(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """Return a subject's latents, a random part of them the sources."""
        subject_id, own = self._subjects[index]
        number = 1
        if len(own) > 2 and torch.rand((), generator=generator) < 0.5:
            number = int(torch.randint(2, len(own), (), generator=generator))
        chosen = [own[i] for i in torch.randperm(len(own), generator=generator)[:number].tolist()]
        flip = int(torch.randint(self._latents.num_flips, (), generator=generator))
        places = {name: modality_index(name, self._modalities) for name in own}
        first = torch.from_numpy(self._latents.latent(subject_id, own[0], flip))
        z, given, wanted = (torch.zeros(len(self._modalities), *shape) for shape in (first.shape, (), ()))
        for name, place in places.items():
            z[place] = torch.from_numpy(self._latents.latent(subject_id, name, flip))
            (given if name in chosen else wanted)[place] = 1
        return {
            "z": z.flatten(0, 1),
            "given": given,
            "wanted": wanted,
            "sources": sorted(places[name] for name in chosen),
            "subject_id": subject_id,
            "flip": flip,
        }


class VolumePairs:
    """Pairs of different volumes of one subject: one pair per subject and epoch, every ordered pair being as likely.

    A sample is {source_volume, target_volume: (1, X, Y, Z) in [-1, 1], source, target: ids, subject_id}; both volumes
    are cropped and flipped alike. A subject with one modality gives the pair of it with itself.

    Args:
        store: prepared volumes.
        split: train, validation or test.
        modalities: those of the model; ids count through them.
        crop: voxels of a random crop; None takes the whole volume.
        flip_probability: probability of a flip along each axis, in training.
        pair: (source, target), where only these are to be seen; None draws from all pairs.
        paired: False takes the target of a training sample from any subject, cropped and flipped by itself: for methods
            that learn from unpaired data.

    Raises:
        UserError: the crop is larger than the volumes, or no subject of the training split has what the pair needs.
    """

    def __init__(
        self,
        store: VolumeStore,
        split: str,
        modalities: tuple[str, ...],
        crop: Shape | None = None,
        flip_probability: float = 0.0,
        pair: Pair | None = None,
        paired: bool = True,
    ) -> None:
        self._store = store
        self._modalities = modalities
        self._crop = checked_crop(crop, store.preprocess.spatial_shape)
        self._flip_probability = flip_probability if split == "train" else 0.0
        self._pair = pair
        self._subjects = _with_modalities(store, split, modalities, pair, paired or split != "train")
        self._others = None
        if pair is not None and not paired and split == "train":
            self._others = [subject_id for subject_id, _ in _with_modalities(store, split, pair[1:])]
            if not self._others:
                raise _no_subject(pair[1:], pair)

    def __len__(self) -> int:
        return len(self._subjects)

    def sample(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """Return one random pair of a subject's volumes."""
        subject_id, own = self._subjects[index]
        source, target = self._pair or draw_pair(own, 0.0, generator)
        if self._others is None:
            volumes = crop_and_flip(
                [self._volume(subject_id, name) for name in (source, target)],
                self._crop,
                self._flip_probability,
                generator,
            )
        else:
            other = self._others[int(torch.randint(len(self._others), (), generator=generator))]
            ends = (self._volume(subject_id, source), self._volume(other, target))
            volumes = [crop_and_flip([end], self._crop, self._flip_probability, generator)[0] for end in ends]
        return {
            "source_volume": volumes[0],
            "target_volume": volumes[1],
            "source": modality_index(source, self._modalities),
            "target": modality_index(target, self._modalities),
            "subject_id": subject_id,
        }

    def _volume(self, subject_id: str, modality: str) -> Tensor:
        return torch.from_numpy(self._store.volume(subject_id, modality))[None]


class SlicePairs:
    """Axial slices of a pair's two modalities: every slice of every training subject once an epoch.

    A sample is {source_volume, target_volume: (1, X, Y) in [-1, 1], subject_id}; both are flipped alike. A slice with
    nothing in it is replaced by another of the same subject.

    Args:
        store: prepared volumes; slices are those of the model's box.
        pair: (source, target).
        shape: voxels X, Y; the model's box lies in their middle.
        flip_probability: probability of a flip along each axis.
        paired: False takes the target from any slice of any subject.

    Raises:
        UserError: no training subject has what the pair needs.
    """

    def __init__(
        self,
        store: VolumeStore,
        pair: Pair,
        shape: tuple[int, int],
        flip_probability: float = 0.0,
        paired: bool = True,
    ) -> None:
        self._store, self._pair, self._shape = store, pair, shape
        self._flip_probability = flip_probability
        self._sources = _SliceList(store, pair if paired else pair[:1], pair)
        self._others = None if paired else _SliceList(store, pair[1:], pair)

    def __len__(self) -> int:
        return len(self._sources)

    def sample(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """Return the slices of one place, or a source slice and any target slice."""
        subject_id, place = self._sources[index]
        if self._others is None:
            images = self._images(subject_id, place, self._pair, generator)
            images = crop_and_flip(images, None, self._flip_probability, generator)
        else:
            other, its_place = self._others[int(torch.randint(len(self._others), (), generator=generator))]
            ends = (
                self._images(subject_id, place, self._pair[:1], generator),
                self._images(other, its_place, self._pair[1:], generator),
            )
            images = [crop_and_flip(end, None, self._flip_probability, generator)[0] for end in ends]
        return {"source_volume": images[0], "target_volume": images[1], "subject_id": subject_id}

    def _images(
        self, subject_id: str, place: int, modalities: tuple[str, ...], generator: torch.Generator
    ) -> list[Tensor]:
        """Return one slice of every modality, the first of them not empty if a few tries find such a place."""
        for _ in range(_TRIES):
            first = self._store.axial_slice(subject_id, modalities[0], place, self._shape)
            if first.max() > EMPTY:
                break
            place = int(torch.randint(self._store.preprocess.spatial_shape[2], (), generator=generator))
        rest = [self._store.axial_slice(subject_id, name, place, self._shape) for name in modalities[1:]]
        return [torch.from_numpy(image)[None] for image in (first, *rest)]


class _SliceList:
    """(subject, slice) of all training subjects that have some modalities, by number."""

    def __init__(self, store: VolumeStore, modalities: tuple[str, ...], pair: Pair) -> None:
        self._records = [
            record for record in store.subjects("train") if all(name in record.modalities for name in modalities)
        ]
        if not self._records:
            raise _no_subject(modalities, pair)
        self._height = store.preprocess.spatial_shape[2]

    def __len__(self) -> int:
        return len(self._records) * self._height

    def __getitem__(self, index: int) -> tuple[str, int]:
        number, place = divmod(index, self._height)
        return self._records[number].subject_id, place


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
    """Cut the same random box out of each (C, X, Y, Z) and flip it along the same random axes; (C, X, Y) uncut too."""
    if crop is not None:
        room = [side - wanted for side, wanted in zip(volumes[0].shape[1:], crop, strict=True)]
        start = [int(torch.randint(space + 1, (), generator=generator)) for space in room]
        box = (slice(None), *(slice(first, first + side) for first, side in zip(start, crop, strict=True)))
        volumes = [volume[box] for volume in volumes]
    flips = torch.rand(3, generator=generator) < flip_probability
    axes = [axis + 1 for axis in range(volumes[0].dim() - 1) if flips[axis]]
    return [volume.flip(axes) if axes else volume.contiguous() for volume in volumes]


def checked_crop(crop: Shape | None, spatial_shape: Shape) -> Shape | None:
    """Return the crop, None where it is the whole volume.

    Raises:
        UserError: it is larger than the volume along an axis.
    """
    if crop is not None and any(side > whole for side, whole in zip(crop, spatial_shape, strict=True)):
        raise UserError(
            f"the crop of {' x '.join(map(str, crop))} voxels does not fit into the store's volumes of "
            f"{' x '.join(map(str, spatial_shape))}: give a smaller `crop`, or `crop` full"
        )
    return None if crop == spatial_shape else crop


def _with_modalities(
    store: "VolumeStore | LatentStore",
    split: str,
    modalities: tuple[str, ...],
    pair: Pair | None = None,
    paired: bool = True,
) -> list[tuple[str, tuple[str, ...]]]:
    """Return the subjects of a split with those of the modalities that they have.

    Args:
        store, split: where to look.
        modalities: a subject needs at least one of them.
        pair: those that a subject needs to have: both, or the source where they are not paired.
        paired: whether both ends are of one subject.

    Raises:
        UserError: the training split has no subject with what the pair needs.
    """
    needed: tuple[str, ...] = () if pair is None else pair if paired else pair[:1]
    own = [
        (subject.subject_id, tuple(name for name in modalities if name in subject.modalities))
        for subject in store.subjects(split)
    ]
    found = [(subject_id, names) for subject_id, names in own if names and all(name in names for name in needed)]
    if pair is not None and own and not found and split == "train":
        raise _no_subject(needed, pair)
    return found


def _no_subject(needed: tuple[str, ...], pair: Pair) -> UserError:
    text = f"no training subject has {' and '.join(needed)}, which learning {pair[0]} to {pair[1]} needs"
    if len(needed) == 2:
        text += " (both of one subject): prepare paired data, or train cyclegan or nicegan, which learn from unpaired"
    return UserError(text)
