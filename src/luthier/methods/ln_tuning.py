"""LN tuning: the norms alone train, their weights and their biases where they have them. Read `full.py` first.

Learning rate 1e-3: a norm's weight is about one in size, and Adam moves it by about the learning rate in a step. A few
hundred steps at 1e-3 change a feature by about ten percent; smaller rates leave a thousandth of the model's weights
almost unchanged.

Zhao et al. 2023 (arXiv:2312.11420); in convolutional networks, Frankle et al. 2020 (2003.00152).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from luthier.core.config import Config
from luthier.core.errors import RecipeError
from luthier.core.protocols import ModelStructure
from luthier.methods.adapter_format import PEFT_PREFIX
from luthier.methods.full import PartOfBase
from luthier.methods.peft_settings import shorten_names

PEFT_TYPE = "LN_TUNING"  # PEFT's format: a copy of each norm, named `ln_tuning_layers`


class LnTuningConfig(Config):
    """Settings of LN tuning."""

    default_learning_rate: ClassVar[float] = 1e-3

    name: Literal["ln_tuning"] = "ln_tuning"
    biases: bool = Field(True, description="train the norms' biases too, where they have any")

    def attach(self, structure: ModelStructure, *, seed: int) -> PartOfBase:
        norms = find_norms(structure)
        whole = [(path, name, p) for path, norm in norms.items() for name, p in norm.named_parameters()]
        named = {f"{path}.{name}": p for path, name, p in whole if self.biases or name != "bias"}
        if not named:
            raise RecipeError("method ln_tuning: the norms of this model have no weights",
                              "use another method: bitfit, lora")
        config = {"peft_type": PEFT_TYPE, "task_type": structure.task, "inference_mode": True,
                  "target_modules": shorten_names(list(norms), [name for name, _ in structure.model.named_modules()])}
        saved = {f"{PEFT_PREFIX}{path}.ln_tuning_layers.{name}": p for path, name, p in whole}
        return PartOfBase(named, True, {}, saved, config)


def find_norms(structure: ModelStructure) -> dict[str, nn.Module]:
    """Every norm of the model by its path: those of the layers, and modules of the same classes outside them."""
    inner = {id(norm) for layer in structure.layers for norm in layer.norms}
    classes = {type(norm) for layer in structure.layers for norm in layer.norms}
    return {name: module for name, module in structure.model.named_modules()
            if id(module) in inner or type(module) in classes}
