"""Turns a stream of tokens into text as it becomes final. There is no simpler file to read first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

INCOMPLETE = "\ufffd"  # decoders write it for an incomplete character


class IncrementalDetokenizer:
    """Decodes a growing list of tokens; a character is returned only once all of its bytes are there."""

    def __init__(self, decode: Callable[..., str]) -> None:
        self.decode, self.token_ids, self.emitted = decode, list[int](), ""

    def push(self, token: int) -> str:
        """The text that one more token makes final."""
        self.token_ids.append(token)
        # Decoded as a whole each time: the text of a token depends on the tokens before it.
        text: str = self.decode(self.token_ids, skip_special_tokens=True)
        if not text.startswith(self.emitted) or text.endswith(INCOMPLETE):
            return ""
        return self._take_new(text)

    def flush(self) -> str:
        """The text that is left when the stream has ended."""
        return self._take_new(self.decode(self.token_ids, skip_special_tokens=True))

    def _take_new(self, text: str) -> str:
        new, self.emitted = text[len(self.emitted):], text
        return new


def stream_text(tokens: Iterable[int], decode: Callable[..., Any]) -> Iterator[str]:
    """The text of a stream of tokens, in parts as they become final.

    >>> list(stream_text(iter([72, 105, 195, 164]), lambda ids, **_: bytes(ids).decode(errors="replace")))
    ['H', 'i', 'ä']
    """
    detokenizer = IncrementalDetokenizer(decode)
    for token in tokens:
        if new := detokenizer.push(token):
            yield new
    if new := detokenizer.flush():
        yield new
