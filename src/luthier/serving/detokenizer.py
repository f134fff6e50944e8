"""Turns a stream of tokens into text as it becomes final. There is no simpler file to read first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

INCOMPLETE = "\ufffd"  # decoders write it for an incomplete character
CONTEXT = 6  # tokens before the new ones that are decoded again, because they decide how the new ones are spelled


class IncrementalDetokenizer:
    """Decodes a growing list of tokens; a character is returned only once all of its bytes are there.

    Only the last tokens are decoded again with each new one, so the work for a token does not grow with the text.
    """

    def __init__(self, decode: Callable[..., str]) -> None:
        self.decode, self.token_ids = decode, list[int]()
        self._start = self._end = 0  # tokens [start, end) are the context, and their text has been emitted

    def push(self, token: int) -> str:
        """The text that one more token makes final."""
        self.token_ids.append(token)
        text = self._decode_from_start()
        return "" if text.endswith(INCOMPLETE) else self._take_new(text)

    def flush(self) -> str:
        """The text that is left when the stream has ended."""
        return self._take_new(self._decode_from_start())

    def _decode_from_start(self) -> str:
        return self.decode(self.token_ids[self._start:], skip_special_tokens=True)

    def _take_new(self, text: str) -> str:
        before = self.decode(self.token_ids[self._start:self._end], skip_special_tokens=True)
        if not text.startswith(before):  # a decoder may spell earlier tokens in another way once more are there
            return ""
        self._start, self._end = max(0, len(self.token_ids) - CONTEXT), len(self.token_ids)
        if self.decode(self.token_ids[self._start:], skip_special_tokens=True).startswith(INCOMPLETE):
            self._start = max(0, self._start - CONTEXT)  # the context would begin inside a character
        return text[len(before):]


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
