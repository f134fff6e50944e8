"""Quality of generated answers: what `train` measures before and after, and `evaluate` on demand.

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
    """How generated answers are measured on the test rows (or the validation rows where there are none)."""

    metrics: tuple[str, ...] = Field((), description=f"scores of generated answers: {', '.join(METRICS)}")
    max_new_tokens: int = Field(256, ge=1, description="longest answer")
    batch_size: int = Field(32, ge=1, description="answers generated at once")
    max_samples: int | None = Field(None, ge=1, description="use only the first so many rows")
    before_training: bool = Field(True, description="measure the base too, before training")

    @field_validator("metrics", mode="before")
    @classmethod
    def _several(cls, given: Any) -> Any:
        return (given,) if isinstance(given, str) else given

    @field_validator("metrics")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in METRICS:
                raise ValueError(f"unknown metric {name!r}: {suggest_nearest(name, METRICS)}")
        return names


def add_perplexity(measured: Mapping[str, float]) -> dict[str, float]:
    """The measures, and e to the power of the mean negative log-likelihood where they have one."""
    known = {"perplexity": math.exp(min(measured["nll"], 700.0))} if "nll" in measured else {}
    return {**measured, **known}


@dataclass(frozen=True)
class EvalPrompt:
    """A prompt as the model sees it, and as a person does, and the answer that is right."""

    ids: tuple[int, ...]
    text: str
    reference: str
    origin: Origin | None = None


@dataclass(frozen=True)
class GenerationScores:
    """What was answered to every question, and the mean of each score over all of them."""

    answers: tuple[str, ...]
    scores: dict[str, float]
    kind: Literal["base", "tuned"] = "tuned"


def check_references(questions: Sequence[EvalPrompt], metrics: Sequence[str]) -> None:
    """A `DataError`, before anything is answered, where a score cannot read the right answer of a row."""
    for question in questions:
        for name in metrics:
            try:
                METRICS[name]("", question.reference)
            except DataError as error:
                where = question.origin or repr(question.text)
                raise DataError(f"{where}: {error.what} (metric {name})", error.remedy) from None


def evaluate_generations(family: Family, questions: Sequence[EvalPrompt], config: EvaluateConfig,
                         tick: Callable[[int, int], None] = lambda done, total: None) -> GenerationScores:
    """Answer every question greedily and score the answers.

    Args:
        tick: told (answers done, answers in all).
    """
    sampling = SamplingParams(max_new_tokens=config.max_new_tokens, batch_size=config.batch_size)
    answers = [""] * len(questions)
    for done, answer in enumerate(family.generate([q.ids for q in questions], sampling), 1):
        answers[answer.index] = family.tokenizer.decode(answer.token_ids, skip_special_tokens=True).strip()
        tick(done, len(questions))
    scores = {name: sum(METRICS[name](a, q.reference) for a, q in zip(answers, questions, strict=True)) / len(questions)
              for name in config.metrics}
    return GenerationScores(tuple(answers), scores)
