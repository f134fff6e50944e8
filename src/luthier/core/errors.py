"""The errors a user can cause, each with the value, the rule and the remedy. Read this first: it imports nothing.

A `LuthierError` is the user's to mend: the command line prints it without a traceback and exits with its `exit_code`.
Programmer's mistakes are `assert`s and never come here.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LuthierError(ValueError):
    """Something that the user gave cannot be used.

    Args:
        what: the value met and the rule that it breaks, in one sentence.
        remedy: what to do about it, in one sentence.
    """

    exit_code = 2  # of the command line

    def __init__(self, what: str, remedy: str = "") -> None:
        self.what, self.remedy = what, remedy
        super().__init__(f"{what}\n  -> {remedy}" if remedy else what)


class RecipeError(LuthierError):
    """A recipe, or a setting on the command line, that cannot be."""


class DataError(LuthierError):
    """A data file or row that cannot be read or trained on."""


class BaseError(LuthierError):
    """A base model that cannot be found, loaded or understood."""


class RunError(LuthierError):
    """A run folder that is missing something, damaged, or in the way."""


class NotMergeable(LuthierError):
    """This method's change cannot be folded into the base's weights."""


class MissingExtra(LuthierError):
    """An optional package is needed and not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package!r}, which is not installed",
                         f"pip install 'luthier[{extra}]'")


class NotFinite(LuthierError):
    """A loss or gradient became infinite or not a number; nothing was updated with it."""


def suggest_nearest(word: str, known: Iterable[str]) -> str:
    """A hint for a misspelt word: ``did you mean 'rank'?``, or the list of what is known. Initials count too: lr."""
    names = sorted(known)
    close = [name for name in names if len(word) > 1 and word == "".join(part[:1] for part in name.split("_"))]
    close += difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
