"""Doors for virtual tokens, and which of them stand open for whom. Read `core/protocols.py` (Scope, Ports) first;
`models/soft_prompts/causal.py` uses it.

A door is what one attached method puts in. Every segment of a packed row, and every row of a batch, has a share: the
doors that stand open for it. Without a manager's routes all have the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.core.errors import RunError
from luthier.core.protocols import AdapterGate
from luthier.core.soft_prompts import Kind
from luthier.core.types import Forest


@dataclass(frozen=True)
class Door:
    """What one method puts in."""

    kind: Kind
    make: Callable[[], Any]
    gate: AdapterGate
    n: int


@dataclass(frozen=True)
class Shares:
    """Who stands behind which doors.

    Args:
        doors: the different shares.
        whose: for each segment or row, which of them it has.
    """

    doors: tuple[tuple[Door, ...], ...]
    whose: tuple[int, ...]

    def sizes(self, kind: Kind) -> list[int]:
        """Virtual tokens of a kind in each share."""
        return [sum(door.n for door in share if door.kind == kind) for share in self.doors]

    def size(self, i: int) -> int:
        """Virtual tokens of the i-th segment or row."""
        return sum(door.n for door in self.doors[self.whose[i]])


def shares_of(doors: Sequence[Door], forest: Forest | None, rows: int) -> Shares | None:
    """The share of every segment of the forest, or of every row; None where nothing acts. Raises `RunError` where a
    segment has other virtual tokens than the one that it continues."""
    acting = [door for door in doors if _switched_on(door.gate)]
    if not acting:
        return None
    places = range(rows) if forest is None else forest.starts
    found: list[tuple[Door, ...]] = [()] * len(places)
    for door in acting:
        for i in _named(door.gate, places, (0, rows) if forest is None else (1, sum(forest.lengths))):
            found[i] = (*found[i], door)
    if forest is not None and any(p >= 0 and found[p] != own for p, own in zip(forest.parents, found, strict=True)):
        raise RunError("a segment goes through other virtual tokens than the one that it continues, and these stand "
                       "before whole documents", "send every document as a whole through one adapter")
    number = {share: i for i, share in enumerate(dict.fromkeys(found))}
    return Shares(tuple(number), tuple(number[share] for share in found))


def _named(gate: AdapterGate, places: Sequence[int], call: tuple[int, int]) -> Iterable[int]:
    """Which of the places a gate names, in a call of so many (tokens or rows) along a dimension."""
    if gate.token_index is None or (gate.token_index[0], gate.dim_size) != call:
        return range(len(places)) if acts(gate) else ()
    named = set(gate.positions)
    return (i for i, place in enumerate(places) if place in named)


def acts(gate: AdapterGate) -> bool:
    """Whether a gate lets virtual tokens act on all of a call. Raises `RunError` where it asks for a part of it."""
    if not _switched_on(gate):
        return False
    if gate.token_index is not None and len(gate.positions) != gate.dim_size:
        raise RunError("virtual tokens stand before whole texts, and this call is one that cannot be told apart into "
                       "texts with several adapters", "run this adapter's rows by themselves (manager.use_adapter)")
    return True


def _switched_on(gate: AdapterGate) -> bool:
    if gate.disabled_depth or gate.scale == 0:
        return False
    if gate.scale != 1:
        raise RunError(f"virtual tokens cannot be there by a weight of {gate.scale}: they are there or not",
                       "give them weight 1 or 0")
    return True


def made_by(shares: Shares, kind: Kind) -> dict[Door, Any]:
    """What the doors of a kind put in, each made once."""
    every = dict.fromkeys(door for share in shares.doors for door in share)
    return {door: door.make() for door in every if door.kind == kind}
