"""Progress: a bar on a terminal, a line every ten seconds elsewhere, nothing when quiet."""

from __future__ import annotations

import doctest
import io

import pytest
from rich.console import Console

from luthier.reporting import progress
from luthier.reporting.progress import Progress, status


def console(terminal: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=terminal, width=120), out


def test_examples() -> None:
    assert doctest.testmod(progress).failed == 0


def test_without_a_terminal_a_line_every_ten_seconds_and_at_the_end() -> None:
    screen, out = console(False)
    times = iter([0.0, *(3.0 * step for step in range(1, 11))])
    with Progress(20, start=10, console=screen, clock=lambda: next(times)) as shown:
        for step in range(11, 21):
            shown.update(step, loss=1.23456, **{"tokens/s": 81234.5})
    assert out.getvalue().splitlines() == [
        "step 14/20  loss 1.235  tokens/s 81,234  0:00:12 elapsed, 0:00:18 left",
        "step 18/20  loss 1.235  tokens/s 81,234  0:00:24 elapsed, 0:00:06 left",
        "step 20/20  loss 1.235  tokens/s 81,234  0:00:30 elapsed, 0:00:00 left"]


def test_on_a_terminal_a_bar() -> None:
    screen, out = console(True)
    with Progress(4, console=screen) as shown:
        shown.update(3, loss=0.5)
    assert "3/4" in out.getvalue()
    assert "loss 0.5" in out.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_quiet_is_silent(terminal: bool) -> None:
    screen, out = console(terminal)
    with status("loading", quiet=True, console=screen), Progress(1, quiet=True, console=screen) as shown:
        shown.update(1, loss=0.5)
    assert out.getvalue() == ""


@pytest.mark.parametrize("terminal", [False, True])
def test_status_says_what_goes_on(terminal: bool) -> None:
    screen, out = console(terminal)
    with status("loading", console=screen):
        pass
    assert "loading" in out.getvalue()


def test_all_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with status("loading"), Progress(1) as shown:
        shown.update(1, loss=0.5)
    said = capsys.readouterr()
    assert said.out == ""
    assert "loading" in said.err
    assert "step 1/1" in said.err
