"""Training samples of a model that is already trained: what it is given of a subject, and what it has to make of that.

Arrays become float32 tensors C X Y Z, intensities in [-1, 1].
"""

from collections.abc import Callable
from typing import Any

import torch

from aldm.data.modalities import modality_index
from aldm.data.store import VolumeStore
from aldm.errors import UserError

MORE_THAN_ONE = 0.5
"""Share of the draws with two sources or more, where a model takes several."""


class VolumeSubsets:
    """A subject's volumes, some of them the sources, one of the others the target: one draw per subject and epoch.

    A sample is {volumes: (M, X, Y, Z), 0 where a subject lacks one, mask: (1, X, Y, Z) bool, the voxels that count,
    lesion: the same of the segmentation, where there is one, given: (M,) 1 for the sources, else 0, target: id,
    subject_id}.

    Args:
        store: prepared volumes.
        split: train, validation or test.
        modalities: those of the model; ids count through them.
        translates: whether the model makes a target of a source.
        several: whether it takes several sources.

    Raises:
        UserError: no subject of the training split has anything that the model translates.
    """

    def __init__(
        self,
        store: VolumeStore,
        split: str,
        modalities: tuple[str, ...],
        translates: Callable[[str, str], bool],
        several: bool,
    ) -> None:
        self._store, self._modalities, self._several = store, modalities, several
        self._subjects = []
        for subject in store.subjects(split):
            own = [name for name in modalities if name in subject.modalities]
            pairs = [(source, target) for source in own for target in own if source != target]
            pairs = [pair for pair in pairs if translates(*pair)]
            if pairs:
                self._subjects.append((subject.subject_id, own, pairs))
        if not self._subjects and split == "train":
            raise UserError(
                f"no subject of the training split of {store.path} has two volumes of which the model makes one from "
                f"the other ({', '.join(modalities)}): prepare some that have"
            )

    def __len__(self) -> int:
        return len(self._subjects)

    def sample(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """Return a subject's volumes and what the model is to make of which."""
        subject_id, own, pairs = self._subjects[index]
        source, target = pairs[int(torch.randint(len(pairs), (), generator=generator))]
        sources = [source]
        others = [name for name in own if name not in (source, target)]
        if self._several and others and torch.rand((), generator=generator) < MORE_THAN_ONE:
            number = int(torch.randint(1, len(others) + 1, (), generator=generator))
            sources += [others[i] for i in torch.randperm(len(others), generator=generator)[:number].tolist()]
        volumes = torch.zeros(len(self._modalities), *self._store.preprocess.spatial_shape)
        given = torch.zeros(len(self._modalities))
        for name in {*sources, target}:
            place = modality_index(name, self._modalities)
            volumes[place] = torch.from_numpy(self._store.volume(subject_id, name))
            given[place] = name in sources
        mask = torch.from_numpy(self._store.mask(subject_id))[None]
        labels = self._store.seg(subject_id)
        return {
            "volumes": volumes,
            "mask": mask,
            "lesion": torch.zeros_like(mask) if labels is None else torch.from_numpy(labels > 0)[None],
            "given": given,
            "target": modality_index(target, self._modalities),
            "subject_id": subject_id,
        }
