"""Writes a loaded run as a GGUF file for llama.cpp: the full model, or its LoRA. Read `run_io.py` first."""

from __future__ import annotations

from pathlib import Path

from luthier.assembly.recipe import Recipe, get_method_name
from luthier.assembly.run_io import has_saved_heads
from luthier.core.errors import RunError
from luthier.core.protocols import Family, Tuner
from luthier.methods.lora import Lora
from luthier.models import CausalLM
from luthier.models.gguf.writer import LoraDelta, WeightType, write_gguf, write_gguf_adapter


def export_gguf_model(recipe: Recipe, base: Family, path: Path, numbers: WeightType, name: str = "") -> None:
    """Write the model in its current state. Raises `RunError` for a model that is not a causal language model."""
    _refuse_others(recipe, base)
    write_gguf(base, path, numbers, name)


def export_gguf_adapter(recipe: Recipe, base: Family, tuner: Tuner | None, path: Path,
                        name: str = "") -> None:
    """Write the run's LoRA. Raises `RunError` for a run of another method."""
    _refuse_others(recipe, base)
    if not isinstance(tuner, Lora):
        raise RunError(f"the run was trained with {get_method_name(recipe)}, and llama.cpp supports only LoRA adapters",
                       "export the whole model with --to gguf")
    if tuner.config.use_dora:
        raise RunError("a DoRA rescales the whole weight, and llama.cpp's adapters only add to it",
                       "export the whole model with --to gguf")
    changes = {layer.site.name: LoraDelta(*layer.get_factors(), layer.scale) for layer in tuner.layers}
    write_gguf_adapter(base, changes, path, name)


def _refuse_others(recipe: Recipe, base: Family) -> None:
    if not isinstance(base, CausalLM):
        raise RunError(f"the base is not a causal language model ({base.structure.task}), and GGUF export supports "
                       f"only those", "export it with --to merged")
    if has_saved_heads(recipe.objective):
        raise RunError(f"the run has task heads ({recipe.objective.name}), which a GGUF file cannot store",
                       "export it with --to adapter")
