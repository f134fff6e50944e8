"""Built-in rewards: the answer metrics, a length, and unit tests on generated code. Read `rewards.py` first."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal

from luthier.core.errors import DataError, RunError
from luthier.evaluation.answer_metrics import METRICS
from luthier.rl.rewards import Completion, Reward, describe_prompt
from luthier.rl.sandbox import Limits, Walls, require_walls, run_test

CODE_TESTS = "code_tests"
Scorer = Callable[[str, Mapping[str, Any], float], float]  # (text, metadata, seconds) -> reward
JOBS = 2 * (os.cpu_count() or 1)  # completions whose tests run at once; each waits for its processes most of the time


def build_builtin_reward(name: str, timeout: float, sandbox: Literal["kernel", "process"] = "kernel") -> Reward:
    """The built-in reward of that name.

    Args:
        timeout: seconds that each test of one completion may take.
        sandbox: of `code_tests`; `process` limits time and memory only.

    Raises:
        RunError: `code_tests` on a machine whose kernel cannot wall off a program.
    """
    if name == CODE_TESTS:
        scorer: Scorer = partial(_score_code_tests, walls=require_walls() if sandbox == "kernel" else "none")
        jobs = JOBS
    else:
        scorer, jobs = BUILT_IN[name], 1

    def reward(completions: Sequence[Completion]) -> list[float]:
        score = partial(_call_scorer, scorer, name=name, timeout=timeout)
        if jobs == 1:
            return [score(completion) for completion in completions]
        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(score, completions))
    return reward


def _call_scorer(scorer: Scorer, completion: Completion, name: str, timeout: float) -> float:
    try:
        return scorer(completion.text, completion.metadata, timeout)
    except DataError as error:
        raise RunError(f"the reward {name!r} cannot score completions of {describe_prompt(completion)}: {error.what}",
                       error.remedy) from error


def _get_metadata(metadata: Mapping[str, Any], column: str) -> Any:
    if column not in metadata:
        raise DataError(f"the row has no {column!r}, only {', '.join(metadata) or 'a prompt'}",
                        f"give every row a column {column!r}, or choose a reward that needs none")
    return metadata[column]


def _build_metric_scorer(name: str) -> Scorer:
    return lambda text, metadata, _: METRICS[name](text, str(_get_metadata(metadata, "reference")))


def _score_length(text: str, metadata: Mapping[str, Any], _: float) -> float:
    """1 at the row's `length` in words, falling linearly to 0 at no words and at twice as many."""
    length = _get_metadata(metadata, "length")
    if not isinstance(length, int | float) or length <= 0:
        raise DataError(f"`length` is {length!r}; the reward `length` needs a number of words above 0", "fix the row")
    return max(0.0, 1 - abs(len(text.split()) - length) / length)


def _score_code_tests(text: str, metadata: Mapping[str, Any], timeout: float, walls: Walls | None = None) -> float:
    """The share of the row's `tests` (one Python text or a list of them) that pass on the code of the completion."""
    given = _get_metadata(metadata, "tests")
    tests = [given] if isinstance(given, str) else list(given)
    if not tests:
        raise DataError("`tests` is empty", "give the row tests, such as `assert double(2) == 4`")
    program = extract_code(text)
    return sum(run_test(program, test, Limits(seconds=timeout), walls).passed for test in tests) / len(tests)


def extract_code(text: str) -> str:
    """The first fenced block of a completion; all of it where there is none."""
    _, fence, rest = text.partition("```")
    if not fence:
        return text
    first, _, block = rest.partition("\n")
    return (block if first.strip().isalnum() or not first.strip() else rest).partition("```")[0]


BUILT_IN: dict[str, Scorer] = {**{name: _build_metric_scorer(name) for name in METRICS}, "length": _score_length,
                               CODE_TESTS: _score_code_tests}
