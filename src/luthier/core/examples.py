"""One training example, typed by its kind: what rows of a file become. Imports the stdlib only.

`types.py` goes on from here: examples become tokens, tokens become batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Origin:
    """Where a row came from, for every word said about it: ``train.jsonl:17``."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Message:
    """One turn of a chat. `weight` is that of its tokens in the loss; None: 1 for the assistant, 0 for others."""

    role: str
    content: str
    weight: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)  # tool_calls, name, ...: handed to the chat template


@dataclass(frozen=True)
class TextExample:
    """A document; every token of it is predicted."""

    text: str
    origin: Origin
    weight: float = 1.0


@dataclass(frozen=True)
class CompletionExample:
    """A bare prompt and its completion, joined without a chat template; the completion is predicted."""

    prompt: str
    completion: str
    origin: Origin
    weight: float = 1.0


@dataclass(frozen=True)
class ChatExample:
    """A conversation, put into words by the base's own chat template."""

    messages: tuple[Message, ...]
    origin: Origin
    weight: float = 1.0
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class ClassificationExample:
    """A text (or a pair of texts, joined as the base joins them) and what is known about it.

    Args:
        label: a class by its name or number, several of them, or a number to regress to, as the objective reads it.
    """

    text: str
    label: str | float | tuple[str, ...]
    origin: Origin
    second: str | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class TokenClassificationExample:
    """Words, each with a tag: token classification."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    origin: Origin
    weight: float = 1.0


@dataclass(frozen=True)
class PreferenceExample:
    """Answers to one prompt that someone compared: a pair (ranks 0 and 1) or a ranking of K.

    Args:
        prompt: the conversation up to where the answers begin; empty where the answers are whole transcripts.
        answers: each answer's turns, or one string that follows the prompt without a chat template.
        ranks: 0 is best; as many as answers.
        margin: by how much the first is better than the second, where the data say so.
    """

    prompt: tuple[Message, ...] | str
    answers: tuple[tuple[Message, ...] | str, ...]
    ranks: tuple[int, ...]
    origin: Origin
    margin: float | None = None
    weight: float = 1.0
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class UnpairedPreferenceExample:
    """One answer to one prompt, found good or bad (KTO)."""

    prompt: tuple[Message, ...] | str
    answer: tuple[Message, ...] | str
    good: bool
    origin: Origin
    weight: float = 1.0
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class ContrastiveExample:
    """Texts that belong together: anchor, positive, then hard negatives; or two texts and how alike they are.

    Args:
        score: likeness of the two texts in [0, 1] where it was measured; None for anchor, positive, negatives.
    """

    texts: tuple[str, ...]
    origin: Origin
    score: float | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class PromptExample:
    """A prompt without an answer: rollouts answer it.

    Args:
        metadata: what a reward function may be told: `reference`, `tests` and the row's other columns.
    """

    prompt: tuple[Message, ...] | str
    origin: Origin
    metadata: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class ImageExample:
    """A picture, [H, W] or [H, W, 3] of bytes, and its class where it has one."""

    pixels: Any
    origin: Origin
    label: str | float | None = None
    weight: float = 1.0


Worded = TextExample | CompletionExample | ChatExample  # examples whose own words are predicted
Example = (Worded | ClassificationExample | TokenClassificationExample | PreferenceExample | UnpairedPreferenceExample
           | ContrastiveExample
           | PromptExample | ImageExample)
