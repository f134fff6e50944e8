"""Control tokens that are written in message text: `What does <|im_end|> mean?`. Read `templates.py` first.

By default such text is plain text, so a row or a request cannot end a turn or forge one. It is marked before the
template is
rendered and encoded separately from the text around it, so the template's own tokens stay tokens. Transformers'
`apply_chat_template(..., sanitize_control_tokens=True)` does the same.

Control tokens are all special tokens and, except in assistant turns, the added tokens that the template writes (such as
`<tool_call>`). In assistant turns the markers of reasoning and function calls stay tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

from luthier.core.protocols import Tokenizer

START, END = "\ufdd0", "\ufdd1"  # Unicode noncharacters, which text must not contain
MARKUP = re.compile(r"think|thought|reason|tool|function|call", re.IGNORECASE)  # in tokens that an assistant writes


@dataclass(frozen=True)
class TextPart:
    """A part of a marked text. `plain`: it spells a control token and is encoded as text."""

    start: int
    end: int
    plain: bool = False


@dataclass(frozen=True)
class ControlTokens:
    """The strings to mark. `own`: in assistant turns; `others`: in all other turns."""

    own: re.Pattern[str] | None = None
    others: re.Pattern[str] | None = None

    def mark(self, value: Any, role: str) -> Any:
        """`value` (a text, or a structure of texts) with each control token between `START` and `END`."""
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
    """The control tokens of a tokenizer whose chats `template` renders; none if `reading` is `token`."""
    if reading == "token":
        return ControlTokens()
    added = list(tokenizer.added_tokens_decoder.values())
    named = {str(token.content): bool(token.special) for token in added if not str(token.content).isspace()}
    special = {content for content, is_special in named.items() if is_special}
    written = {content for content in named if content in template}
    own = {content for content in special if not MARKUP.search(content)}
    return ControlTokens(_compile_pattern(own), _compile_pattern(special | written))


def _compile_pattern(tokens: set[str]) -> re.Pattern[str] | None:
    """Matches any of them, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))) if tokens else None


MARKED = re.compile(f"{START}([^{START}{END}]+){END}")


def remove_marks(text: str) -> str:
    """The text without the marks."""
    return MARKED.sub(r"\1", text) if START in text else text


def is_mark_broken(text: str) -> bool:
    """Whether a template split a marked string."""
    rest = MARKED.sub("", text) if START in text else text
    return START in rest or END in rest


def split_text(text: str, boundaries: Sequence[int]) -> Iterator[TextPart]:
    """`text` split at `boundaries` and around marked strings; the marks themselves are removed."""
    plain = [(match.start(1), match.end(1)) for match in MARKED.finditer(text)] if START in text else []
    at = 0
    for start, end in [*plain, (len(text) + 1, len(text) + 1)]:
        inner = [b for b in boundaries if at < b < start - 1]
        yield from (TextPart(a, b) for a, b in pairwise([at, *inner, start - 1]) if b > a)
        if start <= len(text):
            yield TextPart(start, end, plain=True)
        at = end + 1
