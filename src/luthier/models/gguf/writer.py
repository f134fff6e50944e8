"""Writes a model, or a LoRA, as one GGUF file for llama.cpp. Read `gguf/archs.py` and `gguf/bpe.py` first.

Most tensors are written unchanged under llama.cpp's names. Some are permuted, or increased by 1, as llama.cpp's
architecture expects (`gguf/archs.py`): the rows of q and k, in biases and in a LoRA's B as well. GPT-2's weights are
transposed. A LoRA on them is not, because A and B are [R, in] and [out, R] on every linear layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import gguf
import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType
from torch import Tensor

from luthier.core.errors import BaseError
from luthier.core.protocols import Family
from luthier.models.decoding import find_eos_tokens
from luthier.models.gguf.archs import TensorNames, write_hyperparameters
from luthier.models.gguf.bpe import write_tokenizer

WeightType = Literal["float32", "float16", "q8_0"]
WEIGHT_TYPES: Mapping[str, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "float32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "float16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
Q8_BLOCK = 32
FLOAT16_MAX = float(np.finfo(np.float16).max)
# In models with these names llama.cpp strips spaces after special tokens, independent of the tokenizer.
RSTRIP_MODEL_NAMES = ("phi-3", "phi3", "modern-bert")


@dataclass(frozen=True)
class LoraDelta:
    """One LoRA: W + scale B A, with A [R, in] and B [out, R]."""

    a: Tensor
    b: Tensor
    scale: float


# ---------------------------------------------------------------- a whole model


def write_gguf(family: Family, path: Path, weight_type: WeightType = "float16", name: str = "") -> None:
    """Write the model and its tokenizer as one file.

    llama.cpp does not support the sliding window of some architectures (mistral, qwen2): the file's context length is
    then the length of the window.

    Args:
        numbers: of the matrices; vectors stay in float32; matrices whose rows q8_0 cannot divide are float16.
        name: `general.name`, omitted where llama.cpp would change the tokenizer because of it.

    Raises:
        BaseError: llama.cpp would compute something else; the error names the difference.
    """
    if weight_type not in get_args(WeightType):
        raise BaseError(f"unknown GGUF weight type {weight_type!r}",
                        f"one of: {', '.join(get_args(WeightType))}")
    model: Any = family.structure.model
    names = TensorNames(model.config)
    writer = gguf.GGUFWriter(None, names.spec.name)
    writer.add_type(gguf.GGUFType.MODEL)
    if name and not any(word in name.lower() for word in RSTRIP_MODEL_NAMES):
        writer.add_name(name)
    writer.add_file_type(WEIGHT_TYPES[weight_type][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    factors = write_hyperparameters(writer, model.config, family.structure.sizes["vocabulary"], names.spec)
    write_tokenizer(writer, family.get_saved_tokenizer(), family.structure.sizes["vocabulary"],
                    find_eos_tokens(model, family.tokenizer) | set(family.chat_format.stop_tokens),
                    model.config.bos_token_id)
    tensors = dict(_list_tensors(family, names))
    if factors is not None:
        tensors["rope_freqs.weight"] = factors
    _write_file(writer, path, tensors, weight_type)


def _list_tensors(family: Family, names: TensorNames) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by llama.cpp's name, in its row order; a tied head is the embedding and is written once."""
    transposed = {f"{path.name}.weight" for path in family.structure.linears if path.transposed}
    for path, parameter in family.structure.model.named_parameters():
        stem, _, ending = path.rpartition(".")
        name = names.map_name(stem)
        if ending == "bias" and name.rpartition(".")[2] not in names.spec.biases:
            raise BaseError(f"{path!r} is a bias that llama.cpp's {names.spec.name} does not add",
                            "export with --to merged, or train another method")
        weight = parameter.detach().T if path in transposed else parameter.detach()
        yield f"{name}.{ending}", names.adjust_norm(name, names.permute_rows(name, weight))


# ---------------------------------------------------------------- an adapter


def write_gguf_adapter(family: Family, deltas: Mapping[str, LoraDelta], path: Path, name: str = "") -> None:
    """Write LoRAs, by the paths of their modules, as one file that llama.cpp applies to the base's GGUF file.

    Such a file has one alpha, and a LoRA of rank R is scaled by alpha / R. Where a module has another scale (other
    ranks or alphas, rsLoRA), its B is multiplied by the quotient.

    Raises:
        BaseError: the base's architecture is not supported.
    """
    names = TensorNames(family.structure.model.config)
    first = next(iter(deltas.values()))
    alpha = first.scale * first.a.shape[0]
    writer = gguf.GGUFWriter(None, names.spec.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    if name:
        writer.add_name(name)
    writer.add_file_type(LlamaFileType.ALL_F32)
    tensors = {}
    for module_path, delta in deltas.items():
        tensor = names.map_name(module_path)
        factor = delta.scale * delta.a.shape[0] / alpha
        tensors[f"{tensor}.weight.lora_a"] = delta.a.detach()
        tensors[f"{tensor}.weight.lora_b"] = names.permute_rows(tensor, delta.b.detach()) * factor
    _write_file(writer, path, tensors, "float32")


# ---------------------------------------------------------------- tensors


def _write_file(writer: gguf.GGUFWriter, path: Path, tensors: Mapping[str, Tensor], weight_type: WeightType) -> None:
    """Write the file with one tensor in memory at a time."""
    kinds = {name: _select_type(tensor, weight_type) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        shape = gguf.quant_shape_to_byte_shape(tuple(tensor.shape), kinds[name])
        width: Any = np.uint8
        writer.add_tensor_info(name, shape, np.dtype(width), int(np.prod(shape)), raw_dtype=kinds[name])
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors.items():
        writer.write_tensor_data(_encode_tensor(name, tensor, kinds[name]))
    writer.close()


def _select_type(tensor: Tensor, weight_type: WeightType) -> GGMLQuantizationType:
    if tensor.dim() < 2:
        return GGMLQuantizationType.F32
    if weight_type == "q8_0" and tensor.shape[-1] % Q8_BLOCK:
        return GGMLQuantizationType.F16
    return WEIGHT_TYPES[weight_type][0]


def _encode_tensor(name: str, tensor: Tensor, kind: GGMLQuantizationType) -> np.ndarray[Any, Any]:
    values = tensor.float().cpu().contiguous().numpy()
    if kind == GGMLQuantizationType.F16 and (largest := float(np.abs(values).max())) > FLOAT16_MAX:
        raise BaseError(f"{name} holds {largest:.3g}, and float16 ends at {FLOAT16_MAX:.0f}",
                        "export with --dtype float32")
    return gguf.quantize(values, kind)
