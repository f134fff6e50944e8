"""Attention with a cache of keys and values for each sequence. Read `attention/packed.py` first.

Every sequence has a buffer of its own, which is written in place. Each attends to its own buffer without padding and
without a mask, so a step's time follows from the lengths of the sequences, not from the longest one.

A buffer begins with the keys and values of virtual tokens, if the sequence's adapter has any:

    [prefix | virtual prompt | prompt | output | free]

Shape letters: S layers, H heads, G key-value heads of width d, C capacity, M tokens in the buffer, Q new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.core.types import SegmentTree
from luthier.models.attention.packed import VirtualKeyValues, attend, causal_mask, prepend

BLOCK = 64  # tokens by which buffers grow


class AttentionCache(Protocol):
    """Takes the place of packed attention in one forward pass; called by each attention layer in turn."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, segment_tree: SegmentTree,
               before: VirtualKeyValues | None, scale: float, window: int | None, softcap: float | None) -> Tensor:
        """[1, H, T, d] from query [1, H, T, d], key and value [1, G, T, d]."""
        ...


class KeyValueBuffer:
    """The keys and values of one sequence in all layers: [S, 1, G, C, d] each, of which M tokens are in use.

    Args:
        fixed: the number of prefix tokens at the front, which sliding windows never exclude.
    """

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], fixed: int, capacity: int) -> None:
        self.length, self.fixed = keys[0].shape[2], fixed
        self.keys, self.values = (self._allocate(parts, max(capacity, self.length)) for parts in (keys, values))

    def _allocate(self, parts: Sequence[Tensor], capacity: int) -> Tensor:
        """One tensor for all layers, with the layers' tokens [1, G, M, d] at its front."""
        first = parts[0]
        whole = first.new_empty(len(parts), 1, first.shape[1], _round_up(capacity), first.shape[3])
        torch._foreach_copy_(list(whole[:, :, :, :self.length].unbind(0)), list(parts))
        return whole

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    @property
    def bytes_per_token(self) -> int:
        return self.nbytes // self.keys.shape[3]

    def clone(self, length: int | None = None) -> KeyValueBuffer:
        """A copy of the first `length` tokens, or of all."""
        length = self.length if length is None else length
        keys, values = (x[:, :, :, :length].unbind(0) for x in (self.keys, self.values))
        return KeyValueBuffer(keys, values, self.fixed, length)

    def reserve(self, new: int) -> None:
        """Make room for `new` more tokens; the capacity grows by half, so that copies are rare."""
        if self.length + new <= self.keys.shape[3]:
            return
        capacity = max(self.length + new, self.keys.shape[3] * 3 // 2)
        self.keys, self.values = (self._allocate(x[:, :, :, :self.length].unbind(0), capacity)
                                  for x in (self.keys, self.values))


def _round_up(tokens: int) -> int:
    return -(-tokens // BLOCK) * BLOCK


class RecordingCache:
    """Packed attention that keeps the keys and values of the last `sequences` segments of the row: those before them
    are virtual tokens. Each segment is one sequence, which begins here."""

    def __init__(self, sequences: int) -> None:
        self.sequences = sequences
        self.keys: list[list[Tensor]] = [[] for _ in range(sequences)]  # of each sequence, one [1, G, M, d] per layer
        self.values: list[list[Tensor]] = [[] for _ in range(sequences)]
        self.fixed = [0] * sequences

    def attend(self, query: Tensor, key: Tensor, value: Tensor, segment_tree: SegmentTree,
               before: VirtualKeyValues | None, scale: float, window: int | None, softcap: float | None) -> Tensor:
        queries, keys, values = (x.split(segment_tree.lengths, dim=2) for x in (query, key, value))
        virtual, outs = len(queries) - self.sequences, []
        for i, q in enumerate(queries):
            path = segment_tree.find_path(i)
            k, v = (torch.cat([part[a] for a in path], 2) if len(path) > 1 else part[i] for part in (keys, values))
            mask = causal_mask(q.shape[2], k.shape[2], window, q.device)
            own = None if before is None else before.get(i)
            if own is not None:
                k, v, mask = prepend(own, k, v, mask, q.shape[2])
            if i >= virtual:
                self.keys[i - virtual].append(k)
                self.values[i - virtual].append(v)
                self.fixed[i - virtual] = 0 if own is None else own[0].shape[2]
            outs.append(attend(q, k, v, mask, mask is None, scale, 0.0, softcap))
        return outs[0] if len(outs) == 1 else torch.cat(outs, 2)


class ExtendingCache:
    """Attention of new tokens of sequences to their buffers, to which their keys and values are added."""

    def __init__(self, buffers: Sequence[KeyValueBuffer], new: Sequence[int]) -> None:
        self.buffers, self.layer = buffers, 0
        # Views of all layers at once: slicing in every layer would take longer than attention itself.
        self.targets, self.seen = [], []
        for buffer, count in zip(buffers, new, strict=True):
            buffer.reserve(count)
            start, buffer.length = buffer.length, buffer.length + count
            pair = (buffer.keys, buffer.values)
            self.targets.append([x[:, :, :, start:buffer.length].unbind(0) for x in pair])
            self.seen.append([x[:, :, :, :buffer.length].unbind(0) for x in pair])

    def attend(self, query: Tensor, key: Tensor, value: Tensor, segment_tree: SegmentTree,
               before: VirtualKeyValues | None, scale: float, window: int | None, softcap: float | None) -> Tensor:
        layer, self.layer = self.layer, self.layer + 1
        for part, new in enumerate((key, value)):
            torch._foreach_copy_([target[part][layer] for target in self.targets],
                                 list(new.split(segment_tree.lengths, dim=2)))
        outs = []
        for buffer, (keys, values), q in zip(self.buffers, self.seen, query.split(segment_tree.lengths, dim=2),
                                             strict=True):
            k, v, mask = keys[layer], values[layer], None
            if q.shape[2] > 1 or window is not None:
                k, v, mask = _limit(k, v, q.shape[2], buffer.fixed, window)
            outs.append(attend(q, k, v, mask, False, scale, 0.0, softcap))
        return outs[0] if len(outs) == 1 else torch.cat(outs, 2)


def _limit(key: Tensor, value: Tensor, queries: int, fixed: int,
           window: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The keys and values that the last `queries` tokens may attend to, and their mask; see `causal_mask`."""
    length = key.shape[2] - fixed
    if queries == 1:
        if window is None or length <= window:
            return key, value, None
        key, value = (x[:, :, -window:] if not fixed else torch.cat([x[:, :, :fixed], x[:, :, -window:]], 2)
                      for x in (key, value))
        return key, value, None
    mask = causal_mask(queries, length, window, key.device)
    assert mask is not None, "a buffer holds at least one token before it is extended"
    return key, value, F.pad(mask, (fixed, 0), value=True)


def check_same_shapes(keys: Sequence[Tensor]) -> bool:
    """Whether all layers have keys of the same shape, as one buffer for all layers needs."""
    return len({key.shape for key in keys}) == 1
