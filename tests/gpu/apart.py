"""A measure in a process of its own."""

import math
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch

Row = dict[str, Any]
Measure = Callable[[], Iterator[Row]]


def run_apart(measure: Measure, seconds: float) -> Iterator[Row]:
    """Yield the rows of a measure that runs in a process of its own; one that fails or takes too long is a row too.

    A process of its own: what a measure leaves on the GPU or breaks there ends with it. It is forked before anything
    here touches CUDA, so that Python and torch are loaded once.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(measure, sender))
    process.start()
    sender.close()
    end = time.monotonic() + seconds
    try:
        while receiver.poll(None if end == math.inf else max(end - time.monotonic(), 0)):
            yield receiver.recv()
        yield {"what": "the rest", "error": f"stopped after {seconds:.0f} s"}
    except EOFError:
        process.join()
        if process.exitcode:
            yield {"what": "the rest", "error": f"its process ended with code {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def _send(measure: Measure, sender: Connection) -> None:
    try:
        for row in measure():
            sender.send(row)
    except torch.OutOfMemoryError as error:
        sender.send({"what": "the rest", "error": f"out of memory: {str(error).partition('. ')[0]}"})
    except Exception as error:  # noqa: BLE001 - one measure that fails is a row
        traceback.print_exc()
        sender.send({"what": "the rest", "error": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"})
