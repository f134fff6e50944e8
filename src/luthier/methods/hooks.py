"""How a method enters a model: small functions on the outputs of the modules that it chose, with one switch.

Every method with parameters of its own is built on this. The base's modules, weights and names stay as they are, so
several methods can sit on one model, and switching one off leaves the base bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from luthier.core.errors import RunError

Change = Callable[[Tensor, Tensor], Tensor]  # (input, output) of a module -> new output, of the same shape


class Hooks:
    """The hooks of one attached method, and whether they act."""

    def __init__(self) -> None:
        self._off = 0
        self._handles: list[Any] = []

    def after(self, module: nn.Module, change: Change) -> None:
        """From now on `module` returns ``change(input, output)``."""

        def hook(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            return change(args[0], output) if not self._off else None

        self._handles.append(module.register_forward_hook(hook))

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """While open, nothing is changed. Nests."""
        self._off += 1
        try:
            yield
        finally:
            self._off -= 1

    def detach(self) -> None:
        """Take the hooks away for good."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def load_into(parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]) -> None:
    """Copy `state` into `parameters`, bit for bit. Raises `RunError` for missing, unknown or misshapen entries."""
    refuse_misfits(parameters, state)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


def refuse_misfits(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raises `RunError` where `state` has not the names and shapes of `wanted`."""
    missing, unknown = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    misshapen = [f"{name} {list(state[name].shape)} instead of {list(t.shape)}"
                 for name, t in wanted.items() if name in state and state[name].shape != t.shape]
    for kind, names in (("missing", missing), ("unknown", unknown), ("misshapen", misshapen)):
        if names:
            raise RunError(f"the saved weights do not fit this method on this base: {len(names)} {kind}, "
                           f"the first {names[0]!r}", "use the base and the settings that they were trained with")
