"""A sweep on a Ray cluster: what every trial gets, whose folder it is, and Ray Tune's part."""

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import ray
from ray import tune as ray_tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from aldm.errors import UserError
from tune.runs import SweepRuns
from tune.search_space import optuna_space, point_name, random_points
from tune.sweep import HALTS, LOCK_FILE, RAY, RESULTS, TRIALS, Sweep
from tune.trial import ELAPSED_S, SCORE, STEP, point_of, run_trial
from tune.watching import Watcher

logger = logging.getLogger(__name__)

RAY_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard files beside our own
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the job as it ends every other
    "RAY_AIR_NEW_OUTPUT": "0",  # which prints a box at any verbosity
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


@dataclass(frozen=True)
class Share:
    """What every trial gets of the cluster."""

    concurrent: int
    cpus: int
    use_gpu: bool


def share_cluster(sweep: Sweep) -> Share:
    """Share the cluster among as many trials as are to run at a time.

    Raises:
        UserError: more trials at a time than CPUs or GPUs, or no GPU where one is asked for.
    """
    have = ray.cluster_resources()
    cpus, gpus = int(have.get("CPU", 0)), int(have.get("GPU", 0))
    if sweep.device == "cuda" and not gpus:
        raise UserError("--device cuda: this Ray cluster has no GPU; give --device cpu, or join nodes that have one")
    use_gpu = sweep.device != "cpu" and gpus > 0
    most, what = (gpus, "GPUs") if use_gpu else (cpus, "CPUs")
    if sweep.max_concurrent is not None and sweep.max_concurrent > most:
        raise UserError(
            f"--max-concurrent {sweep.max_concurrent} is more than the {most} {what} of this Ray cluster: take at most "
            f"{most}"
        )
    concurrent = sweep.max_concurrent or min(most, sweep.num_trials)
    largest = max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
    return Share(concurrent, max(1, min(cpus // concurrent, largest)), use_gpu)


@contextlib.contextmanager
def own_folder(out: Path, sweep: Sweep, resume: bool) -> Iterator[None]:
    """Keep other sweeps out of the folder; empty it for a new one.

    Raises:
        UserError: another sweep runs there, or it cannot be written.
    """
    try:
        out.mkdir(exist_ok=True)
        lock = (out / LOCK_FILE).open("a")
    except OSError as error:
        raise UserError(f"cannot write into {out}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another sweep runs in {out}: wait for it, or give another --out") from error
        if not resume:
            for name in (TRIALS, RAY):
                shutil.rmtree(out / name, ignore_errors=True)
            for name in RESULTS:
                (out / name).unlink(missing_ok=True)
            sweep.save(out)
        yield


def run_trials(sweep: Sweep, out: Path, share: Share, runs: SweepRuns) -> None:
    """Run all trials that are not done yet.

    Args:
        sweep: what was asked for.
        out: its folder.
        share: what every trial gets.
        runs: where the trials are logged.
    """
    os.environ.update(RAY_SETTINGS)
    for chatter in ("analysis.experiment_analysis", "utils.util"):  # Ray's own files are missing; a validation is long
        logging.getLogger(f"ray.tune.{chatter}").setLevel(logging.ERROR)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    Watcher.attach(sweep, out, runs)
    bound = ray_tune.with_parameters(run_trial, out=str(out), num_threads=share.cpus, use_gpu=share.use_gpu)
    trainable = ray_tune.with_resources(bound, {"cpu": share.cpus, "gpu": int(share.use_gpu)})
    path = out / RAY
    if ray_tune.Tuner.can_restore(str(path)) and any(path.glob("experiment_state*.json")):
        logger.info("going on with the sweep in %s", out)
        tuner = ray_tune.Tuner.restore(str(path), trainable, resume_errored=True)
    else:  # a new sweep, or one that was killed before Ray Tune wrote anything
        logger.info("%d trials of at most %d steps, %d at a time", sweep.num_trials, sweep.num_steps, share.concurrent)
        tuner = _new_tuner(sweep, out, trainable, share.concurrent)
    tuner.fit()


def _new_tuner(sweep: Sweep, out: Path, trainable: Any, concurrent: int) -> ray_tune.Tuner:
    mode, seed = "max" if sweep.higher_is_better else "min", sweep.config.seed
    space: dict[str, Any] = {}
    searcher, num_samples = None, sweep.num_trials
    if sweep.searcher == "optuna":
        searcher = OptunaSearch(optuna_space(sweep.space), metric=SCORE, mode=mode, seed=seed)
    else:  # all drawn at once: a resumed sweep need not know how far its generator was
        space, num_samples = {"point": ray_tune.grid_search(random_points(sweep.space, sweep.num_trials, seed))}, 1
    return ray_tune.Tuner(
        trainable,
        param_space=space,
        tune_config=ray_tune.TuneConfig(
            metric=SCORE,
            mode=mode,
            search_alg=searcher,
            scheduler=_asha(sweep) if sweep.scheduler == "asha" else None,
            num_samples=num_samples,
            max_concurrent_trials=concurrent,
            reuse_actors=True,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=ray_tune.RunConfig(
            name=RAY,
            storage_path=str(out),
            callbacks=[Watcher()],
            failure_config=ray_tune.FailureConfig(max_failures=1),
            verbose=0,
        ),
    )


def _asha(sweep: Sweep) -> ASHAScheduler:
    """Return the scheduler with its two halts, on steps, or on time where a trial has minutes.

    None is near the end: a trial that came that far is measured.
    """
    minutes = sweep.config.train_diffusion.max_minutes
    clock, length = (ELAPSED_S, 60 * minutes) if minutes else (STEP, sweep.num_steps)
    first, last = (share * length for share in HALTS)
    halts: dict[str, Any] = {"grace_period": first, "max_t": last, "reduction_factor": last / first}  # floats do well
    return ASHAScheduler(time_attr=clock, stop_last_trials=False, **halts)


def _trial_name(trial: Any) -> str:
    return point_name(point_of(trial.config))
