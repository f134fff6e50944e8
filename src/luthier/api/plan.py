"""The verb `plan`: which ways to train fit this machine and this data, before the long run. Read `api/compare.py`
first.

Nothing is guessed that a minute can measure. Each way takes a few real steps on the recipe's own rows in a process of
its own; their seconds, peak memory and file size are what the plan extends to the whole run. What needs more memory
for its weights alone than the machine has free is not begun. How good each would become is not known before it is
trained: `compare` measures that.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from luthier import assembly
from luthier.assembly.factory import select_device
from luthier.assembly.method_variants import build_variant, estimate_weight_gb
from luthier.assembly.multi_adapter_loading import display_name
from luthier.assembly.recipe import Recipe, method_name
from luthier.core.errors import RecipeError
from luthier.reporting.plots import plot_bars
from luthier.reporting.progress import Progress
from luthier.training.child_process import train_apart
from luthier.training.memory import room_gb
from luthier.training.run_folder import Run

STEPS = 3  # of a trial; the first warms up and is not timed
SPARE = 1.1  # a run's longest rows may need more than those of its first steps
WAYS = ("full", "lora", "qlora", "adapter", "prefix", "prompt", "bitfit", "ia3")
LARGE = 10_000_000  # tokens of a run from which on continued pretraining is advised to move every weight


def plan(recipe: str | Path | Mapping[str, Any] | None = None, methods: Sequence[str] = WAYS, *, steps: int = STEPS,
         out: Path | str | None = None, quiet: bool = False, **settings: Any) -> Run:
    """Try ways to train a recipe. Returns the folder with `plan.json`, `.md` and `.png`.

    Args:
        recipe: a YAML file, a mapping, or nothing where `settings` say it all; its method and rate are left aside.
        methods: ways to train; `a+b` is both together, `lora@nf4` (or `qlora`) on a base kept in four bits.
        steps: of each trial, the first not timed.
        settings: laid over the recipe.

    Raises:
        RecipeError: an unknown way, fewer than two steps, or a recipe that cannot be.
        RunError: the folder cannot be written.
    """
    if steps < 2:
        raise RecipeError(f"a trial of {steps} steps times nothing: the first is not timed", "give at least 2 steps")
    config = assembly.recipe(recipe, settings)
    ways = {name: build_variant(config, name) for name in dict.fromkeys(methods)}
    room = room_gb(select_device(config))
    folder = Run(out or Path("runs") / f"plan-{display_name(config.base.name)}")
    folder.path.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    data: dict[str, Any] = {}
    with TemporaryDirectory() as temporary, Progress(len(ways), title="ways tried", quiet=quiet) as bar:
        for done, (name, raw) in enumerate(ways.items(), 1):
            run = Path(temporary) / name
            rows.append({"method": name, **_time_method(config, raw, run, steps, room)})
            data = data or _read_trial(run)
            bar.update(done)
    report = {"base": config.base.name, "room_gb": room, "steps": steps, "data": data, "methods": rows}
    report |= {"advice": build_advice(report, config.objective.name)}
    folder.write("plan.json", report)
    folder.write("plan.md", format_table(report))
    if measured := [row for row in rows if "seconds" in row]:
        plot_bars([row["method"] for row in measured], {
            "minutes, whole run": [row["seconds"] / 60 for row in measured],
            "peak memory, GB": [row["peak_memory_gb"] for row in measured],
            "file, MB": [row["file_bytes"] / 1e6 for row in measured]}, folder.path / "plan.png")
    return folder


def _time_method(recipe: Recipe, raw: dict[str, Any], run: Path, steps: int, room: float) -> dict[str, Any]:
    """What a trial measured, or `why` there is none."""
    candidate = Recipe.parse(raw)
    least = estimate_weight_gb(candidate.base, whole=method_name(candidate) == "full")
    if least > room:
        return {"why": f"the weights alone need {least:.1f} GB, and {room:.1f} GB are free", "fits": False}
    raw["training"] |= {"steps": steps, "save_every": None, "trackers": []}
    raw["data"] |= {"test": None, "eval": None}
    raw["evaluate"] |= {"metrics": [], "before": False}
    code, words = train_apart(raw, run)
    if code:
        killed = code < 0 or code == 137
        reason = "ended by the system, as it does when memory runs out" if killed else words.removeprefix("error: ")
        return {"why": reason, "fits": False if killed else None}
    trial = Run(run)
    timed = trial.metrics[2:]  # line 0 tells the shares, line 1 is of the first step
    length = statistics.median(line["tokens"] for line in timed)
    per_token = statistics.median(line["step_seconds"] / line["tokens"] for line in timed)
    total = recipe.training.steps or _estimate_whole_run(recipe, round(timed[0]["step"] / timed[0]["epoch"]))
    results = trial.results
    return {"fits": results["peak_memory_gb"] * SPARE <= room, "steps": total, "tokens": round(total * length),
            "seconds": total * per_token * length, "tokens_per_second": 1 / per_token,
            **{name: results[name] for name in ("peak_memory_gb", "trainable", "trainable_fraction", "file_bytes")}}


def _estimate_whole_run(recipe: Recipe, steps: int) -> int:
    """Steps of the whole run, of which a trial had so many an epoch. A trial holds nothing out."""
    held = recipe.data.eval if isinstance(recipe.data.eval, float) else 0.0
    return max(1, math.ceil(round(recipe.training.epochs * steps * (1 - held), 6)))


def _read_trial(run: Path) -> dict[str, Any]:
    """What a trial's data report says of the rows to train on."""
    report = run / "data_report.json"
    if not report.exists():
        return {}
    part = json.loads(report.read_text(encoding="utf-8"))["parts"].get("train", {})
    return {name: part[name] for name in ("kept", "truncated", "tokens", "lengths") if name in part}


# ---------------------------------------------------------------- what follows from it


def build_advice(report: Mapping[str, Any], objective: str) -> list[str]:
    """What to do, the choice first, each with its reason in this plan's own figures."""
    measured = {row["method"]: row for row in report["methods"] if "seconds" in row}
    fits = {name: row for name, row in measured.items() if row["fits"]}
    if not fits:
        return [f"Nothing tried here fits into {report['room_gb']:.1f} GB. In this order: base.quantize=nf4, "
                "base.dtype=bfloat16, a smaller training.micro_tokens, a smaller base."]
    tokens = max(row["tokens"] for row in fits.values())
    if objective == "pretrain" and "full" in fits and tokens >= LARGE:
        chosen, why = "full", (f"{tokens:,} tokens of plain text have more to teach than few parameters take up "
                               "(Biderman et al. 2024, arXiv:2405.09673), and every weight fits")
    else:
        chosen = next((name for name in ("lora", "qlora", "lora@nf4") if name in fits),
                      min(fits, key=lambda name: fits[name]["peak_memory_gb"]))
        why = ("it comes nearest to full tuning in most comparisons, merges into the base and costs "
               f"{_compare_cost(fits, 'lora', 'full')}" if chosen == "lora"
               else "of what fits it needs the least memory")
    advice = [f"Choose {chosen}: {why}."]
    for name, row in measured.items():
        if not row["fits"]:
            advice.append(f"{name} does not fit: {row['peak_memory_gb']:.1f} GB in its first steps, "
                        f"{report['room_gb']:.1f} GB free.")
    for what, key, unit, digits in (("Quickest", "seconds", 60, "{:.1f} minutes"),
                                    ("Least memory", "peak_memory_gb", 1, "{:.2f} GB"),
                                    ("Smallest file", "file_bytes", 1e6, "{:.2f} MB")):
        least = min(fits, key=lambda name: fits[name][key])
        advice.append(f"{what}: {least}, {digits.format(fits[least][key] / unit)}.")
    advice.append("Which learns most is not known before it is tried: luthier compare measures it.")
    return advice


def _compare_cost(rows: Mapping[str, Mapping[str, Any]], one: str, other: str) -> str:
    if other not in rows:
        return f"{rows[one]['peak_memory_gb']:.1f} GB"
    share = {key: rows[one][key] / rows[other][key] for key in ("seconds", "peak_memory_gb", "file_bytes")}
    return (f"{share['seconds']:.2f} of its time, {share['peak_memory_gb']:.2f} of its memory and "
            f"{share['file_bytes']:.3f} of its disk")


def format_table(report: Mapping[str, Any]) -> str:
    """The plan as Markdown: the rows, the ways, the advice."""
    data = report["data"]
    lines = [f"Base {report['base']}, {report['room_gb']:.1f} GB free."]
    if data:
        lines.append(f"{data['kept']} rows, {data['tokens']:,} tokens, {data['truncated']} truncated.")
    titles = ("way", "fits", "trains", "minutes", "tokens/s", "peak GB", "file MB")
    lines += ["", f"| {' | '.join(titles)} |", "|" + " --- |" * len(titles)]
    for row in report["methods"]:
        if "why" in row:
            lines.append(f"| {row['method']} | no: {row['why'].replace('|', '/')} |" + " |" * (len(titles) - 2))
            continue
        cells = (row["method"], "yes" if row["fits"] else "no", f"{row['trainable_fraction']:.3%}",
                 f"{row['seconds'] / 60:.1f}", f"{row['tokens_per_second']:.0f}", f"{row['peak_memory_gb']:.2f}",
                 f"{row['file_bytes'] / 1e6:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"* {sentence}" for sentence in report["advice"])]) + "\n"
