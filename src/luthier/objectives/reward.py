"""Reward model: scores of completions, learned from comparisons. Read `preference.py` first.

With s_i the score of completion i, m_i the margin by which it is better than the rest (0 if not given), and i > j for
"i is better than j":

    plackett_luce   - sum_i log( e^(s_i - m_i) / (e^(s_i - m_i) + sum_{j: i > j} e^(s_j)) )    over i better than any
    all_pairs       - 1/n sum_{i > j} log sigmoid(s_i - s_j - m_i)                             over the n pairs

For two completions both are the Bradley-Terry loss. A ranking counts once, however many completions it has. The weight
of a row multiplies its loss and its count.

Shape letters: A items (completions), G groups (prompts), K completions of the largest group.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from luthier.core.protocols import Head
from luthier.core.types import Loss, LossInputs, Outputs
from luthier.objectives.base import (
    ObjectiveConfig,
    compare_ranks,
    count_correct_pairs,
    gather_by_group,
    get_group_weights,
    sum_and_count,
    upcast_to_float32,
)
from luthier.objectives.metrics import compute_calibration


def plackett_luce_loss(scores: Tensor, margins: Tensor, better: Tensor) -> Tensor:
    """Negative log-probability of each ranking, drawn best first. Returns [G].

    Plackett 1975; in Rafailov et al. 2023 (arXiv:2305.18290), eq. 18.

    Args:
        scores, margins: [G, K].
        better: [G, K, K] from `compare_ranks`.
    """
    worse = torch.where(better, scores[:, None, :], -torch.inf).logsumexp(-1)  # [G, K]
    terms = F.softplus(worse - (scores - margins))  # [G, K]
    return torch.where(better.any(-1), terms, 0).sum(-1)  # [G]


def all_pairs_loss(scores: Tensor, margins: Tensor, better: Tensor) -> Tensor:
    """Mean over the pairs of each ranking. Returns [G]. Arguments as for `plackett_luce_loss`.

    Ouyang et al. 2022 (arXiv:2203.02155), eq. 1; the margin as in Touvron et al. 2023 (Llama 2, arXiv:2307.09288),
    eq. 2.
    """
    terms = F.softplus(scores[:, None, :] + margins[:, :, None] - scores[:, :, None])  # [G, K, K]
    return torch.where(better, terms, 0).sum((1, 2)) / better.sum((1, 2))  # [G]


def center_rewards_loss(scores: Tensor, better: Tensor) -> Tensor:
    """Mean over the pairs of each ranking of (s_i + s_j)^2, which pulls the scores of a prompt to a mean of 0.

    Eisenstein et al. 2023 (arXiv:2312.09244). Returns [G].
    """
    return torch.where(better, (scores[:, :, None] + scores[:, None, :]).square(), 0).sum((1, 2)) / better.sum((1, 2))


class RewardConfig(ObjectiveConfig):
    """Reward model.

        total = sum over prompts of w (ranking loss + center_rewards_coefficient * centering loss)
        count = sum over prompts of w

    Requires: `scores` [A, 1] of the head `score`. Items: the completions of an example, labeled by rank, 0 best.
    Metrics: `rewards/chosen`, `rewards/rejected`, `rewards/margins`, `rewards/accuracies`, over all pairs; on held-out
    rows `calibration_error` and its bins.
    Raises: `DataError` if an example has no two completions of which one is better.

    Example:
        >>> target = LossInputs(torch.zeros(0), torch.zeros(0), torch.zeros(0), 1,
        ...                     labeled_segments=torch.tensor([1, 2]),
        ...                 labels=torch.tensor([1.0, 0.0]), margins=torch.zeros(2), groups=torch.tensor([0, 0]))
        >>> loss = RewardConfig()(Outputs(scores=torch.tensor([[1.0], [2.0]])), target)
        >>> round(float(loss.total), 4), float(loss.count)  # log(1 + 1/e)
        (0.3133, 1.0)
    """

    example_types: ClassVar[frozenset[str]] = frozenset({"PreferenceExample"})
    required_outputs: ClassVar[frozenset[str]] = frozenset({"scores"})
    has_eval_metrics: ClassVar[bool] = True
    # 1e-5 for `full`: TRL's example of a reward model has half the rate of its SFT example, with LoRA and without.
    learning_rate_factor: ClassVar[float] = 0.5

    name: Literal["reward"] = "reward"
    ranking: Literal["plackett_luce", "all_pairs"] = Field("plackett_luce", description=(
        "loss of rankings of more than two completions: of the whole ranking, or the mean over its pairs"))
    center_rewards_coefficient: float = Field(0.0, ge=0, description=(
        "weight of the loss that pulls the scores of a prompt to a mean of 0"))

    @property
    def heads(self) -> tuple[Head, ...]:
        return (Head("score", "item", task="regression"),)

    def count(self, target: LossInputs) -> float:
        return float(get_group_weights(target, compare_ranks(target)[0]).sum())

    def __call__(self, outputs: Outputs, target: LossInputs) -> Loss:
        # [G, K] three times, [G, K, K]
        table, scores, margins, better = self._arrange_scores(outputs, target)
        ranking_loss = plackett_luce_loss if self.ranking == "plackett_luce" else all_pairs_loss
        losses = ranking_loss(scores, margins, better)  # [G]
        if self.center_rewards_coefficient:
            losses = losses + self.center_rewards_coefficient * center_rewards_loss(scores, better)
        group, i, j = better.nonzero(as_tuple=True)  # [N] each, N pairs
        chosen, rejected = scores[group, i], scores[group, j]  # [N]
        weights = get_group_weights(target, table)  # [G]
        return Loss((weights.to(losses.dtype) * losses).sum(), weights.sum(), sum_and_count({
            "rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected,
            "rewards/accuracies": count_correct_pairs(chosen, rejected)}))

    def compute_eval_metrics(self, outputs: Outputs, target: LossInputs) -> dict[str, float]:
        _, scores, _, better = self._arrange_scores(outputs, target)
        group, i, j = better.nonzero(as_tuple=True)  # [N] each
        return compute_calibration(torch.sigmoid(scores[group, i] - scores[group, j]))

    def _arrange_scores(self, outputs: Outputs, target: LossInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Table, scores and margins, [G, K] each, 0 where a group has fewer completions; and `better`, [G, K, K]."""
        assert outputs.scores is not None
        table, better = compare_ranks(target)
        scores = upcast_to_float32(outputs.scores[:, 0])  # [A]
        margins = target.margins.to(scores.dtype)  # [A]
        return table, gather_by_group(scores, table, 0.0), gather_by_group(margins, table, 0.0), better
