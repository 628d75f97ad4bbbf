"""What the stages share: the configuration that fits the data, validation scores, the record of the latents."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from aldm.config import CodecConfig, Config, PreprocessConfig, TrainingConfig, from_dict
from aldm.errors import UserError
from aldm.latents import LatentStore
from aldm.players import Loss, Panel, Player, Values

LATENTS = {
    "latents.codec_hash": str,
    "latents.mean": list,
    "latents.std": list,
    "latents.data.fingerprint": str,
    "latents.data.median_percentiles": dict,
    "latents.data.backgrounds": dict,
}
"""What `latents_record` leaves in the meta of a checkpoint, to be checked by whoever reads it."""


def with_data(
    config: Config,
    modalities: tuple[str, ...],
    preprocess: Mapping[str, Any],
    codec: Mapping[str, Any] | None = None,
) -> Config:
    """Return the configuration with the modalities, preprocessing and codec that the data were made with.

    Args:
        config: as the user gave it.
        modalities: those of the data; the configuration's are kept where it names any. A model that is fine-tuned
            keeps those that the data lack.
        preprocess: of the data.
        codec: of the latents; None keeps the configuration's.

    Raises:
        UserError: the configuration names a modality that the data lack, as one of all or as an end of its pair.
    """
    missing = [name for name in config.modalities if name not in modalities]
    if missing and not config.init_from:
        raise UserError(
            f"preset {config.preset} is for {', '.join(config.modalities)}, the data have {', '.join(modalities)}: "
            f"take another preset, or say `modalities=[{', '.join(modalities)}]`"
        )
    lacking = [name for name in config.pair or () if name not in (config.modalities or modalities)]
    if lacking:
        raise UserError(
            f"{' to '.join(config.pair or ())} cannot be learnt from data without {' and '.join(lacking)}: they have "
            f"{', '.join(config.modalities or modalities)}"
        )
    return replace(
        config,
        modalities=config.modalities or modalities,
        preprocess=from_dict(PreprocessConfig, preprocess, "preprocess."),
        codec=config.codec if codec is None else from_dict(CodecConfig, codec, "codec."),
    )


def adversary(module: nn.Module, training: TrainingConfig, loss: Loss) -> Player:
    """Return the discriminator's player: it starts with the adversarial term, and no average of it is kept."""
    return Player("discriminator", module, replace(training, ema_decay=0.0), loss, training.adversarial_start_step)


def check_image_space(latents: LatentStore, training: TrainingConfig, section: str) -> None:
    """Refuse a loss in image space on latents whose errors are not the image's.

    Raises:
        UserError: the codec is not isometric.
    """
    if training.image_space_loss and not latents.isometric:
        raise UserError(
            f"{section}.image_space_loss needs latents of an isometric codec (haar), these are of "
            f"{latents.codec['kind']}: say `{section}.image_space_loss=false`"
        )


def check_patches(sides: Sequence[int], training: TrainingConfig, section: str) -> None:
    """Refuse a discriminator whose stride-2 layers leave fewer than 2 patches along an axis (nothing to normalise
    over).

    Args:
        sides: voxels of what it judges.
        training: its `discriminator_layers`.
        section: the training's name in the configuration, for the message.

    Raises:
        UserError: too many layers.
    """
    most = min(sides).bit_length() - 2
    if training.discriminator_layers > most:
        raise UserError(
            f"{section}.discriminator_layers is {training.discriminator_layers}, on {' x '.join(map(str, sides))} "
            f"voxels at most {most} leave 2 patches along every axis: set it to that, or take larger crops or volumes"
        )


def psnr_from_squared_error(squared_error: Tensor) -> Tensor:
    """Return the PSNR, dB, from squared errors of volumes in [-1, 1] (data range 2)."""
    return 10 * torch.log10(4 / squared_error.mean().clamp_min(1e-12))


def latent_score(latents: LatentStore) -> tuple[str, bool]:
    """Return the name of the score that compares latents and whether higher is better."""
    return ("psnr_db", True) if latents.isometric else ("latent_rmse", False)


def latent_values(latents: LatentStore, std: Tensor, z: Tensor, z_target: Tensor) -> Values:
    """Compare standardised latents: the volume's PSNR, dB, where the codec is isometric, else the latents' RMS error.

    Args:
        latents: where they come from.
        std: (C,) its standard deviations, on the latents' device.
        z, z_target: (B, C, x, y, z).
    """
    squares = (z.float() - z_target).square()
    if latents.isometric:
        return {"psnr_db": psnr_from_squared_error(squares * std.square().view(1, -1, 1, 1, 1))}
    return {"latent_rmse": squares.mean().sqrt()}


def latents_record(latents: LatentStore) -> dict[str, Any]:
    """Return what a checkpoint keeps of the latents that it was trained on (JSON-able)."""
    return {
        "codec_hash": latents.codec_hash,
        "latent_channels": latents.latent_channels,
        "mean": latents.mean.tolist(),
        "std": latents.std.tolist(),
        "data": latents.data,
    }


def panel(**tensors: Tensor) -> Panel:
    """Return what a validation shows of its first sample: the first channel of each (B, C, X, Y, Z) tensor, by name.

    The first channel of Haar latents is the low-pass: a small volume. Of other latents it is what it is.
    """
    return {name: tensor[0, 0].detach().float() for name, tensor in tensors.items()}
