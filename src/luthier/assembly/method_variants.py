"""Ways to train one task, as people write them: `lora`, `bitfit+lora`, `lora@nf4`. Read `recipe.py` first.

    METHOD[+METHOD][@BITS]     methods by their names, together where joined by +; BITS as in base.quantize

`qlora` is short for `lora@nf4`. Each takes its own default settings and learning rate, whatever the recipe has.
"""

from __future__ import annotations

from typing import Any, get_args

from luthier.assembly.recipe import Recipe, dump
from luthier.core.errors import RecipeError, nearest
from luthier.methods import METHODS
from luthier.models import BaseConfig, count_parameters
from luthier.models.quantization import QuantizationType

SHORT = {"qlora": "lora@nf4"}
BYTES = {"float64": 8.0, "float32": 4.0, "auto": 2.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "nf4": 0.5}
TRAINED = 16  # bytes of a weight that trains: its float32 value, its gradient, Adam's two moments


def build_variant(recipe: Recipe, spelled: str) -> dict[str, Any]:
    """The recipe with this way to train, spelt out. Raises `RecipeError` for one that there is not."""
    methods, _, bits = SHORT.get(spelled, spelled).partition("@")
    names = methods.split("+")
    for name in names:
        if name not in METHODS:
            raise RecipeError(f"there is no method {name!r}: {nearest(name, [*METHODS, *SHORT])}", "name methods")
    if bits and bits not in get_args(QuantizationType):
        raise RecipeError(f"{spelled!r}: a base is not kept in {bits!r}: {nearest(bits, get_args(QuantizationType))}",
                          "write METHOD@nf4 or METHOD@int8")
    raw = dump(recipe)
    raw["method"] = names if len(names) > 1 else names[0]
    raw["optimizer"]["learning_rate"] = None
    if bits:
        raw["base"]["quantize"] = bits
    return raw


def estimate_weight_gb(base: BaseConfig, whole: bool) -> float:
    """What the weights alone need in memory, in GB of 10**9 bytes; `whole`: where every one of them trains."""
    width = BYTES[base.dtype if base.quantize == "none" else base.quantize]
    if whole:  # a base in sixteen bits is there beside the float32 copy that trains: `training/optimizer.py`
        width = width * 4 if width >= 4 else width + TRAINED
    return count_parameters(base) * width / 1e9
