"""Preferences: which of two answers to one prompt is better. Read `cross_entropy.py` and `base.py` first.

One class for each name, which adds its own formula to what all share: the log-probabilities of whole answers, the
pairs, the metrics. A ranking of K answers stands for all of its pairs.

    total = sum over pairs of weight * the formula          count = sum over pairs of weight, that of the pair's row

In the formulas  w, l    log pi(y_w | x), log pi(y_l | x): of the better and the worse answer under the model
                 w', l'  the same under the reference
                 h       (w - w') - (l - l'), by how much more than the reference the model prefers the better one

Shape letters: P predictions, A items (answers), N pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from luthier.core.types import Loss, Outputs, Target
from luthier.objectives.base import (
    PRECOMPUTE,
    Metrics,
    ObjectiveConfig,
    count_correct_pairs,
    group_weights,
    ranked,
    sums,
)


@dataclass(frozen=True)
class Logps:
    """[N] log-probabilities of whole answers, in nats; the reference's are 0 where an objective has none."""

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor

    @property
    def ratio_chosen(self) -> Tensor:
        return self.chosen - self.reference_chosen

    @property
    def ratio_rejected(self) -> Tensor:
        return self.rejected - self.reference_rejected

    @property
    def margin(self) -> Tensor:
        """h."""
        return self.ratio_chosen - self.ratio_rejected


# ---------------------------------------------------------------- the formulas, each [N]


def dpo(logps: Logps, beta: float) -> Tensor:
    """-log sigmoid(beta h). Rafailov et al. 2023 (arXiv:2305.18290), eq. 7."""
    return -F.logsigmoid(beta * logps.margin)


def ipo(logps: Logps, beta: float) -> Tensor:
    """(h - 1 / (2 beta))^2 of log-probabilities per token. Azar et al. 2023 (arXiv:2310.12036), eq. 17 (beta: tau).

    The paper writes sums over an answer; its authors' results, and TRL's, are of means, so that length does not decide.
    """
    return (logps.margin - 1 / (2 * beta)).square()


def cdpo(logps: Logps, beta: float, flipped: float) -> Tensor:
    """-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h): cross-entropy, where labels are wrong with probability e.
    Mitchell 2023, "A note on DPO with noisy preferences"."""
    return -(1 - flipped) * F.logsigmoid(beta * logps.margin) - flipped * F.logsigmoid(-beta * logps.margin)


def robust(logps: Logps, beta: float, flipped: float) -> Tensor:
    """(-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)) / (1 - 2 e): its mean over labels that are flipped with
    probability e is the DPO loss of the true ones. Chowdhury et al. 2024 (arXiv:2403.00409)."""
    right, wrong = F.logsigmoid(beta * logps.margin), F.logsigmoid(-beta * logps.margin)
    return (flipped * wrong - (1 - flipped) * right) / (1 - 2 * flipped)


def hinge(logps: Logps, beta: float) -> Tensor:
    """max(0, 1 - beta h). Zhao et al. 2023 (SLiC-HF, arXiv:2305.10425), with the reference as in Liu et al. 2023 (RSO,
    arXiv:2309.06657)."""
    return torch.relu(1 - beta * logps.margin)


def simpo(logps: Logps, beta: float, gamma: float) -> Tensor:
    """-log sigmoid(beta (w - l) - gamma) of log-probabilities per token. Meng et al. 2024 (arXiv:2405.14734), eq. 6."""
    return -F.logsigmoid(beta * (logps.chosen - logps.rejected) - gamma)


def orpo(logps: Logps, beta: float) -> Tensor:
    """-w - beta log sigmoid(log odds(w) - log odds(l)) of log-probabilities per token, odds(w) = e^w / (1 - e^w).
    Hong et al. 2024 (arXiv:2403.07691), eq. 6 and 7, with beta for lambda."""
    odds = (logps.chosen - log1mexp(logps.chosen)) - (logps.rejected - log1mexp(logps.rejected))
    return -logps.chosen - beta * F.logsigmoid(odds)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0. Where x is so near to 0 that the result would be infinite, it is taken a little below."""
    return torch.log(-torch.expm1(x.clamp(max=-torch.finfo(x.dtype).tiny)))


# ---------------------------------------------------------------- what all of them share


def answer_logps(logps: Tensor, target: Target, mean: bool) -> Tensor:
    """[A] sum_p w_p logps_p over the predictions of each item; `mean`: divided by sum_p w_p. `logps`: [P]."""
    items = target.items.shape[0]
    home = torch.where(target.item_of < 0, items, target.item_of)  # a shared prompt's predictions are nobody's
    weights = target.weights.to(logps.dtype)
    total = logps.new_zeros(items + 1).index_add(0, home, weights * logps)
    if mean:
        total = total / logps.new_zeros(items + 1).index_add(0, home, weights).clamp(min=torch.finfo(logps.dtype).tiny)
    return total[:items]


class PreferenceConfig(ObjectiveConfig):
    """What the names below share.

    Requires: `token_logps`, and `reference_logps` where the formula has a reference. Items: the answers of an example,
    labelled by rank, 0 best.
    Metrics: `rewards/chosen`, `rewards/rejected` (beta times w - w' and l - l'), `rewards/margins`, `rewards/accuracies`,
    `logps/chosen`, `logps/rejected`.
    """

    example_types: ClassVar[frozenset[str]] = frozenset({"ComparedExample"})
    required_outputs: ClassVar[frozenset[str]] = frozenset({"token_logps"})
    mean: ClassVar[bool] = False  # per token instead of per answer
    # 1e-6 for `full`, 2.5e-5 for LoRA: TRL's DPO default of 1e-6 beside 2e-5 for SFT; the papers' 5e-7 to 1e-6.
    learning_rate_factor: ClassVar[float] = 0.05

    beta: float = Field(0.1, gt=0, description="how closely the model is held to the reference: large is close")

    def each(self, logps: Logps) -> Tensor:
        """[N] the formula."""
        raise NotImplementedError

    def count(self, target: Target) -> float:
        return float(self._weights(target).sum())

    def __call__(self, outputs: Outputs, target: Target) -> Loss:
        logps = self.pairs(outputs, target)
        each = self.each(logps)
        weights = self._weights(target)
        return Loss((weights.to(each.dtype) * each).sum(), weights.sum(), self.metrics(logps))

    def pairs(self, outputs: Outputs, target: Target) -> Logps:
        """Every pair of the batch."""
        assert outputs.token_logps is not None
        policy = answer_logps(outputs.token_logps, target, self.mean)
        reference = torch.zeros_like(policy)
        if "reference_logps" in self.required_outputs:
            assert outputs.reference_logps is not None
            reference = answer_logps(outputs.reference_logps, target, self.mean).detach()
        table, better = ranked(target)
        group, i, j = better.nonzero(as_tuple=True)
        best, worst = table[group, i], table[group, j]
        return Logps(policy[best], policy[worst], reference[best], reference[worst])

    def _weights(self, target: Target) -> Tensor:
        """[N] of each pair, in the order of `pairs`."""
        table, better = ranked(target)
        return group_weights(target, table)[better.nonzero()[:, 0]]

    def metrics(self, logps: Logps) -> Metrics:
        chosen, rejected = self.beta * logps.ratio_chosen, self.beta * logps.ratio_rejected
        return sums(reward_chosen=chosen, reward_rejected=rejected, reward_margin=chosen - rejected,
                    pair_accuracy=count_correct_pairs(chosen, rejected), logps_chosen=logps.chosen,
                    logps_rejected=logps.rejected)


class ReferredConfig(PreferenceConfig):
    """What the names below share whose formula has a reference."""

    required_outputs: ClassVar[frozenset[str]] = frozenset({"token_logps", "reference_logps"})

    precompute_reference: bool = Field(False, description=PRECOMPUTE)


# ---------------------------------------------------------------- the names


class DpoConfig(ReferredConfig):
    """Direct preference optimisation: a reward model whose reward is the model's own log-ratio to the reference.

    Example:
        >>> pair = Logps(*(torch.tensor([x]) for x in (-3.0, -4.0, -3.5, -3.5)))
        >>> round(float(DpoConfig(beta=1.0).each(pair)), 4)  # h = 1: log(1 + 1/e)
        0.3133
    """

    name: Literal["dpo"] = "dpo"

    def each(self, logps: Logps) -> Tensor:
        return dpo(logps, self.beta)


class IpoConfig(ReferredConfig):
    """Identity preference optimisation: the margin is drawn to a value instead of to infinity."""

    name: Literal["ipo"] = "ipo"
    mean: ClassVar[bool] = True

    def each(self, logps: Logps) -> Tensor:
        return ipo(logps, self.beta)


class CdpoConfig(ReferredConfig):
    """Conservative DPO: some of the labels are taken to be wrong."""

    name: Literal["cdpo"] = "cdpo"
    flipped: float = Field(0.1, ge=0, lt=0.5, description="the share of pairs taken to be the wrong way round")

    def each(self, logps: Logps) -> Tensor:
        return cdpo(logps, self.beta, self.flipped)


class RobustConfig(ReferredConfig):
    """Robust DPO: in the mean over flipped labels, the loss of the true ones."""

    name: Literal["robust"] = "robust"
    flipped: float = Field(0.1, ge=0, lt=0.5, description="the share of pairs taken to be the wrong way round")

    def each(self, logps: Logps) -> Tensor:
        return robust(logps, self.beta, self.flipped)


class HingeConfig(ReferredConfig):
    """A pair whose margin is large enough is left alone."""

    name: Literal["hinge"] = "hinge"

    def each(self, logps: Logps) -> Tensor:
        return hinge(logps, self.beta)


class SimpoConfig(PreferenceConfig):
    """Simple preference optimisation: no reference, log-probabilities per token, a margin to reach."""

    name: Literal["simpo"] = "simpo"
    mean: ClassVar[bool] = True
    beta: float = Field(2.0, gt=0, description="scale of the log-probabilities per token")
    gamma: float = Field(1.0, ge=0, description="by how much the better answer is to be ahead")

    def each(self, logps: Logps) -> Tensor:
        return simpo(logps, self.beta, self.gamma)


class OrpoConfig(PreferenceConfig):
    """Odds-ratio preference optimisation: the better answer is learned, and preferred; no reference."""

    name: Literal["orpo"] = "orpo"
    mean: ClassVar[bool] = True
    # 5e-6 for `full`, as in the paper's Mistral-ORPO: half of the loss is that of instruction tuning.
    learning_rate_factor: ClassVar[float] = 0.25
    beta: float = Field(0.1, gt=0, description="weight of the odds ratio beside the likelihood of the better answer")

    def each(self, logps: Logps) -> Tensor:
        return orpo(logps, self.beta)

    def metrics(self, logps: Logps) -> Metrics:
        return {**super().metrics(logps), **sums(nll_chosen=-logps.chosen)}
