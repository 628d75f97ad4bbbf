"""How a model samples where not everything is said: its own sampler, and numbers that suit the sampler."""

from dataclasses import replace

from aldm.config import RENAMED_VALUES, Config, SamplingConfig
from aldm.errors import UserError
from aldm.sampling import check_sampling

OTHER_SAMPLER_STEPS = 10
"""Steps of a sampler that is not the configured one."""


def choose_sampling(
    config: Config,
    kind: str,
    sampler: str | None = None,
    num_inference_steps: int | None = None,
    num_samples: int | None = None,
    eta: float | None = None,
) -> SamplingConfig:
    """Return how a model samples, the unsaid filled in: its own sampler, and numbers that suit the sampler.

    The name of a sampler of before is read as that of now, as in a configuration.

    Raises:
        UserError: a sampler or number that the model's objective cannot be integrated with.
    """
    base, diffusion = config.sampling, config.diffusion
    samples = base.num_samples if num_samples is None else num_samples
    if kind != "aldm":
        if samples != 1 or sampler is not None or num_inference_steps not in (None, 1) or eta:
            raise UserError(
                f"a {kind} model has one answer and no sampler: leave out `sampler`, `num_inference_steps`, "
                "`num_samples` and `eta`"
            )
        return replace(base, num_inference_steps=1, num_samples=1, eta=0.0)
    name = base.sampler if sampler is None else sampler
    name = RENAMED_VALUES.get(("sampling.sampler", name), {}).get("sampler", name)
    if num_inference_steps is not None:
        steps = num_inference_steps
    elif name == "one-step":
        steps = 1
    elif name == base.sampler:
        steps = base.num_inference_steps
    else:
        steps = diffusion.num_train_timesteps if name == "ddpm" else OTHER_SAMPLER_STEPS
    if eta is None:
        eta = base.eta
    check_sampling(diffusion, name, steps, samples, eta)
    return SamplingConfig(sampler=name, num_inference_steps=steps, num_samples=samples, eta=eta)
