"""A reward run as a reward: its adapter and head score completions. Read `rl/rewards.py` and `run_io.py` first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import groupby
from typing import Any

import torch

from luthier import data as rows
from luthier.assembly import factory, initialization
from luthier.assembly.peft_adapters import load_adapter_weights
from luthier.assembly.provenance import describe_model_conflict
from luthier.assembly.recipe import Recipe, load_recipe
from luthier.assembly.run_io import open_run, rename_weights
from luthier.core.errors import RecipeError, RunError
from luthier.core.examples import Message, PreferenceExample
from luthier.core.protocols import Family, Tuner
from luthier.core.types import TokenizedExample
from luthier.data import DataConfig
from luthier.methods.multi_adapter import AdapterManager
from luthier.rl import Completion, Reward
from luthier.training.run_folder import Run

REWARD = "reward"
MAX_SHOWN = 80  # characters of a prompt in an error


def read_reward_recipe(run: Run) -> Recipe:
    """The recipe of a reward run. Raises `RecipeError` for a run with another objective."""
    recipe = load_recipe(run.require_exists())
    if recipe.objective.name != "reward":
        raise RecipeError(f"objective.reward.model: the run {str(run.path)!r} has the objective "
                          f"{recipe.objective.name!r}, which gives no rewards", "train one with objective: reward")
    return recipe


def load_reward_model(run: Run, recipe: Recipe, base: Family, tuner: Tuner, warn: Callable[[str], None]) -> Reward:
    """The reward of a reward run: on the policy's base where its adapter can share it, else on a second model.

    Args:
        recipe: of the policy.
        tuner: of the policy.
        warn: called with a sentence where a second model is loaded.
    """
    reward_recipe = read_reward_recipe(run)
    if run.adapter is None or tuner.gates is None or describe_model_conflict(run, recipe.model):
        reward_recipe, family, _ = open_run(run)
        family.train(False)
        count = sum(parameter.numel() for parameter in family.structure.model.parameters())
        warn(f"the reward model {str(run.path)!r} cannot share the policy's base, so a second model of {count:,} "
             "parameters is in memory")
        return _build_reward(run, reward_recipe, family, nullcontext)
    adapters = get_adapter_manager(base, tuner)
    adapter = reward_recipe.method.attach(base.structure, seed=reward_recipe.seed)
    heads = base.build_heads(reward_recipe.objective.heads, reward_recipe.seed)
    saved = load_adapter_weights(run, base.structure)
    own = rename_weights(saved, adapter.state(), base)
    adapter.load({name: own[name] for name in adapter.state() if name in own})
    heads.load({name: saved[name] for name in heads.state() if name in saved})
    name = next(name for i in range(99) if (name := REWARD + str(i or "")) not in adapters.adapters)
    adapters.add(name, adapter)
    adapters.freeze(name)
    for parameter in heads.parameters().values():
        parameter.requires_grad_(False)

    @contextmanager
    def activate() -> Iterator[None]:
        with base.using_heads(heads), adapters.use_adapter(name):
            yield
    return _build_reward(run, reward_recipe, base, activate)


def get_adapter_manager(base: Family, tuner: Tuner) -> AdapterManager:
    """The adapter manager of this base; a new one holds the policy's tuner, active."""
    if isinstance(base.router, AdapterManager):
        return base.router
    adapters = AdapterManager(base.structure)
    adapters.add(initialization.POLICY, tuner)
    adapters.set_adapter(initialization.POLICY)
    base.router = adapters
    return adapters


def _build_reward(run: Run, recipe: Recipe, family: Family,
                  activate: Callable[[], AbstractContextManager[None]]) -> Reward:
    """Scores completions, rendered as the rows that the reward model was trained on.

    Args:
        activate: makes the context in which the family is the reward model.
    """
    config = factory.resolve_data_config(recipe, family)
    if family.structure.task != "CAUSAL_LM" and not family.is_encoder_decoder:
        config = config.model_copy(update={"share_prompt": False})
    max_tokens = factory.resolve_micro_batch_tokens(recipe, family)

    def reward(completions: Sequence[Completion]) -> list[float]:
        groups = [list(group) for _, group in groupby(completions, key=lambda c: (c.prompt_ids, str(c.origin)))]
        encoded = [_encode_group(run, group, family, config) for group in groups]
        scores: list[list[float]] = [[] for _ in groups]
        with torch.no_grad(), activate():
            for row in rows.assign_rows(encoded, max_tokens):
                batch = rows.build_batch([encoded[i] for i in row]).to(family.device)
                outputs = family.forward(batch.inputs, batch.target, frozenset({"scores"}))
                assert outputs.scores is not None
                of_row = iter(outputs.scores[:, 0].tolist())  # [A], the completions of the row in order
                for i in row:
                    scores[i] = [next(of_row) for _ in groups[i]]
        return [score for group in scores for score in group]  # N
    return reward


def _encode_group(run: Run, completions: Sequence[Completion], family: Family, config: DataConfig) -> TokenizedExample:
    """The completions of one prompt as one preference example. Raises `RunError` where they do not fit."""
    metadata = completions[0].metadata
    given = metadata.get("prompt", completions[0].prompt)
    prompt = given if isinstance(given, str) else tuple(_build_message(turn) for turn in given)
    example = PreferenceExample(prompt, tuple(completion.text for completion in completions),
                                tuple(range(len(completions))), completions[0].origin,
                                tools=tuple(metadata.get("tools") or ()))
    encoded = rows.encode_example(example, family.tokenizer, config)
    if isinstance(encoded, list):
        return encoded[0]
    raise RunError(f"the reward model {str(run.path)!r} cannot score a completion of "
                   f"{completions[0].prompt[-MAX_SHOWN:]!r}: {encoded}",
                   "train the reward model with a longer data.max_length, or lower objective.max_new_tokens")


def _build_message(turn: Mapping[str, Any]) -> Message:
    return Message(turn["role"], turn["content"], extra={k: v for k, v in turn.items() if k not in ("role", "content")})
