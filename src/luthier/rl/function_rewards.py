"""Rewards by name: a user's Python function, or a built-in one. Read `rewards.py` and `builtin_rewards.py` first."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from luthier.core.errors import LuthierError, RecipeError, RunError, suggest_nearest
from luthier.rl.builtin_rewards import BUILT_IN, build_builtin_reward
from luthier.rl.rewards import Completion, Reward, describe_prompt, to_floats


def load_reward(name: str, timeout: float, sandbox: Literal["kernel", "process"] = "kernel") -> Reward:
    """A built-in reward, or a user's ``module:name`` or ``file.py:name``. Raises `RecipeError` where there is none."""
    if name in BUILT_IN:
        return build_builtin_reward(name, timeout, sandbox)
    if ":" not in name:
        raise RecipeError(f"unknown reward {name!r}", f"{suggest_nearest(name, BUILT_IN)}; or write module:function")
    return wrap_function(_import_function(name), name)


def wrap_function(function: Callable[..., Any], name: str) -> Reward:
    """``function(prompts, completions, metadata) -> rewards`` as a reward.

    Raises:
        RecipeError: the function does not take three positional arguments.
        RunError: by the reward, where the function raises, or does not return one number per completion.
    """
    _check_signature(function, name)

    def reward(completions: Sequence[Completion]) -> Sequence[float]:
        first = f"its first prompt was {describe_prompt(completions[0])}"
        try:
            returned = function([completion.prompt for completion in completions],
                                [completion.text for completion in completions],
                                [dict(completion.metadata) for completion in completions])
            # A generator runs, and raises, when it is read: so it is read inside the `try`.
            returned = list(returned) if isinstance(returned, Iterator) else returned
        except LuthierError:
            raise
        except (Exception, SystemExit) as error:
            raise RunError(f"the reward {name!r} raised {_describe_error(error)}; {first}",
                           "fix the function so that it returns a number for every completion") from error
        try:
            return to_floats(returned, len(completions))
        except ValueError as error:
            raise RunError(f"the reward {name!r} {error}; {first}",
                           "return a list of numbers, one per completion, in their order") from error
    return reward


def _describe_error(error: BaseException) -> str:
    """The error, and the line that raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1:]
    return f"{type(error).__name__}: {error}" + "".join(f" ({frame.filename}:{frame.lineno})" for frame in last)


def _check_signature(function: Callable[..., Any], name: str) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # written in C, without a signature
    try:
        signature.bind([], [], [])
    except TypeError as error:
        raise RecipeError(f"the reward {name!r} cannot be called: {error}", "write it as "
                          "`def reward(prompts, completions, metadata)`: three lists of equal length") from None


def _import_function(name: str) -> Callable[..., Any]:
    """The function that ``module:name`` or ``file.py:name`` names. Raises `RecipeError`."""
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
                              "name a module on Python's path, or a file: rewards.py:function") from error
        raise RecipeError(f"the reward {name!r} cannot be imported: {place} raised {_describe_error(error)}",
                          "fix that line of the module") from error
    if not callable(function := vars(module).get(attribute)):
        raise RecipeError(f"{place!r} defines no function {attribute!r}", suggest_nearest(attribute, [
            key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]))
    return function


@cache
def _load_file(path: str, modified_ns: int) -> ModuleType:
    """The module in a file, executed once per modification time."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
