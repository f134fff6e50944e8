"""How a method enters a model: small functions on the inputs or outputs of the modules that it chose, with one switch.

Every method with parameters of its own is built on this. The base's modules, weights and names stay as they are, so
several methods can sit on one model, and switching one off leaves the base bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from luthier.core.errors import NotMergeable, RunError
from luthier.core.protocols import AdapterGate, Site

DeltaFunction = Callable[[Tensor, Tensor], Tensor]  # (input, output) of a module -> new output, of the same shape


class Hooks:
    """The hooks of one attached method. `gate` says whether, where and how strongly they act."""

    def __init__(self) -> None:
        self.gate = AdapterGate()
        self._handles: list[Any] = []

    def modify_output(self, module: nn.Module, change: DeltaFunction) -> None:
        """From now on `module` returns ``change(input, output)``. Where it returns a tuple, its first entry changes.
        `change` may write into the output."""

        def hook(_module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if self.gate.disabled_depth:
                return None
            if isinstance(output, tuple):
                return self._apply_gated(change, args[0], output[0]), *output[1:]
            return self._apply_gated(change, args[0], output)

        self._handles.append(module.register_forward_hook(hook))

    def modify_input(self, module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        """From now on `module` gets ``change(input)``, of the same shape, as its first argument. `change` must not
        write into its argument."""

        def hook(_module: nn.Module, args: tuple[Any, ...]) -> Any:
            if self.gate.disabled_depth:
                return None
            return self._apply_gated(lambda x, _: change(x), args[0], args[0]), *args[1:]

        self._handles.append(module.register_forward_pre_hook(hook))

    def _apply_gated(self, change: DeltaFunction, x: Tensor, y: Tensor) -> Tensor:
        """``change(x, y)``, as strongly as `gate.scale` says, for the tokens of `gate.token_index` alone."""
        gate = self.gate
        if gate.token_index is None:
            return change(x, y) if gate.scale == 1 else y + gate.scale * (change(x, y.clone()) - y)
        index = gate.token_index[1]
        dim = _find_token_dim(gate.token_index[0], gate.dim_size, y.shape)
        some = y.index_select(dim, index)
        new = change(x.index_select(dim, index), some if gate.scale == 1 else some.clone())
        return y.index_copy(dim, index, new if gate.scale == 1 else some + gate.scale * (new - some))

    def disabled(self) -> AbstractContextManager[None]:
        """While open, nothing is changed. Nests."""
        return self.gate.disabled()

    def detach(self) -> None:
        """Take the hooks away for good."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _find_token_dim(dim: int, among: int, shape: torch.Size) -> int:
    """Which dimension of a hidden state holds the tokens of a row (`dim` 1) or the rows of a batch (0), `among` many:
    some norms see [1, heads, T, d]. Raises `RunError` where that cannot be told: a mixture sorts tokens by expert."""
    among = among or shape[dim]
    fitting = [d for d in ((1, 2) if dim == 1 and len(shape) > 3 else (dim,)) if shape[d] == among]
    if len(shape) < 3 or len(fitting) != 1:
        raise RunError(f"a part of the model works on {list(shape)}, where it cannot be told which of {among} tokens "
                       "or rows are which, so they cannot go through different adapters",
                       "let the method change other parts, or run each adapter's rows by themselves (manager.use_adapter)")
    return fitting[0]


def refuse_quantized(sites: Iterable[Site]) -> None:
    """Raises `NotMergeable` where a weight that would be written to is kept in few bits."""
    if any(site.expand is not None for site in sites):
        raise NotMergeable("the base is kept in few bits, and a merged weight would be rounded to them",
                           "merge into the whole base: luthier export RUN --to merged opens it so")


def load_into(parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]) -> None:
    """Copy `state` into `parameters`, bit for bit. Raises `RunError` for missing, unknown or misshapen entries."""
    check_state_shapes(parameters, state)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


def check_state_shapes(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raises `RunError` where `state` has not the names and shapes of `wanted`."""
    missing, unknown = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    misshapen = [f"{name} {list(state[name].shape)} instead of {list(t.shape)}"
                 for name, t in wanted.items() if name in state and state[name].shape != t.shape]
    for kind, names in (("missing", missing), ("unknown", unknown), ("misshapen", misshapen)):
        if names:
            raise RunError(f"the saved weights do not fit this method on this base: {len(names)} {kind}, "
                           f"the first {names[0]!r}", "use the base and the settings that they were trained with")
