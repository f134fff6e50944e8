"""Scores generated answers: `train` does it before and after training, `evaluate` on demand.

Read `evaluation/answer_metrics.py` first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, field_validator

from luthier.core.config import Config
from luthier.core.errors import DataError, suggest_nearest
from luthier.core.examples import Origin
from luthier.core.protocols import Family, SamplingParams
from luthier.evaluation.answer_metrics import METRICS


class EvaluateConfig(Config):
    """How generated answers are scored on the test rows, or on the validation rows without test rows."""

    metrics: tuple[str, ...] = Field((), description=f"scores of generated answers: {', '.join(METRICS)}")
    max_new_tokens: int = Field(256, ge=1, description="longest answer")
    batch_size: int = Field(32, ge=1, description="number of answers generated in one batch")
    max_samples: int | None = Field(None, ge=1, description="maximum number of rows to use")
    before_training: bool = Field(True, description="also evaluate the base model, before training")

    @field_validator("metrics", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("metrics")
    @classmethod
    def _check_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in METRICS:
                raise ValueError(f"unknown metric {name!r}: {suggest_nearest(name, METRICS)}")
        return names


def add_perplexity(measured: Mapping[str, float]) -> dict[str, float]:
    """The metrics, with the perplexity exp(nll) where they have `nll`."""
    known = {"perplexity": math.exp(min(measured["nll"], 700.0))} if "nll" in measured else {}
    return {**measured, **known}


@dataclass(frozen=True)
class EvalPrompt:
    """A prompt as token ids and as text, with the reference answer."""

    ids: tuple[int, ...]
    text: str
    reference: str
    origin: Origin | None = None


@dataclass(frozen=True)
class GenerationScores:
    """The generated answers, and the mean of each metric."""

    answers: tuple[str, ...]
    scores: dict[str, float]
    kind: Literal["base", "tuned"] = "tuned"


def check_references(prompts: Sequence[EvalPrompt], metrics: Sequence[str]) -> None:
    """Raises `DataError` before generation where a metric cannot parse a reference."""
    for prompt in prompts:
        for name in metrics:
            try:
                METRICS[name]("", prompt.reference)
            except DataError as error:
                where = prompt.origin or repr(prompt.text)
                raise DataError(f"{where}: {error.what} (metric {name})", error.remedy) from None


def evaluate_generations(family: Family, prompts: Sequence[EvalPrompt], config: EvaluateConfig,
                         tick: Callable[[int, int], None] = lambda done, total: None) -> GenerationScores:
    """Generate an answer to every prompt by greedy decoding and score it.

    Args:
        tick: called with (answers done, answers in total).
    """
    sampling = SamplingParams(max_new_tokens=config.max_new_tokens, batch_size=config.batch_size)
    answers = [""] * len(prompts)
    for done, answer in enumerate(family.generate([q.ids for q in prompts], sampling), 1):
        answers[answer.index] = family.tokenizer.decode(answer.token_ids, skip_special_tokens=True).strip()
        tick(done, len(prompts))
    scores = {name: sum(METRICS[name](a, q.reference) for a, q in zip(answers, prompts, strict=True)) / len(prompts)
              for name in config.metrics}
    return GenerationScores(tuple(answers), scores)
