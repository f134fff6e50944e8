"""Forward hooks of a method: functions on the inputs or outputs of selected modules, controlled by one gate.

Every method that adds parameters is built on this. The base's modules, weights and names are not
changed. Several methods can therefore share one model, and a disabled method leaves the base's outputs bit for bit.

Shape letters: T tokens of a packed row, D features of a hidden state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from luthier.core.adapter_gate import AdapterGate
from luthier.core.errors import NotMergeable, RunError
from luthier.core.protocols import TargetLinear

DeltaFunction = Callable[[Tensor, Tensor], Tensor]  # (input, output) of a module -> new output, of the same shape


class Hooks:
    """The hooks of one tuner. `gate` decides whether, on which tokens and how strongly they act."""

    def __init__(self) -> None:
        self.gate = AdapterGate()
        self._handles: list[Any] = []

    def modify_output(self, module: nn.Module, change: DeltaFunction) -> None:
        """Make `module` return ``change(input, output)``; of a tuple the first entry is changed. `change` may modify
        the output in place."""

        def hook(_module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if self.gate.disabled_depth:
                return None
            if isinstance(output, tuple):
                return self._apply_gated(change, args[0], output[0]), *output[1:]
            return self._apply_gated(change, args[0], output)

        self._handles.append(module.register_forward_hook(hook))

    def modify_input(self, module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        """Pass ``change(input)``, of the same shape, to `module` as its first argument. `change` must not modify its
        argument in place."""

        def hook(_module: nn.Module, args: tuple[Any, ...]) -> Any:
            if self.gate.disabled_depth:
                return None
            return self._apply_gated(lambda x, _: change(x), args[0], args[0]), *args[1:]

        self._handles.append(module.register_forward_pre_hook(hook))

    def _apply_gated(self, change: DeltaFunction, x: Tensor, y: Tensor) -> Tensor:
        """``change(x, y)``, scaled by `gate.scale`, for the tokens of `gate.token_index` only."""
        gate = self.gate
        if gate.token_index is None:
            # `change` may overwrite its second argument, and the scaled sum needs the original.
            return change(x, y) if gate.scale == 1 else y + gate.scale * (change(x, y.clone()) - y)
        index = gate.token_index[1]  # [selected tokens]
        dim = _find_token_dim(gate.token_index[0], gate.dim_size, y.shape)
        selected = y.index_select(dim, index)  # [..., selected tokens, D]
        # `change` may modify its argument in place; a scaled change needs the original too.
        new = change(x.index_select(dim, index), selected if gate.scale == 1 else selected.clone())
        # As y. Not in place: y may be saved for the backward pass.
        return y.index_copy(dim, index, new if gate.scale == 1 else selected + gate.scale * (new - selected))

    def disabled(self) -> AbstractContextManager[None]:
        """Disable the hooks while the context is open. Contexts nest."""
        return self.gate.disabled()

    def detach(self) -> None:
        """Remove the hooks permanently."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _find_token_dim(dim: int, dim_size: int, shape: torch.Size) -> int:
    """Which dimension of a hidden state holds the tokens of a row (`dim` 1) or the rows of a batch (`dim` 0).

    The dimension has `dim_size` entries. Some norms see [1, heads, T, d], where tokens are dimension 2. Raises
    `RunError` where the dimension is ambiguous: a mixture of experts sorts tokens by expert.
    """
    dim_size = dim_size or shape[dim]
    candidates = [d for d in ((1, 2) if dim == 1 and len(shape) > 3 else (dim,)) if shape[d] == dim_size]
    if len(shape) < 3 or len(candidates) != 1:
        raise RunError(f"cannot find the {dim_size} tokens or rows in a hidden state of shape {list(shape)}, so they "
                       "cannot use different adapters",
                       "select other target modules, or run each adapter's rows separately (manager.use_adapter)")
    return candidates[0]


def refuse_quantized(sites: Iterable[TargetLinear]) -> None:
    """Raises `NotMergeable` if a weight to be merged into is quantized."""
    if any(site.dequantize is not None for site in sites):
        raise NotMergeable("the base is quantized, and a merged weight would be rounded to its few bits",
                           "merge into the unquantized base: luthier export RUN --to merged loads it")


def load_into(parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]) -> None:
    """Copy `state` into `parameters`. Raises `RunError` for missing, unexpected or mismatched entries."""
    check_state_shapes(parameters, state)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


def check_state_shapes(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raises `RunError` unless `state` has exactly the names and shapes of `expected`."""
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    mismatched = [f"{name} {list(state[name].shape)} instead of {list(t.shape)}"
                 for name, t in expected.items() if name in state and state[name].shape != t.shape]
    for kind, names in (("missing", missing), ("unexpected", unexpected), ("mismatched", mismatched)):
        if names:
            raise RunError(f"the saved weights do not match this method on this base: {len(names)} {kind}, "
                           f"the first is {names[0]!r}", "use the base and the settings they were trained with")
