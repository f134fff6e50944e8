"""Warnings during training: no gradient, or rewards without variance, for several steps. Read `trackers.py` first.

`assembly/run_warnings.py` has the warnings before the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

STEPS = 3  # consecutive steps, or rollouts, before a warning: a single flat batch is normal

# What to check, by objective; GENERAL holds for every objective.
REASONS: Mapping[str, str] = {
    "ppo": "the learning signal is the reward: check reward_std",
    "grpo": "the learning signal is the variance of rewards within a group: check frac_reward_zero_std",
    "contrastive": "a batch needs negatives that differ from the positives: raise training.batch_size",
    "hinge": "every pair may have reached its margin, and then has no gradient",
    "kto": "the sigmoid may be saturated: lower objective.beta or the learning rate",
}
GENERAL = "rows whose weights are all 0, a method whose parameters do not reach the output, or values below the " \
          "range of model.dtype"


class LearningMonitor:
    """A `Tracker` that warns, once per kind, where the metrics show that nothing is learned.

    Args:
        objective: the name of its loss (`variant`).
        grouped: whether completions are compared within their group (GRPO), not within the whole rollout.
        warn: called with a sentence.
    """

    def __init__(self, objective: str, grouped: bool, warn: Callable[[str], None]) -> None:
        self.objective, self.grouped, self.warn = objective, grouped, warn
        self._steps, self._without_gradient, self._without_spread = 0, 0, 0
        self._warned: set[str] = set()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if "grad_norm" in metrics:
            self._steps += 1
            self._without_gradient = self._without_gradient + 1 if metrics["grad_norm"] == 0 else 0
            if self._without_gradient >= STEPS:
                self._warn_of_gradient()
        if "reward_std" in metrics:
            flat = metrics["frac_reward_zero_std"] == 1 if self.grouped else metrics["reward_std"] <= 0
            self._without_spread = self._without_spread + 1 if flat else 0
            if self._without_spread >= STEPS:
                self._warn_of_spread()

    def close(self) -> None:
        """A run that is shorter than `STEPS` is checked at its end."""
        if 0 < self._steps < STEPS and self._without_gradient == self._steps:
            self._warn_of_gradient()

    def _warn_of_gradient(self) -> None:
        reason = REASONS.get(self.objective)
        self._once("gradient", f"grad_norm is exactly 0 in {self._without_gradient} consecutive steps: nothing is "
                   f"learned. Likely reasons: {reason + '; ' if reason else ''}{GENERAL}")

    def _warn_of_spread(self) -> None:
        what = "all answers to the same prompt had the same reward" if self.grouped else \
            "all answers had the same reward"
        self._once("spread", f"in {self._without_spread} consecutive rollouts {what}, so none is preferred to another. "
                   "Likely reasons: the reward is constant, the prompts are too hard or too easy for this model, or "
                   "the answers are alike (raise objective.temperature or objective.num_generations); "
                   "samples.jsonl shows some")

    def _once(self, kind: str, sentence: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            self.warn(sentence)
