"""The verb `inspect`: what a run has learned, as words and pictures. Read `api/evaluate.py` first."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from luthier import assembly
from luthier.assembly.factory import attach_method
from luthier.assembly.recipe import Recipe, method_name
from luthier.assembly.run_io import open_run
from luthier.core.errors import RunError
from luthier.core.protocols import Family, Tuner
from luthier.reporting.plots import plot_weight_changes
from luthier.reporting.progress import print_line, status
from luthier.training.os_errors import translate_os_errors
from luthier.training.run_folder import Run

PICTURE = "layers.png"


def inspect_run(run: Run | Path | str, *, quiet: bool = False, base_model: str | None = None) -> dict[str, Any]:
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
        made, family, attached = open_run(run, False, base_model, partial(print_line, quiet=quiet))
    readings = assembly.diagnose(attached, family.structure) if attached else []
    if not readings:
        raise RunError(f"{str(run.path)!r} was tuned by {method_name(made)}, whose numbers say nothing by "
                       "themselves", "inspect a run of prompt, ptuning, prefix, ptuning_v2, lora or adalora")
    found: dict[str, Any] = {"output_dir": str(run.path), "method": method_name(made), "readings": [],
                             "picture": None}
    starts = _init_method_again(run, made, family, attached) if any(r.kind == "words" for r in readings) else []
    for i, reading in enumerate(readings):
        rows = list(reading.rows)
        if reading.kind == "words":
            before = starts[i].rows if starts else [None] * len(rows)
            rows = [{"token": j, "start": old, "end": new}
                    for j, (old, new) in enumerate(zip(before, rows, strict=True))]
        else:
            with translate_os_errors(run.path):
                plot_weight_changes(rows, run.path / PICTURE)
                found["picture"] = str(run.path / PICTURE)
        found["readings"].append({"kind": reading.kind, "about": reading.about, "rows": rows})
    return found


def _init_method_again(run: Run, made: Recipe, family: Family, attached: Tuner | None) -> Sequence[assembly.Diagnostic]:
    """The method as it was before the first step, made once more from the recipe's seed; none where nobody knows."""
    if not run.recipe or made.init_from is not None or attached is None:
        return []
    with attached.disabled():
        return assembly.diagnose(attach_method(family, made.method, made.seed), family.structure)
