"""The loop around the step: evaluate, keep the best, save, stop early, go on where a run was killed.

Read `step.py` first.

Everything that decides the next step is in a checkpoint: the trained weights, the optimiser's moments, the data
cursor, every random state of every rank, and the best evaluation so far. So a run that was killed and resumed ends
with the same bits as one that was not.

Whatever decides what ranks do together (which evaluation is the best, when to stop) is decided from the first rank's
numbers: a difference in one last bit would otherwise let one rank wait for another for ever.
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
    """How long to train, in what portions, and what to keep."""

    epochs: float = Field(1.0, gt=0, description="passes over the data")
    steps: int | None = Field(None, ge=1, description="optimiser steps, in place of epochs")
    batch_size: int = Field(8, ge=1, description="examples per optimiser step; changes what is learned")
    micro_tokens: int | None = Field(None, ge=1, description="most tokens in memory at once; never changes the result. "
                                     "Left out: 320 on a CPU, 8192 on a GPU")
    precision: Literal["float32", "bf16"] = Field("float32", description="bf16: mixed precision by autocast, while "
                                                  "training; held-out rows are measured without it, as `evaluate` does")
    gradient_checkpointing: bool = Field(False, description="recompute every block in the backward pass to save "
                                         "memory; if not, in rows longer than micro_tokens as many as do not fit")
    eval_every: int | None = Field(None, ge=1, description="steps between evaluations; left out: once an epoch")
    save_every: int | None = Field(None, ge=1, description="steps between checkpoints, besides those at the "
                                   "best evaluation, at the end and on a signal")
    keep: int = Field(2, ge=1, description="checkpoints kept, besides the best one")
    patience: int | None = Field(None, ge=1, description="stop after this many evaluations without a better one")
    keep_best: bool = Field(True, description="end with the weights of the best evaluation, not the last")
    trackers: tuple[str, ...] = Field((), description="besides metrics.jsonl: tensorboard, wandb, trackio")

    @field_validator("trackers", mode="before")
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
    """How a training ended. `stopped` names the signal or the reason of an early end, empty for a full run."""

    steps: int
    seconds: float
    tokens: int
    stopped: str = ""
    best: dict[str, float] = field(default_factory=dict)


def count_total_steps(training: TrainingConfig, steps_per_epoch: int) -> int:
    return training.steps or max(1, math.ceil(training.epochs * steps_per_epoch))


def run_training_loop(job: TrainJob, resume: checkpoint.Checkpoint | None = None) -> TrainResult:
    """Train to the end, or to the signal; a signal leaves a checkpoint. Raises `NotFinite` on a broken loss."""
    total = count_total_steps(job.training, job.feed.steps_per_epoch)
    optimizer = Optimizer(job.attached.parameters(), job.attached.rate, job.learning_rate, job.optimizer, total,
                          job.attached.at_update)
    summary = TrainResult(0, 0.0, 0)
    bad_evaluations = _restore_checkpoint(job, optimizer, summary, resume) if resume else 0
    eval_every = job.training.eval_every or job.feed.steps_per_epoch or total  # a stream does not know its epoch
    job.family.train(True)
    longest = 0  # row so far
    waiting: _LogEntry | None = None  # on a GPU a step's numbers are read while the next step runs: see `later`
    ended = _StepClock()  # started when the numbers of the step before were there
    late = job.family.device.type == "cuda"
    while summary.steps < total and not summary.stopped:
        began = _StepClock()
        rate = optimizer.set_rate(summary.steps)
        batches = next(job.feed)
        longest = _trim_heap(job, batches, longest)
        stepped = step(job.family, job.objective, batches, optimizer, lambda: _build_autocast(job), job.reference)
        summary.steps += 1
        summary.tokens += stepped.tokens
        rollout_metrics = _follow_rollout(job.rollouts, stepped) if job.rollouts else {}
        line = _LogEntry(summary.steps, stepped, rate, began, rollout_metrics)
        if waiting:
            ended = _log_step(job, waiting, ended)
        waiting = line
        at_end = summary.steps == total
        evaluates = bool(job.eval_batches) and (summary.steps % eval_every == 0 or at_end)
        saves = at_end or bool(job.training.save_every and summary.steps % job.training.save_every == 0)
        summary.stopped = _stop_requested(job)
        if not late or evaluates or saves or summary.stopped:
            ended = _log_step(job, waiting, ended)
            waiting = None
        summary.seconds += began.wall()
        if evaluates:
            better = _evaluate(job, summary)
            bad_evaluations = 0 if better else bad_evaluations + 1
            if not at_end:
                summary.stopped = summary.stopped or _should_stop_early(job.training, bad_evaluations)
            saves = saves or better
        if saves or summary.stopped:
            _save_checkpoint(job, optimizer, summary, bad_evaluations)
    if job.training.keep_best and summary.best and summary.best["step"] != summary.steps:
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
    """Gives the heap's holes back before a row that is longer than any before, and what a rollout left; returns the
    longest row's tokens."""
    tokens = max(batch.inputs.tokens.shape[0] for batch in batches)
    if job.rollouts or tokens > longest:
        trim_heap(job.family.device)
    return max(tokens, longest)


class _StepClock:
    """Wall and user-CPU seconds since it was started."""

    def __init__(self) -> None:
        self._wall, self._user = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_utime

    def later(self, other: _StepClock) -> _StepClock:
        """Whichever of the two was started later."""
        return self if self._wall >= other._wall else other

    def wall(self) -> float:
        return time.perf_counter() - self._wall

    def user(self) -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_utime - self._user


@dataclass
class _LogEntry:
    """A line of metrics.jsonl before its numbers are read."""

    step: int
    stepped: StepResult
    rate: float
    clock: _StepClock
    rollout_metrics: Mapping[str, float]


def _log_step(job: TrainJob, line: _LogEntry, ended: _StepClock) -> _StepClock:
    """Write the step's line; returns a clock that was started when its numbers were there.

    A step takes from the end of the one before (`ended`), or from its own beginning where that is later. On a GPU it is
    queued while the one before still runs, so the time since its beginning would count both.
    """
    numbers = line.stepped.read_metrics()  # waits for the device
    clock, now = line.clock.later(ended), _StepClock()
    seconds = clock.wall()
    metrics = {
        **numbers, **line.rollout_metrics, "learning_rate": line.rate, "tokens": line.stepped.tokens,
        "examples": line.stepped.examples, "micro_batches": line.stepped.micro_batches, "step_seconds": seconds,
        "user_seconds": clock.user(), "tokens_per_second": line.stepped.tokens / seconds,
        "peak_memory_gb": measure_peak_gb(job.family.device),
    }
    if job.feed.steps_per_epoch:
        metrics["epoch"] = line.step / job.feed.steps_per_epoch
    if process_group.get_rank() == 0:
        job.log(line.step, metrics)
        job.show_progress(line.step, metrics)
    return now


def _evaluate(job: TrainJob, summary: TrainResult) -> bool:
    """Measure the held-out batches; whether this was the best so far."""
    job.family.train(False)
    found = job.rollouts.evaluate() if job.rollouts else evaluate_batches(job.family, job.objective, job.eval_batches,
                                                                          job.reference)
    metrics = {f"eval_{name}": value for name, value in process_group.broadcast_object(found).items()}
    job.family.train(True)
    if "eval_nll" in metrics:
        metrics["eval_perplexity"] = math.exp(min(metrics["eval_nll"], 700.0))
    if process_group.get_rank() == 0:
        job.log(summary.steps, metrics)
        job.show_progress(summary.steps, metrics)
    better = metrics["eval_loss"] < summary.best.get("eval_loss", math.inf)
    if better:
        summary.best = {"step": summary.steps, **metrics}
    return better


def _should_stop_early(training: TrainingConfig, bad_evaluations: int) -> str:
    """Why to stop early, or an empty string."""
    given_up = training.patience and bad_evaluations >= training.patience
    return f"no better evaluation in {bad_evaluations} of them" if given_up else ""


def _stop_requested(job: TrainJob) -> str:
    """Whether to stop; all ranks must say the same at the same step."""
    asked = job.get_stop_signal()
    if process_group.get_world_size() > 1 and process_group.all_reduce_sum([1.0 if asked else 0.0],
                                                                           job.family.device)[0]:
        return asked or "another process was told to stop"
    return asked


def _save_checkpoint(job: TrainJob, optimizer: Optimizer, summary: TrainResult, bad_evaluations: int) -> None:
    states = process_group.all_gather_object(rng.capture_rng_state(job.family.device))
    if process_group.get_rank() != 0:
        process_group.barrier()  # a later step reads what the first rank writes here
        return
    state = {"feed": job.feed.state(), "random": states, "summary": vars(summary),
             "bad_evaluations": bad_evaluations, "total_steps": optimizer.total, "record": job.get_record()}
    best = int(summary.best["step"]) if summary.best and job.training.keep_best else None
    checkpoint.save_checkpoint(job.folder, summary.steps, {"method": job.attached.state(),
                                                           "optimizer": optimizer.state()},
                               state, keep=job.training.keep, protect=best)
    process_group.barrier()


def _restore_checkpoint(job: TrainJob, optimizer: Optimizer, summary: TrainResult, saved: checkpoint.Checkpoint) -> int:
    """Put everything back as it was; returns the count of evaluations without a better one."""
    if saved.state["total_steps"] != optimizer.total:
        raise RunError(f"the run was planned for {saved.state['total_steps']} steps, now for {optimizer.total}: its "
                       "learning rate would not be what it was", "resume with the recipe that it was started with")
    job.attached.load(saved.tensors["method"])
    optimizer.load(saved.tensors["optimizer"])
    job.feed.load(saved.state["feed"])
    for name, value in saved.state["summary"].items():
        vars(summary)[name] = value
    bad_evaluations = int(saved.state["bad_evaluations"])
    # A signal's stop ends with this; a stop for want of better evaluations does not, or the run would go on beyond it.
    summary.stopped = _should_stop_early(job.training, bad_evaluations) if summary.steps < optimizer.total else ""
    for sentence in _restore_random(saved.state["random"]):
        job.warn(sentence)
    return bad_evaluations


def _restore_random(states: Any) -> list[str]:
    """Give this rank its own random states back; a sentence on what cannot be as it was."""
    saved = [states] if isinstance(states, dict) else states  # earlier versions kept the first rank's alone
    if len(saved) == process_group.get_world_size():
        return rng.restore_rng_state(saved[process_group.get_rank()])
    return [f"the checkpoint was saved by {len(saved)} processes, and {process_group.get_world_size()} continue: "
            f"dropout draws "
            "other random numbers than it would have drawn",
            *(rng.restore_rng_state(saved[0]) if process_group.get_rank() == 0 else ())]


def _load_best(job: TrainJob, summary: TrainResult) -> checkpoint.Checkpoint:
    try:
        return checkpoint.load_checkpoint(job.folder / f"step-{int(summary.best['step'])}")
    except RunError as error:
        raise RunError(f"{error.what}; it holds the weights of the best evaluation",
                       "end with the last weights instead: "
                       f"luthier train --resume {job.folder.parent} training.keep_best=false") from error


def _build_autocast(job: TrainJob) -> AbstractContextManager[Any]:
    if job.training.precision == "bf16":
        return torch.autocast(job.family.device.type, torch.bfloat16)
    return nullcontext()
