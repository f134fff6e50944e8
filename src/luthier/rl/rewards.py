"""Rewards: functions of several completions to as many numbers. Read `evaluation/answer_metrics.py` first.

`builtin_rewards.py` has the built-in ones, `function_rewards.py` imports a user's, `http_rewards.py` calls an endpoint.

Every failure of a reward is a `RunError` that names the prompt: a run trained on a wrong reward is worse than one that
stopped.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, SupportsFloat

import numpy as np
import torch

from luthier.core.errors import RunError
from luthier.core.examples import Origin

MAX_SHOWN = 80  # characters of a value in an error


@dataclass(frozen=True)
class Completion:
    """One completion, as a reward sees it.

    Args:
        prompt, text: decoded, without special tokens.
        metadata: the other columns of the prompt's row: `reference`, `tests`, ...
        prompt_ids: tokens of the prompt.
        token_ids: tokens of the completion, the stop token included.
        finished: whether it ended with a stop token.
    """

    prompt: str
    text: str
    origin: Origin
    metadata: Mapping[str, Any] = field(default_factory=dict)
    prompt_ids: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()
    finished: bool = True


Reward = Callable[[Sequence[Completion]], Sequence[float]]


def compute_rewards(completions: Sequence[Completion], rewards: Sequence[tuple[Reward, float]]) -> list[float]:
    """The weighted sum of several rewards for each completion, [N]. Raises `RunError` for one that is not finite."""
    totals = [0.0] * len(completions)
    for reward, weight in rewards:
        values = list(reward(completions))
        if len(values) != len(completions):
            raise RunError(f"the reward gave {len(values)} numbers for {len(completions)} completions, the first of "
                           f"{describe_prompt(completions[0])}", "return one number per completion, in their order")
        for i, (completion, value) in enumerate(zip(completions, values, strict=True)):
            if isinstance(value, bool | int | float) and math.isfinite(value):
                totals[i] += weight * value
                continue
            raise RunError(f"the reward of a completion of {describe_prompt(completion)} is {value!r}, not a finite "
                           f"number; the completion was {completion.text[:MAX_SHOWN]!r}",
                           "fix the reward so that every completion has a finite value")
    return totals


def describe_prompt(completion: Completion) -> str:
    """The end of the prompt, and the file and line it is from, for an error."""
    return f"{completion.prompt[-MAX_SHOWN:]!r} ({completion.origin})"


def to_floats(returned: Any, count: int) -> list[float]:
    """The `count` numbers that a reward returned. Raises `ValueError`, which describes what was returned instead."""
    if inspect.iscoroutine(returned):
        returned.close()
        raise ValueError("returned a coroutine: an `async def` function is not awaited")
    values = returned.tolist() if isinstance(returned, torch.Tensor | np.ndarray) else returned
    if isinstance(values, str | bytes | Mapping | Set) or not isinstance(values, Iterable):
        raise ValueError(f"returned {_describe_value(returned)}, not a list of numbers")
    listed = list(values)
    if len(listed) != count:
        raise ValueError(f"returned {len(listed)} numbers for {count} completions")
    numbers = []
    for index, value in enumerate(listed):
        if isinstance(value, torch.Tensor | np.generic | np.ndarray) and math.prod(value.shape) == 1:
            value = value.item()
        try:
            number = float(value) if isinstance(value, SupportsFloat) and not isinstance(value, complex) else None
        except (TypeError, ValueError, OverflowError):
            number = None
        if number is None or not math.isfinite(number):
            raise ValueError(f"returned {_describe_value(value)} for completion {index}, not a finite number")
        numbers.append(number)
    return numbers


def _describe_value(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + '...'}"
