"""Multiple choice: of the answers that a question comes with, the right one is made the likeliest.

Read `reward.py` first.

With s_i the score of answer y_i to the question x,

    s_i  = log p(y_i | x) / |y_i|        (`per_token`; else log p(y_i | x))
    loss = - log( e^s_right / sum_i e^s_i )

Liu et al. 2022 (arXiv:2205.05638), eq. 2. It is `reward`'s Plackett-Luce with one answer that is better than the rest,
and the model's own probability in place of a head. Measured without any training, it says what a base knows, as the
multiple-choice benchmarks do.

Shape letters: A items (answers), G groups (questions), K answers of the largest group.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from luthier.core.types import Loss, Outputs, Target
from luthier.objectives.base import ObjectiveConfig, gathered, group_weights, ranked, sums, wide
from luthier.objectives.preference import answer_logps


class ChoiceConfig(ObjectiveConfig):
    """Multiple choice.

        total = sum over questions of w * loss          count = sum over questions of w

    Requires: `token_logps`. Items: the answers of an example; the one of the lowest rank is right, the others wrong.
    Metrics: `accuracy`, the share of questions whose right answer has a higher score than any other; `chance`, what
    guessing would reach.
    Raises: `DataError` where an example has no two answers of which one is better.

    Example:
        >>> import torch
        >>> target = Target(torch.arange(3), torch.zeros(3), torch.ones(3), 1, items=torch.tensor([1, 2]),
        ...                 labels=torch.tensor([0.0, 1.0]), groups=torch.tensor([0, 0]),
        ...                 item_of=torch.tensor([0, 0, 1]))
        >>> loss = ChoiceConfig()(Outputs(token_logps=torch.tensor([-1.0, -3.0, -3.0])), target)
        >>> round(float(loss.total), 4)  # -2 against -3: log(1 + 1/e)
        0.3133
    """

    name: Literal["choice"] = "choice"
    example_types: ClassVar[frozenset[str]] = frozenset({"ComparedExample"})
    required_outputs: ClassVar[frozenset[str]] = frozenset({"token_logps"})

    per_token: bool = Field(True, description="whether an answer's log-probability is divided by its tokens, so that "
                                              "short answers have no advantage")

    def count(self, target: Target) -> float:
        return float(group_weights(target, ranked(target)[0]).sum())

    def __call__(self, outputs: Outputs, target: Target) -> Loss:
        assert outputs.token_logps is not None
        table, better = ranked(target)
        scores = gathered(wide(answer_logps(outputs.token_logps, target, self.per_token)), table, -float("inf"))
        right = better.sum(-1).argmax(-1, keepdim=True)  # better than the most
        each = scores.logsumexp(-1) - scores.gather(-1, right)[:, 0]
        weights = group_weights(target, table)
        return Loss((weights.to(each.dtype) * each).sum(), weights.sum(), sums(
            accuracy=_first(scores.detach(), right), chance=1 / (table >= 0).sum(-1)))


def _first(scores: Tensor, right: Tensor) -> Tensor:
    """[G] whether the right answer's score is above all others'; where it shares the first place, it is not."""
    others = scores.scatter(-1, right, -float("inf"))
    return scores.gather(-1, right)[:, 0] > others.amax(-1)
