"""What objectives that learn from their own answers (PPO, GRPO) share: the settings of a rollout, and shape helpers.

Shape letters of a rollout:
    N  answers, those of one prompt beside one another      M  tokens of all answers, one answer after the other
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from luthier.core.config import Config
from luthier.objectives.base import ObjectiveConfig


class WorthConfig(Config):
    """What an answer is worth: exactly one of a run, a function and an address."""

    run: str | None = Field(None, description="folder of a run with the objective `reward`")
    function: str | None = Field(None, description=(
        "a built-in reward (`number`, `json_equal`, `contains`, `length`, `code_tests`, ...), or `module:name` or "
        "`file.py:name` of a function (prompts, answers, facts) -> rewards, one for each answer"))
    url: str | None = Field(None, description="an HTTP address that answers {prompts, answers, facts} with {rewards}")
    weight: float = Field(1.0, description="factor on this reward; several rewards are added up")
    timeout: float = Field(30.0, gt=0, description="seconds that an address may take, or one answer's tests")

    @model_validator(mode="after")
    def _one(self) -> WorthConfig:
        if sum(given is not None for given in (self.run, self.function, self.url)) != 1:
            raise ValueError("a reward is one of `run`, `function` and `url`")
        return self


class RollsConfig(ObjectiveConfig):
    """Settings of a rollout: each round, the next `training.batch_size` prompts are answered and the answers judged."""

    example_types: ClassVar[frozenset[str]] = frozenset({"PromptExample"})
    is_online: ClassVar[bool] = True
    # 1e-6 for `full`, 2.5e-5 for LoRA: TRL's GRPO default, DeepSeekMath's GRPO and Llama 2's PPO are at 1e-6.
    learning_rate_factor: ClassVar[float] = 0.05

    reward: tuple[WorthConfig, ...] = Field((), description="what an answer is worth; required")
    answers: int = Field(4, ge=1, description="answers to each prompt")
    max_new_tokens: int = Field(64, ge=1, description="longest answer")
    temperature: float = Field(1.0, gt=0, description=(
        "of sampling, and of every log-probability in the loss: what is trained is what is sampled from"))
    at_once: int = Field(16, ge=1, description="answers generated at once")
    epochs: int = Field(1, ge=1, description="times that the answers of a round are learned from")
    minibatches: int = Field(1, ge=1, description="optimiser steps of each of these times; each has its own prompts")
    unfinished: float = Field(0.0, ge=0, description="taken off the reward of an answer that was cut off")
    target_kl: float | None = Field(None, gt=0, description=(
        "end a round early once the policy is this far from the one that answered, in nats per token"))

    @field_validator("reward", mode="before")
    @classmethod
    def _several(cls, given: Any) -> Any:
        listed = given if isinstance(given, (list, tuple)) else [given]
        return [{"function": one} if isinstance(one, str) else one for one in listed]

    @property
    def is_single_step(self) -> bool:
        """Whether every answer is learned from in one step alone, by the very policy that gave it."""
        return self.epochs * self.minibatches == 1


def spread(each: Tensor, lengths: Tensor) -> Tensor:
    """[N] -> [M]: what is said of an answer, said of each of its tokens."""
    return torch.repeat_interleave(each, lengths)


def k3(logps: Tensor, reference: Tensor) -> Tensor:
    """exp(d) - d - 1 with d = reference - logps: never negative, and its mean over samples of the policy is the
    KL divergence of the policy from the reference. Shao et al. 2024 (arXiv:2402.03300), eq. 4."""
    apart = reference - logps
    return apart.exp() - apart - 1


def surrogate(logps: Tensor, old: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
    """The clipped surrogate loss of each token, whether the clip decided it, and how far the policy has moved.

        L = - min(r A, clip(r, 1 - low, 1 + high) A)        r = exp(logps - old)

    Schulman et al. 2017 (arXiv:1707.06347), eq. 7, as a loss. All [P]; the last is `k3` of the old policy, in nats.
    """
    ratio = (logps - old).exp()
    free, clipped = -ratio * advantages, -ratio.clamp(1 - low, 1 + high) * advantages
    moved = (ratio - 1 - (logps - old)).detach()
    return torch.maximum(free, clipped), (clipped > free).detach(), moved


Columns = Mapping[str, Tensor]
