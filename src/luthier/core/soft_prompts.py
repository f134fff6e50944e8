"""Where virtual tokens enter a model: what a method that trains them is promised. Read `protocols.py` (Anatomy) first.

Families implement it, each for its own kind of input; `Anatomy.ports` holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

from torch import Tensor

from luthier.core.adapter_gate import AdapterGate

Kind = Literal["prompt", "prefix"]


class Ports(Protocol):
    """Where virtual tokens enter a model. What is put in is computed anew at every call, so that it can train; every
    caller of the model gets its own tokens' states back and nothing else. A method's `Scope` switches it."""

    @property
    def usual(self) -> Callable[[int, int], Tensor] | None:
        """Where the base has no words, `usual(n, seed) -> [n, D]`: vectors of the kind that its first layer gets, for
        virtual tokens to start from. None: they start from words."""
        ...

    @property
    def peft(self) -> frozenset[Kind]:
        """Those of the two kinds that PEFT puts into this base to the same effect, so that its form can hold them."""
        ...

    def prompt(self, make: Callable[[], Tensor], gate: AdapterGate) -> None:
        """`make() -> [N, D]`: N virtual tokens before every document that the gate names, computed once a row."""
        ...

    def prefix(self, make: Callable[[], Sequence[tuple[Tensor, Tensor]]], gate: AdapterGate) -> None:
        """`make() -> one (keys, values) for each attention of the model, each [G, N, d]`: seen by every token of the
        documents that the gate names, as if it stood in the N places before the text. Positions move on by N."""
        ...

    def keys_values(self, start: Sequence[int] | Tensor) -> list[tuple[Tensor, Tensor]]:
        """The bare base's own keys and values of some tokens (ids of words, or [N, D] of the `usual`), [G, N, d] both,
        for each attention: a start for `prefix`."""
        ...

    def first_keys(self, ids: Sequence[int], place: int) -> Tensor:
        """[n, G d] the first block's key of each of n tokens, as if each stood at `place` of a text of its own."""
        ...
