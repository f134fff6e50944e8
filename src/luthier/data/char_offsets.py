"""Tokenizes text and returns the character range of each token. Read `chat.py` first; `tokenization.py` uses this.

A text is encoded in parts. No token spans the position where generation starts, so a prompt has the same tokens in
training and in generation. Text that only spells a control token is encoded separately.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from luthier.core.protocols import Tokenizer
from luthier.data.chat import RenderedChat
from luthier.data.control_tokens import TextPart, split_text


def tokenize_rendered(text: RenderedChat, tokenizer: Tokenizer, *, special: bool) -> tuple[list[int], list[int],
                                                                                           list[int]]:
    """Token ids, and the start and end of each token's characters; both never decrease.

    Args:
        special: whether to add the tokenizer's special tokens around the whole text.
    """
    parts = list(split_text(text.text, text.boundaries))
    if tokenizer.is_fast and len(parts) == 1 and not parts[0].plain:
        return _tokenize_whole(text.text, tokenizer, special)
    return _join_parts(text.text, parts if tokenizer.is_fast else _split_further(parts, text), tokenizer, special)


def _tokenize_whole(text: str, tokenizer: Tokenizer, special: bool) -> tuple[list[int], list[int], list[int]]:
    out = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    starts, ends, at = [], [], 0
    for start, end in out["offset_mapping"]:
        if end < at:  # the tokenizer's end token, which has no characters
            start = end = at
        elif start == end:  # whitespace, if the tokenizer excludes it from the offsets
            start = min(start, at)
        starts.append(start)
        ends.append(end)
        at = end
    return out["input_ids"], starts, ends


def _split_further(parts: list[TextPart], text: RenderedChat) -> list[TextPart]:
    """The parts, also split where spans start and end, for a tokenizer without offsets."""
    bounds = {at for span in text.spans for at in (span.start, span.end)}
    found: list[TextPart] = []
    for part in parts:
        inner = sorted(at for at in bounds if part.start < at < part.end)
        found += [TextPart(a, b, part.plain) for a, b in pairwise([part.start, *inner, part.end])]
    return found


def _join_parts(text: str, parts: Sequence[TextPart], tokenizer: Tokenizer,
                special: bool) -> tuple[list[int], list[int], list[int]]:
    """The tokens of all parts in order."""
    opening, closing = get_special_tokens(tokenizer) if special else ((), ())
    ids, starts, ends = list(opening), [0] * len(opening), [0] * len(opening)
    for part in parts:
        found, begin, stop = _tokenize_part(text[part.start:part.end], tokenizer, part.plain, first=not part.start)
        ids += found
        starts += [part.start + at for at in begin]
        ends += [part.start + at for at in stop]
    return [*ids, *closing], starts + [len(text)] * len(closing), ends + [len(text)] * len(closing)


ANCHORS = ("\n", ".", "a")  # encoded before a part, tried in order: some merge with the following text


def _tokenize_part(text: str, tokenizer: Tokenizer, plain: bool, first: bool) -> tuple[list[int], list[int], list[int]]:
    """Encodes one part. Parts after the first are encoded after an anchor character, whose tokens are then removed: at
    the start of a text some tokenizers add a space.

    Args:
        plain: the part spells a control token; none of its tokens may be one.
    """
    for anchor in ("",) if first else (*ANCHORS, ""):
        alone = _encode_part(anchor, tokenizer, plain)[0] if anchor else []
        ids, offsets = _encode_part(anchor + text, tokenizer, plain)
        before, length = len(alone), len(anchor)
        if ids[:before] == alone and _ends_at_anchor(offsets, before, anchor):
            break
    if offsets is None:
        return ids[before:], [0] * (len(ids) - before), [len(text)] * (len(ids) - before)
    return ids[before:], *_make_monotonic([(max(a - length, 0), b - length) for a, b in offsets[before:]])


def _encode_part(text: str, tokenizer: Tokenizer, plain: bool) -> tuple[list[int], list[tuple[int, int]] | None]:
    """Token ids, and the characters of each if the tokenizer returns offsets."""
    options: dict[str, Any] = {"add_special_tokens": False, "verbose": False}
    if plain:
        options["split_special_tokens"] = True
    if not tokenizer.is_fast:
        return list(tokenizer(text, **options)["input_ids"]), None
    out = tokenizer(text, return_offsets_mapping=True, **options)
    return list(out["input_ids"]), list(out["offset_mapping"])


def _ends_at_anchor(offsets: list[tuple[int, int]] | None, count: int, anchor: str) -> bool:
    """Whether the first `count` tokens are exactly the anchor."""
    return offsets is None or all(end <= len(anchor) for _, end in offsets[:count])


def _make_monotonic(offsets: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Starts and ends of tokens, made non-decreasing."""
    starts, ends, at = [], [], 0
    for start, end in offsets:
        start, end = (min(start, at), max(end, at)) if start == end else (start, max(end, at))
        starts.append(start)
        ends.append(end)
        at = end
    return starts, ends


def get_special_tokens(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that the tokenizer adds before and after a text."""
    bare = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    whole = list(tokenizer("a", verbose=False)["input_ids"])
    at = next((i for i in range(len(whole)) if whole[i:i + len(bare)] == bare), len(whole))
    return tuple(whole[:at]), tuple(whole[at + len(bare):])
