"""Consent of the present call to run code that is not Luthier's. Reads nothing else first.

A stored file may name code: the Python files of a base model, a function or an endpoint that computes rewards. Naming
it is not consent, because the file may come from a stranger. Consent is given by the call that runs now:

    luthier train --resume RUN --allow-code rewards.py
    luthier.train(recipe, allow_code=["rewards.py"])

It holds while that call runs, in its own thread. Everything else is denied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_ALLOWED: ContextVar[frozenset[str]] = ContextVar("allowed code", default=frozenset())


@contextmanager
def allow_code(names: str | Iterable[str]) -> Iterator[None]:
    """Allow code in addition to what is allowed already.

    Args:
        names: files, modules, URLs, or base models, as the stored file names them. `rewards.py` allows every function
            of that file, `rewards.py:f` only `f`.
    """
    given = [names] if isinstance(names, str) else names
    token = _ALLOWED.set(_ALLOWED.get() | {form for name in given for form in _spell(name)})
    try:
        yield
    finally:
        _ALLOWED.reset(token)


def is_allowed(*names: str) -> bool:
    """Whether the present call allows code by any of these names."""
    return any(form in _ALLOWED.get() for name in names for form in _spell(name))


def accepts_consent(verb: Callable[P, R]) -> Callable[P, R]:
    """A verb whose keyword `allow_code` holds for the whole call."""

    @wraps(verb)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        given = kwargs.get("allow_code") or ()
        assert isinstance(given, Iterable)
        with allow_code(given):
            return verb(*args, **kwargs)

    return call


def _spell(name: str) -> tuple[str, str]:
    """A name, and the absolute path that it stands for where it is a path: a resumed recipe holds absolute paths."""
    return name, str(Path(name).expanduser().absolute())
