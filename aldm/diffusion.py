"""What is noised, how, and what the network predicts.

Tensors are B C X Y Z latents. The variance-preserving objectives (epsilon, v, x0) use

    z_t = alpha_t z_target + sigma_t noise,    alpha_t = sqrt(alphas_cumprod_t),  sigma_t = sqrt(1 - alphas_cumprod_t)

with v = alpha_t noise - sigma_t z_target (Salimans and Ho 2022). Regression has neither noise nor chain: z_t is the
target-like latent, t is T - 1, and the network predicts z_target.

Time steps t run from 0 (least noise) to T - 1 and may be fractional: log(alpha / sigma) is linear between two steps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from aldm.config import DiffusionConfig, Shape
from aldm.errors import UserError

VARIANCE_PRESERVING = ("epsilon", "v", "x0")
PREDICTS_NOISE = ("epsilon", "v")
_SMALLEST_ALPHA = 2.0**-12
"""Stands for alpha = 0 where a sampler needs log(alpha / sigma) of a schedule with zero terminal SNR."""


class NoiseLevel(NamedTuple):
    """One point of the chain: the float time step that the network is told, and the weights of image and noise."""

    t: float
    alpha: float
    sigma: float

    @property
    def half_log_snr(self) -> float:
        """log(alpha / sigma); infinite where no noise is left."""
        return math.log(self.alpha / self.sigma) if self.sigma > 0 else math.inf


CLEAN = NoiseLevel(t=-1.0, alpha=1.0, sigma=0.0)
"""Where a chain ends: no noise. No network is ever evaluated here."""


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A variance-preserving schedule of T steps.

    Attributes:
        betas: (T,) float64, in (0, 1].
        alphas_cumprod: (T,) float64, falling; the last one is 0 with zero terminal SNR.
    """

    betas: Tensor
    alphas_cumprod: Tensor

    @property
    def num_train_timesteps(self) -> int:
        """T, the length of the training chain."""
        return len(self.betas)

    @property
    def half_log_snr(self) -> np.ndarray:
        """(T,) float64, log(alpha / sigma) of every step, falling; an alpha of 0 is taken as 2^-12."""
        kept = np.maximum(self.alphas_cumprod.numpy(), _SMALLEST_ALPHA**2)
        return np.asarray(0.5 * np.log(kept / (1 - kept)))

    def level(self, t: float) -> NoiseLevel:
        """Return the noise level at a float time step in [0, T - 1]."""
        log_ratio = float(np.interp(t, np.arange(self.num_train_timesteps), self.half_log_snr))
        return _level(t, log_ratio)

    def level_of_half_log_snr(self, half_log_snr: float) -> NoiseLevel:
        """Return the noise level with this log(alpha / sigma), its time step interpolated."""
        t = np.interp(half_log_snr, self.half_log_snr[::-1], np.arange(self.num_train_timesteps)[::-1])
        return _level(float(t), half_log_snr)

    def steps_uniform_in_log_snr(self, fractions: Tensor) -> Tensor:
        """Return the whole time steps nearest to those fractions (B,) of the way from the last log(alpha / sigma)."""
        table = self.half_log_snr[::-1]
        wanted = table[0] + fractions.numpy() * (table[-1] - table[0])
        steps = np.interp(wanted, table, np.arange(self.num_train_timesteps)[::-1])
        return torch.from_numpy(steps.round()).long()

    def alpha_sigma(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma of whole time steps t (B,), shaped to multiply `like` (B, ...)."""
        kept = self.alphas_cumprod.to(t.device)[t.long()]
        shape = (-1,) + (1,) * (like.ndim - 1)
        return kept.sqrt().to(like).view(shape), (1 - kept).sqrt().to(like).view(shape)

    def alpha_sigma_between(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma of float time steps t (B,), shaped to multiply `like` (B, ...)."""
        table = torch.from_numpy(self.half_log_snr).to(device=t.device, dtype=torch.float32)
        below = t.floor().clamp(0, len(table) - 1).long()
        above = (below + 1).clamp(max=len(table) - 1)
        log_ratio = table[below].lerp(table[above], (t - below).clamp(0, 1))
        log_ratio = log_ratio.to(like).view((-1,) + (1,) * (like.ndim - 1))
        return (2 * log_ratio).sigmoid().sqrt(), (-2 * log_ratio).sigmoid().sqrt()


def _level(t: float, half_log_snr: float) -> NoiseLevel:
    """Return the level whose alpha and sigma have that ratio; both from the ratio, so neither loses digits."""
    return NoiseLevel(
        t=float(t),
        alpha=1 / math.sqrt(1 + math.exp(-2 * half_log_snr)),
        sigma=1 / math.sqrt(1 + math.exp(2 * half_log_snr)),
    )


def make_schedule(config: DiffusionConfig) -> NoiseSchedule:
    """Return the noise schedule of a configuration.

    linear and scaled-linear (linear in sqrt(beta), Rombach et al. 2022) run from beta_start to beta_end, sigmoid
    between the same two along a logistic curve over [-6, 6]; cosine is Nichol and Dhariwal 2021, eq. 17, with betas at
    most 0.999.

    Raises:
        UserError: a beta outside (0, 1).
    """
    length = config.num_train_timesteps
    start, end = config.beta_start, config.beta_end
    if not (0 < start < 1 and 0 < end < 1):
        raise UserError(f"diffusion.beta_start and beta_end are {start} and {end}, wanted values between 0 and 1")
    if config.schedule == "linear":
        betas = torch.linspace(start, end, length, dtype=torch.float64)
    elif config.schedule == "scaled-linear":
        betas = torch.linspace(start**0.5, end**0.5, length, dtype=torch.float64) ** 2
    elif config.schedule == "sigmoid":
        betas = start + (end - start) * torch.linspace(-6, 6, length, dtype=torch.float64).sigmoid()
    else:
        steps = torch.arange(length + 1, dtype=torch.float64) / length
        kept = torch.cos((steps + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - kept[1:] / kept[:-1]).clamp(max=0.999)
    alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    if config.zero_terminal_snr:
        alphas_cumprod = _zero_terminal(alphas_cumprod)
        previous = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
        betas = 1 - alphas_cumprod / previous
    return NoiseSchedule(betas=betas, alphas_cumprod=alphas_cumprod)


def _zero_terminal(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale sqrt(alphas_cumprod) so that it ends at 0 and starts where it did (Lin et al. 2024)."""
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def noised(schedule: NoiseSchedule, z_target: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Return z_t, the network's noisy input of the variance-preserving objectives.

    Args:
        schedule: the noise schedule.
        z_target: (B, C, X, Y, Z) the latent to be generated.
        t: (B,) whole time steps, 0 to T - 1.
        noise: (B, C, X, Y, Z) standard normal.
    """
    alpha, sigma = schedule.alpha_sigma(t, z_target)
    return alpha * z_target + sigma * noise


def training_target(objective: str, schedule: NoiseSchedule, z_target: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Return what the network is to predict at z_t: the noise, v, or z_target (x0)."""
    if objective == "epsilon":
        return noise
    if objective == "v":
        alpha, sigma = schedule.alpha_sigma(t, z_target)
        return alpha * noise - sigma * z_target
    return z_target


def to_x0(objective: str, prediction: Tensor, z_t: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> Tensor:
    """Return the z_target that a prediction at z_t stands for.

    Singular for epsilon at alpha = 0 (zero terminal SNR), which the configuration refuses.
    """
    if objective == "epsilon":
        return (z_t - sigma * prediction) / alpha
    if objective == "v":
        return alpha * z_t - sigma * prediction
    return prediction


def to_epsilon(objective: str, prediction: Tensor, z_t: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> Tensor:
    """Return the noise that a prediction at z_t stands for (epsilon, v, x0; singular for x0 at sigma = 0)."""
    if objective == "epsilon":
        return prediction
    if objective == "v":
        return sigma * z_t + alpha * prediction
    return (z_t - alpha * prediction) / sigma


@dataclass(frozen=True, eq=False)
class NoiseWindow:
    """A window on the noise of a larger latent: windows that overlap see the same noise there."""

    generator: torch.Generator
    whole: Shape
    """Sides of the larger latent."""
    start: Shape
    """Where the window begins."""


Generators = torch.Generator | Sequence[torch.Generator | NoiseWindow]
"""One for a whole batch, or one for each of its samples: a sample's noise then does not depend on its neighbours."""


def draw_noise(like: Tensor, generator: Generators) -> Tensor:
    """Return standard normal float32 noise shaped as `like`, on its device.

    Drawn on the CPU and moved: the same seed gives the same noise on every device.
    """
    if isinstance(generator, torch.Generator):
        return torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like.device)
    assert len(generator) == len(like), (len(generator), len(like))
    return torch.stack([_noise(like.shape[1:], one) for one in generator]).to(like.device)


def _noise(shape: Sequence[int], source: torch.Generator | NoiseWindow) -> Tensor:
    """Return noise (C, X, Y, Z)."""
    if isinstance(source, torch.Generator):
        return torch.randn(tuple(shape), generator=source, dtype=torch.float32)
    whole = torch.randn(shape[0], *source.whole, generator=source.generator, dtype=torch.float32)
    return whole[(slice(None), *(slice(low, low + side) for low, side in zip(source.start, shape[1:], strict=True)))]


def training_loss_inputs(
    config: DiffusionConfig,
    schedule: NoiseSchedule,
    z_target: Tensor,
    z_target_like: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw time steps and noise and return (z_t, t, target) of one training step.

    Regression draws nothing: its input is the target-like latent, its time step the last. Time steps of the others are
    uniform over the chain. Where epsilon or v start from the target-like latent (`residual_std`), steps are uniform in
    log(alpha / sigma): what is to be found is the small residual, and uniform steps would nearly all lie where noise
    hides it.

    Args:
        config: objective and residual_std.
        schedule: make_schedule(config).
        z_target: (B, C, X, Y, Z) standardised latent.
        z_target_like: the same shape, from MS-SPADE.
        generator: a CPU generator; every random choice comes from it.

    Returns:
        z_t (B, C, X, Y, Z), t (B,) float32, and what the network is to predict (B, C, X, Y, Z).
    """
    batch, last = len(z_target), schedule.num_train_timesteps - 1
    if config.objective == "regression":
        return z_target_like, torch.full((batch,), float(last), device=z_target.device), z_target
    t = torch.randint(0, last + 1, (batch,), generator=generator)
    if config.objective in PREDICTS_NOISE and config.residual_std is not None:
        t = schedule.steps_uniform_in_log_snr(torch.rand(batch, generator=generator, dtype=torch.float64))
    t = t.to(z_target.device)
    noise = draw_noise(z_target, generator)
    return (
        noised(schedule, z_target, t, noise),
        t.float(),
        training_target(config.objective, schedule, z_target, t, noise),
    )
