"""A polite end: Ctrl-C or a scheduler's SIGTERM becomes a request that the loop reads between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interruption:
    """`requested` is None, or the name of the first signal that asked for an end."""

    def __init__(self) -> None:
        self.requested: str | None = None
        self._impatient = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._impatient:
                raise KeyboardInterrupt
            self._impatient = True
        self.requested = self.requested or signal.Signals(number).name


@contextmanager
def handle_interrupts() -> Iterator[Interruption]:
    """While open, SIGINT and SIGTERM only set `requested`; a second SIGINT raises `KeyboardInterrupt` at once.

    Python hands signals to the main thread alone, so in any other this changes nothing and `requested` stays None.
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
            # None: a handler that was not set from Python and cannot be set from here again
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
