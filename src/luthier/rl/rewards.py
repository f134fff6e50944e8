"""What an answer is worth: built-in rewards, a user's function, an HTTP endpoint. Read `evaluation/answer_metrics.py`
first.

A reward is a function of several answers at once to as many numbers. Whatever goes wrong in one is a `RunError` that
names the prompt: a run that learned from a broken reward would be worse than one that stopped.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import math
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cache
from http.client import HTTPException
from pathlib import Path
from types import ModuleType
from typing import Any, SupportsFloat
from urllib import error as http
from urllib import request

import numpy as np
import torch

from luthier.core.errors import DataError, LuthierError, RecipeError, RunError, suggest_nearest
from luthier.core.examples import Origin
from luthier.evaluation.answer_metrics import METRICS
from luthier.rl.sandbox import Limits, passes_test

SHOWN = 80  # characters of a value in an error


@dataclass(frozen=True)
class Completion:
    """One answer, as a reward sees it.

    Args:
        prompt, text: decoded, without special tokens.
        facts: what the row of the prompt said besides: `reference`, `tests`, ...
        ids: tokens of the prompt; `tokens`: of the answer, the one that ended it included.
        finished: whether it ended by itself.
    """

    prompt: str
    text: str
    origin: Origin
    facts: Mapping[str, Any] = field(default_factory=dict)
    ids: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    finished: bool = True


Reward = Callable[[Sequence[Completion]], Sequence[float]]
Scorer = Callable[[str, Mapping[str, Any], float], float]  # (answer, facts, seconds) -> reward


def compute_rewards(answers: Sequence[Completion], rewards: Sequence[tuple[Reward, float]]) -> list[float]:
    """The weighted sum of several rewards for each answer. Raises `RunError` for one that is no finite number."""
    totals = [0.0] * len(answers)
    for reward, weight in rewards:
        found = list(reward(answers))
        if len(found) != len(answers):
            raise RunError(f"the reward gave {len(found)} numbers for {len(answers)} answers, the first to "
                           f"{_shorten(answers[0])}", "give one number for each answer, in their order")
        for i, (answer, value) in enumerate(zip(answers, found, strict=True)):
            if isinstance(value, bool | int | float) and math.isfinite(value):
                totals[i] += weight * value
                continue
            raise RunError(f"the reward of an answer to {_shorten(answer)} is {value!r}, not a finite number; the "
                           f"answer "
                           f"was {answer.text[:80]!r}", "mend the reward so that every answer, however odd, has one")
    return totals


def _shorten(answer: Completion) -> str:
    return f"{answer.prompt[-80:]!r} ({answer.origin})"


# ---------------------------------------------------------------- built in


def load_reward(name: str, timeout: float) -> Reward:
    """A built-in reward, or a user's ``module:name`` or ``file.py:name``. Raises `RecipeError` where there is none."""
    if name in BUILT_IN:
        judge = BUILT_IN[name]

        def each(answers: Sequence[Completion]) -> list[float]:
            return [_call_scorer(judge, answer, name, timeout) for answer in answers]
        return each
    if ":" not in name:
        raise RecipeError(f"there is no reward {name!r}",
                          f"{suggest_nearest(name, BUILT_IN)}; or write module:function")
    return wrap_function(_import_function(name), name)


def _call_scorer(judge: Scorer, answer: Completion, name: str, timeout: float) -> float:
    try:
        return judge(answer.text, answer.facts, timeout)
    except DataError as error:
        raise RunError(f"the reward {name!r} cannot judge answers to {_shorten(answer)}: {error.what}",
                       error.remedy) from error


def _get_metadata(facts: Mapping[str, Any], name: str) -> Any:
    if name not in facts:
        raise DataError(f"the row has no {name!r}, only {', '.join(facts) or 'a prompt'}",
                        f"give every row a column {name!r}, or choose a reward that needs none")
    return facts[name]


def _build_metric_reward(name: str) -> Scorer:
    return lambda text, facts, _: METRICS[name](text, str(_get_metadata(facts, "reference")))


def _score_length(text: str, facts: Mapping[str, Any], _: float) -> float:
    """1 at the row's `length` in words, falling to 0 at none and at twice as many."""
    wanted = _get_metadata(facts, "length")
    if not isinstance(wanted, int | float) or wanted <= 0:
        raise DataError(f"`length` is {wanted!r}, and the reward of that name wants a number of words above 0",
                        "mend the row")
    return max(0.0, 1 - abs(len(text.split()) - wanted) / wanted)


def _score_code_tests(text: str, facts: Mapping[str, Any], timeout: float) -> float:
    """The share of the row's `tests` (one Python text or a list of them) that pass on the code in the answer."""
    tests = _get_metadata(facts, "tests")
    listed = [tests] if isinstance(tests, str) else list(tests)
    if not listed:
        raise DataError("`tests` is empty", "give the row tests, such as `assert double(2) == 4`")
    return sum(passes_test(extract_code(text), test, Limits(seconds=timeout)) for test in listed) / len(listed)


def extract_code(text: str) -> str:
    """The first fenced block of an answer, or all of it."""
    _, fence, rest = text.partition("```")
    if not fence:
        return text
    first, _, block = rest.partition("\n")
    return (block if first.strip().isalnum() or not first.strip() else rest).partition("```")[0]


BUILT_IN: dict[str, Scorer] = {**{name: _build_metric_reward(name) for name in METRICS}, "length": _score_length,
                               "code_tests": _score_code_tests}


# ---------------------------------------------------------------- a user's own


def wrap_function(function: Callable[..., Any], name: str) -> Reward:
    """``function(prompts, answers, facts) -> rewards`` as a reward. What it raises, and what it returns that is not one
    number for each answer, becomes a `RunError`. Raises `RecipeError` where it cannot be called with these three."""
    _check_signature(function, name)

    def reward(answers: Sequence[Completion]) -> Sequence[float]:
        first = f"its first prompt was {_shorten(answers[0])}"
        try:
            found = function([a.prompt for a in answers], [a.text for a in answers], [dict(a.facts) for a in answers])
            found = list(found) if isinstance(found, Iterator) else found  # a generator runs here, and raises here
        except LuthierError:
            raise
        except (Exception, SystemExit) as error:
            raise RunError(f"the reward {name!r} raised {_describe_error(error)}; {first}",
                           "fix the function so that it returns a number for every answer") from error
        try:
            return to_floats(found, len(answers))
        except ValueError as error:
            raise RunError(f"the reward {name!r} {error}; {first}",
                           "return a list of numbers, one for each answer, in their order") from error
    return reward


def to_floats(found: Any, count: int) -> list[float]:
    """What a reward returned as `count` numbers. Raises `ValueError`, which says what was returned instead."""
    if inspect.iscoroutine(found):
        found.close()
        raise ValueError("returned a coroutine: an `async def` function is not awaited")
    values = found.tolist() if isinstance(found, torch.Tensor | np.ndarray) else found
    if isinstance(values, str | bytes | Mapping | Set) or not isinstance(values, Iterable):
        raise ValueError(f"returned {_short(found)}, not a list of numbers")
    listed = list(values)
    if len(listed) != count:
        raise ValueError(f"returned {len(listed)} numbers for {count} answers")
    numbers = []
    for index, value in enumerate(listed):
        if isinstance(value, torch.Tensor | np.generic | np.ndarray) and math.prod(value.shape) == 1:
            value = value.item()
        try:
            number = float(value) if isinstance(value, SupportsFloat) and not isinstance(value, complex) else None
        except (TypeError, ValueError, OverflowError):
            number = None
        if number is None or not math.isfinite(number):
            raise ValueError(f"returned {_short(value)} for answer {index}, not a finite number")
        numbers.append(number)
    return numbers


def _short(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= SHOWN else text[:SHOWN] + '...'}"


def _describe_error(error: BaseException) -> str:
    """The error, and the line that raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1:]
    return f"{type(error).__name__}: {error}" + "".join(f" ({frame.filename}:{frame.lineno})" for frame in last)


def _check_signature(function: Callable[..., Any], name: str) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # written in C: nothing is known of its arguments
    try:
        signature.bind([], [], [])
    except TypeError as error:
        raise RecipeError(f"the reward {name!r} cannot be called: {error}",
                          "write it as `def reward(prompts, answers, facts)`: three lists of equal length") from None


def _import_function(name: str) -> Callable[..., Any]:
    place, _, attribute = name.rpartition(":")
    try:
        if place.endswith(".py"):
            path = Path(place)
            module = _load_file(str(path), path.stat().st_mtime_ns)
        else:
            here = str(Path.cwd())
            sys.path.insert(0, here)
            try:
                module = importlib.import_module(place)
            finally:
                sys.path.remove(here)  # the first such entry, wherever the module has moved it
    except (Exception, SystemExit) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name and (place + ".").startswith(error.name + ".")
        if isinstance(error, OSError) or (missing and not place.endswith(".py")):
            raise RecipeError(f"the reward {name!r} cannot be imported: {error}",
                              "name a module that Python finds from here, or a file: rewards.py:function") from error
        raise RecipeError(f"the reward {name!r} cannot be imported: {place} raised {_describe_error(error)}",
                          "fix that line of the module") from error
    if not callable(function := vars(module).get(attribute)):
        raise RecipeError(f"{place!r} defines no function {attribute!r}", suggest_nearest(attribute, [
            key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]))
    return function


@cache
def _load_file(place: str, changed: int) -> ModuleType:
    """The module in a file, executed once for each time that it was `changed`."""
    found = importlib.util.spec_from_file_location(Path(place).stem, place)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def call_endpoint(url: str, timeout: float) -> Reward:
    """An address sent ``{"prompts": [...], "answers": [...], "facts": [...]}`` to give ``{"rewards": [...]}``."""
    if not url.startswith(("http://", "https://")):
        raise RecipeError(f"reward.url: {url!r} is no http:// or https:// address", "write it out whole")

    def reward(answers: Sequence[Completion]) -> Sequence[float]:
        said = {"prompts": [a.prompt for a in answers], "answers": [a.text for a in answers],
                "facts": [dict(a.facts) for a in answers]}
        asked = request.Request(url, json.dumps(said, default=str).encode(), {"Content-Type": "application/json"})
        try:
            with request.urlopen(asked, timeout=timeout) as response:
                return to_floats(json.load(response)["rewards"], len(answers))
        except http.HTTPError as error:
            why = f"it answered {error.code} {error.reason}"
        except (OSError, HTTPException) as error:  # refused, unknown, too late, cut off
            why = str(error) or type(error).__name__
        except (ValueError, KeyError, TypeError) as error:
            why = f"its answer is not {{\"rewards\": [numbers]}} ({type(error).__name__}: {error})"
        raise RunError(f"the reward endpoint {url} failed for {_shorten(answers[0])}: {why}",
                       "restart or fix that service, then continue with --resume")
    return reward
