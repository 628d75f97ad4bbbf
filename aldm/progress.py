"""Progress of long work: a bar with the remaining time on a terminal, a log line now and then elsewhere.

Where tqdm is not installed, log lines do on a terminal too.
"""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

if TYPE_CHECKING:
    from tqdm import tqdm

logger = logging.getLogger(__name__)
LOG_INTERVAL_S = 15.0
T = TypeVar("T")


class Progress(Generic[T]):
    """Counts finished units. Iterate over it, or call `update` inside a `with` block."""

    def __init__(self, iterable: Iterable[T] | None, total: int | None, description: str, unit: str) -> None:
        self._iterable = iterable
        self._bar = _bar(total, description, unit) if sys.stderr.isatty() else None
        self._description, self._unit, self._total = description, unit, total
        self._done = 0
        self._note = ""
        self._start = self._logged = time.monotonic()

    def __iter__(self) -> Iterator[T]:
        if self._iterable is None:
            raise TypeError("this progress was made without an iterable: call update() instead")
        with self:
            for item in self._iterable:
                yield item
                self.update()

    def __enter__(self) -> "Progress[T]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def done(self) -> int:
        """How many units are finished."""
        return self._done

    def update(self, count: int = 1) -> None:
        """Say that `count` more units are finished."""
        self._done += count
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(count)
        elif now - self._logged >= LOG_INTERVAL_S:
            self._logged = now
            logger.info("%s", self._line(now - self._start))

    def set_remaining(self, remaining: int) -> None:
        """Say how many units are still to come, where that was not known before."""
        self._total = self._done + remaining
        if self._bar is not None:
            self._bar.total = self._total

    def note(self, text: str) -> None:
        """Show a short text behind the count, such as the loss."""
        self._note = text
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def close(self) -> None:
        """End the bar; off a terminal, log the total when the work took long enough to have been reported on."""
        elapsed_s = time.monotonic() - self._start
        if self._bar is not None:
            self._bar.close()
        elif elapsed_s >= LOG_INTERVAL_S:
            logger.info("%s", self._line(elapsed_s))

    def _line(self, elapsed_s: float) -> str:
        count = f"{self._done}" if self._total is None else f"{self._done}/{self._total}"
        text = f"{self._description}: {count} {self._unit}, {_clock(elapsed_s)} elapsed"
        if self._total is not None and 0 < self._done < self._total:
            remaining_s = elapsed_s * (self._total - self._done) / self._done
            text += f", {_clock(remaining_s)} remaining"
        return f"{text} ({self._note})" if self._note else text


def _bar(total: int | None, description: str, unit: str) -> "tqdm | None":
    """Return a bar on stderr, None where tqdm is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total, desc=description, unit=unit, file=sys.stderr, dynamic_ncols=True, leave=True)


def _clock(seconds: float) -> str:
    """Return a time as MM:SS, with hours where there are any."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"


@overload
def progress(
    iterable: None = None, total: int | None = None, description: str = "", unit: str = "it"
) -> Progress[None]: ...


@overload
def progress(
    iterable: Iterable[T], total: int | None = None, description: str = "", unit: str = "it"
) -> Progress[T]: ...


def progress(
    iterable: Iterable[Any] | None = None, total: int | None = None, description: str = "", unit: str = "it"
) -> Progress[Any]:
    """Return a progress display on stderr over `iterable`, or one to `update` by hand.

    Args:
        iterable: what to iterate over; None to count by hand.
        total: number of units; by default the length of the iterable where it has one, else unknown.
        description: what is going on, in front of the bar.
        unit: name of one unit, such as "volume" or "step".
    """
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)  # type: ignore[arg-type]
    return Progress(iterable, total, description, unit)
