"""The run folder: what a training leaves behind, and all that later verbs read. See DESIGN section 7.

    recipe.yaml  adapter_config.json + adapter_model.safetensors (or model.safetensors)  tokenizer files
    metrics.jsonl  data_report.json  results.json  answers.jsonl  loss.png  lengths.png  checkpoints/  README.md
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from luthier.core.errors import RunError
from luthier.training.os_errors import translate_os_errors

ADAPTER_HUB = frozenset({"hidden_size", "model_class", "model_type", "model_name"})  # keys of the library `adapters`


class Run:
    """A run folder, made by a training, by hand or by PEFT."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def recipe(self) -> dict[str, Any]:
        """recipe.yaml without its `provenance`; empty where the folder has none."""
        file = self.path / "recipe.yaml"
        raw = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else {}
        return {key: value for key, value in raw.items() if key != "provenance"}

    @property
    def provenance(self) -> dict[str, Any]:
        """What recipe.yaml holds besides settings: versions, the base, digests; empty where the folder has none."""
        file = self.path / "recipe.yaml"
        raw = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else {}
        return dict(raw.get("provenance") or {})

    @property
    def metrics(self) -> list[dict[str, float]]:
        """One dictionary a line of metrics.jsonl."""
        file = self.path / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def results(self) -> dict[str, Any]:
        file = self.path / "results.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    @property
    def adapter(self) -> dict[str, Any] | None:
        """PEFT's adapter_config.json, if the folder holds an adapter."""
        file = self.path / "adapter_config.json"
        return read_adapter_config(file) if file.exists() else None

    def existing(self) -> Run:
        """Itself, or a `RunError` where there is no such run."""
        if not self.path.is_dir():
            near = sorted(str(p) for p in self.path.parent.glob("*") if p.is_dir()) if self.path.parent.is_dir() else []
            raise RunError(f"there is no run folder {str(self.path)!r}",
                           f"runs beside it: {', '.join(near[:8])}" if near else "train one: luthier train RECIPE.yaml")
        if not any((self.path / name).exists() for name in ("recipe.yaml", "adapter_config.json", "config.json")):
            raise RunError(f"{str(self.path)!r} is not a run folder: it has no recipe.yaml, adapter_config.json or "
                           "config.json", "name the folder that `luthier train` printed")
        return self

    def vacant(self) -> Run:
        """Itself, or a `RunError` where the folder already holds a run."""
        if (self.path / "recipe.yaml").exists():
            raise RunError(f"{str(self.path)!r} already holds a run",
                           "go on with it (--resume), or name another folder (output_dir=NAME)")
        return self

    def begin(self, recipe: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
        """Write recipe.yaml. Raises `RunError` where the folder already holds a run or cannot be written."""
        self.vacant()
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.write("recipe.yaml", yaml.safe_dump({**recipe, "provenance": dict(provenance)}, sort_keys=False,
                                                     allow_unicode=True))
        except OSError as error:
            raise RunError(f"the run folder {str(self.path)!r} cannot be written: {error.strerror}",
                           "free some space, or name another folder (output_dir=NAME)") from error

    def write(self, name: str, content: str | Mapping[str, Any]) -> Path:
        """Write a text or JSON file of the run, whole or not at all. Raises `RunError` where the disk is full."""
        text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        file, temporary = self.path / name, self.path / f".{name}.{os.getpid()}"
        with translate_os_errors(file):
            try:
                temporary.write_text(text, encoding="utf-8")
                temporary.replace(file)
            finally:
                temporary.unlink(missing_ok=True)
        return file

    def write_lines(self, name: str, rows: Iterable[Mapping[str, Any]]) -> Path:
        return self.write(name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_adapter_config(file: Path) -> dict[str, Any]:
    """PEFT's settings of an adapter. Raises `RunError` for a damaged file and for one of another library."""
    again = "copy the folder again, or save the adapter again"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise RunError(f"{str(file)!r} is no JSON: {error}", again) from None
    if not isinstance(found, dict):
        raise RunError(f"{str(file)!r} holds a {type(found).__name__}, and an adapter's settings are a mapping", again)
    if "peft_type" not in found and "config" in found and ADAPTER_HUB & found.keys():
        raise RunError(f"{str(file)!r} is of the library `adapters` (AdapterHub), whose format is not PEFT's",
                       "use it with that library; a LoRA can be merged there (model.merge_adapter), and the saved "
                       "model taken as the base")
    if not isinstance(found.get("peft_type"), str):
        raise RunError(f"{str(file)!r} names no peft_type, so nobody knows what was trained",
                       "give a run of Luthier, or an adapter of PEFT")
    return found


def compute_digest(path: Path) -> str:
    """sha256 of a file, or of the names and digests of a folder's files."""
    found = hashlib.sha256()
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            found.update(f"{file.relative_to(path)} {compute_digest(file)}\n".encode())
    else:
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                found.update(block)
    return found.hexdigest()
