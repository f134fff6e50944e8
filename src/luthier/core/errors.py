"""Errors that a user can fix, each with the value, the rule and the remedy. Read this first: it imports nothing.

The command line prints a `LuthierError` without a traceback and exits with its `exit_code`. Programming errors are
`assert`s.
"""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable


class LuthierError(ValueError):
    """Invalid input of the user.

    Args:
        what: the value and the rule that it breaks, in one sentence.
        remedy: how to fix it, in one sentence.
    """

    exit_code = 2  # of the command line

    def __init__(self, what: str, remedy: str = "") -> None:
        self.what, self.remedy = what, remedy
        super().__init__(f"{what}\n  -> {remedy}" if remedy else what)


class RecipeError(LuthierError):
    """An invalid recipe or command-line setting."""


class DataError(LuthierError):
    """A data file or row that cannot be read or used for training."""


class BaseError(LuthierError):
    """A base model that cannot be found or loaded, or that is not supported."""


class RunError(LuthierError):
    """A run folder that is incomplete, damaged, or already exists."""


class NotMergeable(LuthierError):
    """The method's change cannot be merged into the base weights."""


class MissingExtra(LuthierError):
    """A required optional package is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package!r}, which is not installed",
                         f"pip install 'luthier[{extra}]'")


class NotFinite(LuthierError):
    """A loss or gradient is infinite or NaN; no weight was updated with it."""


class StoppedAtOnce(KeyboardInterrupt):
    """The same signal came twice: the work in progress is abandoned. `exit_code` is the one that a shell expects."""

    def __init__(self, number: int) -> None:
        self.exit_code = 128 + number
        super().__init__(signal.Signals(number).name)


def suggest_nearest(word: str, known: Iterable[str]) -> str:
    """A hint for a misspelled name: ``did you mean 'rank'?``, or the list of known names. Initials match too: lr."""
    names = sorted(known)
    close = [name for name in names if len(word) > 1 and word == "".join(part[:1] for part in name.split("_"))]
    close += difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
