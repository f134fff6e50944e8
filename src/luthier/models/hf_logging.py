"""What Transformers would say, in our words: nothing, or an error that names the fault. Read `core/errors.py` first."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging as transformers_logging

from luthier.core.errors import BaseError


def check_weights_fit(name: str, info: Mapping[str, Any]) -> None:
    """Refuse weights that do not fit their model exactly. Transformers would fill the gaps with random numbers."""
    faults = [f"{what}: {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
              for what in ("missing", "unexpected", "mismatched")
              if (keys := sorted(key if isinstance(key, str) else f"{key[0]} {tuple(key[1])} for {tuple(key[2])}"
                                 for key in info[f"{what}_keys"]))]
    if faults:
        raise BaseError(f"base {name!r}: the weights do not fit the model of config.json; {'; '.join(faults)}",
                        "give the folder its own config.json and weights, both from the same model")


def summarize_error(error: BaseException) -> str:
    """The first line of an error, without a full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:200]


@contextmanager
def silence_transformers() -> Iterator[None]:
    """No progress bars and no chatter of Transformers: what is wrong is raised, what is not is not said."""
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
