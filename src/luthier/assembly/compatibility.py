"""Refuses combinations of objective, method and base model that do not work, before training. Read `recipe.py` first.

A method itself refuses a base model whose structure it cannot use, when it is attached. Checks that depend on the rows
are in `factory.py`. `docs/support.md` is the table of all pairs.
"""

from __future__ import annotations

import torch

from luthier.assembly.recipe import Recipe, needs_reference, precomputes_reference
from luthier.core.errors import RecipeError
from luthier.core.protocols import Family
from luthier.methods.composite import list_parts
from luthier.methods.freeze import FreezeConfig
from luthier.methods.full import FullConfig
from luthier.methods.ln_tuning import LnTuningConfig
from luthier.methods.peft import PeftConfig
from luthier.models import ModelConfig, read_stored_dtype
from luthier.models.task_heads import LOG_PROBS
from luthier.objectives.cross_entropy import PretrainConfig
from luthier.objectives.grpo import GrpoConfig
from luthier.objectives.ppo import PpoConfig

INSIDE = (FullConfig, FreezeConfig, LnTuningConfig, PeftConfig)  # methods that an adapter manager cannot disable


def check_dtype(config: ModelConfig, loaded: torch.dtype | None = None) -> None:
    """Raises `RecipeError` if the base would train in float16.

    The smallest float16 number is 6e-8, and the loss of a step is divided by the number of its weighted tokens.
    Without loss
    scaling, gradients of hidden states underflow, more so in larger batches (LoRA on SmolLM2: 30% are 0 at 131,072
    tokens). The dtype of the trained weights does not matter. bfloat16 has the range of float32.

    Args:
        loaded: dtype of the loaded base; default: that of the config, before anything is loaded.
    """
    known = read_stored_dtype(config) if config.dtype == "auto" and loaded is None else None
    if config.dtype == "float16" or torch.float16 in (loaded, known):
        raise RecipeError(f"model.dtype {config.dtype!r}: {config.name_or_path!r} would train in float16, where "
                          "small gradients "
                          "become 0 and no loss scaling is used",
                          "set model.dtype to bfloat16 or float32 (evaluate, chat and export take float16)")


def check_compatibility(recipe: Recipe, base: Family) -> None:
    """Raises `RecipeError` if the base does not support the objective, or if the method keeps no reference model."""
    weight = base.structure.embedding.weight
    assert isinstance(weight, torch.Tensor)
    check_dtype(recipe.model, weight.dtype)
    name, needs = recipe.objective.name, recipe.objective.required_outputs
    if isinstance(recipe.objective, PpoConfig | GrpoConfig):
        needs = needs | recipe.objective.rollout_outputs
        if not base.can_generate:
            raise RecipeError(f"objective {name!r} trains on generated answers, and "
                              f"{recipe.model.name_or_path!r} cannot generate text",
                              "choose a base that generates text, such as 'smollm2'")
    guesses = recipe.objective.uses_masking and base.structure.head is not None
    if needs & LOG_PROBS and base.structure.task == "FEATURE_EXTRACTION" and not guesses:
        raise RecipeError(f"objective {name!r} needs next-token probabilities, and "
                          f"{recipe.model.name_or_path!r} does not predict them",
                          "choose an objective for whole texts or images, such as classify, or a base that generates "
                          "text, such as 'smollm2'")
    inside = next((part.name for part in list_parts(recipe.method) if isinstance(part, INSIDE)), None)
    if isinstance(recipe.objective, PpoConfig) and recipe.objective.critic == "adapter" and inside:
        raise RecipeError(f"objective.critic: adapter adds a second adapter, and method {inside!r} modifies the "
                          f"base's own modules, which both would share",
                          "set objective.critic: shared, or train an adapter (method: lora)")
    if isinstance(recipe.objective, PretrainConfig):
        _check_masking(recipe.objective, recipe.model.name_or_path, base)
    if any(change.name == "mixup" for change in recipe.data.augment) and not recipe.objective.supports_soft_labels:
        raise RecipeError(f"data.augment: mixup mixes labels, and objective {name!r} does not support mixed labels",
                          "use objective: classify (without tags), or omit mixup")
    kept = all(part.model_dump().get("keep_base", True) for part in list_parts(recipe.method))
    compares = needs_reference(recipe.objective) and not precomputes_reference(recipe)
    if compares and recipe.init_from is None and not kept:
        without = "objective.kl_coef: 0" if isinstance(recipe.objective, PpoConfig) \
            else "objective.beta: 0" if isinstance(recipe.objective, GrpoConfig) \
            else "objective.precompute_reference: true"
        raise RecipeError(f"method.keep_base: false, but method {recipe.method.name!r} changes the base's own "
                          f"weights, and objective {name!r} needs the original base as reference",
                          "omit keep_base, which keeps one copy of the trained weights; or train an adapter (method: "
                          f"lora); or avoid the copy: {without}")


def _check_masking(objective: PretrainConfig, name: str, base: Family) -> None:
    """Raises `RecipeError` for a masking setting that this kind of model does not use."""
    known = {"mlm_probability", "mean_noise_span_length"} if base.is_encoder_decoder else set() \
        if base.structure.task == "CAUSAL_LM" else {"mlm_probability", "whole_word_mask"}
    plain = PretrainConfig().model_dump()
    for setting, value in objective.model_dump().items():
        if value != plain[setting] and setting not in known:
            kind = "causal language models" if base.structure.task == "CAUSAL_LM" else "models of this kind"
            raise RecipeError(f"objective.{setting} {value!r} has no effect on {name!r}: {kind} do not use this kind "
                              "of masking", f"omit objective.{setting}")
