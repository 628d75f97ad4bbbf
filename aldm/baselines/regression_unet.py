"""The regression U-Net on Haar bands that stands beside every model. Volumes are B 1 X Y Z in [-1, 1]."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from aldm.config import Config
from aldm.data.dataset import VolumePairs, checked_crop
from aldm.data.store import VolumeStore
from aldm.denoising import build_regression_unet
from aldm.latents import data_record
from aldm.losses import weighted_l1, weighted_mse
from aldm.players import Batch, Engine, Export, Player, StepInfo, Values
from aldm.stage_data import panel, psnr_from_squared_error, with_data

SQUARES = 4.0
"""Weight of the squared error beside the absolute one: where a voxel is off by 1/8 both pull at it alike."""


class RegressionStage:
    """The regression U-Net: source volume and ids of source and target in, target volume out.

    Loss: SQUARES times the mean squared error plus the mean absolute error, over all voxels. Source and target differ,
    every ordered pair of a subject's modalities being as likely; with `pair` there is one.

    Args:
        config: haar_unet and train_unet.
        store: prepared volumes.

    Raises:
        UserError: the crop does not fit the volumes.
    """

    name = "unet"
    score = "psnr_db"
    higher_is_better = True
    model_data: Mapping[str, Any] | None = None
    """What the model that it starts from keeps of its data, for modalities that the store lacks."""

    def __init__(self, config: Config, store: VolumeStore) -> None:
        self.config = with_data(config, store.modalities, asdict(store.preprocess))
        self._store, self._training = store, config.train_unet
        checked_crop(self._training.crop, store.preprocess.spatial_shape)
        self.unet = build_regression_unet(self.config)
        self.players = [Player("unet", self.unet, self._training, self._loss)]

    def connect(self, engine: Engine) -> None:
        """Nothing is frozen here."""

    def samples(self, split: str) -> VolumePairs:
        """Pairs of volumes, cropped and flipped; whole ones where they are validated, as the other methods' are."""
        return VolumePairs(
            self._store,
            split,
            self.config.modalities,
            self._training.crop if split == "train" else None,
            self._training.flip_probability,
            self.config.pair,
        )

    def _loss(self, model: nn.Module, batch: Batch, info: StepInfo) -> tuple[Tensor, Values]:
        output, target = model(batch["source_volume"], batch["source"], batch["target"]), batch["target_volume"]
        squares = weighted_mse(output, target)
        return SQUARES * squares + weighted_l1(output, target), {"mse": squares.detach()}

    def validate(self, modules: Mapping[str, nn.Module], batch: Batch, info: StepInfo) -> Values:
        """PSNR, dB, of the predicted volume."""
        output = modules["unet"](batch["source_volume"], batch["source"], batch["target"])
        info.shared["panel"] = panel(source=batch["source_volume"], prediction=output, target=batch["target_volume"])
        return {"psnr_db": psnr_from_squared_error((output.float() - batch["target_volume"]).square())}

    def export(self, weights: Mapping[str, Mapping[str, Tensor]]) -> Export:
        """The U-Net."""
        names = self.config.modalities
        meta = {"modalities": list(names), "data": data_record(self._store, names, self.model_data)}
        return Export("unet", self.config, weights["unet"], meta)
