"""Converts a GGUF file to a Transformers folder, once, in the cache. `model_folder.py` continues."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from luthier.core.digests import compute_file_sha256, get_cache_folder
from luthier.core.errors import BaseError
from luthier.core.locks import staging_folder
from luthier.models.hf_logging import check_weights_fit, silence_transformers, summarize_error

# raise it when `convert_gguf` writes something else: folders made by older ones are then left unused
CONVERTER_VERSION = "2"
DIGEST_FILE = ".sha256.json"  # in every folder of the cache: the digests of its weights as they were written


def convert_cached(gguf: Path) -> Path:
    """The folder converted from this GGUF file: found in the cache by the file's digest, or written now."""
    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise BaseError(f"{gguf} is not a GGUF file", "give a .gguf file or a Transformers folder")
    folder = get_cache_folder() / f"{gguf.stem}-{compute_file_sha256(gguf)[:32]}-{CONVERTER_VERSION}"
    return build_once(folder, lambda to: convert_gguf(gguf, to))


def build_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """The cache folder `folder`, written by `make(to)` if it does not exist, atomically. Raises `BaseError` if its
    weights are not those that were written."""
    if folder.is_dir():
        _check_unchanged(folder)
        return folder
    with staging_folder(folder.parent) as temporary:
        ready = temporary / "model"
        make(ready)
        (ready / DIGEST_FILE).write_text(json.dumps(_digest_weights(ready)), encoding="utf-8")
        try:
            os.replace(ready, folder)
        except OSError:
            # Another process was first. Its folder has the same content.
            if not folder.is_dir():
                raise
    return folder


def _digest_weights(folder: Path) -> dict[str, str]:
    return {file.name: compute_file_sha256(file) for file in sorted(folder.glob("*.safetensors"))}


def _check_unchanged(folder: Path) -> None:
    digest_file = folder / DIGEST_FILE
    if not digest_file.is_file() or json.loads(digest_file.read_text(encoding="utf-8")) != _digest_weights(folder):
        raise BaseError(f"the weights in the cache folder {folder} are not those that were written there (sha256)",
                        "delete that folder; it will be written again")


def convert_gguf(gguf: Path, to: Path) -> None:
    """Write a GGUF file as a Transformers folder: float32 safetensors, config, tokenizer, chat template."""
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        with silence_transformers(), redirect_stderr(io.StringIO()):  # its progress bar cannot be disabled
            config = AutoConfig.from_pretrained(**source)
            tokenizer = AutoTokenizer.from_pretrained(**source)
            config.dtype = torch.float32
            with torch.device("meta"):
                bare = AutoModelForCausalLM.from_config(config)
            # Not `from_pretrained`: it needs one more package and marks the model as quantized.
            tensors = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=bare)["tensors"]
            missing, unexpected = bare.load_state_dict(tensors, strict=False, assign=True)
            bare.tie_weights()
    except Exception as error:  # the parser does not validate the file, so a damaged one can raise any error
        raise BaseError(f"{gguf} cannot be read as a causal language model ({summarize_error(error)})",
                        "copy or download it again; if it is complete, transformers does not support its "
                        "architecture") from error
    empty = {name for name in missing if bare.get_parameter(name).is_meta}  # a tied head is not on meta
    check_weights_fit(str(gguf), {"missing_keys": empty, "unexpected_keys": unexpected, "mismatched_keys": ()})
    with silence_transformers():
        bare.float().save_pretrained(to)
        tokenizer.save_pretrained(to)
