"""Seconds and memory of every training's step and of a whole translation, beside what the planner expects.

Each measure yields rows as it goes, so that one that is stopped keeps what it had.
"""

import contextlib
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from common import Peak, Row, Setting, ball, synchronize, tf32, timed, untrained
from torch import Tensor

from aldm.config import Config, training_of
from aldm.engine import PlainEngine
from aldm.planner import plan_memory, stage_and_batch, with_modalities
from aldm.players import Stage
from aldm.training import fit

NEVER = 10**9


def machine(setting: Setting) -> Iterator[Row]:
    """The device, and the rate that a large matrix product reaches there in each arithmetic."""
    row: Row = {"what": "device", "torch": torch.__version__, "device": setting.device}
    if setting.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        row |= {"name": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
        row |= {"cudnn": torch.backends.cudnn.version()}
    yield row
    side = 8192 if setting.device == "cuda" else 256
    for name in ("fp32", "tf32", "bf16"):
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        with tf32(name == "tf32"):
            a = torch.randn(side, side, device=setting.device).to(dtype)
            _, seconds = timed(setting, lambda a=a: a @ a)
        yield {"what": f"matrix product, {name}", "arithmetic": name, "flops_per_second": 2 * side**3 / seconds}


class _Enough(Exception):
    """Ends a training whose steps have been timed."""


@dataclass
class FixedSamples:
    """One sample of random numbers in memory, again and again: reading data is not measured."""

    tensors: dict[str, Any]
    length: int

    def __len__(self) -> int:
        return self.length

    def sample(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        return self.tensors | {"subject_id": str(index)}


@dataclass
class Clock:
    """Notes the time at the end of every step of a training, and ends it when enough steps were seen."""

    setting: Setting
    times: list[float] = field(default_factory=list)

    def watch(self, engine: PlainEngine, stage: Stage) -> None:
        """Note the end of the last player's turn."""
        step, last = engine.step, stage.players[-1].name

        def noted(player: Any, rate: float) -> Tensor:
            norm = step(player, rate)
            if player.name == last:
                synchronize(self.setting.device)
                self.times.append(time.perf_counter())
                counted = len(self.times) - self.setting.warm_up - 1
                if counted >= self.setting.most or (counted > 0 and self.elapsed() > self.setting.seconds):
                    raise _Enough
            return norm

        engine.step = noted  # type: ignore[method-assign]

    def elapsed(self) -> float:
        """Return the time of the steps that count."""
        return self.times[-1] - self.times[self.setting.warm_up]

    def seconds(self) -> list[float]:
        """Return how long each step that counts took."""
        counted = self.times[self.setting.warm_up :]
        return [after - before for before, after in pairwise(counted)]


def training_setup(config: Config, name: str) -> tuple[Config, Stage]:
    """Return a configuration in which every player plays from the first step, and the stage with random samples."""
    config = with_modalities(config)
    part = {"vqgan": "train_vqgan", "ms-spade": "train_ms_spade", "diffusion": "train_diffusion", "unet": "train_unet"}
    training = replace(
        training_of(config, name),
        adversarial_start_step=0,
        max_steps=NEVER,
        max_minutes=None,
        log_every=NEVER,
        validate_every=NEVER,
        checkpoint_every=NEVER,
    )
    config = replace(config, **{part[name]: training})
    torch.manual_seed(0)
    ids = {"source": 0, "target": 1, "flip": 0}
    batch_ids = {key: torch.full((training.batch_size,), value) for key, value in ids.items()}
    stage, _, batch, _ = stage_and_batch(config, name, training, batch_ids)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        key: torch.randn(value.shape[1:], generator=generator).clamp(-1, 1)
        for key, value in batch.items()
        if isinstance(value, Tensor) and key not in ids
    }
    stage.samples = lambda split: FixedSamples(tensors | ids, 2 if split == "train" else 0)  # type: ignore[method-assign]
    return config, stage


def training_step(setting: Setting, name: str) -> Iterator[Row]:
    """Seconds a step, samples a second and peak memory of a stage, beside what the planner expects."""
    peak = Peak(setting.device)
    config, stage = training_setup(setting.config, name)
    training = training_of(config, name)
    engine, clock = PlainEngine(setting.device, config.precision), Clock(setting)
    clock.watch(engine, stage)
    begin = time.perf_counter()
    with contextlib.suppress(_Enough):
        fit(stage, engine, training, seed=0, on_log=lambda _: None, on_checkpoint=lambda _: None)
    memory = peak.row()
    steps = clock.seconds()
    seconds = statistics.median(steps)
    planned = plan_memory(config, name)
    yield {
        "what": f"{name}, a step of {planned.batch_size} x {' x '.join(map(str, planned.shape))}, {config.precision}",
        "arithmetic": config.precision,
        "num_steps": len(steps),
        "first_seconds": clock.times[0] - begin,
        "seconds": seconds,
        "samples_per_second": training.batch_size / seconds,
        "flops": planned.flops,
        "planned_bytes": planned.peak_bytes,
        **memory,
    }


def translation(setting: Setting, codec: str) -> Iterator[Row]:
    """Seconds and peak memory of one whole volume through an untrained model."""
    config = with_modalities(setting.config)
    config = replace(config, codec=replace(config.codec, kind=codec))
    planned = plan_memory(config, "inference")
    peak = Peak(setting.device)
    translator = untrained(config, setting.device)
    volume = ball(config)
    source, target = config.modalities[:2]
    shape = " x ".join(map(str, volume.data.shape))
    row = {"what": f"translate {shape}, codec {codec}, {config.precision}", "arithmetic": config.precision}
    for run in ("first_seconds", "seconds"):
        begin = time.perf_counter()
        result = translator.translate(volume, source, target)
        row[run] = time.perf_counter() - begin
    finite = bool(np.isfinite(result.volume.data).all())
    yield {
        **row,
        "num_inference_steps": config.sampling.num_inference_steps,
        "finite": finite,
        "flops": planned.flops,
        "planned_bytes": planned.peak_bytes,
        **peak.row(),
    }
