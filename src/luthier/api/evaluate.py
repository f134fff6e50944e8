"""The verb `evaluate`: metrics of a run on test rows or other data. Read `api/train.py` first."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from luthier import assembly
from luthier.assembly.consent import drop_denied_rewards
from luthier.assembly.factory import build_eval_prompts, load_datasets, resolve_micro_batch_tokens
from luthier.assembly.initialization import reference_context
from luthier.assembly.policy_evaluation import evaluate_policy
from luthier.assembly.provenance import check_data
from luthier.assembly.python_rows import accepts_python_values
from luthier.assembly.recipe import Recipe, list_sources
from luthier.assembly.run_io import open_run
from luthier.core.consent import accepts_consent
from luthier.core.errors import RecipeError
from luthier.evaluation.generation_eval import add_perplexity, evaluate_generations
from luthier.reporting.progress import Progress, print_line, status
from luthier.training.run_folder import Run
from luthier.training.step import evaluate_batches


@accepts_python_values
@accepts_consent
def evaluate(run: Run | Path | str, *, data: Any = None, metrics: Sequence[str] | str = (),
             max_samples: int | None = None, base_model_only: bool = False, max_new_tokens: int | None = None,
             quiet: bool = False, base_model: Path | str | None = None, allow_code: Sequence[str] = (),
             **settings: Any) -> dict[str, Any]:
    """Perplexity, token accuracy and the scores of generated answers on the run's test rows, or on `data`.

    Args:
        run: a run folder of `train`, a PEFT LoRA, or a Transformers folder.
        data: rows in place of the run's own: a path, a list of dictionaries, a `datasets.Dataset` or a DataFrame.
        metrics: scores of generated answers; default: those of the recipe.
        max_samples: maximum number of rows.
        base_model_only: evaluate the base model instead, without the adapter.
        base_model: where the base is now, if it was moved; it must be the one that the run was trained on.
        allow_code: files, modules, URLs or base models whose code the run's recipe may run (`core/consent.py`).
        settings: they override the run's recipe, such as ``**{"data.columns": {...}}``.

    Returns:
        metric -> value; docs/metrics.md defines each. Also `examples`, the number of rows; `measured_on`, which rows
        (`test`, `validation`, or `data`); `rows`, how many were `read`, `kept`, `truncated` and `refused`, with
        `reasons`, as in data_report.json.
    """
    run = run if isinstance(run, Run) else Run(run)
    with status("loading the run", quiet=quiet):
        recorded, family, tuner = open_run(run, False, base_model, partial(print_line, quiet=quiet))
    wanted = {"evaluate.metrics": list([metrics] if isinstance(metrics, str) else metrics) or None,
              "evaluate.max_samples": max_samples, "evaluate.max_new_tokens": max_new_tokens, **settings}
    recipe, denied = drop_denied_rewards(_build_eval_recipe(run, recorded, data, wanted), settings)
    for sentence in denied:
        print_line(f"note: {sentence}", quiet=quiet)
    # Streamed, so that the rows are read once, as test rows: a folder may have no train split.
    once = recipe.model_copy(update={"data": recipe.data.model_copy(update={"streaming": True})}) if data else recipe
    datasets = load_datasets(once, family)
    part, encoded, examples = (("test", datasets.test, datasets.test_examples) if datasets.test
                               else ("eval", datasets.eval, datasets.eval_examples))
    if encoded and not quiet:
        _print_report(datasets.report, part, overlap=not data)  # `data` stands for the training rows too
    if not encoded:
        raise RecipeError(f"{str(run.path)!r} was trained without test or validation rows",
                          "give rows: luthier evaluate RUN --data FILE")
    encoded = encoded[:recipe.evaluate.max_samples or len(encoded)]
    if base_model_only and tuner is None:
        raise RecipeError("the run holds a full model, so it does not contain the base model",
                          f"evaluate the base model itself: luthier evaluate {recorded.model.name_or_path} --data FILE")
    reference = _build_reference(run, recorded, recipe, family, tuner)
    family.train(False)
    with tuner.disabled() if base_model_only and tuner else nullcontext():
        batches = assembly.rows.build_eval_batches(encoded, resolve_micro_batch_tokens(recipe, family))
        if recipe.objective.is_online:  # without a reward there is nothing to measure of a policy
            results = ({} if denied and not recipe.objective.reward
                       else evaluate_policy(recipe, family, tuner, datasets, encoded))
        else:
            results = add_perplexity(evaluate_batches(family, recipe.objective, batches, reference))
        if recipe.evaluate.metrics:
            results |= _score_answers(recipe, family, examples, quiet)
    measured_on = "data" if data else "test" if datasets.test else "validation"
    return results | {"examples": len(encoded), "measured_on": measured_on, "rows": _count_rows(datasets.report, part)}


def _build_eval_recipe(run: Run, recorded: Recipe, data: str | None, settings: Mapping[str, Any]) -> Recipe:
    """The run's recipe with other settings, and with `data` in place of its rows. Raises `RunError` where rows that the
    run names have changed."""
    raw = assembly.dump_recipe(recorded)
    if "training.max_tokens_per_micro_batch" in run.provenance.get("resolved", ()):  # each machine resolves its own
        raw["training"]["max_tokens_per_micro_batch"] = None
    if data:
        raw["data"] |= {"train": data, "test": data, "eval": None}
    recipe = assembly.build_recipe(raw, settings)
    if not data:
        own = list_sources(recorded)
        check_data(run, [source for source in list_sources(recipe, "test", "eval") if source in own])
    return recipe


def _score_answers(recipe: Recipe, family: Any, examples: Any, quiet: bool) -> dict[str, float]:
    """The scores of generated answers."""
    prompts = build_eval_prompts(recipe, family, examples)
    with Progress(len(prompts), title="answering", quiet=quiet) as bar:
        return evaluate_generations(family, prompts, recipe.evaluate, lambda done, total: bar.update(done)).scores


def _build_reference(run: Run, recorded: Recipe, recipe: Recipe, family: Any, tuner: Any) -> Any:
    """The context manager in which the model is the reference. Raises `RecipeError` where there is no reference."""
    if "reference_logps" not in recipe.objective.required_outputs:
        return tuner.disabled if tuner else nullcontext
    if tuner:
        return reference_context(recipe, family, tuner)
    if not recipe.objective.is_online and recorded.model.name_or_path != str(run.path):
        raise RecipeError(f"objective {recipe.objective.name!r} compares the model with a reference, and "
                          f"{str(run.path)!r} holds a full model, which has overwritten it",
                          "read the results of the training (results.json: test), or evaluate with an "
                          "objective without a reference: objective=orpo")
    return nullcontext


def _print_report(report: assembly.rows.DataReport, part: str, overlap: bool) -> None:
    """Print how many rows were kept, truncated and refused, as `train` does."""
    for line in report.lines():
        if line.startswith(f"{part}: ") and (overlap or "also in train" not in line):
            print(line, file=sys.stderr)


def _count_rows(report: assembly.rows.DataReport, part: str) -> dict[str, Any]:
    """The counts of data_report.json for this part."""
    counted = report.to_json()["parts"][part]
    return {name: counted[name] for name in ("read", "kept", "truncated", "reasons", "refused")}
