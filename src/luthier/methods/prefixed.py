"""A tuner whose parameter names have a prefix, so that two tuners of one kind can train and be saved together.

Read `composite.py` first. PPO's critic uses the same method as its policy; its parameters are named ``critic/...``.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from luthier.core.adapter_gate import AdapterGate
from luthier.core.optimizer_hook import OptimizerHook
from luthier.core.protocols import Tuner


class PrefixedMethod:
    """`inner` with its parameters and saved tensors named ``<name>/...``."""

    def __init__(self, name: str, inner: Tuner) -> None:
        self._prefix, self.inner = f"{name}/", inner

    @property
    def gates(self) -> tuple[AdapterGate, ...] | None:
        return self.inner.gates

    @property
    def optimizer_hooks(self) -> tuple[OptimizerHook, ...]:
        return self.inner.optimizer_hooks

    def parameters(self) -> dict[str, nn.Parameter]:
        return {self._prefix + name: parameter for name, parameter in self.inner.parameters().items()}

    def lr_multiplier(self, name: str) -> float:
        return self.inner.lr_multiplier(name.removeprefix(self._prefix))

    def disabled(self) -> AbstractContextManager[None]:
        return self.inner.disabled()

    def merge(self) -> None:
        self.inner.merge()

    def unmerge(self) -> None:
        self.inner.unmerge()

    def state(self) -> dict[str, Tensor]:
        return {self._prefix + name: tensor for name, tensor in self.inner.state().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.inner.load({name.removeprefix(self._prefix): tensor for name, tensor in state.items()})

    def get_peft_config(self) -> dict[str, Any] | None:
        return self.inner.get_peft_config()
