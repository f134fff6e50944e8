"""What llama.cpp computes for an architecture, and what it must be told. Read `core/protocols.py` (ModelStructure)
first.

One table has a row for each of Transformers' model types. Where a model asks for something that its row does not say,
it is refused. `models/gguf/writer.py` goes on.
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

ATTENTION = ("attn_q", "attn_k", "attn_v")
SILU, GELU = ("silu", "swish"), ("gelu_pytorch_tanh", "gelu_new")
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class ArchSpec:
    """What llama.cpp does for one architecture.

    Args:
        biases: the maps and norms that it adds a bias to.
        acts: Transformers' names of its activation; `act` is where a model's config has it.
        turned: of each head's d rows of q and k, it turns row 2i with 2i + 1, where Transformers turns i with i + d/2.
        raised: it multiplies by a norm's weight, where Transformers multiplies by 1 + weight.
        windows: it knows which layers see the last tokens alone.
        learnt: positions are learnt, norms have a mean and biases, and maps are kept [in, out] (`Conv1D`).
        large: at this number of layers scores are divided by the root of width / heads, else by that of a head's width.
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
                                  "output_norm"), activations=GELU, activation_key="activation_function",
                                  is_gpt2_like=True),
}


class TensorNames:
    """llama.cpp's names and order for a model's tensors. Raises `BaseError` for an architecture not in the table."""

    def __init__(self, config: Any) -> None:
        if config.model_type not in ARCHS:
            raise BaseError(f"a model of type {config.model_type!r} cannot be written as GGUF here; those that can: "
                            f"{', '.join(ARCHS)}", REMEDY)
        self.spec = ARCHS[config.model_type]
        self._known = gguf.get_tensor_name_map(self.spec.arch, config.num_hidden_layers)
        self._heads = {"attn_q": config.num_attention_heads, "attn_k": _num_key_value_heads(config)}

    def map_name(self, path: str) -> str:
        """Of the weight of a module, without its ending."""
        found = self._known.get_name(path)
        if found is None:
            raise BaseError(f"llama.cpp's {self.spec.name} has no place for {path!r}", REMEDY)
        return str(found)

    def permute_rows(self, name: str, rows: Tensor) -> Tensor:
        """[out, ...] rows of q and k, each head's turned pairs side by side; any other tensor as it is."""
        heads = self._heads.get(name.rpartition(".")[2]) if self.spec.permutes_qk else None
        if heads is None:
            return rows
        return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)

    def adjust_norm(self, name: str, weight: Tensor) -> Tensor:
        """What llama.cpp multiplies by in a norm; any other tensor as it is."""
        return weight + 1 if self.spec.norm_plus_one and name.endswith("norm") else weight


def _num_key_value_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def write_hyperparameters(writer: gguf.GGUFWriter, config: Any, vocabulary: int, spec: ArchSpec) -> Tensor | None:
    """Sizes, windows, caps and rotary angles; what divides each rotary frequency, where the model changes them one by
    one. Raises `BaseError` where llama.cpp would compute otherwise."""
    act = getattr(config, spec.activation_key)
    if act not in spec.activations:
        raise BaseError(f"the model's activation is {act!r}, and llama.cpp would take {spec.activations[0]}", REMEDY)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    window = None if spec.has_window_pattern else getattr(config, "sliding_window", None)
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
    """What only GPT-2 has."""
    if not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx:
        raise BaseError("the model does not divide its scores by the root of a head's width alone, as llama.cpp would",
                        REMEDY)
    writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


def _write_gemma(writer: gguf.GGUFWriter, config: Any, head: int, spec: ArchSpec) -> None:
    """How scores are scaled and capped, and which layers have a window."""
    if getattr(config, "use_bidirectional_attention", None):
        raise BaseError("the model's tokens see the ones behind them too, and llama.cpp's would not", REMEDY)
    if not spec.has_window_pattern:
        return
    large = config.num_hidden_layers == spec.large_layers
    scale = config.hidden_size // config.num_attention_heads if large else head
    if config.query_pre_attn_scalar != scale:
        raise BaseError(f"the model divides scores by the root of {config.query_pre_attn_scalar}, and llama.cpp would "
                        f"by that of {scale}", REMEDY)
    scores, logits = config.attn_logit_softcapping, config.final_logit_softcapping
    if spec.arch == MODEL_ARCH.GEMMA2:
        if not scores or not logits:
            raise BaseError("the model caps its scores or its logits not at all, and llama.cpp would", REMEDY)
        writer.add_attn_logit_softcapping(scores)
    elif scores:
        raise BaseError(f"the model caps its scores at {scores}, and llama.cpp would not", REMEDY)
    if logits:
        writer.add_final_logit_softcapping(logits)
    near = [kind == SLIDING for kind in config.layer_types]
    if any(near):
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern(near)


def _write_rope(writer: gguf.GGUFWriter, config: Any, head: int, spec: ArchSpec) -> Tensor | None:
    """Of the rotary positions; see `write_hyperparameters`."""
    rope = config.rope_parameters
    near = rope.get(SLIDING)
    if near is not None:  # layers with a window have angles of their own
        rope = rope[FULL]
        if near.get("rope_type", "default") != "default":
            raise BaseError(f"the rotary angles of layers with a window are scaled by {near['rope_type']!r}, and "
                            "llama.cpp would not", REMEDY)
        writer.add_rope_freq_base_swa(near["rope_theta"])
    kind, theta = rope.get("rope_type", "default"), rope["rope_theta"]
    writer.add_rope_freq_base(theta)
    if any(angles.get("partial_rotary_factor", 1.0) != 1.0 for angles in (rope, near or {})):
        raise BaseError("the model turns a part of each head only, and llama.cpp would turn the whole", REMEDY)
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "llama3" and spec.arch == MODEL_ARCH.LLAMA:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
        changed, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        return theta ** (-torch.arange(0, head, 2, dtype=torch.float64) / head) / changed.double()
    elif kind != "default":
        raise BaseError(f"the model's rotary angles are scaled by {kind!r}; default, linear and (llama) llama3 can be "
                        "written", REMEDY)
    return None
