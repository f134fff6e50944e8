"""Several LoRA runs as one run folder. Read `initialization.py` (banked) and `methods/lora_merging.py` first."""

from __future__ import annotations

from collections.abc import Sequence

from luthier.assembly.factory import attach_method, load_family
from luthier.assembly.initialization import attach_runs
from luthier.assembly.provenance import Report, describe_model_conflict, ignore, open_recipe, record_start
from luthier.assembly.recipe import dump, require_adapter
from luthier.assembly.run_io import has_saved_heads, save_tuned
from luthier.assembly.settings import make_paths_absolute
from luthier.core.errors import RecipeError
from luthier.methods.lora import Lora
from luthier.methods.lora_merging import CombinationType, merge_loras
from luthier.models import identify_base
from luthier.training.run_folder import Run


def merge_adapters(runs: Sequence[Run], out: Run, weights: Sequence[float], combination_type: CombinationType,
                   rank: int | None, base_model: str | None = None, report: Report = ignore) -> dict[str, float]:
    """Write the runs' LoRAs as one to `out`; returns its rank and the error of the change, relative to the exact one.

    Raises:
        RecipeError: the runs have different bases, are no LoRAs, or have heads.
        RunError: a run cannot be read, or `out` holds one.
    """
    out.require_vacant()
    recipes = [open_recipe(require_adapter(run), base_model, report) for run in runs]
    first = recipes[0]
    for run, made in zip(runs, recipes, strict=True):
        if base_model is None and (conflict := describe_model_conflict(run, first.model)):
            raise RecipeError(f"{str(run.path)!r} was made on {made.model.name_or_path!r}, and {str(runs[0].path)!r} "
                              "on "
                              f"{first.model.name_or_path!r}: {conflict}", "combine runs of one base")
        if has_saved_heads(made.objective):
            raise RecipeError(f"{str(run.path)!r} has heads of its own ({made.objective.name}), and heads of several "
                              "runs have no sum", "use them side by side: luthier.load_adapters")
    base = load_family(first.model, first.objective.uses_masking)
    manager = attach_runs(base, {str(i): run for i, run in enumerate(runs)})
    loras = [attached for attached in manager.adapters.values() if isinstance(attached, Lora)]
    if len(loras) < len(runs):
        raise RecipeError("only runs of the method lora can be combined: " + ", ".join(
            f"{run.path} is of {made.method.name}" for run, made in zip(runs, recipes, strict=True)),
            "stack others by their weights: luthier.load_adapters and using({...})")
    found = merge_loras(loras, weights, combination_type, rank)
    made = first.model_copy(update={"method": found.config, "init_from": None, "output_dir": str(out.path)})
    made = make_paths_absolute(made)
    out.create(dump(made), {**record_start(made, identify_base(made.model), []),
                           "combined": {
        str(run.path): float(weight) for run, weight in zip(runs, weights, strict=True)}})
    attached = attach_method(base, made.method, made.seed)
    attached.load(found.state)
    save_tuned(out, made, base, attached)
    results = {"rank": found.config.rank, "relative_error": found.error}
    out.write("results.json", {**results, "combination_type": combination_type})
    return results
