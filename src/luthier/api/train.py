"""The verb `train`: a recipe in, a run folder out. Read `build.py` first; the loop itself is `training/loop.py`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from luthier import assembly
from luthier.core.errors import RecipeError, RunError
from luthier.core.protocols import Attached
from luthier.core.types import Encoded
from luthier.distributed import process_group
from luthier.evaluation.generation_eval import Question, Scored, score, with_perplexity
from luthier.reporting.model_card import card
from luthier.reporting.plots import plot_lengths, plot_loss, plot_metrics
from luthier.reporting.progress import Progress, status
from luthier.training import checkpoint
from luthier.training.interrupts import interruptible
from luthier.training.learning_monitor import LearningMonitor
from luthier.training.loop import Job, Rolling, Summary, fit, total_steps
from luthier.training.memory import peak_gb, settle_allocator
from luthier.training.os_errors import explained
from luthier.training.rng import seed_everything
from luthier.training.run_folder import Run
from luthier.training.step import Reference, measure
from luthier.training.trackers import JsonLines, Tracker, demand, open_trackers


def train(recipe: str | Path | Mapping[str, Any] | assembly.Recipe | None = None, *, resume: bool = False,
          quiet: bool = False, base_model: str | None = None, **settings: Any) -> Run:
    """Fine-tune a model. Returns the run folder.

    Args:
        recipe: a YAML file, a mapping, or nothing where `settings` say it all.
        resume: go on with the run folder from its newest whole checkpoint.
        quiet: no progress on the terminal.
        base_model: where the base is now, if it was moved after the run that goes on, or that this one starts from, was
            made; it must be the same base.
        settings: laid over the recipe: ``model="smollm2", data="mine.jsonl", method={"name": "lora", "rank": 16}``.

    Raises:
        LuthierError: with everything that is wrong, before any work where it can be known.
    """
    made = _moved(assembly.recipe(recipe, settings), base_model, resume)
    settle_allocator()
    process_group.start()
    quiet = quiet or process_group.rank() > 0
    run = Run(process_group.agreed(made.output_dir or str(_fresh_name(made))))
    if not resume:
        run.vacant() if process_group.rank() == 0 else None
    elif _finished(run.existing(), made, quiet):
        _say(quiet, f"{run.path} is finished after {run.results['steps']} steps: nothing is left to do")
        return run
    assembly.rows.demand(made.data)
    assembly.check_dtype(made.model)
    demand(made.training.report_to)
    saved = _checkpoint(run, quiet) if resume else None
    if resume:
        made = assembly.fill_left_out(made, assembly.Recipe.parse(run.recipe))
        assembly.check_base(run, made.model, report=partial(_say, quiet))
    if saved:
        assembly.check_resumable(run, saved.state.get("record") or {}, partial(_say, quiet))
    assembly.check_runs(made, partial(_say, quiet))
    with _written(run) as out:
        _train(made, run, out, saved, resume, quiet)
    process_group.wait()
    return run


def _train(made: assembly.Recipe, run: Run, out: Run, saved: checkpoint.Checkpoint | None, resume: bool,
           quiet: bool) -> None:
    """What `train` does once there is something to do; `out` is the folder that this rank writes to."""
    _warn(quiet, assembly.find_unused_settings(made))
    assembly.check_rewards(made)
    with status("loading the base", quiet=quiet):
        identity = assembly.identify(made.model)
        seed_everything(made.seed)
        base = assembly.family(made.model, made.objective.hides)
        assembly.check(made, base)
        base.checkpointing(0 if made.training.gradient_checkpointing else assembly.resolve_max_tokens(made, base))
    if base.padded_why:
        _say(quiet, f"warning: {base.padded_why}")
    with status("reading the data", quiet=quiet):
        made = assembly.fitted(made, found := assembly.datasets(made, base))
        assembly.note_conversations(base, found)
    _demand_same(run, made) if resume else None
    rate, before = made.optimizer.learning_rate or assembly.default_learning_rate(made), made
    made = assembly.resolve_settings(made, base, identity, rate, run.path)
    asked = assembly.questions(made, base, found.test_examples or found.eval_examples) if made.evaluate.metrics else []
    attached, reference = assembly.begin(made, base)
    if not resume or process_group.rank() > 0:
        kept = assembly.make_paths_absolute(made)
        out.begin(assembly.dump(kept), assembly.record_start(kept, identity, assembly.list_resolved(before, made)))
    if not saved:
        _report(out, found.report)
    for line in found.report.lines():
        _say(quiet, line)
    _warn(quiet, [*assembly.find_data_problems(made, found), *assembly.find_method_problems(made, base, attached)])
    share = trainable_share(base, attached)
    _say(quiet, f"{assembly.method_name(made)} trains {share['trainable']:,} of {share['parameters']:,} parameters "
                f"({share['trainable_share']:.2%}) at a learning rate of {assembly.describe_learning_rate(before)}")
    for line in (assembly.price(made, attached), assembly.master_price(attached)):
        _say(quiet or not line, line)
    found = _referred(made, base, found, reference, quiet)
    feed = assembly.feed(made, base, found, attached, reference, out.path, lambda line: _say(quiet, f"warning: {line}"))
    _warn(quiet, assembly.find_schedule_problems(made, feed))
    rolling = feed if isinstance(feed, assembly.Rollouts) else None
    results: dict[str, Any] = share | (process_group.agreed(run.results) if resume else {})
    part = "test" if found.test else "validation"  # validation rows choose the checkpoint, so they are not unseen
    if made.evaluate.before_training and not {"before", f"{part}_before"} & results.keys():
        with assembly.untrained(reference):
            results |= _before(out, made, base, part, found.test or found.eval, asked, reference, rolling, quiet)
    out.write("results.json", results)
    trackers = [*_trackers(out, made, saved, share), LearningMonitor(
        made.objective.name, made.objective.name == "grpo", lambda sentence: _warn(quiet, [sentence]))]
    if process_group.rank() > 0:
        # Everything that ranks must have alike is made by now; dropout need not be alike.
        seed_everything(made.seed + process_group.rank())
    job = Job(base, attached, made.objective, feed, assembly.held_out(made, base, found),
              made.training, made.optimizer, rate, run.checkpoints,
              reference=reference, rolling=rolling, log=_to_all(*trackers),
              warn=lambda sentence: _say(quiet, f"warning: {sentence}"), record=assembly.CheckpointRecord(out))
    summary = _fit(job, trackers, saved, quiet)
    if isinstance(feed, assembly.rows.Stream):
        _streamed(out, feed.report(found.report), quiet)
    if summary.stopped.startswith("SIG"):
        raise Interrupted(run, summary)
    with explained(run.path):
        _finish(out, made, job, summary, part, found.test or found.eval, asked, results, quiet)


@contextmanager
def _written(run: Run) -> Iterator[Run]:
    """The folder that this process writes to: the run's for the first rank, one to throw away for the others."""
    if process_group.rank() == 0:
        yield run
        return
    with TemporaryDirectory() as folder:
        yield Run(Path(folder) / "run")


def _referred(made: assembly.Recipe, base: Any, found: Any, reference: Reference, quiet: bool) -> Any:
    """The rows, with what the reference says of them where the recipe asks it beforehand."""
    total = len(found.train) + len(found.eval) + len(found.test)
    with Progress(total, title="the reference reads", quiet=quiet or not assembly.precomputes_reference(made)) as bar:
        return assembly.asked(made, base, found, reference, bar.update)


# Measures of an objective on test or validation rows, the first that it has standing for the rest in results.json.
HEADLINES = ("reward", "perplexity", "spearman", "accuracy", "mrr", "pair_accuracy", "nll")


class Interrupted(RunError):
    """A signal ended the run early; it can be resumed."""

    def __init__(self, run: Run, summary: Summary) -> None:
        self.run = run
        self.exit_code = 128 + signal.Signals[summary.stopped].value
        super().__init__(f"{summary.stopped} at step {summary.steps}; a checkpoint is in {run.checkpoints}",
                         f"go on with: luthier train --resume {run.path}")


def trainable_share(base: Any, attached: Attached) -> dict[str, float]:
    """How many parameters train, of how many, counting both the base's and the method's own."""
    trained = attached.parameters()
    own = {id(p) for p in base.model.parameters()}
    whole = sum(p.numel() for p in [*base.model.parameters(), *(p for p in trained.values() if id(p) not in own)])
    # A map in few bits is one parameter of packed numbers: what counts are the weights that they stand for.
    whole += sum(s.inputs * s.outputs - s.weight.numel() for s in base.anatomy.sites if s.expand is not None)
    count = sum(p.numel() for p in trained.values())
    return {"trainable": count, "parameters": whole, "trainable_share": count / whole}


def _finished(run: Run, made: assembly.Recipe, quiet: bool) -> bool:
    """Whether the run has ended. Raises `RunError` where it is not a run of this recipe."""
    if not run.recipe:
        raise RunError(f"{str(run.path)!r} has no recipe.yaml, so nothing there can go on",
                       "name the folder of a run that `luthier train` began")
    _demand_same(run, made)
    for line in assembly.list_changes(run):
        _say(quiet, f"warning: {line}")
    return "stopped" in run.results and (run.path / "README.md").exists()  # the file written last


def _moved(made: assembly.Recipe, base_model: str | None, resume: bool) -> assembly.Recipe:
    """The recipe with the base at its new place. Raises `RecipeError` where no earlier run says which base it is."""
    if base_model is None:
        return made
    if not resume and made.init_from is None:
        raise RecipeError(f"base_model {base_model!r}: it names a base that was moved after a run was made, and this "
                          "run is new", "name its base as model.name_or_path (--model)")
    return made.model_copy(update={"model": made.model.model_copy(update={"name_or_path": base_model,
                                                                          "revision": None})})


def _demand_same(run: Run, made: assembly.Recipe) -> None:
    """Raises `RunError` where the run was started with another recipe."""
    if changed := assembly.list_differences(run, made):
        raise RunError(f"{str(run.path)!r} was started with another recipe:\n  " + "\n  ".join(changed),
                       f"go on with its own (luthier train --resume {run.path}), or name another folder "
                           "(output_dir=NAME)")


def _report(run: Run, report: assembly.rows.DataReport) -> None:
    run.write("data_report.json", report.to_json())
    if report.parts:  # of a stream nothing is known yet
        with explained(run.path):
            plot_lengths(report.parts, run.path / "lengths.png")


def _streamed(run: Run, report: assembly.rows.DataReport, quiet: bool) -> None:
    """What became of rows that were read while they were trained on."""
    run.write("data_report.json", report.to_json())
    for line in report.lines():
        if line.startswith("train: "):
            _say(quiet, line)


def _trackers(run: Run, made: assembly.Recipe, saved: checkpoint.Checkpoint | None,
              share: Mapping[str, float]) -> list[Tracker]:
    """metrics.jsonl, and what the recipe names besides."""
    at = saved.step if saved else None
    log = JsonLines(run.path / "metrics.jsonl", resume_at=at)
    if not saved:
        log.log(0, share)
    return [log, *open_trackers(made.training.report_to, run.path, assembly.dump(assembly.make_public(made)), at)]


def _to_all(*trackers: Tracker) -> Callable[[int, Mapping[str, float]], None]:
    def log(step: int, metrics: Mapping[str, float]) -> None:
        for tracker in trackers:
            tracker.log(step, metrics)
    return log


def _fit(job: Job, trackers: Sequence[Tracker], saved: checkpoint.Checkpoint | None, quiet: bool) -> Summary:
    total = total_steps(job.training, job.feed.steps_per_epoch)
    start = saved.step if saved else 0
    with ExitStack() as closing, interruptible() as interruption, Progress(total, start=start, quiet=quiet) as bar:
        for tracker in trackers:
            closing.callback(tracker.close)
        job.stop = lambda: interruption.requested or ""
        shown = {"loss": "loss", "reward": "reward", "eval_loss": "eval loss", "tokens_per_second": "tokens/s"}
        job.show = lambda step, metrics: bar.update(step, **{shown[k]: v for k, v in metrics.items() if k in shown})
        return fit(job, saved)


def _before(run: Run, made: assembly.Recipe, base: Any, part: str, test: list[Encoded], asked: Sequence[Question],
            reference: Reference, rolling: Rolling | None, quiet: bool) -> dict[str, Any]:
    """What the model is worth, before anything is trained."""
    results: dict[str, Any] = {}
    if test:
        results[f"{part}_before"] = measured = _measured(made, base, test, nullcontext, rolling)
        results |= _headline("before", measured)
    if asked:
        before = _score("the base answers", base, asked, made, quiet)
        results |= {"before": before.scores, "metric": made.evaluate.metrics[0]}
        run.write_lines("answers_before.jsonl", _answers(asked, before))
    return results


def _finish(run: Run, made: assembly.Recipe, job: Job, summary: Summary, part: str, test: list[Encoded],
            asked: Sequence[Question], results: dict[str, Any], quiet: bool) -> None:
    """Save what was trained, measure it, and write down what came out."""
    base: Any = job.family
    assembly.save_tuned(run, made, base, job.attached)
    results |= {"train_seconds": round(summary.seconds, 2), "steps": summary.steps, "train_tokens": summary.tokens,
                "stopped": summary.stopped, "best": summary.best, "peak_memory_gb": peak_gb(base.device),
                "file_bytes": sum(file.stat().st_size for file in run.path.glob("*.safetensors"))}
    if test:
        results[part] = measured = _measured(made, base, test, job.reference or nullcontext, job.rolling)
        results |= _headline("after", measured) | {"measured_on": part,
                                                   "examples": len(test[:made.evaluate.max_samples])}
        plot_metrics(measured, made.objective.classes or (), run.path)
    if asked:
        after = _score("the tuned model answers", base, asked, made, quiet)
        results |= {"after": after.scores, "metric": made.evaluate.metrics[0], "measured_on": part,
                    "examples": len(asked)}
        run.write_lines("answers.jsonl", _answers(asked, after))
        results["before"] = _plain(results.get("before"), results["metric"])
        results["after"] = _plain(results["after"], results["metric"])
        results["scores"] = after.scores
    run.write("results.json", results | assembly.record_results(run))
    plot_loss(run.metrics, run.path / "loss.png")
    run.write("README.md", card(run, run, made, base))


def _measured(made: assembly.Recipe, base: Any, test: list[Encoded], reference: Reference,
              rolling: Rolling | None) -> dict[str, float]:
    """The objective's own measures of test rows."""
    base.train(False)
    if rolling:
        return rolling.judged(test[:made.evaluate.max_samples])
    batches = assembly.rows.eval_batches(test[:made.evaluate.max_samples], assembly.resolve_max_tokens(made, base))
    return with_perplexity(measure(base, made.objective, batches, reference))


def _headline(when: str, measured: Mapping[str, float]) -> dict[str, Any]:
    """The one measure that stands for the rest where no answers are scored."""
    name = next((name for name in HEADLINES if name in measured), "loss")
    return {when: measured[name], "metric": name} if measured else {}


def _plain(scores: Any, metric: str) -> Any:
    return scores.get(metric) if isinstance(scores, dict) else scores


def _score(what: str, base: Any, asked: Sequence[Question], made: assembly.Recipe, quiet: bool) -> Scored:
    base.train(False)
    with Progress(len(asked), title=what, quiet=quiet) as bar:
        return score(base, asked, made.evaluate, tick=lambda done, total: bar.update(done))


def _answers(asked: Sequence[Question], scored: Scored) -> list[dict[str, str]]:
    return [{"prompt": q.text, "reference": q.reference, "answer": a}
            for q, a in zip(asked, scored.answers, strict=True)]


def _checkpoint(run: Run, quiet: bool) -> checkpoint.Checkpoint | None:
    """The newest whole checkpoint, with a word about every damaged one."""
    saved, words = checkpoint.latest(run.checkpoints)
    for word in words:
        _say(quiet, f"warning: {word}")
    if saved is None:
        _say(quiet, f"{run.path} has no checkpoint yet; starting from the beginning")
    return saved


def _fresh_name(made: assembly.Recipe) -> Path:
    """runs/<method>-<base>, numbered where that is taken."""
    stem = f"{assembly.method_name(made)}-{assembly.called(made.model.name_or_path)}"
    taken = {p.name for p in Path("runs").glob(f"{stem}*")}
    return Path("runs") / next(n for n in (stem, *(f"{stem}-{i}" for i in range(2, 10_000))) if n not in taken)


def _say(quiet: bool, line: str) -> None:
    if not quiet and process_group.rank() == 0:
        print(line, file=sys.stderr)


def _warn(quiet: bool, sentences: Sequence[str]) -> None:
    for sentence in sentences:
        _say(quiet, f"warning: {sentence}")
