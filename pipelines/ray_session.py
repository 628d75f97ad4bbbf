"""The Ray session that a job runs in: a cluster that exists, or one started here and ended again."""

import contextlib
import logging
import os
import secrets
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from aldm.errors import UserError

logger = logging.getLogger(__name__)

START_TRIES = 3
OBJECT_STORE_BYTES = 2**29
"""Memory of a session's object store started here: results of tasks are small, volumes are read from the store."""


@contextlib.contextmanager
def ray_session() -> Iterator[None]:
    """Use this process's Ray session, connect to the cluster that RAY_ADDRESS names, or start a session and end it.

    A session that is started here asks for a token of its own (Ray's authentication), which nobody else can read.

    Raises:
        UserError: RAY_ADDRESS names a cluster that does not answer, or Ray does not start here.
    """
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with contextlib.ExitStack() as stack:
        if not address:
            stack.enter_context(own_token())  # before Ray is imported: it reads the environment then
        import ray

        handler = signal.getsignal(signal.SIGTERM)
        if address:
            try:
                ray.init(address="auto" if address.startswith("http") else address, logging_level=logging.WARNING)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise UserError(
                    f"RAY_ADDRESS={address}: no Ray cluster answers there ({error}); start one, or unset RAY_ADDRESS "
                    "to run on this machine alone"
                ) from error
        else:
            logger.info("starting Ray on this machine")
            start_ray(
                object_store_memory=OBJECT_STORE_BYTES,
                logging_level=logging.WARNING,
                runtime_env={"env_vars": worker_environment()},
            )
        stack.callback(ray.shutdown)
        with _sigterm_as(handler):
            yield


def start_ray(**arguments: Any) -> None:
    """Start a Ray session on this machine, with the arguments of ray.init and without a dashboard, which nobody reads.

    Ray gives its node 30 s to start, which cannot be changed and is too little where the machine has much else to do:
    then it is tried again.

    Raises:
        UserError: Ray has not started in any try.
    """
    import ray

    for left in reversed(range(START_TRIES)):
        before = set(psutil.Process().children(recursive=True))
        try:
            ray.init(address="local", include_dashboard=False, **arguments)
            return
        except Exception as error:
            if type(error) is not Exception and "timed out" not in str(error):
                raise  # Ray says Exception when a process of its own does not come up
            _end([child for child in psutil.Process().children(recursive=True) if child not in before])
            if not left:
                raise UserError(
                    f"Ray does not start on this machine, tried {START_TRIES} times ({error}): try again when it has "
                    "less to do or more memory is free, connect to a cluster with RAY_ADDRESS, or do without Ray (aldm "
                    "train --engine plain, other jobs without --num-workers)"
                ) from error
            logger.warning("Ray did not start (%s): trying again", error)


def _end(processes: list[psutil.Process]) -> None:
    """End what a start of Ray that failed has left."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)


@contextlib.contextmanager
def _sigterm_as(handler: Any) -> Iterator[None]:
    """Do inside the block what `handler` does on SIGTERM.

    Ray puts a handler of its own in its place, and where Ray waits, whatever a handler raises arrives as
    KeyboardInterrupt: so the signal is noted and delivered again.
    """
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    received = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        handler(number, frame)

    signal.signal(signal.SIGTERM, note)
    try:
        yield
    except KeyboardInterrupt:
        signal.signal(signal.SIGTERM, handler)
        if received:
            signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)


def worker_environment() -> dict[str, str]:
    """Return the environment that processes of a session started here need: tools of this Python's environment."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {"PATH": path, "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}  # see aldm/cli.py


def check_cluster_has(num_workers: int, *, use_gpu: bool, autoscaling: bool = False) -> None:
    """Refuse more workers than the cluster has CPUs or GPUs for; a cluster that grows by itself is not asked.

    Args:
        num_workers: the fewest that will do.
        use_gpu: whether every worker takes a GPU.
        autoscaling: the cluster adds nodes when they are asked for.

    Raises:
        UserError: too few of either.
    """
    import ray

    have = ray.cluster_resources()
    cpus, gpus = int(have.get("CPU", 0)), int(have.get("GPU", 0))
    if use_gpu and gpus < num_workers and not autoscaling:
        raise UserError(
            f"--use-gpu with --num-workers {num_workers} needs {num_workers} GPUs, this Ray cluster has {gpus}: leave "
            "--use-gpu out, take fewer workers, or say --autoscaling where the cluster adds nodes"
        )
    if cpus < num_workers and not autoscaling:
        raise UserError(
            f"--num-workers {num_workers} is more than the {cpus} CPUs of this Ray cluster: take at most {cpus}, or "
            "say --autoscaling where the cluster adds nodes"
        )


def available_gpus() -> int:
    """Return the GPUs of the Ray session; on this machine alone, those that its torch can use."""
    import ray
    import torch

    gpus = int(ray.cluster_resources().get("GPU", 0))
    return gpus if os.environ.get("RAY_ADDRESS") else min(gpus, torch.cuda.device_count())


@contextlib.contextmanager
def own_token() -> Iterator[None]:
    """Give a session that is started here a token of its own; the file goes with the session.

    Where the user has chosen something, or Ray is imported already and has read the environment, that stays.
    """
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    if "ray" in sys.modules or any(os.environ.get(name) for name in names):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="aldm-ray-") as folder:  # readable by this user alone
        token = Path(folder) / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token))
        try:
            yield
        finally:
            for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
                os.environ.pop(name, None)
