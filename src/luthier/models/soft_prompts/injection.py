"""Doors for virtual tokens, and which of them stand open for whom. Read `core/protocols.py` (Scope,
SoftPromptInjector) first; `models/soft_prompts/causal.py` uses it.

A door is what one attached method puts in. Every segment of a packed row, and every row of a batch, has a share: the
doors that stand open for it. Without a manager's routes all have the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.core.adapter_gate import AdapterGate
from luthier.core.errors import RunError
from luthier.core.soft_prompts import SoftPromptKind
from luthier.core.types import SegmentTree


@dataclass(frozen=True)
class Injection:
    """What one method puts in."""

    kind: SoftPromptKind
    compute: Callable[[], Any]
    gate: AdapterGate
    num_tokens: int


@dataclass(frozen=True)
class InjectionPlan:
    """Who stands behind which doors.

    Args:
        doors: the different shares.
        whose: for each segment or row, which of them it has.
    """

    combinations: tuple[tuple[Injection, ...], ...]
    assignment: tuple[int, ...]

    def count_tokens(self, kind: SoftPromptKind) -> list[int]:
        """Virtual tokens of a kind in each share."""
        return [sum(injection.num_tokens for injection in combination if injection.kind == kind)
                for combination in self.combinations]

    def count_tokens_at(self, i: int) -> int:
        """Virtual tokens of the i-th segment or row."""
        return sum(injection.num_tokens for injection in self.combinations[self.assignment[i]])


def plan_injections(injections: Sequence[Injection], forest: SegmentTree | None, rows: int) -> InjectionPlan | None:
    """The share of every segment of the forest, or of every row; None where nothing acts. Raises `RunError` where a
    segment has other virtual tokens than the one that it continues."""
    acting = [injection for injection in injections if _is_enabled(injection.gate)]
    if not acting:
        return None
    places = range(rows) if forest is None else forest.starts
    found: list[tuple[Injection, ...]] = [()] * len(places)
    for injection in acting:
        for i in _list_targets(injection.gate, places, (0, rows) if forest is None else (1, sum(forest.lengths))):
            found[i] = (*found[i], injection)
    if forest is not None and any(p >= 0 and found[p] != own for p, own in zip(forest.parents, found, strict=True)):
        raise RunError("a segment goes through other virtual tokens than the one that it continues, and these stand "
                       "before whole documents", "send every document as a whole through one adapter")
    number = {combination: i for i, combination in enumerate(dict.fromkeys(found))}
    return InjectionPlan(tuple(number), tuple(number[combination] for combination in found))


def _list_targets(gate: AdapterGate, places: Sequence[int], call: tuple[int, int]) -> Iterable[int]:
    """Which of the places a gate names, in a call of so many (tokens or rows) along a dimension."""
    if gate.token_index is None or (gate.token_index[0], gate.dim_size) != call:
        return range(len(places)) if is_active(gate) else ()
    named = set(gate.positions)
    return (i for i, place in enumerate(places) if place in named)


def is_active(gate: AdapterGate) -> bool:
    """Whether a gate lets virtual tokens act on all of a call. Raises `RunError` where it asks for a part of it."""
    if not _is_enabled(gate):
        return False
    if gate.token_index is not None and len(gate.positions) != gate.dim_size:
        raise RunError("virtual tokens stand before whole texts, and this call is one that cannot be told apart into "
                       "texts with several adapters", "run this adapter's rows by themselves (manager.use_adapter)")
    return True


def _is_enabled(gate: AdapterGate) -> bool:
    if gate.disabled_depth or gate.scale == 0:
        return False
    if gate.scale != 1:
        raise RunError(f"virtual tokens cannot be there by a weight of {gate.scale}: they are there or not",
                       "give them weight 1 or 0")
    return True


def compute_injected(plan: InjectionPlan, kind: SoftPromptKind) -> dict[Injection, Any]:
    """What the doors of a kind put in, each made once."""
    every = dict.fromkeys(injection for combination in plan.combinations for injection in combination)
    return {injection: injection.compute() for injection in every if injection.kind == kind}
