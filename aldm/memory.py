"""How much memory this process holds, and how much a computation will need, found without doing it."""

import ctypes
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from aldm.trace import Trace

MARGIN = 1.15
"""Measured peaks on a CPU exceed the traced ones by up to a tenth: allocator and libraries round up."""


def resident_bytes() -> int:
    """Return what this process holds in memory now (resident set), bytes."""
    import psutil

    return int(psutil.Process().memory_info().rss)


class PeakMemory:
    """Measures, in a `with` block, the most memory that this process and its children held together.

    A thread looks at an interval; a page that processes share counts once (PSS) where the system tells, else in each.

    Attributes:
        peak_bytes: the most so far.
    """

    def __init__(self, interval_s: float = 0.5) -> None:
        self.peak_bytes = 0
        self._interval_s = interval_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._look()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._stopped.wait(self._interval_s):
            self._look()

    def _look(self) -> None:
        import psutil

        own = psutil.Process()
        total = 0
        for process in (own, *own.children(recursive=True)):
            try:
                info = process.memory_full_info()
            except psutil.Error:  # it has ended meanwhile
                continue
            total += getattr(info, "pss", info.rss)
        self.peak_bytes = max(self.peak_bytes, total)


def release_freed_memory() -> None:
    """Hand freed memory back to the system where the C library would keep it (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def peak_bytes(function: Callable[[], Any]) -> int:
    """Return the memory that tensors made inside `function` need at the worst moment on a CPU, bytes, with a margin.

    The function runs on fake tensors: shapes and types are computed, no voxel is. Modules that it calls may be real,
    their weights are not counted; tensors must be made inside it. Gradients are off, autocast works as in a real run.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), Trace() as trace:
        function()
    return int(MARGIN * trace.peak_bytes)


def gigabytes(count: int) -> str:
    """Return a number of bytes as GB (10^9) for a message."""
    return f"{count / 1e9:.2f}"
