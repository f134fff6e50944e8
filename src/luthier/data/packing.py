"""Packs tokenized examples into batches: rows without padding. Read `core/types.py` first.

Shape letters: T tokens in a row, S segments, P predictions, A labeled spans, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from luthier.core.embedding_mix import EmbeddingMix
from luthier.core.types import Batch, Inputs, LossInputs, SegmentTree, TokenizedExample


def pack_examples(encoded: Sequence[TokenizedExample], max_tokens: int | None) -> list[Batch]:
    """Packs the examples into as few rows of at most `max_tokens` tokens as first-fit decreasing finds; None: one.

    An example longer than `max_tokens` has its own row. `max_tokens` changes only the division into rows, not the
    predictions and their weights. Within a row the examples keep their order.
    """
    if max_tokens is None:
        return [build_batch(encoded)] if encoded else []
    return [build_batch([encoded[i] for i in row]) for row in assign_rows(encoded, max_tokens)]


def assign_rows(encoded: Sequence[TokenizedExample], max_tokens: int) -> list[list[int]]:
    """The examples of each row; see `pack_examples`."""
    rows: list[list[int]] = []
    room: list[int] = []  # free tokens of each row
    for index in sorted(range(len(encoded)), key=lambda i: (-encoded[i].num_tokens, i)):
        tokens = encoded[index].num_tokens
        row = next((r for r, free in enumerate(room) if free >= tokens), None)
        if row is None:
            rows.append([index])
            room.append(max_tokens - tokens)
        else:
            rows[row].append(index)
            room[row] -= tokens
    return [sorted(row) for row in rows]


def build_eval_batches(encoded: Sequence[TokenizedExample], max_tokens: int | None, group: int = 512) -> list[Batch]:
    """Batches for one evaluation pass. Packs `group` examples at a time, because first-fit is quadratic; `max_tokens`
    None: rows of at most 8192 tokens."""
    return [row for at in range(0, len(encoded), group)
            for row in pack_examples(encoded[at:at + group], max_tokens or 8192)]


def build_batch(encoded: Sequence[TokenizedExample]) -> Batch:
    """All examples as one row.

    Positions continue from the parent span. The first token of a child is predicted at its parent's last token; the
    first token of a root is not predicted. A tag is predicted at its own token.
    """
    tokens: list[int] = []  # [T]
    positions: list[int] = []  # [T]
    lengths: list[int] = []  # [S]
    parents: list[int] = []  # [S]
    at: list[int] = []  # [P]
    goals: list[int] = []  # [P]
    weights: list[float] = []  # [P]
    items: list[int] = []  # [A]
    others: list[int] = []  # [T]
    shares: list[float] = []  # [T]
    item_of: list[int] = []  # [P]
    images: list[torch.Tensor] = []  # [channels, height, width] each
    for example in encoded:
        first = len(lengths)  # segment of the example's first span
        judged = {item.span_index: len(items) + i for i, item in enumerate(example.labeled_spans)}
        items += [first + item.span_index for item in example.labeled_spans]
        images += [image if isinstance(image, torch.Tensor) else image.tensor() for image in example.images]
        span_ends: list[tuple[int, int]] = []  # of each span: index of its last token, and the position after it
        for number, span in enumerate(example.spans):
            start, before, depth = len(tokens), -1, 0
            if span.parent >= 0:
                before, depth = span_ends[span.parent]
            length = len(span.ids)
            tokens += span.ids
            others += span.mix.ids if span.mix else [-1] * length
            shares += [span.mix.share if span.mix else 1.0] * length
            positions += range(depth, depth + length)
            lengths.append(length)
            parents.append(first + span.parent if span.parent >= 0 else -1)
            span_ends.append((start + length - 1, depth + length))
            for i in span.predicted:
                at.append(start + i if span.tags else start + i - 1 if i else before)
                goals.append(span.tags[i] if span.tags else span.ids[i])
                weights.append(span.weights[i])
                item_of.append(judged.get(number, -1))
    mix = EmbeddingMix(_to_long(others), torch.tensor(shares, dtype=torch.float32)) if max(others) >= 0 else None
    inputs = Inputs(_to_long(tokens), _to_long(positions), SegmentTree(tuple(lengths), tuple(parents)),
                    torch.stack(images) if images else None, mix)  # [S, channels, height, width]
    labeled = [item for example in encoded for item in example.labeled_spans]
    target = LossInputs(_to_long(at), _to_long(goals), torch.tensor(weights, dtype=torch.float32), len(encoded),
                        sum(example.num_bytes for example in encoded), _to_long(items),
                        torch.tensor([item.label for item in labeled], dtype=torch.float32),  # [A] or [A, C]
                        torch.tensor([item.margin for item in labeled], dtype=torch.float32),  # [A]
                        _to_long(i for i, example in enumerate(encoded) for _ in example.labeled_spans),  # [A]
                        _to_long(item_of),  # [P]
                        {name: torch.cat([row.precomputed[name] for row in encoded])
                         for name in encoded[0].precomputed},  # name -> [P]
                        torch.tensor([item.weight for item in labeled], dtype=torch.float32),  # [A]
                        _build_label_shares(encoded),  # [A, C] or [0]
                        _to_long(item.text_id for item in labeled if item.text_id is not None))  # [A] or [0]
    return Batch(inputs, target, tuple(example.origin for example in encoded))


def _build_label_shares(encoded: Sequence[TokenizedExample]) -> torch.Tensor:
    """See `LossInputs.soft_labels`: a single class is a mixture of one class."""
    items = [item for example in encoded for item in example.labeled_spans]
    width = max((len(item.soft_label) for item in items), default=0)  # C; 0 where no label is a mixture
    rows = [item.soft_label or [float(item.label == i) for i in range(width)] for item in items] if width else []
    return torch.tensor(rows, dtype=torch.float32)  # [A, C] or [0]


def _to_long(values: Iterable[int]) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.int64)
