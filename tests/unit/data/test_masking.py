"""What is hidden of a document: as much as was asked, never a mark, anew in every epoch, and the same for the same row."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers
from tokenizers.processors import TemplateProcessing

from luthier.core.errors import BaseError, DataError
from luthier.core.examples import Origin, TextExample
from luthier.core.types import Batch, TokenizedExample
from luthier.data import DataConfig, DividedConfig, MaskingConfig, encode_example, read_datasets
from luthier.data.batch_source import InMemoryBatchSource
from luthier.data.packing import build_batch, build_eval_batches
from luthier.data.streaming import StreamingBatchSource
from luthier.data.transforms import apply_fixed, apply_random
from tiny import CLS, IM_END, MASK, SEP, pair_tokenizer, tiny_tokenizer, with_sentinels

TEXT = "The quick brown fox jumps over the lazy dog, and the lazy dog does not mind; it has seen many a fox."
WORDS = pair_tokenizer()


def t5_tokenizer(sentinels: int = 40) -> Any:
    made = with_sentinels(tiny_tokenizer(), sentinels)
    made.chat_template = None
    made.backend_tokenizer.post_processor = TemplateProcessing(single="$A <|im_end|>", special_tokens=[("<|im_end|>", IM_END)])
    return made


SPANS = t5_tokenizer()
FIRST = SPANS.convert_tokens_to_ids("<extra_id_0>")


def word_tokenizer() -> Any:
    """Every byte is a token, and a word is what stands between spaces, with the space before it."""
    made = pair_tokenizer()
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return made


def whole(how: Any, text: str = TEXT, tokenizer: Any = None, settings: dict[str, Any] | None = None, weight: float = 1.0,
          **hide: Any) -> Any:
    """The encoded document, or its parts, or the refusal."""
    tokenizer = tokenizer or (SPANS if how == "spans" else WORDS)
    config = DataConfig.parse({"train": "-", **(settings or {})})
    return encode_example(TextExample(text, Origin("f", 1), weight), tokenizer, DividedConfig.of(config) if how == "spans" else config,
                          masking=MaskingConfig.of(tokenizer, how, "base", **hide))


def one(how: Any, *args: Any, **named: Any) -> TokenizedExample:
    found, = whole(how, *args, **named)
    assert isinstance(found, TokenizedExample)
    return found


# ---------------------------------------------------------------- words


def test_words_are_hidden_in_the_shares_of_the_paper() -> None:
    """15 % of the tokens, of which 80 % are the mask, 10 % any token and 10 % as they were; nothing else changes."""
    example = one("words")
    ids = example.spans[0].ids
    assert ids == (CLS, *TEXT.encode(), SEP)
    shown, places, others = Counter[str](), Counter[int](), Counter[int]()
    times = 3000
    for epoch in range(times):
        span, = apply_random(example, 0, epoch, 7).spans
        hidden = [i for i, tag in enumerate(span.tags) if tag >= 0]
        assert len(hidden) == round(0.15 * len(TEXT)) == 15
        assert span.predicted == tuple(hidden)
        assert all(span.tags[i] == ids[i] for i in hidden)
        assert all(span.weights[i] == (i in hidden) for i in range(len(ids)))
        assert all(span.ids[i] == ids[i] for i in range(len(ids)) if i not in hidden)
        places.update(hidden)
        shown.update("mask" if span.ids[i] == MASK else "same" if span.ids[i] == ids[i] else "other" for i in hidden)
        others.update(span.ids[i] for i in hidden if span.ids[i] not in (MASK, ids[i]))
    count = 15 * times
    assert abs(shown["mask"] / count - 0.8) < 0.01
    assert abs(shown["other"] / count - 0.1) < 0.01
    assert abs(shown["same"] / count - 0.1) < 0.01
    assert set(others) <= set(range(256))  # any word, but no special token
    assert len(others) == 256
    assert set(places) == set(range(1, len(TEXT) + 1))  # every token at times, never a mark
    assert max(places.values()) < 1.3 * min(places.values())


def test_a_special_token_in_the_text_is_never_hidden() -> None:
    example = one("words", "ab[MASK]cd[SEP]e", rate=0.5)
    assert example.spans[0].ids == (CLS, *b"ab", MASK, *b"cd", SEP, *b"e", SEP)
    seen = {i for epoch in range(200) for i in apply_random(example, 0, epoch, 0).spans[0].predicted}
    assert seen == {1, 2, 4, 5, 7}


def test_the_row_decides_and_the_epoch_and_nothing_else() -> None:
    example = one("words")
    assert apply_random(example, 3, 1, 5) == apply_random(one("words"), 3, 1, 5)
    kinds = [apply_random(example, *draw).spans[0] for draw in ((3, 1, 5), (4, 1, 5), (3, 2, 5), (3, 1, 6))]
    assert len({span.ids for span in kinds}) == 4
    assert apply_fixed(example) == apply_fixed(one("words"))
    assert apply_fixed(apply_fixed(example)) == apply_fixed(example)
    assert apply_fixed(example).spans != apply_fixed(one("words", TEXT[1:])).spans


def test_a_base_sees_the_hidden_and_guesses_it_at_its_own_place() -> None:
    example = apply_fixed(one("words", weight=0.5))
    made = build_batch([example, example])
    span, = example.spans
    hidden = list(span.predicted)
    assert made.inputs.tokens.tolist() == [*span.ids, *span.ids]
    assert made.target.state_index.tolist() == [*hidden, *(len(span.ids) + i for i in hidden)]
    assert made.target.token_ids.tolist() == [(CLS, *TEXT.encode(), SEP)[i] for i in hidden] * 2
    assert made.target.weights.tolist() == [0.5] * 30
    assert made.target.num_bytes == 0


def test_whole_words_are_hidden_whole() -> None:
    tokenizer = word_tokenizer()
    example = one("words", tokenizer=tokenizer, whole=True)
    owners = tokenizer(TEXT).word_ids()
    sizes = Counter(owner for owner in owners if owner is not None)
    assert len(sizes) > 15
    seen, count = set(), 0
    for epoch in range(300):
        hidden = apply_random(example, 0, epoch, 0).spans[0].predicted
        mine = Counter(owners[i] for i in hidden)
        assert all(sizes[owner] == n for owner, n in mine.items())
        assert 0 < len(hidden) <= 15
        seen |= mine.keys()
        count += len(hidden)
    assert seen == set(sizes)
    assert count > 0.9 * 15 * 300
    apart = apply_random(one("words", tokenizer=tokenizer), 0, 0, 0).spans[0].predicted  # the control
    assert any(sizes[owner] != n for owner, n in Counter(owners[i] for i in apart).items())


def test_words_of_a_later_part_are_hidden_whole_too() -> None:
    tokenizer = word_tokenizer()
    parts = whole("words", tokenizer=tokenizer, settings={"max_length": 40, "truncation": "split"}, whole=True)
    assert len(parts) == 3
    owners, at = tokenizer(TEXT).word_ids()[1:-1], 0
    for part in parts:
        length = len(part.spans[0].ids) - 2
        own = owners[at:at + length]
        sizes, at = Counter(own), at + length
        for epoch in range(50):
            mine = Counter(own[i - 1] for i in apply_random(part, 0, epoch, 0).spans[0].predicted)
            assert mine
            assert all(sizes[owner] == n for owner, n in mine.items())
    assert at == len(owners)


def test_one_long_word_is_hidden_all_the_same() -> None:
    assert len(apply_random(one("words", "abcdefgh", word_tokenizer(), whole=True), 0, 0, 0).spans[0].predicted) == 8


# ---------------------------------------------------------------- spans


def put_back(found: TokenizedExample) -> tuple[bytes, list[bytes]]:
    """The text that source and answer make together, and the spans."""
    source, answer = (list(span.ids) for span in found.spans)
    assert source[-1] == answer[-1] == IM_END
    count = sum(token >= FIRST for token in source)
    assert [t for t in source if t >= FIRST] == list(range(FIRST, FIRST + count))
    assert [t for t in answer if t >= FIRST] == list(range(FIRST, FIRST + count + 1))  # one more ends it
    assert answer[-2] == FIRST + count
    spans = [bytes(answer[answer.index(FIRST + i) + 1:answer.index(FIRST + i + 1)]) for i in range(count)]
    text = b"".join(spans[t - FIRST] if t >= FIRST else bytes([t]) for t in source[:-1])
    return text, spans


def test_source_and_answer_are_the_text() -> None:
    example = one("spans", weight=0.5)
    lengths: list[int] = []
    starts, sources = Counter[int](), set()
    for epoch in range(500):
        found = apply_random(example, 0, epoch, 0)
        text, spans = put_back(found)
        assert text.decode() == TEXT
        assert sum(map(len, spans)) == round(0.15 * len(TEXT)) == 15
        assert len(spans) == 5
        assert all(spans)
        source, answer = found.spans
        assert all(not (a >= FIRST and b >= FIRST) for a, b in pairwise(source.ids))
        assert set(source.weights) == {0.0}
        assert set(answer.weights) == {0.5}
        assert (source.parent, answer.parent) == (-1, 0)
        lengths += map(len, spans)
        starts[found.spans[0].ids.index(FIRST)] += 1
        sources.add(source.ids)
    assert len(sources) > 495
    assert set(range(1, 8)) <= set(lengths)
    assert {0, len(TEXT) - 15} & starts.keys()  # a text may begin hidden


@pytest.mark.parametrize(("count", "hidden", "spans"), [(2, 1, 1), (3, 1, 1), (20, 3, 1), (40, 6, 2), (100, 15, 5)])
def test_short_texts_have_something_hidden_and_something_seen(count: int, hidden: int, spans: int) -> None:
    for epoch in range(30):
        text, found = put_back(apply_random(one("spans", TEXT[:count]), 1, epoch, 2))
        assert text.decode() == TEXT[:count]
        assert (sum(map(len, found)), len(found)) == (hidden, spans)


def test_much_in_spans_of_one_leaves_one_seen_between_any_two() -> None:
    for epoch in range(50):
        text, spans = put_back(apply_random(one("spans", TEXT[:30], rate=0.5, span=1.0), 1, epoch, 2))
        assert text.decode() == TEXT[:30]
        assert list(map(len, spans)) == [1] * 15


# ---------------------------------------------------------------- too long, too short, not at all


@pytest.mark.parametrize("how", ["words", "spans"])
def test_a_long_text_is_cut_split_or_refused(how: Any) -> None:
    room = 30 - 2
    short, = whole(how, settings={"max_length": 30})
    assert len(short.spans[0].ids) == room + (2 if how == "words" else 1)
    parts = whole(how, settings={"max_length": 30, "truncation": "split"})
    marks = (CLS, SEP, IM_END)
    assert bytes(t for part in parts for t in part.spans[0].ids if t not in marks).decode() == TEXT
    assert max(part.num_tokens for part in parts) - min(part.num_tokens for part in parts) <= 1
    assert all(max(map(len, (p.ids for p in apply_random(part, 0, 0, 0).spans))) <= 30 for part in parts)
    refused = whole(how, settings={"max_length": 30, "truncation": "refuse"})
    assert refused.reason == "longer than max_length"


@pytest.mark.parametrize(("how", "text", "reason", "hide"), [
    ("words", "[MASK]", "nothing to train on", {}), ("spans", "a", "nothing to train on", {}),
    ("spans", "abc<extra_id_0>def", "the text contains a sentinel token", {}),
    ("spans", "abc<|im_end|>def", "or the end-of-sequence token", {}),
    ("spans", TEXT * 5, "more spans than the tokenizer has sentinels", {"span": 1.0})])
def test_what_cannot_be_hidden_is_refused(how: Any, text: str, reason: str, hide: Any) -> None:
    assert reason in whole(how, text, **hide).reason


def test_a_tokenizer_without_what_stands_for_the_hidden_is_refused_by_name() -> None:
    with pytest.raises(BaseError, match="'mine' has no sentinels"):
        MaskingConfig.of(tiny_tokenizer(), "spans", "mine")
    with pytest.raises(BaseError, match="'mine' has no mask"):
        MaskingConfig.of(tiny_tokenizer(), "words", "mine")


# ---------------------------------------------------------------- epochs


def rows(path: Path, count: int = 7) -> Path:
    path.write_text("".join(json.dumps({"text": TEXT[i:60 + 3 * i]}) + "\n" for i in range(count)))
    return path


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        a.origins == b.origins and torch.equal(a.inputs.tokens, b.inputs.tokens) and torch.equal(a.target.token_ids, b.target.token_ids)
        for a, b in zip(first, second, strict=True))


def guessed(batches: list[Batch]) -> set[tuple[int, ...]]:
    """Each document of the batches, as it is shown."""
    return {tuple(b.inputs.tokens[start:start + n].tolist()) for b in batches
            for start, n in zip(b.inputs.segment_tree.starts, b.inputs.segment_tree.lengths, strict=True)}


@pytest.mark.parametrize("how", ["words", "spans"])
@pytest.mark.parametrize("streamed", [False, True])
def test_every_epoch_hides_anew_and_goes_on_where_it_stood(how: Any, streamed: bool, tmp_path: Path) -> None:
    tokenizer = SPANS if how == "spans" else WORDS
    config = DataConfig.parse({"train": str(rows(tmp_path / "f.jsonl")), "streaming": streamed,
                               **({} if streamed else {"eval": 0.3})})
    config = DividedConfig.of(config) if how == "spans" else config
    hide = MaskingConfig.of(tokenizer, how, "base")
    found = read_datasets(config, tokenizer, seed=0, reads=frozenset({"TextExample"}), masking=hide)

    def feed(micro: int = 1000) -> Any:
        return (StreamingBatchSource(config, tokenizer, 3, micro, seed=1, use=found.use) if streamed
                else InMemoryBatchSource(found.train, 3, micro, seed=1))

    straight, again, cut = feed(), feed(), feed(90)
    steps = [next(straight) for _ in range(12)]
    for number, step in enumerate(steps):
        assert guessed(next(cut)) == guessed(step)  # however it is cut into rows
        other = feed()
        other.load(again.state())
        assert same(next(other), step), number
        next(again)
    shown = [text for step in steps for text in guessed(step)]
    assert len(set(shown)) == len(shown)  # no two epochs alike
    if not streamed:
        (a,), (b,) = build_eval_batches(found.eval, None), build_eval_batches(found.eval, None)
        assert torch.equal(a.inputs.tokens, b.inputs.tokens)
        other = read_datasets(config, tokenizer, seed=0, reads=frozenset({"TextExample"}), masking=hide)
        assert [e.spans for e in other.eval] == [e.spans for e in found.eval]
        part = found.report.parts["train"]
        if how == "words":
            assert 0.12 < part.trained / part.tokens < 0.17  # what is said to be trained is what is hidden


def test_a_cursor_belongs_to_what_is_hidden() -> None:
    first, second = (InMemoryBatchSource([one("words", rate=rate)], 1, None) for rate in (0.15, 0.3))
    with pytest.raises(DataError, match="differs from the data that this run was trained on"):
        second.load(first.state())
    whole_, apart = (InMemoryBatchSource([one("words", tokenizer=word_tokenizer(), whole=how)], 1, None) for how in (True, False))
    with pytest.raises(DataError, match="differs from the data that this run was trained on"):
        whole_.load(apart.state())


def test_all_placements_are_as_likely() -> None:
    """Of 6 tokens 2 hidden in 2 spans: as many ways as two places that do not touch, 10; each as often."""
    example = one("spans", "abcdef", rate=2 / 6, span=1.0)
    ways = Counter(tuple(put_back(apply_random(example, 0, epoch, 0))[1]) for epoch in range(4000))
    assert len(ways) == 10
    assert max(ways.values()) < 1.3 * min(ways.values())

