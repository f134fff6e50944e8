"""Every kind of example to tokens. Read `tokenization.py` first, for words that are predicted, then
`preference_encoding.py`, for answers.

Texts with a label, tags or a likeness are encoded without what only all the training rows together say: their classes'
numbers, the scale of their scores. `label_encoding.py` puts these in.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from bisect import bisect_right
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from luthier.core.examples import (
    ChatExample,
    ComparedExample,
    CompletionExample,
    Example,
    ImageExample,
    JudgedExample,
    LabelledExample,
    PromptExample,
    TaggedExample,
    TextExample,
    TextsExample,
)
from luthier.core.protocols import Tokenizer
from luthier.core.types import Encoded, Item, Piece
from luthier.data.augmentation import VIEWS, PictureAugment
from luthier.data.char_offsets import tokens
from luthier.data.chat import Rendered, RenderError, Span
from luthier.data.config import DataConfig
from luthier.data.images import Picture
from luthier.data.masking import Hide
from luthier.data.masking import encoded as hidden
from luthier.data.preference_encoding import compared, judged
from luthier.data.rows import Refusal
from luthier.data.tokenization import encode_words, prompt_and_answer

Made = tuple[list[Encoded], bool] | Refusal  # the example, and whether some of it was cut off; or why there is none
UNSETTLED = math.nan  # a label whose number is not known yet


def encode(example: Example, tokenizer: Tokenizer, config: DataConfig, room: int = 1,
           hide: Hide | None = None) -> list[Encoded] | Refusal:
    """The example as tokens: one `Encoded`, or several where a text was split; or why there is none."""
    made = encoded(example, tokenizer, config, room, hide)
    return made if isinstance(made, Refusal) else made[0]


def encoded(example: Example, tokenizer: Tokenizer, config: DataConfig, room: int = 1,
            hide: Hide | None = None) -> Made:
    """`encode`, and whether some of the example was cut off.

    Args:
        tokenizer: of the base; for pictures, what makes a tensor of pixels.
        room: tokens that a prompt must leave for its answer.
        hide: how a part of a document is hidden, where a base is to guess it.
    """
    if hide is not None:
        return hidden(example, tokenizer, config, hide)
    if isinstance(example, PromptExample):
        return _prompt(example, tokenizer, config, room)
    if not example.weight:
        return Refusal(example.origin, "nothing to train on", "the row's weight is 0")
    return ENCODERS[type(example)](example, tokenizer, config)


# ---------------------------------------------------------------- texts that are judged as a whole


def _labelled(example: LabelledExample, tokenizer: Tokenizer, config: DataConfig) -> Made:
    """One root, with the tokenizer's own marks around it."""
    found = _root(example.text, example.second, example, tokenizer, config)
    if isinstance(found, Refusal):
        return found
    return [Encoded((found[0],), example.origin, items=(Item(0, UNSETTLED, weight=example.weight),))], found[1]


def _texts(example: TextsExample, tokenizer: Tokenizer, config: DataConfig) -> Made:
    """A root for each text, labelled 0 (anchor), 1 (positive), 2 and on (negatives), or all with the score."""
    roots = []
    for text in example.texts:
        found = _root(text, None, example, tokenizer, config)
        if isinstance(found, Refusal):
            return found
        roots.append(found)
    items = tuple(Item(i, float(i) if example.score is None else UNSETTLED, weight=example.weight,
                       text_id=_hash(piece)) for i, (piece, _) in enumerate(roots))
    return [Encoded(tuple(piece for piece, _ in roots), example.origin, items=items)], any(cut for _, cut in roots)


def _hash(piece: Piece) -> int:
    """63 bits of the piece's tokens."""
    digest = hashlib.blake2b(array("q", piece.ids).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _root(text: str, second: str | None, example: Example, tokenizer: Tokenizer,
          config: DataConfig) -> tuple[Piece, bool] | Refusal:
    """A text, or two as the tokenizer joins them (by a line break where it has no mark for that)."""
    options: dict[str, Any] = {"verbose": False}
    if second is not None:
        marked = bool(tokenizer("", text_pair="", verbose=False)["input_ids"])
        text, options = (text, options | {"text_pair": second}) if marked else (f"{text}\n{second}", options)
    ids = tokenizer(text, **options)["input_ids"]
    cut = len(ids) > config.token_limit
    if cut and config.truncation != "truncate":
        return Refusal(example.origin, "longer than max_length", f"{len(ids)} tokens, at most {config.token_limit}")
    if cut:
        ids = tokenizer(text, truncation=True, max_length=config.token_limit, **options)["input_ids"]
    if not ids:
        return Refusal(example.origin, "the tokenizer makes no tokens of it")
    return Piece(tuple(ids), (0.0,) * len(ids)), cut


def _tagged(example: TaggedExample, tokenizer: Tokenizer, config: DataConfig) -> Made:
    """One root; the first token of each word holds the word's number, until `label_encoding.py` knows its tag's."""
    for wide in (False, True):
        text, starts = _joined(example.words, wide)
        spans = tuple(Span(start, start + len(word), 1.0) for start, word in zip(starts, example.words, strict=True))
        ids, _, ends = tokens(Rendered(text, spans), tokenizer, special=True)
        firsts = [bisect_right(ends, start) for start in starts]
        if all(a < b for a, b in pairwise(firsts)) and firsts[-1] < len(ids):
            break
    else:
        return _no_token(example, tokenizer) or Refusal(example.origin, "two words are one token")
    if refused := _no_token(example, tokenizer):
        return refused
    cut = len(ids) > config.token_limit
    if cut and config.truncation != "truncate":
        return Refusal(example.origin, "longer than max_length", f"{len(ids)} tokens, at most {config.token_limit}")
    kept = min(len(ids), config.token_limit)
    tags = [-1] * kept
    for word, first in enumerate(firsts):
        if first < kept:
            tags[first] = word
    weights = tuple(example.weight if tag >= 0 else 0.0 for tag in tags)
    if not any(weights):
        return Refusal(example.origin, "nothing to train on")
    return [Encoded((Piece(tuple(ids[:kept]), weights, tags=tuple(tags)),), example.origin)], cut


def _no_token(example: TaggedExample, tokenizer: Tokenizer) -> Refusal | None:
    """Why the row cannot be used, where the tokenizer makes nothing of a word: a tag would stand at another's token."""
    for word in example.words:
        if not any(letter.isalnum() for letter in word) and not tokenizer(word, add_special_tokens=False,
                                                                          verbose=False)["input_ids"]:
            return Refusal(example.origin, "the tokenizer makes no tokens of a word", ascii(word))
    return None


def _joined(words: tuple[str, ...], wide: bool) -> tuple[str, list[int]]:
    """The words as a text, and where each starts. Between two of a script that knows no spaces there is none, unless
    `wide`."""
    text, starts = "", []
    for word in words:
        close = text and not wide and ord(text[-1]) >= 0x2E80 and ord(word[0]) >= 0x2E80
        text += " " if text and not close else ""
        starts.append(len(text))
        text += word
    return text, starts


# ---------------------------------------------------------------- prompts and pictures


def _prompt(example: PromptExample, tokenizer: Tokenizer, config: DataConfig, room: int) -> Made:
    """The prompt up to where the answer begins; nothing of it is predicted."""
    try:
        prompt, _ = prompt_and_answer(example, tokenizer, config)
    except RenderError as fault:
        return Refusal(example.origin, fault.reason, str(fault))
    ids = prompt.ids
    if not ids:
        return Refusal(example.origin, "the tokenizer makes no tokens of it")
    if config.divided and tokenizer.eos_token_id not in (None, ids[-1]):
        ids = [*ids, tokenizer.eos_token_id]  # as every source ends
    room = 0 if config.divided else room  # the decoder has a length of its own
    if len(ids) + room > config.token_limit:
        return Refusal(example.origin, "the prompt leaves no room to answer" if room else "longer than max_length",
                       f"{len(ids)} tokens and {room} for the answer, at most {config.token_limit}")
    said = example.prompt if isinstance(example.prompt, str) else [{**m.extra, "role": m.role, "content": m.content}
                                                                   for m in example.prompt]
    facts = {"prompt": said, **({"tools": list(example.tools)} if example.tools else {}), **example.facts}
    return [Encoded((Piece(tuple(ids), (0.0,) * len(ids)),), example.origin, facts=facts,
                    remarks=prompt.remarks)], False


def _picture(example: ImageExample, tokenizer: Any, config: DataConfig) -> Made:
    """A placeholder and the picture; a picture without a label twice, as two views of it."""
    changes = tuple(change for change in config.augment if isinstance(change, PictureAugment))
    views = 1 if example.label is not None else 2
    picture = Picture(example.pixels, tokenizer, changes if views == 1 else changes or VIEWS)
    images = tuple(Picture(picture.pixels, picture.see, picture.changes, (0, view)) for view in range(views))
    items = tuple(Item(i, UNSETTLED if views == 1 else float(i), weight=example.weight) for i in range(views))
    return [Encoded((Piece((0,), (0.0,)),) * views, example.origin, items=items, images=images)], False


ENCODERS: dict[type, Callable[[Any, Tokenizer, DataConfig], Made]] = {
    TextExample: encode_words, CompletionExample: encode_words, ChatExample: encode_words,
    LabelledExample: _labelled, TaggedExample: _tagged, TextsExample: _texts,
    ComparedExample: compared, JudgedExample: judged, ImageExample: _picture,
}
