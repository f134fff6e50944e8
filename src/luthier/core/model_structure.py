"""Where a model's parts are: layers, linear layers, embedding and head. Read `expert_layers.py` first.

Methods find their places through `ModelStructure`, never by an architecture's name; `models/structure.py` builds it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from luthier.core.expert_layers import ExpertLinears
from luthier.core.soft_prompts import SoftPromptInjector
from luthier.core.tokenizer import Tokenizer


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


@dataclass(frozen=True)
class ModelStructure:
    """The parts of one loaded model. Methods find their target modules here, never by an architecture's name.

    Args:
        model: the whole model, head included.
        backbone: the model without its head: tokens to hidden states.
        head: the output projection [D -> V], or None.
        tied: whether the head's weight is the embedding's.
        sizes: hidden, layers, heads, kv_heads, head_dim, vocabulary, context.
        task: PEFT's task type: CAUSAL_LM, SEQ_2_SEQ_LM, FEATURE_EXTRACTION.
        tokenizer: of the base, for methods that initialize from text; None for images.
        injector: inserts virtual tokens; None if the family does not support them.
        experts: the expert layers of mixtures that keep all experts in one parameter.
    """

    model: nn.Module
    backbone: nn.Module
    layers: tuple[TransformerLayer, ...]
    linears: tuple[TargetLinear, ...]
    embedding: nn.Module
    head: nn.Module | None
    tied: bool
    sizes: Mapping[str, int] = field(default_factory=dict)
    task: str = "CAUSAL_LM"
    tokenizer: Tokenizer | None = None
    injector: SoftPromptInjector | None = None
    experts: tuple[ExpertLinears, ...] = ()
