"""Expert layers of a mixture of experts as part of a model's structure. Read `protocols.py` (TargetLinear) and
`adapter_gate.py`
first.

Shape letters: E experts, N rows sorted by expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from luthier.core.adapter_gate import AdapterGate

ExpertChange = Callable[[Tensor, Sequence[int]], Tensor]
"""(rows [N, in] sorted by expert, number of rows of each expert [E]) -> change of their outputs, [N, out]."""


@dataclass(frozen=True)
class ExpertLinears:
    """One linear layer of all experts of a transformer layer, stored as one parameter. It is not a module, so it cannot
    have forward hooks.

    Args:
        name: the parameter's path in the model.
        weight: [E, out, in]; `transposed`: [E, in, out].
        role: gate_up, up, or down.
        num_experts: E.
        add_change: registers a change that is added to the layer's outputs while its scope is active.
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
