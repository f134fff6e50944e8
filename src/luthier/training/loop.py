"""The training loop: step, log, evaluate, save, stop early, resume. Read `step.py` first.

A checkpoint holds everything that decides the next step: trained weights, optimizer moments, the data cursor, every
random state of every rank, and the best evaluation so far. A resumed run therefore equals an uninterrupted one bit for
bit.

Decisions that ranks make together (which evaluation is the best, when to stop) use the numbers of rank 0. Rounding
differs between ranks, so if each decided alone, one could stop while another waits in a collective call.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from pydantic import Field, field_validator

from luthier.core.config import Config
from luthier.core.errors import RunError
from luthier.core.protocols import BatchSource, Family, Objective, Tuner
from luthier.core.types import Batch, TokenizedExample
from luthier.distributed import process_group
from luthier.training import checkpoint, rng
from luthier.training.memory import measure_peak_gb, trim_heap
from luthier.training.optimizer import Optimizer, OptimizerConfig
from luthier.training.step import Reference, StepResult, evaluate_batches, step


class TrainingConfig(Config):
    """Length, batches, evaluation and checkpoints of a training run."""

    num_train_epochs: float = Field(1.0, gt=0, description="passes over the training rows")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps, instead of epochs")
    batch_size: int = Field(8, ge=1, description="examples per optimizer step; affects the result")
    max_tokens_per_micro_batch: int | None = Field(None, ge=1, description="maximum number of tokens of one "
                                                                           "micro-batch; does not affect the result. "
                                                                           "Default: 320 on a CPU, 8192 on a GPU")
    precision: Literal["float32", "bf16"] = Field("float32", description="bf16: mixed precision by autocast, in "
                                                                         "training only; held-out rows are evaluated "
                                                                         "without it, as in `evaluate`")
    gradient_checkpointing: bool = Field(False, description="recompute every layer in the backward pass to save "
                                                            "memory; if false, only rows longer than "
                                                            "max_tokens_per_micro_batch recompute layers, as many as "
                                                            "necessary")
    eval_steps: int | None = Field(None, ge=1, description="steps between evaluations; default: once per epoch")
    save_steps: int | None = Field(None, ge=1, description="steps between checkpoints, in addition to those at the "
                                                           "best evaluation, at the end and on a signal")
    save_total_limit: int = Field(2, ge=1, description="number of checkpoints to keep, in addition to the best one")
    early_stopping_patience: int | None = Field(None, ge=1, description="stop after this many evaluations without "
                                                                        "improvement")
    load_best_model_at_end: bool = Field(True, description="end with the weights of the best evaluation, not the last")
    report_to: tuple[str, ...] = Field((), description="trackers in addition to metrics.jsonl: tensorboard, wandb, "
                                                       "trackio, mlflow")

    @field_validator("report_to", mode="before")
    @classmethod
    def _several(cls, given: Any) -> Any:
        return (given,) if isinstance(given, str) else given


class OnlineFeed(BatchSource, Protocol):
    """A batch source whose batches are made by the model that trains: rollouts. See `rl/rollout_source.py`."""

    @property
    def early_stop_kl(self) -> float | None:
        """The loop ends a rollout once the metric `approx_kl` of a step is above this; None: never."""
        ...

    def take_metrics(self) -> Mapping[str, float]:
        """The metrics of a rollout that was collected since the last call; empty where there was none."""
        ...

    def end_rollout(self) -> None:
        """Drop the steps that are left of the current rollout."""
        ...

    def evaluate(self, prompts: Sequence[TokenizedExample] | None = None) -> dict[str, float]:
        """Metrics of the policy on these prompts, None: on the held-out prompts; `loss` is among them."""
        ...


@dataclass
class TrainJob:
    """The objects of one training run.

    Args:
        eval_batches: held-out micro-batches; empty: no evaluation.
        learning_rate: the peak.
        folder: of the checkpoints.
        log: called with (step, metrics) for every line of metrics.jsonl.
        reference: makes the context in which the model is the reference model of the objective; None: no reference.
        show_progress: called with (step, metrics) for the progress display.
        warn: called with a sentence for the user.
        get_record: called at every save; returns what a checkpoint stores besides the state of the training.
        get_stop_signal: called after every step; returns the name of a signal that ends the run, or an empty string.
    """

    family: Family
    attached: Tuner
    objective: Objective
    feed: BatchSource
    eval_batches: list[Batch]
    training: TrainingConfig
    optimizer: OptimizerConfig
    learning_rate: float
    folder: Path
    log: Callable[[int, Mapping[str, float]], None]
    reference: Reference | None = None
    show_progress: Callable[[int, Mapping[str, float]], None] = lambda step, metrics: None
    warn: Callable[[str], None] = lambda sentence: None
    get_stop_signal: Callable[[], str] = lambda: ""
    get_record: Callable[[], Mapping[str, Any]] = dict

    @property
    def rollouts(self) -> OnlineFeed | None:
        """The feed, if it makes its batches with the model that trains."""
        return None


@dataclass
class OnlineTrainJob(TrainJob):
    """A training run on rollouts of the model itself (PPO, GRPO)."""

    feed: OnlineFeed

    @property
    def rollouts(self) -> OnlineFeed:
        return self.feed


@dataclass
class TrainResult:
    """How a training run ended. `stopped` is the signal or the reason of an early end, empty for a full run."""

    steps: int
    seconds: float
    tokens: int
    stopped: str = ""
    best: dict[str, float] = field(default_factory=dict)


def count_total_steps(training: TrainingConfig, steps_per_epoch: int) -> int:
    return training.max_steps or max(1, math.ceil(training.num_train_epochs * steps_per_epoch))


def run_training_loop(job: TrainJob, resume: checkpoint.Checkpoint | None = None) -> TrainResult:
    """Train until the last step, an early stop or a signal; each leaves a checkpoint. Raises `NotFinite` where the loss
    or the gradient is not finite."""
    total = count_total_steps(job.training, job.feed.steps_per_epoch)
    optimizer = Optimizer(job.attached.parameters(), job.attached.lr_multiplier, job.learning_rate, job.optimizer,
                          total,
                          job.attached.optimizer_hooks)
    summary = TrainResult(0, 0.0, 0)
    bad_evaluations = _restore_checkpoint(job, optimizer, summary, resume) if resume else 0
    eval_every = job.training.eval_steps or job.feed.steps_per_epoch or total  # a stream does not know its epoch
    job.family.train(True)
    longest = 0  # tokens of the longest row so far
    pending: _LogEntry | None = None  # on a GPU a step's metrics are read while the next step runs: see `async_read`
    previous = _StepClock()  # started when the metrics of the previous step had been read
    logs_late = job.family.device.type == "cuda"
    while summary.steps < total and not summary.stopped:
        clock = _StepClock()
        rate = optimizer.set_learning_rate(summary.steps)
        batches = next(job.feed)
        longest = _trim_heap(job, batches, longest)
        stepped = step(job.family, job.objective, batches, optimizer, lambda: _build_autocast(job), job.reference)
        summary.steps += 1
        summary.tokens += stepped.tokens
        rollout_metrics = _follow_rollout(job.rollouts, stepped) if job.rollouts else {}
        entry = _LogEntry(summary.steps, stepped, rate, clock, rollout_metrics)
        if pending:
            previous = _log_step(job, pending, previous)  # the step before, while this one still runs
        pending = entry
        at_end = summary.steps == total
        evaluates = bool(job.eval_batches) and (summary.steps % eval_every == 0 or at_end)
        saves = at_end or bool(job.training.save_steps and summary.steps % job.training.save_steps == 0)
        summary.stopped = _get_stop_signal(job)
        if not logs_late or evaluates or saves or summary.stopped:
            previous = _log_step(job, pending, previous)
            pending = None
        summary.seconds += clock.wall()  # without evaluations and checkpoints
        if evaluates:
            better = _evaluate(job, summary)
            bad_evaluations = 0 if better else bad_evaluations + 1
            if not at_end:
                summary.stopped = summary.stopped or _describe_early_stop(job.training, bad_evaluations)
            saves = saves or better  # the best weights must be in a checkpoint
        if saves or summary.stopped:
            _save_checkpoint(job, optimizer, summary, bad_evaluations)
    if job.training.load_best_model_at_end and summary.best and summary.best["step"] != summary.steps:
        job.attached.load(_load_best(job, summary).tensors["method"])
    optimizer.close()
    job.family.train(False)
    return summary


# ---------------------------------------------------------------- what surrounds a step


def _follow_rollout(rollouts: OnlineFeed, stepped: StepResult) -> Mapping[str, float]:
    """End the rollout where the step left the policy too far from the one that generated it. Returns the metrics of a
    rollout that began with this step."""
    limit = rollouts.early_stop_kl
    if limit is not None and stepped.read_metrics()["approx_kl"] > limit:
        rollouts.end_rollout()
    return rollouts.take_metrics()


def _trim_heap(job: TrainJob, batches: Sequence[Batch], longest: int) -> int:
    """Return freed heap memory to the system before a row that is longer than all before it, and after a rollout.
    Returns the tokens of the longest row."""
    tokens = max(batch.inputs.tokens.shape[0] for batch in batches)
    if job.rollouts or tokens > longest:
        trim_heap(job.family.device)
    return max(tokens, longest)


class _StepClock:
    """Wall-clock and user CPU seconds since it was started."""

    def __init__(self) -> None:
        self._wall, self._user = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_utime

    def pick_later(self, other: _StepClock) -> _StepClock:
        """The one of the two that was started later."""
        return self if self._wall >= other._wall else other

    def wall(self) -> float:
        return time.perf_counter() - self._wall

    def user(self) -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_utime - self._user


@dataclass
class _LogEntry:
    """A line of metrics.jsonl whose metrics have not been read from the device yet."""

    step: int
    stepped: StepResult
    rate: float
    clock: _StepClock
    rollout_metrics: Mapping[str, float]


def _log_step(job: TrainJob, entry: _LogEntry, previous: _StepClock) -> _StepClock:
    """Log the step's metrics. Returns a clock that was started when they had been read.

    A step lasts from the end of the previous one (`previous`), or from its own start where that is later. On a GPU it
    is queued while the previous one still runs, so the time since its own start would count both.
    """
    measured = entry.stepped.read_metrics()  # waits for the device
    clock, now = entry.clock.pick_later(previous), _StepClock()
    seconds = clock.wall()
    metrics = {
        **measured, **entry.rollout_metrics, "learning_rate": entry.rate, "tokens": entry.stepped.tokens,
        "examples": entry.stepped.examples, "micro_batches": entry.stepped.micro_batches, "step_seconds": seconds,
        "user_seconds": clock.user(), "tokens_per_second": entry.stepped.tokens / seconds,
        "peak_memory_gb": measure_peak_gb(job.family.device),
    }
    if job.feed.steps_per_epoch:
        metrics["epoch"] = entry.step / job.feed.steps_per_epoch
    if process_group.get_rank() == 0:
        job.log(entry.step, metrics)
        job.show_progress(entry.step, metrics)
    return now


def _evaluate(job: TrainJob, summary: TrainResult) -> bool:
    """Evaluate on the held-out data. Returns whether this evaluation is the best so far."""
    job.family.train(False)
    found = job.rollouts.evaluate() if job.rollouts else evaluate_batches(job.family, job.objective, job.eval_batches,
                                                                          job.reference)
    metrics = {f"eval_{name}": value for name, value in process_group.broadcast_object(found).items()}
    job.family.train(True)
    if "eval_nll" in metrics:
        # Clamped: exp overflows float64 above 709.
        metrics["eval_perplexity"] = math.exp(min(metrics["eval_nll"], 700.0))
    if process_group.get_rank() == 0:
        job.log(summary.steps, metrics)
        job.show_progress(summary.steps, metrics)
    better = metrics["eval_loss"] < summary.best.get("eval_loss", math.inf)
    if better:
        summary.best = {"step": summary.steps, **metrics}
    return better


def _describe_early_stop(training: TrainingConfig, bad_evaluations: int) -> str:
    """The reason of an early stop, or an empty string."""
    is_over = training.early_stopping_patience and bad_evaluations >= training.early_stopping_patience
    return f"evaluations without improvement: {bad_evaluations}" if is_over else ""


def _get_stop_signal(job: TrainJob) -> str:
    """The signal that ends the run, or an empty string. All ranks stop at the same step."""
    signal = job.get_stop_signal()
    if process_group.get_world_size() > 1 and process_group.all_reduce_sum([1.0 if signal else 0.0],
                                                                           job.family.device)[0]:
        return signal or "another process received a signal"
    return signal


def _save_checkpoint(job: TrainJob, optimizer: Optimizer, summary: TrainResult, bad_evaluations: int) -> None:
    states = process_group.all_gather_object(rng.capture_rng_state(job.family.device))
    if process_group.get_rank() != 0:
        process_group.barrier()  # a later step reads what the first rank writes here
        return
    state = {"feed": job.feed.state(), "random": states, "summary": vars(summary),
             "bad_evaluations": bad_evaluations, "total_steps": optimizer.total, "record": job.get_record()}
    best = int(summary.best["step"]) if summary.best and job.training.load_best_model_at_end else None
    checkpoint.save_checkpoint(job.folder, summary.steps, {"method": job.attached.state(),
                                                           "optimizer": optimizer.state()},
                               state, keep=job.training.save_total_limit, protect=best)
    process_group.barrier()


def _restore_checkpoint(job: TrainJob, optimizer: Optimizer, summary: TrainResult,
                        saved: checkpoint.Checkpoint) -> int:
    """Restore the saved state. Returns the number of evaluations in a row without a better one."""
    if saved.state["total_steps"] != optimizer.total:
        raise RunError(f"the run was started with {saved.state['total_steps']} steps and now has {optimizer.total}: "
                       "the learning rate schedule would differ", "resume with the recipe of the run")
    job.attached.load(saved.tensors["method"])
    optimizer.load(saved.tensors["optimizer"])
    job.feed.load(saved.state["feed"])
    for name, value in saved.state["summary"].items():
        vars(summary)[name] = value
    bad_evaluations = int(saved.state["bad_evaluations"])
    # A stop by a signal ends here. An early stop does not: the run would otherwise continue past it.
    summary.stopped = _describe_early_stop(job.training, bad_evaluations) if summary.steps < optimizer.total else ""
    for sentence in _restore_random(saved.state["random"]):
        job.warn(sentence)
    return bad_evaluations


def _restore_random(states: Any) -> list[str]:
    """Restore this rank's random states. Returns sentences on what cannot be restored."""
    saved = [states] if isinstance(states, dict) else states  # earlier versions saved those of rank 0 alone
    if len(saved) == process_group.get_world_size():
        return rng.restore_rng_state(saved[process_group.get_rank()])
    return [f"the checkpoint was saved by {len(saved)} processes, and {process_group.get_world_size()} continue: "
            "dropout draws "
            "other random numbers than an uninterrupted run",
            *(rng.restore_rng_state(saved[0]) if process_group.get_rank() == 0 else ())]


def _load_best(job: TrainJob, summary: TrainResult) -> checkpoint.Checkpoint:
    try:
        return checkpoint.load_checkpoint(job.folder / f"step-{int(summary.best['step'])}")
    except RunError as error:
        raise RunError(f"{error.what}; it holds the weights of the best evaluation",
                       "end with the last weights instead: "
                       f"luthier train --resume {job.folder.parent} training.load_best_model_at_end=false") from error


def _build_autocast(job: TrainJob) -> AbstractContextManager[Any]:
    if job.training.precision == "bf16":
        return torch.autocast(job.family.device.type, torch.bfloat16)
    return nullcontext()
