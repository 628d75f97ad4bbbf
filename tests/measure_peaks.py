"""Print, for each stage, the planned and the measured peak memory in bytes; run by test_planner.py in its own process.

Measured is the resident set's peak above what the process held before the stage was built. Freed blocks go back to the
system at once (MALLOC_MMAP_THRESHOLD_), or those of the stage before would hide what the next one allocates.
"""

import gc
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from aldm.baselines.regression_unet import RegressionStage
from aldm.config import Config, HaarUNetConfig
from aldm.denoising import build_denoiser, build_ms_spade
from aldm.engine import PlainEngine
from aldm.memory import release_freed_memory
from aldm.models.codecs import build_codec
from aldm.planner import PLANNED_TRAININGS, StandIn, plan_memory, training_of
from aldm.predictors import LatentDiffusion
from aldm.presets import tiny
from aldm.stages import DiffusionStage, MSSpadeStage, VQGANStage
from aldm.training import fit

SIDES = {"inference": (96, 48), "unet": (96, 96)}
"""Stage -> sides of volume and crop where those of the others would leave what the libraries keep as most of it."""


def small_config(precision: str, activation_checkpointing: bool, side: int, crop: int) -> Config:
    """Widths of 16 and 32, as oneDNN computes without falling back to matrix products, on small volumes."""
    base = tiny()
    quick = {"max_steps": 2, "batch_size": 1, "log_every": 10, "checkpoint_every": 10, "validate_every": 10}
    unet = replace(base.unet, channels=(16, 32), attention_levels=(), norm_groups=8)
    return replace(
        base,
        modalities=("t1", "t2"),
        precision=precision,
        activation_checkpointing=activation_checkpointing,
        preprocess=replace(base.preprocess, spatial_shape=(side, side, side)),
        codec=replace(base.codec, channels=(16, 16), norm_groups=8),
        ms_spade=replace(
            base.ms_spade, in_channels=16, res_channels=(16, 32), spade_channels=(32, 16), hidden_channels=16
        ),
        unet=unet,
        haar_unet=HaarUNetConfig(channels=(16, 32)),
        train_vqgan=replace(base.train_vqgan, crop=(crop, crop, crop), adversarial_start_step=0, **quick),
        train_ms_spade=replace(base.train_ms_spade, adversarial_start_step=0, **quick),
        train_diffusion=replace(base.train_diffusion, **quick),
        train_unet=replace(base.train_unet, crop=(crop, crop, crop), **quick),
    )


class RandomSamples:
    """Two training samples of the wanted shapes, none for validation."""

    def __init__(self, length: int, shapes: dict[str, tuple[int, ...]]) -> None:
        self.length, self.shapes = length, shapes

    def __len__(self) -> int:
        return self.length

    def sample(self, index: int, generator: torch.Generator) -> dict:
        tensors = {name: torch.randn(shape, generator=generator) for name, shape in self.shapes.items()}
        return tensors | {"source": 0, "target": 1, "flip": 0, "subject_id": str(index), "modality": "t1"}


def train(config: Config, name: str) -> None:
    """Two steps of a stage through the training loop itself."""
    codec = build_codec(config.codec)
    data = StandIn(config, codec)
    latent = (codec.latent_channels, *(side // codec.downsampling for side in config.preprocess.spatial_shape))
    training = training_of(config, name)
    if name == "vqgan":
        stage, shapes = VQGANStage(config, data), {"volume": (1, *training.crop)}
    elif name == "unet":
        stage, shapes = (
            RegressionStage(config, data),
            dict.fromkeys(("source_volume", "target_volume"), (1, *training.crop)),
        )
    else:
        shapes = dict.fromkeys(("z_source", "z_target"), latent)
        if name == "ms-spade":
            stage = MSSpadeStage(config, data)
        else:
            stage = DiffusionStage(config, data, build_ms_spade(config, codec.latent_channels), "")
    stage.samples = lambda split: RandomSamples(2 if split == "train" else 0, shapes)
    engine = PlainEngine("cpu", config.precision)
    fit(stage, engine, training, seed=0, on_log=lambda values: None, on_checkpoint=lambda snapshot: None)


@torch.inference_mode()
def translate(config: Config) -> None:
    """One volume through the whole pipeline."""
    codec = build_codec(config.codec)
    channels = codec.latent_channels
    networks = build_ms_spade(config, channels), build_denoiser(config, channels)
    predictor = LatentDiffusion(config, codec, *networks, torch.zeros(channels), torch.ones(channels)).eval()
    code = predictor.encode(torch.randn(1, 1, *config.preprocess.spatial_shape))
    predictor.predict(code, [(0,)], [1], config.sampling, [torch.Generator().manual_seed(0)], None)


def measured_peak(run: Callable[[], None]) -> int:
    """Return how far the resident set rises above its present size, bytes."""
    gc.collect()
    release_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    match = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match.group(1)) * 1024


def main() -> None:
    """Print {stage: [planned, measured]} as JSON."""
    precision, recompute = sys.argv[1], sys.argv[2] == "recompute"
    run = {stage: partial(train, name=stage) if stage in PLANNED_TRAININGS else translate for stage in sys.argv[3:]}
    for measured in run.values():  # loads the libraries' code
        measured(small_config(precision, recompute, 16, 16))
    results = {}
    for stage, measured in run.items():
        config = small_config(precision, recompute, *SIDES.get(stage, (64, 48)))
        results[stage] = plan_memory(config, stage).peak_bytes, measured_peak(partial(measured, config))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
