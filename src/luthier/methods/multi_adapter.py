"""Several adapters on one base: which are active, how strongly, and on which tokens. Read `hooks.py` first.

    manager = AdapterManager(structure)
    manager.add("law", tuner_a)                                     # inactive until it is selected
    manager.add("medicine", tuner_b)
    with manager.use_adapter("law"): ...                            # this one only
    with manager.use_adapter({"law": 0.7, "medicine": 0.3}):   # y + 0.7 (delta of law) + 0.3 (delta of medicine)
    with manager.use_adapter(None): ...                             # the base

A selection is a few numbers on each adapter's `AdapterGate`. No weight is copied or moved, so switching costs
microseconds. A family that knows the manager (`family.router = manager`) can also route each segment of a packed row,
or each row of a padded batch, through its own adapter (`SegmentTree.adapters`). Virtual tokens are routed by
documents: each
document attends to those of its own adapter (`models/soft_prompts/causal.py`). They are present or absent, so in a
weighted sum their weight is 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from luthier.core.adapter_gate import AdapterGate
from luthier.core.errors import RecipeError, RunError, suggest_nearest
from luthier.core.optimizer_hook import OptimizerHook
from luthier.core.protocols import ModelStructure, Tuner
from luthier.core.types import Inputs

Choice = str | Mapping[str, float] | None  # one adapter, several with weights, or the base alone


class GateSetting(NamedTuple):
    """The values of one adapter's `AdapterGate`."""

    scale: float = 1.0
    token_index: tuple[int, Tensor] | None = None
    dim_size: int = 0
    positions: tuple[int, ...] = ()


class AdapterManager:
    """Adapters by name on one base. The manager controls the gates of the adapters that are added to it.

    Args:
        structure: structure of the base that all adapters are attached to.
    """

    def __init__(self, structure: ModelStructure) -> None:
        self._anatomy = structure
        self.adapters: dict[str, Tuner] = {}
        self._gates: dict[str, tuple[AdapterGate, ...]] = {}
        self._active: dict[str, GateSetting] = {}
        self._frozen: set[str] = set()

    def add(self, name: str, attached: Tuner) -> None:
        """Add an adapter; it is inactive until selected. Raises `RunError` for a tuner without gates."""
        if name in self.adapters:
            raise RecipeError(f"an adapter named {name!r} already exists", "use another name")
        gates = attached.gates
        if gates is None:
            raise RunError(f"{name!r} modifies the base's own weights or modules and cannot share a base model with "
                           "other adapters", "use a method that adds parameters, such as lora, or load that run alone")
        for gate in gates:
            gate.disabled_depth += 1
        self.adapters[name], self._gates[name] = attached, gates

    def freeze(self, name: str) -> Tuner:
        """Exclude an adapter from training, as the reference of a policy that started from it; returns the adapter."""
        self._check_names([name])
        self._frozen.add(name)
        for parameter in self.adapters[name].parameters().values():
            parameter.requires_grad_(False)
        return self.adapters[name]

    # ------------------------------------------------------------ selection

    def set_adapter(self, choice: Choice) -> None:
        """Activate one adapter, none (None: the base alone), or several with weights."""
        weights = {} if choice is None else {choice: 1.0} if isinstance(choice, str) else choice
        self._check_names(weights)
        self._apply({name: GateSetting(weight) for name, weight in weights.items()})

    @contextmanager
    def use_adapter(self, choice: Choice) -> Iterator[None]:
        """`set_adapter` while the context is open. Contexts nest. A routed batch overrides the selection."""
        before = self._active
        self.set_adapter(choice)
        try:
            yield
        finally:
            self._apply(before)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """While the context is open the model is the base alone, whatever is selected or routed inside."""
        gates = [gate for gates in self._gates.values() for gate in gates]
        for gate in gates:
            gate.disabled_depth += 1
        try:
            yield
        finally:
            for gate in gates:
                gate.disabled_depth -= 1

    def _apply(self, active: dict[str, GateSetting]) -> None:
        for name, gates in self._gates.items():
            was_active, setting = name in self._active, active.get(name)
            for gate in gates:
                # Relative, since `disabled()` contexts of others are counted in it too.
                depth = gate.disabled_depth + was_active - (setting is not None)
                _set_gate(gate, depth, setting or GateSetting())
        self._active = active

    # ------------------------------------------------------------ routing

    def resolve_indices(self, names: Iterable[str | None]) -> tuple[int, ...]:
        """Index of each adapter, for `SegmentTree.adapters` and `generate`; -1 for None."""
        names = list(names)
        self._check_names(name for name in names if name is not None)
        order = list(self.adapters)
        return tuple(-1 if name is None else order.index(name) for name in names)

    def with_adapters(self, inputs: Inputs, names: Sequence[str | None]) -> Inputs:
        """`inputs` with each segment routed through the adapter of its name, or through none."""
        return replace(inputs, segment_tree=replace(inputs.segment_tree, adapters=self.resolve_indices(names)))

    @contextmanager
    def route(self, dim: int, places: Sequence[int]) -> Iterator[None]:
        """See `Router`. Adapters that are not in `places` are inactive."""
        adapter_of_token = torch.tensor(places)  # [T] or [rows]
        device = self._anatomy.embedding.weight.device
        assert isinstance(device, torch.device)
        assert set(places) <= set(range(-1, len(self.adapters))), places
        before = self._active
        self._apply({name: GateSetting(1.0, (dim, index.to(device)), len(places), tuple(index.tolist()))
                     for i, name in enumerate(self.adapters)
                     if (index := (adapter_of_token == i).nonzero()[:, 0]).numel()})
        try:
            yield
        finally:
            self._apply(before)

    def snapshot(self) -> AbstractContextManager[None]:
        """See `Router`. Stores every gate, whatever changed it: in the backward pass the contexts of the forward pass,
        including `disabled()` of single adapters, are closed."""
        gates = [gate for gates in self._gates.values() for gate in gates]
        return _restore_setting(gates, [_read_gate(gate) for gate in gates])

    # ------------------------------------------------------------ training all of them

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of all adapters that are not frozen, as ``<adapter>/<parameter>``."""
        return {f"{name}/{inner}": parameter for name, attached in self.adapters.items() if name not in self._frozen
                for inner, parameter in attached.parameters().items()}

    def lr_multiplier(self, name: str) -> float:
        adapter, _, inner = name.partition("/")
        return self.adapters[adapter].lr_multiplier(inner)

    @property
    def optimizer_hooks(self) -> tuple[OptimizerHook, ...]:
        """The hooks of all adapters that are not frozen."""
        return tuple(hook for name, attached in self.adapters.items() if name not in self._frozen
                     for hook in attached.optimizer_hooks)

    def _check_names(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.adapters:
                raise RecipeError(f"unknown adapter {name!r}", suggest_nearest(name, self.adapters))


_GateState = tuple[int, GateSetting]


def _read_gate(gate: AdapterGate) -> _GateState:
    return gate.disabled_depth, GateSetting(gate.scale, gate.token_index, gate.dim_size, gate.positions)


def _set_gate(gate: AdapterGate, disabled_depth: int, setting: GateSetting) -> None:
    gate.disabled_depth = disabled_depth
    gate.scale, gate.token_index, gate.dim_size, gate.positions = setting


@contextmanager
def _restore_setting(gates: Sequence[AdapterGate], states: Sequence[_GateState]) -> Iterator[None]:
    before = [_read_gate(gate) for gate in gates]
    for gate, state in zip(gates, states, strict=True):
        _set_gate(gate, *state)
    try:
        yield
    finally:
        for gate, state in zip(gates, before, strict=True):
            _set_gate(gate, *state)
