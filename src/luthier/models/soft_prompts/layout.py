"""The positions of virtual tokens in a row, as indices only. Read `core/types.py` first; `causal.py` uses it.

Rows with different adapters have different virtual tokens. All virtual tokens are stored in one table, adapter by
adapter, followed by the row's own tokens; a layout maps each position of the longer row to an entry of the table.

    packed, causal          one additional root for each adapter with virtual tokens; its documents become children
    packed, bidirectional   each root begins with its adapter's virtual tokens, because they attend to what follows
    padded                  every row has as many virtual positions as the longest needs, before its first token; the
                            unused ones are padding

Shape letters: B rows, L tokens of a row as the caller knows it, L' with the virtual ones, S segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from luthier.core.types import SegmentTree


@dataclass(frozen=True)
class VirtualTokenLayout:
    """Rows of L tokens extended by virtual tokens to L'.

    Args:
        source_index: [B, L'] each position's index into the table.
        template: [B, L'] the original token whose mask and type each position has: itself, or the first of its text.
        own_index: [B, L] the new position of each original token.
        position_shift: [B, L'] added to the position id of the template.
        is_token: [B, L'] False for padding in place of a virtual token; None: there is none.
        segment_tree: the segment tree of the longer row.
        assignment: for each segment of that tree, the index of its combination.
    """

    source_index: Tensor  # [B, L']
    template: Tensor  # [B, L']
    own_index: Tensor  # [B, L]
    position_shift: Tensor  # [B, L']
    is_token: Tensor | None = None  # [B, L']
    segment_tree: SegmentTree | None = None
    assignment: tuple[int, ...] = ()  # segments of the longer row


def layout_padded(first: Tensor, width: int, sizes: Sequence[int], assignment: Sequence[int],
                  places: int = 0) -> VirtualTokenLayout:
    """Virtual tokens before the first token of each row, which is at `first` [B, 1].

    Args:
        sizes: the number of virtual tokens of each combination.
        assignment: the combination of each row.
        places: the minimum number of virtual positions in every row.
    """
    device, starts = first.device, [*accumulate(sizes, initial=0)]  # where each combination begins in the table
    places = max(places, *(sizes[combination] for combination in assignment))
    n, start = (torch.tensor([values[combination] for combination in assignment], device=device)[:, None]  # [B, 1]
                for values in (sizes, starts))
    at, own = (torch.arange(size, device=device) for size in (width + places, width))  # [L'], [L]
    virtual = (at >= first) & (at < first + places)  # [B, L']
    place = at - first - (places - n)  # [B, L'] index among the row's virtual tokens; below 0 for padding
    own_index = torch.where(at < first, at, at - places)  # [B, L'] meant for own tokens only
    full = all(sizes[combination] == places for combination in assignment)
    # Clamped: padding points at some entry of the table, and `is_token` excludes it.
    return VirtualTokenLayout(torch.where(virtual, start + place.clamp(min=0), own_index + starts[-1]),
                              torch.where(virtual, first, own_index), torch.where(own < first, own, own + places),
                              # [B, L'] A text starts behind its n virtual tokens.
                              torch.where(virtual, place.clamp(min=0), n),
                              None if full else ~virtual | (place >= 0))


def layout_packed(segment_tree: SegmentTree, sizes: Sequence[int], assignment: Sequence[int], both_ways: bool,
                  device: torch.device) -> VirtualTokenLayout:
    """One root for each combination before all others; with bidirectional attention, virtual tokens in every root.

    Args:
        sizes: the number of virtual tokens of each combination.
        assignment: the combination of each segment; a child has that of its parent.
    """
    make = _layout_in_every_root if both_ways else _layout_as_roots
    return make(segment_tree, sizes, [*accumulate(sizes, initial=0)], assignment, device)


def _layout_as_roots(segment_tree: SegmentTree, sizes: Sequence[int], starts: Sequence[int], assignment: Sequence[int],
                     device: torch.device) -> VirtualTokenLayout:
    used = {combination: assignment.index(combination)  # the first segment of each combination with virtual tokens
            for combination in dict.fromkeys(assignment)
            if sizes[combination]}
    new, total = list(used), sum(segment_tree.lengths)
    above = {combination: i for i, combination in enumerate(new)}  # combination -> its new root
    parents = [parent + len(new) if parent >= 0 else above.get(combination, -1)
               for parent, combination in zip(segment_tree.parents, assignment, strict=True)]
    longer = SegmentTree((*(sizes[combination] for combination in new), *segment_tree.lengths),
                         (*(-1 for _ in new), *parents),
                         (*(segment_tree.adapters[used[combination]] for combination in new),
                     *segment_tree.adapters)
                         if segment_tree.adapters else ())
    heads = [torch.arange(sizes[combination]) for combination in new]  # [N of it] each
    # [L], and the number of all virtual tokens.
    row, before = torch.arange(total), sum(sizes[combination] for combination in new)
    source = torch.cat([*(head + starts[combination] for head, combination in zip(heads, new, strict=True)),
                        row + starts[-1]])  # [L']
    like = torch.cat([*(torch.full_like(head, segment_tree.starts[used[combination]])
                        for head, combination in zip(heads, new, strict=True)), row])  # [L']
    shift = torch.cat([*heads, repeat_per_token([sizes[combination] for combination in assignment],
                                                segment_tree.lengths)])  # [L']
    return _make_layout(device, source, like, row + before, shift, longer, (*new, *assignment))


def _layout_in_every_root(segment_tree: SegmentTree, sizes: Sequence[int], starts: Sequence[int],
                          assignment: Sequence[int],
                          device: torch.device) -> VirtualTokenLayout:
    added = [sizes[combination] if parent < 0 else 0
             for parent,
             combination in zip(segment_tree.parents, assignment, strict=True)]
    longer = replace(segment_tree, lengths=tuple(x + y for x, y in zip(segment_tree.lengths, added, strict=True)))
    source, like, own, shift = [], [], [], []
    for at, length, more, before, combination in zip(segment_tree.starts, segment_tree.lengths, added,
                                                     accumulate(added),
                                                     assignment, strict=True):
        head, span = torch.arange(more), torch.arange(at, at + length)  # [virtual tokens], [tokens of the segment]
        source += [head + starts[combination], span + starts[-1]]
        like += [torch.full_like(head, at), span]
        own += [span + before]
        shift += [head, torch.full_like(span, sizes[combination])]
    return _make_layout(device, torch.cat(source), torch.cat(like), torch.cat(own), torch.cat(shift), longer,
                        tuple(assignment))


def repeat_per_token(values: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """[T] The value of each token's segment."""
    return torch.repeat_interleave(torch.tensor(values), torch.tensor(lengths))


def _make_layout(device: torch.device, source: Tensor, like: Tensor, own: Tensor, shift: Tensor,
                 segment_tree: SegmentTree,
          assignment: tuple[int, ...]) -> VirtualTokenLayout:
    # [1, L'], and [1, L] for `own`: a packed row has B = 1.
    source, like, own, shift = (x[None].to(device, non_blocking=True) for x in (source, like, own, shift))
    return VirtualTokenLayout(source, like, own, shift, segment_tree=segment_tree, assignment=assignment)
