"""Merging for methods whose change fits into weights and biases that modules already have. Read `hooks.py` first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from luthier.core.optimizer_hook import OptimizerHook
from luthier.methods.hooks import Hooks


class MergeableMethod:
    """`merge`, `unmerge` and `disabled` for a method that is built on hooks and can compute its merged weights."""

    hooks: Hooks
    optimizer_hooks: tuple[OptimizerHook, ...] = ()

    def __init__(self) -> None:
        self._originals: list[tuple[nn.Module, str, Tensor | None]] = []

    def iter_merged(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        """(module, parameter name, merged value), computed one at a time so that only one copy exists."""
        raise NotImplementedError

    @torch.no_grad()
    def merge(self) -> None:
        assert not self._originals, "merged already"
        for module, name, value in self.iter_merged():
            old = get_own_parameter(module, name)
            # A copy: undoing the arithmetic would not restore the weight bit for bit.
            self._originals.append((module, name, None if old is None else old.detach().clone()))
            if old is None:  # a bias where the module had none
                module.register_parameter(name, nn.Parameter(value, requires_grad=False))
            else:
                old.copy_(value)
        self.hooks.gate.disabled_depth += 1

    @torch.no_grad()
    def unmerge(self) -> None:
        assert self._originals, "not merged"
        for module, name, value in reversed(self._originals):
            old = get_own_parameter(module, name)
            if value is None or old is None:
                module.register_parameter(name, None)
            else:
                old.copy_(value)
        self._originals.clear()
        self.hooks.gate.disabled_depth -= 1

    @contextmanager
    def disabled(self) -> Iterator[None]:
        if self._originals:
            self.unmerge()
            try:
                with self.disabled():
                    yield
            finally:
                self.merge()
        else:
            with self.hooks.disabled():
                yield


def get_own_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """A parameter registered on the module itself, not on a submodule."""
    return dict(module.named_parameters(recurse=False)).get(name)
