"""The networks of stages 2 and 3 and of the regression U-Net: how they are built, and what several sources say.

Latents are B C x y z standardised per channel, modality ids (B,) int64.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from aldm.config import Config
from aldm.errors import UserError
from aldm.models.denoiser import Denoiser
from aldm.models.error_unet import ErrorUNet
from aldm.models.haar_unet import HaarUNet
from aldm.models.lean_unet import LeanUNet
from aldm.models.ms_spade import MSSpade
from aldm.models.unet import UNet


def build_ms_spade(config: Config, latent_channels: int) -> MSSpade:
    """Build MS-SPADE for the configuration's modalities.

    Raises:
        UserError: an intensity map is asked for, and the codec is not the lossless one.
    """
    if config.ms_spade.intensity_map and config.codec.kind != "haar":
        raise UserError(
            f"ms_spade.intensity_map needs latents of the codec haar, which loses nothing, and codec.kind is "
            f"{config.codec.kind}: say `ms_spade.intensity_map=false`"
        )
    levels = config.codec.haar_levels
    several = config.diffusion.any_sources
    values = asdict(config.ms_spade)
    module = MSSpade(latent_channels, len(config.modalities), **values, haar_levels=levels, several_sources=several)
    module.activation_checkpointing = config.activation_checkpointing
    return module


def build_denoiser(config: Config, latent_channels: int) -> Denoiser:
    """Build the denoiser for the configuration's modalities: the U-Net of Table C, or the lean one."""
    kind = LeanUNet if config.unet.lean else UNet
    module = kind(config.unet, config.diffusion, len(config.modalities), latent_channels)
    module.activation_checkpointing = config.activation_checkpointing
    return module


def build_regression_unet(config: Config) -> HaarUNet:
    """Build the regression U-Net for the configuration's modalities: volumes in, volumes out."""
    module = HaarUNet(len(config.modalities), **asdict(config.haar_unet))
    module.activation_checkpointing = config.activation_checkpointing
    return module


def build_error_unet(config: Config) -> ErrorUNet:
    """Build the network that says how far off a translation may be, for the configuration's modalities."""
    module = ErrorUNet(len(config.modalities), **asdict(config.error_unet))
    module.activation_checkpointing = config.activation_checkpointing
    return module


def check_regression_weights(weights: Mapping[str, Tensor], prefix: str, path: Path) -> None:
    """Refuse a regression U-Net of earlier versions, which embedded the target alone.

    Args:
        weights: parameters by name.
        prefix: what stands before the network's own names.
        path: where they come from, for the message.

    Raises:
        UserError: they are of such a network.
    """
    if f"{prefix}target.weight" in weights:
        raise UserError(
            f"{path} holds a regression U-Net of an earlier version, which worked on voxels where this one works on "
            "Haar bands: train it again (aldm train unet) and export that"
        )


def target_like_of_sources(
    z: Sequence[Tensor | None], target_like: Callable[[int, int], Tensor], precision: Tensor
) -> Tensor:
    """Return what the given sources say of every modality, (1, M C, x, y, z), before the U-Net has seen it.

    A modality that is given is itself. Any other is the mean of what MS-SPADE makes of each source, weighted by how
    well the pair's intensity map does. The sources are added in the order of their
    modalities, so that the order in which they were named cannot matter; a single one has the weight 1.

    Args:
        z: of every modality, in order, its latent (1, C, x, y, z), or None where it is not given.
        target_like: (source, target) -> z_target_like (1, C, x, y, z).
        precision: (M, M) weights of (source, target), above 0.
    """
    sources = [modality for modality, one in enumerate(z) if one is not None]
    found = []
    for target, own in enumerate(z):
        if own is not None:
            found.append(own)
            continue
        weights = precision[sources, target] / precision[sources, target].sum()
        parts = [weight * target_like(source, target) for source, weight in zip(sources, weights, strict=True)]
        found.append(sum(parts[1:], start=parts[0]))
    return torch.cat(found, dim=1)


def of_target(z: Tensor, target: Tensor, channels: int) -> Tensor:
    """Return the (B, C, x, y, z) of each sample's target out of (B, M C, x, y, z); target (B,) int64."""
    return z.unflatten(1, (-1, channels))[torch.arange(len(z), device=z.device), target]
