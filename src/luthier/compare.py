"""The verb `compare`: one task under many methods, and what each one cost. Read `train.py` and `evaluate.py` first.

Every method is an ordinary run in a process of its own, so that one's memory is not another's, with its own default
settings and rate. What is measured of each: the score on unseen rows, what became of other text (what was forgotten),
trainable share, seconds, peak memory, and the size of what is kept.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from luthier import build
from luthier.core.errors import RecipeError, RunError, nearest
from luthier.evaluate import evaluate
from luthier.runtime.progress import Progress
from luthier.runtime.run import Run

NO_ANSWERS: dict[str, Any] = {"evaluate.metrics": [], "evaluate.limit": None}  # other text is read, not answered
COLUMNS = ("after", "general", "trainable_share", "train_seconds", "peak_memory_gb", "file_bytes")


def compare(recipe: str | Path, methods: Sequence[str], *, general: str | None = None, out: Path | str | None = None,
            quiet: bool = False, **settings: Any) -> Run:
    """Train the recipe once with each method. Returns the folder with the runs, `comparison.json`, `.md` and `.png`.

    Runs that have ended already are kept, so an interrupted comparison goes on where it was.

    Args:
        recipe: a YAML file; its method and learning rate are left aside.
        methods: names of methods; `a+b` is both together.
        general: rows of other text: its perplexity before and after says what was forgotten.
        settings: laid over the recipe in every run.

    Raises:
        RecipeError: an unknown method, or no rows to measure on.
        RunError: a run failed; its own words are in `<method>.log`.
    """
    for name in (part for method in methods for part in method.split("+")):
        if name not in build.METHODS:
            raise RecipeError(f"there is no method {name!r}: {nearest(name, build.METHODS)}", "name methods, or all")
    made = build.recipe(recipe, settings)
    if general and "TextExample" not in made.objective.reads:
        raise RecipeError(f"--general {general!r}: the objective {made.objective.name!r} reads no texts, so what was "
                          "forgotten of other text cannot be said", "leave --general out")
    folder = Run(out or Path("runs") / f"compare-{Path(recipe).stem}")
    folder.path.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with Progress(len(methods), title="methods", quiet=quiet) as bar:
        for done, method in enumerate(methods, 1):
            run = folder.path / method
            if not (run / "README.md").exists():
                _train(made, method, run, before=not rows)
            rows.append(_row(method, Run(run), general, quiet))
            bar.update(done, score=rows[-1]["after"])
    base = next((row["before"] for row in rows if row.get("before") is not None), None)
    told = {"recipe": str(recipe), "metric": rows[0]["metric"], "base": base, "methods": rows}
    if general:
        told["general_before"] = evaluate(made.base.name, data=general, quiet=quiet, **NO_ANSWERS)["perplexity"]
    folder.write("comparison.json", told)
    folder.write("comparison.md", table(told))
    _picture(told, folder.path / "comparison.png")
    return folder


def _train(made: build.Recipe, method: str, run: Path, before: bool) -> None:
    """One run in a process of its own; `before`: whether the base is measured too, which need be done only once."""
    raw = build.dump(made)
    raw["method"] = method.split("+") if "+" in method else method
    raw["optimizer"]["learning_rate"], raw["evaluate"]["before"], raw["run"] = None, before, str(run)
    written = run.with_name(f"{method}.yaml")
    written.write_text(yaml.safe_dump(raw, sort_keys=False, allow_unicode=True), encoding="utf-8")
    command = [sys.executable, "-m", "luthier", "train", str(written), *(["--resume"] if run.exists() else [])]
    with run.with_name(f"{method}.log").open("w", encoding="utf-8") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        said = run.with_name(f"{method}.log").read_text(encoding="utf-8").strip().splitlines()
        raise RunError(f"the run with method {method!r} ended with {done.returncode}: {' '.join(said[-2:])}",
                       f"mend it and compare again (what has ended is kept); its words are in {method}.log")


def _row(method: str, run: Run, general: str | None, quiet: bool) -> dict[str, Any]:
    results = run.results
    if "after" not in results:
        raise RecipeError("the recipe has no test rows and no score, so there is nothing to compare",
                          "set data.test, and evaluate.metrics for scores of answers")
    forgotten = evaluate(run, data=general, quiet=quiet, **NO_ANSWERS)["perplexity"] if general else None
    return {"method": method, "before": results.get("before"), "metric": results["metric"], "general": forgotten,
            "perplexity": (results.get("test") or {}).get("perplexity"),
            "perplexity_before": (results.get("test_before") or {}).get("perplexity"),
            "rate": max((line.get("learning_rate", 0.0) for line in run.metrics), default=0.0),
            **{name: results[name] for name in COLUMNS if name in results}}


def table(told: Mapping[str, Any]) -> str:
    """The comparison as a Markdown table."""
    general, rows = told.get("general_before"), told["methods"]
    first = next((row for row in rows if row["perplexity_before"] is not None), None)
    titles = ["method", str(told["metric"]), *(["perplexity"] if first and told["metric"] != "perplexity" else []),
              *(["other text, perplexity"] if general else []), "trains", "seconds", "peak GB", "file MB", "rate"]
    cells = []
    if told["base"] is not None:
        cells.append({"method": "base", told["metric"]: f"{told['base']:.3g}",
                      "perplexity": _short(first and first["perplexity_before"]),
                      "other text, perplexity": _short(general)})
    for row in rows:
        cells.append({"method": row["method"], told["metric"]: f"{row['after']:.3g}",
                      "perplexity": _short(row["perplexity"]), "other text, perplexity": _short(row["general"]),
                      "trains": f"{row['trainable_share']:.3%}", "seconds": f"{row['train_seconds']:.0f}",
                      "peak GB": f"{row['peak_memory_gb']:.2f}", "file MB": f"{row['file_bytes'] / 1e6:.2f}",
                      "rate": f"{row['rate']:.1g}"})
    lines = [titles, ["---"] * len(titles), *([cell.get(title, "") for title in titles] for cell in cells)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _picture(told: Mapping[str, Any], path: Path) -> None:
    """Score, seconds, memory and file size of each method, as bars."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    rows = told["methods"]
    figure, axes = plt.subplots(1, 4, figsize=(15, 0.6 + 0.32 * len(rows)), layout="constrained", sharey=True)
    bars = ((str(told["metric"]), "after", 1.0), ("seconds of training", "train_seconds", 1.0),
            ("peak memory, GB", "peak_memory_gb", 1.0), ("file, MB", "file_bytes", 1e6))
    for axis, (title, key, unit) in zip(axes, bars, strict=True):
        drawn = axis.barh([row["method"] for row in rows], [row[key] / unit for row in rows], color="#b5541c")
        axis.bar_label(drawn, fmt="%.3g", padding=2)
        axis.set_title(title, fontsize=10)
        axis.margins(x=0.2)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=110)
    plt.close(figure)
