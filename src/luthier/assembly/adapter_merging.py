"""Merges several LoRA runs into one run folder. Read `methods/lora_merging.py` first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from luthier.assembly.factory import attach_method, load_family
from luthier.assembly.initialization import attach_runs
from luthier.assembly.provenance import Report, describe_model_conflict, ignore, open_recipe, record_start
from luthier.assembly.recipe import dump_recipe, require_adapter
from luthier.assembly.run_io import has_saved_heads, save_tuned
from luthier.assembly.settings import make_paths_absolute
from luthier.core.errors import RecipeError
from luthier.methods.lora import Lora
from luthier.methods.lora_merging import CombinationType, merge_loras
from luthier.models import identify_base
from luthier.training.run_folder import Run


def merge_adapters(runs: Sequence[Run], out: Run, weights: Sequence[float], combination_type: CombinationType,
                   rank: int | None, base_model: Path | str | None = None, report: Report = ignore) -> dict[str, float]:
    """Write the weighted sum of the runs' LoRAs to `out`. Returns its rank and its error relative to the exact sum.

    Raises:
        RecipeError: the runs have different bases, other methods than lora, or heads.
        RunError: a run cannot be read, or `out` holds one.
    """
    out.require_vacant()
    recipes = [open_recipe(require_adapter(run), base_model, report) for run in runs]
    first = recipes[0]
    for run, recipe in zip(runs, recipes, strict=True):
        if base_model is None and (conflict := describe_model_conflict(run, first.model)):
            raise RecipeError(f"{str(run.path)!r} was trained on {recipe.model.name_or_path!r}, and "
                              f"{str(runs[0].path)!r} "
                              "on "
                              f"{first.model.name_or_path!r}: {conflict}", "merge runs of one base")
        if has_saved_heads(recipe.objective):
            raise RecipeError(f"{str(run.path)!r} has its own heads ({recipe.objective.name}), and heads of several "
                              "runs cannot be summed", "load them together: luthier.load_adapters")
    base = load_family(first.model, first.objective.uses_masking)
    manager = attach_runs(base, {str(i): run for i, run in enumerate(runs)})
    loras = [tuner for tuner in manager.adapters.values() if isinstance(tuner, Lora)]
    if len(loras) < len(runs):
        raise RecipeError("only runs of the method lora can be merged: " + ", ".join(
            f"{run.path} has the method {recipe.method.name}" for run, recipe in zip(runs, recipes, strict=True)),
            "use other methods with weights instead: luthier.load_adapters and use_adapter({...})")
    merged = merge_loras(loras, weights, combination_type, rank)
    recipe = first.model_copy(update={"method": merged.config, "init_from": None, "output_dir": str(out.path)})
    recipe = make_paths_absolute(recipe)
    combined = {str(run.path): float(weight) for run, weight in zip(runs, weights, strict=True)}
    out.create(dump_recipe(recipe), {**record_start(recipe, identify_base(recipe.model), []), "combined": combined})
    tuner = attach_method(base, recipe.method, recipe.seed)
    tuner.load(merged.state)
    save_tuned(out, recipe, base, tuner)
    results = {"rank": merged.config.rank, "relative_error": merged.error}
    out.write("results.json", {**results, "combination_type": combination_type})
    return results
