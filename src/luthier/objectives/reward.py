"""A reward model: scores of answers, learned from comparisons. Read `preference.py` first.

With s_i the score of answer i, m_i the margin by which it is better than the rest (0 where nobody said), and i > j for
"i is better than j":

    plackett_luce   - sum_i log( e^(s_i - m_i) / (e^(s_i - m_i) + sum_{j: i > j} e^(s_j)) )    over i better than any
    all_pairs       - 1/n sum_{i > j} log sigmoid(s_i - s_j - m_i)                             over the n pairs

For two answers both are Bradley and Terry's. A ranking counts once, however many answers it has; a row's weight w
multiplies its loss and counts it w times.

Shape letters: A items (answers), G groups (prompts), K answers of the largest group.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from luthier.core.protocols import Head
from luthier.core.types import Loss, Outputs, Target
from luthier.objectives import metrics
from luthier.objectives.base import ObjectiveConfig, count_correct_pairs, gathered, group_weights, ranked, sums, wide


def plackett_luce(scores: Tensor, margins: Tensor, better: Tensor) -> Tensor:
    """[G] minus the log-probability of each ranking, drawn best first. Plackett 1975; in Rafailov et al. 2023
    (arXiv:2305.18290), eq. 18. `scores`, `margins`: [G, K]; `better`: [G, K, K]."""
    worse = torch.where(better, scores[:, None, :], -torch.inf).logsumexp(-1)
    terms = F.softplus(worse - (scores - margins))
    return torch.where(better.any(-1), terms, 0).sum(-1)


def all_pairs(scores: Tensor, margins: Tensor, better: Tensor) -> Tensor:
    """[G] the mean over each ranking's pairs. Ouyang et al. 2022 (arXiv:2203.02155), eq. 1; the margin as in Touvron et
    al. 2023 (Llama 2, arXiv:2307.09288), eq. 2. `scores`, `margins`: [G, K]; `better`: [G, K, K]."""
    terms = F.softplus(scores[:, None, :] + margins[:, :, None] - scores[:, :, None])
    return torch.where(better, terms, 0).sum((1, 2)) / better.sum((1, 2))


def centring(scores: Tensor, better: Tensor) -> Tensor:
    """[G] the mean over each ranking's pairs of (s_i + s_j)^2, which draws the scores of a prompt to a mean of 0.
    Eisenstein et al. 2023 (arXiv:2312.09244)."""
    return torch.where(better, (scores[:, :, None] + scores[:, None, :]).square(), 0).sum((1, 2)) / better.sum((1, 2))


class RewardConfig(ObjectiveConfig):
    """A reward model.

        total = sum over prompts of w (the ranking's loss + centring * its centring)      count = sum over prompts of w

    Requires: `scores` [A, 1] of the head `score`. Items: the answers of an example, labelled by rank, 0 best.
    Metrics: `rewards/chosen`, `rewards/rejected`, `rewards/margins`, `rewards/accuracies`, over all pairs; of held-out rows
    `calibration_error` and the bins that it is made of.
    Raises: `DataError` where an example has no two answers of which one is better.

    Example:
        >>> target = Target(torch.zeros(0), torch.zeros(0), torch.zeros(0), 1, items=torch.tensor([1, 2]),
        ...                 labels=torch.tensor([1.0, 0.0]), margins=torch.zeros(2), groups=torch.tensor([0, 0]))
        >>> loss = RewardConfig()(Outputs(scores=torch.tensor([[1.0], [2.0]])), target)
        >>> round(float(loss.total), 4), float(loss.count)  # log(1 + 1/e)
        (0.3133, 1.0)
    """

    name: Literal["reward"] = "reward"
    example_types: ClassVar[frozenset[str]] = frozenset({"ComparedExample"})
    required_outputs: ClassVar[frozenset[str]] = frozenset({"scores"})
    has_eval_metrics: ClassVar[bool] = True
    # 1e-5 for `full`: TRL's example of a reward model is at half the rate of its SFT, with LoRA as without.
    learning_rate_factor: ClassVar[float] = 0.5

    ranking: Literal["plackett_luce", "all_pairs"] = Field("plackett_luce", description=(
        "how more than two answers are compared: the ranking as a whole, or each pair of it"))
    centring: float = Field(0.0, ge=0, description="weight of what draws the scores of a prompt to a mean of 0")

    @property
    def heads(self) -> tuple[Head, ...]:
        return (Head("score", "item", task="regression"),)

    def count(self, target: Target) -> float:
        return float(group_weights(target, ranked(target)[0]).sum())

    def __call__(self, outputs: Outputs, target: Target) -> Loss:
        table, scores, margins, better = self._ranked(outputs, target)
        each = (plackett_luce if self.ranking == "plackett_luce" else all_pairs)(scores, margins, better)
        if self.centring:
            each = each + self.centring * centring(scores, better)
        group, i, j = better.nonzero(as_tuple=True)
        chosen, rejected = scores[group, i], scores[group, j]
        weights = group_weights(target, table)
        return Loss((weights.to(each.dtype) * each).sum(), weights.sum(), sums(
            reward_chosen=chosen, reward_rejected=rejected, reward_margin=chosen - rejected,
            pair_accuracy=count_correct_pairs(chosen, rejected)))

    def compute_eval_metrics(self, outputs: Outputs, target: Target) -> dict[str, float]:
        _, scores, _, better = self._ranked(outputs, target)
        group, i, j = better.nonzero(as_tuple=True)
        return metrics.calibration(torch.sigmoid(scores[group, i] - scores[group, j]))

    def _ranked(self, outputs: Outputs, target: Target) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The groups, their scores and margins, [G, K], 0 where one has fewer answers; what is better than what."""
        assert outputs.scores is not None
        table, better = ranked(target)
        scores = wide(outputs.scores[:, 0])
        return table, gathered(scores, table, 0.0), gathered(target.margins.to(scores.dtype), table, 0.0), better
