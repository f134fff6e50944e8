"""The batch source of PPO and GRPO: optimizer steps over rollouts of the policy. Read `collector.py` first.

A rollout is trained on in `epochs_per_rollout` passes of `num_mini_batches` steps; then the next one is collected. The
training loop decides whether a rollout ends early (`end_rollout`).

A checkpoint holds the current rollout while steps of it are left. Between rollouts it holds none, since the weights and
the seed give the same completions again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np

from luthier.core.protocols import Family
from luthier.core.types import Batch, TokenizedExample
from luthier.rl.collector import RolloutCollector
from luthier.rl.rollout_batch import RolloutBatch, build_micro_batches


class RolloutSource:
    """An endless sequence of steps over the policy's own completions; a `training.loop.OnlineFeed`.

    Args:
        collector: makes the rollouts.
        policy: the model that trains.
        eval_prompts: held-out prompts, for `evaluate`.
        log_samples: called with (step, rows) of some completions of every rollout.
    """

    def __init__(self, collector: RolloutCollector, policy: Family, eval_prompts: Sequence[TokenizedExample] = (),
                 log_samples: Callable[[int, Sequence[Mapping[str, Any]]], None] = lambda step, rows: None) -> None:
        self.collector, self.policy, self.eval_prompts, self.log_samples = collector, policy, eval_prompts, log_samples
        self.steps, self.steps_taken = 0, 0  # of the whole training; of the current rollout
        self.rollout: RolloutBatch | None = None
        self._metrics: Mapping[str, float] = {}
        objective, cursor = collector.objective, collector.cursor
        full, rest = divmod(len(cursor.order(0)), cursor.batch_size)
        per_pass = full * min(objective.num_mini_batches, cursor.batch_size) + min(objective.num_mini_batches, rest)
        self.steps_per_epoch = objective.epochs_per_rollout * per_pass

    @property
    def early_stop_kl(self) -> float | None:
        """The KL from the policy that generated the rollout, in nats per token, at which the loop ends the rollout."""
        return self.collector.objective.early_stop_kl

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> list[Batch]:
        if self.rollout is None or self.steps_taken >= len(self._plan_steps(self.rollout)):
            self.rollout, self.steps_taken = self.collector.collect(self.policy), 0
            self._metrics = self.rollout.metrics
            self.log_samples(self.steps + 1, self.rollout.samples)
        selected = self._plan_steps(self.rollout)[self.steps_taken]
        self.steps_taken, self.steps = self.steps_taken + 1, self.steps + 1
        return self._build_step(self.rollout, selected)

    def _plan_steps(self, rollout: RolloutBatch) -> list[list[int]]:
        """The prompts of every step of the rollout, as indices into `rollout.prompts`."""
        objective, count = self.collector.objective, len(rollout.prompts)
        steps: list[list[int]] = []
        for epoch in range(objective.epochs_per_rollout):
            # From the rollout's number, not from a running generator: a resumed run has the same order.
            order = np.random.default_rng([self.collector.seed, rollout.number, epoch]).permutation(count)
            parts = np.array_split(order, min(objective.num_mini_batches, count))
            steps += [sorted(part.tolist()) for part in parts]  # sorted: only the division into steps is random
        return steps

    def _build_step(self, rollout: RolloutBatch, selected: Sequence[int]) -> list[Batch]:
        """The micro-batches of some prompts of the rollout, with the values of their tokens, [P] each."""
        prompts = [self.collector.prompts[i] for i in rollout.prompts]
        micro_batches = build_micro_batches(prompts, rollout.completions, rollout.rewards, selected,
                                            self.collector.max_tokens, self.collector.objective.temperature)
        return [replace(batch, target=replace(batch.target, precomputed={
            name: values[token_index] for name, values in rollout.token_values.items()}))  # [P]
            for batch, token_index in micro_batches]

    def take_metrics(self) -> Mapping[str, float]:
        """The metrics of a rollout that was collected since the last call; empty where there was none."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    def end_rollout(self) -> None:
        """Drop the steps that are left of the current rollout."""
        self.rollout = None

    def evaluate(self, prompts: Sequence[TokenizedExample] | None = None) -> dict[str, float]:
        """`RolloutCollector.evaluate` on these prompts; None: on the held-out prompts."""
        return self.collector.evaluate(self.policy, self.eval_prompts if prompts is None else prompts)

    def state(self) -> dict[str, Any]:
        unfinished = self.rollout is not None and self.steps_taken < len(self._plan_steps(self.rollout))
        return {**self.collector.state(), "steps": self.steps, "steps_taken": self.steps_taken,
                "rollout": self.rollout.state() if unfinished and self.rollout else None}

    def load(self, state: Mapping[str, Any]) -> None:
        self.collector.load(state)
        self.steps, self.steps_taken = state["steps"], state["steps_taken"]
        self.rollout = RolloutBatch.from_state(state["rollout"]) if state["rollout"] else None
