"""GRPO, RLOO and Dr. GRPO: answers to one prompt are compared with one another, so that no critic is needed.

    loss of a token = - min(ratio A, clip(ratio) A) + kl_weight k3(policy, reference)

| `advantage` | A of answer i to a prompt with rewards r                  | the loss is the mean over          |
|-------------|-----------------------------------------------------------|------------------------------------|
| `grpo`      | (r_i - mean r) / (std r + 1e-4)                           | answers, of the mean over its tokens |
| `rloo`      | r_i - mean of the others                                  | answers, of the sum over its tokens  |
| `dr_grpo`   | r_i - mean r                                              | answers, of that sum / max_new_tokens |

Shao et al. 2024 (arXiv:2402.03300), eq. 3 and 4; Ahmadian et al. 2024 (arXiv:2402.14740), eq. 8; Liu et al. 2025
(arXiv:2503.20783), section 3. Read `rl_config.py` first.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from luthier.core.types import Loss, Outputs, Target
from luthier.objectives.rl_config import Columns, RollsConfig, k3, spread, surrogate


class GrpoConfig(RollsConfig):
    """Group relative policy optimisation.

    Requires: `token_logps`, and `reference_logps` where kl_weight is above 0; of the target the column `advantages`,
    and `old_logps` where a round has several steps; every answer an item.
    Metrics: `policy_loss`, `clip_fraction`, `approx_kl`, and `kl_loss` where there is a KL; each a mean over tokens.
    """

    name: Literal["grpo"] = "grpo"
    answers: int = Field(8, ge=2, description="answers to each prompt, which are compared with one another")
    advantage: Literal["grpo", "rloo", "dr_grpo"] = Field("grpo", description="how answers are compared")
    clip: float = Field(0.2, gt=0, description="how far a token's probability may fall by one round")
    clip_high: float | None = Field(None, gt=0, description="how far it may rise; left out: as far as it may fall")
    kl_weight: float = Field(0.0, ge=0, description="price of a nat of KL from the reference; 0 needs no reference")

    @model_validator(mode="after")
    def _groups(self) -> GrpoConfig:
        if self.answers < 2:
            raise ValueError("answers are compared with one another, so there must be at least 2 to a prompt")
        return self

    @property
    def required_outputs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"token_logps"}) | ({"reference_logps"} if self.kl_weight else set())

    @property
    def rollout_outputs(self) -> frozenset[str]:
        """What a rollout must know of its answers: nothing where the policy that learns is still the one that spoke."""
        return ((frozenset() if self.is_single_step else frozenset({"token_logps"}))
                | ({"reference_logps", "token_logps"} if self.kl_weight else set()))

    def compute_advantages(self, rewards: Tensor, lengths: Tensor, found: Columns, kl_weight: float) -> dict[str, Tensor]:
        """`advantages` [M] of rewards [N]; see the table."""
        return {"advantages": spread(advantages(rewards.view(-1, self.answers), self.advantage).flatten(), lengths)}

    def update_kl_coef(self, kl_weight: float, kl: float) -> float:
        return kl_weight

    def count(self, target: Target) -> float:
        longest = self.max_new_tokens if self.advantage == "dr_grpo" else 1
        return float(target.items.shape[0] * longest)

    def __call__(self, outputs: Outputs, target: Target) -> Loss:
        assert outputs.token_logps is not None
        logps, known = outputs.token_logps, target.precomputed
        old = known["old_logps"] if "old_logps" in known else logps.detach()
        high = self.clip if self.clip_high is None else self.clip_high
        each, clipped, moved = surrogate(logps, old, known["advantages"].to(logps.dtype), self.clip, high)
        metrics = {"policy_loss": each.detach().sum(), "clip_fraction": clipped.sum(), "approx_kl": moved.sum()}
        if self.kl_weight:
            assert outputs.reference_logps is not None
            kl = k3(logps, outputs.reference_logps)
            each = each + self.kl_weight * kl
            metrics["kl_loss"] = kl.detach().sum()
        if self.advantage == "grpo":
            lengths = torch.bincount(target.item_of, minlength=target.items.shape[0])
            each = each / lengths[target.item_of]
        n = float(logps.shape[0])
        return Loss(each.sum(), torch.tensor(self.count(target)), {name: (total, n) for name, total in metrics.items()})


def advantages(rewards: Tensor, how: str) -> Tensor:
    """[prompts, K] rewards -> advantages of the same shape; see the table above. The std is the unbiased one."""
    centred = rewards - rewards.mean(1, keepdim=True)
    if how == "rloo":
        return centred * (rewards.shape[1] / (rewards.shape[1] - 1))
    return centred / (rewards.std(1, keepdim=True) + 1e-4) if how == "grpo" else centred
