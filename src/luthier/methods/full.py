"""Full fine-tuning: every weight of the base trains. The simplest method; read this one first.

Learning rate 2e-5: every weight moves, so each must move little; an order of magnitude below LoRA's, which has to
reach the same change through few parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from luthier.core.config import Config
from luthier.core.errors import NotMergeable, RecipeError, RunError
from luthier.core.protocols import Anatomy
from luthier.methods.hooks import load_into

KEEP_BASE_HELP = ("keep a copy of what trains as it was, so that the base can be switched back to; costs its size in "
             "memory. Left out: where the objective compares the model with its base (DPO, PPO)")
EMBEDDING_LR_HELP = ("factor on the learning rate for the input embeddings (and a head that shares their weight), which "
                  "continued pretraining wants below 1")


class FullConfig(Config):
    """Settings of full fine-tuning."""

    default_learning_rate: ClassVar[float] = 2e-5

    name: Literal["full"] = "full"
    keep_base: bool | None = Field(None, description=KEEP_BASE_HELP)
    embedding_lr_multiplier: float = Field(1.0, gt=0, description=EMBEDDING_LR_HELP)

    def attach(self, anatomy: Anatomy, *, seed: int) -> Full:
        named = dict(anatomy.model.named_parameters())  # tied weights are named once
        return Full(named, bool(self.keep_base), scale_embedding_lr(anatomy, named, self.embedding_lr_multiplier))


def scale_embedding_lr(anatomy: Anatomy, parameters: Mapping[str, nn.Parameter], rate: float) -> dict[str, float]:
    """The factor of each of `parameters` that is the input embeddings'. Raises `RecipeError` where a factor would have
    no effect."""
    mine = {id(p) for p in anatomy.embedding.parameters()}
    found = {name: rate for name, parameter in parameters.items() if id(parameter) in mine}
    if rate != 1 and not found:
        raise RecipeError(f"method.embedding_lr_multiplier {rate}: no embeddings train", "set method.embeddings: true, or leave "
                          "embedding_lr_multiplier out")
    return found


class Full:
    """The base's own parameters, all or some, by their own names.

    Args:
        parameters: what trains.
        keep_base: whether to keep a copy of what these parameters were, which `disabled` needs.
        rates: name -> factor on its learning rate; 1 for those without.
    """

    gates = None
    optimizer_hooks = ()

    def __init__(self, parameters: dict[str, nn.Parameter], keep_base: bool,
                 rates: Mapping[str, float] | None = None) -> None:
        if few := [name for name, parameter in parameters.items() if not parameter.is_floating_point()]:
            raise RecipeError(f"{few[0]!r} is kept in few bits, which no gradient can move",
                              "keep the base whole, or use a method that adds weights of its own (lora, bitfit)")
        self._parameters, self._rates = parameters, dict(rates or {})
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        self._base = {n: p.detach().clone() for n, p in parameters.items()} if keep_base else None
        self._disabled_depth = 0

    @property
    def base_copy_size(self) -> tuple[int, int]:
        """How many weights are there once more, and their bytes."""
        kept = (self._base or {}).values()
        return sum(t.numel() for t in kept), sum(t.numel() * t.element_size() for t in kept)

    def parameters(self) -> dict[str, nn.Parameter]:
        return self._parameters

    def lr_multiplier(self, name: str) -> float:
        return self._rates.get(name, 1.0)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        if self._base is None:
            raise RunError("full fine-tuning has overwritten the base, so it cannot be switched back to",
                           "set method.keep_base: true, which costs one copy of the weights")
        self._disabled_depth += 1
        if self._disabled_depth == 1:
            self._swap()
        try:
            yield
        finally:
            self._disabled_depth -= 1
            if not self._disabled_depth:
                self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        assert self._base is not None
        for name, parameter in self._parameters.items():
            # A model that was moved has left its copy behind.
            parameter.data, self._base[name] = self._base[name].to(parameter.device), parameter.data

    def merge(self) -> None:
        raise NotMergeable("what trained are the base's own weights, so there is nothing to merge into them",
                           "use the run folder itself; it holds the whole model")

    unmerge = merge

    def state(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self._parameters.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        load_into(self._parameters, state)

    def get_peft_config(self) -> dict[str, Any] | None:
        """None: the run folder holds the whole model."""
        return None
