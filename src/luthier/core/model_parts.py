"""A linear layer and a transformer layer of a model. `ModelStructure` in `protocols.py` holds them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class TargetLinear:
    """One linear layer inside a transformer layer.

    Args:
        name: its path in the model, as in `state_dict` and PEFT's files.
        module: an `nn.Linear`, or GPT-2's `Conv1D`.
        role: q, k, v, qkv, o, gate, up, down, or other.
        layer_index: index of the transformer layer that contains it.
        transposed: whether `weight` is [in, out] (Conv1D) instead of [out, in].
        dequantize: for a quantized layer, returns the dequantized weight [out, in]; writing to it has no effect.
    """

    name: str
    module: nn.Module
    role: str
    layer_index: int
    in_features: int
    out_features: int
    transposed: bool = False
    dequantize: Callable[[], Tensor] | None = None

    def base_weight(self) -> Tensor:
        """[out, in] The frozen weight, dequantized and transposed if necessary."""
        if self.dequantize is not None:
            return self.dequantize()
        weight = self.weight.detach()
        return weight.T if self.transposed else weight

    @property
    def weight(self) -> nn.Parameter:
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        return weight


@dataclass(frozen=True)
class TransformerLayer:
    """One layer of the stack: of a decoder or an encoder.

    Args:
        attention: the attention module, which Transformers passes to attention functions.
        attention_out: the module whose output is added to the residual stream as the attention's output.
        mlp_in, mlp_out: the modules whose input and output are those of the MLP (often the same module).
        norms: every norm in the layer.
    """

    index: int
    name: str
    module: nn.Module
    attention: nn.Module
    mlp: nn.Module
    norms: tuple[nn.Module, ...]
    attention_out: nn.Module
    mlp_in: nn.Module
    mlp_out: nn.Module
