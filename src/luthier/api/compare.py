"""The verb `compare`: one task under many methods, and what each one cost. Read `api/train.py` and `api/evaluate.py`
first.

Every method is an ordinary run in a process of its own, so that one's memory is not another's, with its own default
settings and rate. What is measured of each: the score on test (or validation) rows, what became of other text or of
questions with choices (what was forgotten), trainable share, seconds, peak memory, and the size of what is kept.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier import assembly
from luthier.api.evaluate import evaluate
from luthier.assembly.method_variants import build_variant
from luthier.assembly.recipe import Recipe
from luthier.core.errors import RecipeError, RunError
from luthier.core.examples import ComparedExample
from luthier.reporting.comparison import format_table
from luthier.reporting.plots import plot_bars
from luthier.reporting.progress import Progress
from luthier.training.child_process import train_apart
from luthier.training.run_folder import Run

AS_IT_IS: dict[str, Any] = {  # other text is read, not answered, and nothing that the recipe says of its own rows holds
    "evaluate.metrics": [], "evaluate.limit": sys.maxsize, "data.columns": {}, "data.format": "auto",
    "data.limit": sys.maxsize, "data.system": ""}
COLUMNS = ("after", "general", "trainable_fraction", "train_seconds", "peak_memory_gb", "file_bytes")


def compare(recipe: str | Path, methods: Sequence[str], *, general: str | None = None, out: Path | str | None = None,
            quiet: bool = False, **settings: Any) -> Run:
    """Train the recipe once with each method. Returns the folder with the runs, `comparison.json`, `.md` and `.png`.

    Runs that have ended already are kept, so an interrupted comparison goes on where it was.

    Args:
        recipe: a YAML file; its method and learning rate are left aside.
        methods: ways to train; `a+b` is both together, `lora@nf4` (or `qlora`) on a base kept in four bits.
        general: rows that have nothing to do with the task: what became of them says what was forgotten. Of texts and
            chats the perplexity is measured, of questions with choices how many are answered rightly.
        settings: laid over the recipe in every run.

    Raises:
        RecipeError: an unknown method, or no rows to measure on.
        RunError: a run failed; its own words are in `<method>.log`.
    """
    config = assembly.recipe(recipe, settings)
    ways = {method: build_variant(config, method) for method in methods}
    other = _load_retention_data(config, general) if general else None
    folder = Run(out or Path("runs") / f"compare-{Path(recipe).stem}")
    folder.path.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with Progress(len(methods), title="methods", quiet=quiet) as bar:
        for done, method in enumerate(methods, 1):
            run = folder.path / method
            if not (run / "README.md").exists():
                _train_method(ways[method], method, run, before=not rows)
            rows.append(_build_row(method, Run(run), other, quiet))
            bar.update(done, score=rows[-1]["after"])
    base = next((row["before"] for row in rows if row.get("before") is not None), None)
    comparison = {"recipe": str(recipe), "metric": rows[0]["metric"], "base": base, "methods": rows}
    if other:
        comparison |= {"general": other.measure, "general_before": other.of(config.base.name, quiet)}
    folder.write("comparison.json", comparison)
    folder.write("comparison.md", format_table(comparison))
    plot_bars([row["method"] for row in rows], {
        str(comparison["metric"]): [row["after"] for row in rows],
        "seconds of training": [row["train_seconds"] for row in rows],
        "peak memory, GB": [row["peak_memory_gb"] for row in rows],
        "file, MB": [row["file_bytes"] / 1e6 for row in rows]}, folder.path / "comparison.png")
    return folder


def _train_method(raw: dict[str, Any], method: str, run: Path, before: bool) -> None:
    """One run in a process of its own; `before`: whether the base is measured too, which need be done only once."""
    raw["evaluate"]["before"] = before
    code, words = train_apart(raw, run)
    if code:
        raise RunError(f"the run with method {method!r} ended with {code}: {words}",
                       f"mend it and compare again (what has ended is kept); its words are in {method}.log")


@dataclass(frozen=True)
class _RetentionData:
    """Rows that have nothing to do with the task, and what is measured of them under which objective."""

    rows: str
    objective: str
    measure: str

    def of(self, run: Run | str, quiet: bool) -> float:
        return evaluate(run, data=self.rows, quiet=quiet, objective=self.objective, **AS_IT_IS)[self.measure]


def _load_retention_data(recipe: Recipe, rows: str) -> _RetentionData:
    """What `rows` are. Raises `RecipeError` where a run of the recipe could not say anything of them."""
    if "token_logps" not in recipe.objective.required_outputs or recipe.objective.heads:
        raise RecipeError(f"--general {rows!r}: objective {recipe.objective.name!r} trains no language model, so "
                          "forgetting cannot be measured on other text", "omit --general")
    for _, lines in assembly.rows.read(rows):
        for example in assembly.rows.examples(lines):
            if isinstance(example, ComparedExample):
                return _RetentionData(rows, "multiple_choice", "accuracy")
            if not isinstance(example, assembly.rows.Refusal):
                return _RetentionData(rows, "sft", "perplexity")
    raise RecipeError(f"--general {rows!r}: no row of it can be read", f"look at it: luthier data check {rows}")


def _build_row(method: str, run: Run, other: _RetentionData | None, quiet: bool) -> dict[str, Any]:
    results = run.results
    if "after" not in results:
        raise RecipeError("the recipe has no test rows and no score, so there is nothing to compare",
                          "set data.test, and evaluate.metrics for scores of answers")
    return {"method": method, "before": results.get("before"), "metric": results["metric"],
            "general": other.of(run, quiet) if other else None,
            "measured_on": (part := results.get("measured_on", "test")), "examples": results["examples"],
            "perplexity": (results.get(part) or {}).get("perplexity"),
            "perplexity_before": (results.get(f"{part}_before") or {}).get("perplexity"),
            "rate": max((line.get("learning_rate", 0.0) for line in run.metrics), default=0.0),
            **{name: results[name] for name in COLUMNS if name in results}}
