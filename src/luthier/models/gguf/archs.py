"""What llama.cpp computes for an architecture, and the hyperparameters it needs. Read `core/protocols.py`
(ModelStructure)
first.

One table has an entry for each of Transformers' supported model types. A model whose config differs from its entry is
rejected. `gguf/writer.py` continues.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from gguf import MODEL_ARCH
from torch import Tensor

from luthier.core.errors import BaseError
from luthier.models.gguf.vocab import REMEDY
from luthier.models.hf_attributes import get_optional

ATTENTION = ("attn_q", "attn_k", "attn_v")
SILU, GELU = ("silu", "swish"), ("gelu_pytorch_tanh", "gelu_new")
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class ArchSpec:
    """What llama.cpp computes for one architecture.

    Args:
        biases: the linear layers and norms that have a bias.
        activations: Transformers' names of its activation; `activation_key` is the config's key of it.
        permutes_qk: rotary embeddings pair row 2i of a head's q and k with 2i + 1; Transformers pairs i with i + d/2.
        norm_plus_one: norms multiply by the stored weight; Transformers multiplies by 1 + weight.
        has_window_pattern: it supports layers with and without a sliding window in one model.
        is_gpt2_like: learned positions, LayerNorm with biases, weights stored [in, out] (`Conv1D`).
        large_layers: with this number of layers scores are divided by sqrt(width / heads), otherwise by sqrt(head_dim).
    """

    arch: MODEL_ARCH
    biases: tuple[str, ...] = ()
    activations: tuple[str, ...] = SILU
    activation_key: str = "hidden_act"
    permutes_qk: bool = False
    norm_plus_one: bool = False
    has_window_pattern: bool = False
    is_gpt2_like: bool = False
    large_layers: int = 0

    @property
    def name(self) -> str:
        return str(gguf.MODEL_ARCH_NAMES[self.arch])


LLAMA = ArchSpec(MODEL_ARCH.LLAMA, (*ATTENTION, "attn_output", "ffn_gate", "ffn_up", "ffn_down"), permutes_qk=True)
ARCHS: Mapping[str, ArchSpec] = {
    "llama": LLAMA, "mistral": LLAMA,
    "qwen2": ArchSpec(MODEL_ARCH.QWEN2, ATTENTION),
    "qwen3": ArchSpec(MODEL_ARCH.QWEN3),
    "gemma": ArchSpec(MODEL_ARCH.GEMMA, activations=GELU, norm_plus_one=True),
    "gemma2": ArchSpec(MODEL_ARCH.GEMMA2, activations=GELU, activation_key="hidden_activation", norm_plus_one=True,
                       has_window_pattern=True, large_layers=46),
    "gemma3_text": ArchSpec(MODEL_ARCH.GEMMA3, activations=GELU, activation_key="hidden_activation",
                            norm_plus_one=True, has_window_pattern=True, large_layers=62),
    "gpt2": ArchSpec(MODEL_ARCH.GPT2, ("attn_qkv", "attn_output", "ffn_up", "ffn_down", "attn_norm", "ffn_norm",
                                       "output_norm"),
                     activations=GELU, activation_key="activation_function",
                                  is_gpt2_like=True),
}


class TensorNames:
    """llama.cpp's names and row order of a model's tensors. Raises `BaseError` for an unsupported architecture."""

    def __init__(self, config: Any) -> None:
        if config.model_type not in ARCHS:
            raise BaseError(f"a model of type {config.model_type!r} cannot be written as GGUF here; those that can: "
                            f"{', '.join(ARCHS)}", REMEDY)
        self.spec = ARCHS[config.model_type]
        self._known = gguf.get_tensor_name_map(self.spec.arch, config.num_hidden_layers)
        self._heads = {"attn_q": config.num_attention_heads, "attn_k": _num_key_value_heads(config)}

    def map_name(self, path: str) -> str:
        """llama.cpp's name of a module's weight, without the suffix."""
        found = self._known.get_name(path)
        if found is None:
            raise BaseError(f"llama.cpp's {self.spec.name} has no place for {path!r}", REMEDY)
        return str(found)

    def permute_rows(self, name: str, rows: Tensor) -> Tensor:
        """[out, ...] The rows of q and k with the pairs of rotary embeddings next to each other; other tensors
        unchanged."""
        heads = self._heads.get(name.rpartition(".")[2]) if self.spec.permutes_qk else None
        if heads is None:
            return rows
        return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)

    def adjust_norm(self, name: str, weight: Tensor) -> Tensor:
        """The weight that llama.cpp multiplies by in a norm; other tensors unchanged."""
        return weight + 1 if self.spec.norm_plus_one and name.endswith("norm") else weight


def _num_key_value_heads(config: Any) -> int:
    return int(get_optional(config, "num_key_value_heads") or config.num_attention_heads)


def write_hyperparameters(writer: gguf.GGUFWriter, config: Any, vocabulary: int, spec: ArchSpec) -> Tensor | None:
    """Write sizes, sliding windows, soft caps and rotary embeddings. Returns the divisors [d/2] of the rotary
    frequencies if the model scales them individually. Raises `BaseError` if llama.cpp would compute something else."""
    act = getattr(config, spec.activation_key)
    if act not in spec.activations:
        raise BaseError(f"the model's activation is {act!r}, and llama.cpp would take {spec.activations[0]}", REMEDY)
    head = get_optional(config, "head_dim") or config.hidden_size // config.num_attention_heads
    window = None if spec.has_window_pattern else get_optional(config, "sliding_window")
    writer.add_context_length(min(config.max_position_embeddings, window or 1 << 62))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(_num_key_value_heads(config))
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_vocab_size(vocabulary)
    if spec.is_gpt2_like:
        _write_gpt2(writer, config)
        return None
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    if spec.norm_plus_one:
        _write_gemma(writer, config, head, spec)
    return _write_rope(writer, config, head, spec)


def _write_gpt2(writer: gguf.GGUFWriter, config: Any) -> None:
    """Write what only GPT-2 has."""
    if not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx:
        raise BaseError("the model does not scale its attention scores by 1 / sqrt(head_dim) alone, as llama.cpp does",
                        REMEDY)
    writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


def _write_gemma(writer: gguf.GGUFWriter, config: Any, head: int, spec: ArchSpec) -> None:
    """Write the scale and soft cap of attention scores, and which layers have a sliding window."""
    if get_optional(config, "use_bidirectional_attention"):
        raise BaseError("the model uses bidirectional attention, which llama.cpp does not support here", REMEDY)
    if not spec.has_window_pattern:
        return
    large = config.num_hidden_layers == spec.large_layers
    scale = config.hidden_size // config.num_attention_heads if large else head
    if config.query_pre_attn_scalar != scale:
        raise BaseError(f"the model divides scores by sqrt({config.query_pre_attn_scalar}), but llama.cpp by "
                        f"sqrt({scale})", REMEDY)
    scores, logits = config.attn_logit_softcapping, config.final_logit_softcapping
    if spec.arch == MODEL_ARCH.GEMMA2:
        if not scores or not logits:
            raise BaseError("the model has no soft cap on its scores or logits, but llama.cpp applies one", REMEDY)
        writer.add_attn_logit_softcapping(scores)
    elif scores:
        raise BaseError(f"the model has a soft cap of {scores} on its scores, which llama.cpp does not apply", REMEDY)
    if logits:
        writer.add_final_logit_softcapping(logits)
    near = [kind == SLIDING for kind in config.layer_types]
    if any(near):
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern(near)


def _write_rope(writer: gguf.GGUFWriter, config: Any, head: int, spec: ArchSpec) -> Tensor | None:
    """Write the rotary embeddings; see `write_hyperparameters`."""
    rope = config.rope_parameters
    near = rope.get(SLIDING)
    if near is not None:  # layers with a sliding window have rotary embeddings of their own
        rope = rope[FULL]
        if near.get("rope_type", "default") != "default":
            raise BaseError(f"the rotary embeddings of layers with a sliding window are scaled by "
                            f"{near['rope_type']!r}, which llama.cpp does not support", REMEDY)
        writer.add_rope_freq_base_swa(near["rope_theta"])
    kind, theta = rope.get("rope_type", "default"), rope["rope_theta"]
    writer.add_rope_freq_base(theta)
    if any(angles.get("partial_rotary_factor", 1.0) != 1.0 for angles in (rope, near or {})):
        raise BaseError("the model rotates only a part of each head, but llama.cpp rotates all of it", REMEDY)
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "llama3" and spec.arch == MODEL_ARCH.LLAMA:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
        changed, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        return theta ** (-torch.arange(0, head, 2, dtype=torch.float64) / head) / changed.double()
    elif kind != "default":
        raise BaseError(f"the model's rotary embeddings are scaled by {kind!r}; supported are default, linear and "
                        "(for llama) llama3", REMEDY)
    return None
