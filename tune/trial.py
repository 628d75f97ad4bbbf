"""One trial: the training of stage 3 at one point of the space, then every sampler on its one best checkpoint.

The run folder is the trial's only state. A trial that starts where its folder has a run continues it, and one that
is measured already only says so again: whatever Ray Tune knew when it was stopped, nothing is trained twice.
"""

import contextlib
import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aldm.config import TrainingConfig
from aldm.errors import NotFiniteError
from aldm.stage_inputs import StageInputs
from pipelines.arguments import configure_logging
from tune.search_space import Point, Way, point_name, with_way
from tune.sweep import STAGE, TRIALS, Measured, Outcome, Sweep

if TYPE_CHECKING:
    from aldm.engine import PlainEngine
    from aldm.players import Snapshot
    from aldm.run_folder import RunFolder

SCORE, STEP, ELAPSED_S, ENDED = "score", "step", "elapsed_s", "ended"
"""What a trial reports at every validation and, with its best score, at its end."""


def run_trial(drawn: Mapping[str, Any], out: str, num_threads: int, use_gpu: bool) -> None:
    """Train and measure one point; runs in a worker of Ray Tune.

    A training that diverges is an outcome like another: it is written down and not tried again.

    Args:
        drawn: a point, or {point: a point}.
        out: absolute path of the sweep's folder, which this worker must reach.
        num_threads: CPU threads to compute with.
        use_gpu: compute on this worker's GPU.
    """
    import torch

    configure_logging("warning")
    torch.set_num_threads(num_threads)
    sweep, point = Sweep.load(Path(out)), point_of(drawn)
    folder = Path(out) / TRIALS / point_name(point)
    with _alone(folder, point):
        outcome = Outcome.load(folder)
        if outcome is None:
            try:
                outcome = _train_and_measure(sweep, point, folder, "cuda" if use_gpu else "cpu")
            except NotFiniteError as error:
                outcome = Outcome(step=0, elapsed_s=0.0, best=None, error=str(error))
            outcome.save(folder)
    _report(outcome.step, outcome.best, outcome.elapsed_s, ended=True)


def point_of(drawn: Mapping[str, Any]) -> Point:
    """Return the point in what Ray Tune hands to a trial: a list of points is a grid under one key."""
    return dict(drawn.get("point", drawn))


@contextlib.contextmanager
def _alone(folder: Path, point: Point) -> Iterator[None]:
    """Write the point beside its folder, and wait until no other process has it.

    A searcher may draw a point twice, and a trial of a killed sweep may still be on its way out.
    """
    folder.parent.mkdir(exist_ok=True)
    with folder.with_suffix(".json").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_size == 0:
            file.write(json.dumps(point) + "\n")
            file.flush()
        yield


def _train_and_measure(sweep: Sweep, point: Point, folder: Path, device: str) -> Outcome:
    from aldm.precision import usable_precision
    from aldm.run_folder import CONFIG_FILE, RunFolder, checkpoint_folder
    from aldm.training import PlainEngine, fit
    from aldm.training_build import build_stage

    paths = StageInputs(latents=Path(sweep.latents), ms_spade=Path(sweep.ms_spade))
    stage, sources = build_stage(STAGE, sweep.config_of(point), paths)
    training: TrainingConfig = stage.config.train_diffusion
    engine = PlainEngine(device, usable_precision(stage.config.precision, device))
    resume = (folder / CONFIG_FILE).is_file()
    with RunFolder.open(folder, stage=STAGE, config=stage.config, inputs=sources, resume=resume) as run:
        progress = _Progress(run, stage.score)
        result = fit(
            stage,
            engine,
            training,
            seed=stage.config.seed,
            on_log=progress.log,
            on_checkpoint=progress.checkpoint,
            resume_from=run.resume_from() if resume else None,
        )
        ways = sweep.space.ways(point["objective"])
        measured = measure(stage, engine, checkpoint_folder(folder), ways)
    return Outcome(step=result.step, elapsed_s=progress.elapsed_s, best=_finite(result.best), measured=tuple(measured))


def measure(stage: Any, engine: "PlainEngine", checkpoint: Path, ways: list[Way]) -> list[Measured]:
    """Return the score of a checkpoint for every way to sample it, over the pairs that a training validates on.

    The way that the training was scored by gives its score again: this is the training's own validation.

    Args:
        stage: a DiffusionStage; its U-Net takes the checkpoint's weights, its configuration the ways' samplers.
        engine: where to compute.
        checkpoint: a folder of kind "diffusion".
        ways: allowed for the stage's objective.
    """
    import torch

    from aldm.checkpoint import load_checkpoint, load_weights
    from aldm.training import validate

    load_weights(stage.unet, load_checkpoint(checkpoint, STAGE).weights, checkpoint)
    config, samples = stage.config, stage.samples("validation")
    number = config.train_diffusion.num_validation_samples
    measured = []
    with torch.random.fork_rng(devices=[]):
        for way in ways:
            stage.config = with_way(config, way)
            values, _ = validate(stage, {"unet": stage.unet}, samples, engine, num_samples=number, seed=config.seed)
            measured.append(Measured(way=way, value=_finite(values[stage.score])))
    stage.config = config
    return measured


class _Progress:
    """Takes what the training says: to its run folder, and validations to Ray Tune."""

    def __init__(self, run: "RunFolder", score: str) -> None:
        self._run, self._score = run, score
        self.elapsed_s = 0.0

    def log(self, record: dict[str, Any]) -> None:
        """Write a line of metrics.jsonl."""
        self.elapsed_s = record.get("elapsed_s", self.elapsed_s)
        self._run.log(record)

    def checkpoint(self, snapshot: "Snapshot") -> None:
        """Write the checkpoint, then tell Ray Tune, which may end the trial there."""
        self._run.save(snapshot.write, snapshot.is_best)
        _report(snapshot.step, snapshot.values.get(self._score), self.elapsed_s)


def _report(step: int, score: float | None, elapsed_s: float, *, ended: bool = False) -> None:
    """Tell Ray Tune how far the trial is; a score that is not finite is no news to it."""
    from ray import tune

    if score is not None and math.isfinite(score):
        tune.report({STEP: step, SCORE: score, ELAPSED_S: elapsed_s, ENDED: ended})


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
