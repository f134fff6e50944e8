"""The linear layers of all experts of a mixture layer. Read `protocols.py` (TargetLinear) and `adapter_gate.py`
first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from luthier.core.adapter_gate import AdapterGate

ExpertChange = Callable[[Tensor, Sequence[int]], Tensor]
"""(rows [N, in] sorted by expert, number of rows of each expert [E]) -> change of their outputs [N, out]."""


@dataclass(frozen=True)
class ExpertLinears:
    """One linear layer of all experts of a layer, stored as one parameter. It has no module of its own to hook.

    Args:
        name: the parameter's path in the model.
        weight: [E, out, in]; `transposed`: [E, in, out].
        role: gate_up, up, or down.
        count: E.
        enter: registers a function whose result is added to the linear layer's outputs, as its gate allows.
    """

    name: str
    weight: nn.Parameter
    role: str
    layer_index: int
    num_experts: int
    in_features: int
    out_features: int
    transposed: bool
    add_change: Callable[[AdapterGate, ExpertChange], None]
