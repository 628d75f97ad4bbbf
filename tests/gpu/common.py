"""What the measures of the GPU check share: the setting, clocks, memory, inputs."""

import contextlib
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from apart import Row
from torch import nn

from aldm.config import Config
from aldm.data.volume import Volume
from aldm.models.codecs import build_codec
from aldm.planner import with_modalities
from aldm.predictors import build_predictor
from aldm.translate import Translator


@dataclass(frozen=True)
class Setting:
    """Where and at what size to measure.

    Attributes:
        device: cuda or cpu.
        config: brats(), or tiny() for a look at the code.
        warm_up: repetitions after the first and before the clock counts.
        seconds: how long a timed loop may take, once warm.
        most: the most repetitions of it.
        compiled: whether to try torch.compile, which takes a C compiler and a minute.
    """

    device: str
    config: Config
    warm_up: int
    seconds: float
    most: int
    compiled: bool


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


class Peak:
    """The most memory that a block holds beyond what was held before: tensors of a GPU, or this process on a CPU."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        if self._cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
            self._before = _status("VmRSS")

    def row(self) -> Row:
        """Return the figures so far, bytes; `reserved_bytes` is what torch took from the driver for them."""
        if not self._cuda:
            return {"peak_bytes": max(_status("VmHWM") - self._before, 0)}
        return {
            "peak_bytes": torch.cuda.max_memory_allocated() - self._before,
            "reserved_bytes": torch.cuda.max_memory_reserved(),
        }


def _status(key: str) -> int:
    match = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None, key
    return int(match[1]) * 1024


def timed(setting: Setting, run: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds of the first call, and the median of those after the warm-up."""
    seconds = []
    for index in range(1 + setting.warm_up + setting.most):
        synchronize(setting.device)
        begin = time.perf_counter()
        run()
        synchronize(setting.device)
        seconds.append(time.perf_counter() - begin)
        if index > setting.warm_up and sum(seconds[1 + setting.warm_up :]) > setting.seconds:
            break
    return seconds[0], statistics.median(seconds[1 + setting.warm_up :])


@contextlib.contextmanager
def tf32(enabled: bool) -> Iterator[None]:
    """Let matrix products and convolutions of fp32 round their inputs to TF32, or not."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = enabled
    try:
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


def ball(config: Config) -> Volume:
    """Return a volume on the model's own grid: a ball with a gradient and noise, zero outside."""
    shape, spacing = config.preprocess.spatial_shape, config.preprocess.spacing_mm
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, side) for side in shape), indexing="ij")
    noise = np.random.default_rng(0).normal(0, 30, shape)
    data = np.where(x**2 + y**2 + z**2 < 0.8, 500 + 200 * x + noise, 0)
    return Volume(data.astype(np.float32), np.diag([*spacing, 1.0]))


def untrained(config: Config, device: str) -> Translator:
    """Return a translator of random weights."""
    config = with_modalities(config)
    channels = build_codec(config.codec).latent_channels
    torch.manual_seed(0)
    meta = {"latents": {"mean": [0.0] * channels, "std": [1.0] * channels}}
    percentiles = dict.fromkeys(config.modalities, (0.0, 1000.0))
    predictor = build_predictor("aldm", config, meta)
    fill_zeros(predictor)
    return Translator(
        predictor, config, kind="aldm", median_percentiles=percentiles, model_hash="untrained", device=device
    )


@torch.no_grad()
def fill_zeros(module: nn.Module) -> None:
    """Give parameters that start as zeros random values: a network that outputs 0 says nothing about rounding."""
    for parameter in module.parameters():
        if not parameter.any():
            parameter.normal_(0, 0.02)
