"""Mixtures of experts that store each linear layer of all experts in one parameter. Read `core/expert_layers.py` first.

A hook cannot act between the two linear layers of an expert. Transformers has a registry for the function that computes
the experts; ours is registered for a module when the first change is added to it. While no change is active, it calls
the previous function, so the outputs are exactly those of the base.

Shape letters: T tokens, K experts per token, N = T K rows sorted by expert, E experts, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from luthier.core.adapter_gate import AdapterGate
from luthier.core.errors import RunError
from luthier.core.expert_layers import ExpertChange, ExpertLinears
from luthier.models.hf_attributes import get_optional

NAME = "luthier"
ROLES = {"gate_up_proj": "gate_up", "up_proj": "up", "down_proj": "down"}


class _ExpertChanges:
    """The changes of one module of experts, and the function that computed it before."""

    def __init__(self, module: Any) -> None:
        before = module.config._experts_implementation
        self.real: Callable[..., Tensor] = (ALL_EXPERTS_FUNCTIONS[before] if before in ALL_EXPERTS_FUNCTIONS
                                            else type(module).forward.__wrapped__)
        self.changes: list[tuple[str, AdapterGate, ExpertChange]] = []
        module.config = copy(module.config)  # a copy: modules without changes keep their function
        module.config._experts_implementation = NAME


def find_experts(name: str, layer: nn.Module, block: int) -> list[ExpertLinears]:
    """The expert layers of every module of experts in a transformer layer."""
    found = []
    for path, module in layer.named_modules():
        for parameter, weight in module.named_parameters(recurse=False):
            if parameter not in ROLES or weight.dim() != 3 or get_optional(module, "is_transposed") is None:
                continue
            count, outputs, inputs = weight.shape  # [E, out, in]; the other way round if transposed
            if module.is_transposed:
                inputs, outputs = outputs, inputs
            found.append(ExpertLinears(f"{name}.{path}.{parameter}", weight, ROLES[parameter], block, count, inputs,
                                       outputs,
                                 bool(module.is_transposed), _make_add_change(module, parameter)))
    return found


def _make_add_change(module: nn.Module, parameter: str) -> Callable[[AdapterGate, ExpertChange], None]:
    def enter(gate: AdapterGate, change: ExpertChange) -> None:
        if not isinstance(get_optional(module, "luthier"), _ExpertChanges):
            module.luthier = _ExpertChanges(module)  # type: ignore[assignment]
        module.luthier.changes.append((parameter, gate, change))  # type: ignore[union-attr, operator]
    return enter


def run_experts(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The function that Transformers' modules of experts call: [T, D] -> [T, D].

    Args:
        index: [T, K] the experts of each token.
        weights: [T, K] their weights.
    """
    acting = [found for found in module.luthier.changes if not found[1].disabled_depth]
    if not acting:
        real: Tensor = module.luthier.real(module, hidden, index, weights)
        return real
    if module._is_expert_parallel:
        raise RunError("expert parallelism is not supported by adapters on experts", "train on one device")
    order = index.flatten().argsort(stable=True)  # [N] choices sorted by expert
    # rows of each of the E experts
    counts = torch.bincount(index.flatten(), minlength=module.num_experts).tolist()
    rows = hidden[order // index.shape[1]]  # [N, D]
    first = "gate_up_proj" if module.has_gate else "up_proj"
    inner = _apply_linear(module, first, rows, counts, acting)  # [N, inner], or [N, 2 inner] with a gate
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)  # [N, inner]
    out = _apply_linear(module, "down_proj", inner, counts, acting)  # [N, D]
    if module.has_post_expert_norm:
        out = module.post_expert_norm(out)
    out = out * weights.flatten()[order, None]  # [N, D]
    # [N] the inverse of `order`
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return out[back].view(*index.shape, -1).sum(1).to(hidden.dtype)  # [T, K, D] -> [T, D]


def _apply_linear(module: Any, name: str, rows: Tensor, counts: Sequence[int],
         acting: Sequence[tuple[str, AdapterGate, ExpertChange]]) -> Tensor:
    """[N, in] -> [N, out], rows sorted by expert, with the active changes."""
    weight = getattr(module, name)
    bias = getattr(module, f"{name}_bias") if module.has_bias else None
    matrices = weight.transpose(1, 2) if module.is_transposed else weight  # [E, out, in]
    found = torch.cat([F.linear(part, matrices[e], None if bias is None else bias[e])
                       for e, part in enumerate(rows.split(list(counts))) if len(part)])  # [N, out]
    for parameter, gate, change in acting:
        if parameter == name:
            if gate.token_index is not None:
                raise RunError("an adapter on experts cannot be active for some tokens of a row only",
                               "run each adapter's rows separately, or omit the experts from its target_modules")
            found = found + gate.scale * change(rows, counts).to(found.dtype)
    return found


ALL_EXPERTS_FUNCTIONS.register(NAME, run_experts)
