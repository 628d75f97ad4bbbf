"""The training of the fixed segmenter on real volumes. Volumes are B M X Y Z in [-1, 1], label maps B X Y Z."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aldm.checkpoint import load_checkpoint, load_weights
from aldm.config import Config
from aldm.data.dataset import checked_crop
from aldm.data.labels import LabelledSubjects
from aldm.data.store import VolumeStore
from aldm.errors import UserError
from aldm.latents import data_record
from aldm.models.segmenter import Segmenter
from aldm.players import Batch, Engine, Export, Player, StepInfo, Values
from aldm.precision import usable_precision
from aldm.run_folder import checkpoint_folder
from aldm.stage_data import with_data

KIND = "segmenter"


class SegmenterStage:
    """A network per modality: volume in, label of every voxel out.

    Loss: cross-entropy over all voxels plus 1 - soft Dice, the mean over structures (Milletari et al. 2016, eq. 3, with
    probabilities in place of their squares in the denominator), the mean over the volumes that a subject has.

    Args:
        config: segmenter and train_segmenter.
        store: prepared volumes.
        structures: what the store's files mark off.

    Raises:
        UserError: the crop does not fit the volumes.
    """

    name = KIND
    score = "dice"
    higher_is_better = True

    def __init__(self, config: Config, store: VolumeStore, structures: tuple[str, ...]) -> None:
        self.config = with_data(config, store.modalities, asdict(store.preprocess))
        self._store, self._training, self._structures = store, config.train_segmenter, structures
        checked_crop(self._training.crop, store.preprocess.spatial_shape)
        self.segmenter = _build(self.config, structures)
        self.players = [Player(KIND, self.segmenter, self._training, self._loss)]

    def connect(self, engine: Engine) -> None:
        """Nothing is frozen here."""

    def samples(self, split: str) -> LabelledSubjects:
        """Subjects with their label maps, cropped and flipped; whole where they are validated."""
        training = self._training
        crop = training.crop if split == "train" else None
        names = self.config.modalities
        return LabelledSubjects(self._store, split, names, self._structures, crop, training.flip_probability)

    def _loss(self, model: nn.Module, batch: Batch, info: StepInfo) -> tuple[Tensor, Values]:
        logits, labels, has = model(batch["volumes"]).float(), batch["labels"].long(), batch["has"]
        number = has.shape[1]
        wanted = labels[:, None].expand(-1, number, -1, -1, -1).flatten(0, 1)
        each = segmentation_loss(logits.flatten(0, 1), wanted)
        loss = (each * has.flatten()).sum() / has.sum()
        return loss, {}

    def validate(self, modules: Mapping[str, nn.Module], batch: Batch, info: StepInfo) -> Values:
        """Dice of every structure, the mean over the subject's volumes, and the mean of these."""
        logits, has = modules[KIND](batch["volumes"]).float(), batch["has"].flatten() > 0
        found = logits.flatten(0, 1).argmax(dim=1)[has]
        labels = batch["labels"][:, None].expand(-1, logits.shape[1], -1, -1, -1).flatten(0, 1)[has]
        info.shared["panel"] = {
            "volume": batch["volumes"][0, 0].float(),
            "found": found[0].float(),
            "true": labels[0].float(),
        }
        dice = {}
        for place, name in enumerate(self._structures, start=1):
            one, other = (found == place).flatten(1), (labels == place).flatten(1)
            total = one.sum(dim=1) + other.sum(dim=1)
            both = 2 * (one & other).sum(dim=1)
            dice[f"dice_{name}"] = torch.where(total > 0, both / total.clamp_min(1), 1.0).mean()
        return {"dice": torch.stack(list(dice.values())).mean(), **dice}

    def export(self, weights: Mapping[str, Mapping[str, Tensor]]) -> Export:
        """The networks, and what they find."""
        meta = {
            "modalities": list(self.config.modalities),
            "structures": list(self._structures),
            "data": data_record(self._store, self.config.modalities),
        }
        return Export(KIND, self.config, weights[KIND], meta)


def segmentation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return cross-entropy plus 1 - soft Dice of each sample, (B,).

    Args:
        logits: (B, K, X, Y, Z).
        labels: (B, X, Y, Z) int64 in [0, K).
    """
    entropy = F.cross_entropy(logits, labels, reduction="none").mean(dim=(1, 2, 3))
    axes = (2, 3, 4)
    p = logits.softmax(dim=1)[:, 1:]
    true = labels[:, None] == torch.arange(1, logits.shape[1], device=labels.device).view(1, -1, 1, 1, 1)
    dice = (2 * (p * true).sum(axes) + 1) / (p.sum(axes) + true.sum(axes) + 1)  # 1 voxel: nothing found of nothing is 1
    return entropy + 1 - dice.mean(dim=1)


def load_segmenter(folder: str | Path, store: VolumeStore) -> tuple[Segmenter, str]:
    """Return the segmenter of a run or checkpoint folder, and the hash of its weights.

    Raises:
        UserError: no segmenter, or one that was trained with another preprocessing than the store's, or on none of its
            modalities.
    """
    checkpoint = load_checkpoint(checkpoint_folder(folder), KIND)
    checkpoint.check_meta({"structures": list})
    config = checkpoint.config
    if config.preprocess != store.preprocess:
        raise UserError(
            f"the segmenter {folder} was trained with {config.preprocess}, the store {store.path} was prepared with "
            f"{store.preprocess}: train it on a store like this one"
        )
    lacking = [name for name in store.modalities if name not in config.modalities]
    if lacking:
        raise UserError(
            f"the segmenter {folder} knows {', '.join(config.modalities)}, the store {store.path} has "
            f"{', '.join(lacking)} too: train it with aldm train segmenter on this store"
        )
    segmenter = _build(config, tuple(checkpoint.meta["structures"]))
    load_weights(segmenter, checkpoint.weights, checkpoint.path)
    segmenter.precision = usable_precision(config.precision, "cpu")
    return segmenter.eval(), checkpoint.hash


def _build(config: Config, structures: tuple[str, ...]) -> Segmenter:
    recompute = config.activation_checkpointing
    return Segmenter(config.modalities, structures, **asdict(config.segmenter), activation_checkpointing=recompute)
