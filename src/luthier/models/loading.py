"""From a Transformers folder to a loaded model and its tokenizer. Read `model_folder.py` first.

Every base becomes an ordinary Transformers folder, and one short function loads such a folder::

    name --resolve_name--> path or hub id --prepare_folder--> Transformers folder --load_model--> (model, tokenizer)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

from luthier.core.errors import BaseError
from luthier.models import architectures
from luthier.models.architectures import Architecture, detect_architecture
from luthier.models.hf_attributes import get_optional
from luthier.models.hf_logging import check_weights_fit
from luthier.models.image_processor import ImageProcessor
from luthier.models.model_config import ModelConfig
from luthier.models.model_folder import prepare_folder, translate_errors
from luthier.models.quantization import quantize


def load_model(config: ModelConfig, with_mlm_head: bool = False) -> tuple[Any, Any]:
    """The base in evaluation mode on the config's device, and its tokenizer (for images: `ImageProcessor`).

    Memory peaks near one copy of the weights: they are mapped from the file and copied tensor by tensor.

    Args:
        with_mlm_head: load an encoder with its masked-language-modeling head.

    Raises:
        BaseError: the folder cannot be loaded, or an encoder's files hold no such head.
    """
    device, path = resolve_device(config.device), prepare_folder(config)
    # Weights that will be quantized keep the dtype of the file until they are quantized.
    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    with translate_errors(config, path):
        model_config = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
        architecture = _require_architecture(config, model_config)
        tokenizer = _load_tokenizer(config, path, architecture)
        with_mlm_head = with_mlm_head and architecture == "encoder"
        auto_class: Any = AutoModelForMaskedLM if with_mlm_head else architectures.AUTO_CLASSES[architecture]
        options = {} if with_mlm_head else architectures.get_load_options(model_config, architecture)
        loaded: Any = auto_class.from_pretrained(
            path, config=model_config, dtype="auto" if dtype is None or config.quantize != "none" else dtype,
            use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True,
            trust_remote_code=config.trust_remote_code, **options)
    model, info = loaded
    if architecture in ("encoder", "vision"):
        info["unexpected_keys"] = {key for key in info["unexpected_keys"]
                                   if not architectures.is_ignored_weight(key, model.base_model_prefix)}
    if architecture == "causal":
        architectures.ignore_classifier_head(model, info)
    if with_mlm_head and (missing := architectures.list_missing_head_weights(model, info["missing_keys"])):
        raise BaseError(f"base {config.name_or_path!r}: its files hold no masked-language-modeling head "
                        f"({missing[0]} is missing)",
                        "choose an encoder whose files hold one, such as the model that this one was made from")
    check_weights_fit(config.name_or_path, info)
    if model.dtype == torch.float64:
        model.set_experts_implementation("eager")  # the grouped matrix product of experts does not support float64
    quantize(model, config.quantize, dtype, device)
    return model.to(device), tokenizer


def load_tokenizer(config: ModelConfig) -> Any:
    """The base's tokenizer, without loading the weights."""
    path = prepare_folder(config)
    with translate_errors(config, path):
        model_config = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
        return _load_tokenizer(config, path, _require_architecture(config, model_config))


def get_context_length(config: ModelConfig) -> int:
    """The number of positions in the base's config; practically unlimited where the config has none."""
    path = prepare_folder(config)
    with translate_errors(config, path):
        model_config = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code).get_text_config()
        return int(get_optional(model_config, "max_position_embeddings") or 2**62)


def _require_architecture(config: ModelConfig, model_config: Any) -> Architecture:
    architecture = detect_architecture(model_config)
    if architecture is None:
        raise BaseError(f"base {config.name_or_path!r} ({model_config.model_type}) is "
                        "neither a causal language model nor an "
                        "encoder, a sequence-to-sequence or a vision model", "choose another base, such as 'smollm2'")
    return architecture


def _load_tokenizer(config: ModelConfig, path: Path, architecture: Architecture) -> Any:
    if architecture == "vision":
        return ImageProcessor.from_pretrained(path)
    return AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code)


def resolve_device(name: str) -> torch.device:
    """The device that `name` refers to on this machine; `auto` is the first available of cuda, mps, cpu."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, is_available in available.items() if is_available)
    if not available[name]:
        raise BaseError(f"device {name!r} is not available on this machine", "set `device` to auto or cpu")
    return torch.device(name)
