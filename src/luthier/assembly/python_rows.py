"""Arguments of the verbs in Python: rows in place of paths, and `pathlib.Path` in place of text.

    @accepts_python_values
    def train(recipe, **settings): ...        # sees paths, as from the command line

Rows are written to a temporary folder, which the verb reads by path. A training run moves them into its own folder
(`keep_rows`), so that `evaluate` and `--resume` find them: run/data/train.jsonl. Read `data/python_rows.py` first.
"""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import Any, ParamSpec, TypeVar

from luthier.assembly.recipe import Recipe
from luthier.core.digests import compute_path_sha256
from luthier.core.errors import RunError
from luthier.data.config import Source
from luthier.data.python_rows import is_dataset_dict, is_rows, is_source, list_splits, write_rows
from luthier.distributed import process_group
from luthier.training.os_errors import translate_os_errors
from luthier.training.run_folder import Run

P = ParamSpec("P")
R = TypeVar("R")

FOLDER = "data"  # of a run, with the rows that were given in Python
STAGING = "luthier-rows-"  # prefix of the temporary folder
PARTS = ("train", "eval", "test")


def accepts_python_values(verb: Callable[P, R]) -> Callable[P, R]:
    """A verb whose recipe, settings and `data` may hold rows and `pathlib.Path`."""
    signature = inspect.signature(verb)

    @wraps(verb)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        given = signature.bind(*args, **kwargs)
        with TemporaryDirectory(prefix=STAGING) as folder:
            staging = _Staging(Path(folder))
            for name, value in given.arguments.items():
                kind = signature.parameters[name].kind
                if kind is inspect.Parameter.VAR_KEYWORD or (name == "recipe" and isinstance(value, Mapping)):
                    given.arguments[name] = {key: staging.convert(inner, key) for key, inner in value.items()}
                elif name in ("data", "retention_data"):
                    given.arguments[name] = staging.convert_data(value, name)
            return verb(*given.args, **given.kwargs)

    return call


class _Staging:
    """Replaces values of Python by text; rows are written to `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def convert(self, value: Any, name: str) -> Any:
        """`name`: the dotted name of the setting, such as `data`, `data.test`, `ppo.data` or `method`."""
        parts = name.split(".")
        if "data" in parts:
            rest = parts[parts.index("data") + 1:]
            if not rest:
                return self.convert_data(value, name)
            if rest[-1] in PARTS:
                return self._convert_source(value, name)
        if isinstance(value, PurePath):
            return str(value)
        if isinstance(value, Mapping):
            return {key: self.convert(inner, f"{name}.{key}") for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return type(value)([self.convert(inner, name) for inner in value])
        return value

    def convert_data(self, value: Any, name: str) -> Any:
        """The value of `data`: rows to train on, or a mapping of parts and settings."""
        value = list_splits(value) if is_dataset_dict(value) else value
        if isinstance(value, Mapping) and not is_source(value):
            return {key: self.convert(inner, f"{name}.{key}") for key, inner in value.items()}
        return self._convert_source(value, name)

    def _convert_source(self, value: Any, name: str) -> Any:
        if is_rows(value):
            part = name.rpartition(".")[2]
            return self._write(value, part if part in PARTS else "train", name)
        if is_source(value):
            return {**value, "path": self._convert_source(value["path"], name)}
        if isinstance(value, list | tuple):
            return [self._convert_source(inner, name) for inner in value]
        return str(value) if isinstance(value, PurePath) else value

    def _write(self, rows: Any, part: str, name: str) -> str:
        numbers = [""] + [f"-{number}" for number in range(2, 10_000)]
        file = next(file for number in numbers if not (file := self._folder / f"{part}{number}.jsonl").exists())
        write_rows(rows, file, name)
        return str(file)


# ---------------------------------------------------------------- in the folder of a run


def keep_rows(recipe: Recipe, run: Run, resume: bool) -> Recipe:
    """Copy staged rows into the run's folder, and let the recipe name them there.

    Args:
        resume: the folder has the rows already, and they must be the same.

    Raises:
        RunError: a resumed run was given other rows, or the folder cannot be written.
    """
    def keep(source: Source) -> Source:
        staged = Path(source.path)
        if not staged.parent.name.startswith(STAGING):
            return source
        kept, is_first = (run.path / FOLDER / staged.name).absolute(), process_group.get_rank() == 0
        if resume and kept.exists() and compute_path_sha256(kept) != compute_path_sha256(staged):
            raise RunError(f"the run was trained on other rows than these: {str(kept)!r} differs",
                           "give the same rows or none, or start another run (output_dir=NAME)")
        if is_first and not (resume and kept.exists()):
            _copy_atomically(staged, kept)
        return source.model_copy(update={"path": str(kept)})

    kept = _map_sources(recipe, keep)
    process_group.barrier()  # the other ranks read what the first has written
    return kept


def find_kept_rows(recipe: Recipe, run: Run) -> Recipe:
    """The recipe with the rows in the run's own folder found again, if the folder was moved or copied."""
    def find(source: Source) -> Source:
        path, moved = Path(source.path), (run.path / FOLDER / Path(source.path).name).absolute()
        if path.is_absolute() and path.parent.name == FOLDER and not path.exists() and moved.is_file():
            return source.model_copy(update={"path": str(moved)})
        return source

    return _map_sources(recipe, find)


def _map_sources(recipe: Recipe, change: Callable[[Source], Source]) -> Recipe:
    data = recipe.data
    parts: dict[str, Any] = {"train": tuple(map(change, data.train))}
    parts |= {part: change(source) for part, source in (("eval", data.eval), ("test", data.test))
              if isinstance(source, Source)}
    changed = {part: value for part, value in parts.items() if value != dict(data)[part]}
    return recipe.model_copy(update={"data": data.model_copy(update=changed)}) if changed else recipe


def _copy_atomically(source: Path, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    with translate_os_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(source, temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
