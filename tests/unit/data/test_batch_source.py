"""Epochs see everything once, sources by their weight, and a cursor goes on exactly where it stood; in memory and streamed."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luthier.core.errors import DataError
from luthier.core.examples import Origin
from luthier.core.types import Batch, TokenizedExample, TokenSpan
from luthier.data.batch_source import InMemoryBatchSource
from luthier.data.config import DataConfig
from luthier.data.streaming import StreamingBatchSource


def some(count: int, first: int = 0) -> list[TokenizedExample]:
    return [TokenizedExample((TokenSpan((i, 1, 2), (0.0, 1.0, 1.0)),), Origin("f", i)) for i in range(first, first + count)]


def lines(step: list[Batch]) -> list[int]:
    return [origin.line for batch in step for origin in batch.origins]


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        a.origins == b.origins and torch.equal(a.inputs.tokens, b.inputs.tokens) and torch.equal(a.target.weights, b.target.weights)
        for a, b in zip(first, second, strict=True))


@given(st.integers(1, 30), st.integers(1, 9), st.booleans(), st.integers(0, 5))
def test_an_epoch_sees_everything_once_and_knows_its_steps(count, batch_size, shuffle, seed) -> None:
    loader = InMemoryBatchSource(some(count), batch_size, None, shuffle, seed)
    for _ in range(2):
        steps = [lines(next(loader)) for _ in range(loader.steps_per_epoch)]
        assert sorted([line for step in steps for line in step]) == list(range(count))
        assert all(len(step) == batch_size for step in steps[:-1])


def test_the_order_is_of_seed_and_epoch_alone() -> None:
    loader = InMemoryBatchSource(some(50), 50, None, True, 3)
    first, second = lines(next(loader)), lines(next(loader))
    # rows are packed in the order of their place in the step, so one row a step shows the order
    assert InMemoryBatchSource(some(50), 7, 10, True, 3).order(0).tolist() == loader.order(0).tolist() == first
    assert first != second
    assert loader.order(0).tolist() != InMemoryBatchSource(some(50), 50, None, True, 4).order(0).tolist()
    assert InMemoryBatchSource(some(5), 5, None, shuffle=False).order(7).tolist() == [0, 1, 2, 3, 4]


@given(st.integers(1, 20), st.integers(1, 6), st.integers(0, 25), st.booleans())
def test_a_cursor_goes_on_exactly(count, batch_size, steps, shuffle) -> None:
    going = InMemoryBatchSource(some(count), batch_size, 7, shuffle, 1)
    for _ in range(steps):
        next(going)
    fresh = InMemoryBatchSource(some(count), batch_size, 7, shuffle, 1)
    fresh.load(json.loads(json.dumps(going.state())))
    for _ in range(2 * going.steps_per_epoch + 1):
        assert same(next(going), next(fresh))


def test_a_cursor_of_other_data_is_refused() -> None:
    state = InMemoryBatchSource(some(5), 2, None).state()
    changes = [InMemoryBatchSource(some(6), 2, None), InMemoryBatchSource(some(5, first=1), 2, None), InMemoryBatchSource(some(5), 2, None, seed=1),
               InMemoryBatchSource(some(5), 2, None, shuffle=False), InMemoryBatchSource(some(5), 2, None, mix=[(5, 2.0)]),
               InMemoryBatchSource([TokenizedExample((TokenSpan(e.spans[0].ids, (0.0, 1.0, 0.5)),), e.origin) for e in some(5)], 2, None)]
    for other in changes:
        with pytest.raises(DataError, match="differs from the data that this run was trained on"):
            other.load(state)
    InMemoryBatchSource(some(5), 3, 100).load(state)  # how it is cut into steps and rows may change


def test_a_weight_is_how_often_an_epoch_sees_a_source() -> None:
    loader = InMemoryBatchSource(some(30), 7, None, mix=[(10, 2.0), (10, 0.5), (10, 1.0)])
    epochs = [Counter(line for _ in range(loader.steps_per_epoch) for line in lines(next(loader))) for _ in range(2)]
    for seen in epochs:
        assert {seen[i] for i in range(10)} == {2}
        assert sorted(seen[i] for i in range(10, 20)) == [0] * 5 + [1] * 5
        assert {seen[i] for i in range(20, 30)} == {1}
    assert epochs[0] != epochs[1]
    unshuffled = InMemoryBatchSource(some(4), 9, None, shuffle=False, mix=[(4, 1.5)]).order(0).tolist()
    assert unshuffled[:4] == [0, 1, 2, 3]
    assert len(unshuffled) == 6


# ---------------------------------------------------------------- streamed


@pytest.fixture
def texts(write):
    """A file of numbered texts, in which every fifth row is broken."""
    def written(name: str, count: int, word: str) -> str:
        return write(name, "".join("{broken\n" if i % 5 == 4 else json.dumps({"text": f"{word}{i}"}) + "\n" for i in range(count)))
    return written


def streamed(texts, tokenizer, block: int = 8, **options: object) -> StreamingBatchSource:
    sources = [texts("a.jsonl", 20, "a"), {"path": texts("b.jsonl", 11, "b"), **options.pop("second", {})}]
    config = DataConfig.parse({"train": sources, "streaming": True, **options})
    return StreamingBatchSource(config, tokenizer, 3, 16, seed=1, block=block)


def names(step: list[Batch]) -> list[tuple[str, int]]:
    return [(origin.file[-7:], origin.line) for batch in step for origin in batch.origins]


EVERY = sorted([("a.jsonl", i + 1) for i in range(20) if i % 5 != 4] + [("b.jsonl", i + 1) for i in range(11) if i % 5 != 4])


@pytest.mark.parametrize("block", [1, 8, 1000])
def test_a_stream_sees_everything_once_an_epoch(texts, letters, block) -> None:
    stream = streamed(texts, letters, block)
    epochs = []
    for epoch in range(2):
        seen = []
        while len(seen) < len(EVERY):
            seen += names(next(stream))
            assert stream.epoch == epoch
        assert sorted(seen) == EVERY
        epochs.append(seen)
    assert block == 1 or epochs[0] != epochs[1]
    assert (stream.tally.read, stream.tally.kept, stream.tally.reasons["broken JSON"]) == (31, 25, 6)


def test_an_unshuffled_stream_takes_the_sources_in_turn(texts, letters) -> None:
    stream = streamed(texts, letters, shuffle=False)
    assert sorted(names(next(stream))) == [("a.jsonl", 1), ("a.jsonl", 2), ("b.jsonl", 1)]


def test_a_fraction_of_a_streamed_source_is_another_each_epoch(texts, letters) -> None:
    stream = streamed(texts, letters, second={"weight": 0.5})
    epochs: dict[int, set[int]] = {0: set(), 1: set(), 2: set()}
    while True:
        step = names(next(stream))
        if stream.epoch > 2:
            break
        epochs[stream.epoch] |= {line for file, line in step if file == "b.jsonl"}
    assert len({frozenset(seen) for seen in epochs.values()}) > 1
    assert all(seen < {line for file, line in EVERY if file == "b.jsonl"} for seen in epochs.values())


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.integers(0, 24), block=st.integers(1, 30), shuffle=st.booleans(), weight=st.sampled_from([1.0, 0.5, 2.0]))
def test_a_streams_cursor_goes_on_exactly(texts, letters, steps, block, shuffle, weight) -> None:
    options = {"block": block, "shuffle": shuffle, "second": {"weight": weight}}
    going, fresh = streamed(texts, letters, **options), streamed(texts, letters, **options)
    for _ in range(steps):
        next(going)
    fresh.load(json.loads(json.dumps(going.state())))
    for _ in range(15):
        assert same(next(going), next(fresh))


def test_a_streams_cursor_of_other_data_is_refused(texts, letters) -> None:
    state = streamed(texts, letters).state()
    with pytest.raises(DataError, match="differs from the data that this run was trained on"):
        streamed(texts, letters, max_length=5).load(state)
    stream = streamed(texts, letters)
    texts("a.jsonl", 21, "a")
    with pytest.raises(DataError, match="differs from the data that this run was trained on"):
        stream.load(state)


def test_a_stream_without_a_usable_row_says_so(write, letters) -> None:
    config = DataConfig.parse({"train": write("a.jsonl", "{broken\n"), "streaming": True})
    with pytest.raises(DataError, match="broken JSON"):
        next(StreamingBatchSource(config, letters, 2, None))
