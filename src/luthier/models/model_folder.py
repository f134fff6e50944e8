"""From a base model's name to a checked Transformers folder on this machine. Read `model_names.py` first; `loading.py`
continues.

A GGUF file is converted to a folder once, in the cache; a hub model is downloaded. So every check of a folder (weights
present, no pickle, files complete) applies to every base.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING

from luthier.core.digests import compute_files_sha256
from luthier.core.errors import BaseError, LuthierError
from luthier.models.gguf.reader import convert_cached
from luthier.models.hf_logging import silence_transformers, summarize_error
from luthier.models.model_config import ModelConfig
from luthier.models.model_names import INDEX, WEIGHTS, download_model, resolve_name
from luthier.models.modified_folder import prepare_modified_folder

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def prepare_folder(config: ModelConfig) -> Path:
    """The Transformers folder of a base: converted from GGUF or downloaded if necessary, checked, and modified where
    the config asks for surgery."""
    path = resolve_name(config.name_or_path)
    if isinstance(path, str):
        path = download_model(path, config.revision)
    elif path.is_file():
        path = convert_cached(path)
    _check_folder(path, config)
    if config.surgery is None:
        return path
    if config.trust_remote_code:
        raise BaseError(f"base {config.name_or_path!r}: model.surgery does not support a base with its own Python code",
                        "omit model.surgery, or set trust_remote_code: false")
    with translate_errors(config, path):
        return prepare_modified_folder(path, config.name_or_path, compute_fingerprint(path), config.surgery)


def _check_folder(path: Path, config: ModelConfig) -> None:
    """All checks of a folder that need no weights."""
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise BaseError(f"base {config.name_or_path!r} is an adapter, not a model", "give the base that it was "
                                                                                        "trained on")
        if files := sorted(path.glob("*.gguf")):
            raise BaseError(f"base {config.name_or_path!r}: the folder holds GGUF files and no config.json",
                            f"give the file itself, for example {files[0]}")
        raise BaseError(f"base {config.name_or_path!r}: the folder {path} has no config.json",
                        "give a Transformers model folder")
    if (path / "adapter_config.json").is_file():
        raise BaseError(f"base {config.name_or_path!r} contains an adapter, which Transformers would load implicitly",
                        f"merge the two first: luthier export {config.name_or_path} --to merged")
    model_config = _read_json(path / "config.json")
    model_type = model_config.get("model_type")
    if model_type not in CONFIG_MAPPING and not ("auto_map" in model_config and config.trust_remote_code):
        if "auto_map" in model_config:
            raise _remote_code_error(config.name_or_path)
        raise BaseError(f"base {config.name_or_path!r}: the installed transformers does not support the model type "
                        f"{model_type!r}",
                        "upgrade transformers, or choose another base")
    if not (path / WEIGHTS).is_file() and not (path / INDEX).is_file():
        if pickles := sorted(file.name for pattern in PICKLES for file in path.glob(pattern)):
            raise BaseError(f"base {config.name_or_path!r} has only pickle weights ({pickles[0]}), and pickle is "
                            f"never loaded",
                            "convert them to safetensors (on the hub: the Space `safetensors/convert`)")
        raise BaseError(f"base {config.name_or_path!r}: {path} has neither {WEIGHTS} nor {INDEX}",
                        "give a folder with safetensors weights (pickle is never loaded)")
    for shard in list_weight_files(path):
        try:
            with safe_open(shard, framework="pt"):
                pass
        except (SafetensorError, FileNotFoundError) as error:
            raise BaseError(f"base {config.name_or_path!r}: {shard} is missing or damaged ({summarize_error(error)})",
                            "copy or download the file again") from error


def list_weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model folder."""
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    named = _read_json(path / INDEX).get("weight_map")
    names = sorted({str(name) for name in named.values()}) if isinstance(named, dict) else []
    if not names or any(Path(name).name != name for name in names):
        wrong = next((name for name in names if Path(name).name != name), "nothing")
        raise BaseError(f"{path / INDEX} names {wrong!r} as a weight file; a weight file lies in that folder",
                        "copy or download the file again")
    return [path / name for name in names]


def count_parameters(config: ModelConfig) -> int:
    """How many weights the base's files hold, read from their headers without loading the weights."""
    count = 0
    for shard in list_weight_files(prepare_folder(config)):
        with safe_open(shard, framework="pt") as file:
            count += sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118  not a dict
    return count


def compute_fingerprint(path: Path) -> str:
    """sha256 over all bytes of a folder's config and weights, independent of its location and age."""
    return compute_files_sha256((file.name, file) for file in [path / "config.json", *list_weight_files(path)])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BaseError(f"{path} is not valid JSON ({error})", "copy or download the file again") from error
    return content


@contextmanager
def translate_errors(config: ModelConfig, path: Path) -> Iterator[None]:
    """Silences Transformers, and raises its errors as `BaseError`."""
    try:
        with silence_transformers():
            yield
    except LuthierError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if "trust_remote_code" in str(error):
            raise _remote_code_error(config.name_or_path) from error
        raise BaseError(f"base {config.name_or_path!r} cannot be loaded from {path} ({summarize_error(error)})",
                        "fix or replace the folder") from error


def _remote_code_error(name: str) -> BaseError:
    return BaseError(f"base {name!r} needs its own Python code, and trust_remote_code is false",
                     f"read that code; if you trust it, set model.trust_remote_code=true, or for a run add "
                     f"--allow-code {name} (in Python: allow_code=[{name!r}])")
