"""KTO: single answers, each found good or bad. Read `preference.py` first.

Ethayarajh et al. 2024 (arXiv:2402.01306), eq. 8. With r = log pi(y | x) - log pi_ref(y | x):

    z0    = max(0, mean of r over mismatched answers)      no gradient; how far the model is from the reference anyway
    good:   good_weight * (1 - sigmoid(beta (r - z0)))
    bad:    bad_weight  * (1 - sigmoid(beta (z0 - r)))

    total = sum over judged answers of weight * that       count = sum of their rows' weights, as in the mean of z0

z0 is of the whole batch, so its rows are coupled.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from luthier.core.errors import DataError
from luthier.core.types import Loss, Outputs, Target
from luthier.objectives.base import PRECOMPUTE, ObjectiveConfig, item_weights, sums
from luthier.objectives.preference import answer_logps


class KtoConfig(ObjectiveConfig):
    """Kahneman-Tversky optimisation.

    Requires: `token_logps`, `reference_logps`. Items: answers, labelled 1 good, 0 bad, -1 an answer to another prompt,
    which serves z0 alone.
    Metrics: `reward_good`, `reward_bad` (beta r), `logps_good`, `logps_bad`, `kl_estimate` (z0).
    Raises: `DataError` where a batch has no mismatched answer to take z0 from.
    """

    name: Literal["kto"] = "kto"
    example_types: ClassVar[frozenset[str]] = frozenset({"UnpairedPreferenceExample"})
    required_outputs: ClassVar[frozenset[str]] = frozenset({"token_logps", "reference_logps"})
    needs_full_batch: ClassVar[bool] = True
    learning_rate_factor: ClassVar[float] = 0.05  # 1e-6 for `full`, TRL's default; the paper has 5e-7 to 5e-6

    beta: float = Field(0.1, gt=0, description="how closely the model is held to the reference: large is close")
    good_weight: float = Field(1.0, gt=0, description="of good answers; raise it where they are few")
    bad_weight: float = Field(1.0, gt=0, description="of bad answers; raise it where they are few")
    precompute_reference: bool = Field(False, description=PRECOMPUTE)

    def count(self, target: Target) -> float:
        return float(item_weights(target)[target.labels >= 0].sum())

    def __call__(self, outputs: Outputs, target: Target) -> Loss:
        assert outputs.token_logps is not None
        assert outputs.reference_logps is not None
        logps = answer_logps(outputs.token_logps, target, mean=False)
        # Detached: where a batch is computed in parts, the reference's parts have no graph to take a gradient back.
        reference = answer_logps(outputs.reference_logps.detach(), target, mean=False)
        ratios = logps - reference
        good, bad, other = target.labels == 1, target.labels == 0, target.labels < 0
        if not bool(other.any()):
            raise DataError("kto: no answer of this batch stands beside another prompt, so the divergence from the "
                            "reference cannot be estimated", "give at least two rows with different answers")
        weights = item_weights(target).to(ratios.dtype)
        z0 = ((weights * ratios.detach())[other].sum() / weights[other].sum()).clamp(min=0)
        each_good = weights[good] * (1 - torch.sigmoid(self.beta * (ratios[good] - z0)))
        each_bad = weights[bad] * (1 - torch.sigmoid(self.beta * (z0 - ratios[bad])))
        total = self.good_weight * each_good.sum() + self.bad_weight * each_bad.sum()
        metrics = sums(reward_good=self.beta * ratios[good], reward_bad=self.beta * ratios[bad],
                       logps_good=logps[good], logps_bad=logps[bad], kl_estimate=z0)
        return Loss(total, item_weights(target)[~other].sum(), metrics)
