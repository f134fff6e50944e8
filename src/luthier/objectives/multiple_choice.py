"""Multiple choice: the correct one of the given answers to a question is made the most probable. Read `reward.py`
first.

With s_i the score of answer y_i to the question x,

    s_i  = log p(y_i | x) / |y_i|        (`per_token`; else log p(y_i | x))
    loss = - log( e^s_correct / sum_i e^s_i )

Liu et al. 2022 (arXiv:2205.05638), eq. 2. It is the Plackett-Luce loss of `reward` with one answer that is better than
the rest, and with the model's own probability in place of a head. Evaluated without training, it measures what a model
knows, as multiple-choice benchmarks do.

Shape letters: A items (answers), G groups (questions), K answers of the largest group.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from luthier.core.types import Loss, LossInputs, Outputs
from luthier.objectives.base import (
    ObjectiveConfig,
    compare_ranks,
    gather_by_group,
    get_group_weights,
    sum_and_count,
    upcast_to_float32,
)
from luthier.objectives.preference import compute_completion_logps


class MultipleChoiceConfig(ObjectiveConfig):
    """Multiple choice.

        total = sum over questions of w * loss          count = sum over questions of w

    Requires: `token_logps`. Items: the answers of an example; the one with the lowest rank is correct.
    Metrics: `accuracy`, the share of questions whose correct answer has a higher score than any other; `chance`, the
    accuracy of guessing.
    Raises: `DataError` if an example has no two answers of which one is better.

    Example:
        >>> import torch
        >>> target = LossInputs(torch.arange(3), torch.zeros(3), torch.ones(3), 1,
        ...                     labeled_segments=torch.tensor([1, 2]),
        ...                 labels=torch.tensor([0.0, 1.0]), groups=torch.tensor([0, 0]),
        ...                 item_of=torch.tensor([0, 0, 1]))
        >>> loss = MultipleChoiceConfig()(Outputs(token_logps=torch.tensor([-1.0, -3.0, -3.0])), target)
        >>> round(float(loss.total), 4)  # -2 and -3: log(1 + 1/e)
        0.3133
    """

    example_types: ClassVar[frozenset[str]] = frozenset({"PreferenceExample"})
    required_outputs: ClassVar[frozenset[str]] = frozenset({"token_logps"})

    name: Literal["multiple_choice"] = "multiple_choice"
    per_token: bool = Field(True, description=(
        "divide the log-probability of an answer by its number of tokens, so that short answers have no advantage"))

    def count(self, target: LossInputs) -> float:
        return float(get_group_weights(target, compare_ranks(target)[0]).sum())

    def __call__(self, outputs: Outputs, target: LossInputs) -> Loss:
        assert outputs.token_logps is not None
        table, better = compare_ranks(target)  # [G, K], [G, K, K]
        logps = upcast_to_float32(compute_completion_logps(outputs.token_logps, target, self.per_token))  # [A]
        scores = gather_by_group(logps, table, -float("inf"))  # [G, K]
        correct = better.sum(-1).argmax(-1, keepdim=True)  # [G, 1] the answer that is better than the most others
        losses = scores.logsumexp(-1) - scores.gather(-1, correct)[:, 0]  # [G]
        weights = get_group_weights(target, table)  # [G]
        return Loss((weights.to(losses.dtype) * losses).sum(), weights.sum(), sum_and_count({
            "accuracy": _is_top_scored(scores.detach(), correct), "chance": 1 / (table >= 0).sum(-1)}))


def _is_top_scored(scores: Tensor, correct: Tensor) -> Tensor:
    """[G] whether the score of the correct answer is above all others. A tie counts as wrong."""
    others = scores.scatter(-1, correct, -float("inf"))  # [G, K]
    return scores.gather(-1, correct)[:, 0] > others.amax(-1)  # [G]
