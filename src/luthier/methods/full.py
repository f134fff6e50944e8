"""Full fine-tuning: all weights of the base are trained. The simplest method; read this file first.

Learning rate 2e-5: every weight changes, so each change must be small. This is an order of magnitude below LoRA's
rate, because LoRA must produce the same change with few parameters.
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
from luthier.core.protocols import ModelStructure
from luthier.methods.hooks import check_state_shapes, load_into

KEEP_BASE_HELP = ("keep a copy of the trained weights' initial values, so that the base can be restored; costs one "
                  "copy in memory. Default: true where the objective needs a reference model (DPO, PPO)")
EMBEDDING_LR_HELP = ("factor on the learning rate of the input embeddings (and of a tied output head); use a value "
                     "below 1 for continued pretraining")


class FullConfig(Config):
    """Settings of full fine-tuning."""

    default_learning_rate: ClassVar[float] = 2e-5

    name: Literal["full"] = "full"
    keep_base: bool | None = Field(None, description=KEEP_BASE_HELP)
    embedding_lr_multiplier: float = Field(1.0, gt=0, description=EMBEDDING_LR_HELP)

    def attach(self, structure: ModelStructure, *, seed: int) -> Full:
        named = dict(structure.model.named_parameters())  # tied weights are named once
        return Full(named, bool(self.keep_base), scale_embedding_lr(structure, named, self.embedding_lr_multiplier))


def scale_embedding_lr(structure: ModelStructure, parameters: Mapping[str, nn.Parameter], rate: float) -> dict[str,
                                                                                                               float]:
    """The learning-rate factor of each parameter of the input embeddings. Raises `RecipeError` where the factor would
    have no effect."""
    embedding_ids = {id(p) for p in structure.embedding.parameters()}
    found = {name: rate for name, parameter in parameters.items() if id(parameter) in embedding_ids}
    if rate != 1 and not found:
        raise RecipeError(f"method.embedding_lr_multiplier {rate}: the embeddings are not trained",
                          "set method.embeddings: true, or omit embedding_lr_multiplier")
    return found


class Full:
    """Trains parameters of the base, all or some, under their own names.

    Args:
        parameters: the trained parameters.
        keep_base: whether to keep a copy of their initial values, which `disabled` needs.
        lr_multipliers: name -> factor on its learning rate; 1 by default.
    """

    gates = None
    optimizer_hooks = ()

    def __init__(self, parameters: dict[str, nn.Parameter], keep_base: bool,
                 lr_multipliers: Mapping[str, float] | None = None) -> None:
        if quantized := [name for name, parameter in parameters.items() if not parameter.is_floating_point()]:
            raise RecipeError(f"{quantized[0]!r} is quantized and cannot be trained",
                              "load the base unquantized, or use a method that adds weights (lora, bitfit)")
        self._parameters, self._lr_multipliers = parameters, dict(lr_multipliers or {})
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        self._base = {n: p.detach().clone() for n, p in parameters.items()} if keep_base else None
        self._disabled_depth = 0

    @property
    def base_copy_size(self) -> tuple[int, int]:
        """Number of weights in the copy of the base, and their bytes."""
        kept = (self._base or {}).values()
        return sum(t.numel() for t in kept), sum(t.numel() * t.element_size() for t in kept)

    def parameters(self) -> dict[str, nn.Parameter]:
        return self._parameters

    def lr_multiplier(self, name: str) -> float:
        return self._lr_multipliers.get(name, 1.0)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        if self._base is None:
            raise RunError("full fine-tuning has overwritten the base's weights, so the base cannot be restored",
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
            # The copy stays on its device when the model is moved.
            parameter.data, self._base[name] = self._base[name].to(parameter.device), parameter.data

    def merge(self) -> None:
        raise NotMergeable("the trained weights are the base's own, so there is nothing to merge",
                           "use the run folder as it is; it holds the whole model")

    unmerge = merge

    def state(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self._parameters.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        load_into(self._parameters, state)

    def get_peft_config(self) -> dict[str, Any] | None:
        """None: PEFT has no such format, and the run folder holds the whole model."""
        return None


class PartOfBase(Full):
    """Full fine-tuning of a part of the weights: a run keeps that part alone, as an adapter.

    Args:
        parameters, keep_base, lr_multipliers: as of `Full`.
        saved: name in the adapter's file -> parameter; all trained ones, and others that its format needs.
        config: content of adapter_config.json.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], keep_base: bool, lr_multipliers: Mapping[str, float],
                 saved: dict[str, nn.Parameter], config: dict[str, Any]) -> None:
        super().__init__(parameters, keep_base, lr_multipliers)
        self._saved, self._config = saved, config

    def merge(self) -> None:
        """The trained weights are the base's own, so the base is merged as it is."""

    unmerge = merge

    def state(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self._saved.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        load_into(self._saved, state)

    @contextmanager
    def replaced_by(self, state: Mapping[str, Tensor]) -> Iterator[None]:
        """While the context is open, the weights are those of another `state()`."""
        check_state_shapes(self._saved, state)
        before = {name: parameter.data for name, parameter in self._saved.items()}
        for name, parameter in self._saved.items():
            parameter.data = state[name].to(parameter)
        try:
            yield
        finally:
            for name, parameter in self._saved.items():
                parameter.data = before[name]

    def get_peft_config(self) -> dict[str, Any] | None:
        return dict(self._config)
