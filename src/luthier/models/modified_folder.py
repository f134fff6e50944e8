"""The Transformers folder of a modified base model, written once to the cache. Read `surgery.py` first.

A modified base is saved as an ordinary Transformers folder, and all later steps load that folder like any other.
Therefore runs reopen, merge and export as usual, every method can train on it, and PEFT finds it by its path. If the
cache has been emptied, the recipe writes the same folder again.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from luthier.core.digests import get_cache_folder
from luthier.core.errors import BaseError
from luthier.models.architectures import detect_architecture
from luthier.models.gguf.reader import build_once
from luthier.models.hf_logging import check_weights_fit
from luthier.models.surgery import SurgeryConfig, compute_probe_logits, modify_model

FORMAT_VERSION = "2"  # increase it when `modify_model` changes its results: folders of older versions are then not used
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.jinja", "*tokens*.json",
                   "generation_config.json")


def prepare_modified_folder(path: Path, name: str, fingerprint: str, surgery: SurgeryConfig) -> Path:
    """The folder of the modified base, taken from the cache or written now.

    Args:
        path: the base's own folder.
        name: the base's name in the recipe.
        fingerprint: of the base's weights.

    Raises:
        BaseError: the base is no causal language model, or its outputs differ after saving and loading.
        RecipeError: the changes do not fit the base.
    """
    digest = hashlib.sha256(f"{fingerprint} {surgery.model_dump_json()}".encode())
    for file in sorted({file for pattern in TOKENIZER_FILES for file in path.glob(pattern)}):
        digest.update(file.name.encode() + file.read_bytes())
    folder = get_cache_folder() / f"{path.name}-{digest.hexdigest()[:32]}-{FORMAT_VERSION}"
    return build_once(folder, lambda to: _write_modified_folder(path, name, to, surgery))


def _write_modified_folder(path: Path, name: str, to: Path, surgery: SurgeryConfig) -> None:
    config = AutoConfig.from_pretrained(path)
    if detect_architecture(config) != "causal" or config.get_text_config() is not config:
        raise BaseError(f"base {name!r} ({config.model_type}): model.surgery supports plain causal language models "
                        "only", "omit model.surgery, or choose another base")
    model = _load(path, name)
    tokenizer = AutoTokenizer.from_pretrained(path)
    modify_model(model, tokenizer, surgery)
    model.save_pretrained(to)
    tokenizer.save_pretrained(to)
    if not torch.equal(compute_probe_logits(_load(to, name)), compute_probe_logits(model)):
        raise BaseError(f"base {name!r} ({config.model_type}): outputs differ after the modified model is saved and "
                        "reloaded; this architecture derives layer behavior from the layer index in an unsupported way",
                        "omit model.surgery.expand_layers and drop_layers, or choose another base")


def _load(path: Path, name: str) -> Any:
    loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto", use_safetensors=True,
                                                       ignore_mismatched_sizes=True, output_loading_info=True)
    model, info = loaded
    check_weights_fit(name, info)
    if model.dtype == torch.float64:
        model.set_experts_implementation("eager")  # the grouped matrix product of experts does not support float64
    return model.eval()
