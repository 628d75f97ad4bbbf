"""What each worker of a Ray Train group runs: the stage, its engine, and `fit`."""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aldm.config import Config, training_of
from aldm.errors import NotFiniteError, UserError
from aldm.precision import usable_precision
from aldm.run_folder import RunFolder, step_of
from aldm.stage_inputs import StageInputs
from pipelines.arguments import configure_logging
from pipelines.training_logs import Logs, Tracking, open_logs

if TYPE_CHECKING:
    import torch

    from aldm.players import Engine, FitResult, Snapshot, Stage

WORST = -1e30
"""Score where nothing was validated: such a checkpoint is among the best of none."""


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """What every worker of a training is told.

    Attributes:
        stage: vqgan, ms-spade, diffusion, unet, segmenter, uncertainty or a comparison method.
        config: of the whole model.
        inputs: what the stage is built from, absolute.
        record: name -> path or hash of what the stage is built from, for the tracking.
        run_dir: folder of the run, absolute.
        resumes: whether the storage holds a checkpoint that the training goes on from.
        engine: ddp or deepspeed.
        zero_stage: of DeepSpeed.
        tracking: where MLflow keeps the run; None leaves it out.
        log_level: of rank 0.
    """

    stage: str
    config: Config
    inputs: StageInputs
    record: Mapping[str, str]
    run_dir: Path
    resumes: bool
    engine: str
    zero_stage: int
    tracking: Tracking | None
    log_level: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a training on workers ended: with a result, or with a message that all ranks agree on."""

    result: "FitResult | None" = None
    refused: str | None = None
    """Before the first step."""
    failed: str | None = None
    """Later."""


def train_worker(told: Mapping[str, WorkerSettings]) -> Outcome:
    """Train as one of the workers.

    Args:
        told: "settings" -> what is to be trained; Ray hands over nothing but a dict.
    """
    import ray.train
    import torch

    settings = told["settings"]
    context = ray.train.get_context()
    rank = context.get_world_rank()
    configure_logging(settings.log_level if rank == 0 else "warning")
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // context.get_local_world_size()))
    if context.get_local_rank() == 0:
        _clear_scratch(settings.run_dir)
    built = _agreed(lambda: _built_stage(settings))
    if isinstance(built, str):
        return Outcome(refused=built)
    try:
        with contextlib.ExitStack() as stack:
            checkpoint = ray.train.get_checkpoint()
            if checkpoint is None and settings.resumes:  # the same on all ranks; to start over would wipe the run
                return Outcome(refused=f"the storage of {settings.run_dir} lost its checkpoints during this start")
            resume_from = None if checkpoint is None else Path(stack.enter_context(checkpoint.as_directory()))
            result = _train(settings, built, rank, resume_from, stack)
    except NotFiniteError as error:  # met by all ranks in the same step
        return Outcome(failed=str(error))
    return Outcome(result=result)


def _train(
    settings: WorkerSettings, stage: "Stage", rank: int, resume_from: Path | None, stack: contextlib.ExitStack
) -> "FitResult":
    """Join the run folder, make the engine, and fit."""
    from aldm.training import fit

    config = stage.config
    training = training_of(config, settings.stage)
    engine = _engine(settings, config, training.batch_size, resume_from)
    run = RunFolder(settings.run_dir)
    logs: Logs = Logs(run.log)
    if rank == 0:
        run.rewind(0 if resume_from is None else step_of(resume_from))
        opened = open_logs(run, settings.stage, config, settings.record, settings.tracking, alone=False)
        logs = _with_gauges(stack.enter_context(opened), settings, training.batch_size)
    return fit(
        stage,
        engine,
        training,
        seed=config.seed,
        on_log=logs.on_log,
        on_checkpoint=lambda snapshot: _checkpoint(run, snapshot, stage, rank),
        on_panel=logs.on_panel,
        resume_from=resume_from,
    )


def _with_gauges(logs: Logs, settings: WorkerSettings, batch_size: int) -> Logs:
    """Return logs that Ray's gauges hear as well."""
    from pipelines.training_metrics import TrainingGauges

    gauges = TrainingGauges(settings.stage, str(settings.run_dir), batch_size)

    def log(record: dict[str, Any]) -> None:
        logs.on_log(record)
        gauges.log(record)

    return replace(logs, on_log=log)


def _built_stage(settings: WorkerSettings) -> "Stage":
    from aldm.training_build import build_stage

    return build_stage(settings.stage, settings.config, settings.inputs)[0]


def _engine(settings: WorkerSettings, config: Config, batch_size: int, resume_from: Path | None) -> "Engine":
    import ray.train.torch

    from pipelines.distributed_engines import DDPEngine, DeepSpeedEngine

    device: torch.device = ray.train.torch.get_device()
    precision = usable_precision(config.precision, device)
    if settings.engine == "ddp":
        return DDPEngine(device, precision)
    return DeepSpeedEngine(
        device,
        precision,
        zero_stage=settings.zero_stage,
        batch_size=batch_size,
        resume_from=resume_from,
    )


def _agreed(make: Callable[[], Any]) -> Any:
    """Return what `make` makes, or the first message where it refuses on any rank: no rank goes on alone."""
    import torch.distributed as dist

    try:
        made, message = make(), None
    except UserError as error:
        made, message = None, str(error)
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    return next((found for found in messages if found is not None), made)


def _checkpoint(run: RunFolder, snapshot: "Snapshot", stage: "Stage", rank: int) -> None:
    """Write this rank's share and report it; return when the checkpoint counts."""
    import ray.train

    folder = Path(tempfile.mkdtemp(prefix=scratch_prefix(run.path)))
    try:
        snapshot.write(folder)
        if rank == 0:
            run.publish(folder, snapshot.is_best)
        score = snapshot.values.get(stage.score)
        sign = 1 if stage.higher_is_better else -1
        ray.train.report(
            {"step": snapshot.step, "score": WORST if score is None else sign * score},
            checkpoint=ray.train.Checkpoint.from_directory(str(folder)),
            checkpoint_dir_name=f"step-{snapshot.step:08d}",
        )
        ray.train.get_all_reported_checkpoints()  # waits until it is committed: a crash now goes back to this step
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def scratch_prefix(run_dir: str | os.PathLike[str]) -> str:
    """Return how the names of a run's temporary checkpoint folders begin, on every node."""
    return f"aldm-checkpoint-{hashlib.sha256(os.fsencode(run_dir)).hexdigest()[:12]}-"


def _clear_scratch(run_dir: Path) -> None:
    """Remove what killed workers of this run have left in this node's temporary folder."""
    for folder in Path(tempfile.gettempdir()).glob(f"{scratch_prefix(run_dir)}*"):
        shutil.rmtree(folder, ignore_errors=True)
