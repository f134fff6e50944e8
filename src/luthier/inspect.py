"""The verb `inspect`: what a run has learned, as words and pictures. Read `evaluate.py` first."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from luthier import build
from luthier.core.errors import RunError
from luthier.core.protocols import Attached, Family
from luthier.runtime.disk import explained
from luthier.runtime.progress import print_line, status
from luthier.runtime.run import Run

PICTURE = "layers.png"


def inspect(run: Run | Path | str, *, quiet: bool = False, base_model: str | None = None) -> dict[str, Any]:
    """Virtual tokens as their nearest words at the start and at the end of training; LoRA's changes by size and rank.

    Args:
        run: a run folder of `train`, or an adapter of PEFT (whose start nobody knows).
        base_model: where the base is now, if it was moved.

    Returns:
        `readings`, each with `kind`, `about` and `rows`: of `words`, `start` and `end` with `size` and `nearest`; of
        `layers`, `name`, `block`, `role`, `size`, `rank`, `of`. `picture`: the file with the layers drawn.

    Raises:
        RunError: the run holds nothing that can be read.
    """
    run = run if isinstance(run, Run) else Run(run)
    with status("loading the run", quiet=quiet):
        made, family, attached = build.open_run(run, False, base_model, partial(print_line, quiet=quiet))
    readings = build.describe(attached, family.anatomy) if attached else []
    if not readings:
        raise RunError(f"{str(run.path)!r} was tuned by {build.method_name(made)}, whose numbers say nothing by "
                       "themselves", "inspect a run of prompt, ptuning, prefix, ptuning_v2, lora or adalora")
    found: dict[str, Any] = {"run": str(run.path), "method": build.method_name(made), "readings": [], "picture": None}
    starts = _starts(run, made, family, attached) if any(r.kind == "words" for r in readings) else []
    for i, reading in enumerate(readings):
        rows = list(reading.rows)
        if reading.kind == "words":
            before = starts[i].rows if starts else [None] * len(rows)
            rows = [{"token": j, "start": old, "end": new}
                    for j, (old, new) in enumerate(zip(before, rows, strict=True))]
        else:
            with explained(run.path):
                found["picture"] = str(_drawn(rows, run.path / PICTURE))
        found["readings"].append({"kind": reading.kind, "about": reading.about, "rows": rows})
    return found


def _starts(run: Run, made: build.Recipe, family: Family, attached: Attached | None) -> Sequence[build.Reading]:
    """The method as it was before the first step, made once more from the recipe's seed; none where nobody knows."""
    if not run.recipe or made.start is not None or attached is None:
        return []
    with attached.disabled():
        return build.describe(build.attach(family, made.method, made.seed), family.anatomy)


def _drawn(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Two maps, a column for each block and a row for each role: relative size, and effective rank."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and needed once
    from matplotlib.figure import Figure
    roles = list(dict.fromkeys(row["role"] for row in rows))
    blocks = sorted({row["block"] for row in rows})
    figure = Figure(figsize=(max(6.0, 0.28 * len(blocks) + 2), 0.8 * len(roles) + 2.4), layout="constrained")
    FigureCanvasAgg(figure)
    titles = {"size": "length of the change, relative to the weight's", "rank": "effective rank of the change"}
    for axes, (name, title) in zip(figure.subplots(2, 1), titles.items(), strict=True):
        grid = [[float("nan")] * len(blocks) for _ in roles]
        for row in rows:
            grid[roles.index(row["role"])][blocks.index(row["block"])] = row[name]
        shown = axes.imshow(grid, aspect="auto", vmin=0)
        axes.set(title=title, xlabel="block", yticks=range(len(roles)), yticklabels=roles)
        figure.colorbar(shown, ax=axes)
    figure.savefig(path, dpi=120)
    return path
