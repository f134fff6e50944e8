"""Masked tokens and masked spans for pretraining objectives. Read `tokenization.py` first.

    words   [CLS] the cat sat [SEP]          ->  [CLS] the [MASK] sat [SEP], and `cat` is predicted at [MASK]
    spans   thank you for inviting me </s>   ->  thank you <extra_id_0> me </s>
                                                 <extra_id_0> for inviting <extra_id_1> </s>  is the target

Masked words are for encoders: BERT, Devlin et al. 2019 (arXiv:1810.04805) section 3.1 and appendix A.1. They are
sampled again in every epoch as in RoBERTa, Liu et al. 2019 (1907.11692) section 4.1. Masked spans are for
encoder-decoder models: T5, Raffel et al. 2020 (1910.10683) section 3.1.4, with lengths as in 3.3.4.

A tokenized document is stored without masks; `transforms.py` applies them. In training, masks depend on the seed of
the run, the epoch and the row only, so they do not change with the batch size or after a resume. For held-out rows they
depend on the tokens only, so every evaluation of every run masks the same tokens.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
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

MASKED, RANDOM = 0.8, 0.1  # shares of masked words: replaced by the mask, by a random token; the rest stay unchanged


@dataclass(frozen=True)
class MaskingConfig:
    """How documents are masked, and with which tokens.

    Args:
        how: masked words or masked spans; see the module docstring.
        rate: share of a document's tokens that is masked.
        span: mean length of a span, in tokens.
        whole: whether all tokens of a word are masked together.
        stand: the tokens that replace masked tokens: the mask token, or one sentinel for each span.
        special: special tokens, which are never masked (for spans: tokens that a text must not contain).
        end: the end-of-sequence token, which the target has too.
        words: vocabulary size for random replacements.
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
        """Reads the tokens from the tokenizer of model `name`. Raises `BaseError` if it has no mask or sentinels."""
        if how == "spans":
            stand = _find_sentinels(tokenizer)
            if len(stand) < 2:
                raise BaseError(f"the tokenizer of {name!r} has no sentinels (<extra_id_0>, <extra_id_1>, ...), which "
                                "replace the masked spans", "choose a base of the T5 family, or train this "
                                "one on sources and answers (objective: sft)")
            special = frozenset(token for token in (*stand, tokenizer.eos_token_id) if token is not None)
            return MaskingConfig(how, rate, span, False, stand, special, tokenizer.eos_token_id, 0)
        if tokenizer.mask_token_id is None:
            raise BaseError(f"the tokenizer of {name!r} has no mask token, which replaces the masked words",
                            "choose an encoder that was trained on masked words, such as BERT or RoBERTa")
        if whole and not tokenizer.is_fast:
            raise BaseError(f"the tokenizer of {name!r} does not map tokens to words",
                            "omit objective.whole_word_mask")
        special = frozenset(tokenizer.all_special_ids)
        return MaskingConfig(how, rate, span, whole, (tokenizer.mask_token_id,), special, None, len(tokenizer))


def _find_sentinels(tokenizer: Tokenizer) -> tuple[int, ...]:
    found: list[int] = []
    while (token := tokenizer.convert_tokens_to_ids(f"<extra_id_{len(found)}>")) not in (None, tokenizer.unk_token_id):
        found.append(token)
    return tuple(found)


# ---------------------------------------------------------------- documents before masking


@dataclass(frozen=True)
class MaskableDocument:
    """The masking that a stored document gets later. Its tokens with a weight may be masked.

    Args:
        owners: index of each token's word; empty: every token is a word.
    """

    masking: MaskingConfig
    owners: tuple[int, ...] = ()

    def apply(self, example: TokenizedExample, seed: Sequence[int]) -> TokenizedExample:
        """The example as the model sees it, with the masked tokens as its predictions."""
        span, = example.spans
        mask = _mask_tokens if self.masking.how == "words" else _mask_spans
        return replace(example, spans=mask(span, self, np.random.default_rng(seed)), masking=None)

    @property
    def digest(self) -> bytes:
        """Hash of everything that determines the masked tokens, except the example itself."""
        masking = self.masking
        told = (masking.how, masking.rate, masking.span, masking.whole, masking.stand, sorted(masking.special),
                masking.words, self.owners)
        return hashlib.blake2b(repr(told).encode(), digest_size=16).digest()


def encode_document(example: Example, tokenizer: Tokenizer, config: DataConfig,
                    masking: MaskingConfig) -> tuple[list[TokenizedExample], bool] | RejectedRow:
    """A text as one example, or as several of similar length if it is split; and whether it was truncated."""
    assert isinstance(example, TextExample), "masking applies to documents"
    told = tokenizer(example.text, return_special_tokens_mask=True, verbose=False)
    ids, marks = list(told["input_ids"]), [bool(mark) for mark in told["special_tokens_mask"]]
    start = marks.index(False) if False in marks else len(ids)  # the text, between its special tokens
    stop = len(marks) - marks[::-1].index(False) if start < len(ids) else start
    before, after = ids[:start], ids[stop:]
    if masking.how == "spans" and masking.end is not None and after[-1:] != [masking.end]:
        after = [*after, masking.end]
    # a target has one sentinel more than spans
    limit = config.token_limit - len(before) - len(after) - (masking.how == "spans")
    length = stop - start
    if length > limit and config.truncation == "refuse":
        return RejectedRow(example.origin, "longer than max_length", f"{length} tokens, at most {limit}")
    if config.truncation == "truncate":
        length = min(length, limit)
    parts = max(1, math.ceil(length / max(1, limit)))
    bounds = [start + length * i // parts for i in range(parts + 1)]  # parts differ by at most one token
    owners = told.word_ids() if masking.whole else []
    found = []
    for first, last in pairwise(bounds):
        made = _build_document(example, before, ids[first:last], after, owners[first:last], masking)
        if isinstance(made, RejectedRow):
            return made
        found.append(made)
    return found, length < stop - start


def _build_document(example: TextExample, before: list[int], body: list[int], after: list[int],
                    owners: list[int | None],
                    masking: MaskingConfig) -> TokenizedExample | RejectedRow:
    """A part of the text between its special tokens; `owners`: the word of each of its tokens, or empty."""
    strange = next((token for token in body if token in masking.special), None)
    if masking.how == "spans" and strange is not None:
        return RejectedRow(example.origin, "the text contains a sentinel token or the end-of-sequence token",
                           f"token {strange}")
    weights = [example.weight if token not in masking.special else 0.0 for token in body]
    count = sum(map(bool, weights))
    if count < (1 if masking.how == "words" else 2):
        return RejectedRow(example.origin, "nothing to train on", f"{count} tokens, of which one is masked"
                           + (" and one visible" if masking.how == "spans" else ""))
    if masking.how == "spans" and (needed := _count_spans(count, masking)[1] + 1) > len(masking.stand):
        return RejectedRow(example.origin, "more spans than the tokenizer has sentinels",
                           f"{needed}, and there are {len(masking.stand)}; lower data.max_length or raise "
                           "objective.mean_noise_span_length")
    words = [-1] * len(before) + [-1 if owner is None else owner for owner in owners] + [-1] * len(after)
    span = TokenSpan((*before, *body, *after), (*(0.0,) * len(before), *weights, *(0.0,) * len(after)))
    return TokenizedExample((span,), example.origin, masking=MaskableDocument(masking, tuple(words) if owners else ()))


# ---------------------------------------------------------------- words


def _mask_tokens(span: TokenSpan, hidden: MaskableDocument, rng: np.random.Generator) -> tuple[TokenSpan, ...]:
    """One root; masked tokens have their original token as tag. Masks exactly `rate` of all tokens, at least one. Of
    whole words, it takes as many in random order as do not exceed that count (the first one, if every word does)."""
    masking = hidden.masking
    places = [i for i, weight in enumerate(span.weights) if weight]
    words = [list(group) for _, group in groupby(places, (lambda i: hidden.owners[i]) if hidden.owners else None)]
    wanted = max(1, round(masking.rate * len(places)))
    order = [words[i] for i in rng.permutation(len(words))]
    chosen: list[int] = []
    for word in order:
        if len(chosen) + len(word) <= wanted:
            chosen += word
    ids, tags = list(span.ids), [-1] * len(span.ids)
    for place in sorted(chosen or order[0]):  # in the order of the text, as the random numbers are drawn
        tags[place], die = ids[place], rng.random()
        if die < MASKED:
            ids[place] = masking.stand[0]
        elif die < MASKED + RANDOM:
            ids[place] = _draw_token(masking, rng)
    weights = tuple(weight if tag >= 0 else 0.0 for weight, tag in zip(span.weights, tags, strict=True))
    return (TokenSpan(tuple(ids), weights, tags=tuple(tags)),)


def _draw_token(masking: MaskingConfig, rng: np.random.Generator) -> int:
    """A random token that is not special."""
    while True:
        if (token := int(rng.integers(masking.words))) not in masking.special:
            return token


# ---------------------------------------------------------------- spans


def _count_spans(length: int, masking: MaskingConfig) -> tuple[int, int]:
    """Numbers of masked tokens and of spans for a text of `length` tokens, rounded as in T5. At least one token is
    masked, at least one is visible, and at least one is visible between two spans."""
    tokens = min(max(1, round(masking.rate * length)), length - 1)
    return tokens, min(max(1, round(tokens / masking.span)), length - tokens + 1)


def _mask_spans(span: TokenSpan, hidden: MaskableDocument, rng: np.random.Generator) -> tuple[TokenSpan, ...]:
    """The source, and its target. All divisions of the masked tokens into spans, and all placements, are equally
    likely."""
    masking, body = hidden.masking, [i for i, weight in enumerate(span.weights) if weight]
    tokens, count = _count_spans(len(body), masking)
    # [spans - 1] The masked tokens as one sequence, cut at random places between two of them.
    cuts = np.sort(rng.choice(tokens - 1, count - 1, replace=False)) + 1 if count > 1 else np.empty(0, np.int64)
    lengths = np.diff([0, *cuts, tokens])  # [spans] at least 1 each
    free = len(body) - tokens - (count - 1)  # visible tokens, beyond the one between any two spans
    # [spans] Stars and bars: the free tokens are the stars, the spans are the bars.
    bars = np.sort(rng.choice(free + count, count, replace=False))
    gaps = np.diff([-1, *bars]) - 1 + (np.arange(count) > 0)  # [spans] visible tokens before each span
    ids = list(span.ids)
    source, answer, at = ids[:body[0]], ids[:body[0]], body[0]
    for sentinel, gap, length in zip(masking.stand, gaps.tolist(), lengths.tolist(), strict=False):
        source += [*ids[at:at + gap], sentinel]
        answer += [sentinel, *ids[at + gap:at + gap + length]]
        at += gap + length
    source += ids[at:]  # what follows the last span, with the end token
    answer += [masking.stand[count], *ids[body[-1] + 1:]]  # T5 closes a target with one more sentinel
    weight = span.weights[body[0]]
    return TokenSpan(tuple(source), (0.0,) * len(source)), TokenSpan(tuple(answer), (weight,) * len(answer), 0)
