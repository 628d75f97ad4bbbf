"""The trained model that a training starts from, to fine-tune it: what has to agree with it, and its weights.

A model is a translator folder, the word `default` for the one that ships, or the run folder of a training of the same
network. Discriminators are in none of these: they start from scratch.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from aldm.checkpoint import (
    Checkpoint,
    config_of,
    copy_weights,
    load_checkpoint,
    read_checkpoint_record,
)
from aldm.config import Config, PreprocessConfig, TrainingConfig, from_dict, training_of, with_training
from aldm.data.store import VolumeStore
from aldm.default_model import default_model
from aldm.errors import UserError
from aldm.latents import LatentStore, ModelLatents, check_statistics
from aldm.players import Stage
from aldm.run_folder import checkpoint_folder

DEFAULT = "default"
"""The word for the model that ships with the package."""
PARTS = {"vqgan": "codec", "ms-spade": "ms_spade", "diffusion": "unet", "unet": "unet"}
"""Training -> what the weights of its network are called in a translator folder; a comparison method's: network."""
SHORTER, SLOWER = 5, 2
"""Fine-tuning takes the model's own steps or epochs by this, and its learning rate by this: see docs/fine_tuning.md."""
VALIDATIONS = 12
"""Of a fine-tuning whose length is known in steps."""
_LATENTS = {"latents.codec_hash": str, "latents.mean": list, "latents.std": list}


def model_folder(word: str) -> Path:
    """Return the folder of a model: the built-in one's for `default`, a run's checkpoint, or the folder itself.

    Raises:
        UserError: it holds no checkpoint.
    """
    return default_model() if word == DEFAULT else checkpoint_folder(word)


def model_name(word: str) -> str:
    """Return how a model is called in records: `default`, or the name of its folder."""
    return DEFAULT if word == DEFAULT else Path(word).resolve().name


def part_of(weights: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """Return the weights of a part of a translator folder by their own names; all of a run, which has one network."""
    begin = f"{part}."
    own = {name.removeprefix(begin): tensor for name, tensor in weights.items() if name.startswith(begin)}
    return own or dict(weights)


def fine_tuning_config(stage: str, word: str) -> Config:
    """Return the configuration that fine-tunes a model: the model's own, a shorter training with a lower rate.

    A model that was fine-tuned itself is trained as it was.

    Args:
        stage: what is trained.
        word: the model.

    Raises:
        UserError: no such model, or one that has no network of this stage.
    """
    folder = model_folder(word)
    record = read_checkpoint_record(folder)
    _check_kind(record["kind"], stage, folder)
    config = config_of(record, folder)
    if not config.init_from:
        config = with_training(config, stage, **_gentler(training_of(config, stage)))
    return replace(config, init_from=f"{model_name(word)}@{record['hash'][:12]}")


def _gentler(training: TrainingConfig) -> dict[str, Any]:
    """Return what is changed of the training that a model was made by."""
    changes: dict[str, Any] = {
        "learning_rate": training.learning_rate / SLOWER,
        "epochs": max(1, training.epochs // SHORTER),
        "max_minutes": None,
    }
    if training.max_steps is not None:
        steps = max(1, training.max_steps // SHORTER)
        start = min(training.adversarial_start_step, steps // 2)
        changes |= {"max_steps": steps, "validate_every": max(1, steps // VALIDATIONS), "adversarial_start_step": start}
    return changes


@dataclass(frozen=True)
class StartingModel:
    """A model, read."""

    checkpoint: Checkpoint

    @classmethod
    def open(cls, folder: Path, stage: str) -> "StartingModel":
        """Read the model that a training of this stage is to start from.

        Raises:
            UserError: no such model, or one that has no network of this stage.
        """
        checkpoint = load_checkpoint(folder)
        _check_kind(checkpoint.kind, stage, folder)
        return cls(checkpoint)

    @property
    def config(self) -> Config:
        """The model's configuration."""
        return self.checkpoint.config

    @property
    def data(self) -> Mapping[str, Any]:
        """What the model keeps of the data that it was trained on."""
        self.checkpoint.check_meta({"data" if "data" in self.checkpoint.meta else "latents.data": dict})
        found: Mapping[str, Any] = self.checkpoint.meta.get("data") or self.checkpoint.meta["latents"]["data"]
        return found

    def check_store(self, store: VolumeStore) -> None:
        """Refuse volumes that the model cannot learn from.

        Raises:
            UserError: they were prepared otherwise than the model's, or have none of its modalities.
        """
        self._check_data(store.preprocess, store.modalities, store.path)

    def check_latents(self, latents: LatentStore) -> None:
        """Refuse latents that are not the model's: of another codec, or standardised with other numbers.

        Raises:
            UserError: they are, or their volumes are refused by `check_store`.
        """
        preprocess = from_dict(PreprocessConfig, latents.data["preprocess"], "preprocess.")
        self._check_data(preprocess, latents.modalities, latents.path)
        own = self.latents()
        self._check_codec(latents.codec_hash, latents.path)
        if (own.mean, own.std) != (latents.mean.tolist(), latents.std.tolist()):
            raise UserError(
                f"{latents.path} is standardised with its own mean and standard deviation, {self.checkpoint.path} has "
                f"learnt from latents with other ones: encode the store again with `like` {self.checkpoint.path}"
            )

    def latents(self) -> ModelLatents:
        """Return what new latents take over from the model.

        Raises:
            UserError: the model has no latents, or its record of them is damaged.
        """
        path = self.checkpoint.path
        if "latents" not in self.checkpoint.meta:
            kind = self.checkpoint.kind
            raise UserError(f"{path} is a model of kind {kind}, which knows no latents: give one of kind aldm")
        self.checkpoint.check_meta(_LATENTS)
        found = self.checkpoint.meta["latents"]
        check_statistics(found, len(found["mean"]), path, "export the model again")
        mean, std = (_float32(found[name]) for name in ("mean", "std"))
        return ModelLatents(mean, std, self.config.modalities, self.data)

    def check_encoding(self, store: VolumeStore, codec_hash: str) -> None:
        """Refuse a store or a codec whose latents cannot be the model's.

        Raises:
            UserError: as `check_store`, or another codec than the model's.
        """
        self.check_store(store)
        self.checkpoint.check_meta(_LATENTS)
        self._check_codec(codec_hash, store.path)

    def start(self, stage: Stage) -> None:
        """Give a stage's network the model's weights; what the model does not hold, such as discriminators, is kept.

        Raises:
            UserError: the weights are of another network.
        """
        if hasattr(stage, "model_data"):
            stage.model_data = self.data
        own = stage.export({player.name: player.module.state_dict() for player in stage.players}).weights
        part = PARTS.get(stage.name, "network")
        copy_weights(own, part_of(self.checkpoint.weights, part), self.checkpoint.path, f"network of {stage.name}")

    def _check_codec(self, codec_hash: str, path: Path) -> None:
        wanted = self.checkpoint.meta["latents"]["codec_hash"]
        if wanted != codec_hash:
            raise UserError(
                f"the latents of {path} are of codec {codec_hash[:12]}, {self.checkpoint.path} has learnt from those "
                f"of {wanted[:12]}: encode the store again with `like` {self.checkpoint.path}"
            )

    def _check_data(self, preprocess: PreprocessConfig, modalities: tuple[str, ...], path: Path) -> None:
        wanted, got = asdict(self.config.preprocess), asdict(preprocess)
        different = {key: value for key, value in wanted.items() if got[key] != value}
        if different:
            settings = ", ".join(f"`preprocess.{key}={_setting(value)}`" for key, value in different.items())
            raise UserError(
                f"{path} was prepared with {', '.join(f'{key} {got[key]}' for key in different)}, the model "
                f"{self.checkpoint.path} with other values: prepare the data again with {settings}"
            )
        if not set(modalities) & set(self.config.modalities):
            raise UserError(
                f"{path} has {', '.join(modalities)}, the model {self.checkpoint.path} knows "
                f"{', '.join(self.config.modalities)}: they share nothing to learn from; give another model"
            )


def _check_kind(kind: str, stage: str, folder: Path) -> None:
    wanted = ("codec" if stage == "vqgan" else stage, *(("aldm",) if PARTS.get(stage) and stage != "unet" else ()))
    if kind not in wanted:
        raise UserError(
            f"{folder} is a model of kind {kind}, which has no network for aldm train {stage}: give one of kind "
            f"{' or '.join(wanted)}"
        )


def _float32(values: list[float]) -> list[float]:
    """Return numbers as a store of latents reads them."""
    found: list[float] = np.asarray(values, np.float32).tolist()
    return found


def _setting(value: Any) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
