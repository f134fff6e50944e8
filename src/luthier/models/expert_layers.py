"""Mixtures whose experts are one parameter for each map: where the maps are, and how a change enters. Read
`core/expert_layers.py` first.

A hook cannot reach between the two maps of an expert. Transformers publishes a registry for the function that runs
the experts; ours is put there for a module at the first change to one of its maps. While no change acts, it hands on to
the function that ran before, so the base stays itself bit for bit.

Shape letters: T tokens, K experts that each is sent to, N = T K rows sorted by expert, E experts.
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

NAME = "luthier"
ROLES = {"gate_up_proj": "gate_up", "up_proj": "up", "down_proj": "down"}


class _ExpertChanges:
    """What was put into one module of experts, and the function that ran it before."""

    def __init__(self, module: Any) -> None:
        before = module.config._experts_implementation
        self.real: Callable[..., Tensor] = (ALL_EXPERTS_FUNCTIONS[before] if before in ALL_EXPERTS_FUNCTIONS
                                            else type(module).forward.__wrapped__)
        self.changes: list[tuple[str, AdapterGate, ExpertChange]] = []
        module.config = copy(module.config)  # its own, so that modules without changes keep their function
        module.config._experts_implementation = NAME


def find_experts(name: str, layer: nn.Module, block: int) -> list[ExpertLinears]:
    """The maps of every module of experts in a block."""
    found = []
    for path, module in layer.named_modules():
        for parameter, weight in module.named_parameters(recurse=False):
            if parameter not in ROLES or weight.dim() != 3 or getattr(module, "is_transposed", None) is None:
                continue
            count, outputs, inputs = weight.shape
            if module.is_transposed:
                inputs, outputs = outputs, inputs
            found.append(ExpertLinears(f"{name}.{path}.{parameter}", weight, ROLES[parameter], block, count, inputs,
                                       outputs,
                                 bool(module.is_transposed), _make_add_change(module, parameter)))
    return found


def _make_add_change(module: nn.Module, parameter: str) -> Callable[[AdapterGate, ExpertChange], None]:
    def enter(gate: AdapterGate, change: ExpertChange) -> None:
        if not isinstance(getattr(module, "luthier", None), _ExpertChanges):
            module.luthier = _ExpertChanges(module)  # type: ignore[assignment]
        module.luthier.changes.append((parameter, gate, change))  # type: ignore[union-attr, operator]
    return enter


def run_experts(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """What Transformers' modules of experts call in place of their own: [T, D] of [T, D].

    Args:
        index: [T, K] the experts of each token.
        weights: [T, K] how much each counts.
    """
    acting = [found for found in module.luthier.changes if not found[1].disabled_depth]
    if not acting:
        real: Tensor = module.luthier.real(module, hidden, index, weights)
        return real
    if module._is_expert_parallel:
        raise RunError("these experts are spread over devices, and a change to them is not", "train on one device")
    order = index.flatten().argsort(stable=True)
    counts = torch.bincount(index.flatten(), minlength=module.num_experts).tolist()
    rows = hidden[order // index.shape[1]]
    first = "gate_up_proj" if module.has_gate else "up_proj"
    inner = _apply_linear(module, first, rows, counts, acting)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    out = _apply_linear(module, "down_proj", inner, counts, acting)
    if module.has_post_expert_norm:
        out = module.post_expert_norm(out)
    out = out * weights.flatten()[order, None]
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return out[back].view(*index.shape, -1).sum(1).to(hidden.dtype)


def _apply_linear(module: Any, name: str, rows: Tensor, counts: Sequence[int],
         acting: Sequence[tuple[str, AdapterGate, ExpertChange]]) -> Tensor:
    """[N, out] of [N, in], rows sorted by expert, with the changes that act."""
    weight = getattr(module, name)
    bias = getattr(module, f"{name}_bias") if module.has_bias else None
    matrices = weight.transpose(1, 2) if module.is_transposed else weight
    found = torch.cat([F.linear(part, matrices[e], None if bias is None else bias[e])
                       for e, part in enumerate(rows.split(list(counts))) if len(part)])
    for parameter, gate, change in acting:
        if parameter == name:
            if gate.token_index is not None:
                raise RunError("an adapter on experts cannot act on some of a row's tokens only",
                               "run each adapter's rows by themselves, or leave the experts out of its targets")
            found = found + gate.scale * change(rows, counts).to(found.dtype)
    return found


ALL_EXPERTS_FUNCTIONS.register(NAME, run_experts)
