"""Ctrl-C and SIGTERM as a request that the training loop reads between two steps. Reads nothing else first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interruption:
    """`requested` is the name of the first signal received, or None."""

    def __init__(self) -> None:
        self.requested: str | None = None
        self._has_sigint = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._has_sigint:
                raise KeyboardInterrupt
            self._has_sigint = True
        self.requested = self.requested or signal.Signals(number).name


@contextmanager
def handle_interrupts() -> Iterator[Interruption]:
    """Inside the context, SIGINT and SIGTERM only set `requested`; a second SIGINT raises `KeyboardInterrupt` at once.

    Python delivers signals to the main thread only. In other threads this changes nothing, and `requested`
    stays None.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    before = {number: signal.signal(number, interruption._receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            # None: a handler that was not installed by Python, which Python cannot restore
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
