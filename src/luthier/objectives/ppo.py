"""PPO: make completions more probable that were better than a critic expected, in small steps. Read `rl_config.py`
first.

    r_t  = - kl_coef (log p(t) - log p_reference(t)) + [t is last] R              reward of each token
    A_t  = sum_l (gamma lambda)^l d_{t+l},  d_t = r_t + gamma V(s_{t+1}) - V(s_t)    Schulman et al. 2016, eq. 16
    loss = - min(ratio A, clip(ratio) A) + vf_coef (V - returns)^2 / 2 - entropy_coef H

Schulman et al. 2017 (arXiv:1707.06347), eq. 7 and 9; KL in the reward as in Ziegler et al. 2019 (arXiv:1909.08593),
eq. 2, and Ouyang et al. 2022 (arXiv:2203.02155). The sums are over the tokens of all completions.

Shape letters: as in `rl_config.py`; L tokens of the longest completion.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from luthier.core.protocols import Head
from luthier.core.types import Loss, LossInputs, Outputs
from luthier.objectives.rl_config import OnlineRLConfig, TokenValues, compute_clipped_surrogate, estimate_kl


class PpoConfig(OnlineRLConfig):
    """Proximal policy optimization.

    Requires: `token_logps` and `token_scores` (the critic's values); of `target.precomputed` `old_logps`,
    `old_values`, `advantages`, `returns`, and `kl_coef` where the KL penalty is in the loss.
    Metrics: `policy_loss`, `value_loss` (mean squared error of the values), `clip_fraction`, `approx_kl`; `entropy`
    with an entropy bonus, `kl_loss` with a KL penalty in the loss.
    """

    name: Literal["ppo"] = "ppo"
    num_ppo_epochs: int = Field(1, ge=1, description="passes over the completions of a round")
    critic: Literal["shared", "adapter"] = Field("shared", description=(
        "input of the value head: the states of the policy, or of a second adapter on the same base"))
    cliprange: float = Field(0.2, gt=0, description="maximum relative change of a token's probability within a round")
    cliprange_value: float | None = Field(0.2, gt=0, description="maximum change of a value within a round; null: "
                                                                 "unlimited")
    vf_coef: float = Field(0.1, ge=0, description="weight of the value loss")
    entropy_coef: float = Field(0.0, ge=0, description="weight of the entropy bonus")
    kl_coef: float = Field(0.05, ge=0, description="weight of the KL penalty; 0 needs no reference model")
    kl_penalty_in: Literal["reward", "loss"] = Field("reward", description="where the KL penalty is applied")
    adaptive_kl_target: float | None = Field(None, gt=0, description=(
        "KL per completion, in nats, that kl_coef is adapted to after each round; default: kl_coef is fixed"))
    gamma: float = Field(1.0, gt=0, le=1, description="discount factor per token")
    gae_lambda: float = Field(0.95, ge=0, le=1, description=(
        "lambda of the generalized advantage estimation: 0 trusts the critic, 1 the rewards"))
    whiten_advantages: bool = Field(True, description="scale the advantages of a round to mean 0 and variance 1")

    @model_validator(mode="after")
    def _check_adaptive_kl(self) -> PpoConfig:
        if self.adaptive_kl_target is not None and not self.kl_coef:
            raise ValueError("adaptive_kl_target adapts kl_coef, which must then be above 0")
        return self

    @property
    def epochs_per_rollout(self) -> int:
        return self.num_ppo_epochs

    @property
    def required_outputs(self) -> frozenset[str]:  # type: ignore[override]
        return (frozenset({"token_logps", "token_scores"})
                | (frozenset({"token_entropies"}) if self.entropy_coef else frozenset())
                | (frozenset({"reference_logps"}) if self.kl_coef and self.kl_penalty_in == "loss" else frozenset()))

    @property
    def heads(self) -> tuple[Head, ...]:
        return (Head("value", "token", 1),)

    @property
    def rollout_outputs(self) -> frozenset[str]:
        """The outputs that a rollout computes for its completions."""
        return (frozenset({"token_logps", "token_scores", "token_entropies"})
                | ({"reference_logps"} if self.kl_coef else set()))

    def compute_advantages(self, rewards: Tensor, lengths: Tensor, rollout: TokenValues,
                           kl_coef: float) -> dict[str, Tensor]:
        """What the loss reads of each token of a round: advantages, returns, and kl_coef where the loss has the KL.

        Args:
            rewards: [N].
            lengths: [N] tokens of each completion.
            rollout: `old_logps`, `old_values`, and `reference_logps` with a KL penalty, [M] each.
            kl_coef: its value in this round.
        """
        logps, values = rollout["old_logps"], rollout["old_values"]  # [M]
        token_rewards = torch.zeros_like(logps)  # [M]
        if self.kl_coef and self.kl_penalty_in == "reward":
            token_rewards -= kl_coef * (logps - rollout["reference_logps"])  # [M]
        token_rewards[lengths.cumsum(0) - 1] += rewards.to(token_rewards.dtype)  # at the last token of each
        advantages = compute_gae(token_rewards, values, lengths, self.gamma, self.gae_lambda)  # [M]
        # Returns are those of the advantages before whitening: the critic predicts rewards in their own unit.
        found = {"advantages": whiten(advantages) if self.whiten_advantages else advantages,
                 "returns": advantages + values}
        return found | ({"kl_coef": torch.full_like(logps, kl_coef)} if self.kl_penalty_in == "loss" else {})

    def update_kl_coef(self, kl_coef: float, kl: float) -> float:
        """The kl_coef of the next round, after a round with a KL of `kl` nats per completion: Ziegler et al. 2019,
        section 2.2."""
        if self.adaptive_kl_target is None:
            return kl_coef
        return kl_coef * (1 + 0.1 * min(max(kl / self.adaptive_kl_target - 1, -0.2), 0.2))

    def count(self, target: LossInputs) -> float:
        return float(target.weights.double().sum())

    def __call__(self, outputs: Outputs, target: LossInputs) -> Loss:
        assert outputs.token_logps is not None
        assert outputs.token_scores is not None
        logps, rollout = outputs.token_logps, target.precomputed  # [P], name -> [P]
        weights, n = target.weights.to(logps.dtype), target.weights.sum()  # [P], []
        policy_loss, clipped, approx_kl = compute_clipped_surrogate(
            logps, rollout["old_logps"], rollout["advantages"], self.cliprange, self.cliprange)  # [P]
        values, returns = outputs.token_scores[:, 0].to(logps.dtype), rollout["returns"]  # [P]
        error = (values - returns) ** 2  # [P]
        metrics = {"policy_loss": (weights * policy_loss.detach()).sum(),
                   "value_loss": (weights * error.detach()).sum(),
                   "clip_fraction": (weights * clipped).sum(), "approx_kl": (weights * approx_kl).sum()}
        if self.cliprange_value is not None:
            old_values = rollout["old_values"]  # [P]
            near = old_values + (values - old_values).clamp(-self.cliprange_value, self.cliprange_value)
            error = torch.maximum(error, (near - returns) ** 2)  # [P] the larger one: clipping never lowers the loss
        losses = policy_loss + self.vf_coef * error / 2  # [P]
        if self.entropy_coef:
            assert outputs.token_entropies is not None
            losses = losses - self.entropy_coef * outputs.token_entropies  # [P]
            metrics["entropy"] = (weights * outputs.token_entropies.detach()).sum()
        if "reference_logps" in self.required_outputs:
            assert outputs.reference_logps is not None
            kl = estimate_kl(logps, outputs.reference_logps)  # [P]
            losses = losses + rollout["kl_coef"] * kl  # [P]
            metrics["kl_loss"] = (weights * kl.detach()).sum()
        return Loss((weights * losses).sum(), n, {name: (total, n) for name, total in metrics.items()})


def compute_gae(rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """Generalized advantage estimation for several completions. Returns [M].

    Nothing follows the last token of a completion: V = 0 there, also where the completion was truncated. The reward of
    a truncated completion is the reward of the truncated text, so it is all that can be earned. Adding the critic's V
    after the truncation would count the value of the completion twice.

    Schulman et al. 2016 (arXiv:1506.02438), eq. 16.

    Args:
        rewards, values: [M] reward of each token, and the critic's value before it.
        lengths: [N] tokens of each completion.
    """
    sizes = lengths.tolist()
    rewards, values = (pad_sequence(list(x.split(sizes)), batch_first=True) for x in (rewards, values))  # [N, L]
    advantages = torch.zeros_like(rewards)  # [N, L]
    next_advantage, next_value = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])  # [N]
    # Padding is zero, so it adds nothing to the tokens before it.
    for t in reversed(range(rewards.shape[1])):
        next_advantage = rewards[:, t] + gamma * next_value - values[:, t] + gamma * gae_lambda * next_advantage
        advantages[:, t], next_value = next_advantage, values[:, t]
    return torch.cat([row[:size] for row, size in zip(advantages, sizes, strict=True)])  # [M]


def whiten(values: Tensor) -> Tensor:
    """Shift and scale to mean 0 and variance 1."""
    if values.numel() < 2:
        return torch.zeros_like(values)
    return (values - values.mean()) / (values.var() + 1e-8).sqrt()  # [M]
