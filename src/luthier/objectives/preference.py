"""Preference losses: which of two completions of a prompt is better. Read `cross_entropy.py` and `base.py` first.

`dpo` has a reference model and several losses (`loss_type`, see `DPO_LOSSES`); `simpo` and `orpo` have no reference. A
ranking of K completions is used as all of its pairs.

    total = sum over pairs of weight * loss          count = sum over pairs of weight, the weight of the pair's row

In the formulas  w, l    log pi(y_w | x), log pi(y_l | x): the better and the worse completion under the policy
                 w', l'  the same under the reference model
                 h       (w - w') - (l - l'), how much more than the reference the policy prefers the better one

Shape letters: P predicted tokens, A items (completions), N pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from luthier.core.types import Loss, LossInputs, Outputs
from luthier.objectives.base import (
    PRECOMPUTE_HELP,
    Metrics,
    ObjectiveConfig,
    compare_ranks,
    count_correct_pairs,
    get_group_weights,
    sum_and_count,
)


@dataclass(frozen=True)
class PairLogps:
    """[N] log-probabilities of whole completions, in nats; the reference's are 0 where an objective has no reference.
    """

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor

    @property
    def ratio_chosen(self) -> Tensor:
        """w - w'."""
        return self.chosen - self.reference_chosen  # [N]

    @property
    def ratio_rejected(self) -> Tensor:
        """l - l'."""
        return self.rejected - self.reference_rejected  # [N]

    @property
    def margin(self) -> Tensor:
        """h."""
        return self.ratio_chosen - self.ratio_rejected  # [N]


# ---------------------------------------------------------------- losses with a reference: [N] each


def sigmoid_loss(logps: PairLogps, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(beta h). Rafailov et al. 2023 (arXiv:2305.18290), eq. 7."""
    return -F.logsigmoid(beta * logps.margin)


def ipo_loss(logps: PairLogps, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """(h - 1 / (2 beta))^2 of log-probabilities per token. Azar et al. 2023 (arXiv:2310.12036), eq. 17 (beta: tau).

    The paper writes sums over a completion. The results of its authors, and of TRL, use means, so that length does not
    decide.
    """
    return (logps.margin - 1 / (2 * beta)).square()


def hinge_loss(logps: PairLogps, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """max(0, 1 - beta h). Zhao et al. 2023 (SLiC-HF, arXiv:2305.10425), with the reference as in Liu et al. 2023 (RSO,
    arXiv:2309.06657)."""
    return torch.relu(1 - beta * logps.margin)


def robust_loss(logps: PairLogps, beta: float, label_smoothing: float) -> Tensor:
    """(-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)) / (1 - 2 e), e = label_smoothing.

    Its mean over labels that are flipped with probability e is the sigmoid loss of the true labels. Chowdhury et al.
    2024 (arXiv:2403.00409).
    """
    right, wrong = F.logsigmoid(beta * logps.margin), F.logsigmoid(-beta * logps.margin)  # [N]
    return (label_smoothing * wrong - (1 - label_smoothing) * right) / (1 - 2 * label_smoothing)


def cdpo_loss(logps: PairLogps, beta: float, label_smoothing: float) -> Tensor:
    """-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), e = label_smoothing.

    Cross-entropy with labels that are wrong with probability e. Mitchell 2023, "A note on DPO with noisy preferences".
    TRL computes it as `loss_type: sigmoid` with `label_smoothing`.
    """
    right, wrong = F.logsigmoid(beta * logps.margin), F.logsigmoid(-beta * logps.margin)  # [N]
    return -(1 - label_smoothing) * right - label_smoothing * wrong


PairLoss = Callable[[PairLogps, float, float], Tensor]

DPO_LOSSES: dict[str, PairLoss] = {
    "sigmoid": sigmoid_loss,
    "ipo": ipo_loss,
    "hinge": hinge_loss,
    "robust": robust_loss,
    "cdpo": cdpo_loss,
}
PER_TOKEN = frozenset({"ipo"})  # losses of the mean log-probability per token; the others take the sum
SMOOTHED = frozenset({"robust", "cdpo"})  # losses that read `label_smoothing`
DEFAULT_SMOOTHING = 0.1


# ---------------------------------------------------------------- losses without a reference: [N] each


def simpo_loss(logps: PairLogps, beta: float, gamma: float) -> Tensor:
    """-log sigmoid(beta (w - l) - gamma) of log-probabilities per token. Meng et al. 2024 (arXiv:2405.14734), eq. 6."""
    return -F.logsigmoid(beta * (logps.chosen - logps.rejected) - gamma)


def orpo_loss(logps: PairLogps, beta: float) -> Tensor:
    """-w - beta log sigmoid(log odds(w) - log odds(l)) of log-probabilities per token, odds(w) = e^w / (1 - e^w).
    Hong et al. 2024 (arXiv:2403.07691), eq. 6 and 7, with beta for lambda."""
    odds = (logps.chosen - log1mexp(logps.chosen)) - (logps.rejected - log1mexp(logps.rejected))  # [N]
    return -logps.chosen - beta * F.logsigmoid(odds)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0. Where x is so near to 0 that the result would be infinite, x is clamped below 0."""
    return torch.log(-torch.expm1(x.clamp(max=-torch.finfo(x.dtype).tiny)))


# ---------------------------------------------------------------- the configs


def compute_completion_logps(logps: Tensor, target: LossInputs, mean: bool) -> Tensor:
    """sum_p w_p logps_p over the tokens of each item; `mean`: divided by sum_p w_p. Returns [A].

    Args:
        logps: [P].
    """
    items = target.labeled_segments.shape[0]
    # Predictions of a shared prompt belong to no item: they are added to one more row, which is dropped.
    owner = torch.where(target.item_of < 0, items, target.item_of)  # [P]
    weights = target.weights.to(logps.dtype)  # [P]
    total = logps.new_zeros(items + 1).index_add(0, owner, weights * logps)  # [A + 1]
    if mean:
        # [A + 1] Clamped: the row that is dropped may have no weight.
        total = total / logps.new_zeros(items + 1).index_add(0, owner, weights).clamp(min=torch.finfo(logps.dtype).tiny)
    return total[:items]  # [A]


class PreferenceConfig(ObjectiveConfig):
    """Base class of the preference objectives.

    Requires: `token_logps`, and `reference_logps` where the loss has a reference. Items: the completions of an example,
    labeled by rank, 0 best.
    Metrics: `rewards/chosen`, `rewards/rejected` (beta times w - w' and l - l'), `rewards/margins`,
    `rewards/accuracies`, `logps/chosen`, `logps/rejected`.
    """

    example_types: ClassVar[frozenset[str]] = frozenset({"PreferenceExample"})
    required_outputs: ClassVar[frozenset[str]] = frozenset({"token_logps"})
    # 1e-6 for `full`, 2.5e-5 for LoRA: TRL's DPO default is 1e-6 where its SFT default is 2e-5; the papers have 5e-7 to
    # 1e-6.
    learning_rate_factor: ClassVar[float] = 0.05

    beta: float = Field(0.1, gt=0, description="strength of the constraint to the reference; larger stays closer")

    @property
    def is_length_normalized(self) -> bool:
        """Whether log-probabilities are means over the tokens of a completion instead of sums."""
        return True

    def compute_pair_losses(self, logps: PairLogps) -> Tensor:
        """The loss of each pair. Returns [N]."""
        raise NotImplementedError

    def count(self, target: LossInputs) -> float:
        return float(self._get_pair_weights(target).sum())

    def __call__(self, outputs: Outputs, target: LossInputs) -> Loss:
        logps = self.build_pairs(outputs, target)  # [N] each
        losses = self.compute_pair_losses(logps)  # [N]
        weights = self._get_pair_weights(target)  # [N]
        return Loss((weights.to(losses.dtype) * losses).sum(), weights.sum(), self.compute_metrics(logps))

    def build_pairs(self, outputs: Outputs, target: LossInputs) -> PairLogps:
        """Log-probabilities of every (better, worse) pair of completions of one prompt."""
        assert outputs.token_logps is not None
        policy = compute_completion_logps(outputs.token_logps, target, self.is_length_normalized)  # [A]
        reference = torch.zeros_like(policy)  # [A]
        if "reference_logps" in self.required_outputs:
            assert outputs.reference_logps is not None
            reference = compute_completion_logps(outputs.reference_logps, target, self.is_length_normalized).detach()
        table, better = compare_ranks(target)  # [G, K], [G, K, K]
        group, i, j = better.nonzero(as_tuple=True)  # [N] each
        best, worst = table[group, i], table[group, j]  # [N] item indices
        return PairLogps(policy[best], policy[worst], reference[best], reference[worst])

    def _get_pair_weights(self, target: LossInputs) -> Tensor:
        """[N] in the order of `build_pairs`."""
        table, better = compare_ranks(target)
        return get_group_weights(target, table)[better.nonzero()[:, 0]]  # [N]

    def compute_metrics(self, logps: PairLogps) -> Metrics:
        chosen, rejected = self.beta * logps.ratio_chosen, self.beta * logps.ratio_rejected  # [N]
        return sum_and_count({
            "rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected,
            "rewards/accuracies": count_correct_pairs(chosen, rejected),
            "logps/chosen": logps.chosen, "logps/rejected": logps.rejected})


class DpoConfig(PreferenceConfig):
    """Direct preference optimization: the reward of a completion is the policy's log-ratio to the reference.

    Example:
        >>> pair = PairLogps(*(torch.tensor([x]) for x in (-3.0, -4.0, -3.5, -3.5)))
        >>> round(float(DpoConfig(beta=1.0).compute_pair_losses(pair)), 4)  # h = 1: log(1 + 1/e)
        0.3133
    """

    required_outputs: ClassVar[frozenset[str]] = frozenset({"token_logps", "reference_logps"})

    name: Literal["dpo"] = "dpo"
    loss_type: Literal["sigmoid", "ipo", "hinge", "robust", "cdpo"] = Field("sigmoid", description=(
        "loss of a pair: sigmoid is DPO; `objective: ipo` (hinge, robust, cdpo) is short for dpo with that loss_type"))
    label_smoothing: float | None = Field(None, ge=0, lt=0.5, description=(
        f"robust and cdpo: assumed share of pairs with swapped labels; default: {DEFAULT_SMOOTHING}"))
    precompute_reference: bool = Field(False, description=PRECOMPUTE_HELP)

    @model_validator(mode="before")
    @classmethod
    def _set_default_smoothing(cls, raw: Any) -> Any:
        if isinstance(raw, Mapping) and raw.get("loss_type") in SMOOTHED and raw.get("label_smoothing") is None:
            return {**raw, "label_smoothing": DEFAULT_SMOOTHING}
        return raw

    @model_validator(mode="after")
    def _refuse_unused_smoothing(self) -> Self:
        if self.label_smoothing is not None and self.loss_type not in SMOOTHED:
            raise ValueError(f"label_smoothing has no effect with loss_type {self.loss_type}: use loss_type cdpo "
                             "(TRL's sigmoid with label smoothing) or robust, or omit label_smoothing")
        return self

    @property
    def variant(self) -> str:
        return self.name if self.loss_type == "sigmoid" else self.loss_type

    @property
    def is_length_normalized(self) -> bool:
        return self.loss_type in PER_TOKEN

    def compute_pair_losses(self, logps: PairLogps) -> Tensor:
        return DPO_LOSSES[self.loss_type](logps, self.beta, self.label_smoothing or 0.0)


class SimpoConfig(PreferenceConfig):
    """Simple preference optimization: no reference, log-probabilities per token, and a target margin."""

    name: Literal["simpo"] = "simpo"
    beta: float = Field(2.0, gt=0, description="scale of the log-probabilities per token")
    gamma: float = Field(1.0, ge=0, description="target margin between the rewards of both completions")

    def compute_pair_losses(self, logps: PairLogps) -> Tensor:
        return simpo_loss(logps, self.beta, self.gamma)


class OrpoConfig(PreferenceConfig):
    """Odds-ratio preference optimization: fine-tuning on the better completion plus a preference term; no reference."""

    # 5e-6 for `full`, as in the paper's Mistral-ORPO: half of the loss is that of supervised fine-tuning.
    learning_rate_factor: ClassVar[float] = 0.25

    name: Literal["orpo"] = "orpo"
    beta: float = Field(0.1, gt=0, description="weight of the odds-ratio term; the likelihood term has weight 1")

    def compute_pair_losses(self, logps: PairLogps) -> Tensor:
        return orpo_loss(logps, self.beta)

    def compute_metrics(self, logps: PairLogps) -> Metrics:
        return {**super().compute_metrics(logps), **sum_and_count({"nll_chosen": -logps.chosen})}
