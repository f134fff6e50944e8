"""Warnings while a run trains: no gradient, or rewards without spread, for several steps. Read `trackers.py` first.

What is known before the first step, `assembly/run_warnings.py` says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

STEPS = 3  # consecutive steps, or rounds, before a warning: one flat batch happens in a healthy run

# What to look at, by the objective; the rest holds for every objective.
REASONS: Mapping[str, str] = {
    "ppo": "the learning signal is the reward: look at reward_std",
    "grpo": "the learning signal is the spread of rewards within a group: look at frac_reward_zero_std",
    "contrastive": "a batch needs negatives that differ from the positives: raise training.batch_size",
    "hinge": "every pair may have its margin already, and is then left alone",
    "kto": "the sigmoid may be saturated: lower objective.beta or the learning rate",
}
GENERAL = "rows of which all weights are 0, a method whose parts do not reach the output, or numbers below what " \
          "model.dtype can hold"


class LearningMonitor:
    """A `Tracker` that warns, once for each kind, where the metrics say that nothing is learned.

    Args:
        objective: the name of its loss (`variant`).
        grouped: whether answers are compared within their group (GRPO); else rewards of a whole round count.
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
        """A run that is shorter than `STEPS` is judged at its end."""
        if 0 < self._steps < STEPS and self._without_gradient == self._steps:
            self._warn_of_gradient()

    def _warn_of_gradient(self) -> None:
        reason = REASONS.get(self.objective)
        self._once("gradient", f"grad_norm is exactly 0 in {self._without_gradient} consecutive steps: nothing is "
                   f"learned. Likely reasons: {reason + '; ' if reason else ''}{GENERAL}")

    def _warn_of_spread(self) -> None:
        what = "all answers to the same prompt had the same reward" if self.grouped else \
            "all answers had the same reward"
        self._once("spread", f"in {self._without_spread} consecutive rounds {what}, so none is preferred over another. "
                   "Likely reasons: the reward is constant, the prompts are too hard or too easy for this model, or "
                   "the answers are alike (raise objective.temperature or objective.num_generations); "
                   "samples.jsonl shows some")

    def _once(self, kind: str, sentence: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            self.warn(sentence)
