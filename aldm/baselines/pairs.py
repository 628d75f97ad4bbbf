"""What the trainings of the comparison methods share: one pair of modalities, slices or volumes, and how it is scored.

Tensors are B 1 X Y axial slices or B 1 X Y Z volumes, RAS+, in [-1, 1] with a background of -1.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from aldm.baselines.networks import BACKGROUND
from aldm.config import Config, training_of
from aldm.config_baselines import VOLUME_METHODS
from aldm.data.dataset import SlicePairs, VolumePairs, checked_crop
from aldm.data.store import VolumeStore
from aldm.errors import UserError
from aldm.latents import data_record
from aldm.players import Batch, Engine, Export, Player, StepInfo, Values
from aldm.stage_data import panel, psnr_from_squared_error, with_data

SLICES_AT_ONCE = 32
"""Slices of a volume that go through a 2D network together."""


class PairStage:
    """A training for one ordered pair; a method adds its players and how it translates.

    Args:
        config: `pair`, and of `baselines` the method's own section.
        store: prepared volumes.
        name: the method.

    Raises:
        UserError: no pair, one that the data lack, or a crop that does not fit the volumes.
    """

    spatial_dims: int
    paired = True
    """Whether source and target of a training sample are of one subject."""
    score = "psnr_db"
    higher_is_better = True
    model_data: Mapping[str, Any] | None = None
    """What the model that it starts from keeps of its data, for modalities that the store lacks."""

    def __init__(self, config: Config, store: VolumeStore, name: str) -> None:
        self.name = name
        self.config = with_data(config, store.modalities, asdict(store.preprocess))
        if self.config.pair is None:
            raise UserError(f"{name} is trained for one pair of modalities: give `source` and `target`")
        self.pair = self.config.pair
        self.training = training_of(config, name)
        self._store = store
        self.epoch_length = 1
        checked_crop(self.training.crop, store.preprocess.spatial_shape)
        self.players = self.build()

    def build(self) -> list[Player]:
        """Build the networks; return the players in the order in which a step runs them."""
        raise NotImplementedError

    def translate(self, modules: Mapping[str, nn.Module], x: Tensor) -> Tensor:
        """Return the target of slices or volumes; `modules` by player."""
        raise NotImplementedError

    def connect(self, engine: Engine) -> None:
        """Nothing is frozen here."""

    def samples(self, split: str) -> SlicePairs | VolumePairs:
        """Slices of 2D methods, volumes of 3D ones; whole volumes of both where they are validated."""
        training = self.training
        if split == "train" and self.spatial_dims == 2:
            shape = slice_shape(self.config)
            slices = SlicePairs(self._store, self.pair, shape, training.flip_probability, self.paired)
            self.epoch_length = len(slices)
            return slices
        crop = training.crop if split == "train" else None
        volumes = VolumePairs(
            self._store,
            split,
            self.config.modalities,
            crop,
            training.flip_probability,
            pair=self.pair,
            paired=self.paired,
        )
        if split == "train":
            self.epoch_length = len(volumes)
        return volumes

    def validate(self, modules: Mapping[str, nn.Module], batch: Batch, info: StepInfo) -> Values:
        """PSNR, dB, of the whole predicted volume."""
        x, target = batch["source_volume"], batch["target_volume"]
        result = on_volume(lambda part: self.translate(modules, part), x, self.spatial_dims, slice_shape(self.config))
        info.shared["panel"] = panel(source=x, prediction=result, target=target)
        return {"psnr_db": psnr_from_squared_error((result.float() - target).square())}

    def export(self, weights: Mapping[str, Mapping[str, Tensor]]) -> Export:
        """What translates."""
        names = self.config.modalities
        meta = {"modalities": list(names), "data": data_record(self._store, names, self.model_data)}
        return Export(self.name, self.config, self.exported(weights), meta)

    def exported(self, weights: Mapping[str, Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """Return the weights of the network that translates: the generator's, where it does so alone."""
        return weights["generator"]


def slice_shape(config: Config) -> tuple[int, int]:
    """Return the voxels X, Y of the slices that 2D methods see.

    Raises:
        UserError: smaller than the model's grid.
    """
    x, y, _ = config.preprocess.spatial_shape
    wanted = config.baselines.slice_shape or (x, y)
    if wanted[0] < x or wanted[1] < y:
        raise UserError(
            f"baselines.slice_shape is {wanted[0]} x {wanted[1]}, smaller than the model's grid of {x} x {y}: results "
            "would lack its border; make it as large"
        )
    return wanted


def image_shape(config: Config, name: str, spatial_dims: int) -> tuple[int, ...]:
    """Return the sides of the slices or volumes that a method is trained on."""
    if spatial_dims == 2:
        return slice_shape(config)
    return training_of(config, name).crop or config.preprocess.spatial_shape


def ends(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return source and target of a batch."""
    return batch["source_volume"], batch["target_volume"]


def restart_layers() -> None:
    """Let dropout draw what it drew at the step's beginning: every player then meets the same generated image."""
    torch.manual_seed(torch.initial_seed())


def on_volume(network: Callable[[Tensor], Tensor], x: Tensor, spatial_dims: int, plane: tuple[int, int]) -> Tensor:
    """Run a 3D network on volumes, or a 2D one on their axial slices, which are stacked again.

    Args:
        network: maps (B, 1, X, Y[, Z]) to the same shape.
        x: (B, 1, X, Y, Z).
        spatial_dims: of the network.
        plane: voxels of the slices; the volume lies in their middle, with background around it.
    """
    if spatial_dims == 3:
        return network(x)
    number, _, *box = x.shape
    left = [(whole - side) // 2 for whole, side in zip(plane, box[:2], strict=True)]
    right = [whole - side - before for whole, side, before in zip(plane, box[:2], left, strict=True)]
    slices = x.permute(0, 4, 1, 2, 3).reshape(number * box[2], 1, box[0], box[1])
    slices = nn.functional.pad(slices, (left[1], right[1], left[0], right[0]), value=BACKGROUND)
    result = torch.cat([network(part) for part in slices.split(SLICES_AT_ONCE)])
    result = result[:, :, left[0] : left[0] + box[0], left[1] : left[1] + box[1]]
    return result.reshape(number, box[2], 1, box[0], box[1]).permute(0, 2, 3, 4, 1).contiguous()


def spatial_dims_of(name: str) -> int:
    """Return 3 for the 3D methods, 2 for the others."""
    return 3 if name in VOLUME_METHODS else 2
