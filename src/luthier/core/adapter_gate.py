"""The one switch of an attached method. Read this before `protocols.py`: it stands alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor


class AdapterGate:
    """Whether, where and how strongly an attached method acts: the one switch that methods read and banks turn.

    Args of the object, all plain attributes:
        off: how many times it was switched off; it acts at 0.
        weight: factor on the change, for weighted stacks of several methods.
        part: (dimension, index) of the tokens that it acts on, for batches that mix several adapters; None for all.
        among: how many there are along that dimension, for a method to be sure that it sees all of them in their order.
        where: that index as numbers, to lay out rows without a look into a tensor.
    """

    def __init__(self) -> None:
        self.disabled_depth, self.scale, self.dim_size = 0, 1.0, 0
        self.token_index: tuple[int, Tensor] | None = None
        self.positions: tuple[int, ...] = ()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """While open, the method does not act. Nests."""
        self.disabled_depth += 1
        try:
            yield
        finally:
            self.disabled_depth -= 1
