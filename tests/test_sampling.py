"""Every sampler against a closed form: a Gaussian target N(0.5, 0.3^2) with its exact epsilon (or exact x0).

The probability flow of that target is linear: z_t = alpha_t mean + std_t n with the same n all the way, where
std_t^2 = alpha_t^2 std^2 + sigma_t^2. Chains start from the exact marginal at T, standardised, so that what is measured
is the sampler and not the start.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch

from aldm.config import DiffusionConfig
from aldm.diffusion import VARIANCE_PRESERVING, NoiseLevel, draw_noise, make_schedule
from aldm.errors import UserError
from aldm.sampling import (
    PLACEMENT,
    allowed_samplers,
    check_sampling,
    ddim,
    ddpm,
    dpm_solver_pp,
    place_steps,
    sample,
    sample_many,
)

MEAN, STD = 0.5, 0.3
SCHEDULE = make_schedule(DiffusionConfig())


def marginal_std(level: NoiseLevel) -> float:
    return math.hypot(level.alpha * STD, level.sigma)


def exact_x0(z: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
    """E[z_target | z_t]: z_t minus sigma times the exact epsilon, over alpha."""
    epsilon = level.sigma * (z - level.alpha * MEAN) / marginal_std(level) ** 2
    return (z - level.sigma * epsilon) / level.alpha


def exact_network(objective: str):
    """The same as a network: it is told the time step alone."""

    def predict(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        level = SCHEDULE.level(float(t[0]))
        x0 = exact_x0(z, level)
        epsilon = (z - level.alpha * x0) / level.sigma
        return {"epsilon": epsilon, "x0": x0, "v": level.alpha * epsilon - level.sigma * x0}[objective]

    return predict


def start(count: int, seed: int = 0) -> torch.Tensor:
    """Float32 samples of the exact marginal at T, of exactly its mean and standard deviation."""
    level = SCHEDULE.level(999)
    noise = torch.randn(1, 1, count, generator=torch.Generator().manual_seed(seed))
    noise = (noise - noise.mean()) / noise.std()
    return level.alpha * MEAN + marginal_std(level) * noise


DETERMINISTIC = {
    "ddim": (lambda z, levels: ddim(exact_x0, z, levels, torch.Generator()), 2.0),
    "dpm-solver++": (lambda z, levels: dpm_solver_pp(exact_x0, z, levels), 4.0),
}


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_sampler_keeps_the_mean_at_ten_steps(name):
    run, _ = DETERMINISTIC[name]
    z = run(start(100_000), place_steps(SCHEDULE, 10, PLACEMENT[name]))
    assert z.dtype == torch.float32
    assert float(z.mean()) == pytest.approx(MEAN, rel=0.005)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_against_the_exact_probability_flow(name):
    """The error falls 2 or 4 times (order 1, 2) as steps double from 40 on."""
    run, expected = DETERMINISTIC[name]
    z = torch.linspace(-3, 3, 61, dtype=torch.float64).view(1, 1, -1)
    errors = []
    for steps in (40, 80, 160):
        levels = place_steps(SCHEDULE, steps, "log-snr", to_clean=False)
        first, last = levels[0], levels[-1]
        exact = last.alpha * MEAN + marginal_std(last) / marginal_std(first) * (z - first.alpha * MEAN)
        errors.append(float((run(z, levels) - exact).abs().max()))
    ratios = [coarse / fine for coarse, fine in pairwise(errors)]
    assert ratios == pytest.approx([expected, expected], rel=0.1)


def test_default_few_step_sampler_has_the_right_spread_at_ten_steps():
    z = dpm_solver_pp(exact_x0, start(100_000), place_steps(SCHEDULE, 10, "karras"))
    assert float(z.std()) == pytest.approx(STD, rel=0.02)


def test_ddpm_has_the_right_mean_and_spread_over_the_whole_chain():
    levels = place_steps(SCHEDULE, 1000, "trailing")
    assert [level.t for level in levels[:-1]] == list(range(999, -1, -1))
    z = ddpm(exact_x0, start(40_000), levels, torch.Generator().manual_seed(1))
    assert float(z.mean()) == pytest.approx(MEAN, rel=0.01)
    assert float(z.std()) == pytest.approx(STD, rel=0.02)


def test_ddim_with_eta_one_ends_low_by_what_the_smaller_posterior_variance_loses():
    """Its linear recursion in closed form: 2.9 % below the target's standard deviation at 1000 steps."""
    levels = place_steps(SCHEDULE, 1000, "trailing")
    variance = marginal_std(levels[0]) ** 2
    for now, to in pairwise(levels):
        posterior = (to.sigma / now.sigma) ** 2 * (1 - (now.alpha / to.alpha) ** 2)
        shrink = now.alpha * STD**2 / marginal_std(now) ** 2  # slope of the exact x0
        slope = (now.alpha / to.alpha) * (to.sigma / now.sigma) ** 2
        slope += to.alpha * (1 - (now.alpha / to.alpha) ** 2) / now.sigma**2 * shrink
        variance = slope**2 * variance + posterior
    assert math.sqrt(variance) == pytest.approx(0.971 * STD, rel=1e-3)
    z = ddim(exact_x0, start(40_000), levels, torch.Generator().manual_seed(1), eta=1.0)
    assert float(z.std()) == pytest.approx(math.sqrt(variance), rel=0.015)


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7, 1.0])
def test_a_step_of_ddim_is_equation_12_with_the_noise_of_equation_16(eta):
    """Song et al. 2021, whose alpha is alphas_cumprod: written out in numpy for one step between any two levels."""
    now, to = SCHEDULE.level(700), SCHEDULE.level(310.5)
    z = torch.linspace(-3, 3, 61, dtype=torch.float64).view(1, 1, -1)
    drawn_from, unused = (torch.Generator().manual_seed(4) for _ in range(2))
    got = ddim(exact_x0, z, [now, to], drawn_from, eta=eta)
    assert torch.equal(drawn_from.get_state(), unused.get_state()) is (eta == 0), "without noise, none is drawn"
    noise = draw_noise(z, unused).double().numpy()
    kept_now, kept_to = now.alpha**2, to.alpha**2
    std = eta * math.sqrt((1 - kept_to) / (1 - kept_now)) * math.sqrt(1 - kept_now / kept_to)
    x0 = exact_x0(z, now).numpy()
    epsilon = (z.numpy() - math.sqrt(kept_now) * x0) / math.sqrt(1 - kept_now)
    wanted = math.sqrt(kept_to) * x0 + math.sqrt(1 - kept_to - std**2) * epsilon + std * noise
    np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("objective", VARIANCE_PRESERVING)
@pytest.mark.parametrize("sampler", ["dpm-solver++", "ddim"])
def test_sample_gives_the_loop_whatever_the_objective(objective, sampler):
    """A network that is told fractional time steps alone gives what exact levels give, to float32's rounding of t."""
    config = DiffusionConfig(objective=objective)
    z_start = torch.zeros(1, 1, 10, 10, 10)
    z = sample(
        exact_network(objective),
        config=config,
        schedule=SCHEDULE,
        sampler=sampler,
        num_inference_steps=10,
        z_start=z_start,
        generator=torch.Generator().manual_seed(0),
    )
    run, _ = DETERMINISTIC[sampler]
    noise = draw_noise(z_start, torch.Generator().manual_seed(0))
    expected = run(noise, place_steps(SCHEDULE, 10, PLACEMENT[sampler]))
    torch.testing.assert_close(z, expected, atol=2e-4, rtol=0)


def test_karras_steps_follow_equation_5():
    levels = place_steps(SCHEDULE, 10, "karras")
    ratios = np.array([level.sigma / level.alpha for level in levels[:-1]])
    np.testing.assert_allclose(np.diff(ratios ** (1 / 7), n=2), 0, atol=1e-9)
    assert [levels[0].t, levels[9].t] == pytest.approx([999, 0], abs=1e-6)
    assert levels[10].sigma == 0
    assert any(level.t != round(level.t) for level in levels)


@pytest.mark.parametrize("to_clean", [True, False])
def test_log_snr_steps_are_uniform_in_log_snr_from_the_last_step_to_the_first(to_clean: bool) -> None:
    *levels, last = place_steps(SCHEDULE, 10, "log-snr", to_clean=to_clean)
    assert (last.sigma == 0) is to_clean
    levels += [] if to_clean else [last]
    log_ratios = np.array([math.log(level.alpha / level.sigma) for level in levels])
    np.testing.assert_allclose(log_ratios, np.linspace(log_ratios[0], log_ratios[-1], 10 + (not to_clean)), atol=1e-9)
    assert [levels[0].t, levels[-1].t] == pytest.approx([999, 0], abs=1e-6)


def test_regression_is_one_evaluation_at_the_start():
    seen = []

    def predict(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append((z, t))
        return 3 * z

    z_start = torch.full((2, 3, 4, 4, 4), 0.7)  # not what any generator draws
    result = sample(
        predict,
        config=DiffusionConfig(objective="regression"),
        schedule=SCHEDULE,
        sampler="one-step",
        num_inference_steps=1,
        z_start=z_start,
        generator=torch.Generator().manual_seed(0),
    )
    assert torch.equal(result, 3 * z_start)
    [(z, t)] = seen
    assert torch.equal(z, z_start)
    assert t.tolist() == [999.0, 999.0]


def test_one_step_of_x0_is_the_exact_conditional_mean():
    level = SCHEDULE.level(999)
    z_start = torch.zeros(1, 1, 10, 10, 10)
    z = sample(
        exact_network("x0"),
        config=DiffusionConfig(objective="x0"),
        schedule=SCHEDULE,
        sampler="one-step",
        num_inference_steps=1,
        z_start=z_start,
        generator=torch.Generator().manual_seed(0),
    )
    torch.testing.assert_close(z, exact_x0(draw_noise(z_start, torch.Generator().manual_seed(0)), level))


@pytest.mark.parametrize("sampler", ["dpm-solver++", "ddim", "ddpm"])
def test_zero_terminal_snr_chain_has_the_target_mean(sampler):
    """The start carries nothing of the image: v and x0 begin at pure noise and stay finite."""
    config = DiffusionConfig(objective="v", zero_terminal_snr=True)
    schedule = make_schedule(config)

    def predict(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        level = schedule.level(float(t[0]))
        x0 = exact_x0(z, level)
        return level.alpha * (z - level.alpha * x0) / level.sigma - level.sigma * x0

    z = sample(
        predict,
        config=config,
        schedule=schedule,
        sampler=sampler,
        num_inference_steps=50,
        z_start=torch.zeros(1, 1, 40, 40, 40),
        generator=torch.Generator().manual_seed(0),
    )
    assert float(z.mean()) == pytest.approx(MEAN, rel=0.01)


STOCHASTIC = [("epsilon", "ddpm", 5, 0.0), ("v", "ddim", 5, 0.5)]


@pytest.mark.parametrize(("objective", "sampler", "steps", "eta"), STOCHASTIC)
def test_same_seed_same_result_and_other_seed_another(objective, sampler, steps, eta):
    def draw(seed: int) -> torch.Tensor:
        return sample(
            lambda z, t: 0.5 * z,
            config=DiffusionConfig(objective=objective),
            schedule=SCHEDULE,
            sampler=sampler,
            num_inference_steps=steps,
            z_start=torch.ones(1, 1, 3, 3, 3),
            generator=torch.Generator().manual_seed(seed),
            eta=eta,
        )

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize(("objective", "sampler"), [(o, s) for o in ("x0", "regression") for s in allowed_samplers(o)])
def test_on_step_counts_evaluations_and_may_cancel(objective, sampler):
    steps = 1 if sampler == "one-step" else 3
    calls: list[tuple[int, int]] = []

    def run(on_step) -> None:
        sample(
            lambda z, t: z,
            config=DiffusionConfig(objective=objective),
            schedule=SCHEDULE,
            sampler=sampler,
            num_inference_steps=steps,
            z_start=torch.ones(1, 1, 2, 2, 2),
            generator=torch.Generator(),
            on_step=on_step,
        )

    run(lambda done, total: calls.append((done, total)))
    assert calls == [(i + 1, steps) for i in range(steps)]

    def cancel(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(cancel)


@pytest.mark.parametrize(
    ("objective", "values", "message"),
    [
        ("epsilon", {"sampler": "one-step", "num_inference_steps": 1}, "takes dpm-solver"),
        ("regression", {"sampler": "ddim", "num_inference_steps": 1}, "takes one-step"),
        ("v", {"sampler": "euler", "num_inference_steps": 1}, "is not a sampler"),
        ("v", {"sampler": "ddim", "num_inference_steps": 0}, "wanted 1 to 1000"),
        ("v", {"sampler": "ddim", "num_inference_steps": 1001}, "wanted 1 to 1000"),
        ("regression", {"sampler": "one-step", "num_inference_steps": 2}, "wanted 1 to 1"),
        ("v", {"sampler": "ddim", "num_inference_steps": 5, "eta": 1.5}, "eta"),
        ("v", {"sampler": "ddim", "num_inference_steps": 5, "num_samples": 0}, "num_samples"),
        ("regression", {"sampler": "one-step", "num_inference_steps": 1, "num_samples": 2}, "one answer"),
    ],
)
def test_what_cannot_work_is_refused_with_the_way_out(objective, values, message):
    with pytest.raises(UserError, match=message):
        check_sampling(DiffusionConfig(objective=objective), **values)


def test_a_sample_that_cannot_work_is_not_begun():
    asked = []
    with pytest.raises(UserError, match="one-step"):
        sample(
            lambda z, t: asked.append(t),
            config=DiffusionConfig(),
            schedule=SCHEDULE,
            sampler="one-step",
            num_inference_steps=1,
            z_start=torch.zeros(1, 1, 2, 2, 2),
            generator=torch.Generator(),
        )
    assert not asked


def test_several_samples_give_mean_and_standard_deviation_of_each_of_a_batch():
    def one(generator: torch.Generator) -> torch.Tensor:
        return 2 + 3 * torch.randn(1, 2, 2, 2, generator=generator)

    def draw(generators: Sequence[torch.Generator]) -> torch.Tensor:
        return torch.stack([one(generator) for generator in generators])

    mean, std = sample_many(draw, 5, seeds=[7, 31])
    for index, seed in enumerate((7, 31)):
        samples = torch.stack([one(torch.Generator().manual_seed(seed + i)) for i in range(5)])
        torch.testing.assert_close(mean[index], samples.mean(0))
        torch.testing.assert_close(std[index], samples.std(0))
    alone, nothing = sample_many(draw, 1, seeds=[7])
    assert torch.equal(alone[0], one(torch.Generator().manual_seed(7)))
    assert nothing is None


def test_noise_of_a_sample_does_not_depend_on_its_neighbours():
    like = torch.zeros(2, 3, 4, 5, 6)
    both = draw_noise(like, [torch.Generator().manual_seed(seed) for seed in (5, 9)])
    for index, seed in enumerate((5, 9)):
        assert torch.equal(both[index : index + 1], draw_noise(like[:1], torch.Generator().manual_seed(seed)))
