"""The kinds of models behind the translator: encode a source once, then predict any target from that.

Tensors are B C X Y Z of RAS+ volumes, intensities in [-1, 1]. Modalities are integer ids in the model's own order.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from aldm.config import Config, SamplingConfig
from aldm.diffusion import make_schedule
from aldm.models.codecs import Codec, build_codec
from aldm.models.ms_spade import MSSpade
from aldm.models.unet import UNet
from aldm.sampling import OnStep, sample


class Predictor(nn.Module):
    """What a kind of model has to do: encode a source once, then predict any target from that."""

    config: Config

    def encode(self, x: Tensor) -> Tensor:
        """Return what `predict` starts from, given a source (1, 1, X, Y, Z) in [-1, 1]."""
        raise NotImplementedError

    def predict(
        self,
        code: Tensor,
        source: int,
        target: int,
        sampling: SamplingConfig,
        generator: torch.Generator,
        on_step: OnStep | None,
    ) -> Tensor:
        """Return one prediction (1, 1, X, Y, Z)."""
        raise NotImplementedError


class LatentDiffusion(Predictor):
    """The paper's pipeline: codec, MS-SPADE to a target-like latent, denoiser, codec."""

    def __init__(self, config: Config, codec: Codec, ms_spade: MSSpade, unet: UNet, mean: Tensor, std: Tensor) -> None:
        """Take the trained parts.

        Args:
            config: the whole configuration.
            codec, ms_spade, unet: the three trainings' results.
            mean, std: (C,) of the raw latents of the training set; MS-SPADE and denoiser see standardised latents.
        """
        super().__init__()
        self.codec, self.ms_spade, self.unet = codec, ms_spade, unet
        # not persistent: the weights are the three networks', the statistics stand in the folder's config.json
        self.register_buffer("latent_mean", mean.float().view(1, -1, 1, 1, 1), persistent=False)
        self.register_buffer("latent_std", std.float().view(1, -1, 1, 1, 1), persistent=False)
        self.latent_mean: Tensor
        self.latent_std: Tensor
        self.config = config
        self.schedule = make_schedule(config.diffusion)

    def encode(self, x: Tensor) -> Tensor:
        """Return the standardised source latent (1, C, x, y, z)."""
        return (self.codec.encode(x).float() - self.latent_mean) / self.latent_std

    def decode(self, z: Tensor) -> Tensor:
        """Return the volume (1, 1, X, Y, Z) of a standardised latent."""
        return self.codec.decode(z.float() * self.latent_std + self.latent_mean)

    def predict(
        self,
        code: Tensor,
        source: int,
        target: int,
        sampling: SamplingConfig,
        generator: torch.Generator,
        on_step: OnStep | None,
    ) -> Tensor:
        """Return one sample of the target, decoded."""
        source_id, target_id = (torch.tensor([index], device=code.device) for index in (source, target))
        with _autocast(code.device, self.config.precision):
            z_target_like = self.ms_spade(code, target_id, source_id).float()

        def predict(z: Tensor, t: Tensor) -> Tensor:
            with _autocast(code.device, self.config.precision):
                result: Tensor = self.unet(torch.cat([z, code, z_target_like], dim=1), t, target_id, source_id)
            return result.float()

        z = sample(
            predict,
            config=self.config.diffusion,
            schedule=self.schedule,
            sampler=sampling.sampler,
            num_inference_steps=sampling.num_inference_steps,
            z_start=z_target_like,
            generator=generator,
            eta=sampling.eta,
            on_step=on_step,
        )
        return self.decode(z)


class Regression(Predictor):
    """A network that maps the source volume to the target volume in one evaluation: the plain U-Net."""

    def __init__(self, config: Config, unet: UNet) -> None:
        """Take the trained network."""
        super().__init__()
        self.config, self.unet = config, unet

    def encode(self, x: Tensor) -> Tensor:
        """Return the source itself."""
        return x

    def predict(
        self,
        code: Tensor,
        source: int,
        target: int,
        sampling: SamplingConfig,
        generator: torch.Generator,
        on_step: OnStep | None,
    ) -> Tensor:
        """Return the prediction; sampling and generator have no say in it."""
        source_id, target_id = (torch.tensor([index], device=code.device) for index in (source, target))
        with _autocast(code.device, self.config.precision):
            result: Tensor = self.unet(code, None, target_id, source_id)
        if on_step is not None:
            on_step(1, 1)
        return result.float()


def build_predictor(kind: str, config: Config, meta: Mapping[str, Any]) -> Predictor:
    """Build a predictor with fresh weights; a translator folder's weights load into it strictly.

    Args:
        kind: aldm (weights codec.*, ms_spade.*, unet.*) or unet (weights unet.*).
        config: the whole configuration, `modalities` named.
        meta: of the folder; aldm reads latent_mean and latent_std, one number per latent channel.
    """
    modalities = len(config.modalities)
    if kind == "unet":
        return Regression(config, build_regression_unet(config))
    assert kind == "aldm", kind
    codec = build_codec(config.codec)
    channels = codec.latent_channels
    ms_spade = MSSpade(channels, modalities, **asdict(config.ms_spade))
    unet = UNet(3 * channels, channels, modalities, **asdict(config.unet))
    mean, std = (torch.tensor(meta[name], dtype=torch.float32) for name in ("latent_mean", "latent_std"))
    return LatentDiffusion(config, codec, ms_spade, unet, mean, std)


def build_regression_unet(config: Config) -> UNet:
    """Build the plain U-Net: volume in, volume out, told source and target."""
    return UNet(1, 1, len(config.modalities), **asdict(config.regression_unet), with_time=False)


def _autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
