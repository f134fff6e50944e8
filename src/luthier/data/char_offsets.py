"""Text to token ids, each with the characters that it stands for. Read `chat.py` first; `tokenization.py` goes on from
here.

A text is encoded in parts. No token reaches across the place where a sampler begins to write, so the tokens of a prompt
are the same when it is trained and when it is asked; and what only spells a control token is encoded apart.
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
    """Ids, and where each token's characters start and end; both never fall.

    Args:
        special: whether the tokenizer's own marks are put around the whole.
    """
    parts = list(split_text(text.text, text.boundaries))
    if tokenizer.is_fast and len(parts) == 1 and not parts[0].plain:
        return _tokenize_whole(text.text, tokenizer, special)
    return _join_parts(text.text, parts if tokenizer.is_fast else _split_further(parts, text), tokenizer, special)


def _tokenize_whole(text: str, tokenizer: Tokenizer, special: bool) -> tuple[list[int], list[int], list[int]]:
    out = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    starts, ends, at = [], [], 0
    for start, end in out["offset_mapping"]:
        if end < at:  # an end mark of the tokenizer's own, which stands for no characters
            start = end = at
        elif start == end:  # white space, where the tokenizer trims it from the offsets
            start = min(start, at)
        starts.append(start)
        ends.append(end)
        at = end
    return out["input_ids"], starts, ends


def _split_further(parts: list[TextPart], text: RenderedChat) -> list[TextPart]:
    """The parts divided once more where spans start and end, for a tokenizer that keeps no offsets."""
    bounds = {at for span in text.spans for at in (span.start, span.end)}
    found: list[TextPart] = []
    for part in parts:
        inner = sorted(at for at in bounds if part.start < at < part.end)
        found += [TextPart(a, b, part.plain) for a, b in pairwise([part.start, *inner, part.end])]
    return found


def _join_parts(text: str, parts: Sequence[TextPart], tokenizer: Tokenizer,
                special: bool) -> tuple[list[int], list[int], list[int]]:
    """The tokens of the parts one behind the other."""
    opening, closing = get_special_tokens(tokenizer) if special else ((), ())
    ids, starts, ends = list(opening), [0] * len(opening), [0] * len(opening)
    for part in parts:
        found, begin, stop = _tokenize_part(text[part.start:part.end], tokenizer, part.plain, first=not part.start)
        ids += found
        starts += [part.start + at for at in begin]
        ends += [part.start + at for at in stop]
    return [*ids, *closing], starts + [len(text)] * len(closing), ends + [len(text)] * len(closing)


ANCHORS = ("\n", ".", "a")  # characters to encode a part behind, tried in turn: some merge with what follows


def _tokenize_part(text: str, tokenizer: Tokenizer, plain: bool, first: bool) -> tuple[list[int], list[int], list[int]]:
    """One part. Further ones are encoded behind another character, whose tokens are taken off again: at the beginning
    of a text some tokenizers write a space that is not there.

    Args:
        plain: it spells a control token, and none of its tokens may be one.
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
    """Ids, and the characters of each where the tokenizer knows them."""
    options: dict[str, Any] = {"add_special_tokens": False, "verbose": False}
    if plain:
        options["split_special_tokens"] = True
    if not tokenizer.is_fast:
        return list(tokenizer(text, **options)["input_ids"]), None
    out = tokenizer(text, return_offsets_mapping=True, **options)
    return list(out["input_ids"]), list(out["offset_mapping"])


def _ends_at_anchor(offsets: list[tuple[int, int]] | None, count: int, anchor: str) -> bool:
    """Whether the first `count` tokens stand for the anchor and nothing more."""
    return offsets is None or all(end <= len(anchor) for _, end in offsets[:count])


def _make_monotonic(offsets: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Starts and ends of tokens, neither of which falls."""
    starts, ends, at = [], [], 0
    for start, end in offsets:
        start, end = (min(start, at), max(end, at)) if start == end else (start, max(end, at))
        starts.append(start)
        ends.append(end)
        at = end
    return starts, ends


def get_special_tokens(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens that the tokenizer puts before a text and behind it."""
    bare = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    whole = list(tokenizer("a", verbose=False)["input_ids"])
    at = next((i for i in range(len(whole)) if whole[i:i + len(bare)] == bare), len(whole))
    return tuple(whole[:at]), tuple(whole[at + len(bare):])
