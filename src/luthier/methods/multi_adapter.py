"""Several adapters on one base: who acts, how strongly, and on which tokens. Read `hooks.py` and `composite.py` first.

    manager = AdapterManager(anatomy)
    manager.add("law", attached_a)                       # silent until it is chosen
    manager.add("medicine", attached_b)
    with manager.use_adapter("law"): ...                       # that one alone
    with manager.use_adapter({"law": 0.7, "medicine": 0.3}):   # y + 0.7 (change of law) + 0.3 (change of medicine)
    with manager.use_adapter(None): ...                        # the bare base

A setting is a handful of numbers on each adapter's `Scope`: no weight is copied or moved, so turning it costs
microseconds. A family that knows the manager (`family.router = manager`) also sends every segment of a packed row, or every
row of a padded batch, through an adapter of its own (`Forest.adapters`). Virtual tokens are routed by documents: each
stands behind those of its own adapter (`models/soft_prompts/causal.py`). They are there or not, so in a stack their
weight is 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from luthier.core.errors import RecipeError, RunError, nearest
from luthier.core.optimizer_hook import OptimizerHook
from luthier.core.protocols import AdapterGate, Anatomy, Tuner
from luthier.core.types import Inputs

Choice = str | Mapping[str, float] | None  # one adapter, several by their weights, or the bare base


class GateSetting(NamedTuple):
    """How one adapter acts: see `Scope`."""

    scale: float = 1.0
    token_index: tuple[int, Tensor] | None = None
    dim_size: int = 0
    positions: tuple[int, ...] = ()


class AdapterManager:
    """Adapters by name on one base. Whoever adds one hands its switch over to the manager.

    Args:
        anatomy: of the base that they all are attached to.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        self._anatomy = anatomy
        self.adapters: dict[str, Tuner] = {}
        self._gates: dict[str, tuple[AdapterGate, ...]] = {}
        self._active: dict[str, GateSetting] = {}
        self._frozen: set[str] = set()

    def add(self, name: str, attached: Tuner) -> None:
        """Take an adapter in, silent until it is chosen. Raises `RunError` for one that has no switch."""
        if name in self.adapters:
            raise RecipeError(f"the manager has an adapter {name!r} already", "give this one another name")
        found = attached.gates
        if found is None:
            raise RunError(f"{name!r} works inside the base's own parts, so nothing else can share this base with it",
                           "use a method that stands beside the weights, such as lora, or load that run by itself")
        for gate in found:
            gate.disabled_depth += 1
        self.adapters[name], self._gates[name] = attached, found

    def freeze(self, name: str) -> Tuner:
        """The adapter, which trains no more from now on: a reference beside the policy that started from it."""
        self._check_names([name])
        self._frozen.add(name)
        for parameter in self.adapters[name].parameters().values():
            parameter.requires_grad_(False)
        return self.adapters[name]

    # ------------------------------------------------------------ who acts

    def set_adapter(self, choice: Choice) -> None:
        """From now on that adapter acts alone (None: the bare base), or several, each change by its weight."""
        weights = {} if choice is None else {choice: 1.0} if isinstance(choice, str) else choice
        self._check_names(weights)
        self._apply({name: GateSetting(weight) for name, weight in weights.items()})

    @contextmanager
    def use_adapter(self, choice: Choice) -> Iterator[None]:
        """`choose`, until closed. Nests. A batch that is routed inside goes where its segments say."""
        before = self._active
        self.set_adapter(choice)
        try:
            yield
        finally:
            self._apply(before)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """While open, the model is the bare base, whatever is chosen or routed meanwhile."""
        every = [gate for found in self._gates.values() for gate in found]
        for gate in every:
            gate.disabled_depth += 1
        try:
            yield
        finally:
            for gate in every:
                gate.disabled_depth -= 1

    def _apply(self, acting: dict[str, GateSetting]) -> None:
        for name, found in self._gates.items():
            was, now = name in self._active, acting.get(name)
            for gate in found:
                _set_gate(gate, gate.disabled_depth + was - (now is not None), now or GateSetting())
        self._active = acting

    # ------------------------------------------------------------ which tokens go where

    def resolve_indices(self, names: Iterable[str | None]) -> tuple[int, ...]:
        """Adapters as `Forest.adapters` and `generate` name them: each one's index, -1 for None."""
        names = list(names)
        self._check_names(name for name in names if name is not None)
        order = list(self.adapters)
        return tuple(-1 if name is None else order.index(name) for name in names)

    def with_adapters(self, inputs: Inputs, names: Sequence[str | None]) -> Inputs:
        """The same row, every segment of it sent through the adapter named for it, or none."""
        return replace(inputs, forest=replace(inputs.forest, adapters=self.resolve_indices(names)))

    @contextmanager
    def route(self, dim: int, places: Sequence[int]) -> Iterator[None]:
        """See `Router`. Adapters without a place stay silent."""
        where = torch.tensor(places)
        device = self._anatomy.embedding.weight.device
        assert isinstance(device, torch.device)
        assert set(places) <= set(range(-1, len(self.adapters))), places
        before = self._active
        self._apply({name: GateSetting(1.0, (dim, found.to(device)), len(places), tuple(found.tolist()))
                   for i, name in enumerate(self.adapters) if (found := (where == i).nonzero()[:, 0]).numel()})
        try:
            yield
        finally:
            self._apply(before)

    def snapshot(self) -> AbstractContextManager[None]:
        """See `Router`. Every gate as it stands now, whoever switched it: by the backward pass all contexts of the
        forward pass may be closed, `disabled()` of one adapter too."""
        every = [gate for found in self._gates.values() for gate in found]
        return _restore_setting(every, [_read_gate(gate) for gate in every])

    # ------------------------------------------------------------ training them together

    def parameters(self) -> dict[str, nn.Parameter]:
        """Of all that are not frozen, as ``<adapter>/<parameter>``."""
        return {f"{name}/{inner}": parameter for name, attached in self.adapters.items() if name not in self._frozen
                for inner, parameter in attached.parameters().items()}

    def lr_multiplier(self, name: str) -> float:
        adapter, _, inner = name.partition("/")
        return self.adapters[adapter].lr_multiplier(inner)

    @property
    def optimizer_hooks(self) -> tuple[OptimizerHook, ...]:
        """Of all that are not frozen."""
        return tuple(hook for name, attached in self.adapters.items() if name not in self._frozen
                     for hook in attached.optimizer_hooks)

    def _check_names(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.adapters:
                raise RecipeError(f"the manager has no adapter {name!r}", nearest(name, self.adapters))


_GateState = tuple[int, GateSetting]


def _read_gate(gate: AdapterGate) -> _GateState:
    return gate.disabled_depth, GateSetting(gate.scale, gate.token_index, gate.dim_size, gate.positions)


def _set_gate(gate: AdapterGate, off: int, acts: GateSetting) -> None:
    gate.disabled_depth = off
    gate.scale, gate.token_index, gate.dim_size, gate.positions = acts


@contextmanager
def _restore_setting(every: Sequence[AdapterGate], then: Sequence[_GateState]) -> Iterator[None]:
    now = [_read_gate(gate) for gate in every]
    for gate, found in zip(every, then, strict=True):
        _set_gate(gate, *found)
    try:
        yield
    finally:
        for gate, found in zip(every, now, strict=True):
            _set_gate(gate, *found)
