"""The roles of PPO and GRPO on one base model, and the batch source of rollouts. Read `initialization.py` first.

| role      | what it is                                                                                     |
|-----------|------------------------------------------------------------------------------------------------|
| policy    | the recipe's method; it trains                                                                 |
| reference | the bare base model, or the frozen adapter of the run that the training starts from            |
| critic    | a value head on the policy's states, or on those of a second adapter (`critic: adapter`)       |
| reward    | the adapter and head of a reward run (`reward_models.py`), a function, or an HTTP endpoint     |

All adapters share one copy of the base weights through an `AdapterManager`. What cannot share it (a method that changes
the base weights, a reward model on another base) needs a second model, with a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from luthier.assembly import factory, initialization
from luthier.assembly.recipe import Recipe
from luthier.assembly.reference_model import build_autocast
from luthier.assembly.reward_models import get_adapter_manager, load_reward_model, read_reward_recipe
from luthier.core.errors import RecipeError
from luthier.core.protocols import BatchSource, Family, Tuner
from luthier.data import Datasets, InMemoryBatchSource
from luthier.distributed import process_group
from luthier.methods.composite import CompositeMethod
from luthier.methods.prefixed import PrefixedMethod
from luthier.objectives.grpo import GrpoConfig
from luthier.objectives.ppo import PpoConfig
from luthier.objectives.rl_config import RewardSourceConfig
from luthier.rl import Reward, RolloutCollector, RolloutSource, build_endpoint_reward, load_reward
from luthier.training.run_folder import Run
from luthier.training.trackers import JsonLines

Warn = Callable[[str], None]
Reference = Callable[[], AbstractContextManager[None]]
CRITIC = "critic"


def init_rl_policy(recipe: Recipe, base: Family) -> tuple[Tuner, Reference]:
    """The trainable parts, including the critic; and the context manager in which the model is the reference."""
    tuner, reference = initialization.init_policy(recipe, base)
    if not (isinstance(recipe.objective, PpoConfig) and recipe.objective.critic == "adapter"):
        return tuner, reference
    assert isinstance(tuner, CompositeMethod), "PPO has a value head"
    policy, heads = tuner.parts
    adapters = get_adapter_manager(base, policy)
    critic = recipe.method.attach(base.structure, seed=recipe.seed + 1)
    if recipe.init_from is not None:
        critic.load(policy.state())
    adapters.add(CRITIC, critic)
    base.critic = partial(adapters.use_adapter, CRITIC)
    return CompositeMethod([policy, PrefixedMethod(CRITIC, critic), heads], [1.0, 1.0, tuner.rates[1]]), reference


def build_training_source(recipe: Recipe, base: Family, datasets: Datasets, tuner: Tuner, reference: Reference,
                          folder: Path | None = None, warn: Warn = lambda sentence: None) -> BatchSource:
    """The batches of the run: rows of the data, or rollouts of the policy."""
    if not isinstance(recipe.objective, PpoConfig | GrpoConfig):
        return factory.build_batch_source(recipe, base, datasets)
    return build_rollout_source(recipe, base, datasets, tuner, reference, folder, warn)


def build_rollout_source(recipe: Recipe, base: Family, datasets: Datasets, tuner: Tuner, reference: Reference,
                         folder: Path | None = None, warn: Warn = lambda sentence: None) -> RolloutSource:
    """Rollouts of the policy. Reward models are loaded here.

    Args:
        folder: of the run; some completions of every rollout are written to samples.jsonl there. None: nowhere.
        warn: called with a sentence about a second model in memory.

    Raises:
        RecipeError: for settings that exclude each other, before anything is generated.
    """
    objective, batch_size = recipe.objective, recipe.training.batch_size
    assert isinstance(objective, PpoConfig | GrpoConfig)
    check_rewards(recipe)
    if recipe.data.streaming:
        raise RecipeError("data.streaming has no effect on rollouts: their prompts are kept in memory",
                          "omit data.streaming")
    if objective.num_mini_batches > batch_size:
        raise RecipeError(f"objective.num_mini_batches is {objective.num_mini_batches}, but a rollout has only "
                          f"{batch_size} prompts (training.batch_size)",
                          "a mini-batch has at least one prompt: lower objective.num_mini_batches")
    assert base.can_generate, "other bases are refused when the recipe is checked"
    cursor = InMemoryBatchSource(datasets.train, batch_size, None, shuffle=recipe.data.shuffle, seed=recipe.seed,
                                 mix=datasets.mix)
    rewards = [(_load_reward_source(source, recipe, base, tuner, warn), source.weight) for source in objective.reward]
    collector = RolloutCollector(datasets.train, objective, rewards, cursor,
                                 factory.resolve_micro_batch_tokens(recipe, base), recipe.seed, reference,
                                 partial(build_autocast, recipe, base), process_group.map_shards)
    return RolloutSource(collector, base, datasets.eval, _build_sample_logger(folder))


def check_rewards(recipe: Recipe) -> None:
    """Raises `RecipeError` where a reward is missing, cannot be called, or is not a reward run. Loads no model."""
    objective = recipe.objective
    if not isinstance(objective, PpoConfig | GrpoConfig):
        return
    if not objective.reward:
        raise RecipeError(f"objective.reward is missing: {objective.name} needs the reward of a completion",
                          "objective.reward=numeric_match, or {model: FOLDER}, {function: module:name}, {url: http://...}")
    for source in objective.reward:
        if source.function is not None:
            load_reward(source.function, source.timeout, source.sandbox)
        elif source.url is not None:
            build_endpoint_reward(source.url, source.timeout)
        else:
            read_reward_recipe(Run(str(source.model)))


def _load_reward_source(source: RewardSourceConfig, recipe: Recipe, base: Family, tuner: Tuner, warn: Warn) -> Reward:
    if source.url is not None:
        return build_endpoint_reward(source.url, source.timeout)
    if source.function is not None:
        return load_reward(source.function, source.timeout, source.sandbox)
    return load_reward_model(Run(str(source.model)), recipe, base, tuner, warn)


def _build_sample_logger(folder: Path | None) -> Callable[[int, Sequence[Mapping[str, Any]]], None]:
    """Writes samples.jsonl. The first call cuts the file back to its step, so that a resumed run repeats no row."""
    files: list[JsonLines] = []

    def log_samples(step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        if folder is None:
            return
        if not files:
            files.append(JsonLines(folder / "samples.jsonl", resume_at=step - 1))
        for sample in samples:
            files[0].log(step, sample)
    return log_samples
