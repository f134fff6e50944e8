"""Silences Transformers' logging, and turns its warnings about weights into errors. Read `core/errors.py` first."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging as transformers_logging

from luthier.core.errors import BaseError


def check_weights_fit(name: str, info: Mapping[str, Any]) -> None:
    """Raise `BaseError` if weights do not fit their model exactly; Transformers would initialize missing weights
    randomly."""
    faults = [f"{what}: {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
              for what in ("missing", "unexpected", "mismatched")
              if (keys := sorted(key if isinstance(key, str) else f"{key[0]} {tuple(key[1])} for {tuple(key[2])}"
                                 for key in info[f"{what}_keys"]))]
    if faults:
        raise BaseError(f"base {name!r}: the weights do not fit the model of config.json; {'; '.join(faults)}",
                        "give the folder its own config.json and weights, both from the same model")


def summarize_error(error: BaseException) -> str:
    """The first line of an error, without the final period."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:200]


@contextmanager
def silence_transformers() -> Iterator[None]:
    """A context without progress bars, warnings and log messages of Transformers below errors."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
