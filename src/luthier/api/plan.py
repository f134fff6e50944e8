"""The verb `plan`: a dry run that estimates memory and time of several methods. Read `api/compare.py` first.

Each method trains a few real steps on the recipe's own rows, in its own process; `planning/estimates.py` extends their
seconds, peak memory and file size to the whole run. A method whose weights alone need more memory than is free is not
started. Quality is not predicted: `compare` measures it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier.api.run import Run
from luthier.assembly.consent import list_code, read_recipe
from luthier.assembly.factory import select_device
from luthier.assembly.method_variants import build_variant, estimate_weight_gb
from luthier.assembly.multi_adapter_loading import display_name
from luthier.assembly.python_rows import accepts_python_values
from luthier.assembly.recipe import Recipe, get_method_name
from luthier.core.consent import accepts_consent
from luthier.core.errors import RecipeError
from luthier.core.locks import staging_folder
from luthier.planning.advice import build_advice, format_table
from luthier.planning.estimates import summarize_trial
from luthier.reporting.plots import plot_bars
from luthier.reporting.progress import Progress
from luthier.training.child_process import train_in_child_process
from luthier.training.memory import available_memory_gb
from luthier.training.run_lock import lock_run

STEPS = 3  # of a trial; the first one is a warm-up and is not timed
WAYS = ("full", "lora", "qlora", "adapter", "prefix", "prompt", "bitfit", "ia3")


@accepts_python_values
@accepts_consent
def plan(recipe: str | Path | Mapping[str, Any] | None = None, methods: Sequence[str] = WAYS, *, steps: int = STEPS,
         out: Path | str | None = None, quiet: bool = False, allow_code: Sequence[str] = (),
         **settings: Any) -> Run:
    """Estimate memory and time of each method and recommend one. Returns the folder with `plan.json`, `.md` and `.png`.

    Args:
        recipe: a YAML file, a mapping, or nothing where `settings` are complete; its method and rate are ignored.
        methods: `a+b` trains both together; `lora@nf4` (or `qlora`) trains on a base quantized to four bits.
        steps: of each trial; the first is not timed.
        allow_code: files, modules, URLs or base models whose code the recipe may run (`core/consent.py`).
        settings: they override the recipe.

    Raises:
        RecipeError: an unknown method, fewer than two steps, or an invalid recipe.
        RunError: the folder cannot be written.
    """
    if steps < 2:
        raise RecipeError(f"a trial of {steps} steps measures no time, because the first step is a warm-up", "give at "
                                                                                                             "least 2 "
                                                                                                             "steps")
    config = read_recipe(recipe, settings)
    variants = {name: build_variant(config, name) for name in dict.fromkeys(methods)}
    available_gb = available_memory_gb(select_device(config))
    folder = Run(out or Path("runs") / f"plan-{display_name(config.model.name_or_path)}")
    with lock_run(folder):
        report = _time_methods(config, variants, steps, available_gb, folder.path, quiet)
        folder.write("plan.json", report)
        folder.write("plan.md", format_table(report))
        if measured := [row for row in report["methods"] if "seconds" in row]:
            plot_bars([row["method"] for row in measured], {
                "minutes, whole run": [row["seconds"] / 60 for row in measured],
                "peak memory, GB": [row["peak_memory_gb"] for row in measured],
                "file, MB": [row["file_bytes"] / 1e6 for row in measured]}, folder.path / "plan.png")
    return folder


def _time_methods(recipe: Recipe, variants: Mapping[str, dict[str, Any]], steps: int, available_gb: float,
                  folder: Path, quiet: bool) -> dict[str, Any]:
    """The report: one row for each method, and advice. The trials are written to `folder` and deleted."""
    rows: list[dict[str, Any]] = []
    data: dict[str, Any] = {}
    with staging_folder(folder) as temporary, Progress(len(variants), title="methods timed", quiet=quiet) as bar:
        for done, (name, raw) in enumerate(variants.items(), 1):
            run = temporary / name
            rows.append({"method": name, **_time_method(recipe, raw, run, steps, available_gb)})
            data = data or _read_trial(run)
            bar.update(done)
    report = {"model": recipe.model.name_or_path, "room_gb": available_gb, "steps": steps, "data": data,
              "methods": rows}
    return report | {"advice": build_advice(report, recipe.objective.name)}


def _time_method(recipe: Recipe, raw: dict[str, Any], run: Path, steps: int, available_gb: float) -> dict[str, Any]:
    """The row of a method: the measurements of its trial, or `why` it has none."""
    candidate = Recipe.parse(raw)
    weights_gb = estimate_weight_gb(candidate.model, whole=get_method_name(candidate) == "full")
    if weights_gb > available_gb:
        return {"why": f"the weights alone need {weights_gb:.1f} GB, and {available_gb:.1f} GB are free", "fits": False}
    raw["training"] |= {"max_steps": steps, "save_steps": None, "report_to": []}
    raw["data"] |= {"test": None, "eval": None}
    raw["evaluate"] |= {"metrics": [], "before_training": False}
    code, output = train_in_child_process(raw, run, [code.name for code in list_code(recipe)])
    if code:
        killed = code < 0 or code == 137
        reason = "killed by the system, probably because memory ran out" if killed else output.removeprefix("error: ")
        return {"why": reason, "fits": False if killed else None}
    trial, held_out = Run(run), recipe.data.eval if isinstance(recipe.data.eval, float) else 0.0
    return summarize_trial(trial.metrics, trial.results, available_gb, recipe.training.max_steps,
                           recipe.training.num_train_epochs,
                           held_out)


def _read_trial(run: Path) -> dict[str, Any]:
    """The counts of the training rows in a trial's data report."""
    report = run / "data_report.json"
    if not report.exists():
        return {}
    part = json.loads(report.read_text(encoding="utf-8"))["parts"].get("train", {})
    return {name: part[name] for name in ("kept", "truncated", "tokens", "lengths") if name in part}
