"""The verb `predict`: what a run says of new rows. Read `assembly/prediction.py` first.

Rows need no labels. Each row of the data gives one line of the result, in the same order; a row that cannot be read
gives a line with `error`. With a file as the result, an interrupted call continues where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from luthier import assembly
from luthier.assembly.prediction import build_predictor
from luthier.assembly.python_rows import accepts_python_values
from luthier.assembly.run_io import open_run
from luthier.core.consent import accepts_consent
from luthier.core.digests import compute_path_sha256
from luthier.core.errors import RunError
from luthier.reporting.progress import Progress, print_line, status
from luthier.training.run_folder import Run

CHUNK = 128  # rows that are predicted and written together


@accepts_python_values
@accepts_consent
def predict(run: Run | Path | str, data: Any, *, out: Path | str | None = None, max_samples: int | None = None,
            max_new_tokens: int = 256, quiet: bool = False, base_model: Path | str | None = None,
            allow_code: Sequence[str] = (), **settings: Any) -> list[dict[str, Any]]:
    """Predict every row. Returns one dictionary for each, in the order of the rows; `assembly/prediction.py` has a
    table of what they hold.

    Args:
        run: a run folder of `train`, or a PEFT adapter.
        data: a path, a list of dictionaries, a `datasets.Dataset` or a DataFrame.
        out: a `.jsonl` file for the predictions, or a `.npy` file for embeddings. An unfinished `.jsonl` of the same
            run and rows is continued.
        max_samples: only the first rows.
        max_new_tokens: maximum length of an answer.
        base_model: where the base is now, if it was moved.
        allow_code: base models whose own code may run (`core/consent.py`).
        settings: they override the run's recipe, such as ``**{"data.columns": {"text": "review"}}``.

    Raises:
        RunError: `out` holds other predictions.
        RecipeError: the run's objective has no prediction for a single row.
    """
    run = run if isinstance(run, Run) else Run(run)
    target = None if out is None else Path(out)
    if target is not None and target.suffix not in (".jsonl", ".npy"):
        raise RunError(f"{str(target)!r} does not end in .jsonl or .npy", "name the result predictions.jsonl")
    with status("loading the run", quiet=quiet):
        recorded, family, _ = open_run(run, False, base_model, partial(print_line, quiet=quiet))
    raw = assembly.dump_recipe(recorded)
    raw["data"] |= {"train": data, "test": data, "eval": None}
    recipe = assembly.build_recipe(raw, settings)
    predictor = build_predictor(recipe, family, max_new_tokens)
    family.train(False)
    written = _Written(target, _describe(run, data, settings, max_new_tokens))
    source = recipe.data.test
    assert source is not None
    files = assembly.rows.read_source(source.path, split=source.split, subset=source.subset, part="test")
    examples = (example for _, lines in files for example in predictor.read(lines))
    remaining = islice(examples, len(written.lines), max_samples)
    with Progress(max_samples or 0, title="rows predicted", quiet=quiet) as bar:
        for chunk in iter(lambda: list(islice(remaining, CHUNK)), []):
            usable = [one for one in chunk if not isinstance(one, assembly.rows.RejectedRow)]
            made = iter(predictor.predict(usable))
            written.add([_format(one if isinstance(one, assembly.rows.RejectedRow) else next(made)) for one in chunk])
            bar.update(len(written.lines))
    written.finish()
    return written.lines


def _format(prediction: Any) -> dict[str, Any]:
    if isinstance(prediction, assembly.rows.RejectedRow):
        return {"error": str(prediction)}
    found: dict[str, Any] = prediction
    return found


def _describe(run: Run, data: Any, settings: dict[str, Any], max_new_tokens: int) -> str:
    """A digest of what decides the predictions: the weights, the rows, the settings."""
    weights = [compute_path_sha256(file) for file in sorted(run.path.glob("*.safetensors"))]
    rows = compute_path_sha256(Path(data)) if Path(str(data)).exists() else str(data)
    return sha256(json.dumps([weights, rows, settings, max_new_tokens], default=str).encode()).hexdigest()


class _Written:
    """Predictions, and the file that they are added to."""

    def __init__(self, target: Path | None, digest: str) -> None:
        self.target = target
        self.lines: list[dict[str, Any]] = []
        if target is None:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        self._mark = target.with_name(f".{target.name}.unfinished")
        if target.exists() and (not self._mark.exists() or self._mark.read_text() != digest):
            raise RunError(f"{str(target)!r} exists, and holds other predictions or all of these",
                           "remove it, or name another file with --out")
        if target.suffix == ".jsonl" and target.exists():
            self.lines = list(_read_whole_lines(target))
            target.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self.lines), "utf-8")
        self._mark.write_text(digest)

    def add(self, lines: list[dict[str, Any]]) -> None:
        self.lines += lines
        if self.target is not None and self.target.suffix == ".jsonl":
            with self.target.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

    def finish(self) -> None:
        if self.target is None:
            return
        if self.target.suffix == ".npy":
            if wrong := next((line for line in self.lines if "embedding" not in line), None):
                raise RunError(f"a row has no embedding but {wrong}", "write the predictions to a .jsonl file")
            np.save(self.target, np.array([line["embedding"] for line in self.lines], dtype=np.float32))
        self._mark.unlink(missing_ok=True)


def _read_whole_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The lines that were written whole: the last one may have been cut off by a kill."""
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)
