"""KTO: single completions, each labeled desirable or undesirable. Read `preference.py` first.

Ethayarajh et al. 2024 (arXiv:2402.01306), eq. 8. With r = log pi(y | x) - log pi_ref(y | x):

    z0            = max(0, mean of r over mismatched completions), without a gradient
    desirable:      desirable_weight   * (1 - sigmoid(beta (r - z0)))
    undesirable:    undesirable_weight * (1 - sigmoid(beta (z0 - r)))

    total = sum over labeled completions of weight * that       count = sum of the weights of their rows

z0 estimates the KL divergence of the policy from the reference, from completions paired with another row's prompt. It
is a weighted mean over the whole batch, so the rows of a batch interact.

Shape letter: A items (completions).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from luthier.core.errors import DataError
from luthier.core.types import Loss, LossInputs, Outputs
from luthier.objectives.base import PRECOMPUTE_HELP, ObjectiveConfig, get_item_weights, sum_and_count
from luthier.objectives.preference import compute_completion_logps


class KtoConfig(ObjectiveConfig):
    """Kahneman-Tversky optimization.

    Requires: `token_logps`, `reference_logps`. Items: completions, labeled 1 desirable, 0 undesirable, -1 mismatched
    (a completion of another prompt, which is used for z0 alone).
    Metrics: `rewards/chosen` and `rewards/rejected` (beta r of desirable and undesirable completions), `logps/chosen`,
    `logps/rejected`, `kl_estimate` (z0).
    Raises: `DataError` if a batch has no mismatched completion to estimate z0 from.
    """

    example_types: ClassVar[frozenset[str]] = frozenset({"UnpairedPreferenceExample"})
    required_outputs: ClassVar[frozenset[str]] = frozenset({"token_logps", "reference_logps"})
    needs_full_batch: ClassVar[bool] = True
    learning_rate_factor: ClassVar[float] = 0.05  # 1e-6 for `full`, TRL's default; the paper has 5e-7 to 5e-6

    name: Literal["kto"] = "kto"
    beta: float = Field(0.1, gt=0, description="strength of the constraint to the reference; larger stays closer")
    desirable_weight: float = Field(1.0, gt=0, description=(
        "loss weight of desirable completions; raise it where they are few"))
    undesirable_weight: float = Field(1.0, gt=0, description=(
        "loss weight of undesirable completions; raise it where they are few"))
    precompute_reference: bool = Field(False, description=PRECOMPUTE_HELP)

    def count(self, target: LossInputs) -> float:
        return float(get_item_weights(target)[target.labels >= 0].sum())

    def __call__(self, outputs: Outputs, target: LossInputs) -> Loss:
        assert outputs.token_logps is not None
        assert outputs.reference_logps is not None
        logps = compute_completion_logps(outputs.token_logps, target, mean=False)  # [A]
        # Detached: where a batch is computed in parts, the reference's parts have no graph to take a gradient back.
        reference = compute_completion_logps(outputs.reference_logps.detach(), target, mean=False)  # [A]
        ratios = logps - reference  # [A]
        desirable, undesirable, mismatched = target.labels == 1, target.labels == 0, target.labels < 0  # [A] bool
        if not bool(mismatched.any()):
            raise DataError("kto: no completion of this batch is paired with another row's prompt, so the KL "
                            "divergence from the reference cannot be estimated",
                            "give at least two rows with different completions")
        weights = get_item_weights(target).to(ratios.dtype)  # [A]
        # Clamped: the estimate of a KL divergence can be negative, the divergence cannot.
        z0 = ((weights * ratios.detach())[mismatched].sum() / weights[mismatched].sum()).clamp(min=0)  # []
        desirable_losses = weights[desirable] * (1 - torch.sigmoid(self.beta * (ratios[desirable] - z0)))
        undesirable_losses = weights[undesirable] * (1 - torch.sigmoid(self.beta * (z0 - ratios[undesirable])))
        total = self.desirable_weight * desirable_losses.sum() + self.undesirable_weight * undesirable_losses.sum()
        return Loss(total, get_item_weights(target)[~mismatched].sum(), sum_and_count({
            "rewards/chosen": self.beta * ratios[desirable], "rewards/rejected": self.beta * ratios[undesirable],
            "logps/chosen": logps[desirable], "logps/rejected": logps[undesirable], "kl_estimate": z0}))
