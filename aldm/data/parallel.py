"""Independent tasks in several processes, with a progress bar, ended cleanly by Ctrl-C."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import TypeVar

from aldm.errors import UserError
from aldm.progress import progress

T = TypeVar("T")
R = TypeVar("R")


def parallel_map(
    function: Callable[[T], R], items: Sequence[T], *, num_processes: int, description: str, unit: str
) -> Iterator[R]:
    """Yield function(item) of every item, in the order they finish.

    With one process the work is done in this one. Ctrl-C, or an exception, lets the tasks that run come to their end
    and starts no other.

    Args:
        function: can be pickled, as can items and results.
        items: the tasks.
        num_processes: how many work at a time.
        description: what the progress bar says.
        unit: what it counts.

    Raises:
        UserError: a process was killed, which is what happens when memory runs out.
    """
    num_processes = min(num_processes, len(items))
    if num_processes <= 1:
        yield from (function(item) for item in progress(items, description=description, unit=unit))
        return
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(num_processes, mp_context=context, initializer=_start_worker)
    try:
        futures = [executor.submit(function, item) for item in items]
        for future in progress(as_completed(futures), total=len(futures), description=description, unit=unit):
            yield future.result()
    except BrokenProcessPool as error:
        raise UserError(
            f"{description}: one of {num_processes} processes was killed, most likely because memory ran out; "
            "run it again with a smaller --num-processes (what is finished is kept)"
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow(sentinel: int) -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=follow, args=(parent.sentinel,), daemon=True).start()
