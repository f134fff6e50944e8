"""Shared by the objectives that train on the model's own completions (PPO, GRPO): rollout settings and formulas.

Read `base.py` first.

Shape letters of a rollout:
    N  completions; those of one prompt are consecutive      M  tokens of all completions, one completion after another
    P  predicted tokens of a micro-batch
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from luthier.core.config import Config
from luthier.objectives.base import ObjectiveConfig

TokenValues = Mapping[str, Tensor]  # name -> [M], one number for each token of a rollout


class RewardSourceConfig(Config):
    """Where the reward of a completion comes from: exactly one of a reward model, a function and a URL."""

    model: str | None = Field(None, description="run folder of a reward model (objective `reward`)")
    function: str | None = Field(None, description=(
        "a built-in reward (`numeric_match`, `json_equal`, `contains`, `length`, `code_tests`, ...), or `module:name` "
        "or "
        "`file.py:name` of a function (prompts, completions, metadata) -> rewards, one per completion"))
    url: str | None = Field(None, description="an HTTP endpoint that receives {prompts, completions, metadata} and "
                                              "returns {rewards}")
    weight: float = Field(1.0, description="factor on this reward; several rewards are summed")
    sandbox: Literal["kernel", "process"] = Field("kernel", description=(
        "what walls off the programs of `code_tests`: the kernel (Linux), or a process with limits on time and memory "
        "only, in which a program can read and change the user's files"))
    timeout: float = Field(30.0, gt=0, description="timeout in seconds of a request, or of the tests of one completion")

    @model_validator(mode="after")
    def _check_one_source(self) -> RewardSourceConfig:
        if sum(source is not None for source in (self.model, self.function, self.url)) != 1:
            raise ValueError("set exactly one of `model`, `function` and `url`")
        return self


class OnlineRLConfig(ObjectiveConfig):
    """Settings of rollouts. In each round the policy completes the next `training.batch_size` prompts, the completions
    are scored, and the optimizer trains on them."""

    example_types: ClassVar[frozenset[str]] = frozenset({"PromptExample"})
    is_online: ClassVar[bool] = True
    # 1e-6 for `full`, 2.5e-5 for LoRA: TRL's GRPO default, DeepSeekMath's GRPO and Llama 2's PPO are at 1e-6.
    learning_rate_factor: ClassVar[float] = 0.05

    reward: tuple[RewardSourceConfig, ...] = Field((), description="where the rewards come from; required")
    num_generations: int = Field(4, ge=1, description="completions of each prompt")
    max_new_tokens: int = Field(64, ge=1, description="maximum length of a completion")
    temperature: float = Field(1.0, gt=0, description=(
        "sampling temperature; the loss uses log-probabilities at the same temperature"))
    generation_batch_size: int = Field(16, ge=1, description="completions generated at once")
    num_mini_batches: int = Field(1, ge=1, description="optimizer steps per pass over a rollout; each uses different "
                                                       "prompts")
    missing_eos_penalty: float = Field(0.0, ge=0, description="subtracted from the reward of a truncated completion")
    early_stop_kl: float | None = Field(None, gt=0, description=(
        "end a rollout early when the policy's KL from the one that generated it exceeds this, in nats per token; "
        "default: never"))

    @field_validator("reward", mode="before")
    @classmethod
    def _expand_short_forms(cls, given: Any) -> Any:
        sources = given if isinstance(given, (list, tuple)) else [given]
        return [{"function": source} if isinstance(source, str) else source for source in sources]

    @property
    def epochs_per_rollout(self) -> int:
        """Passes over the completions of a round."""
        raise NotImplementedError

    @property
    def is_single_step(self) -> bool:
        """Whether a round is one optimizer step, so that every completion comes from the policy that it updates."""
        return self.epochs_per_rollout * self.num_mini_batches == 1


def broadcast_to_tokens(values: Tensor, lengths: Tensor) -> Tensor:
    """[N] -> [M]: the value of each completion, repeated for each of its tokens."""
    return torch.repeat_interleave(values, lengths)  # [M]


def estimate_kl(logps: Tensor, reference: Tensor) -> Tensor:
    """The k3 estimator of KL(policy || reference) for each token: exp(d) - d - 1 with d = reference - logps.

    It is never negative, and its mean over samples of the policy is the KL divergence. Shao et al. 2024
    (arXiv:2402.03300), eq. 4.
    """
    log_ratio = reference - logps  # [P]
    return log_ratio.exp() - log_ratio - 1  # [P]


def compute_clipped_surrogate(logps: Tensor, old: Tensor, advantages: Tensor, low: float,
                              high: float) -> tuple[Tensor, Tensor, Tensor]:
    """The clipped surrogate loss of each token.

        L = - min(r A, clip(r, 1 - low, 1 + high) A)        r = exp(logps - old)

    Schulman et al. 2017 (arXiv:1707.06347), eq. 7, as a loss.

    Args:
        logps, old, advantages: [P].

    Returns:
        The loss, whether the clipped term decided it, and `estimate_kl` from the old policy, in nats. [P] each.
    """
    ratio = (logps - old).exp()  # [P]
    unclipped, clipped = -ratio * advantages, -ratio.clamp(1 - low, 1 + high) * advantages  # [P]
    approx_kl = (ratio - 1 - (logps - old)).detach()  # [P]
    return torch.maximum(unclipped, clipped), (clipped > unclipped).detach(), approx_kl
