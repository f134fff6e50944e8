"""Attention over segments and pooled states by hand: dropout, scale, windows, positions, and whose token an item is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lab import base, documents, trees
from torch import Tensor

from luthier.core.types import SegmentTree
from luthier.data.packing import build_batch
from luthier.models.attention.packed import describe_segments, packed_attention
from luthier.models.task_heads import pool_states

TREE = SegmentTree((3, 2, 4, 1), (-1, 0, 0, 2))  # a prompt, two answers, and a span behind the second
FLAT = SegmentTree((4, 1, 5), (-1, -1, -1))


def parts(segment_tree: SegmentTree, heads: int = 2, groups: int = 1, width: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = sum(segment_tree.lengths)
    query, key, value = (torch.randn(1, n, tokens, width, generator=generator, dtype=torch.float64) for n in (heads, groups, groups))
    return query, key, value


def by_hand(query: Tensor, key: Tensor, value: Tensor, segment_tree: SegmentTree, causal: bool = True, window: int | None = None,
            scale: float | None = None, softcap: float | None = None) -> Tensor:
    """Every token and every head by itself: the tokens of its own segment and its ancestors, in their order."""
    _, heads, tokens, width = query.shape
    owner = [s for s, n in enumerate(segment_tree.lengths) for _ in range(n)]
    out = torch.zeros(1, tokens, heads, width, dtype=torch.float64)
    for t in range(tokens):
        line = [u for s in segment_tree.find_path(owner[t]) for u in range(tokens) if owner[u] == s]
        at = line.index(t)
        seen = [u for i, u in enumerate(line) if (not causal or i <= at) and (window is None or at - i < window)]
        for h in range(heads):
            k, v = (x[0, h * x.shape[1] // heads] for x in (key, value))
            scores = k[seen] @ query[0, h, t] * (width ** -0.5 if scale is None else scale)
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            out[0, t, h] = scores.softmax(0) @ v[seen]
    return out


@pytest.mark.parametrize("settings", [{}, {"window": 3}, {"scale": 0.9}, {"softcap": 0.4}, {"softcap": 0.4, "window": 2},
                                      {"causal": False}], ids=str)
@pytest.mark.parametrize("segment_tree", [TREE, FLAT], ids=["tree", "flat"])
def test_each_token_sees_itself_its_past_and_its_ancestors(segment_tree: SegmentTree, settings: dict[str, Any]) -> None:
    query, key, value = parts(segment_tree)
    module = SimpleNamespace(is_causal=settings.get("causal", True))
    found, _ = packed_attention(module, query, key, value, None, segment_tree=segment_tree, sliding_window=settings.get("window"),
                         scaling=settings.get("scale"), softcap=settings.get("softcap"))
    torch.testing.assert_close(found, by_hand(query, key, value, segment_tree, **settings), rtol=1e-9, atol=1e-12)
    alone = by_hand(query, key, value, SegmentTree((sum(segment_tree.lengths),), (-1,)), **settings)
    assert (found - alone).abs().max() > 1e-2  # the control: as one document


@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("segment_tree", [TREE, FLAT, None], ids=["tree", "flat", "no segment_tree"])
def test_dropout_reaches_attention_and_keeps_its_mean(segment_tree: SegmentTree | None, softcap: float | None) -> None:
    query, key, value = parts(segment_tree or SegmentTree((6,), (-1,)))
    module = SimpleNamespace(is_causal=True)
    torch.manual_seed(0)

    def once(dropout: float) -> Tensor:
        return packed_attention(module, query, key, value, None, segment_tree=segment_tree, softcap=softcap, dropout=dropout)[0]
    exact, throws = once(0.0), torch.stack([once(0.5) for _ in range(500)])
    assert (throws[0] - exact).abs().max() > 0.1
    error = throws.std(0) / len(throws) ** 0.5
    assert ((throws.mean(0) - exact).abs() < 5 * error).all()
    assert torch.equal(once(0.0), exact)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("rows", [documents, trees], ids=["documents", "trees"])
def test_a_models_attention_dropout_acts_in_packed_rows_in_training_alone(kind: str, rows: Any) -> None:
    family, row = base(kind, "packed", attention_dropout=0.5), build_batch(rows())
    family.train(False)
    calm = [family.states(row.inputs).detach() for _ in range(2)]
    family.train(True)
    torch.manual_seed(0)
    thrown = [family.states(row.inputs).detach() for _ in range(2)]
    assert torch.equal(*calm)
    assert (thrown[0] - thrown[1]).abs().max() > 1e-3
    assert (thrown[0] - calm[0]).abs().max() > 1e-3


def test_a_forest_described() -> None:
    segment, place, related = describe_segments(TREE)
    assert segment.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2, 3]
    assert place.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 6, 7]
    assert related.tolist() == [[True, False, False, False], [True, True, False, False], [True, False, True, False],
                                [True, False, True, True]]
    row = build_batch(trees())
    assert torch.equal(row.inputs.positions, describe_segments(row.inputs.segment_tree)[1])


@pytest.mark.parametrize(("how", "wanted"), [
    ("last", [2.0, 4.0, 8.0, 9.0]),  # the last token of the item itself
    ("first", [0.0, 0.0, 0.0, 0.0]),  # the first token of the whole text, which its root holds
    ("mean", [1.0, (0 + 1 + 2 + 3 + 4) / 5, (0 + 1 + 2 + 5 + 6 + 7 + 8) / 7, (0 + 1 + 2 + 5 + 6 + 7 + 8 + 9) / 8])])
def test_items_of_a_tree_are_pooled_over_their_own_text(how: Any, wanted: list[float]) -> None:
    row = torch.arange(10.0)[:, None].expand(10, 2) * torch.tensor([1.0, 10.0])
    found = pool_states(row, TREE, torch.tensor([0, 1, 2, 3]), how)
    torch.testing.assert_close(found, torch.tensor(wanted)[:, None] * torch.tensor([1.0, 10.0]))
    assert torch.equal(pool_states(row, TREE, torch.tensor([3, 1]), how), found[[3, 1]])


@pytest.mark.parametrize(("how", "wanted"), [("last", [3.0, 4.0, 9.0]), ("first", [0.0, 4.0, 5.0]), ("mean", [1.5, 4.0, 7.0])])
def test_items_of_plain_rows_are_pooled_by_themselves(how: Any, wanted: list[float]) -> None:
    found = pool_states(torch.arange(10.0)[:, None], FLAT, torch.tensor([0, 1, 2]), how)
    torch.testing.assert_close(found[:, 0], torch.tensor(wanted))
