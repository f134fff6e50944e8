"""Several adapters on one base: who acts, how strongly, and on which tokens. Read `hooks.py` and `composite.py` first.

    bank = Bank(structure)
    bank.add("law", attached_a)                       # silent until it is chosen
    bank.add("medicine", attached_b)
    with bank.using("law"): ...                       # that one alone
    with bank.using({"law": 0.7, "medicine": 0.3}):   # y + 0.7 (change of law) + 0.3 (change of medicine)
    with bank.using(None): ...                        # the bare base

A setting is a handful of numbers on each adapter's `Scope`: no weight is copied or moved, so turning it costs
microseconds. A family that knows the bank (`family.router = bank`) also sends every segment of a packed row, or every
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

from luthier.core.adapter_gate import AdapterGate
from luthier.core.errors import RecipeError, RunError, suggest_nearest
from luthier.core.optimizer_hook import OptimizerHook
from luthier.core.protocols import ModelStructure, Tuner
from luthier.core.types import Inputs
from luthier.methods.composite import collect_gates, combine_hooks

Choice = str | Mapping[str, float] | None  # one adapter, several by their weights, or the bare base


class GateSetting(NamedTuple):
    """How one adapter acts: see `Scope`."""

    weight: float = 1.0
    part: tuple[int, Tensor] | None = None
    among: int = 0
    where: tuple[int, ...] = ()


class AdapterManager:
    """Adapters by name on one base. Whoever adds one hands its switch over to the bank.

    Args:
        structure: of the base that they all are attached to.
    """

    def __init__(self, structure: ModelStructure) -> None:
        self._anatomy = structure
        self.members: dict[str, Tuner] = {}
        self._scopes: dict[str, tuple[AdapterGate, ...]] = {}
        self._acting: dict[str, GateSetting] = {}
        self._frozen: set[str] = set()

    def add(self, name: str, attached: Tuner) -> None:
        """Take an adapter in, silent until it is chosen. Raises `RunError` for one that has no switch."""
        if name in self.members:
            raise RecipeError(f"the bank has an adapter {name!r} already", "give this one another name")
        found = collect_gates(attached)
        if found is None:
            raise RunError(f"{name!r} works inside the base's own parts, so nothing else can share this base with it",
                           "use a method that stands beside the weights, such as lora, or load that run by itself")
        for scope in found:
            scope.off += 1
        self.members[name], self._scopes[name] = attached, found

    def frozen(self, name: str) -> Tuner:
        """The adapter, which trains no more from now on: a reference beside the policy that started from it."""
        self._known([name])
        self._frozen.add(name)
        for parameter in self.members[name].parameters().values():
            parameter.requires_grad_(False)
        return self.members[name]

    # ------------------------------------------------------------ who acts

    def choose(self, choice: Choice) -> None:
        """From now on that adapter acts alone (None: the bare base), or several, each change by its weight."""
        weights = {} if choice is None else {choice: 1.0} if isinstance(choice, str) else choice
        self._known(weights)
        self._set({name: GateSetting(weight) for name, weight in weights.items()})

    @contextmanager
    def using(self, choice: Choice) -> Iterator[None]:
        """`choose`, until closed. Nests. A batch that is routed inside goes where its segments say."""
        before = self._acting
        self.choose(choice)
        try:
            yield
        finally:
            self._set(before)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """While open, the model is the bare base, whatever is chosen or routed meanwhile."""
        every = [scope for found in self._scopes.values() for scope in found]
        for scope in every:
            scope.off += 1
        try:
            yield
        finally:
            for scope in every:
                scope.off -= 1

    def _set(self, acting: dict[str, GateSetting]) -> None:
        for name, found in self._scopes.items():
            was, now = name in self._acting, acting.get(name)
            for scope in found:
                _set_gate(scope, scope.off + was - (now is not None), now or GateSetting())
        self._acting = acting

    # ------------------------------------------------------------ which tokens go where

    def numbers(self, names: Iterable[str | None]) -> tuple[int, ...]:
        """Adapters as `Forest.adapters` and `generate` name them: each one's index, -1 for None."""
        names = list(names)
        self._known(name for name in names if name is not None)
        order = list(self.members)
        return tuple(-1 if name is None else order.index(name) for name in names)

    def through(self, inputs: Inputs, names: Sequence[str | None]) -> Inputs:
        """The same row, every segment of it sent through the adapter named for it, or none."""
        return replace(inputs, forest=replace(inputs.forest, adapters=self.numbers(names)))

    @contextmanager
    def routed(self, dim: int, places: Sequence[int]) -> Iterator[None]:
        """See `Router`. Adapters without a place stay silent."""
        where = torch.tensor(places)
        device = self._anatomy.embedding.weight.device
        assert isinstance(device, torch.device)
        assert set(places) <= set(range(-1, len(self.members))), places
        before = self._acting
        self._set({name: GateSetting(1.0, (dim, found.to(device)), len(places), tuple(found.tolist()))
                   for i, name in enumerate(self.members) if (found := (where == i).nonzero()[:, 0]).numel()})
        try:
            yield
        finally:
            self._set(before)

    def moment(self) -> AbstractContextManager[None]:
        """See `Router`. Every scope as it stands now, whoever switched it: by the backward pass all contexts of the
        forward pass may be closed, `disabled()` of one adapter too."""
        every = [scope for found in self._scopes.values() for scope in found]
        return _restore_setting(every, [_read_gate(scope) for scope in every])

    # ------------------------------------------------------------ training them together

    def parameters(self) -> dict[str, nn.Parameter]:
        """Of all that are not frozen, as ``<adapter>/<parameter>``."""
        return {f"{name}/{inner}": parameter for name, attached in self.members.items() if name not in self._frozen
                for inner, parameter in attached.parameters().items()}

    def rate(self, name: str) -> float:
        adapter, _, inner = name.partition("/")
        return self.members[adapter].rate(inner)

    @property
    def at_update(self) -> OptimizerHook | None:
        """Of all that are not frozen."""
        return combine_hooks(attached.at_update for name, attached in self.members.items() if name not in self._frozen)

    def _known(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.members:
                raise RecipeError(f"the bank has no adapter {name!r}", suggest_nearest(name, self.members))


_GateState = tuple[int, GateSetting]


def _read_gate(scope: AdapterGate) -> _GateState:
    return scope.off, GateSetting(scope.weight, scope.part, scope.among, scope.where)


def _set_gate(scope: AdapterGate, off: int, acts: GateSetting) -> None:
    scope.off = off
    scope.weight, scope.part, scope.among, scope.where = acts


@contextmanager
def _restore_setting(every: Sequence[AdapterGate], then: Sequence[_GateState]) -> Iterator[None]:
    now = [_read_gate(scope) for scope in every]
    for scope, found in zip(every, then, strict=True):
        _set_gate(scope, *found)
    try:
        yield
    finally:
        for scope, found in zip(every, now, strict=True):
            _set_gate(scope, *found)
