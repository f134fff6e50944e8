"""Computes next-token logits of many sequences that come and go. Read `attention/cached.py` first.

A forward pass is a packed row. New sequences begin together as roots of a segment tree, so that virtual tokens are
inserted as in training; afterwards each sequence attends to its own buffer. Every token is routed through its
sequence's adapter.

The prefix cache keeps the buffers of sequences that have ended. A new sequence of the same adapter that begins with the
same tokens continues from a copy.

Shape letters: B sequences, T tokens of the row, D hidden size, V vocabulary.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from luthier.core.types import Inputs, SegmentTree
from luthier.models.attention.cached import (
    BLOCK,
    AttentionCache,
    ExtendingCache,
    KeyValueBuffer,
    RecordingCache,
    check_same_shapes,
)

RunRow = Callable[[Inputs, AttentionCache, bool], Tensor]  # row, cache, whether virtual tokens are inserted -> [T, D]


@dataclass(eq=False)
class DecodedSequence:
    """A sequence that is being decoded.

    Args:
        tokens: prompt and output so far.
        adapter: index of its adapter; None: no routing.
        buffer: of the first `read` tokens and the virtual ones.
        shift: by how much virtual tokens shift its positions.
    """

    tokens: list[int]
    adapter: int | None
    buffer: KeyValueBuffer | None = None
    read: int = 0
    shift: int = 0
    cached_tokens: int = 0
    key: tuple[int | None, int] = field(default=(None, 0))


class SequenceDecoder:
    """Keeps the buffers of sequences and extends them.

    Args:
        run_row: computes the states of a packed row.
        compute_logits: [B, D] -> [B, V].
        count_virtual_tokens: adapters of sequences -> by how much each one's positions are shifted.
        device: of the model.
        prefix_cache_bytes: how much of finished sequences is kept.
    """

    can_join = True

    def __init__(self, run_row: RunRow, compute_logits: Callable[[Tensor], Tensor],
                 count_virtual_tokens: Callable[[Sequence[int | None]], list[int]], device: torch.device,
                 prefix_cache_bytes: int = 0) -> None:
        self._run_row, self._compute_logits, self._count_virtual = run_row, compute_logits, count_virtual_tokens
        self._device = device
        self.prefix_cache = PrefixCache(prefix_cache_bytes)

    def begin(self, sequences: Sequence[DecodedSequence], chunk: int) -> Tensor:
        """Read the first `chunk` tokens of new sequences; [B, V] the logits behind them.

        Sequences with the same adapter and tokens are computed once.
        """
        for sequence, shift in zip(sequences, self._count_virtual([s.adapter for s in sequences]), strict=True):
            sequence.shift = shift
        first: dict[tuple[int | None, tuple[int, ...]], int] = {}
        owner = [first.setdefault((s.adapter, tuple(s.tokens[:chunk])), len(first)) for s in sequences]
        leaders = list(first)
        lengths = [len(tokens) for _, tokens in leaders]
        cache = RecordingCache(len(leaders))
        states = self._run_row(self._build_row([tokens for _, tokens in leaders], [0] * len(leaders),
                                               [adapter for adapter, _ in leaders]), cache, True)
        ends = torch.tensor(list(accumulate(lengths)), device=states.device) - 1
        logits = self._compute_logits(states[ends])  # [leaders, V]
        assert check_same_shapes(cache.keys[0]), "checked when the decoder was made"
        taken: set[int] = set()
        for sequence, place in zip(sequences, owner, strict=True):
            room = len(sequence.tokens) + BLOCK
            if place in taken:
                leader = sequences[owner.index(place)].buffer
                assert leader is not None
                sequence.buffer = leader.clone()
            else:
                taken.add(place)
                sequence.buffer = KeyValueBuffer(cache.keys[place], cache.values[place], cache.fixed[place], room)
            sequence.read = lengths[place]
        return logits[torch.tensor(owner, device=logits.device)]

    def extend(self, sequences: Sequence[DecodedSequence], chunk: int) -> Tensor:
        """Read up to `chunk` more tokens of each sequence; [B, V] the logits behind them."""
        new = [sequence.tokens[sequence.read:sequence.read + chunk] for sequence in sequences]
        row = self._build_row(new, [s.read + s.shift for s in sequences], [s.adapter for s in sequences])
        buffers = [sequence.buffer for sequence in sequences if sequence.buffer is not None]
        assert len(buffers) == len(sequences)
        states = self._run_row(row, ExtendingCache(buffers, list(map(len, new))), False)
        for sequence, tokens in zip(sequences, new, strict=True):
            sequence.read += len(tokens)
        ends = torch.tensor(list(accumulate(map(len, new))), device=states.device) - 1
        return self._compute_logits(states[ends])

    def _build_row(self, parts: Sequence[Sequence[int]], starts: Sequence[int],
                   adapters: Sequence[int | None]) -> Inputs:
        tokens = [token for part in parts for token in part]
        positions = [start + i for part, start in zip(parts, starts, strict=True) for i in range(len(part))]
        routed = tuple(-1 if a is None else a for a in adapters) if any(a is not None for a in adapters) else ()
        tree = SegmentTree(tuple(map(len, parts)), (-1,) * len(parts), routed)
        return Inputs(torch.tensor(tokens, device=self._device), torch.tensor(positions, device=self._device), tree)

    # ------------------------------------------------------------ the prefix cache

    def take_prefix(self, sequence: DecodedSequence) -> bool:
        """Let a new sequence continue from the buffer of an earlier one, if the prefix cache has one."""
        found = self.prefix_cache.find(sequence.key, sequence.tokens[:-1])
        if found is None:
            return False
        buffer, sequence.read, sequence.shift = found
        sequence.buffer, sequence.cached_tokens = buffer, sequence.read
        return True

    def release(self, sequence: DecodedSequence, keep: bool) -> None:
        """Free the buffer of a sequence that has ended; `keep`: offer it to the prefix cache."""
        if keep and sequence.buffer is not None:
            self.prefix_cache.add(sequence.key, sequence.tokens[:sequence.read], sequence.buffer, sequence.shift)
        sequence.buffer = None


@dataclass(eq=False)
class _Entry:
    buffer: KeyValueBuffer
    shift: int
    key: tuple[int | None, int]
    names: list[bytes]


class PrefixCache:
    """Buffers of ended sequences by their adapter and first tokens, in blocks, the least recently used dropped first.

    Keys and values of different adapters differ in every layer, so adapters never share entries.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.nbytes = max_bytes, 0
        self.queried_tokens = self.hit_tokens = 0
        self._entries: OrderedDict[int, _Entry] = OrderedDict()  # by number, the most recently used last
        self._index: dict[bytes, int] = {}  # digest of adapter, version and the tokens of k blocks -> number
        self._next = 0

    def add(self, key: tuple[int | None, int], tokens: Sequence[int], buffer: KeyValueBuffer, shift: int) -> None:
        names = _digest_blocks(key, tokens) if self.max_bytes else []
        if not names or names[-1] in self._index:
            return
        virtual = buffer.length - len(tokens)
        kept = buffer.clone(virtual + len(names) * BLOCK)
        if kept.nbytes > self.max_bytes:
            return
        for name in names:
            self._index[name] = self._next
        self._entries[self._next] = _Entry(kept, shift, key, names)
        self._next += 1
        self.nbytes += kept.nbytes
        while self.nbytes > self.max_bytes:
            self._drop(next(iter(self._entries)))

    def find(self, key: tuple[int | None, int], tokens: Sequence[int]) -> tuple[KeyValueBuffer, int, int] | None:
        """A copy of the longest known beginning of `tokens`: buffer, number of tokens, shift of positions."""
        if not self.max_bytes:
            return None
        self.queried_tokens += len(tokens)
        names = _digest_blocks(key, tokens)
        for blocks in range(len(names), 0, -1):
            number = self._index.get(names[blocks - 1])
            if number is None:
                continue
            entry, length = self._entries[number], blocks * BLOCK
            self._entries.move_to_end(number)
            self.hit_tokens += length
            virtual = entry.buffer.length - len(entry.names) * BLOCK
            return entry.buffer.clone(virtual + length), length, entry.shift
        return None

    def drop_adapter(self, key: tuple[int | None, int]) -> None:
        """Forget what an adapter has computed."""
        for number in [n for n, entry in self._entries.items() if entry.key == key]:
            self._drop(number)

    def _drop(self, number: int) -> None:
        entry = self._entries.pop(number)
        self.nbytes -= entry.buffer.nbytes
        for name in entry.names:
            if self._index.get(name) == number:
                del self._index[name]


def _digest_blocks(key: tuple[int | None, int], tokens: Sequence[int]) -> list[bytes]:
    """A digest of the adapter and the first k blocks of tokens, for every k."""
    digest, found = hashlib.blake2b(repr(key).encode(), digest_size=16), []
    for end in range(BLOCK, len(tokens) + 1, BLOCK):
        digest.update(array("q", tokens[end - BLOCK:end]).tobytes())
        found.append(digest.digest())
    return found
