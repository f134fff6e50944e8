"""PPO: raise the chance of answers that were better than a critic expected, in small steps. Read `rl_config.py` first.

    r_t  = - kl_weight (log p(t) - log p_reference(t)) + [t is last] R          what each token earned
    A_t  = sum_l (gamma lam)^l d_{t+l},  d_t = r_t + gamma V(s_{t+1}) - V(s_t)    Schulman et al. 2016, eq. 16
    loss = - min(ratio A, clip(ratio) A) + value_weight (V - returns)^2 / 2 - entropy_weight H

Schulman et al. 2017 (arXiv:1707.06347), eq. 7 and 9; KL in the reward as in Ziegler et al. 2019 (arXiv:1909.08593),
eq. 2, and Ouyang et al. 2022 (arXiv:2203.02155). The sums are over the tokens of all answers.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from luthier.core.protocols import Head
from luthier.core.types import Loss, Outputs, Target
from luthier.objectives.rl_config import Columns, RollsConfig, k3, surrogate


class PpoConfig(RollsConfig):
    """Proximal policy optimisation.

    Requires: `token_logps` and `token_scores` (the critic's values); of the target the columns `old_logps`,
    `old_values`, `advantages`, `returns`, and `kl_weight` where the KL is in the loss.
    Metrics: `policy_loss`, `value_loss` (mean squared, of the returns), `clip_fraction`, `approx_kl`; `entropy` and
    `kl_loss` where they are asked for.
    """

    name: Literal["ppo"] = "ppo"
    critic: Literal["shared", "adapter"] = Field("shared", description=(
        "what the value head reads: the policy's own states, or those of an adapter of its own on the same base"))
    clip: float = Field(0.2, gt=0, description="how far a token's probability may be moved by one round")
    value_clip: float | None = Field(0.2, gt=0, description="how far a value may be moved by one round; none: freely")
    value_weight: float = Field(0.1, ge=0, description="of the critic's error in the loss")
    entropy_weight: float = Field(0.0, ge=0, description="of the entropy bonus")
    kl_weight: float = Field(0.05, ge=0, description="price of a nat of KL from the reference; 0 needs no reference")
    kl_in: Literal["reward", "loss"] = Field("reward", description="where the KL from the reference is paid")
    kl_target: float | None = Field(None, gt=0, description=(
        "nats of KL per answer that kl_weight is steered to, from round to round; left out: kl_weight stays"))
    gamma: float = Field(1.0, gt=0, le=1, description="worth of a reward one token later")
    lam: float = Field(0.95, ge=0, le=1, description="lambda of the advantages: 0 trusts the critic, 1 the rewards")
    whiten: bool = Field(True, description="give the advantages of a round mean 0 and variance 1")

    @model_validator(mode="after")
    def _steered(self) -> PpoConfig:
        if self.kl_target is not None and not self.kl_weight:
            raise ValueError("kl_target steers kl_weight, which must then be above 0")
        return self

    @property
    def required_outputs(self) -> frozenset[str]:  # type: ignore[override]
        return (frozenset({"token_logps", "token_scores"})
                | (frozenset({"token_entropies"}) if self.entropy_weight else frozenset())
                | (frozenset({"reference_logps"}) if self.kl_weight and self.kl_in == "loss" else frozenset()))

    @property
    def heads(self) -> tuple[Head, ...]:
        return (Head("value", "token", 1),)

    @property
    def rollout_outputs(self) -> frozenset[str]:
        """What a rollout must know of its answers."""
        return (frozenset({"token_logps", "token_scores", "token_entropies"})
                | ({"reference_logps"} if self.kl_weight else set()))

    def compute_advantages(self, rewards: Tensor, lengths: Tensor, found: Columns, kl_weight: float) -> dict[str, Tensor]:
        """What the loss must know of each token of a round.

        Args:
            rewards: [N].
            lengths: [N] tokens of each answer.
            found: `old_logps`, `old_values`, and `reference_logps` where there is a KL, all [M].
            kl_weight: as it stands now.
        """
        logps, values = found["old_logps"], found["old_values"]
        earned = torch.zeros_like(logps)
        if self.kl_weight and self.kl_in == "reward":
            earned -= kl_weight * (logps - found["reference_logps"])
        earned[lengths.cumsum(0) - 1] += rewards.to(earned.dtype)
        advantages = gae(earned, values, lengths, self.gamma, self.lam)
        made = {"advantages": whitened(advantages) if self.whiten else advantages, "returns": advantages + values}
        return made | ({"kl_weight": torch.full_like(logps, kl_weight)} if self.kl_in == "loss" else {})

    def update_kl_coef(self, kl_weight: float, kl: float) -> float:
        """The next round's kl_weight, after answers whose KL was `kl` nats each: Ziegler et al. 2019, section 2.2."""
        if self.kl_target is None:
            return kl_weight
        return kl_weight * (1 + 0.1 * min(max(kl / self.kl_target - 1, -0.2), 0.2))

    def count(self, target: Target) -> float:
        return float(target.weights.double().sum())

    def __call__(self, outputs: Outputs, target: Target) -> Loss:
        assert outputs.token_logps is not None
        assert outputs.token_scores is not None
        logps, known = outputs.token_logps, target.precomputed
        weights, n = target.weights.to(logps.dtype), target.weights.sum()
        policy, clipped, moved = surrogate(logps, known["old_logps"], known["advantages"], self.clip, self.clip)
        values, returns = outputs.token_scores[:, 0].to(logps.dtype), known["returns"]
        error = (values - returns) ** 2
        metrics = {"policy_loss": (weights * policy.detach()).sum(), "value_loss": (weights * error.detach()).sum(),
                   "clip_fraction": (weights * clipped).sum(), "approx_kl": (weights * moved).sum()}
        if self.value_clip is not None:
            near = known["old_values"] + (values - known["old_values"]).clamp(-self.value_clip, self.value_clip)
            error = torch.maximum(error, (near - returns) ** 2)
        each = policy + self.value_weight * error / 2
        if self.entropy_weight:
            assert outputs.token_entropies is not None
            each = each - self.entropy_weight * outputs.token_entropies
            metrics["entropy"] = (weights * outputs.token_entropies.detach()).sum()
        if "reference_logps" in self.required_outputs:
            assert outputs.reference_logps is not None
            kl = k3(logps, outputs.reference_logps)
            each = each + known["kl_weight"] * kl
            metrics["kl_loss"] = (weights * kl.detach()).sum()
        return Loss((weights * each).sum(), n, {name: (total, n) for name, total in metrics.items()})


def gae(rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantages of several answers, [M]; nothing follows an answer's last token, V = 0 there.

    So too where an answer was cut off: its reward is that of the text as it was cut, hence all that it will ever earn.
    Adding the critic's V behind the cut would count the worth of the answer twice.

    Args:
        rewards, values: [M] what each token earned, and what the critic expected before it.
        lengths: [N] tokens of each answer.

    Schulman et al. 2016 (arXiv:1506.02438), eq. 16.
    """
    sizes = lengths.tolist()
    earned, expected = (pad_sequence(list(x.split(sizes)), batch_first=True) for x in (rewards, values))
    found = torch.zeros_like(earned)
    later, after = torch.zeros_like(earned[:, 0]), torch.zeros_like(earned[:, 0])  # A_{t+1} and V(s_{t+1})
    # Beyond an answer's end everything is zero, so it adds nothing to what stands before.
    for t in reversed(range(earned.shape[1])):
        later = earned[:, t] + gamma * after - expected[:, t] + gamma * lam * later
        found[:, t], after = later, expected[:, t]
    return torch.cat([row[:size] for row, size in zip(found, sizes, strict=True)])


def whitened(numbers: Tensor) -> Tensor:
    """Moved and scaled to mean 0 and variance 1."""
    if numbers.numel() < 2:
        return torch.zeros_like(numbers)
    return (numbers - numbers.mean()) / (numbers.var() + 1e-8).sqrt()
