"""The verb `inspect`: what a run has learned, as tokens and plots. Read `api/evaluate.py` first."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from luthier import assembly
from luthier.assembly.factory import attach_method
from luthier.assembly.recipe import Recipe, get_method_name
from luthier.assembly.run_io import open_run
from luthier.core.consent import accepts_consent
from luthier.core.errors import RunError
from luthier.core.protocols import Family, Tuner
from luthier.reporting.plots import plot_weight_changes
from luthier.reporting.progress import print_line, status
from luthier.training.os_errors import translate_os_errors
from luthier.training.run_folder import Run

PLOT = "layers.png"


@accepts_consent
def inspect_run(run: Run | Path | str, *, quiet: bool = False, base_model: Path | str | None = None,
                allow_code: Sequence[str] = ()) -> dict[str, Any]:
    """Nearest vocabulary entries of virtual tokens before and after training; norm and rank of each LoRA update.

    Args:
        run: a run folder of `train`, or an adapter of PEFT (whose initial weights are unknown).
        allow_code: files, modules, URLs or base models whose code the run may use (`core/consent.py`).
        base_model: where the base is now, if it was moved.

    Returns:
        `readings`, each with `kind`, `about` and `rows`: of `words`, `start` and `end` with `size` and `nearest`; of
        `layers`, `name`, `block`, `role`, `size`, `rank`, `of`. `plot`: the file with the plot of the layers.

    Raises:
        RunError: the run has nothing to inspect.
    """
    run = run if isinstance(run, Run) else Run(run)
    with status("loading the run", quiet=quiet):
        recipe, family, tuner = open_run(run, False, base_model, partial(print_line, quiet=quiet))
    readings = assembly.diagnose(tuner, family.structure) if tuner else []
    if not readings:
        raise RunError(f"{str(run.path)!r} was trained with {get_method_name(recipe)}, for which there are no "
                       f"diagnostics", "inspect a run of prompt, ptuning, prefix, ptuning_v2, lora or adalora")
    report: dict[str, Any] = {"output_dir": str(run.path), "method": get_method_name(recipe), "readings": [],
                             "plot": None}
    initial = _init_method_again(run, recipe, family, tuner) if any(r.kind == "words" for r in readings) else []
    for i, reading in enumerate(readings):
        rows = list(reading.rows)
        if reading.kind == "words":
            before = initial[i].rows if initial else [None] * len(rows)
            rows = [{"token": j, "start": old, "end": new}
                    for j, (old, new) in enumerate(zip(before, rows, strict=True))]
        else:
            with translate_os_errors(run.path):
                plot_weight_changes(rows, run.path / PLOT)
                report["plot"] = str(run.path / PLOT)
        report["readings"].append({"kind": reading.kind, "about": reading.about, "rows": rows})
    return report


def _init_method_again(run: Run, recipe: Recipe, family: Family, tuner: Tuner | None) -> Sequence[assembly.Diagnostic]:
    """Diagnostics of the method before the first step, initialized again from the recipe's seed; empty where that is
    unknown."""
    if not run.recipe or recipe.init_from is not None or tuner is None:
        return []
    with tuner.disabled():
        return assembly.diagnose(attach_method(family, recipe.method, recipe.seed), family.structure)
