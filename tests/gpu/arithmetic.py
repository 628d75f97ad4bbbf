"""What number formats, memory layouts and compilation do to speed and result; whether the GPU agrees with the CPU."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from common import Peak, Row, Setting, ball, fill_zeros, tf32, timed, untrained
from speed import training_setup
from torch import Tensor, nn

from aldm.config import Config, training_of
from aldm.default_model import default_model
from aldm.denoising import build_denoiser
from aldm.engine import PlainEngine
from aldm.models.codecs import build_codec
from aldm.planner import PLANNED_TRAININGS, with_modalities
from aldm.presets import tiny
from aldm.training import fit
from aldm.translate import Translator

ARITHMETICS = ("fp32", "tf32", "bf16", "bf16 cudnn.benchmark", "bf16 channels_last_3d", "bf16 torch.compile")
LOSS_TOLERANCE = 1e-3
"""Largest relative difference of a first step's losses and gradient norms between GPU and CPU, both in fp32."""
MEAN_TOLERANCE = {"fp32": 1e-3, "bf16": 1e-2}
"""Largest mean difference of a translation on the GPU from the CPU's in fp32, as a share of its range.

A mean, since a latent that lies between two codes may take the other one.
"""


def arithmetic(setting: Setting, part: str) -> Iterator[Row]:
    """Forward and backward pass of the denoiser or the encoder in every arithmetic: seconds, difference to fp32."""
    config = with_modalities(setting.config)
    torch.manual_seed(0)
    module, inputs = _denoiser(config) if part == "denoiser" else _encoder(config)
    fill_zeros(module)
    module, inputs = module.to(setting.device), {name: x.to(setting.device) for name, x in inputs.items()}
    plain: Tensor | None = None
    for name in ARITHMETICS if setting.compiled else ARITHMETICS[:-1]:
        peak = Peak(setting.device)
        first, seconds, result = _passes(setting, name, module, inputs)
        plain = result if plain is None else plain
        yield {
            "what": f"{part}, {name}",
            "first_seconds": first,
            "seconds": seconds,
            "difference": float((result - plain).abs().max() / plain.abs().max()),
            **peak.row(),
        }


def _passes(setting: Setting, name: str, module: nn.Module, inputs: dict[str, Tensor]) -> tuple[float, float, Tensor]:
    """Return the seconds of the first and of a typical pass, and the output on the CPU."""
    layout = torch.channels_last_3d if "channels_last_3d" in name else torch.contiguous_format
    module.to(memory_format=layout)
    inputs = {name: x.to(memory_format=layout) if x.dim() == 5 else x for name, x in inputs.items()}
    run: Callable[..., Any] = torch.compile(module) if "compile" in name else module
    output = torch.empty(0)

    def both() -> None:
        nonlocal output
        with torch.autocast(setting.device, torch.bfloat16, enabled="bf16" in name):
            y = run(**inputs)
        y.float().square().mean().backward()
        module.zero_grad(set_to_none=True)
        output = y.detach()

    torch.backends.cudnn.benchmark = "benchmark" in name
    with tf32(name == "tf32"):
        first, seconds = timed(setting, both)
    torch.backends.cudnn.benchmark = False
    return first, seconds, output.float().cpu()


def _denoiser(config: Config) -> tuple[nn.Module, dict[str, Tensor]]:
    codec = build_codec(config.codec)
    sides = [side // codec.downsampling for side in config.preprocess.spatial_shape]
    module = build_denoiser(config, codec.latent_channels)
    inputs = module.example_inputs(sides)
    return module, {name: torch.randn_like(x) if x.dim() == 5 else x for name, x in inputs.items()}


def _encoder(config: Config) -> tuple[nn.Module, dict[str, Tensor]]:
    shape = config.train_vqgan.crop or config.preprocess.spatial_shape
    return build_codec(config.codec).encoder, {"input": torch.randn(1, 1, *shape)}


# ---------------------------------------------------------------------------------------------------------- agreement


def agreement(setting: Setting) -> Iterator[Row]:
    """Results on the device beside those of the CPU, at small sizes: a step of every stage, translations."""
    with tf32(False):
        for name in PLANNED_TRAININGS:
            here, there = (_first_step(name, device) for device in (setting.device, "cpu"))
            worst = max(abs(here[key] - there[key]) / max(abs(there[key]), 1e-6) for key in there)
            what = f"{name}, losses and gradient norms of a step, {len(there)} values"
            yield {"what": what, "difference": worst, "tolerance": LOSS_TOLERANCE}
        for kind in ("vqgan", "haar"):
            config = with_modalities(replace(tiny(), codec=replace(tiny().codec, kind=kind)))
            here, there = (_translated(untrained(config, device)) for device in (setting.device, "cpu"))
            yield _compared(f"translate, tiny, codec {kind}", "fp32", here, there)
        there = _translated(Translator.load(default_model(), precision="fp32"))
        for precision in ("fp32", "bf16") if setting.device == "cuda" else ("fp32",):  # bf16 is slow on many CPUs
            here = _translated(Translator.load(default_model(), setting.device, precision=precision))
            yield _compared("translate, the built-in model", precision, here, there)


def _first_step(name: str, device: str) -> dict[str, float]:
    """Return what the first step of a training logs."""
    config, stage = training_setup(tiny(), name)
    training = replace(training_of(config, name), max_steps=1)
    logged: dict[str, Any] = {}
    fit(stage, PlainEngine(device), training, seed=0, on_log=logged.update, on_checkpoint=lambda _: None)
    return {key: float(value) for key, value in logged.items() if key.endswith(("loss", "norm", "l1"))}


def _translated(translator: Translator) -> np.ndarray:
    source, target = translator.modalities[:2]
    return translator.translate(ball(translator.config), source, target, intensity="unit").volume.data


def _compared(what: str, precision: str, here: np.ndarray, there: np.ndarray) -> Row:
    difference = np.abs(here - there)
    return {
        "what": f"{what}, {precision}, mean difference",
        "difference": float(difference.mean()),
        "largest_difference": float(difference.max()),
        "tolerance": MEAN_TOLERANCE[precision],
    }
