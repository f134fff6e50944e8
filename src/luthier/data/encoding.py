"""Tokenizes every kind of example. Read `tokenization.py` first (predicted text), then `preference_encoding.py`
(completions).

Texts with a label, tags or a score are encoded without values that depend on all training rows: class indices and the
scale of scores. `label_encoding.py` adds these.
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
    ClassificationExample,
    CompletionExample,
    ContrastiveExample,
    Example,
    ImageExample,
    PreferenceExample,
    PromptExample,
    TextExample,
    TokenClassificationExample,
    UnpairedPreferenceExample,
)
from luthier.core.protocols import Tokenizer
from luthier.core.types import LabeledSpan, TokenizedExample, TokenSpan
from luthier.data.augmentation import VIEWS, ImageAugmentation
from luthier.data.char_offsets import tokenize_rendered
from luthier.data.chat import RenderedChat, RenderError, WeightedSpan
from luthier.data.config import DataConfig
from luthier.data.images import ImageInput
from luthier.data.masking import MaskingConfig
from luthier.data.masking import encode_document as hidden
from luthier.data.preference_encoding import encode_comparison, encode_unpaired
from luthier.data.rows import RejectedRow
from luthier.data.tokenization import encode_prompt_with_remarks, encode_text_example

# the example and whether it was truncated; or the rejected row
EncodedRows = tuple[list[TokenizedExample], bool] | RejectedRow
UNENCODED = math.nan  # a label whose class index is not known yet


def encode_example(example: Example, tokenizer: Tokenizer, config: DataConfig, reserved_tokens: int = 1,
                   masking: MaskingConfig | None = None) -> list[TokenizedExample] | RejectedRow:
    """The example as tokens: one `TokenizedExample`, or several if a text was split; or the rejected row."""
    made = encode_with_truncation(example, tokenizer, config, reserved_tokens, masking)
    return made if isinstance(made, RejectedRow) else made[0]


def encode_with_truncation(example: Example, tokenizer: Tokenizer, config: DataConfig, reserved_tokens: int = 1,
                           masking: MaskingConfig | None = None) -> EncodedRows:
    """`encode_example`, and whether the example was truncated.

    Args:
        tokenizer: of the base; for images, the image processor.
        reserved_tokens: number of tokens that a prompt must leave free for its answer.
        masking: how tokens of a document are masked, for masked-token and masked-span pretraining.
    """
    if masking is not None:
        return hidden(example, tokenizer, config, masking)
    if isinstance(example, PromptExample):
        return _encode_prompt(example, tokenizer, config, reserved_tokens)
    if not example.weight:
        return RejectedRow(example.origin, "nothing to train on", "the row's weight is 0")
    return ENCODERS[type(example)](example, tokenizer, config)


# ---------------------------------------------------------------- texts with a label for the whole text


def _encode_classification(example: ClassificationExample, tokenizer: Tokenizer, config: DataConfig) -> EncodedRows:
    """One root, with the tokenizer's special tokens."""
    found = _encode_root(example.text, example.second, example, tokenizer, config)
    if isinstance(found, RejectedRow):
        return found
    labeled = LabeledSpan(0, UNENCODED, weight=example.weight)
    return [TokenizedExample((found[0],), example.origin, labeled_spans=(labeled,))], found[1]


def _encode_contrastive(example: ContrastiveExample, tokenizer: Tokenizer, config: DataConfig) -> EncodedRows:
    """One root per text, labeled 0 (anchor), 1 (positive) and 2, 3, ... (negatives), or all with the score."""
    roots = []
    for text in example.texts:
        found = _encode_root(text, None, example, tokenizer, config)
        if isinstance(found, RejectedRow):
            return found
        roots.append(found)
    items = tuple(LabeledSpan(i, float(i) if example.score is None else UNENCODED, weight=example.weight,
                              text_id=_hash_span(span)) for i, (span, _) in enumerate(roots))
    return [TokenizedExample(tuple(span for span, _ in roots), example.origin, labeled_spans=items)], any(cut for _,
                                                                                                    cut in roots)


def _hash_span(span: TokenSpan) -> int:
    """A hash of the span's tokens (63 bits)."""
    digest = hashlib.blake2b(array("q", span.ids).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _encode_root(text: str, second: str | None, example: Example, tokenizer: Tokenizer,
                 config: DataConfig) -> tuple[TokenSpan, bool] | RejectedRow:
    """A text, or a pair as the tokenizer joins it (with a line break if it has no separator token)."""
    options: dict[str, Any] = {"verbose": False}
    if second is not None:
        marked = bool(tokenizer("", text_pair="", verbose=False)["input_ids"])
        text, options = (text, options | {"text_pair": second}) if marked else (f"{text}\n{second}", options)
    ids = tokenizer(text, **options)["input_ids"]
    cut = len(ids) > config.token_limit
    if cut and config.truncation != "truncate":
        return RejectedRow(example.origin, "longer than max_length", f"{len(ids)} tokens, at most {config.token_limit}")
    if cut:
        ids = tokenizer(text, truncation=True, max_length=config.token_limit, **options)["input_ids"]
    if not ids:
        return RejectedRow(example.origin, "the tokenizer returns no tokens for it")
    return TokenSpan(tuple(ids), (0.0,) * len(ids)), cut


def _encode_tagged_words(example: TokenClassificationExample, tokenizer: Tokenizer, config: DataConfig) -> EncodedRows:
    """One root. The first token of each word stores the word's index until `label_encoding.py` replaces it by its
    tag's."""
    for wide in (False, True):
        text, starts = _join_words(example.words, wide)
        spans = tuple(WeightedSpan(start, start + len(word), 1.0) for start,
                      word in zip(starts, example.words, strict=True))
        ids, _, ends = tokenize_rendered(RenderedChat(text, spans), tokenizer, special=True)
        firsts = [bisect_right(ends, start) for start in starts]
        if all(a < b for a, b in pairwise(firsts)) and firsts[-1] < len(ids):
            break
    else:
        return _reject_empty_word(example, tokenizer) or RejectedRow(example.origin, "two words share one token")
    if refused := _reject_empty_word(example, tokenizer):
        return refused
    cut = len(ids) > config.token_limit
    if cut and config.truncation != "truncate":
        return RejectedRow(example.origin, "longer than max_length", f"{len(ids)} tokens, at most {config.token_limit}")
    kept = min(len(ids), config.token_limit)
    tags = [-1] * kept
    for word, first in enumerate(firsts):
        if first < kept:
            tags[first] = word
    weights = tuple(example.weight if tag >= 0 else 0.0 for tag in tags)
    if not any(weights):
        return RejectedRow(example.origin, "nothing to train on")
    return [TokenizedExample((TokenSpan(tuple(ids[:kept]), weights, tags=tuple(tags)),), example.origin)], cut


def _reject_empty_word(example: TokenClassificationExample, tokenizer: Tokenizer) -> RejectedRow | None:
    """Why the row cannot be used if a word has no tokens: its tag would be at another word's token."""
    for word in example.words:
        if not any(letter.isalnum() for letter in word) and not tokenizer(word, add_special_tokens=False,
                                                                          verbose=False)["input_ids"]:
            return RejectedRow(example.origin, "the tokenizer returns no tokens for a word", ascii(word))
    return None


def _join_words(words: tuple[str, ...], wide: bool) -> tuple[str, list[int]]:
    """The words as a text, and the start of each. Words of a script without spaces are joined without a space, unless
    `wide`."""
    text, starts = "", []
    for word in words:
        close = text and not wide and ord(text[-1]) >= 0x2E80 and ord(word[0]) >= 0x2E80
        text += " " if text and not close else ""
        starts.append(len(text))
        text += word
    return text, starts


# ---------------------------------------------------------------- prompts and images


def _encode_prompt(example: PromptExample, tokenizer: Tokenizer, config: DataConfig,
                   reserved_tokens: int) -> EncodedRows:
    """The prompt up to the start of the answer; none of its tokens is predicted."""
    try:
        prompt, _ = encode_prompt_with_remarks(example, tokenizer, config)
    except RenderError as fault:
        return RejectedRow(example.origin, fault.reason, str(fault))
    ids = prompt.ids
    if not ids:
        return RejectedRow(example.origin, "the tokenizer returns no tokens for it")
    if config.is_encoder_decoder and tokenizer.eos_token_id not in (None, ids[-1]):
        ids = [*ids, tokenizer.eos_token_id]  # as every source ends
    reserved_tokens = 0 if config.is_encoder_decoder else reserved_tokens  # the decoder has its own length
    if len(ids) + reserved_tokens > config.token_limit:
        return RejectedRow(example.origin, "the prompt leaves no space for the answer" if reserved_tokens
                           else "longer than max_length",
                           f"{len(ids)} tokens and {reserved_tokens} for the answer, at most {config.token_limit}")
    said = example.prompt if isinstance(example.prompt, str) else [{**m.extra, "role": m.role, "content": m.content}
                                                                   for m in example.prompt]
    metadata = {"prompt": said, **({"tools": list(example.tools)} if example.tools else {}), **example.metadata}
    return [TokenizedExample((TokenSpan(tuple(ids), (0.0,) * len(ids)),), example.origin, metadata=metadata,
                             remarks=prompt.remarks)], False


def _encode_image(example: ImageExample, tokenizer: Any, config: DataConfig) -> EncodedRows:
    """A placeholder token and the image; an image without a label twice, as two views."""
    changes = tuple(change for change in config.augment if isinstance(change, ImageAugmentation))
    views = 1 if example.label is not None else 2
    image = ImageInput(example.pixels, tokenizer, changes if views == 1 else changes or VIEWS)
    images = tuple(ImageInput(image.pixels, image.see, image.changes, (0, view)) for view in range(views))
    items = tuple(LabeledSpan(i, UNENCODED if views == 1 else float(i), weight=example.weight) for i in range(views))
    spans = (TokenSpan((0,), (0.0,)),) * views
    return [TokenizedExample(spans, example.origin, labeled_spans=items, images=images)], False


ENCODERS: dict[type, Callable[[Any, Tokenizer, DataConfig], EncodedRows]] = {
    TextExample: encode_text_example, CompletionExample: encode_text_example, ChatExample: encode_text_example,
    ClassificationExample: _encode_classification, TokenClassificationExample: _encode_tagged_words,
    ContrastiveExample: _encode_contrastive,
    PreferenceExample: encode_comparison, UnpairedPreferenceExample: encode_unpaired, ImageExample: _encode_image,
}
