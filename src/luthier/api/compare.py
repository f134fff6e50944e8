"""The verb `compare`: one task trained with several methods, and what each one costs. Read `api/train.py` and
`api/evaluate.py` first.

Each method is an ordinary run in its own process, so that peak memory is measured separately, with the method's default
settings and learning rate. Reported for each: the score on test (or validation) rows, the score on retention data (what
was forgotten), the trainable fraction, seconds, peak memory and file size.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier import assembly
from luthier.api.evaluate import evaluate
from luthier.api.run import Run
from luthier.assembly.consent import list_code, read_recipe
from luthier.assembly.method_variants import build_variant
from luthier.assembly.multi_adapter_loading import display_name
from luthier.assembly.python_rows import accepts_python_values
from luthier.assembly.recipe import Recipe
from luthier.core.consent import accepts_consent
from luthier.core.errors import RecipeError, RunError
from luthier.core.examples import PreferenceExample
from luthier.reporting.comparison import format_table
from luthier.reporting.plots import plot_bars
from luthier.reporting.progress import Progress
from luthier.training.child_process import train_in_child_process
from luthier.training.run_lock import lock_run

AS_IT_IS: dict[str, Any] = {  # for retention data: no generation, and no settings of the recipe's own rows
    "evaluate.metrics": [], "evaluate.max_samples": sys.maxsize, "data.columns": {}, "data.format": "auto",
    "data.max_samples": sys.maxsize, "data.system": ""}
COLUMNS = ("after", "general", "trainable_fraction", "train_seconds", "peak_memory_gb", "file_bytes")


@accepts_python_values
@accepts_consent
def compare_methods(recipe: str | Path | Mapping[str, Any], methods: Sequence[str], *,
                    retention_data: str | None = None, out: Path | str | None = None, quiet: bool = False,
                    allow_code: Sequence[str] = (), **settings: Any) -> Run:
    """Train the recipe once with each method. Returns the folder with the runs, `comparison.json`, `.md` and `.png`.

    Finished runs are kept, so an interrupted comparison continues where it stopped.

    Args:
        recipe: a YAML file or a mapping; its method and learning rate are ignored.
        methods: `a+b` trains both together; `lora@nf4` (or `qlora`) trains on a base quantized to four bits.
        retention_data: rows unrelated to the task, which show what was forgotten: the perplexity of texts and chats,
        or the
            accuracy of multiple-choice questions.
        allow_code: files, modules, URLs or base models whose code the recipe may run (`core/consent.py`).
        settings: they override the recipe in every run.

    Raises:
        RecipeError: an unknown method, or no rows to measure on.
        RunError: a run failed; its output is in `<method>.log`.
    """
    config = read_recipe(recipe, settings)
    variants = {method: build_variant(config, method) for method in methods}
    retention = _load_retention_data(config, retention_data) if retention_data else None
    is_mapping = isinstance(recipe, Mapping)
    named = display_name(config.model.name_or_path) if is_mapping else Path(str(recipe)).stem
    folder = Run(out or Path("runs") / f"compare-{named}")
    with lock_run(folder):
        _compare_variants(folder, "recipe" if is_mapping else str(recipe), config, variants, retention, quiet)
    return folder


def _compare_variants(folder: Run, recipe: str, config: Recipe, variants: Mapping[str, dict[str, Any]],
                      retention: _RetentionData | None, quiet: bool) -> None:
    """Train what is not finished, evaluate all, and write the comparison."""
    rows: list[dict[str, Any]] = []
    with Progress(len(variants), title="methods", quiet=quiet) as bar:
        for done, method in enumerate(variants, 1):
            run = folder.path / method
            if not (run / "README.md").exists():
                _train_method(variants[method], method, run, [code.name for code in list_code(config)], before=not rows)
            rows.append(_build_row(method, Run(run), retention, quiet))
            bar.update(done, score=rows[-1]["after"])
    base = next((row["before"] for row in rows if row.get("before") is not None), None)
    comparison = {"recipe": recipe, "metric": rows[0]["metric"], "base": base, "methods": rows}
    if retention:
        comparison |= {"general": retention.metric, "general_before": retention.evaluate_run(config.model.name_or_path,
                                                                                             quiet)}
    folder.write("comparison.json", comparison)
    folder.write("comparison.md", format_table(comparison))
    plot_bars([row["method"] for row in rows], {
        str(comparison["metric"]): [row["after"] for row in rows],
        "seconds of training": [row["train_seconds"] for row in rows],
        "peak memory, GB": [row["peak_memory_gb"] for row in rows],
        "file, MB": [row["file_bytes"] / 1e6 for row in rows]}, folder.path / "comparison.png")


def _train_method(raw: dict[str, Any], method: str, run: Path, allow_code: Sequence[str], before: bool) -> None:
    """Train one run in its own process; `before`: whether the base is evaluated too, which is needed only once."""
    raw["evaluate"]["before_training"] = before
    code, output = train_in_child_process(raw, run, allow_code)
    if code:
        raise RunError(f"the run with method {method!r} ended with {code}: {output}",
                       f"fix the cause and compare again (finished runs are kept); the output is in {method}.log")


@dataclass(frozen=True)
class _RetentionData:
    """Rows unrelated to the task, with the objective and the metric that they are evaluated by."""

    rows: str
    objective: str
    metric: str

    def evaluate_run(self, run: Run | str, quiet: bool) -> float:
        return evaluate(run, data=self.rows, quiet=quiet, objective=self.objective, **AS_IT_IS)[self.metric]


def _load_retention_data(recipe: Recipe, rows: str) -> _RetentionData:
    """How to evaluate `rows`. Raises `RecipeError` if runs of this recipe cannot be evaluated on them."""
    if "token_logps" not in recipe.objective.required_outputs or recipe.objective.heads:
        raise RecipeError(f"--retention-data {rows!r}: objective {recipe.objective.name!r} trains no language model, "
                          f"so "
                          "forgetting cannot be measured on other text", "omit --general")
    for _, lines in assembly.rows.read_source(rows):
        for example in assembly.rows.read_examples(lines):
            if isinstance(example, PreferenceExample):
                return _RetentionData(rows, "multiple_choice", "accuracy")
            if not isinstance(example, assembly.rows.RejectedRow):
                return _RetentionData(rows, "sft", "perplexity")
    raise RecipeError(f"--retention-data {rows!r}: no row can be read", f"check it: luthier data check {rows}")


def _build_row(method: str, run: Run, retention: _RetentionData | None, quiet: bool) -> dict[str, Any]:
    results = run.results
    if "after" not in results:
        raise RecipeError("the recipe has no test rows and no score, so there is nothing to compare",
                          "set data.test, and evaluate.metrics for scores of answers")
    return {"method": method, "before": results.get("before"), "metric": results["metric"],
            "general": retention.evaluate_run(run, quiet) if retention else None,
            "measured_on": (part := results.get("measured_on", "test")), "examples": results["examples"],
            "perplexity": (results.get(part) or {}).get("perplexity"),
            "perplexity_before": (results.get(f"{part}_before") or {}).get("perplexity"),
            "rate": max((line.get("learning_rate", 0.0) for line in run.metrics), default=0.0),
            **{name: results[name] for name in COLUMNS if name in results}}
