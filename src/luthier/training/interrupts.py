"""Signals as a request that the training loop reads between two steps. Read `core/errors.py` first."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from luthier.core.errors import StoppedAtOnce

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE_SECONDS = 20.0  # for a process whose parent has ended


class Interruption:
    """`requested` is the name of the first signal received, or None."""

    def __init__(self) -> None:
        self.requested: str | None = None
        self._received: set[int] = set()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number in self._received:
            raise StoppedAtOnce(number)
        self._received.add(number)
        self.requested = self.requested or signal.Signals(number).name


@contextmanager
def handle_interrupts() -> Iterator[Interruption]:
    """Inside the context, SIGINT, SIGTERM and SIGHUP only set `requested`; the same one again raises `StoppedAtOnce`.

    SIGHUP stays ignored where it was ignored, as under `nohup`.

    Python delivers signals to the main thread only. In other threads this changes nothing, and `requested`
    stays None.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    before = {number: signal.signal(number, interruption._receive) for number in NUMBERS
              if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            # None: a handler that was not installed by Python, which Python cannot restore
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def end_with_parent(parent: int) -> None:
    """Send this process SIGTERM when the process `parent` has ended, and end it if it is still there 20 s later.

    The kernel gives a process whose parent has ended another parent, also where the parent was killed.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_SECONDS)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name="end with parent", daemon=True).start()
