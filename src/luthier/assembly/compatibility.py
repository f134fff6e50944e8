"""Refuses combinations of objective, method and base model that do not work, before training. Read `recipe.py` first.

A method itself refuses a base model whose structure it cannot use, when it is attached. `datasets` refuses what the
rows decide. `docs/support.md` is the table of all pairs.
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

INSIDE = (FullConfig, FreezeConfig, LnTuningConfig, PeftConfig)  # methods without a switch that a manager could turn


def check_dtype(config: ModelConfig, loaded: torch.dtype | None = None) -> None:
    """Raises `RecipeError` where the base would train in float16.

    Its smallest number is 6e-8, and the loss of a step is divided by all of its weighted tokens: without loss scaling
    the gradients of the states underflow, the more the larger the batch (of LoRA on SmolLM2, three tenths are 0 at
    131,072 tokens), whatever the trained weights themselves are kept in. bfloat16 has the range of float32.

    Args:
        loaded: of the loaded base; left out: what the config says, before anything is loaded.
    """
    known = read_stored_dtype(config) if config.dtype == "auto" and loaded is None else None
    if config.dtype == "float16" or torch.float16 in (loaded, known):
        raise RecipeError(f"model.dtype {config.dtype!r}: {config.name_or_path!r} would train in float16, where "
                          "small gradients "
                          "become 0 and no loss scaling is used",
                          "set model.dtype to bfloat16 or float32 (evaluate, chat and export take float16)")


def check_compatibility(recipe: Recipe, base: Family) -> None:
    """Raises `RecipeError` where the base lacks what the objective needs, or the method keeps no reference model."""
    weight = base.structure.embedding.weight
    assert isinstance(weight, torch.Tensor)
    check_dtype(recipe.model, weight.dtype)
    name, needs = recipe.objective.name, recipe.objective.required_outputs
    if isinstance(recipe.objective, PpoConfig | GrpoConfig):
        needs = needs | recipe.objective.rollout_outputs
        if not base.can_generate:
            raise RecipeError(f"objective {name!r} learns from the base's own answers, and "
                              f"{recipe.model.name_or_path!r} writes "
                              "none", "choose a base that writes text, such as 'smollm2'")
    guesses = recipe.objective.uses_masking and base.structure.head is not None
    if needs & LOG_PROBS and base.structure.task == "FEATURE_EXTRACTION" and not guesses:
        raise RecipeError(f"objective {name!r} needs the probabilities of next tokens, and "
                          f"{recipe.model.name_or_path!r} predicts "
                          "none", "choose an objective that judges texts or pictures as a whole, such as classify; or "
                          "a base that writes text, such as 'smollm2'")
    inside = next((part.name for part in list_parts(recipe.method) if isinstance(part, INSIDE)), None)
    if isinstance(recipe.objective, PpoConfig) and recipe.objective.critic == "adapter" and inside:
        raise RecipeError(f"objective.critic: adapter is a second adapter beside the policy's, and method {inside!r} "
                          "works inside the base's own parts, which the two would share",
                          "set objective.critic: shared, or train an adapter (method: lora)")
    if isinstance(recipe.objective, PretrainConfig):
        _check_masking(recipe.objective, recipe.model.name_or_path, base)
    if any(change.name == "mixup" for change in recipe.data.augment) and not recipe.objective.supports_soft_labels:
        raise RecipeError(f"data.augment: mixup mixes labels too, and objective {name!r} reads no mixture of them",
                          "use objective: classify (but for tags), or leave mixup out")
    kept = all(part.model_dump().get("keep_base", True) for part in list_parts(recipe.method))
    compares = needs_reference(recipe.objective) and not precomputes_reference(recipe)
    if compares and recipe.init_from is None and not kept:
        without = "objective.kl_coef: 0" if isinstance(recipe.objective, PpoConfig) \
            else "objective.beta: 0" if isinstance(recipe.objective, GrpoConfig) \
            else "objective.precompute_reference: true"
        raise RecipeError(f"method.keep_base: false, but method {recipe.method.name!r} changes the base's own weights, "
                          f"and objective {name!r} compares it with the base as it was",
                          "leave keep_base out, which costs one copy of what trains; or train an adapter "
                          f"(method: lora); or do without a copy: {without}")


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
