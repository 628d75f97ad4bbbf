"""A training on the workers of a Ray cluster: the same stage and the same `fit`, under Ray Train's TorchTrainer.

Every worker builds the stage from the same configuration and reads its own share of each batch. Rank 0 writes the run
folder (metrics, config.json and weights of last/ and best/); all ranks write the sharded states that resuming needs
through ray.train.report into the storage path. A worker that dies takes the group back to the last checkpoint.
"""

import argparse
import contextlib
import logging
import math
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from aldm.config import Config, training_name, training_of
from aldm.errors import UserError
from aldm.run_folder import CHECKPOINTS, LAST
from pipelines.arguments import JobParser
from pipelines.ray_storage import Storage

if TYPE_CHECKING:
    from aldm.players import FitResult
    from pipelines.ray_worker import Outcome, WorkerSettings

logger = logging.getLogger(__name__)

ENGINES = ("plain", "ddp", "deepspeed")
ZERO_STAGES = (0, 1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """How a training is spread.

    Attributes:
        engine: ddp or deepspeed.
        zero_stage: of DeepSpeed.
        min_workers, max_workers: equal unless the training is elastic.
        use_gpu: one GPU for every worker; None takes them where there are enough.
        max_failures: restarts of the workers that are allowed.
        keep_checkpoints: how many of the best checkpoints stay, the last one besides.
        autoscaling: the cluster adds nodes when they are asked for.
    """

    engine: str
    zero_stage: int
    min_workers: int
    max_workers: int
    use_gpu: bool | None
    max_failures: int
    keep_checkpoints: int
    autoscaling: bool

    def takes_gpus(self, available: int) -> bool:
        """Whether each worker takes a GPU, of so many that there are."""
        return available >= self.min_workers if self.use_gpu is None else self.use_gpu

    def describe(self) -> str:
        """Say for a plan on how many workers of what kind it trains; nothing is started or asked to find out."""
        workers = str(self.min_workers)
        if self.max_workers != self.min_workers:
            workers += f" to {self.max_workers}"
        workers += " worker" if workers == "1" else " workers"
        if self.use_gpu is None and os.environ.get("RAY_ADDRESS"):
            return f"{workers}, with a GPU each if the cluster has as many"
        import torch

        return f"{workers}{_with_gpus(self.takes_gpus(torch.cuda.device_count()))}"


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
        help="what --engine deepspeed shards: 1 optimizer states, 2 gradients too, 3 weights too, 0 nothing "
        "(default: 1)",
    )
    group.add_argument(
        "--num-workers",
        metavar="N|MIN:MAX",
        help="workers that share each batch evenly; MIN:MAX takes what the cluster has and follows it as nodes come "
        "and go, so every number in between has to divide the batch size (default: 1)",
    )
    group.add_argument(
        "--use-gpu",
        action="store_true",
        help="give every worker a GPU (without it --device auto takes GPUs where there are as many as workers)",
    )
    group.add_argument(
        "--storage-path",
        metavar="DIR|URI",
        help="where the states for resuming are kept: a folder that all nodes reach, or s3://... "
        f"(default: {CHECKPOINTS}/ in the run folder)",
    )
    group.add_argument(
        "--max-failures",
        type=int,
        metavar="N",
        help="restarts from the last checkpoint when a worker dies (default: 0)",
    )
    group.add_argument(
        "--keep-checkpoints",
        type=int,
        metavar="K",
        help="best checkpoints to keep, the last one besides (default: 2)",
    )
    group.add_argument(
        "--autoscaling",
        action="store_true",
        help="wait for the cluster to add nodes instead of refusing too many workers",
    )


def cluster_of(args: argparse.Namespace, config: Config, stage: str) -> Cluster:
    """Return the cluster that the flags ask for.

    Args:
        args: parsed by a parser with `add_cluster_arguments`.
        config: resolved.
        stage: that is trained.

    Raises:
        UserError: a number of workers that cannot share the batch, or flags that do not go together.
    """
    _check_flags_of_engine(args)
    low, high = _worker_range(args.num_workers or "1")
    _check_batch(args.num_workers, low, high, training_of(config, stage).batch_size, training_name(stage))
    if args.engine == "deepspeed" and args.zero_stage == 0 and config.precision == "bf16":
        raise UserError(
            "--engine deepspeed with --zero-stage 0 and bf16 diverges silently: give --zero-stage 1 or --precision fp32"
        )
    for name, least in (("max_failures", 0), ("keep_checkpoints", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}, wanted at least {least}")
    if args.device == "cpu" and args.use_gpu:
        raise UserError("--device cpu and --use-gpu contradict each other: give one of them")
    return Cluster(
        engine=args.engine,
        zero_stage=1 if args.zero_stage is None else args.zero_stage,
        min_workers=low,
        max_workers=high,
        use_gpu=None if args.device == "auto" and not args.use_gpu else args.device != "cpu",
        max_failures=args.max_failures or 0,
        keep_checkpoints=args.keep_checkpoints or 2,
        autoscaling=args.autoscaling,
    )


def _check_flags_of_engine(args: argparse.Namespace) -> None:
    """Refuse a flag that has no effect with the engine."""
    if args.engine != "deepspeed" and args.zero_stage is not None:
        raise UserError(
            f"--zero-stage is for --engine deepspeed, this is --engine {args.engine}: leave one of them out"
        )
    of_ray = ("num_workers", "use_gpu", "storage_path", "max_failures", "keep_checkpoints", "autoscaling")
    given = [
        f"--{name.replace('_', '-')}"
        for name in of_ray
        if getattr(args, name) is not (False if name in ("use_gpu", "autoscaling") else None)
    ]
    if args.engine == "plain" and given:
        raise UserError(
            f"--engine plain trains in one process without Ray, where {' and '.join(given)} would do nothing: leave "
            f"{'it' if len(given) == 1 else 'them'} out, or take --engine ddp or deepspeed"
        )


def _check_batch(flag: str, low: int, high: int, batch_size: int, section: str) -> None:
    """Refuse numbers of workers that cannot share a batch evenly."""
    numbers = range(low, high + 1)
    for count in numbers:
        if batch_size % count:
            least = math.lcm(*numbers)
            every = "every number in it" if low != high else "the number of workers"
            raise UserError(
                f"--num-workers {flag}: {count} workers cannot share batches of {batch_size} evenly; {every} has to "
                f"divide the batch size: say --set {section}.batch_size={math.ceil(batch_size / least) * least}, or "
                f"take {'another range' if low != high else 'another number'} of workers"
            )


def _with_gpus(use_gpu: bool) -> str:
    return " with a GPU each" if use_gpu else ", on CPUs"


def _worker_range(text: str) -> tuple[int, int]:
    low, separator, high = text.partition(":")
    if not (low.isdigit() and (high.isdigit() or not separator)):
        raise UserError(f"--num-workers {text!r} is neither a number nor MIN:MAX, such as 4 or 1:2")
    numbers = int(low), int(high or low)
    if not 1 <= numbers[0] <= numbers[1]:
        raise UserError(f"--num-workers {text}: wanted at least 1, and MIN not above MAX")
    return numbers


@contextlib.contextmanager
def open_cluster(
    cluster: Cluster, storage: Storage, run_dir: Path, *, resume: bool, overwrite: bool
) -> Iterator[Cluster]:
    """Check the storage, reach the Ray cluster and check what it has; nothing of an earlier run is touched.

    Yields the cluster with `use_gpu` decided.

    Args:
        cluster: what is wanted.
        storage: of the run's checkpoints.
        run_dir: the run's folder, which need not exist.
        resume, overwrite: whether a run in the storage may be there.

    Raises:
        UserError: storage that cannot be reached, that holds another run or lacks the one to resume, or too few CPUs
            or GPUs.
    """
    from pipelines.ray_session import available_gpus, check_cluster_has, ray_session

    storage.check(resume=resume, overwrite=overwrite)
    if resume and (run_dir / LAST).is_dir() and not storage.has_checkpoint():
        raise UserError(
            f"{storage.flag} holds no checkpoint of {run_dir}, though that run has written some: give the "
            "--storage-path that it was trained with, or start from scratch with --overwrite"
        )
    with ray_session():
        use_gpu = cluster.takes_gpus(available_gpus())
        check_cluster_has(cluster.min_workers, use_gpu=use_gpu, autoscaling=cluster.autoscaling)
        yield replace(cluster, use_gpu=use_gpu)


def train_on_ray(
    cluster: Cluster, storage: Storage, settings: "WorkerSettings", *, overwrite: bool = False
) -> "FitResult":
    """Train on the workers of a Ray cluster and return how it ended.

    The run folder is locked by this process; rank 0 writes into it, so it lies where that worker reaches it.

    Args:
        cluster: how many workers, of what kind, from `open_cluster`.
        storage: of the run's checkpoints.
        settings: what the workers are told; they do not resume where the storage holds no checkpoint.
        overwrite: delete the checkpoints in the storage.

    Raises:
        UserError: what a worker refuses, or workers died more often than max_failures allows.
    """
    if overwrite:
        storage.clear()
    settings = replace(settings, resumes=settings.resumes and storage.has_checkpoint())
    outcome = _fit(cluster, storage, settings)
    if outcome.refused is not None:
        raise UserError(outcome.refused)
    if outcome.failed is not None:
        _mark(settings, "FAILED")
        raise UserError(outcome.failed)
    assert outcome.result is not None
    return outcome.result


def _fit(cluster: Cluster, storage: Storage, settings: "WorkerSettings") -> "Outcome":
    """Run the trainer; Ctrl-C is Ctrl-C again, and what a worker said is said once.

    Ray's names are typed as in version 1 of its trainer, and are those of version 2 when it runs.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    from pipelines.ray_worker import train_worker

    assert cluster.use_gpu is not None, "open_cluster decides it"
    elastic = cluster.min_workers != cluster.max_workers
    trainer = TorchTrainer(
        train_worker,  # type: ignore[arg-type]  # only version 2 of the trainer takes what a worker returns
        train_loop_config={"settings": settings},
        scaling_config=ScalingConfig(
            num_workers=(cluster.min_workers, cluster.max_workers) if elastic else cluster.max_workers,  # type: ignore[arg-type]
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
            worker_runtime_env={"env_vars": {"RAY_CHDIR_TO_TRIAL_DIR": "0"}},  # type: ignore[call-arg]
        ),
    )
    before = signal.getsignal(signal.SIGINT)
    try:
        outcome: Outcome = trainer.fit().return_value  # type: ignore[attr-defined]
        return outcome
    except (KeyboardInterrupt, SystemExit) as error:
        _mark(settings, "KILLED")
        if isinstance(error, SystemExit):  # Ray's own handler of Ctrl-C ends the process with 0
            raise KeyboardInterrupt from error
        raise
    except TrainingFailedError as error:
        _mark(settings, "FAILED")
        raise _failure(error, cluster, settings.run_dir) from error
    finally:
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGINT, before)


def _mark(settings: "WorkerSettings", status: str) -> None:
    """Say in MLflow how the training ended: a worker may be ended without a word, or live on a little."""
    if settings.tracking is not None:
        from pipelines.tracking import mark

        mark(settings.run_dir, status)


def _failure(error: Exception, cluster: Cluster, run_dir: Path) -> Exception:
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
