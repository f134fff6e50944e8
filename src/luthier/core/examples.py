"""Training examples, one class for each kind: rows of a file become examples. Imports the standard library only.

Read `types.py` next: examples become tokens, tokens become batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Origin:
    """File and line of a row, for messages and reports: ``train.jsonl:17``."""

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
    extra: Mapping[str, Any] = field(default_factory=dict)  # tool_calls, name, ...: passed to the chat template


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
    """A conversation, rendered by the chat template of the base model."""

    messages: tuple[Message, ...]
    origin: Origin
    weight: float = 1.0
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class ClassificationExample:
    """A text, or a pair of texts joined by the tokenizer, and its label.

    Args:
        label: a class name, several class names, or a number for regression; the objective defines which.
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
    """Completions of one prompt in order of preference: a pair (ranks 0 and 1) or a ranking of K.

    Args:
        prompt: the conversation before the completions; empty if the completions are whole transcripts.
        answers: the turns of each completion, or a string that follows the prompt without a chat template.
        ranks: 0 is best; one for each completion.
        margin: how much better the first is than the second, if the data provide it.
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
    """One completion of one prompt, labeled desirable (`good`) or undesirable (KTO)."""

    prompt: tuple[Message, ...] | str
    answer: tuple[Message, ...] | str
    good: bool
    origin: Origin
    weight: float = 1.0
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class ContrastiveExample:
    """An anchor, a positive, then hard negatives; or two texts and their similarity.

    Args:
        score: similarity of the two texts in [0, 1]; None for anchor, positive, negatives.
    """

    texts: tuple[str, ...]
    origin: Origin
    score: float | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class PromptExample:
    """A prompt without a completion, for rollouts.

    Args:
        metadata: columns that reward functions receive: `reference`, `tests` and all other columns of the row.
    """

    prompt: tuple[Message, ...] | str
    origin: Origin
    metadata: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class ImageExample:
    """An image, [H, W] or [H, W, 3] of bytes, and its class if it has one."""

    pixels: Any
    origin: Origin
    label: str | float | None = None
    weight: float = 1.0


LMExample = TextExample | CompletionExample | ChatExample  # their own text is predicted
Example = (LMExample | ClassificationExample | TokenClassificationExample | PreferenceExample
           | UnpairedPreferenceExample | ContrastiveExample | PromptExample | ImageExample)
