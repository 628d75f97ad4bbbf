"""Samplers: how the chain is integrated. One visible loop each, over a list of noise levels from place_steps.

A level's time step may be fractional. `predict_x0(z, level)` is the network behind the objective's conversion; sample()
builds it. Loops keep the dtype of z (sample() passes float32); their coefficients are Python floats from a float64
schedule. Noise is drawn on the CPU and moved, so a seed gives the same result on every device.

`on_step(done, total)` is called after every network evaluation and may raise to cancel.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from aldm.config import SAMPLERS, DiffusionConfig
from aldm.diffusion import CLEAN, Generators, NoiseLevel, NoiseSchedule, draw_noise, to_x0
from aldm.errors import UserError

PredictX0 = Callable[[Tensor, NoiseLevel], Tensor]
OnStep = Callable[[int, int], None]

PLACEMENT = {"ddpm": "trailing", "ddim": "trailing", "dpm-solver++": "karras"}
"""Where each sampler puts its steps."""


def allowed_samplers(objective: str) -> tuple[str, ...]:
    """Return the samplers that can integrate an objective, the recommended one first."""
    if objective == "regression":
        return ("one-step",)
    chain = ("dpm-solver++", "ddim", "ddpm")
    return (*chain, "one-step") if objective == "x0" else chain


def check_sampling(
    config: DiffusionConfig, sampler: str, num_inference_steps: int, num_samples: int = 1, eta: float = 0.0
) -> None:
    """Refuse a combination of objective, sampler and numbers that cannot work.

    Raises:
        UserError: the sampler does not integrate the objective, a number is out of range, or several samples are asked
            of a combination that always gives the same one.
    """
    allowed = allowed_samplers(config.objective)
    if sampler not in allowed:
        known = "" if sampler in SAMPLERS else f" is not a sampler ({', '.join(SAMPLERS)}) and"
        raise UserError(
            f"sampler {sampler!r}{known} cannot be used with a model of objective {config.objective!r}: "
            f"it takes {', '.join(allowed)}"
        )
    most = 1 if sampler == "one-step" else config.num_train_timesteps
    if not 1 <= num_inference_steps <= most:
        raise UserError(f"`num_inference_steps` is {num_inference_steps} with sampler {sampler!r}, wanted 1 to {most}")
    if not 0 <= eta <= 1:
        raise UserError(f"eta is {eta}, wanted 0 (deterministic) to 1")
    if num_samples < 1:
        raise UserError(f"`num_samples` is {num_samples}, wanted at least 1")
    if num_samples > 1 and config.objective == "regression":
        raise UserError("a model of objective 'regression' has one answer and no spread: `num_samples` must be 1")


def place_steps(
    schedule: NoiseSchedule, num_inference_steps: int, placement: str, *, to_clean: bool = True
) -> list[NoiseLevel]:
    """Return the noise levels that a sampler visits: one per network evaluation, then where the chain ends.

    Args:
        schedule: the training schedule; the chain starts at its last step.
        num_inference_steps: network evaluations, N.
        placement: trailing (uniform in t: T - 1, T - 1 - T/N, ...), karras (Karras et al. 2022, eq. 5, rho 7, over
            sigma / alpha) or log-snr (uniform in log(alpha / sigma)).
        to_clean: end with a step to sigma = 0; otherwise the last of N + 1 levels is the schedule's first step (log-snr
            and karras only).
    """
    last = schedule.num_train_timesteps - 1
    count = num_inference_steps if to_clean else num_inference_steps + 1
    end = [CLEAN] if to_clean else []
    if placement == "trailing":
        assert to_clean, "trailing steps end at sigma = 0"
        return [schedule.level(last - i * (last + 1) / count) for i in range(count)] + end
    first, final = schedule.level(last).half_log_snr, schedule.level(0).half_log_snr
    fractions = np.linspace(0, 1, count)
    if placement == "karras":
        high, low = math.exp(-first / 7), math.exp(-final / 7)
        log_ratios = -7 * np.log(high + fractions * (low - high))
    else:
        assert placement == "log-snr", placement
        log_ratios = first + fractions * (final - first)
    return [schedule.level_of_half_log_snr(float(value)) for value in log_ratios] + end


def ddpm(
    predict_x0: PredictX0,
    z: Tensor,
    levels: Sequence[NoiseLevel],
    generator: Generators,
    on_step: OnStep | None = None,
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2) with the larger posterior variance, 1 - alpha_t^2 / alpha_s^2.

    Written for any pair of levels t -> s. On few steps that variance is too large; it is meant for the whole chain.
    """
    for done, (now, to) in enumerate(pairwise(levels), start=1):
        x0 = predict_x0(z, now)
        ratio = now.alpha / to.alpha
        variance = 1 - ratio**2
        z = (ratio * to.sigma**2 / now.sigma**2) * z + (to.alpha * variance / now.sigma**2) * x0
        if to.sigma > 0:
            z = z + math.sqrt(variance) * draw_noise(z, generator).to(z.dtype)
        if on_step:
            on_step(done, len(levels) - 1)
    return z


def ddim(
    predict_x0: PredictX0,
    z: Tensor,
    levels: Sequence[NoiseLevel],
    generator: Generators,
    on_step: OnStep | None = None,
    eta: float = 0.0,
) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12): first order; eta 0 is deterministic, 1 has DDPM's smaller posterior variance."""
    for done, (now, to) in enumerate(pairwise(levels), start=1):
        x0 = predict_x0(z, now)
        epsilon = (z - now.alpha * x0) / now.sigma
        variance = eta**2 * (to.sigma / now.sigma) ** 2 * (1 - (now.alpha / to.alpha) ** 2)
        z = to.alpha * x0 + math.sqrt(to.sigma**2 - variance) * epsilon
        if variance > 0:
            z = z + math.sqrt(variance) * draw_noise(z, generator).to(z.dtype)
        if on_step:
            on_step(done, len(levels) - 1)
    return z


def dpm_solver_pp(
    predict_x0: PredictX0, z: Tensor, levels: Sequence[NoiseLevel], on_step: OnStep | None = None
) -> Tensor:
    """DPM-Solver++ 2M (Lu et al. 2022, algorithm 2): second order, one evaluation a step.

    The first step, and the last one where it ends at sigma = 0 (an infinite step in log-SNR), are of first order.
    """
    previous_x0, previous_h = None, 0.0
    for done, (now, to) in enumerate(pairwise(levels), start=1):
        x0 = predict_x0(z, now)
        h = to.half_log_snr - now.half_log_snr
        estimate = x0
        if previous_x0 is not None and to.sigma > 0:
            estimate = x0 + (h / (2 * previous_h)) * (x0 - previous_x0)
        z = (to.sigma / now.sigma) * z - (to.alpha * math.expm1(-h)) * estimate
        previous_x0, previous_h = x0, h
        if on_step:
            on_step(done, len(levels) - 1)
    return z


def sample(
    predict: Callable[[Tensor, Tensor], Tensor],
    *,
    config: DiffusionConfig,
    schedule: NoiseSchedule,
    sampler: str,
    num_inference_steps: int,
    z_start: Tensor,
    generator: Generators,
    eta: float = 0.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """Generate latents.

    Args:
        predict: the network: (z_t (B, C, X, Y, Z), t (B,) float32) -> the prediction that the objective names.
        config: the objective.
        schedule: make_schedule(config).
        sampler: one of allowed_samplers(config.objective).
        num_inference_steps: network evaluations.
        z_start: (B, C, X, Y, Z) the target-like latent; regression starts there, the others take its shape.
        generator: a CPU generator for the batch, or one for each of its samples.
        eta: stochasticity of ddim, 0 to 1.
        on_step: called as on_step(done, total) after each evaluation; what it raises goes through.

    Returns:
        z_0 (B, C, X, Y, Z) float32.

    Raises:
        UserError: a sampler or number that check_sampling refuses.
    """
    check_sampling(config, sampler, num_inference_steps, eta=eta)
    z_start = z_start.float()

    def predict_x0(z: Tensor, level: NoiseLevel) -> Tensor:
        t = torch.full((len(z),), level.t, dtype=torch.float32, device=z.device)
        return to_x0(config.objective, predict(z, t).to(z.dtype), z, level.alpha, level.sigma)

    z = z_start if config.objective == "regression" else draw_noise(z_start, generator)
    if sampler == "one-step":  # a step of DDIM to where no noise is left is the prediction alone
        levels = [schedule.level(schedule.num_train_timesteps - 1), CLEAN]
        return ddim(predict_x0, z, levels, generator, on_step)
    levels = place_steps(schedule, num_inference_steps, PLACEMENT[sampler])
    if sampler == "ddpm":
        return ddpm(predict_x0, z, levels, generator, on_step)
    if sampler == "ddim":
        return ddim(predict_x0, z, levels, generator, on_step, eta)
    return dpm_solver_pp(predict_x0, z, levels, on_step)


def sample_many(
    draw: Callable[[Sequence[torch.Generator]], Tensor], num_samples: int, seeds: Sequence[int]
) -> tuple[Tensor, Tensor | None]:
    """Return the mean and the standard deviation (n - 1) of several samples; None for the second with one sample.

    Args:
        draw: makes one sample of each of a batch, decoded or not, from a CPU generator for each. Sample i has its own
            generator seeded with seed + i, so the first of many is the one that num_samples = 1 gives.
        num_samples: at least 1.
        seeds: of the first sample of each of the batch.
    """

    def generators(i: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed + i) for seed in seeds]

    mean = draw(generators(0))
    squares = torch.zeros_like(mean)
    for i in range(1, num_samples):
        value = draw(generators(i))
        difference = value - mean
        mean = mean + difference / (i + 1)
        squares = squares + difference * (value - mean)
    return mean, (squares / (num_samples - 1)).sqrt() if num_samples > 1 else None
