"""GRPO, RLOO and Dr. GRPO: the completions of one prompt are compared with one another, which replaces the critic.

Read `rl_config.py` first.

    loss of a token = - min(ratio A, clip(ratio) A) + beta KL(policy, reference)

| `advantage_estimator` | A of completion i of a prompt with rewards r | the loss is the mean over                  |
|-----------------------|----------------------------------------------|--------------------------------------------|
| `grpo`                | (r_i - mean r) / (std r + 1e-4)              | completions, of the mean over their tokens |
| `rloo`                | r_i - mean of the others                     | completions, of the sum over their tokens  |
| `dr_grpo`             | r_i - mean r                                 | completions, of that sum / max_new_tokens  |

Shao et al. 2024 (arXiv:2402.03300), eq. 3 and 4; Ahmadian et al. 2024 (arXiv:2402.14740), eq. 8; Liu et al. 2025
(arXiv:2503.20783), section 3.

Shape letters: as in `rl_config.py`; K completions of each prompt.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from luthier.core.types import Loss, LossInputs, Outputs
from luthier.objectives.rl_config import (
    OnlineRLConfig,
    TokenValues,
    broadcast_to_tokens,
    compute_clipped_surrogate,
    estimate_kl,
)


class GrpoConfig(OnlineRLConfig):
    """Group relative policy optimization.

    Requires: `token_logps`, and `reference_logps` with beta above 0; of `target.precomputed` `advantages`, and
    `old_logps` where a round has several steps; every completion is an item.
    Metrics: `policy_loss`, `clip_fraction`, `approx_kl`, and `kl_loss` with a KL penalty; each a mean over tokens.
    """

    name: Literal["grpo"] = "grpo"
    num_generations: int = Field(8, ge=2, description="completions of each prompt, which are compared; at least 2")
    num_iterations: int = Field(1, ge=1, description="passes over the completions of a round")
    advantage_estimator: Literal["grpo", "rloo", "dr_grpo"] = Field("grpo", description=(
        "how the completions of a prompt are compared"))
    epsilon: float = Field(0.2, gt=0, description="maximum relative decrease of a token's probability within a round")
    epsilon_high: float | None = Field(None, gt=0, description="maximum relative increase; omitted: epsilon")
    beta: float = Field(0.0, ge=0, description="weight of the KL penalty; 0 needs no reference model")

    @property
    def epochs_per_rollout(self) -> int:
        return self.num_iterations

    @property
    def kl_coef(self) -> float:
        """beta, under the name that it has for PPO."""
        return self.beta

    @property
    def required_outputs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"token_logps"}) | ({"reference_logps"} if self.beta else set())

    @property
    def rollout_outputs(self) -> frozenset[str]:
        """The outputs that a rollout computes for its completions: none if the policy that generated them is the one
        that every step updates."""
        return ((frozenset() if self.is_single_step else frozenset({"token_logps"}))
                | ({"reference_logps", "token_logps"} if self.beta else set()))

    def compute_advantages(self, rewards: Tensor, lengths: Tensor, rollout: TokenValues,
                           kl_coef: float) -> dict[str, Tensor]:
        """`advantages` [M] of rewards [N]; see the table above."""
        # [prompts, K]
        advantages = compute_group_advantages(rewards.view(-1, self.num_generations), self.advantage_estimator)
        return {"advantages": broadcast_to_tokens(advantages.flatten(), lengths)}  # [N] -> [M]

    def update_kl_coef(self, kl_coef: float, kl: float) -> float:
        return kl_coef

    def count(self, target: LossInputs) -> float:
        longest = self.max_new_tokens if self.advantage_estimator == "dr_grpo" else 1
        return float(target.labeled_segments.shape[0] * longest)

    def __call__(self, outputs: Outputs, target: LossInputs) -> Loss:
        assert outputs.token_logps is not None
        logps, rollout = outputs.token_logps, target.precomputed  # [P], name -> [P]
        old = rollout["old_logps"] if "old_logps" in rollout else logps.detach()  # [P]
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        losses, clipped, approx_kl = compute_clipped_surrogate(
            logps, old, rollout["advantages"].to(logps.dtype), self.epsilon, high)  # [P]
        metrics = {"policy_loss": losses.detach().sum(), "clip_fraction": clipped.sum(), "approx_kl": approx_kl.sum()}
        if self.beta:
            assert outputs.reference_logps is not None
            kl = estimate_kl(logps, outputs.reference_logps)  # [P]
            losses = losses + self.beta * kl  # [P]
            metrics["kl_loss"] = kl.detach().sum()
        if self.advantage_estimator == "grpo":
            lengths = torch.bincount(target.item_of, minlength=len(target.labeled_segments))  # [A] tokens of each one
            losses = losses / lengths[target.item_of]  # [P] every completion counts the same, whatever its length
        n = float(logps.shape[0])
        return Loss(losses.sum(), torch.tensor(self.count(target)),
                    {name: (total, n) for name, total in metrics.items()})


def compute_group_advantages(rewards: Tensor, estimator: str) -> Tensor:
    """[prompts, K] rewards -> [prompts, K] advantages; see the table above. The std is the unbiased one."""
    centered = rewards - rewards.mean(1, keepdim=True)  # [prompts, K]
    if estimator == "rloo":  # K / (K - 1) times the distance to the mean is the distance to the mean of the others
        return centered * (rewards.shape[1] / (rewards.shape[1] - 1))
    # 1e-4 as in TRL: where all rewards of a prompt are equal, the std is 0.
    return centered / (rewards.std(1, keepdim=True) + 1e-4) if estimator == "grpo" else centered
