"""Encoded examples to batches: rows without padding. Read `core/types.py` first, then nothing else.

Shape letters: T tokens in a row, P predictions in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from luthier.core.types import Batch, Inputs, LossInputs, SegmentTree, TokenizedExample
from luthier.data.images import ImageInput
from luthier.data.masking import apply_fixed


def pack_examples(encoded: Sequence[TokenizedExample], max_tokens: int | None) -> list[Batch]:
    """The examples in as few rows of at most `max_tokens` tokens as first-fit decreasing finds; None: in one row.

    An example longer than `max_tokens` has a row of its own. What is predicted, with which weight, does not depend on
    `max_tokens`: only how it is cut into rows does. Within a row the examples keep their order.
    """
    if max_tokens is None:
        return [build_batch(encoded)] if encoded else []
    return [build_batch([encoded[i] for i in row]) for row in assign_rows(encoded, max_tokens)]


def assign_rows(encoded: Sequence[TokenizedExample], max_tokens: int) -> list[list[int]]:
    """Which examples share a row; see `pack`."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(encoded)), key=lambda i: (-encoded[i].tokens, i)):
        tokens = encoded[index].tokens
        row = next((r for r, free in enumerate(room) if free >= tokens), None)
        if row is None:
            rows.append([index])
            room.append(max_tokens - tokens)
        else:
            rows[row].append(index)
            room[row] -= tokens
    return [sorted(row) for row in rows]


def build_eval_batches(encoded: Sequence[TokenizedExample], max_tokens: int | None, group: int = 512) -> list[Batch]:
    """Batches to go through once, with the same hidden every time. Packs `group` examples at a time, which keeps
    packing fast for many; `max_tokens` None: rows of up to 8192 tokens."""
    return [row for at in range(0, len(encoded), group)
            for row in pack_examples([apply_fixed(one) for one in encoded[at:at + group]], max_tokens or 8192)]


def build_batch(encoded: Sequence[TokenizedExample]) -> Batch:
    """All the examples as one row.

    A position counts on from its parent piece. The prediction of a child's first token is made at its parent's last
    token; the first token of a root follows nothing and is not predicted. A tag is predicted at its own token.
    """
    tokens: list[int] = []
    positions: list[int] = []
    lengths: list[int] = []
    parents: list[int] = []
    at: list[int] = []
    goals: list[int] = []
    weights: list[float] = []
    items: list[int] = []
    labels: list[float | tuple[float, ...]] = []
    margins: list[float] = []
    counted: list[float] = []
    others: list[int] = []
    shares: list[float] = []
    text_ids: list[int] = []
    groups: list[int] = []
    item_of: list[int] = []
    images: list[torch.Tensor] = []
    for owner, example in enumerate(encoded):
        first = len(lengths)  # segment of the example's first piece
        judged = {item.piece: len(items) + i for i, item in enumerate(example.items)}
        items += [first + item.piece for item in example.items]
        labels += [item.label for item in example.items]
        margins += [item.margin for item in example.items]
        counted += [item.weight for item in example.items]
        groups += [owner] * len(example.items)
        text_ids += [item.text_id for item in example.items if item.text_id is not None]
        images += [image.tensor() if isinstance(image, ImageInput) else image for image in example.images]
        spans: list[tuple[int, int]] = []  # of each piece: its last token's place in the row, and its depth behind it
        for number, piece in enumerate(example.pieces):
            start, before, depth = len(tokens), -1, 0
            if piece.parent >= 0:
                before, depth = spans[piece.parent]
            length = len(piece.ids)
            tokens += piece.ids
            others += piece.others or [-1] * length
            shares += [piece.share] * length
            positions += range(depth, depth + length)
            lengths.append(length)
            parents.append(first + piece.parent if piece.parent >= 0 else -1)
            spans.append((start + length - 1, depth + length))
            for i in piece.predicted:
                at.append(start + i if piece.tags else start + i - 1 if i else before)
                goals.append(piece.tags[i] if piece.tags else piece.ids[i])
                weights.append(piece.weights[i])
                item_of.append(judged.get(number, -1))
    inputs = Inputs(_to_long(tokens), _to_long(positions), SegmentTree(tuple(lengths), tuple(parents)),
                    torch.stack(images) if images else None,
                    *((_to_long(others), torch.tensor(shares, dtype=torch.float32)) if max(others) >= 0 else ()))
    target = LossInputs(_to_long(at), _to_long(goals), torch.tensor(weights, dtype=torch.float32), len(encoded),
                        sum(example.bytes for example in encoded), _to_long(items),
                        torch.tensor(labels, dtype=torch.float32),
                        torch.tensor(margins, dtype=torch.float32), _to_long(groups), _to_long(item_of),
                        {name: torch.cat([row.precomputed[name] for row in encoded])
                         for name in encoded[0].precomputed},
                        torch.tensor(counted, dtype=torch.float32), _build_label_shares(encoded), _to_long(text_ids))
    return Batch(inputs, target, tuple(example.origin for example in encoded))


def _build_label_shares(encoded: Sequence[TokenizedExample]) -> torch.Tensor:
    """See `Target`: a class by itself is a mixture of one."""
    items = [item for example in encoded for item in example.items]
    width = max((len(item.shares) for item in items), default=0)
    rows = [item.shares or [float(item.label == i) for i in range(width)] for item in items] if width else []
    return torch.tensor(rows, dtype=torch.float32)


def _to_long(values: Iterable[int]) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.int64)
