"""Rewards of policies on prompts that they were not trained on. Read `rl_setup.py` first."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from luthier.assembly import factory
from luthier.assembly.peft_adapters import load_adapter_weights
from luthier.assembly.provenance import open_recipe
from luthier.assembly.recipe import Recipe
from luthier.assembly.rl_setup import build_rollout_source, init_rl_policy
from luthier.core.protocols import Family, Tuner
from luthier.core.types import TokenizedExample
from luthier.data import Datasets
from luthier.methods.composite import CompositeMethod
from luthier.methods.full import FullConfig
from luthier.objectives.grpo import GrpoConfig
from luthier.objectives.ppo import PpoConfig
from luthier.training.run_folder import Run


def evaluate_policy(recipe: Recipe, base: Family, tuner: Tuner | None, datasets: Datasets,
                    prompts: list[TokenizedExample]) -> dict[str, float]:
    """The mean reward of a trained policy on prompts, without a KL: its reference is not in the run folder."""
    assert isinstance(recipe.objective, PpoConfig | GrpoConfig)
    without_kl: dict[str, Any] = ({"kl_coef": 0.0, "adaptive_kl_target": None}
                                  if isinstance(recipe.objective, PpoConfig) else {"beta": 0.0})
    recipe = recipe.model_copy(update={"objective": recipe.objective.model_copy(update=without_kl)})
    # A full model cannot be switched off, so its reward model cannot share the base.
    policy = tuner if tuner is not None else FullConfig().attach(base.structure, seed=0)
    datasets = datasets if datasets.train else replace(datasets, train=prompts, mix=())
    return build_rollout_source(recipe, base, datasets, policy, nullcontext).evaluate(prompts)


def evaluate_policies(run: Run) -> dict[str, dict[str, float]]:
    """Mean reward, and KL from the start, of three policies on the test rows of a run.

    `base` is the bare base model, `start` the policy that the run started from, `tuned` the trained one. Where the run
    has no test rows, validation or train rows are used.
    """
    recipe = open_recipe(run.require_exists())
    base = factory.load_family(recipe.model)
    datasets = factory.load_datasets(recipe, base)
    tuner, reference = init_rl_policy(recipe, base)
    policy = tuner.parts[0] if isinstance(tuner, CompositeMethod) and recipe.objective.heads else tuner
    rollouts = build_rollout_source(recipe, base, datasets, tuner, reference)
    prompts = datasets.test or datasets.eval or datasets.train
    results = {}
    with tuner.disabled():
        results["base"] = rollouts.evaluate(prompts)
    results["start"] = rollouts.evaluate(prompts)
    policy.load(load_adapter_weights(run, base.structure))
    results["tuned"] = rollouts.evaluate(prompts)
    return {role: {name: value for name, value in metrics.items() if name != "loss"} | {"prompts": len(prompts)}
            for role, metrics in results.items()}
