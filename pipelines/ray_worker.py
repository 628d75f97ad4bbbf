"""What each worker of a Ray Train group runs: the stage, its engine, and `fit`."""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aldm.config import Config, from_dict, training_of
from aldm.errors import NotFiniteError, UserError
from aldm.precision import usable_precision
from aldm.run_folder import RunFolder, step_of
from pipelines.arguments import configure_logging
from pipelines.training_logs import Logs, open_logs

if TYPE_CHECKING:
    import torch

    from aldm.players import Engine, FitResult, Snapshot, Stage

WORST = -1e30
"""Score where nothing was validated: such a checkpoint is among the best of none."""


def train_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """Train as one of the workers.

    Returns:
        {step, values, best}; or, where all ranks agree on it, {refused: message} from before the first step, {failed:
        message} from a later one.
    """
    import ray.train
    import torch

    context = ray.train.get_context()
    rank = context.get_world_rank()
    configure_logging(settings["log_level"] if rank == 0 else "warning")
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // context.get_local_world_size()))
    if context.get_local_rank() == 0:
        _clear_scratch(settings["run_dir"])
    built = _agreed(lambda: _built_stage(settings))
    if isinstance(built, str):
        return {"refused": built}
    try:
        with contextlib.ExitStack() as stack:
            checkpoint = ray.train.get_checkpoint()
            if checkpoint is None and settings["resumes"]:  # the same on all ranks; to start over would wipe the run
                return {"refused": f"the storage of {settings['run_dir']} lost its checkpoints during this start"}
            resume_from = None if checkpoint is None else Path(stack.enter_context(checkpoint.as_directory()))
            result = _train(settings, built, rank, resume_from, stack)
    except NotFiniteError as error:  # met by all ranks in the same step
        return {"failed": str(error)}
    return {"step": result.step, "values": result.values, "best": result.best}


def _train(
    settings: dict[str, Any], stage: "Stage", rank: int, resume_from: Path | None, stack: contextlib.ExitStack
) -> "FitResult":
    """Join the run folder, make the engine, and fit."""
    from aldm.training import fit

    config = stage.config
    training = training_of(config, settings["stage"])
    engine = _engine(settings, config, training.batch_size, resume_from)
    run = RunFolder(Path(settings["run_dir"]))
    logs: Logs = Logs(run.log)
    if rank == 0:
        run.rewind(0 if resume_from is None else step_of(resume_from))
        opened = open_logs(run, settings["stage"], config, settings["record"], settings["tracking"], alone=False)
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


def _with_gauges(logs: Logs, settings: dict[str, Any], batch_size: int) -> Logs:
    """Return logs that Ray's gauges hear as well."""
    from pipelines.training_metrics import TrainingGauges

    gauges = TrainingGauges(settings["stage"], settings["run_dir"], batch_size)

    def log(record: dict[str, Any]) -> None:
        logs.on_log(record)
        gauges.log(record)

    return replace(logs, on_log=log)


def _built_stage(settings: dict[str, Any]) -> "Stage":
    from aldm.training_build import build_stage

    return build_stage(settings["stage"], from_dict(Config, settings["config"]), settings["inputs"])[0]


def _engine(settings: dict[str, Any], config: Config, batch_size: int, resume_from: Path | None) -> "Engine":
    import ray.train.torch

    from pipelines.distributed_engines import DDPEngine, DeepSpeedEngine

    device: torch.device = ray.train.torch.get_device()
    precision = usable_precision(config.precision, device)
    if settings["engine"] == "ddp":
        return DDPEngine(device, precision)
    return DeepSpeedEngine(
        device,
        precision,
        zero_stage=settings["zero_stage"],
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


def _clear_scratch(run_dir: str) -> None:
    """Remove what killed workers of this run have left in this node's temporary folder."""
    for folder in Path(tempfile.gettempdir()).glob(f"{scratch_prefix(run_dir)}*"):
        shutil.rmtree(folder, ignore_errors=True)
