"""Independent tasks side by side: whatever runs them (`Workers`), and processes of this machine that do."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor
from concurrent.futures import wait as wait_for
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing.connection import wait as wait_for_sentinels
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

from aldm.errors import UserError
from aldm.progress import progress

T = TypeVar("T")
R = TypeVar("R")


class Workers(Protocol):
    """Whatever runs independent tasks side by side, such as processes of this machine or a cluster."""

    def map(
        self, function: Callable[[T], R], items: Sequence[T], *, description: str, unit: str, at_once: int | None = None
    ) -> Iterator[R]:
        """Yield function(item) of every item, in the order they finish.

        A task may run again where its process was killed in the middle of it, so it must write the same once more. A
        function may load what it needs in its first task and keep it: workers that can call the same object again.
        Once the iterator is left, at its end, by an exception or closed, no task runs any more.

        Args:
            function: can be pickled, as can items and results.
            items: the tasks.
            description: what the progress bar says.
            unit: what it counts.
            at_once: how many tasks may run at a time; None for all workers.

        Raises:
            UserError: a process was killed, which is what happens when memory runs out.
        """


def map_in_order(
    workers: Workers, function: Callable[[T], R], items: Sequence[T], *, description: str, unit: str
) -> list[R]:
    """Return function(item) of every item in the items' order, whatever order they finish in; see Workers.map."""
    numbered = partial(_numbered, function)
    results = dict(workers.map(numbered, list(enumerate(items)), description=description, unit=unit))
    return [results[index] for index in range(len(items))]


def _numbered(function: Callable[[T], R], item: tuple[int, T]) -> tuple[int, R]:
    index, value = item
    return index, function(value)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files (files.atomic_path) that killed tasks left in a folder and in the folders in it."""
    for leftover in folder.rglob(".tmp-*"):
        leftover.unlink()


class ProcessWorkers:
    """Processes of this machine, started when first needed; use it in a `with` block.

    Ctrl-C, or an exception inside the block, lets the tasks that run come to their end and starts no other.
    """

    def __init__(self, num_processes: int) -> None:
        """Use at most `num_processes`; with one, the work is done in this process."""
        self.num_processes = num_processes
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "ProcessWorkers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def map(
        self, function: Callable[[T], R], items: Sequence[T], *, description: str, unit: str, at_once: int | None = None
    ) -> Iterator[R]:
        """Do what Workers.map says."""
        at_once = min(at_once or self.num_processes, self.num_processes, len(items))
        bar = progress(total=len(items), description=description, unit=unit)
        with bar:
            results = map(function, items) if at_once <= 1 else self._map_in_pool(function, items, at_once, description)
            for result in results:
                bar.update()
                yield result

    def _map_in_pool(
        self, function: Callable[[T], R], items: Sequence[T], at_once: int, description: str
    ) -> Iterator[R]:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.num_processes, mp_context=context, initializer=_start_worker)
        waiting = list(reversed(items))
        running: set[Future[Any]] = set()
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    running.add(self._pool.submit(function, waiting.pop()))
                finished, running = wait_for(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
        except BrokenProcessPool as error:
            raise UserError(
                f"{description}: one of {at_once} processes was killed, most likely because memory ran out; "
                "run it again with a smaller `num_processes` (what is finished is kept)"
            ) from error
        finally:
            wait_for(running)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow(sentinel: int) -> None:
        wait_for_sentinels([sentinel])
        os._exit(1)

    threading.Thread(target=follow, args=(parent.sentinel,), daemon=True).start()
