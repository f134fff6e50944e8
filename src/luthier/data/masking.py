"""Documents of which a part is hidden, for bases that read a text whole and guess what is missing. Read
`tokenization.py`.

    words   [CLS] the cat sat [SEP]          ->  [CLS] the [MASK] sat [SEP], and at [MASK] `cat` is guessed
    spans   thank you for inviting me </s>   ->  thank you <extra_id_0> me </s>
                                                 <extra_id_0> for inviting <extra_id_1> </s>  is written in answer

Words are for encoders: BERT, Devlin et al. 2019 (arXiv:1810.04805) section 3.1 and appendix A.1; drawn anew for every
epoch as in RoBERTa, Liu et al. 2019 (1907.11692) section 4.1. Spans are for bases that write: T5, Raffel et al. 2020
(1910.10683) section 3.1.4, with lengths as in 3.3.4.

An encoded document is kept whole. What is hidden is drawn on its way into a batch: while training from the run's seed,
the epoch and the row alone, however an epoch is cut, and wherever it goes on; of held-out rows from their own tokens
alone, so that every evaluation, of any run, hides the same.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Literal

import numpy as np

from luthier.core.errors import BaseError
from luthier.core.examples import Example, TextExample
from luthier.core.protocols import Tokenizer
from luthier.core.types import TokenizedExample, TokenSpan
from luthier.data.config import DataConfig
from luthier.data.rows import RejectedRow

MASKED, RANDOM = 0.8, 0.1  # of the hidden words: shown as the mask, and as any other token; the rest is shown as it is


@dataclass(frozen=True)
class MaskingConfig:
    """How documents are hidden, and with which tokens.

    Args:
        how: see the module's text.
        rate: the share of a document's tokens that is hidden.
        span: the mean length of spans, in tokens.
        whole: whether the tokens of a word are hidden together, or not at all.
        stand: the tokens that stand for what is hidden: the mask; or the sentinels, one for each span.
        special: tokens that no word is, and that are never hidden (of spans: tokens that no text may have).
        end: the end mark; an answer has one too.
        words: how many tokens there are to show in place of another.
    """

    how: Literal["words", "spans"]
    rate: float
    span: float
    whole: bool
    stand: tuple[int, ...]
    special: frozenset[int]
    end: int | None
    words: int

    @staticmethod
    def of(tokenizer: Tokenizer, how: Literal["words", "spans"], name: str, rate: float = 0.15, span: float = 3.0,
           whole: bool = False) -> MaskingConfig:
        """With the tokens of the base `name`. Raises `BaseError` where its tokenizer has none to stand for others."""
        if how == "spans":
            stand = _find_sentinels(tokenizer)
            if len(stand) < 2:
                raise BaseError(f"the tokenizer of {name!r} has no sentinels (<extra_id_0>, <extra_id_1>, ...), which "
                                "stand for the spans that are hidden", "choose a base of the T5 family, or train this "
                                "one on sources and answers (objective: sft)")
            special = frozenset(token for token in (*stand, tokenizer.eos_token_id) if token is not None)
            return MaskingConfig(how, rate, span, False, stand, special, tokenizer.eos_token_id, 0)
        if tokenizer.mask_token_id is None:
            raise BaseError(f"the tokenizer of {name!r} has no mask, which stands for the words that are hidden",
                            "choose an encoder that was trained on masked words, such as BERT or RoBERTa")
        if whole and not tokenizer.is_fast:
            raise BaseError(f"the tokenizer of {name!r} does not say which tokens are one word",
                            "leave out objective.whole_word_mask")
        special = frozenset(tokenizer.all_special_ids)
        return MaskingConfig(how, rate, span, whole, (tokenizer.mask_token_id,), special, None, len(tokenizer))


def _find_sentinels(tokenizer: Tokenizer) -> tuple[int, ...]:
    found: list[int] = []
    while (token := tokenizer.convert_tokens_to_ids(f"<extra_id_{len(found)}>")) not in (None, tokenizer.unk_token_id):
        found.append(token)
    return tuple(found)


# ---------------------------------------------------------------- a document, whole


@dataclass(frozen=True)
class MaskableDocument:
    """What a document that is still whole knows of hiding. Its tokens with a weight may be hidden.

    Args:
        owners: the word that each of its tokens is of; empty: each is one of its own.
    """

    hide: MaskingConfig
    owners: tuple[int, ...] = ()

    def apply(self, example: TokenizedExample, rng: np.random.Generator) -> TokenizedExample:
        """The example as a base sees it, with what it is to guess."""
        span, = example.spans
        makes = _mask_tokens if self.hide.how == "words" else _mask_spans
        return replace(example, spans=makes(span, self, rng), masking=None)

    @property
    def digest(self) -> bytes:
        """Of all that decides what is hidden, but for the example itself."""
        hide = self.hide
        told = (hide.how, hide.rate, hide.span, hide.whole, hide.stand, sorted(hide.special), hide.words, self.owners)
        return hashlib.blake2b(repr(told).encode(), digest_size=16).digest()


def encode_document(example: Example, tokenizer: Tokenizer, config: DataConfig,
                    hide: MaskingConfig) -> tuple[list[TokenizedExample], bool] | RejectedRow:
    """A text as one example, or as several of like length where it is split; and whether its end was cut off."""
    assert isinstance(example, TextExample), "whoever hides reads documents"
    told = tokenizer(example.text, return_special_tokens_mask=True, verbose=False)
    ids, marks = list(told["input_ids"]), [bool(mark) for mark in told["special_tokens_mask"]]
    start = marks.index(False) if False in marks else len(ids)
    stop = len(marks) - marks[::-1].index(False) if start < len(ids) else start
    before, after = ids[:start], ids[stop:]
    if hide.how == "spans" and hide.end is not None and after[-1:] != [hide.end]:
        after = [*after, hide.end]
    room = config.most - len(before) - len(after) - (hide.how == "spans")  # an answer has one sentinel more than spans
    length = stop - start
    if length > room and config.overlong == "refuse":
        return RejectedRow(example.origin, "longer than max_length", f"{length} tokens, at most {room}")
    if config.overlong == "truncate":
        length = min(length, room)
    parts = max(1, math.ceil(length / max(1, room)))
    bounds = [start + length * i // parts for i in range(parts + 1)]
    owners = told.word_ids() if hide.whole else []
    found = []
    for first, last in pairwise(bounds):
        made = _build_document(example, before, ids[first:last], after, owners[first:last], hide)
        if isinstance(made, RejectedRow):
            return made
        found.append(made)
    return found, length < stop - start


def _build_document(example: TextExample, before: list[int], body: list[int], after: list[int],
                    owners: list[int | None],
                    hide: MaskingConfig) -> TokenizedExample | RejectedRow:
    """A part of the text between its marks; `owners`: the word of each of its tokens, or empty."""
    strange = next((token for token in body if token in hide.special), None)
    if hide.how == "spans" and strange is not None:
        return RejectedRow(example.origin, "the text holds a token that stands for hidden spans, or the end mark",
                           f"token {strange}")
    weights = [example.weight if token not in hide.special else 0.0 for token in body]
    count = sum(map(bool, weights))
    if count < (1 if hide.how == "words" else 2):
        return RejectedRow(example.origin, "nothing to train on", f"{count} tokens, of which one is hidden"
                           + (" and one seen" if hide.how == "spans" else ""))
    if hide.how == "spans" and (needed := _count_spans(count, hide)[1] + 1) > len(hide.stand):
        return RejectedRow(example.origin, "more spans than the tokenizer has sentinels",
                           f"{needed}, and there are {len(hide.stand)}; lower data.max_length or raise "
                           "objective.mean_noise_span_length")
    words = [-1] * len(before) + [-1 if owner is None else owner for owner in owners] + [-1] * len(after)
    span = TokenSpan((*before, *body, *after), (*(0.0,) * len(before), *weights, *(0.0,) * len(after)))
    return TokenizedExample((span,), example.origin, masking=MaskableDocument(hide, tuple(words) if owners else ()))


# ---------------------------------------------------------------- words


def _mask_tokens(span: TokenSpan, hidden: MaskableDocument, rng: np.random.Generator) -> tuple[TokenSpan, ...]:
    """One root; hidden tokens have what they were as their tag. Exactly `rate` of all tokens, one at least; of whole
    words, as many as do not exceed that, in the order of the dice (the first of them, where all would)."""
    hide = hidden.hide
    places = [i for i, weight in enumerate(span.weights) if weight]
    words = [list(group) for _, group in groupby(places, (lambda i: hidden.owners[i]) if hidden.owners else None)]
    wanted = max(1, round(hide.rate * len(places)))
    order = [words[i] for i in rng.permutation(len(words))]
    chosen: list[int] = []
    for word in order:
        if len(chosen) + len(word) <= wanted:
            chosen += word
    ids, tags = list(span.ids), [-1] * len(span.ids)
    for place in sorted(chosen or order[0]):
        tags[place], die = ids[place], rng.random()
        if die < MASKED:
            ids[place] = hide.stand[0]
        elif die < MASKED + RANDOM:
            ids[place] = _draw_token(hide, rng)
    weights = tuple(weight if tag >= 0 else 0.0 for weight, tag in zip(span.weights, tags, strict=True))
    return (TokenSpan(tuple(ids), weights, tags=tuple(tags)),)


def _draw_token(hide: MaskingConfig, rng: np.random.Generator) -> int:
    """Any token that is no special one."""
    while True:
        if (token := int(rng.integers(hide.words))) not in hide.special:
            return token


# ---------------------------------------------------------------- spans


def _count_spans(length: int, hide: MaskingConfig) -> tuple[int, int]:
    """Of a text of `length` tokens, how many are hidden, and in how many spans: as T5 rounds them. One token at least
    is hidden, and one seen, also between two spans."""
    tokens = min(max(1, round(hide.rate * length)), length - 1)
    return tokens, min(max(1, round(tokens / hide.span)), length - tokens + 1)


def _mask_spans(span: TokenSpan, hidden: MaskableDocument, rng: np.random.Generator) -> tuple[TokenSpan, ...]:
    """The source, and its answer. All ways to cut the hidden tokens into spans, and to place these, are as likely."""
    hide, body = hidden.hide, [i for i, weight in enumerate(span.weights) if weight]
    tokens, count = _count_spans(len(body), hide)
    cuts = np.sort(rng.choice(tokens - 1, count - 1, replace=False)) + 1 if count > 1 else np.empty(0, np.int64)
    lengths = np.diff([0, *cuts, tokens])
    free = len(body) - tokens - (count - 1)  # tokens that are seen, besides one between any two spans
    bars = np.sort(rng.choice(free + count, count, replace=False))
    gaps = np.diff([-1, *bars]) - 1 + (np.arange(count) > 0)
    ids = list(span.ids)
    source, answer, at = ids[:body[0]], ids[:body[0]], body[0]
    for sentinel, gap, length in zip(hide.stand, gaps.tolist(), lengths.tolist(), strict=False):
        source += [*ids[at:at + gap], sentinel]
        answer += [sentinel, *ids[at + gap:at + gap + length]]
        at += gap + length
    source += ids[at:]
    answer += [hide.stand[count], *ids[body[-1] + 1:]]
    weight = span.weights[body[0]]
    return TokenSpan(tuple(source), (0.0,) * len(source)), TokenSpan(tuple(answer), (weight,) * len(answer), 0)
