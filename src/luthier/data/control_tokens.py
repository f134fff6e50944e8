"""Control tokens that are only spelt in a text: `What does <|im_end|> mean?`. Read `templates.py` first.

By default such a spelling is plain text: a row or a request cannot end a turn or forge one. It is marked before the
template is rendered and encoded apart from what surrounds it, so the template's own tokens stay tokens. This is the
reading of Transformers' `apply_chat_template(..., sanitize_control_tokens=True)`.

What counts as a control token: every special token, and in what others than the assistant say also the added tokens
that the template writes (`<tool_call>`, say). In the assistant's own turns the marks of thoughts and function calls are
its own words and stay tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

from luthier.core.protocols import Tokenizer

START, END = "\ufdd0", "\ufdd1"  # noncharacters of Unicode, which no text that is exchanged may hold
MARKUP = re.compile(r"think|thought|reason|tool|function|call", re.IGNORECASE)  # in tokens that an assistant writes


@dataclass(frozen=True)
class TextPart:
    """A part of a marked text. `plain`: it spells a control token, and is encoded as text."""

    start: int
    end: int
    plain: bool = False


@dataclass(frozen=True)
class ControlTokens:
    """Which spellings are marked. `own`: in what the assistant says; `others`: in all else."""

    own: re.Pattern[str] | None = None
    others: re.Pattern[str] | None = None

    def mark(self, value: Any, role: str) -> Any:
        """`value`, a text or anything with texts inside, with each spelling between `START` and `END`."""
        pattern = self.own if role == "assistant" else self.others
        return value if pattern is None else _mark_value(value, pattern)


def _mark_value(value: Any, pattern: re.Pattern[str]) -> Any:
    if isinstance(value, str):
        return pattern.sub(f"{START}\\g<0>{END}", value)
    if isinstance(value, Mapping):
        return {key: _mark_value(inner, pattern) for key, inner in value.items()}
    return [_mark_value(inner, pattern) for inner in value] if isinstance(value, (list, tuple)) else value


@lru_cache(maxsize=64)
def find_control_tokens(tokenizer: Tokenizer, template: str = "", reading: str = "text") -> ControlTokens:
    """The control tokens of a tokenizer, whose chats are rendered by `template`; none where `reading` is `token`."""
    if reading == "token":
        return ControlTokens()
    added = list(tokenizer.added_tokens_decoder.values())
    named = {str(token.content): bool(token.special) for token in added if not str(token.content).isspace()}
    special = {content for content, is_special in named.items() if is_special}
    written = {content for content in named if content in template}
    own = {content for content in special if not MARKUP.search(content)}
    return ControlTokens(_compile_pattern(own), _compile_pattern(special | written))


def _compile_pattern(tokens: set[str]) -> re.Pattern[str] | None:
    """Finds any of them, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))) if tokens else None


MARKED = re.compile(f"{START}([^{START}{END}]+){END}")


def remove_marks(text: str) -> str:
    """The text without its marks."""
    return MARKED.sub(r"\1", text) if START in text else text


def is_mark_broken(text: str) -> bool:
    """Whether a template took a marked spelling apart."""
    rest = MARKED.sub("", text) if START in text else text
    return START in rest or END in rest


def split_text(text: str, boundaries: Sequence[int]) -> Iterator[TextPart]:
    """`text` divided at `boundaries` and around marked spellings; the marks themselves are in no part."""
    plain = [(match.start(1), match.end(1)) for match in MARKED.finditer(text)] if START in text else []
    at = 0
    for start, end in [*plain, (len(text) + 1, len(text) + 1)]:
        inner = [b for b in boundaries if at < b < start - 1]
        yield from (TextPart(a, b) for a, b in pairwise([at, *inner, start - 1]) if b > a)
        if start <= len(text):
            yield TextPart(start, end, plain=True)
        at = end + 1
