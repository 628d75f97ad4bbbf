"""A queue that lies in a file: whoever puts something in never waits, a thread delivers it, and no crash loses it."""

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from aldm.files import atomic_path

logger = logging.getLogger(__name__)

Item = dict[str, Any]
BATCH = 200
"""The most items that are delivered at once."""
LONGEST_PAUSE_S = 30.0
"""Between two attempts while the receiver does not answer; the pauses before it double from 1 s on."""


class Outbox:
    """Delivers JSON-able items in order; what is not delivered yet stands in the file, one item a line.

    A delivery that fails is repeated with the same items for as long as it takes: `deliver` may get items that it
    has seen before. The file goes when the box is closed and empty; what it holds when the box is opened goes first.
    """

    def __init__(self, path: Path, deliver: Callable[[Sequence[Item]], None], receiver: str) -> None:
        """Take what an earlier process left in the file and start to deliver.

        Args:
            path: the file.
            deliver: called in a thread with the first items; any exception means that they were not delivered.
            receiver: what takes the items, for messages.

        Raises:
            UserError: the file cannot be written.
        """
        self.path, self._deliver, self._receiver = path, deliver, receiver
        self._items: deque[Item] = deque(_read(path))
        with atomic_path(path, overwrite=True) as temporary:
            temporary.write_text("".join(json.dumps(item) + "\n" for item in self._items))
        self._file = path.open("a")
        self._changed = threading.Condition()
        self._deadline: float | None = None
        self._thread = threading.Thread(target=self._run, name=f"outbox {path.name}", daemon=True)
        self._thread.start()

    def put(self, item: Item) -> None:
        """Add an item; returns at once.

        A disk that is full costs the item its safety in a crash, not its delivery.
        """
        with self._changed:
            self._items.append(item)
            try:
                self._file.write(json.dumps(item) + "\n")
                self._file.flush()
            except OSError as error:
                logger.warning("cannot write %s: %s", self.path, error.strerror)
            self._changed.notify()

    def close(self, patience_s: float) -> int:
        """Deliver what is left for at most that long; return the number of items that stay in the file."""
        with self._changed:
            self._deadline = time.monotonic() + patience_s
            self._changed.notify()
        self._thread.join(patience_s)
        with self._changed:
            left = len(self._items)
            if not left:
                self._file.close()
                self.path.unlink(missing_ok=True)
        return left

    def _run(self) -> None:
        failures = 0
        while batch := self._first():
            try:
                self._deliver(batch)
            except Exception as error:  # noqa: BLE001  no trouble of the receiver's may reach the caller
                failures += 1
                if failures == 1:
                    logger.warning(
                        "%s does not take what is logged (%s); it is kept in %s until it does",
                        self._receiver,
                        brief(error),
                        self.path,
                    )
                self._pause(failures)
            else:
                if failures:
                    logger.info("%s answers again", self._receiver)
                failures = 0
                self._remove(len(batch))

    def _first(self) -> list[Item]:
        """Wait for items and return the first of them; [] when the box is closed and empty, or its time is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._deadline is not None)
            if self._deadline is not None and time.monotonic() > self._deadline:
                return []
            return list(islice(self._items, BATCH))

    def _remove(self, number: int) -> None:
        with self._changed:
            for _ in range(number):
                self._items.popleft()
            if not self._items:
                self._file.truncate(0)  # opened for appending: the next line goes to the start

    def _pause(self, failures: int) -> None:
        """Wait the longer the more attempts have failed; closing ends the pause, and those after it are short."""
        if self._deadline is not None:
            time.sleep(0.5)
            return
        with self._changed:
            pause_s = min(2.0 ** min(failures - 1, 10), LONGEST_PAUSE_S)
            self._changed.wait_for(lambda: self._deadline is not None, timeout=pause_s)


def brief(error: BaseException) -> str:
    """Return the error's first line, cut at 200 characters."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 200 else lines[0][:200] + "..."


def _read(path: Path) -> list[Item]:
    """Return the items of a file; a last line that was cut off in the writing is left out."""
    if not path.is_file():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
