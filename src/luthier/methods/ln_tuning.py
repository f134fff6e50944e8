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
from luthier.methods.full import Full


class LnTuningConfig(Config):
    """Settings of LN tuning."""

    default_learning_rate: ClassVar[float] = 1e-3

    name: Literal["ln_tuning"] = "ln_tuning"
    biases: bool = Field(True, description="train the norms' biases too, where they have any")

    def attach(self, structure: ModelStructure, *, seed: int) -> Full:
        named = {f"{path}.{name}": p for path, norm in find_norms(structure).items()
                 for name, p in norm.named_parameters() if self.biases or name != "bias"}
        if not named:
            raise RecipeError("method ln_tuning: the norms of this model have no weights",
                              "use another method: bitfit, lora")
        return Full(named, keep_base=True)


def find_norms(structure: ModelStructure) -> dict[str, nn.Module]:
    """Every norm of the model by its path: those of the layers, and modules of the same classes outside them."""
    inner = {id(norm) for layer in structure.layers for norm in layer.norms}
    classes = {type(norm) for layer in structure.layers for norm in layer.norms}
    return {name: module for name, module in structure.model.named_modules()
            if id(module) in inner or type(module) in classes}
