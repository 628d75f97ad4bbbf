"""Trainings that run one after the other in the same Ray Train workers; used by test_engines.py."""

from dataclasses import replace
from pathlib import Path
from typing import Any


def curves(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return, on rank 0, {log: records, weights: exported arrays} of every task."""
    import torch

    torch.set_num_threads(1)
    return [curve(**task) for task in settings["tasks"]]


def curve(
    stage: str, engine: str, inputs: dict[str, str], training: dict[str, Any], folder: str, resume: str | None = None
) -> dict[str, Any]:
    """Train a stage with an engine; its checkpoints go to folder/step.

    Args:
        stage: vqgan or diffusion.
        engine: plain, ddp or zero-0 to zero-3.
        inputs: paths by flag name.
        training: changes of the tiny preset's section.
        folder: for the checkpoints, shared by all ranks.
        resume: checkpoint to go on from.
    """
    from safetensors.numpy import load_file

    from aldm.training import fit

    built, section = make_stage(stage, inputs, training)
    resume_from = None if resume is None else Path(resume)
    made = make_engine(engine, section.batch_size, resume_from)
    logged: list[dict[str, Any]] = []

    def save(snapshot: Any) -> None:
        path = Path(folder) / str(snapshot.step)
        path.mkdir(exist_ok=True, parents=True)
        snapshot.write(path)

    result = fit(built, made, section, seed=0, on_log=logged.append, on_checkpoint=save, resume_from=resume_from)
    weights = load_file(Path(folder) / str(result.step) / "weights.safetensors") if made.rank == 0 else {}
    return {"log": logged, "weights": weights}


def make_stage(stage: str, inputs: dict[str, str], training: dict[str, Any]) -> tuple[Any, Any]:
    """Return the stage of the changed tiny preset and its section of the configuration."""
    import argparse

    from aldm.presets import tiny
    from pipelines.train import build_stage

    section = f"train_{stage}"
    config = replace(tiny(), **{section: replace(getattr(tiny(), section), **training)})
    paths = argparse.Namespace(**{name: Path(path) for name, path in inputs.items()})
    built, _ = build_stage(stage, config, paths)
    return built, getattr(built.config, section)


def make_engine(name: str, batch_size: int, resume_from: Path | None) -> Any:
    """Return plain, ddp or zero-N."""
    from aldm.engine import PlainEngine
    from pipelines.engines import DDPEngine, DeepSpeedEngine

    if name == "plain":
        return PlainEngine()
    if name == "ddp":
        return DDPEngine()
    return DeepSpeedEngine(zero_stage=int(name[-1]), batch_size=batch_size, resume_from=resume_from)
