"""The switch of an adapter: whether it acts, how strongly, and on which tokens. Read this before `protocols.py`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor


class AdapterGate:
    """The state that an adapter's hooks read and an `AdapterManager` sets.

    Attributes:
        disabled_depth: how many `disabled()` contexts are open; the adapter acts at 0.
        scale: factor on the adapter's change, for weighted sums of adapters.
        token_index: (dimension, indices) of the tokens or rows that the adapter acts on; None for all of them.
        dim_size: size of that dimension; lets a hook verify that it sees every token in order.
        positions: the same indices as integers, to build a layout without reading a tensor from the device.
    """

    def __init__(self) -> None:
        self.disabled_depth, self.scale, self.dim_size = 0, 1.0, 0
        self.token_index: tuple[int, Tensor] | None = None
        self.positions: tuple[int, ...] = ()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Disable the adapter while the context is open. Contexts nest."""
        self.disabled_depth += 1
        try:
            yield
        finally:
            self.disabled_depth -= 1
