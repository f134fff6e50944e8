"""The verb `train`: a recipe in, a run folder out. Read `assembly/factory.py` first; the loop is `training/loop.py`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from luthier import assembly
from luthier.api.run import Run
from luthier.assembly.compatibility import check_dtype
from luthier.assembly.consent import read_recipe
from luthier.assembly.factory import (
    build_eval_batches,
    build_eval_prompts,
    check_loaded_model,
    count_trainable,
    fit_objective,
    load_datasets,
    load_family,
    resolve_micro_batch_tokens,
    set_chat_format,
)
from luthier.assembly.model_card_facts import collect_model_card_facts
from luthier.assembly.multi_adapter_loading import display_name
from luthier.assembly.provenance import (
    CheckpointRecord,
    apply_base_model,
    check_base,
    check_data,
    check_resumable,
    check_runs,
    list_changes,
    list_differences,
    record_results,
    record_start,
)
from luthier.assembly.python_rows import accepts_python_values, find_kept_rows, keep_rows
from luthier.assembly.recipe import (
    Recipe,
    compute_default_learning_rate,
    describe_learning_rate,
    get_method_name,
    list_sources,
    precomputes_reference,
)
from luthier.assembly.reference_model import (
    describe_master_copy_cost,
    describe_reference_cost,
    initial_model,
    precompute_reference,
)
from luthier.assembly.rl_setup import build_training_source, check_rewards, init_rl_policy
from luthier.assembly.run_evaluation import (
    evaluate_answers,
    evaluate_objective,
    format_answers,
    pick_headline,
    pick_score,
)
from luthier.assembly.run_io import save_tuned
from luthier.assembly.run_warnings import (
    find_data_problems,
    find_method_problems,
    find_schedule_problems,
    find_unused_settings,
)
from luthier.assembly.settings import fill_left_out, list_resolved, make_paths_absolute, make_public, resolve_settings
from luthier.core.consent import accepts_consent
from luthier.core.errors import RecipeError, RunError
from luthier.core.protocols import Tuner
from luthier.core.types import TokenizedExample
from luthier.distributed import process_group
from luthier.evaluation.generation_eval import EvalPrompt
from luthier.reporting.model_card import build_model_card
from luthier.reporting.plots import plot_lengths, plot_metrics, plot_training
from luthier.reporting.progress import Progress, status
from luthier.training import checkpoint
from luthier.training.child_process import end_with_parent_process
from luthier.training.interrupts import handle_interrupts
from luthier.training.learning_monitor import LearningMonitor
from luthier.training.loop import (
    OnlineFeed,
    OnlineTrainJob,
    TrainJob,
    TrainResult,
    count_total_steps,
    run_training_loop,
)
from luthier.training.memory import configure_malloc, measure_peak_gb
from luthier.training.os_errors import translate_os_errors
from luthier.training.rng import seed_everything
from luthier.training.run_lock import create_numbered_folder, lock_run
from luthier.training.step import Reference
from luthier.training.trackers import JsonLines, Tracker, check_trackers, log_to_all, open_trackers


@accepts_python_values
@accepts_consent
def train(recipe: str | Path | Mapping[str, Any] | Recipe | None = None, *, resume: bool = False,
          quiet: bool = False, base_model: Path | str | None = None, allow_code: Sequence[str] = (),
          **settings: Any) -> Run:
    """Fine-tune a model. Returns the run folder.

    `data`, `data.eval` and `data.test` may be rows instead of paths: a list of dictionaries, a `datasets.Dataset` or a
    pandas DataFrame. They are written to the folder `data` of the run.

    Args:
        recipe: a YAML file, a mapping, or nothing where `settings` are complete.
        resume: continue the run from its newest intact checkpoint.
        quiet: print no progress.
        base_model: where the base is now, if it was moved since the run that is resumed, or that this one starts from,
            was trained; it must be the same base.
        allow_code: files, modules, URLs or base models whose code the recipe may run (`core/consent.py`).
        settings: they override the recipe: ``model="smollm2", data="mine.jsonl", method={"name": "lora", "rank": 16}``.

    Raises:
        LuthierError: with all errors, before any work where they can be known.
    """
    end_with_parent_process()
    if resume and isinstance(recipe, str | Path) and Path(recipe).name == "recipe.yaml":
        settings.setdefault("output_dir", str(Path(recipe).parent))  # the folder that is named, wherever it was made
    config = apply_base_model(read_recipe(recipe, settings), base_model, resume)
    configure_malloc()
    process_group.init_process_group()
    quiet = quiet or process_group.get_rank() > 0
    named = Run(config.output_dir) if config.output_dir else None
    if resume:
        if named is None:
            raise RecipeError("resume: the run folder is not given", "give it: output_dir=RUN")
        config = find_kept_rows(keep_rows(config, named, resume), named)
        if _is_finished(Run(named.require_exists().path), config, quiet):
            _print_line(quiet, f"{named.path} is already finished after {named.results['steps']} steps")
            return named
    elif named and process_group.get_rank() == 0:
        named.require_vacant()
    assembly.rows.check_sources(config.data)
    check_dtype(config.model)
    check_trackers(config.training.report_to)
    run = named or Run(_create_run_folder(config))
    with lock_run(run) if process_group.get_rank() == 0 else nullcontext():
        if not resume and process_group.get_rank() == 0:
            run.require_vacant()
        config = keep_rows(config, run, resume)
        _start_or_resume(config, run, resume, quiet)
        process_group.barrier()
    return run


def _start_or_resume(config: Recipe, run: Run, resume: bool, quiet: bool) -> None:
    """Check what can be checked before the base is loaded, then train into the run folder."""
    report = partial(_print_line, quiet)
    saved = _find_checkpoint(run, quiet) if resume else None
    if resume:
        config = fill_left_out(config, Recipe.parse(run.recipe))
        check_base(run, config.model, report=report)
        check_data(run, list_sources(config))
    if saved:
        check_resumable(run, saved.state.get("record") or {}, report)
    check_runs(config, report)
    with _open_output_folder(run) as out:
        _run_recipe(config, run, out, saved, resume, quiet)


def _run_recipe(recipe: Recipe, run: Run, out: Run, saved: checkpoint.Checkpoint | None, resume: bool,
                quiet: bool) -> None:
    """Set up and run the training; `out` is the folder that this rank writes to."""
    _print_warnings(quiet, find_unused_settings(recipe))
    check_rewards(recipe)
    with status("loading the base", quiet=quiet):
        identity = assembly.identify_base(recipe.model)
        seed_everything(recipe.seed)
        base = load_family(recipe.model, recipe.objective.uses_masking)
        check_loaded_model(recipe, base)
        micro_tokens = resolve_micro_batch_tokens(recipe, base)
        base.enable_gradient_checkpointing(0 if recipe.training.gradient_checkpointing
                                           else micro_tokens)
    if base.padding_reason:
        _print_line(quiet, f"warning: {base.padding_reason}")
    with status("reading the data", quiet=quiet):
        recipe = fit_objective(recipe, datasets := load_datasets(recipe, base))
        set_chat_format(base, datasets)
    _check_same_recipe(run, recipe) if resume else None
    rate, before = recipe.optimizer.learning_rate or compute_default_learning_rate(recipe), recipe
    recipe = resolve_settings(recipe, base, identity, rate, run.path)
    examples = datasets.test_examples or datasets.eval_examples
    prompts = build_eval_prompts(recipe, base, examples) if recipe.evaluate.metrics else []
    tuner, reference = init_rl_policy(recipe, base)
    if not resume or process_group.get_rank() > 0:
        kept = make_paths_absolute(recipe)
        out.create(assembly.dump_recipe(kept), record_start(kept, identity, list_resolved(before, recipe)))
    if not saved:
        _write_data_report(out, datasets.report)
    share = count_trainable(base, tuner)
    _print_summary(recipe, base, datasets, tuner, share, describe_learning_rate(before), quiet)
    datasets = _precompute_references(recipe, base, datasets, reference, quiet)
    feed = build_training_source(recipe, base, datasets, tuner, reference, out.path,
                         lambda line: _print_line(quiet, f"warning: {line}"))
    _print_warnings(quiet, find_schedule_problems(recipe, feed))
    rollouts = feed if isinstance(feed, assembly.RolloutSource) else None
    results: dict[str, Any] = share | (process_group.broadcast_object(run.results) if resume else {})
    part = "test" if datasets.test else "validation"
    if recipe.evaluate.before_training and not {"before", f"{part}_before"} & results.keys():
        with initial_model(reference):
            results |= _evaluate_before(out, recipe, base, part, datasets.test or datasets.eval, prompts, reference,
                                        rollouts, quiet)
    out.write("results.json", results)
    trackers = [*_build_trackers(out, recipe, saved, share), LearningMonitor(
        recipe.objective.variant, recipe.objective.name == "grpo", lambda sentence: _print_warnings(quiet, [sentence]))]
    if process_group.get_rank() > 0:
        # Everything that must be equal on all ranks exists by now; dropout should differ.
        seed_everything(recipe.seed + process_group.get_rank())
    job_type: Any = OnlineTrainJob if rollouts else TrainJob
    job = job_type(base, tuner, recipe.objective, feed, build_eval_batches(recipe, base, datasets),
                   recipe.training, recipe.optimizer, rate, run.checkpoints,
                   reference=reference, log=log_to_all(*trackers),
                   warn=lambda sentence: _print_line(quiet, f"warning: {sentence}"), get_record=CheckpointRecord(out))
    summary = _run_training(job, trackers, saved, quiet)
    if isinstance(feed, assembly.rows.StreamingBatchSource):
        _write_stream_report(out, feed.report(datasets.report), quiet)
    if summary.stopped.startswith("SIG"):
        raise Interrupted(run, summary)
    with translate_os_errors(run.path):
        _finish_run(out, recipe, job, summary, part, datasets.test or datasets.eval, prompts, results, quiet)


def _print_summary(recipe: Recipe, base: Any, datasets: Any, tuner: Tuner, share: Mapping[str, float],
                   learning_rate: str, quiet: bool) -> None:
    """Print row counts, warnings about data and method, trainable parameters and the cost of a reference."""
    for line in datasets.report.lines():
        _print_line(quiet, line)
    _print_warnings(quiet, [*find_data_problems(recipe, datasets), *find_method_problems(recipe, base, tuner)])
    _print_line(quiet, f"{get_method_name(recipe)} trains {share['trainable']:,} of {share['parameters']:,} parameters "
                f"({share['trainable_fraction']:.2%}) at a learning rate of {learning_rate}")
    for line in (describe_reference_cost(recipe, tuner), describe_master_copy_cost(tuner)):
        _print_line(quiet or not line, line)


@contextmanager
def _open_output_folder(run: Run) -> Iterator[Run]:
    """The folder that this process writes to: the run folder for rank 0, a temporary one for the others."""
    if process_group.get_rank() == 0:
        yield run
        return
    with TemporaryDirectory() as folder:
        yield Run(Path(folder) / "run")


def _precompute_references(recipe: Recipe, base: Any, datasets: Any, reference: Reference, quiet: bool) -> Any:
    """The data, with log-probabilities of the reference model where the recipe precomputes them."""
    total = len(datasets.train) + len(datasets.eval) + len(datasets.test)
    quiet = quiet or not precomputes_reference(recipe)
    with Progress(total, title="reference log-probabilities", quiet=quiet) as bar:
        return precompute_reference(recipe, base, datasets, reference, bar.update)


class Interrupted(RunError):
    """A signal stopped the run early; it can be resumed."""

    def __init__(self, run: Run, summary: TrainResult) -> None:
        self.run = run
        self.exit_code = 128 + signal.Signals[summary.stopped].value
        super().__init__(f"{summary.stopped} at step {summary.steps}; a checkpoint is in {run.checkpoints}",
                         f"continue with: luthier train --resume {run.path}")


def _is_finished(run: Run, recipe: Recipe, quiet: bool) -> bool:
    """Whether the run is complete. Raises `RunError` where it is a run of another recipe."""
    if not run.recipe:
        raise RunError(f"{str(run.path)!r} has no recipe.yaml, so it cannot be resumed",
                       "name a run folder that `luthier train` has written")
    _check_same_recipe(run, recipe)
    for line in list_changes(run):
        _print_line(quiet, f"warning: {line}")
    return "stopped" in run.results and (run.path / "README.md").exists()  # the file written last


def _check_same_recipe(run: Run, recipe: Recipe) -> None:
    """Raises `RunError` where the run was started with another recipe."""
    if changed := list_differences(run, recipe):
        raise RunError(f"{str(run.path)!r} was started with another recipe:\n  " + "\n  ".join(changed),
                       f"resume it with its own recipe (luthier train --resume {run.path}), or name another folder "
                       "(output_dir=NAME)")


def _write_data_report(run: Run, report: assembly.rows.DataReport) -> None:
    run.write("data_report.json", report.to_json())
    if report.parts:  # a stream has no statistics yet
        with translate_os_errors(run.path):
            plot_lengths(report.parts, run.path / "lengths.png")


def _write_stream_report(run: Run, report: assembly.rows.DataReport, quiet: bool) -> None:
    """Write and print the counts of streamed rows, which are known only after training."""
    run.write("data_report.json", report.to_json())
    for line in report.lines():
        if line.startswith("train: "):
            _print_line(quiet, line)


def _build_trackers(run: Run, recipe: Recipe, saved: checkpoint.Checkpoint | None,
                    share: Mapping[str, float]) -> list[Tracker]:
    """metrics.jsonl, and the trackers that the recipe names."""
    at = saved.step if saved else None
    log = JsonLines(run.path / "metrics.jsonl", resume_at=at)
    if not saved:
        log.log(0, share)
    return [log, *open_trackers(recipe.training.report_to, run.path, assembly.dump_recipe(make_public(recipe)), at)]


def _run_training(job: TrainJob, trackers: Sequence[Tracker], saved: checkpoint.Checkpoint | None,
                  quiet: bool) -> TrainResult:
    total = count_total_steps(job.training, job.feed.steps_per_epoch)
    start = saved.step if saved else 0
    with ExitStack() as closing, handle_interrupts() as interruption, Progress(total, start=start, quiet=quiet) as bar:
        for tracker in trackers:
            closing.callback(tracker.close)
        job.get_stop_signal = lambda: interruption.requested or ""
        shown = {"loss": "loss", "reward": "reward", "eval_loss": "eval loss", "tokens_per_second": "tokens/s"}
        job.show_progress = lambda step, metrics: bar.update(
            step, **{shown[k]: v for k, v in metrics.items() if k in shown})
        return run_training_loop(job, saved)


def _evaluate_before(run: Run, recipe: Recipe, base: Any, part: str, test: list[TokenizedExample],
                     prompts: Sequence[EvalPrompt], reference: Reference, rollouts: OnlineFeed | None,
                     quiet: bool) -> dict[str, Any]:
    """Metrics of the model before training."""
    results: dict[str, Any] = {}
    if test:
        results[f"{part}_before"] = measured = evaluate_objective(recipe, base, test, nullcontext, rollouts)
        results |= pick_headline("before", measured)
    if prompts:
        before = evaluate_answers("answers of the base model", base, prompts, recipe, quiet)
        results |= {"before": before.scores, "metric": recipe.evaluate.metrics[0]}
        run.write_lines("answers_before.jsonl", format_answers(prompts, before))
    return results


def _finish_run(run: Run, recipe: Recipe, job: TrainJob, summary: TrainResult, part: str, test: list[TokenizedExample],
                prompts: Sequence[EvalPrompt], results: dict[str, Any], quiet: bool) -> None:
    """Save the trained weights, evaluate them, and write results, plots and the model card."""
    base: Any = job.family
    save_tuned(run, recipe, base, job.attached)
    results |= {"train_seconds": round(summary.seconds, 2), "steps": summary.steps, "train_tokens": summary.tokens,
                "stopped": summary.stopped, "best": summary.best, "peak_memory_gb": measure_peak_gb(base.device),
                "file_bytes": sum(file.stat().st_size for file in run.path.glob("*.safetensors"))}
    if test:
        results[part] = measured = evaluate_objective(recipe, base, test, job.reference or nullcontext, job.rollouts)
        results |= pick_headline("after", measured) | {"measured_on": part,
                                                        "examples": len(test[:recipe.evaluate.max_samples])}
        plot_metrics(measured, recipe.objective.classes or (), run.path)
    if prompts:
        after = evaluate_answers("answers of the trained model", base, prompts, recipe, quiet)
        results |= {"after": after.scores, "metric": recipe.evaluate.metrics[0], "measured_on": part,
                    "examples": len(prompts)}
        run.write_lines("answers.jsonl", format_answers(prompts, after))
        results["before"] = pick_score(results.get("before"), results["metric"])
        results["after"] = pick_score(results["after"], results["metric"])
        results["scores"] = after.scores
    run.write("results.json", results | record_results(run))
    plot_training(run.metrics, run.results, recipe.objective.name, run.path / "loss.png")
    run.write("README.md", build_model_card(collect_model_card_facts(run, run, recipe, base)))


def _find_checkpoint(run: Run, quiet: bool) -> checkpoint.Checkpoint | None:
    """The newest intact checkpoint; prints a warning for every damaged one."""
    saved, problems = checkpoint.find_latest(run.checkpoints)
    for problem in problems:
        _print_line(quiet, f"warning: {problem}")
    if saved is None:
        _print_line(quiet, f"{run.path} has no checkpoint yet; starting from the beginning")
    return saved


def _create_run_folder(recipe: Recipe) -> str:
    """runs/<method>-<base>, with a number if that exists; the same folder on all ranks."""
    stem = Path("runs") / f"{get_method_name(recipe)}-{display_name(recipe.model.name_or_path)}"
    return process_group.broadcast_object(str(create_numbered_folder(stem)) if process_group.get_rank() == 0 else "")


def _print_line(quiet: bool, line: str) -> None:
    if not quiet and process_group.get_rank() == 0:
        print(line, file=sys.stderr)


def _print_warnings(quiet: bool, sentences: Sequence[str]) -> None:
    for sentence in sentences:
        _print_line(quiet, f"warning: {sentence}")
