"""The identity of a base model: digests of its files, its absolute path, its hub id. Read `model_folder.py` first.

| digest      | of                                                               | if different                       |
|-------------|------------------------------------------------------------------|------------------------------------|
| `weights`   | all bytes of all safetensors files                               | a different base: an error         |
| `config`    | config.json, and the Python files next to it if they may run     | a different base: an error         |
| `gguf`      | all bytes of a GGUF file, which contains all of the above        | a different base: an error         |
| `tokenizer` | tokenizer, chat template, preprocessor and pooling files         | reported                           |

`_name_or_path` and `transformers_version` in config.json are not included: they name the origin of a folder. The
changes of `model.surgery` are not included either: they are part of the recipe.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.core.digests import compute_file_sha256, compute_files_sha256, compute_json_sha256
from luthier.models.model_config import ModelConfig
from luthier.models.model_folder import list_weight_files, prepare_folder
from luthier.models.model_names import resolve_name

DECISIVE_DIGESTS = ("weights", "config", "gguf")  # a base with another of these digests is a different base
HUB_IDS: Mapping[str, str] = {  # the hub ids of the embedded bases
    "smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "minilm": "sentence-transformers/all-MiniLM-L6-v2",
}
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.jinja", "*tokens*.json",
                   "preprocessor_config.json",
         "processor_config.json", "1_Pooling/config.json")
PROVENANCE_KEYS = ("_name_or_path", "transformers_version")  # keys of config.json without effect on outputs
HUB_SNAPSHOT = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})$")


@dataclass(frozen=True)
class Identity:
    """The identity of a base model, independent of its location.

    Args:
        digests: name of the digest -> 64 hexadecimal digits; see the table above.
        path: absolute path of its folder or GGUF file on this machine.
        upstream: its hub id, if known.
        revision: its commit on the hub, if known.
    """

    digests: Mapping[str, str]
    path: Path
    upstream: str | None = None
    revision: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {"path": str(self.path), "upstream": self.upstream, "revision": self.revision,
                "sha256": dict(self.digests)}


def identify_base(config: ModelConfig) -> Identity:
    """Find a base and compute its digests, without loading weights. Raises `BaseError` if there is no such base."""
    found = resolve_name(config.name_or_path)
    if isinstance(found, Path) and found.is_file():
        return Identity({"gguf": compute_file_sha256(found)}, found.absolute(), HUB_IDS.get(config.name_or_path))
    path = prepare_folder(config.model_copy(update={"surgery": None})).absolute()
    hub = HUB_SNAPSHOT.search(path.as_posix())
    upstream = HUB_IDS.get(config.name_or_path) or (found if isinstance(found, str) else
                                             f"{hub['owner']}/{hub['name']}" if hub else None)
    return Identity(compute_digests(path, config.trust_remote_code), path, upstream, hub["commit"] if hub else None)


def compute_digests(path: Path, code: bool = False) -> dict[str, str]:
    """The digests of a Transformers folder. `code`: include its Python files, because they may run."""
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    plain = compute_json_sha256({key: value for key, value in config.items() if key not in PROVENANCE_KEYS})
    python = compute_files_sha256((file.name, file) for file in sorted(path.glob("*.py"))) if code else ""
    texts = sorted({file for pattern in TOKENIZER_FILES for file in path.glob(pattern) if file.is_file()})
    return {"weights": compute_files_sha256((file.name, file) for file in list_weight_files(path)),
            "config": compute_json_sha256([plain, python]) if python else plain,
            "tokenizer": compute_files_sha256((file.relative_to(path).as_posix(), file) for file in texts)}


def is_local_path(name: str) -> bool:
    """Whether a base's name is a path on this machine rather than an alias or a hub id."""
    return name not in HUB_IDS and isinstance(resolve_name(name), Path)


def get_public_name(config: ModelConfig, upstream: str | None = None) -> str:
    """The name of a base on other machines: its hub id if it has one, otherwise the name of its folder or file.

    >>> get_public_name(ModelConfig(name_or_path="smollm2"))
    'HuggingFaceTB/SmolLM2-135M-Instruct'
    >>> get_public_name(ModelConfig(name_or_path="/home/me/bases/tiny/"))
    'tiny'
    """
    if upstream or config.name_or_path in HUB_IDS:
        return upstream or HUB_IDS[config.name_or_path]
    path = Path(config.name_or_path).expanduser()
    if hub := HUB_SNAPSHOT.search(path.absolute().as_posix()):
        return f"{hub['owner']}/{hub['name']}"
    if path.is_absolute() or path.exists() or config.name_or_path.startswith((".", "~")) or len(path.parts) > 2:
        return path.absolute().name if path.name in ("", "..") else path.name
    return config.name_or_path
