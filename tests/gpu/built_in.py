"""The built-in model's training on this device, by the library alone: simulated heads, haar latents, two stages.

The data are those of aldm/default_model/make.sh; the trainings take the minutes that they are given instead of steps.
"""

import os
import shutil
import tempfile
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from common import Row, Setting

from aldm.checkpoint import Checkpoint, load_checkpoint, load_weights, save_checkpoint
from aldm.config import TrainingConfig
from aldm.data.phantom import write_phantom
from aldm.data.preparing import prepare_store
from aldm.denoising import build_ms_spade
from aldm.engine import PlainEngine
from aldm.latents import encode_store
from aldm.models.codecs import build_codec
from aldm.players import Snapshot, Stage
from aldm.presets import small
from aldm.stages import DiffusionStage, MSSpadeStage
from aldm.training import fit

SEED = 7
SPACING_MM, SHAPE = 2.0, (88, 112, 88)
SPLITS = {"train": 130, "validation": 6, "test": 14}
STAGE_2_SHARE = 0.1
MOST_STEPS = 10**6


def train_built_in(setting: Setting, out: Path, minutes: float) -> Iterator[Row]:
    """Train stages 2 and 3 for `minutes` together and write the translator folder out/model."""
    config, splits, spacing = small(), SPLITS, SPACING_MM
    config = replace(
        config,
        preprocess=replace(config.preprocess, spacing_mm=(spacing,) * 3, spatial_shape=SHAPE),
        diffusion=replace(config.diffusion, any_sources=True),
    )
    if setting.device == "cpu":
        splits, spacing = {"train": 2, "validation": 1}, 8.0
        tiny = setting.config
        config = replace(config, preprocess=tiny.preprocess, unet=tiny.unet, ms_spade=tiny.ms_spade)
    subjects = sum(splits.values())
    processes = min(os.cpu_count() or 1, subjects)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        names = write_phantom(data / "heads", "heads", subjects, seed=SEED, spacing_mm=spacing, num_processes=processes)
        split_of = [split for split, number in splits.items() for _ in range(number)]
        lines = [f"{name},{split}\n" for name, split in zip(names, split_of, strict=True)]
        (data / "splits.csv").write_text("".join(["subject_id,split\n", *lines]))
        store = prepare_store(
            data / "heads",
            data / "store",
            layout="brats",
            config=config.preprocess,
            splits=data / "splits.csv",
            num_processes=processes,
        )
        codec = build_codec(config.codec)
        latents = encode_store(store, codec, config.codec, data / "latents", device=setting.device, flips=True)
        yield {"what": f"{subjects} simulated subjects at {spacing:g} mm"}
        config = replace(config, modalities=latents.modalities)
        config = replace(
            config,
            train_ms_spade=_for(config.train_ms_spade, STAGE_2_SHARE * minutes),
            train_diffusion=_for(config.train_diffusion, (1 - STAGE_2_SHARE) * minutes),
        )
        torch.manual_seed(SEED)
        stage_2 = yield from _train(MSSpadeStage(config, latents), config.train_ms_spade, setting, data / "stage-2")
        ms_spade = build_ms_spade(config, latents.latent_channels)
        load_weights(ms_spade, stage_2.weights, "stage 2")
        stage = DiffusionStage(config, latents, ms_spade, stage_2.hash)
        stage_3 = yield from _train(stage, config.train_diffusion, setting, data / "stage-3")
        _write(out / "model", stage_3, {"codec": codec.state_dict(), "ms_spade": stage_2.weights})
    yield {"what": f"a translator folder: {out / 'model'}"}


def _for(training: TrainingConfig, minutes: float) -> TrainingConfig:
    """Return a training that takes so long, with its adversary starting after the same share of the steps."""
    assert training.max_steps is not None
    start = round(training.adversarial_start_step / training.max_steps * MOST_STEPS)
    return replace(training, max_minutes=minutes, max_steps=MOST_STEPS, adversarial_start_step=start)


def _train(stage: Stage, training: TrainingConfig, setting: Setting, folder: Path) -> Generator[Row, None, Checkpoint]:
    """Train a stage; yield how it went and return its best checkpoint."""

    def keep(snapshot: Snapshot) -> None:
        if snapshot.is_best or not folder.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            snapshot.write(folder)

    engine = PlainEngine(setting.device, stage.config.precision)
    result = fit(stage, engine, training, seed=SEED, on_log=lambda _: None, on_checkpoint=keep)
    yield {
        "what": f"{stage.name}: {result.step:,} steps in {training.max_minutes:g} min, {stage.score} {result.best:.2f}",
        "num_steps": result.step,
        "best": result.best,
    }
    return load_checkpoint(folder)


def _write(folder: Path, stage_3: Checkpoint, parts: dict[str, dict[str, torch.Tensor]]) -> None:
    networks = parts | {"unet": stage_3.weights}
    weights = {f"{part}.{name}": tensor for part, state in networks.items() for name, tensor in state.items()}
    latents = stage_3.meta["latents"]
    meta = {"latents": latents, "data": latents["data"]}
    shutil.rmtree(folder, ignore_errors=True)
    save_checkpoint(folder, kind="aldm", config=stage_3.config, weights=weights, meta=meta)
