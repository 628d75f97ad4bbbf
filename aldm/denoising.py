"""The networks of stages 2 and 3 and of the regression U-Net: how they are built and asked, for training and
translation.

Latents are B C x y z standardised per channel, modality ids (B,) int64.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from aldm.config import Config, DiffusionConfig
from aldm.diffusion import PREDICTS_NOISE, NoiseSchedule
from aldm.errors import UserError
from aldm.models.error_unet import ErrorUNet
from aldm.models.haar_unet import HaarUNet
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


def build_unet(config: Config, latent_channels: int) -> UNet:
    """Build the denoiser; see `denoise`, and for all targets together `refine_all`, for its inputs."""
    noise, number = config.diffusion.objective in PREDICTS_NOISE, len(config.modalities)
    values, together = asdict(config.unet), config.diffusion.together
    values["skip_gates"] = config.unet.skip_gates and not noise and not together
    values["noise_gain"] = config.unet.skip_gates and noise
    if config.diffusion.any_sources:
        values["embed_source"] = False  # what is given is embedded instead
        module = UNet(number * latent_channels, number * latent_channels, number, **values)
    elif together:
        module = UNet((1 + number) * latent_channels, number * latent_channels, number, **values)
    else:
        module = UNet(3 * latent_channels, latent_channels, number, **values)
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


def denoise(
    unet: nn.Module,
    config: DiffusionConfig,
    schedule: NoiseSchedule,
    z_t: Tensor,
    t: Tensor,
    z_source: Tensor,
    z_target_like: Tensor,
    target: Tensor,
    source: Tensor,
) -> Tensor:
    """Return the U-Net's prediction at z_t.

    The network sees cat[z_t, z_source, z_target_like]. For epsilon and v its output is the prediction, unless the
    configuration has residual_std: then see `_from_target_like`. For x0 and
    regression it is the difference between z_target and z_target_like, which is added: stage 2 already stands
    near the answer, and a network that outputs 0 repeats it. With `skip_gates` the network learns how much of itself,
    of z_target_like and of z_source to take: at first as without gates, where source = target the source alone.
    For epsilon and v it learns how much of the noise in its input to pass through: at first none.

    Args:
        unet: aldm.models.unet.UNet with 3 C input and C output channels.
        config: the objective, and residual_std.
        schedule: make_schedule(config).
        z_t: (B, C, x, y, z) noisy latent.
        t: (B,) float time steps.
        z_source, z_target_like: (B, C, x, y, z) standardised latents.
        target, source: (B,) int64 modality ids.
    """

    def network(z: Tensor) -> Tensor:
        output: Tensor = unet(torch.cat([z, z_source, z_target_like], dim=1), t, target, source)
        return output

    if config.objective not in PREDICTS_NOISE:
        return network(z_t) + z_target_like
    if config.residual_std is None:
        return network(z_t)
    return _from_target_like(network, config, schedule, z_t, t, z_target_like)


def refine_all(unet: nn.Module, z_source: Tensor, z_target_like: Tensor, source: Tensor) -> Tensor:
    """Return z_target of all modalities, (B, M C, x, y, z), that of the source being z_target_like as it is.

    The network sees cat[z_source, z_target_like] and is told the source alone; its output is the difference to
    z_target_like, which is added.

    Args:
        unet: aldm.models.unet.UNet with (1 + M) C input and M C output channels.
        z_source: (B, C, x, y, z).
        z_target_like: (B, M C, x, y, z), modality by modality.
        source: (B,) int64 modality ids.
    """
    channels = z_source.shape[1]
    number = z_target_like.shape[1] // channels
    t = torch.zeros(len(source), device=z_source.device)
    change = unet(torch.cat([z_source, z_target_like], dim=1), t, source, source)
    other = torch.arange(number, device=source.device) != source[:, None]
    return z_target_like + change * other.repeat_interleave(channels, dim=1)[:, :, None, None, None]


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


def refine_missing(unet: nn.Module, z_target_like: Tensor, given: Tensor) -> Tensor:
    """Return z_target of all modalities, (B, M C, x, y, z), those given being z_target_like as they are.

    Args:
        unet: aldm.models.unet.UNet with M C input and output channels.
        z_target_like: (B, M C, x, y, z) of `target_like_of_sources`.
        given: (B, M), 1 for each modality that is given, else 0.
    """
    number = given.shape[1]
    t = torch.zeros(len(given), device=given.device)
    change = unet(z_target_like, t, given)
    channels = z_target_like.shape[1] // number
    return z_target_like + change * (1 - given).repeat_interleave(channels, dim=1)[:, :, None, None, None]


def of_target(z: Tensor, target: Tensor, channels: int) -> Tensor:
    """Return the (B, C, x, y, z) of each sample's target out of (B, M C, x, y, z); target (B,) int64."""
    return z.unflatten(1, (-1, channels))[torch.arange(len(z), device=z.device), target]


def _from_target_like(
    network: Callable[[Tensor], Tensor],
    config: DiffusionConfig,
    schedule: NoiseSchedule,
    z_t: Tensor,
    t: Tensor,
    z_target_like: Tensor,
) -> Tensor:
    """Return epsilon or v from what z_target_like already says about z_target.

    If z_target were normal about y = z_target_like with standard deviation s (residual_std), the best guess at z_t
    would be known; the network adds what is missing, scaled so that its input and what it has to output have unit
    variance (Karras et al. 2022, table 1 and appendix B.6, here about y instead of 0, and for a variance-preserving
    chain). With r = (z_t - alpha y) / q, q^2 = alpha^2 s^2 + sigma^2, and the network's output F(r),

        z_target = y + (s / q) (alpha s r + sigma F)        epsilon = (sigma r - alpha s F) / q
    """
    std, alpha, sigma, spread = _scales(config, schedule, t, z_t)
    residual = (z_t - alpha * z_target_like) / spread
    output = network(residual).float()
    epsilon = (sigma * residual - alpha * std * output) / spread
    if config.objective == "epsilon":
        return epsilon
    z_target = z_target_like + (std / spread) * (alpha * std * residual + sigma * output)
    return alpha * epsilon - sigma * z_target


def _scales(
    config: DiffusionConfig, schedule: NoiseSchedule, t: Tensor, z_t: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return s, alpha, sigma and q of `_from_target_like`, shaped to multiply z_t."""
    std = z_t.new_tensor(config.residual_std or [1.0]).view(1, -1, 1, 1, 1)
    alpha, sigma = schedule.alpha_sigma_between(t, z_t)
    return std, alpha, sigma, (alpha**2 * std**2 + sigma**2).sqrt()


def loss_weights(
    config: DiffusionConfig, schedule: NoiseSchedule, t: Tensor, z_t: Tensor, image_weights: Tensor | None = None
) -> Tensor | None:
    """Return the weights, (C,) or (B, C), of the squared error of a prediction; None where all are 1.

    Where `_from_target_like` scales the network's output F, by k_c in channel c, every noise level asks the same of F
    (Karras et al. 2022: 1 / c_out^2): an error of 1 in F costs 1. Without that epsilon hardly depends on F where the
    noise is high, although what is coarse in a sample is decided there. Without `image_weights` the loss is that of F,
    (F - F*)^2 in every channel. With them it is the squared error in the image of the predicted z_target, up to one
    factor a level: channel c gets w_c k_c^2 (F - F*)^2 over the mean of w k^2 over the channels.

    Args:
        config: the objective, and residual_std.
        schedule: make_schedule(config).
        t: (B,) time steps.
        z_t: (B, C, x, y, z), at those.
        image_weights: (C,) aldm.losses.image_space_weights, w, for a loss in image space.
    """
    if config.objective not in PREDICTS_NOISE or config.residual_std is None:
        return image_weights
    std, alpha, _, spread = _scales(config, schedule, t, z_t)
    scale = std / spread * (alpha if config.objective == "epsilon" else 1)
    squares = scale.square().flatten(1)
    if image_weights is None:
        return squares.reciprocal()
    return image_weights / (image_weights * squares).mean(dim=1, keepdim=True)
