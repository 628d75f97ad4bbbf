"""Schedules and objectives against their definitions."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from aldm.config import OBJECTIVES, SCHEDULES, DiffusionConfig
from aldm.diffusion import (
    VARIANCE_PRESERVING,
    NoiseWindow,
    draw_noise,
    make_schedule,
    noised,
    to_epsilon,
    to_x0,
    training_loss_inputs,
    training_target,
)
from aldm.errors import UserError

SHAPE = (4, 3, 5, 4, 3)


def latents(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_is_float64_falls_and_follows_from_its_betas(name):
    schedule = make_schedule(DiffusionConfig(schedule=name))
    assert schedule.betas.dtype == schedule.alphas_cumprod.dtype == torch.float64
    assert schedule.num_train_timesteps == 1000
    assert (schedule.alphas_cumprod.diff() < 0).all()
    assert 0 < schedule.alphas_cumprod[-1] < 0.02
    assert torch.allclose(torch.cumprod(1 - schedule.betas, 0), schedule.alphas_cumprod, rtol=1e-12)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("linear", "linear"),
        ("scaled-linear", "scaled_linear"),
        ("cosine", "squaredcos_cap_v2"),
        ("sigmoid", "sigmoid"),
    ],
)
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_schedule_equals_that_of_diffusers(ours, theirs, zero_terminal_snr):
    from diffusers import DDIMScheduler, DDPMScheduler

    config = DiffusionConfig(objective="v", schedule=ours, zero_terminal_snr=zero_terminal_snr)
    # DDIM's scheduler has no sigmoid, and neither scheduler works in float64
    scheduler = DDPMScheduler if ours == "sigmoid" else DDIMScheduler
    oracle = scheduler(1000, 0.0015, 0.0195, theirs, rescale_betas_zero_snr=zero_terminal_snr)
    np.testing.assert_allclose(make_schedule(config).alphas_cumprod, oracle.alphas_cumprod, rtol=2e-3, atol=2e-6)


def test_cosine_betas_are_equation_17_with_its_limit():
    """Nichol and Dhariwal 2021: beta = 1 - kept_t / kept_(t - 1), at most 0.999, where kept is a squared cosine."""
    kept = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
    wanted = [min(1 - after / before, 0.999) for before, after in pairwise(kept)]
    np.testing.assert_allclose(make_schedule(DiffusionConfig(schedule="cosine")).betas, wanted, rtol=1e-9)
    assert wanted[-1] == 0.999


@pytest.mark.parametrize("name", ["beta_start", "beta_end"])
@pytest.mark.parametrize("value", [1.5, 1.0, 0.0, -0.1])
def test_beta_outside_its_range_is_refused(name, value):
    with pytest.raises(UserError, match=r"beta_(start|end)"):
        make_schedule(DiffusionConfig(**{name: value}))


@pytest.mark.parametrize("objective", ["v", "x0"])
def test_zero_terminal_snr_ends_in_pure_noise_and_keeps_the_start(objective):
    config = DiffusionConfig(objective=objective, zero_terminal_snr=True)
    schedule, plain = make_schedule(config), make_schedule(replace(config, zero_terminal_snr=False))
    assert schedule.alphas_cumprod[-1] == 0
    assert schedule.alphas_cumprod[0] == pytest.approx(float(plain.alphas_cumprod[0]), rel=1e-12)
    assert torch.allclose(torch.cumprod(1 - schedule.betas, 0), schedule.alphas_cumprod, rtol=1e-12, atol=0)
    noise, last = latents(0), torch.full((4,), 999)
    assert torch.equal(noised(schedule, latents(1), last, noise), noise)


def test_zero_terminal_snr_is_refused_for_epsilon():
    with pytest.raises(UserError, match="use objective v or x0"):
        DiffusionConfig(objective="epsilon", zero_terminal_snr=True)


@pytest.mark.parametrize("name", SCHEDULES)
def test_levels_agree_with_the_table_and_invert(name):
    schedule = make_schedule(DiffusionConfig(schedule=name))
    for t in (0, 1, 500, 999):
        level = schedule.level(t)
        assert level.alpha**2 == pytest.approx(max(float(schedule.alphas_cumprod[t]), 2**-24), rel=1e-9)
        assert level.alpha**2 + level.sigma**2 == pytest.approx(1, rel=1e-12)
    for t in (0.0, 0.25, 37.5, 999.0):
        assert schedule.level_of_half_log_snr(schedule.level(t).half_log_snr).t == pytest.approx(t, abs=1e-6)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_weights_between_steps_are_those_of_the_level_there(zero_terminal_snr):
    """Of a batch, shaped to multiply it: whole steps, fractional ones, and what lies beyond the table's ends."""
    schedule = make_schedule(DiffusionConfig(objective="v", zero_terminal_snr=zero_terminal_snr))
    t = torch.tensor([0.0, 0.25, 37.5, 500.0, 998.75, 999.0, -1.0, 2000.0])
    like = torch.zeros(len(t), 2, 1, 1, 1)
    levels = [schedule.level(min(max(float(one), 0.0), 999.0)) for one in t]
    for got, name in zip(schedule.alpha_sigma_between(t, like), ("alpha", "sigma"), strict=True):
        assert got.shape == (len(t), 1, 1, 1, 1)
        assert got.flatten().tolist() == pytest.approx([getattr(level, name) for level in levels], rel=1e-5)


@pytest.mark.parametrize("objective", ["v", "x0"])
def test_every_time_step_is_drawn_as_often(objective):
    config = DiffusionConfig(objective=objective, num_train_timesteps=4)
    z = torch.zeros(8000, 1, 1, 1, 1)
    _, t, _ = training_loss_inputs(config, make_schedule(config), z, z, torch.Generator().manual_seed(0))
    assert t.unique().tolist() == [0, 1, 2, 3]
    assert (t.long().bincount() / len(t)).tolist() == pytest.approx([0.25] * 4, abs=0.02)


@pytest.mark.parametrize("objective", VARIANCE_PRESERVING)
def test_target_converts_back_to_image_and_noise(objective):
    schedule = make_schedule(DiffusionConfig())
    image, noise, t = latents(0), latents(1), torch.tensor([0, 10, 300, 999])
    alpha, sigma = schedule.alpha_sigma(t, image)
    z_t = noised(schedule, image, t, noise)
    target = training_target(objective, schedule, image, t, noise)
    # at t = 999 epsilon is divided by alpha = 0.011: float32's 1e-7 becomes 1e-5
    torch.testing.assert_close(to_x0(objective, target, z_t, alpha, sigma), image, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(to_epsilon(objective, target, z_t, alpha, sigma), noise, atol=1e-4, rtol=1e-4)


def test_boxes_that_overlap_see_the_same_noise() -> None:
    def noise(start: tuple[int, int, int], sides: tuple[int, int, int]) -> torch.Tensor:
        window = NoiseWindow(torch.Generator().manual_seed(3), (8, 9, 12), start)
        return draw_noise(torch.zeros(1, 2, *sides), [window])[0]

    whole = draw_noise(torch.zeros(1, 2, 8, 9, 12), [torch.Generator().manual_seed(3)])[0]
    assert torch.equal(noise((0, 0, 0), (8, 9, 12)), whole)
    assert torch.equal(noise((2, 1, 4), (6, 5, 8)), whole[:, 2:8, 1:6, 4:12])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_time_steps_are_uniform_in_log_snr_where_noise_is_predicted_from_the_target_like_latent(objective):
    config = DiffusionConfig(objective=objective, residual_std=(1.0,))
    schedule, many = make_schedule(config), torch.zeros(20_000, 1, 1, 1, 1)
    _, t, _ = training_loss_inputs(config, schedule, many, many, torch.Generator().manual_seed(0))
    if objective == "regression":
        assert (t == 999).all()
        return
    of_t = schedule.half_log_snr[t.long().numpy()] if objective in ("epsilon", "v") else t.numpy()
    first, last = (schedule.half_log_snr[[-1, 0]]) if objective in ("epsilon", "v") else (0, 999)
    shares, _ = np.histogram(of_t, bins=10, range=(first, last))
    np.testing.assert_allclose(shares / len(t), 0.1, atol=0.02)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_training_inputs_are_seeded_and_belong_together(objective):
    config = DiffusionConfig(objective=objective)
    schedule = make_schedule(config)
    image, start = latents(0), latents(1)
    first, again, other = (
        training_loss_inputs(config, schedule, image, start, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    z_t, t, target = first
    assert z_t.shape == target.shape == SHAPE
    assert t.shape == (4,)
    assert t.dtype == torch.float32
    if objective == "regression":
        assert torch.equal(z_t, start)
        assert (t == 999).all()
    else:
        assert not torch.equal(z_t, other[0])
    if objective in VARIANCE_PRESERVING:
        alpha, sigma = schedule.alpha_sigma(t, image)
        torch.testing.assert_close(to_x0(objective, target, z_t, alpha, sigma), image, atol=1e-3, rtol=1e-3)
    else:
        assert torch.equal(target, image)
