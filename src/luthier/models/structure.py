"""Finds a model's parts: its layers, its linear layers and their roles. Read `core/protocols.py` (ModelStructure)
first.

One table of name suffixes covers GPT-2, Llama, Qwen, Gemma, Mistral, Phi, OPT, BLOOM, BERT, ViT and similar models. A
linear layer whose suffix is not in the table gets the role `other`, so an unknown architecture can still be trained by
every method that targets all linear layers.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from luthier.core.errors import BaseError
from luthier.core.protocols import ModelStructure, TargetLinear, TransformerLayer
from luthier.models.expert_layers import find_experts
from luthier.models.hf_attributes import get_optional
from luthier.models.quantization import get_dequantizer

# Suffix of a module's path -> role. `qkv` contains queries, keys and values one after another, `qkv_mixed` head by
# head.
# The longest matching suffix wins, so `attn.c_proj` takes precedence over `c_proj`.
ROLES = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "out_proj": "o",
    "query": "q", "key": "k", "value": "v", "attention.output.dense": "o",
    "qkv_proj": "qkv", "query_key_value": "qkv_mixed", "attn.c_attn": "qkv", "attn.c_proj": "o",
    "self_attention.dense": "o", "attention.dense": "o", "self_attn.dense": "o", "Wqkv": "qkv", "attn.Wo": "o",
    "q_lin": "q", "k_lin": "k", "v_lin": "v", "out_lin": "o", "ffn.lin1": "up", "ffn.lin2": "down",
    "query_proj": "q", "key_proj": "k", "value_proj": "v", "attn.q": "q", "attn.k": "k", "attn.v": "v", "attn.o": "o",
    "ffn": "up", "ffn_output": "down", "mlp.Wi": "gate_up", "mlp.Wo": "down",
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down", "gate_up_proj": "gate_up",
    "mlp.c_fc": "up", "mlp.c_proj": "down", "fc1": "up", "fc2": "down", "w1": "gate", "w3": "up", "w2": "down",
    "dense_h_to_4h": "up", "dense_4h_to_h": "down", "intermediate.dense": "up", "output.dense": "down",
    "gate": "router", "router": "router",
    "SelfAttention.q": "q", "SelfAttention.k": "k", "SelfAttention.v": "v", "SelfAttention.o": "o",  # T5
    "EncDecAttention.q": "q", "EncDecAttention.k": "k", "EncDecAttention.v": "v", "EncDecAttention.o": "o",
    "DenseReluDense.wi": "up", "DenseReluDense.wi_0": "gate", "DenseReluDense.wi_1": "up", "DenseReluDense.wo": "down",
}
ATTENTION = ("self_attn", "attn", "attention", "self_attention")
MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "intermediate")


def find_structure(model: Any, tokenizer: Any = None, task: str = "CAUSAL_LM") -> ModelStructure:
    """The parts of a Transformers model. Raises `BaseError` if no stack of layers is found.

    In addition to the sizes listed in `ModelStructure` there is `unit`: the number of model tokens of one row entry.
    It is 1 for text; for an image it is the number of its patches plus the [CLS] token.
    """
    backbone = model.base_model if model.base_model is not model else model
    prefix = next((f"{name}." for name, module in model.named_modules() if module is backbone and name), "")
    path, stack = _find_layers(backbone)
    layers = tuple(_describe_layer(i, f"{prefix}{path}.{i}", layer) for i, layer in enumerate(stack))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    head = head if get_optional(head, "weight") is not None else None  # the base of a classifier has none
    embedding = getattr(embedding, "projection", embedding)  # of images: the patch projection
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    sizes = {
        "hidden": config.hidden_size, "layers": len(layers), "heads": heads,
        "kv_heads": get_optional(config, "num_key_value_heads") or heads,
        "head_dim": get_optional(config, "head_dim") or config.hidden_size // heads,
        "vocabulary": embedding.weight.shape[0] if get_optional(config, "vocab_size") is not None else 0,
        "context": get_optional(config, "max_position_embeddings") or 1_000_000, "unit": 1,
    }
    linears = tuple(site for layer in layers for site in find_linears(layer))
    tied = head is not None and head.weight is embedding.weight
    experts = tuple(found for layer in layers for found in find_experts(layer.name, layer.module, layer.index))
    return ModelStructure(model, backbone, layers, linears, embedding, head, tied, sizes, task, tokenizer,
                          experts=experts)


def get_role(path: str) -> str:
    """The role of a linear layer by the suffix of its path; `other` if the table does not contain it."""
    fitting = [ending for ending in ROLES if path == ending or path.endswith("." + ending)]
    return ROLES[max(fitting, key=len)] if fitting else "other"


def _find_layers(backbone: nn.Module) -> tuple[str, nn.ModuleList]:
    """The path and the modules of the layers: the longest `ModuleList` of modules of one class."""
    lists = [(name, module) for name, module in backbone.named_modules()
             if isinstance(module, nn.ModuleList) and len(module) and len({type(m) for m in module}) == 1]
    if not lists:
        raise BaseError(f"{type(backbone).__name__} has no stack of layers of one class, so its parts cannot be found",
                        "use a transformer model of the Transformers library")
    # The outermost list wins at equal length: the experts of an MoE layer are a ModuleList as well.
    return max(lists, key=lambda pair: (len(pair[1]) if pair[0].count(".") < 3 else 0, -pair[0].count(".")))


def _describe_layer(index: int, name: str, layer: nn.Module) -> TransformerLayer:
    children = dict(layer.named_children())
    attention = _find_attention(layer) or next((children[key] for key in ATTENTION if key in children), layer)
    mlp = next((children[key] for key in MLP if key in children), layer)
    norms = tuple(m for m in layer.modules() if "Norm" in type(m).__name__)
    outputs = {role: module for path, module in layer.named_modules() for role in ("o", "up", "down")
            if isinstance(module, (nn.Linear, Conv1D)) and get_role(f"{name}.{path}") == role}
    has_one_mlp = sum(get_role(path) == "down" for path, _ in layer.named_modules()) == 1
    # OPT: the MLP's two linear layers belong to the layer itself, whose input is not the MLP's
    has_no_mlp_module = has_one_mlp and mlp is layer
    return TransformerLayer(index, name, layer, attention, mlp, norms, attention_out=outputs.get("o", attention),
                            mlp_in=outputs.get("up", mlp) if has_no_mlp_module else mlp,
                            mlp_out=outputs.get("down", mlp) if has_one_mlp else mlp)


def _find_attention(layer: nn.Module) -> nn.Module | None:
    """The module that contains the query projection; Transformers passes it to attention functions."""
    found = next((path for path, _ in layer.named_modules() if get_role(path) in ("q", "qkv", "qkv_mixed")), None)
    return None if found is None or "." not in found else layer.get_submodule(found.rpartition(".")[0])


def find_linears(layer: TransformerLayer) -> list[TargetLinear]:
    """Every linear layer in a transformer layer."""
    found = []
    for name, module in layer.module.named_modules():
        if isinstance(module, Conv1D):
            rows, columns = module.weight.shape
            found.append(TargetLinear(f"{layer.name}.{name}", module, get_role(name), layer.index, rows, columns,
                              transposed=True))
        elif isinstance(module, nn.Linear):
            found.append(TargetLinear(f"{layer.name}.{name}", module, get_role(name), layer.index,
                              module.in_features, module.out_features,
                              dequantize=get_dequantizer(module)))
    return found
