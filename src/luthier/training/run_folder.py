"""The run folder: what a training run writes, and all that later commands read. Read `core/errors.py` first.

    recipe.yaml  adapter_config.json + adapter_model.safetensors (or model.safetensors)  tokenizer files
    metrics.jsonl  data_report.json  results.json  answers.jsonl  loss.png  lengths.png  checkpoints/  README.md
"""

from __future__ import annotations

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
    """A run folder, written by a training run, by hand or by PEFT. The properties read the files at every access."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def recipe(self) -> dict[str, Any]:
        """recipe.yaml without its `provenance`; empty if the folder has none."""
        file = self.path / "recipe.yaml"
        raw = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else {}
        return {key: value for key, value in raw.items() if key != "provenance"}

    @property
    def provenance(self) -> dict[str, Any]:
        """Versions, base model and digests from recipe.yaml; empty if the folder has none."""
        file = self.path / "recipe.yaml"
        raw = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else {}
        return dict(raw.get("provenance") or {})

    @property
    def metrics(self) -> list[dict[str, float]]:
        """One dictionary per line of metrics.jsonl."""
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

    def require_exists(self) -> Run:
        """Returns itself. Raises `RunError` if there is no such run."""
        if not self.path.is_dir():
            near = sorted(str(p) for p in self.path.parent.glob("*") if p.is_dir()) if self.path.parent.is_dir() else []
            raise RunError(f"run folder {str(self.path)!r} not found",
                           f"runs in the same folder: {', '.join(near[:8])}" if near
                           else "train one: luthier train RECIPE.yaml")
        if not any((self.path / name).exists() for name in ("recipe.yaml", "adapter_config.json", "config.json")):
            raise RunError(f"{str(self.path)!r} is not a run folder: it has no recipe.yaml, adapter_config.json or "
                           "config.json", "name the folder that `luthier train` printed")
        return self

    def require_vacant(self) -> Run:
        """Returns itself. Raises `RunError` if the folder already holds a run."""
        if os.path.exists(self.path / "recipe.yaml"):  # `Path.exists` raises for a name that is too long
            raise RunError(f"{str(self.path)!r} already holds a run",
                           "continue it (--resume), or name another folder (output_dir=NAME)")
        return self

    def create(self, recipe: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
        """Write recipe.yaml. Raises `RunError` if the folder holds a run or cannot be written."""
        self.require_vacant()
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.write("recipe.yaml", yaml.safe_dump({**recipe, "provenance": dict(provenance)}, sort_keys=False,
                                                     allow_unicode=True))
        except OSError as error:
            raise RunError(f"the run folder {str(self.path)!r} cannot be written: {error.strerror}",
                           "free some space, or name another folder (output_dir=NAME)") from error

    def write(self, name: str, content: str | Mapping[str, Any]) -> Path:
        """Write a text or JSON file of the run atomically. Raises `RunError` if the disk is full."""
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
        raise RunError(f"{str(file)!r} is not valid JSON: {error}", again) from None
    if not isinstance(found, dict):
        raise RunError(f"{str(file)!r} holds a {type(found).__name__}; adapter settings are a mapping", again)
    if "peft_type" not in found and "config" in found and ADAPTER_HUB & found.keys():
        raise RunError(f"{str(file)!r} is in the format of the library `adapters` (AdapterHub), not of PEFT",
                       "use it with that library; a LoRA can be merged there (model.merge_adapter), and the saved "
                       "model used as the base model")
    if not isinstance(found.get("peft_type"), str):
        raise RunError(f"{str(file)!r} has no peft_type, so the method is unknown",
                       "give a run of Luthier or a PEFT adapter")
    return found
