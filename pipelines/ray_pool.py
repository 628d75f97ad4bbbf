"""Independent tasks on a Ray cluster: `Workers` of the library whose processes are Ray actors."""

import argparse
import contextlib
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from aldm.errors import UserError
from aldm.progress import progress
from aldm.words import counted
from pipelines.arguments import JobParser
from pipelines.ray_session import check_cluster_has, ray_session

logger = logging.getLogger(__name__)

RETRIES = 3
"""How often a task runs again whose process was killed in the middle of it."""
LONG_WAIT_S = 30.0
"""A cluster that starts no worker for this long is worth a word."""
END_WAIT_S = 30.0
"""The longest wait for word of the end of killed processes, which comes at once unless a node is lost."""
END_GRACE_S = 0.5
"""Ray says that a killed process has ended a moment before it has (measured: up to 0.02 s)."""
T = TypeVar("T")
R = TypeVar("R")


def add_worker_arguments(parser: JobParser, task: str) -> None:
    """Add the flags that spread a job's tasks over a Ray cluster.

    Args:
        parser: of the job.
        task: what a worker does at a time, such as "a subject".
    """
    group = parser.add_argument_group("flags of the cluster")
    group.add_argument(
        "--num-workers",
        type=int,
        metavar="N",
        help=f"share the work, {task} at a time, among N workers on the Ray cluster of RAY_ADDRESS, or on a session "
        "started on this machine; all folders must lie where every node reaches them under the same name "
        "(default: no Ray)",
    )
    group.add_argument(
        "--autoscaling",
        action="store_true",
        help="wait for the cluster to add nodes instead of refusing too many workers",
    )


@dataclass(frozen=True, kw_only=True)
class WantedWorkers:
    """The workers that a job asks for.

    Attributes:
        num_workers: how many; None works without Ray.
        device: cpu, cuda or auto.
        autoscaling: wait for the cluster to add nodes.
    """

    num_workers: int | None
    device: str = "auto"
    autoscaling: bool = False

    @classmethod
    def of(cls, args: argparse.Namespace) -> "WantedWorkers":
        """Return what the flags of `add_worker_arguments`, and --device, say."""
        return cls(num_workers=args.num_workers, device=args.device, autoscaling=args.autoscaling)


@contextlib.contextmanager
def open_workers(wanted: WantedWorkers, *, use_gpus: bool) -> Iterator["RayWorkers | None"]:
    """Yield the workers that are wanted, or None where no number is given.

    Args:
        wanted: how many, and where.
        use_gpus: whether every worker takes a GPU: if the cluster has any and --device is not cpu.

    Raises:
        UserError: no cluster at RAY_ADDRESS, or more workers than it has CPUs or GPUs for.
    """
    if wanted.num_workers is None:
        yield None
        return
    if wanted.num_workers < 1:
        raise UserError(f"--num-workers is {wanted.num_workers}, wanted at least 1")
    with ray_session():
        check_cluster_has(wanted.num_workers, use_gpu=False, autoscaling=wanted.autoscaling)
        on_gpus = use_gpus and _on_gpus(wanted)
        with RayWorkers(wanted.num_workers, use_gpus=on_gpus, num_threads=_num_threads() if use_gpus else None) as pool:
            yield pool


def _on_gpus(wanted: WantedWorkers) -> bool:
    """Return whether every worker takes a GPU; UserError where there are too few."""
    import ray

    gpus = int(ray.cluster_resources().get("GPU", 0))
    if wanted.device == "cpu" or (wanted.device == "auto" and not gpus):
        return False
    assert wanted.num_workers is not None, "open_workers checks it"
    if gpus < wanted.num_workers and not wanted.autoscaling:
        raise UserError(
            f"--num-workers {wanted.num_workers} with --device {wanted.device} takes a GPU for every worker, this Ray "
            f"cluster has {gpus}: take fewer workers, or give --device cpu"
        )
    return True


def _num_threads() -> int:
    import torch

    return torch.get_num_threads()


class RayWorkers:
    """Actors on a Ray cluster, started when first needed; use it in a `with` block inside a `ray_session`.

    Each takes a CPU, and a GPU where asked for. A task whose worker's process is killed is done again by another one.
    Ctrl-C, or an exception while the tasks run, ends them at once.
    """

    def __init__(self, num_workers: int, *, use_gpus: bool = False, num_threads: int | None = None) -> None:
        """Use at most `num_workers` actors.

        Args:
            num_workers: at least 1.
            use_gpus: each takes a GPU.
            num_threads: of torch in each; as many as elsewhere give the same bits. None leaves it alone.
        """
        self.num_workers, self.use_gpus, self.num_threads = num_workers, use_gpus, num_threads
        self._actors: list[Any] = []
        self._num_maps = 0

    @property
    def device(self) -> str:
        """Where the workers compute: cuda or cpu."""
        return "cuda" if self.use_gpus else "cpu"

    def describe(self) -> str:
        """Return a sentence for a dry run."""
        return f"{counted(self.num_workers, 'task')} at a time on Ray, each on a {'GPU' if self.use_gpus else 'CPU'}"

    def __enter__(self) -> "RayWorkers":
        return self

    def __exit__(self, *_: object) -> None:
        self._end([])

    def map(
        self, function: Callable[[T], R], items: Sequence[T], *, description: str, unit: str, at_once: int | None = None
    ) -> Iterator[R]:
        """Do what Workers.map of the library says; a worker keeps the function until another map begins."""
        import ray
        from ray import cloudpickle

        # pickled here, so that what unpickling raises in a worker comes back as it is
        packed = ray.put(cloudpickle.dumps(function))
        self._num_maps += 1
        bar = progress(total=len(items), description=description, unit=unit)
        at_once = min(at_once or self.num_workers, self.num_workers, len(items))
        with bar:
            for result in self._run(self._num_maps, packed, items, at_once, description):
                bar.update()
                yield result

    def _run(self, number: int, packed: Any, items: Sequence[T], at_once: int, description: str) -> Iterator[Any]:
        """Hand the items to the workers that are there; those that the cluster has not started yet get none.

        An item whose worker died goes to another one, and a new one is started.
        """
        import ray

        death = ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError
        while len(self._actors) < at_once:
            self._actors.append(self._start())
        starting = {actor.ready.remote(): actor for actor in self._actors[:at_once]}
        running: dict[Any, tuple[Any, int]] = {}  # task -> its worker, index of the item
        waiting = list(reversed(range(len(items))))
        deaths: Counter[int | None] = Counter()
        try:
            while waiting or running:
                finished, _ = ray.wait([*running, *starting], timeout=None if running else LONG_WAIT_S)
                if not finished:
                    logger.warning("%s: no worker has started yet: the cluster is busy", description)
                for task in finished:
                    actor, index = running.pop(task) if task in running else (starting.pop(task), None)
                    try:
                        answer = ray.get(task)
                    except death as error:
                        ray.kill(actor)  # it may be out of reach only
                        deaths[index] += 1
                        if deaths[index] > RETRIES:
                            raise _dead(description) from error
                        waiting += [] if index is None else [index]
                        self._actors[self._actors.index(actor)] = another = self._start()
                        starting[another.ready.remote()] = another
                        continue
                    if waiting:
                        item = waiting.pop()
                        running[actor.run.remote(number, [packed], items[item])] = actor, item
                    if index is not None:
                        yield _result(answer)
        finally:
            if running:
                self._end(list(running))

    def _start(self) -> Any:
        import ray

        options = ray.remote(num_cpus=1, num_gpus=1 if self.use_gpus else 0, scheduling_strategy="SPREAD")
        return options(_Worker).remote(self.num_threads)

    def _end(self, running: list[Any]) -> None:
        """Kill the workers and wait until their tasks have ended."""
        import ray

        for actor in self._actors:
            ray.kill(actor)
        self._actors = []
        if running:
            ray.wait(running, num_returns=len(running), timeout=END_WAIT_S)
            time.sleep(END_GRACE_S)


@dataclass(frozen=True)
class _Refused:
    """The UserError of a task, and the node where it was raised."""

    message: str
    node: str


class _Worker:
    """Lives in a process of its own and keeps the function, so that what that loads is loaded once."""

    def __init__(self, num_threads: int | None) -> None:
        self._number = 0
        self._function: Any = None
        if num_threads is not None:
            # read when torch is loaded: where workers share a machine, threads that wait must not keep its cores busy
            # (measured on 2 cores, two workers with two threads each: 2 to 60 times as fast)
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
            import torch

            torch.set_num_threads(num_threads)

    def ready(self) -> None:
        """Answer once the process is there."""

    def run(self, number: int, packed: list[Any], item: Any) -> Any:
        """Return what the function of map `number` makes of an item, or what it refuses.

        Args:
            number: tells whether the function kept is still the one.
            packed: holds the reference of its pickle.
            item: what it is called with.
        """
        import ray
        from ray import cloudpickle

        try:
            if number != self._number:
                self._function = None  # may hold a model: gone before the next one comes
                self._function = cloudpickle.loads(ray.get(packed[0]))
                self._number = number
            return self._function(item)
        except UserError as error:
            return _Refused(str(error), ray.util.get_node_ip_address())


def _result(answer: Any) -> Any:
    """Return what a task returned, or raise what it refused."""
    import ray

    if not isinstance(answer, _Refused):
        return answer
    elsewhere = answer.node != ray.util.get_node_ip_address()
    hint = f" (on the node {answer.node}, which must reach all folders under the same names)" if elsewhere else ""
    raise UserError(answer.message + hint)


def _dead(description: str) -> UserError:
    return UserError(
        f"{description}: a worker's process was killed {RETRIES + 1} times in the same task, most likely because "
        "memory ran out; run it again with a smaller --num-workers, or on nodes with more memory"
    )
