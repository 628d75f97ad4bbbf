"""A training on the workers of a Ray cluster: the same stage and the same `fit`, under Ray Train's TorchTrainer.

Every worker builds the stage from the same configuration and reads its own share of each batch. Rank 0 writes the run
folder (metrics, config.json and weights of last/ and best/); all ranks write the sharded states that resuming needs
through ray.train.report into the storage path. A worker that dies takes the group back to the last checkpoint.
"""

import argparse
import contextlib
import json
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aldm.config import Config, TrainingConfig, from_dict, to_dict
from aldm.errors import NotFiniteError, UserError
from aldm.run_folder import LOOP_STATE, RunFolder
from pipelines.arguments import JobParser, configure_logging

if TYPE_CHECKING:
    import pyarrow.fs
    import torch

    from aldm.players import Engine, FitResult, Snapshot, Stage

logger = logging.getLogger(__name__)

ENGINES = ("plain", "ddp", "deepspeed")
ZERO_STAGES = (0, 1, 2, 3)
CHECKPOINTS = "checkpoints"
"""Folder of a run folder where the states for resuming lie, without --storage-path."""
WORST = -1e30
"""Reported where nothing was validated: such a checkpoint is among the best of none."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """How a training is spread.

    Attributes:
        engine: ddp or deepspeed.
        zero_stage: of DeepSpeed.
        min_workers, max_workers: equal unless the training is elastic.
        use_gpu: one GPU for every worker.
        storage_path: folder or URI of the checkpoints; None for the run folder.
        max_failures: restarts of the workers that are allowed.
        keep_checkpoints: how many of the best checkpoints stay, the last one besides.
        autoscaling: the cluster adds nodes when they are asked for.
    """

    engine: str
    zero_stage: int
    min_workers: int
    max_workers: int
    use_gpu: bool
    storage_path: str | None
    max_failures: int
    keep_checkpoints: int
    autoscaling: bool


def add_cluster_arguments(parser: JobParser) -> None:
    """Add the flags that say where and how a training is spread."""
    group = parser.add_argument_group("flags of the cluster")
    group.add_argument(
        "--engine",
        choices=ENGINES,
        default="ddp",
        help="ddp and deepspeed train on Ray (on the cluster of RAY_ADDRESS, or on a session started here); plain "
        "trains in this process without Ray",
    )
    group.add_argument(
        "--zero-stage",
        type=int,
        choices=ZERO_STAGES,
        default=1,
        help="what --engine deepspeed shards: 1 optimizer states, 2 gradients too, 3 weights too, 0 nothing",
    )
    group.add_argument(
        "--num-workers",
        default="1",
        metavar="N|MIN:MAX",
        help="workers that share each batch; MIN:MAX takes what the cluster has and follows it as nodes come and go",
    )
    group.add_argument("--use-gpu", action="store_true", help="give every worker a GPU")
    group.add_argument(
        "--storage-path",
        metavar="DIR|URI",
        help="where the states for resuming are kept: a folder that all nodes reach, or s3://... "
        f"(default: {CHECKPOINTS}/ in the run folder)",
    )
    group.add_argument(
        "--max-failures", type=int, default=0, metavar="N", help="restarts from the last checkpoint when a worker dies"
    )
    group.add_argument(
        "--keep-checkpoints", type=int, default=2, metavar="K", help="best checkpoints to keep, the last one besides"
    )
    group.add_argument(
        "--autoscaling",
        action="store_true",
        help="wait for the cluster to add nodes instead of refusing too many workers",
    )


def cluster_of(args: argparse.Namespace, training: TrainingConfig, precision: str) -> Cluster:
    """Return the cluster that the flags ask for.

    Raises:
        UserError: a number of workers that cannot share the batch, or flags that do not go together.
    """
    low, high = _worker_range(args.num_workers)
    for count in range(low, high + 1):
        if training.batch_size % count:
            raise UserError(
                f"--num-workers {args.num_workers}: {count} workers cannot share batches of {training.batch_size} "
                "evenly; take a number that divides it, or set another batch_size"
            )
    if args.engine == "deepspeed" and args.zero_stage == 0 and precision == "bf16":
        raise UserError(
            "--engine deepspeed with --zero-stage 0 and bf16 diverges silently: give --zero-stage 1 or --precision fp32"
        )
    for name in ("max_failures", "keep_checkpoints"):
        least = 1 if name == "keep_checkpoints" else 0
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}, wanted at least {least}")
    if args.device == "cpu" and args.use_gpu:
        raise UserError("--device cpu and --use-gpu contradict each other: give one of them")
    return Cluster(
        engine=args.engine,
        zero_stage=args.zero_stage,
        min_workers=low,
        max_workers=high,
        use_gpu=args.use_gpu or args.device == "cuda",
        storage_path=args.storage_path,
        max_failures=args.max_failures,
        keep_checkpoints=args.keep_checkpoints,
        autoscaling=args.autoscaling,
    )


def _worker_range(text: str) -> tuple[int, int]:
    low, separator, high = text.partition(":")
    if not (low.isdigit() and (high.isdigit() or not separator)):
        raise UserError(f"--num-workers {text!r} is neither a number nor MIN:MAX, such as 4 or 2:8")
    numbers = int(low), int(high or low)
    if not 1 <= numbers[0] <= numbers[1]:
        raise UserError(f"--num-workers {text}: wanted at least 1, and MIN not above MAX")
    return numbers


@contextlib.contextmanager
def open_cluster(cluster: Cluster, run_dir: Path, *, resume: bool, overwrite: bool) -> Iterator["Storage"]:
    """Check the storage, reach the Ray cluster and check what it has; nothing of an earlier run is touched.

    Args:
        cluster: what is wanted.
        run_dir: the run's folder, which need not exist.
        resume, overwrite: whether a run in the storage may be there.

    Raises:
        UserError: storage that cannot be reached or that holds another run, or too few CPUs or GPUs.
    """
    from pipelines.ray_session import check_workers, ray_session

    storage = Storage.of(run_dir, cluster.storage_path)
    storage.check(resume=resume, overwrite=overwrite)
    with ray_session():
        check_workers(cluster.min_workers, use_gpu=cluster.use_gpu, autoscaling=cluster.autoscaling)
        yield storage


def train_on_ray(
    run: RunFolder,
    cluster: Cluster,
    storage: "Storage",
    *,
    stage: str,
    config: Config,
    inputs: dict[str, str],
    options: dict[str, Any],
) -> "FitResult":
    """Train on the workers of a Ray cluster and return how it ended.

    Args:
        run: locked by this process; rank 0 writes into it, so it lies where that worker reaches it.
        cluster: how many workers, of what kind.
        storage: from `open_cluster`.
        stage: vqgan, ms-spade, diffusion or unet.
        config: resolved.
        inputs: the paths that the stage is built from, by flag name.
        options: overwrite, log_level, and what the tracking needs.

    Raises:
        UserError: what a worker refuses, or workers died more often than max_failures allows.
    """
    from aldm.players import FitResult

    if options["overwrite"]:
        storage.clear()
    settings = {
        "run_dir": str(run.path.resolve()),
        "stage": stage,
        "config": to_dict(config),
        "inputs": {name: str(Path(path).resolve()) for name, path in inputs.items()},
        "engine": cluster.engine,
        "zero_stage": cluster.zero_stage,
        "options": options,
    }
    outcome = _fit(cluster, storage, settings)
    if "refused" in outcome:
        raise UserError(outcome["refused"])
    return FitResult(**outcome)


def _fit(cluster: Cluster, storage: "Storage", settings: dict[str, Any]) -> dict[str, Any]:
    """Run the trainer; Ctrl-C is Ctrl-C again, and what a worker said is said once."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    elastic = cluster.min_workers != cluster.max_workers
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=settings,
        scaling_config=ScalingConfig(
            num_workers=(cluster.min_workers, cluster.max_workers) if elastic else cluster.max_workers,
            use_gpu=cluster.use_gpu,
        ),
        torch_config=TorchConfig(backend="nccl" if cluster.use_gpu else "gloo"),
        run_config=RunConfig(
            name=storage.name,
            storage_path=storage.parent,
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            checkpoint_config=CheckpointConfig(
                num_to_keep=cluster.keep_checkpoints,
                checkpoint_score_attribute="score",
                checkpoint_score_order="max",
            ),
            worker_runtime_env={"env_vars": {"RAY_CHDIR_TO_TRIAL_DIR": "0"}},
        ),
    )
    before = signal.getsignal(signal.SIGINT)
    try:
        outcome: dict[str, Any] = trainer.fit().return_value
        return outcome
    except SystemExit as error:  # Ray's own handler of Ctrl-C ends the process with 0
        raise KeyboardInterrupt from error
    except TrainingFailedError as error:
        raise _failure(error, cluster, settings["run_dir"]) from error
    finally:
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGINT, before)


def _failure(error: Exception, cluster: Cluster, run_dir: str) -> Exception:
    """Return what a failed training says: a worker's own message, or that workers died."""
    failures = getattr(error, "worker_failures", {})
    causes = [getattr(failure, "cause", None) or failure for failure in failures.values()]
    for cause in causes:
        if isinstance(cause, UserError):
            return UserError(str(cause))
    if causes and all(type(cause).__module__.startswith("ray.") for cause in causes):
        return UserError(
            f"a worker died ({type(causes[0]).__name__}), most likely because its memory ran out or its node was lost, "
            f"and --max-failures is {cluster.max_failures}: go on from the last checkpoint with --resume, with fewer "
            f"workers on a node or a higher --max-failures; {run_dir} keeps what was reached"
        )
    return error


@dataclass(frozen=True)
class Storage:
    """Where Ray Train keeps the checkpoints of one run: `parent`/`name`."""

    parent: str
    name: str
    flag: str
    """How the user named it, for messages."""
    in_run_folder: bool = False

    @classmethod
    def of(cls, run_dir: Path, storage_path: str | None) -> "Storage":
        """Return the storage of a run: a folder in it, or one of the run's name under --storage-path."""
        if storage_path is None:
            return cls(str(run_dir.resolve()), CHECKPOINTS, f"{run_dir}/{CHECKPOINTS}", in_run_folder=True)
        parent = storage_path if "://" in storage_path else str(Path(storage_path).resolve())
        return cls(parent, run_dir.resolve().name, f"--storage-path {storage_path}")

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Check that it can be written and holds no other run.

        Raises:
            UserError: it cannot be reached or written, or it holds a run and neither flag is given.
        """
        if self.in_run_folder:
            return  # RunFolder.open checks that one
        from pyarrow.fs import FileType

        try:
            filesystem, folder = self._filesystem()
            filesystem.create_dir(folder, recursive=False)
            probe = f"{folder}/.aldm-probe-{os.getpid()}"
            with filesystem.open_output_stream(probe) as stream:
                stream.write(b"aldm")
            filesystem.delete_file(probe)
            exists = filesystem.get_file_info(f"{folder}/{self.name}").type == FileType.Directory
        except (OSError, ValueError) as error:  # pyarrow's errors are OSErrors; a bad URI is a ValueError
            raise UserError(f"{self.flag} cannot be reached or written: {error}") from error
        if exists and not resume and not overwrite:
            raise UserError(
                f"{self.flag} holds a run named {self.name} already: --resume goes on with it, --overwrite deletes it, "
                "or give another name or place"
            )

    def clear(self) -> None:
        """Delete what an earlier run of this name left."""
        from pyarrow.fs import FileType

        filesystem, folder = self._filesystem()
        if filesystem.get_file_info(f"{folder}/{self.name}").type == FileType.Directory:
            filesystem.delete_dir(f"{folder}/{self.name}")

    def _filesystem(self) -> tuple["pyarrow.fs.FileSystem", str]:
        from pyarrow.fs import FileSystem, LocalFileSystem

        if "://" in self.parent:
            filesystem, folder = FileSystem.from_uri(self.parent)
            return filesystem, folder
        return LocalFileSystem(), self.parent


def train_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """Train as one of the workers; returns {step, values, best}, or {refused: message} where all ranks agree on it."""
    import ray.train
    import torch

    from aldm.training import fit

    context = ray.train.get_context()
    rank = context.get_world_rank()
    configure_logging(settings["options"]["log_level"] if rank == 0 else "warning")
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // context.get_local_world_size()))
    built = _agreed(lambda: _built_stage(settings))
    if isinstance(built, str):
        return {"refused": built}
    config: Config = built.config
    training: TrainingConfig = getattr(config, "train_" + settings["stage"].replace("-", "_"))
    run = RunFolder(Path(settings["run_dir"]))
    with contextlib.ExitStack() as stack:
        checkpoint = ray.train.get_checkpoint()
        resume_from = None if checkpoint is None else Path(stack.enter_context(checkpoint.as_directory()))
        engine = _agreed(lambda: _engine(settings, config, training.batch_size, resume_from))
        if isinstance(engine, str):
            return {"refused": engine}
        if rank == 0:
            run.rewind(0 if resume_from is None else _step_of(resume_from))
        try:
            result = fit(
                built,
                engine,
                training,
                seed=config.seed,
                on_log=run.log,
                on_checkpoint=lambda snapshot: _checkpoint(run, snapshot, built, rank),
                resume_from=resume_from,
            )
        except NotFiniteError as error:  # met by all ranks in the same step
            return {"refused": str(error)}
    return {"step": result.step, "values": result.values, "best": result.best}


def _built_stage(settings: dict[str, Any]) -> "Stage":
    from pipelines.train import build_stage

    inputs = argparse.Namespace(**{name: Path(path) for name, path in settings["inputs"].items()})
    return build_stage(settings["stage"], from_dict(Config, settings["config"]), inputs)[0]


def _engine(settings: dict[str, Any], config: Config, batch_size: int, resume_from: Path | None) -> "Engine":
    import ray.train.torch

    from pipelines.engines import DDPEngine, DeepSpeedEngine

    device: torch.device = ray.train.torch.get_device()
    if settings["engine"] == "ddp":
        return DDPEngine(device, config.precision)
    return DeepSpeedEngine(
        device,
        config.precision,
        zero_stage=settings["zero_stage"],
        batch_size=batch_size,
        resume_from=resume_from,
    )


def _agreed(make: Any) -> Any:
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

    folder = Path(tempfile.mkdtemp(prefix="aldm-checkpoint-"))
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


def _step_of(folder: Path) -> int:
    return int(json.loads((folder / LOOP_STATE).read_text())["step"])
