"""Progress on stderr: a bar on a terminal, a line every few seconds elsewhere, or nothing. No simpler file to read."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

LINE_INTERVAL = 10.0  # seconds between two lines without a terminal


class Progress:
    """The progress of a run: a context manager whose `update` is called after each step.

    Args:
        total: the number of the last step.
        start: the first step of a resumed run; the time left is estimated from the steps since then.
        title: what is counted.
        quiet: print nothing.
        console, clock: for tests.
    """

    def __init__(self, total: int, *, start: int = 0, title: str = "step", quiet: bool = False,
                 console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._start, self._title, self._quiet, self._clock = total, start, title, quiet, clock
        self._console = console or Console(stderr=True)
        self._bar = Bar(TextColumn(title), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[numbers]}"),
                        TimeElapsedColumn(), TimeRemainingColumn(), console=self._console, disable=quiet)

    def __enter__(self) -> Self:
        self._began = self._last_line = self._clock()
        if self._console.is_terminal:
            self._task = self._bar.add_task("", total=self._total, completed=self._start, numbers="")
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def update(self, step: int, **numbers: float) -> None:
        """Show `step` and the numbers by their names: ``update(3, loss=2.1, **{"tokens/s": 812.0})``."""
        shown = "  ".join(f"{name} {_format_number(value)}" for name, value in numbers.items())
        if self._console.is_terminal:
            self._bar.update(self._task, completed=step, numbers=shown)
            return
        now = self._clock()
        if self._quiet or (now - self._last_line < LINE_INTERVAL and step != self._total):
            return
        self._last_line = now
        elapsed = now - self._began
        left = elapsed / max(1, step - self._start) * (self._total - step)
        times = f"{_format_duration(elapsed)} elapsed, {_format_duration(left)} left"
        line = f"{self._title} {step}/{self._total}  {shown}  {times}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def status(text: str, *, quiet: bool = False, console: Console | None = None) -> Iterator[None]:
    """A spinner with `text` while something loads; one plain line without a terminal."""
    console = console or Console(stderr=True)
    if quiet:
        yield
    elif console.is_terminal:
        with console.status(text):
            yield
    else:
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        yield


def print_line(line: str, quiet: bool = False) -> None:
    """Print a note or warning to stderr."""
    if not quiet:
        print(line, file=sys.stderr)


def _format_number(value: float) -> str:
    """Four significant digits; thousands with commas.

    >>> _format_number(2.34567), _format_number(81234.5), _format_number(0.0002), _format_number(float("nan"))
    ('2.346', '81,234', '0.0002', 'nan')
    """
    return f"{value:,.0f}" if 1000 <= abs(value) < float("inf") else f"{value:.4g}"


def _format_duration(seconds: float) -> str:
    """
    >>> _format_duration(3725.6)
    '1:02:05'
    """
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
