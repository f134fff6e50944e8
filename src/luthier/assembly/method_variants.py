"""Parses method variants such as `lora`, `bitfit+lora`, `lora@nf4`. Read `recipe.py` first.

    METHOD[+METHOD][@BITS]     methods joined by + train together; BITS as in model.quantize

`qlora` is short for `lora@nf4`. A variant has the method's default settings and learning rate, not the recipe's.
"""

from __future__ import annotations

from typing import Any, get_args

from luthier.assembly.recipe import Recipe, dump_recipe
from luthier.core.errors import RecipeError, suggest_nearest
from luthier.methods import METHODS
from luthier.models import ModelConfig, count_parameters
from luthier.models.quantization import QuantizationType

SHORT = {"qlora": "lora@nf4"}
BYTES = {"float64": 8.0, "float32": 4.0, "auto": 2.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "nf4": 0.5}
TRAINED = 16  # bytes of a trainable weight: its float32 value, its gradient, Adam's two moments


def build_variant(recipe: Recipe, spelled: str) -> dict[str, Any]:
    """The recipe with this method variant. Raises `RecipeError` for an unknown method or quantization."""
    methods, _, bits = SHORT.get(spelled, spelled).partition("@")
    names = methods.split("+")
    for name in names:
        if name not in METHODS:
            raise RecipeError(f"unknown method {name!r}: {suggest_nearest(name, [*METHODS, *SHORT])}",
                              "name methods")
    if bits and bits not in get_args(QuantizationType):
        raise RecipeError(f"{spelled!r}: unknown quantization {bits!r}: "
                          f"{suggest_nearest(bits, get_args(QuantizationType))}",
                          "write METHOD@nf4 or METHOD@int8")
    raw = dump_recipe(recipe)
    raw["method"] = names if len(names) > 1 else names[0]
    raw["optimizer"]["learning_rate"] = None
    if bits:
        raw["model"]["quantize"] = bits
    return raw


def estimate_weight_gb(base: ModelConfig, whole: bool) -> float:
    """Memory of the weights alone, in GB of 10**9 bytes; `whole`: all of them are trainable."""
    width = BYTES[base.dtype if base.quantize == "none" else base.quantize]
    if whole:  # a 16-bit base is kept together with the float32 master copy: `training/optimizer.py`
        width = width * 4 if width >= 4 else width + TRAINED
    return count_parameters(base) * width / 1e9
