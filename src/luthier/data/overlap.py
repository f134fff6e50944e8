"""Prompts that occur both in the training rows and in the held-out rows. Read `core/examples.py` first."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.core.examples import (
    ChatExample,
    ClassificationExample,
    CompletionExample,
    ContrastiveExample,
    Example,
    ImageExample,
    Message,
    PreferenceExample,
    PromptExample,
    TextExample,
    TokenClassificationExample,
    UnpairedPreferenceExample,
)

MAX_PAIRS = 20  # overlaps listed one by one


@dataclass(frozen=True)
class Overlap:
    """Examples of one part whose prompt also occurs in the training rows, ignoring case, space and punctuation."""

    count: int = 0
    pairs: tuple[tuple[str, str], ...] = ()


def count_overlap(train: Iterable[Example], other: Iterable[Example]) -> Overlap:
    """Counts the prompts of `other` that are also in `train`."""
    asked: dict[str, Example] = {}
    for example in train:
        asked.setdefault(normalize_prompt(example), example)
    asked.pop("", None)
    met = [(asked[words], example) for example in other if (words := normalize_prompt(example)) in asked]
    return Overlap(len(met), tuple((str(a.origin), str(b.origin)) for a, b in met[:MAX_PAIRS]))


def normalize_prompt(example: Example) -> str:
    """The prompt without case, punctuation and extra space: everything before the last answer, except the system
    prompt. For an image, a digest of its pixels."""
    if isinstance(example, ImageExample):
        return hashlib.blake2b(np.ascontiguousarray(example.pixels).tobytes(), digest_size=16).hexdigest()
    words = PROMPT_READERS[type(example)](example)
    if not isinstance(words, str):
        words = " ".join(m.content for m in words if m.role != "system")
    return " ".join(re.sub(r"[^\w\s]", " ", words.casefold()).split())


def _split_before_last(example: ChatExample) -> tuple[Message, ...]:
    last = max((i for i, m in enumerate(example.messages) if m.role == "assistant"), default=len(example.messages))
    return example.messages[:last]


PROMPT_READERS: dict[type, Callable[[Any], str | tuple[Message, ...]]] = {
    ChatExample: _split_before_last,
    CompletionExample: lambda example: example.prompt,
    PreferenceExample: lambda example: example.prompt or (example.answers[0][0],),  # transcripts without a common part
    UnpairedPreferenceExample: lambda example: example.prompt,
    PromptExample: lambda example: example.prompt,
    TextExample: lambda example: example.text,
    ClassificationExample: lambda example: f"{example.text} {example.second or ''}",
    TokenClassificationExample: lambda example: " ".join(example.words),
    ContrastiveExample: lambda example: " ".join(example.texts[:2]),
}
