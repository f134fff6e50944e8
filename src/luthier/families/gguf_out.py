"""A model, or a LoRA, as one GGUF file for llama.cpp. Read `gguf.py` (the way in) and `gguf_words.py` first.

Most tensors are written as they are under llama.cpp's names. The exception is rotary attention of the `llama`
architecture: of each head's d rows of q and k, Transformers turns row i with row i + d/2, llama.cpp row 2i with 2i + 1.
The rows are put in that order, in biases and in a LoRA's B too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import gguf
import numpy as np
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, LlamaFileType
from torch import Tensor

from luthier.core.errors import BaseError
from luthier.core.protocols import Family
from luthier.families.generate import eos_tokens
from luthier.families.gguf_tokens import REMEDY
from luthier.families.gguf_words import write_words

Numbers = Literal["float32", "float16", "q8_0"]
NUMBERS: Mapping[str, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "float32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "float16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
Q8_BLOCK = 32
LARGEST = float(np.finfo(np.float16).max)
# Transformers' model_type -> llama.cpp's architecture.
ARCHITECTURES: Mapping[str, MODEL_ARCH] = {
    "llama": MODEL_ARCH.LLAMA, "mistral": MODEL_ARCH.LLAMA, "qwen2": MODEL_ARCH.QWEN2, "qwen3": MODEL_ARCH.QWEN3,
}
# The maps that llama.cpp adds a bias to.
ATTENTION = ("attn_q", "attn_k", "attn_v")
BIASES: Mapping[MODEL_ARCH, tuple[str, ...]] = {
    MODEL_ARCH.LLAMA: (*ATTENTION, "attn_output", "ffn_gate", "ffn_up", "ffn_down"),
    MODEL_ARCH.QWEN2: ATTENTION, MODEL_ARCH.QWEN3: (),
}


@dataclass(frozen=True)
class Change:
    """One LoRA: W + scale B A, with A [R, in] and B [out, R]."""

    a: Tensor
    b: Tensor
    scale: float


class Names:
    """llama.cpp's names and order for a model's tensors. Raises `BaseError` for an architecture not in the table."""

    def __init__(self, config: Any) -> None:
        if config.model_type not in ARCHITECTURES:
            raise BaseError(f"a model of type {config.model_type!r} cannot be written as GGUF here; those that can: "
                            f"{', '.join(ARCHITECTURES)}", REMEDY)
        self.arch = ARCHITECTURES[config.model_type]
        self._known = gguf.get_tensor_name_map(self.arch, config.num_hidden_layers)
        self._heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}

    def name(self, path: str) -> str:
        """Of the weight of a module, without its ending."""
        found = self._known.get_name(path)
        if found is None:
            raise BaseError(f"llama.cpp's {gguf.MODEL_ARCH_NAMES[self.arch]} has no place for {path!r}", REMEDY)
        return str(found)

    def ordered(self, name: str, rows: Tensor) -> Tensor:
        """[out, ...] rows of q and k, each head's turned pairs side by side; any other tensor as it is."""
        heads = self._heads.get(name.rpartition(".")[2]) if self.arch == MODEL_ARCH.LLAMA else None
        if heads is None:
            return rows
        return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


# ---------------------------------------------------------------- a whole model


def write_gguf(family: Family, path: Path, numbers: Numbers = "float16", name: str = "") -> None:
    """Write the model and its tokenizer as one file.

    A window over the last tokens (mistral, qwen2) is unknown to llama.cpp's architecture: the file's context ends where
    the window would begin to matter.

    Args:
        numbers: of the matrices; vectors stay in float32, and so do rows that q8_0 cannot divide in float16.
        name: `general.name`.

    Raises:
        BaseError: llama.cpp would not compute the same; the error says what.
    """
    if numbers not in get_args(Numbers):
        raise BaseError(f"weights of a GGUF file cannot be {numbers!r}", f"one of: {', '.join(get_args(Numbers))}")
    model: Any = family.anatomy.model
    names = Names(model.config)
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[names.arch])
    writer.add_type(gguf.GGUFType.MODEL)
    if name:
        writer.add_name(name)
    writer.add_file_type(NUMBERS[numbers][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    factors = _describe(writer, model.config, family.anatomy.sizes["vocabulary"], names.arch)
    write_words(writer, family.tokenizer, family.anatomy.sizes["vocabulary"],
                eos_tokens(model, family.tokenizer), model.config.bos_token_id)
    tensors = dict(_tensors(family, names))
    if factors is not None:
        tensors["rope_freqs.weight"] = factors
    _write(writer, path, tensors, numbers)


def _describe(writer: gguf.GGUFWriter, config: Any, vocabulary: int, arch: MODEL_ARCH) -> Tensor | None:
    """Sizes and rotary angles; what divides each rotary frequency, where the model changes them one by one."""
    if config.hidden_act not in ("silu", "swish"):
        raise BaseError(f"the model's activation is {config.hidden_act!r}, and llama.cpp would take silu", REMEDY)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    context = min(config.max_position_embeddings, getattr(config, "sliding_window", None) or 1 << 62)
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(vocabulary)
    writer.add_rope_dimension_count(head)
    rope = config.rope_parameters
    kind, theta = rope.get("rope_type", "default"), rope["rope_theta"]
    writer.add_rope_freq_base(theta)
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise BaseError("the model turns a part of each head only, and llama.cpp would turn the whole", REMEDY)
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "llama3" and arch == MODEL_ARCH.LLAMA:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
        changed, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        return theta ** (-torch.arange(0, head, 2, dtype=torch.float64) / head) / changed.double()
    elif kind != "default":
        raise BaseError(f"the model's rotary angles are scaled by {kind!r}; default, linear and (llama) llama3 can be "
                        "written", REMEDY)
    return None


def _tensors(family: Family, names: Names) -> Iterator[tuple[str, Tensor]]:
    """Every parameter under llama.cpp's name, in its order; a tied head is the embedding, which stands there once."""
    for path, parameter in family.anatomy.model.named_parameters():
        stem, _, ending = path.rpartition(".")
        name = names.name(stem)
        if ending == "bias" and name.rpartition(".")[2] not in BIASES[names.arch]:
            raise BaseError(f"{path!r} is a bias that llama.cpp's {gguf.MODEL_ARCH_NAMES[names.arch]} does not add",
                            "export with --to merged, or train another method")
        yield f"{name}.{ending}", names.ordered(name, parameter.detach())


# ---------------------------------------------------------------- an adapter


def write_gguf_adapter(family: Family, changes: Mapping[str, Change], path: Path, name: str = "") -> None:
    """Write LoRAs, by the paths of their maps, as one file that llama.cpp puts on the base's GGUF file.

    There a file has one alpha, and a LoRA of rank R is scaled by alpha / R. Where that is not a map's own scale (other
    ranks or alphas, rsLoRA), its B makes up for it.

    Raises:
        BaseError: the base is of no architecture that can be written.
    """
    names = Names(family.anatomy.model.config)
    first = next(iter(changes.values()))
    alpha = first.scale * first.a.shape[0]
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[names.arch])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    if name:
        writer.add_name(name)
    writer.add_file_type(LlamaFileType.ALL_F32)
    tensors = {}
    for site, change in changes.items():
        at = names.name(site)
        own = change.scale * change.a.shape[0] / alpha
        tensors[f"{at}.weight.lora_a"] = change.a.detach()
        tensors[f"{at}.weight.lora_b"] = names.ordered(at, change.b.detach()) * own
    _write(writer, path, tensors, "float32")


# ---------------------------------------------------------------- numbers


def _write(writer: gguf.GGUFWriter, path: Path, tensors: Mapping[str, Tensor], numbers: Numbers) -> None:
    """The file, one tensor in memory at a time."""
    kinds = {name: _kind(tensor, numbers) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        shape = gguf.quant_shape_to_byte_shape(tuple(tensor.shape), kinds[name])
        width: Any = np.uint8
        writer.add_tensor_info(name, shape, np.dtype(width), int(np.prod(shape)), raw_dtype=kinds[name])
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors.items():
        writer.write_tensor_data(_numbers(name, tensor, kinds[name]))
    writer.close()


def _kind(tensor: Tensor, numbers: Numbers) -> GGMLQuantizationType:
    if tensor.dim() < 2:
        return GGMLQuantizationType.F32
    if numbers == "q8_0" and tensor.shape[-1] % Q8_BLOCK:
        return GGMLQuantizationType.F16
    return NUMBERS[numbers][0]


def _numbers(name: str, tensor: Tensor, kind: GGMLQuantizationType) -> np.ndarray[Any, Any]:
    values = tensor.float().cpu().contiguous().numpy()
    if kind == GGMLQuantizationType.F16 and (largest := float(np.abs(values).max())) > LARGEST:
        raise BaseError(f"{name} holds {largest:.3g}, and float16 ends at {LARGEST:.0f}", "export with --dtype float32")
    return gguf.quantize(values, kind)
