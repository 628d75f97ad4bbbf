"""How much memory this process holds, and how much a computation will need, found without doing it."""

import ctypes
from collections.abc import Callable
from typing import Any

import torch

from aldm.trace import Trace

MARGIN = 1.15
"""Measured peaks on a CPU exceed the traced ones by up to a tenth: allocator and libraries round up."""


def resident_bytes() -> int:
    """Return what this process holds in memory now (resident set), bytes."""
    import psutil

    return int(psutil.Process().memory_info().rss)


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
