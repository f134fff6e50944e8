"""Injections of virtual tokens, and which of them apply to which segment or row. Read `core/adapter_gate.py` and
`core/soft_prompts.py` first; `soft_prompts/causal.py` uses it.

An injection is the virtual tokens of one attached method. Every segment of a packed row, and every row of a batch, has
a combination of active injections. Without routing all have the same combination.
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
    """The virtual tokens of one method.

    Args:
        compute: returns them, with a graph.
        scope: switches the method on and off.
        num_tokens: N.
    """

    kind: SoftPromptKind
    compute: Callable[[], Any]
    gate: AdapterGate
    num_tokens: int


@dataclass(frozen=True)
class InjectionPlan:
    """Which injections apply to which segment or row.

    Args:
        combinations: the distinct combinations of injections.
        assignment: for each segment or row, the index of its combination.
    """

    combinations: tuple[tuple[Injection, ...], ...]
    assignment: tuple[int, ...]  # [S] or [B]

    def count_tokens(self, kind: SoftPromptKind) -> list[int]:
        """The number of virtual tokens of a kind in each combination."""
        return [sum(injection.num_tokens for injection in combination if injection.kind == kind)
                for combination in self.combinations]

    def count_tokens_at(self, i: int) -> int:
        """The number of virtual tokens of the i-th segment or row."""
        return sum(injection.num_tokens for injection in self.combinations[self.assignment[i]])


def plan_injections(injections: Sequence[Injection], segment_tree: SegmentTree | None,
                    rows: int) -> InjectionPlan | None:
    """The combinations of all segments of the tree, or of all rows; None if no injection is active. Raises
    `RunError` if a segment has different virtual tokens than its parent."""
    acting = [injection for injection in injections if _is_enabled(injection.gate)]
    if not acting:
        return None
    places = range(rows) if segment_tree is None else segment_tree.starts
    found: list[tuple[Injection, ...]] = [()] * len(places)
    for injection in acting:
        for i in _list_targets(injection.gate, places, (0, rows) if segment_tree is None
                               else (1, sum(segment_tree.lengths))):
            found[i] = (*found[i], injection)  # in the order in which the methods were attached
    if segment_tree is not None and any(p >= 0 and found[p] != own for p,
                                        own in zip(segment_tree.parents, found, strict=True)):
        raise RunError("a segment has different virtual tokens than its parent, but virtual tokens apply to whole "
                       "documents", "use one adapter for each document")
    # In the order of their first use.
    number = {combination: i for i, combination in enumerate(dict.fromkeys(found))}
    return InjectionPlan(tuple(number), tuple(number[combination] for combination in found))


def _list_targets(gate: AdapterGate, places: Sequence[int], call: tuple[int, int]) -> Iterable[int]:
    """The indices of `places` that a gate selects, in a call of `call` = (dimension, size)."""
    if gate.token_index is None or (gate.token_index[0], gate.dim_size) != call:
        return range(len(places)) if is_active(gate) else ()
    named = set(gate.positions)
    return (i for i, place in enumerate(places) if place in named)


def is_active(gate: AdapterGate) -> bool:
    """Whether a gate activates virtual tokens for all of a call. Raises `RunError` if it selects a part of it."""
    if not _is_enabled(gate):
        return False
    if gate.token_index is not None and len(gate.positions) != gate.dim_size:
        raise RunError("virtual tokens apply to whole texts, and the texts of this call cannot have different adapters",
                       "run the rows of this adapter separately")
    return True


def _is_enabled(gate: AdapterGate) -> bool:
    if gate.disabled_depth or gate.scale == 0:
        return False
    if gate.scale != 1:
        raise RunError(f"virtual tokens do not support an adapter weight of {gate.scale}", "use weight 1 or 0")
    return True


def compute_injected(plan: InjectionPlan, kind: SoftPromptKind) -> dict[Injection, Any]:
    """The virtual tokens of all injections of a kind, each computed once."""
    every = dict.fromkeys(injection for combination in plan.combinations for injection in combination)
    return {injection: injection.compute() for injection in every if injection.kind == kind}
