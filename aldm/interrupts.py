"""Ctrl-C and SIGTERM held back until the work at hand is whole."""

import signal
import threading
from types import FrameType, TracebackType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class DeferredInterrupts:
    """Holds back the first Ctrl-C or SIGTERM inside a `with` block; a second one takes effect at once.

    The owner asks `requested` where it can stop, brings its work to a whole state and calls `deliver`, which does
    what the signal would have done. Outside the main thread, where no handler can be set, signals keep their effect.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._previous: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> "DeferredInterrupts":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._hold) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def deliver(self) -> None:
        """Do what the signal that was held back would have done (nothing if none came)."""
        if self.requested is not None:
            self._restore()
            signal.raise_signal(self.requested)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            self.deliver()
        self.requested = signal.Signals(number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
