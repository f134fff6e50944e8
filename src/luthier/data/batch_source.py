"""Selects the examples of each step: epochs, source weights, and an exact cursor. Read `packing.py` first.

`InMemoryBatchSource` keeps its examples in memory. `StreamingBatchSource`, in `streaming.py`, reads them again in
every epoch.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Self

import numpy as np
from torch import Tensor

from luthier.core.errors import DataError
from luthier.core.types import Batch, TokenizedExample
from luthier.data.packing import pack_examples
from luthier.data.transforms import apply_random

Mix = Sequence[tuple[int, float]]


def digest_example(example: TokenizedExample) -> bytes:
    """A digest (16 bytes) of what the example trains. Its origin and precomputed model outputs are not included."""
    found = hashlib.blake2b(digest_size=16)
    for span in example.spans:
        found.update(array("q", (span.parent, len(span.ids))).tobytes())  # the length delimits what follows
        found.update(array("q", span.ids).tobytes())
        found.update(array("d", span.weights).tobytes())
        found.update(array("q", span.tags).tobytes())
        if span.mix:
            found.update(array("q", span.mix.ids).tobytes() + array("d", [span.mix.share]).tobytes())
    if example.labeled_spans or example.metadata:
        found.update(repr((example.labeled_spans, example.metadata)).encode())
    if example.masking is not None:
        found.update(example.masking.digest)
    for image in example.images:
        found.update(image.numpy().tobytes() if isinstance(image, Tensor) else image.digest)
    return found.digest()


def build_changed_data_error(wanted: Any, found: Any) -> DataError:
    """The error for a cursor that belongs to other data."""
    return DataError(f"the data differs from the data that this run was trained on (fingerprint {found}, expected "
                     f"{wanted})",
                     "resume with the same files, weights, shuffle, seed, tokenizer and max_length, or start a new run")


class InMemoryBatchSource:
    """An endless sequence of steps over examples in memory; a `core.protocols.BatchSource`.

    Args:
        batch_size: examples of one optimizer step; the last step of an epoch has the remaining ones.
        max_tokens: maximum number of tokens of one micro-batch; None: no limit.
        mix: for consecutive parts of `encoded`, the number of examples and how often each is seen in an epoch. 2 is
        twice; 0.5
            is half of them, a different half in each epoch. Empty: every example once.
    """

    def __init__(self, encoded: Sequence[TokenizedExample], batch_size: int, max_tokens: int | None,
                 shuffle: bool = True,
                 seed: int = 0, mix: Mix = ()) -> None:
        self.encoded, self.batch_size, self.max_tokens = encoded, batch_size, max_tokens
        self.shuffle, self.seed, self.mix = shuffle, seed, tuple(mix) or ((len(encoded), 1.0),)
        assert encoded, "there is at least one example"
        assert sum(count for count, _ in self.mix) == len(encoded), "mix covers every example"
        self.epoch, self.row = 0, 0
        self.steps_per_epoch = math.ceil(self._rows / batch_size)

    @property
    def _rows(self) -> int:
        """The number of examples seen in an epoch."""
        return sum(_count_repeats(count, weight) for count, weight in self.mix)

    @cached_property
    def fingerprint(self) -> str:
        """A digest of everything that determines the order of examples."""
        found = hashlib.blake2b(repr((self.mix, self.shuffle, self.seed)).encode(), digest_size=12)
        for example in self.encoded:
            found.update(digest_example(example))
        return found.hexdigest()

    def order(self, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Indices of the examples in the order of this epoch, from the seed and the epoch alone."""
        rng = np.random.default_rng([self.seed, epoch])
        parts, start = [], 0
        for count, weight in self.mix:
            own = np.arange(start, start + count)  # [count]
            whole = int(weight)
            extra = _count_repeats(count, weight) - whole * count
            # A fraction of the source is drawn anew in every epoch; sorted, since it may not be shuffled.
            parts += [own] * whole + ([np.sort(rng.permutation(own)[:extra])] if extra else [])
            start += count
        found = np.concatenate(parts)  # [rows of an epoch]
        return rng.permutation(found) if self.shuffle else found

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> list[Batch]:
        if self.row >= self._rows:
            self.epoch, self.row = self.epoch + 1, 0
        chosen = self._order[self.row:self.row + self.batch_size]
        self.row += len(chosen)
        return pack_examples([apply_random(self.encoded[i], self.seed, self.epoch, int(i)) for i in chosen],
                             self.max_tokens)

    @property
    def _order(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        if self._kept[0] != self.epoch:  # one permutation per epoch, not per step
            self._kept = (self.epoch, self.order(self.epoch))
        return self._kept[1]

    _kept: tuple[int, np.ndarray[Any, np.dtype[np.int64]]] = (-1, np.empty(0, np.int64))

    def state(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "row": self.row, "data": self.fingerprint}

    def load(self, state: Mapping[str, Any]) -> None:
        if state["data"] != self.fingerprint:
            raise build_changed_data_error(state["data"], self.fingerprint)
        self.epoch, self.row = state["epoch"], state["row"]


def _count_repeats(count: int, weight: float) -> int:
    """How many rows of a source of `count` an epoch sees; at least one."""
    return max(1, round(count * weight)) if count else 0
