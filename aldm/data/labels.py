"""What a segmenter finds in a subject's volumes: the structures that the store's own files mark off, as one label map.

Label 0 is everything else; label i + 1 is structure i. Volumes are X Y Z, the model's box.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from aldm.config import Shape
from aldm.data.dataset import checked_crop, crop_and_flip
from aldm.data.store import SubjectRecord, VolumeStore
from aldm.errors import UserError

TISSUES = ("csf", "grey", "white")
"""As the file of tissues numbers them, from 1 on."""
LESION = "lesion"
"""Whatever the segmentation labels: of a tumour all parts together."""
BACKGROUND = -1.0


def structures_of(store: VolumeStore) -> tuple[str, ...]:
    """Return the structures that the training subjects' files mark off.

    Raises:
        UserError: none.
    """
    records = store.subjects("train")
    found = tuple(name for name in (*TISSUES, LESION) if any(has_structure(record, name) for record in records))
    if not found:
        raise UserError(
            f"no training subject of the store {store.path} has a segmentation: there is nothing to learn to segment; "
            "put files of lesions (..._seg) or tissues (..._tissue) beside the volumes, as in layout brats, or name "
            "them in the columns seg and tissue of layout table, and prepare the store again"
        )
    return found


def has_structure(record: SubjectRecord, structure: str) -> bool:
    """Whether a file of the subject says where a structure is, which may be nowhere."""
    return record.has_seg if structure == LESION else record.has_tissue


def label_map(store: VolumeStore, subject_id: str, structures: Sequence[str]) -> np.ndarray:
    """Return where each structure is, (spatial_shape) uint8: 0, or 1 + its place among `structures`.

    Args:
        store: of the subject.
        subject_id: has a file for each structure.
        structures: of TISSUES and LESION; where two meet the last one counts.
    """
    labels = np.zeros(store.preprocess.spatial_shape, np.uint8)
    seg, tissue = store.seg(subject_id), store.tissue(subject_id)
    for label, name in enumerate(structures, start=1):
        where = seg if name == LESION else tissue
        assert where is not None, "the subject has every structure"
        labels[where > 0 if name == LESION else where == 1 + TISSUES.index(name)] = label
    return labels


class LabelledSubjects:
    """All volumes of a subject with its label map: every subject that has all structures, once an epoch.

    A sample is {volumes: (M, X, Y, Z) in [-1, 1], empty where the subject lacks the modality, has: (M,) 1 or 0,
    labels: (X, Y, Z) uint8, subject_id}; all are cropped and flipped alike.

    Args:
        store: prepared volumes.
        split: train, validation or test.
        modalities: those of the segmenter.
        structures: those that it is to find.
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
        structures: tuple[str, ...],
        crop: Shape | None = None,
        flip_probability: float = 0.0,
    ) -> None:
        self._store, self._modalities, self._structures = store, modalities, structures
        self._crop = checked_crop(crop, store.preprocess.spatial_shape)
        self._flip_probability = flip_probability if split == "train" else 0.0
        self._records = [
            record
            for record in store.subjects(split)
            if all(has_structure(record, name) for name in structures) and set(modalities) & set(record.modalities)
        ]

    def __len__(self) -> int:
        return len(self._records)

    def sample(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """Return one subject, cropped and flipped at random."""
        record = self._records[index]
        volumes = np.full((len(self._modalities), *self._store.preprocess.spatial_shape), BACKGROUND, np.float32)
        has = torch.tensor([float(name in record.modalities) for name in self._modalities])
        for place, name in enumerate(self._modalities):
            if has[place]:
                volumes[place] = self._store.volume(record.subject_id, name)
        labels = label_map(self._store, record.subject_id, self._structures)
        parts = [torch.from_numpy(volumes), torch.from_numpy(labels)[None]]
        whole, own = crop_and_flip(parts, self._crop, self._flip_probability, generator)
        return {"volumes": whole, "has": has, "labels": own[0], "subject_id": record.subject_id}
