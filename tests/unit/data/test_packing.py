"""A batch predicts the same whatever the rows; trees hang together; rows are full."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.core.examples import Origin
from luthier.core.types import Batch, LabeledSpan, TokenizedExample, TokenSpan
from luthier.data.packing import build_eval_batches, pack_examples

TREES = st.lists(st.tuples(st.lists(st.tuples(st.integers(0, 99), st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=6),
                           st.integers(-1, 3)), min_size=1, max_size=4)


def tree(number: int, spans) -> TokenizedExample:
    """Pieces as drawn; each continues an earlier one, or none."""
    made = tuple(TokenSpan(tuple(t for t, _ in run), tuple(w for _, w in run), min(parent, index - 1) if index else -1)
                 for index, (run, parent) in enumerate(spans))
    return TokenizedExample(made, Origin("f", number), number, tuple(LabeledSpan(i, 0.0) for i in range(len(made))))


EXAMPLES = st.lists(TREES, min_size=1, max_size=8).map(lambda drawn: [tree(i, spans) for i, spans in enumerate(drawn)])


def predictions(batches: list[Batch]) -> Counter:
    """Each prediction as (example, the tokens that it is made from, the token, its weight), from the batches alone."""
    found: Counter = Counter()
    for batch in batches:
        inputs, target = batch.inputs, batch.target
        starts = inputs.segment_tree.starts
        for at, token, weight, item in zip(target.state_index.tolist(), target.token_ids.tolist(), target.weights.tolist(), target.item_of.tolist(), strict=True):
            owner = target.groups.tolist()[item]
            segment = max(i for i, start in enumerate(starts) if start <= at)
            before = [inputs.tokens[starts[s]:starts[s] + inputs.segment_tree.lengths[s]].tolist() for s in inputs.segment_tree.find_path(segment)[:-1]]
            before.append(inputs.tokens[starts[segment]:at + 1].tolist())
            found[batch.origins[owner].line, tuple(chain(*before)), token, weight] += 1
    return found


def expected(examples: list[TokenizedExample]) -> Counter:
    """The same, from the definition of a span."""
    found: Counter = Counter()
    for example in examples:
        for span in example.spans:
            before, parent = [], span.parent
            while parent >= 0:
                before = [*example.spans[parent].ids, *before]
                parent = example.spans[parent].parent
            for i, (token, weight) in enumerate(zip(span.ids, span.weights, strict=True)):
                context = (*before, *span.ids[:i])
                if weight and context:
                    found[example.origin.line, context, token, weight] += 1
    return found


@settings(deadline=None)
@given(EXAMPLES, st.one_of(st.none(), st.integers(1, 60)))
def test_what_is_predicted_does_not_depend_on_the_rows(examples, max_tokens) -> None:
    batches = pack_examples(examples, max_tokens)
    assert predictions(batches) == expected(examples)
    assert sorted(o.line for b in batches for o in b.origins) == list(range(len(examples)))
    assert sum(b.target.num_bytes for b in batches) == sum(e.num_bytes for e in examples)
    for batch in batches:
        size = len(batch.inputs.tokens)
        assert size == sum(batch.inputs.segment_tree.lengths) == len(batch.inputs.positions)
        assert max_tokens is None or size <= max_tokens or len(batch.origins) == 1
        assert len(batch.origins) == batch.target.num_examples


@settings(deadline=None)
@given(EXAMPLES, st.integers(1, 60))
def test_positions_count_on_from_the_parent(examples, max_tokens) -> None:
    for batch in pack_examples(examples, max_tokens):
        segment_tree = batch.inputs.segment_tree
        for segment, start in enumerate(segment_tree.starts):
            depth = sum(segment_tree.lengths[s] for s in segment_tree.find_path(segment)[:-1])
            got = batch.inputs.positions[start:start + segment_tree.lengths[segment]].tolist()
            assert got == list(range(depth, depth + segment_tree.lengths[segment]))


def lengths(*sizes: int) -> list[TokenizedExample]:
    return [tree(i, [([(1, 1.0)] * size, -1)]) for i, size in enumerate(sizes)]


def test_rows_are_filled_first_fit_decreasing_and_keep_order() -> None:
    rows = pack_examples(lengths(3, 7, 5, 2, 12), 10)
    assert [[o.line for o in row.origins] for row in rows] == [[4], [0, 1], [2, 3]]
    assert [[o.line for o in row.origins] for row in pack_examples(lengths(7, 3, 1), 10)] == [[0, 1], [2]]  # full is full


def test_kinds_of_numbers() -> None:
    (row,) = pack_examples(lengths(3), None)
    integers = (row.inputs.tokens, row.inputs.positions, row.target.state_index, row.target.token_ids, row.target.labeled_segments, row.target.groups, row.target.item_of)
    assert {t.dtype for t in integers} == {torch.int64}
    assert row.target.weights.dtype == torch.float32


def test_nothing_makes_no_batch() -> None:
    assert pack_examples([], None) == pack_examples([], 5) == build_eval_batches([], 5) == []


def test_evaluation_goes_once_through_everything() -> None:
    examples = lengths(*range(1, 20))
    for max_tokens in (5, 30, None):
        assert predictions(build_eval_batches(examples, max_tokens, group=4)) == expected(examples)


def test_one_row_by_hand() -> None:
    """A text of three tokens; then a prompt of two with two answers, of which the second goes on."""
    examples = [tree(0, [([(10, 1.0), (11, 2.0), (12, 3.0)], -1)]),
                tree(1, [([(20, 0.0), (21, 0.0)], -1), ([(30, 4.0), (31, 5.0)], 0), ([(40, 6.0)], 0), ([(50, 7.0)], 2)])]
    row, = pack_examples(examples, None)
    assert row.inputs.tokens.tolist() == [10, 11, 12, 20, 21, 30, 31, 40, 50]
    assert row.inputs.positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 2, 3]
    assert row.inputs.segment_tree.lengths == (3, 2, 2, 1, 1)
    assert row.inputs.segment_tree.parents == (-1, -1, 1, 1, 3)
    assert row.target.token_ids.tolist() == [11, 12, 30, 31, 40, 50]
    assert row.target.state_index.tolist() == [0, 1, 4, 5, 4, 7]  # each from the token before it, an answer's first from the prompt's last
    assert row.target.weights.tolist() == [2, 3, 4, 5, 6, 7]
