"""Experts of a mixture as one part of the anatomy. Read `protocols.py` (Site) and `adapter_gate.py` first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from luthier.core.adapter_gate import AdapterGate

ExpertChange = Callable[[Tensor, Sequence[int]], Tensor]
"""(rows [N, in] sorted by expert, how many each expert has [E]) -> what is added to their outputs, [N, out]."""


@dataclass(frozen=True)
class Experts:
    """One linear map of all experts of a block, kept as one parameter: no module of its own, so nothing to hook.

    Args:
        name: the parameter's path in the model.
        weight: [E, out, in]; `transposed`: [E, in, out].
        role: gate_up, up, or down.
        count: E.
        enter: has a change added to the map's outputs from now on, as its gate says.
    """

    name: str
    weight: nn.Parameter
    role: str
    block: int
    count: int
    inputs: int
    outputs: int
    transposed: bool
    enter: Callable[[AdapterGate, ExpertChange], None]
