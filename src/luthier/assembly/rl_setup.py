"""PPO's and GRPO's parts: policy, reference, critic and reward on one base, and the feed that rolls. Read
`initialization.py`.

| role      | what it is                                                                                    |
|-----------|-----------------------------------------------------------------------------------------------|
| policy    | the recipe's method, training                                                                 |
| reference | the bare base, or the adapter of `init_from`, frozen                                          |
| critic    | a value head on the policy's states, or on those of a second adapter (`critic: adapter`)      |
| reward    | a reward run's adapter and head, silent but when it judges; a function; an address            |

All adapters stand in one bank on one copy of the weights. What cannot stand there (a method that changes the base
itself, a reward on another base) costs a second model, and is said to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from luthier import data as rows
from luthier.assembly import factory, initialization
from luthier.assembly.peft_adapters import adapter_weights
from luthier.assembly.provenance import base_conflict, open_recipe
from luthier.assembly.recipe import Recipe, load_recipe
from luthier.assembly.reference_model import autocast
from luthier.assembly.run_io import open_run, renamed
from luthier.core.errors import RecipeError, RunError
from luthier.core.examples import ComparedExample, Message
from luthier.core.protocols import Attached, Family, Feed
from luthier.core.types import Encoded
from luthier.data import DataConfig, Datasets, Loader
from luthier.distributed import process_group
from luthier.methods.composite import Several, scopes
from luthier.methods.full import FullConfig
from luthier.methods.multi_adapter import Bank
from luthier.methods.prefixed import Named
from luthier.objectives.grpo import GrpoConfig
from luthier.objectives.ppo import PpoConfig
from luthier.objectives.rl_config import WorthConfig
from luthier.rl import Answer, Reward, Rollouts, endpoint, named
from luthier.training.run_folder import Run
from luthier.training.trackers import JsonLines

Warn = Callable[[str], None]
Reference = Callable[[], AbstractContextManager[None]]
CRITIC, REWARD = "critic", "reward"


def begin(made: Recipe, base: Family) -> tuple[Attached, Reference]:
    """What trains, the critic included; and what makes the context in which the model is the reference."""
    attached, reference = initialization.begin(made, base)
    if not (isinstance(made.objective, PpoConfig) and made.objective.critic == "adapter"):
        return attached, reference
    assert isinstance(attached, Several), "PPO has a value head"
    policy, heads = attached.parts
    bank = _bank(base, policy)
    critic = made.method.attach(base.anatomy, seed=made.seed + 1)
    if made.init_from is not None:
        critic.load(policy.state())
    bank.add(CRITIC, critic)
    base.critic = partial(bank.using, CRITIC)
    return Several([policy, Named(CRITIC, critic), heads], [1.0, 1.0, attached.rates[1]]), reference


def feed(made: Recipe, base: Family, found: Datasets, attached: Attached, reference: Reference,
         folder: Path | None = None, warn: Warn = lambda sentence: None) -> Feed:
    """The batches of the run: read from files, or the policy's own answers."""
    if not isinstance(made.objective, PpoConfig | GrpoConfig):
        return factory.feed(made, base, found)
    return rolling(made, base, found, attached, reference, folder, warn)


def rolling(made: Recipe, base: Family, found: Datasets, attached: Attached, reference: Reference,
            folder: Path | None = None, warn: Warn = lambda sentence: None) -> Rollouts:
    """The feed that rolls.

    Args:
        folder: of the run; some answers of every round are written to samples.jsonl there.
        warn: told what costs a second model.

    Raises:
        RecipeError: for settings that cannot be, before anything is generated.
    """
    objective, training = made.objective, made.training
    assert isinstance(objective, PpoConfig | GrpoConfig)
    check_rewards(made)
    if made.data.streaming:
        raise RecipeError("data.streaming: prompts of a rollout are kept in memory", "leave out data.streaming")
    if objective.minibatches > training.batch_size:
        raise RecipeError(f"objective.minibatches {objective.minibatches}: a round has only training.batch_size "
                          f"{training.batch_size} prompts", "a minibatch has at least one prompt: set it lower")
    assert base.writes, "other bases are refused when the recipe is checked"
    cursor = Loader(found.train, training.batch_size, None, shuffle=made.data.shuffle, seed=made.seed, mix=found.mix)
    return Rollouts(base, found.train, objective, [(_reward(one, made, base, attached, warn), one.weight)
                                                   for one in objective.reward],
                    cursor, factory.resolve_max_tokens(made, base), made.seed, reference,
                    partial(autocast, made, base), found.eval, _noted(folder), process_group.map_shards)


def check_rewards(made: Recipe) -> None:
    """Raises `RecipeError` where a reward is missing, cannot be called, or is no reward run. Loads no model."""
    objective = made.objective
    if not isinstance(objective, PpoConfig | GrpoConfig):
        return
    if not objective.reward:
        raise RecipeError(f"objective.reward: {objective.name} needs to know what an answer is worth",
                          "objective.reward=number, or {run: FOLDER}, {function: module:name}, {url: http://...}")
    for one in objective.reward:
        if one.function is not None:
            named(one.function, one.timeout)
        elif one.url is not None:
            endpoint(one.url, one.timeout)
        else:
            _reward_recipe(Run(str(one.run)))


def _reward_recipe(run: Run) -> Recipe:
    """What a reward run was trained with."""
    found = load_recipe(run.existing())
    if found.objective.name != "reward":
        raise RecipeError(f"objective.reward.run: {str(run.path)!r} was trained with the objective "
                          f"{found.objective.name!r}, and gives no rewards", "train one with objective: reward")
    return found


def judged(made: Recipe, base: Family, attached: Attached | None, found: Datasets,
           prompts: list[Encoded]) -> dict[str, float]:
    """What a trained policy earns on prompts. There is no KL in it: its reference is not in the run folder."""
    free = {"kl_weight": 0.0, "kl_target": None}
    assert isinstance(made.objective, PpoConfig | GrpoConfig)
    made = made.model_copy(update={"objective": made.objective.model_copy(update=free)})
    # A whole model has no switch, so its reward run cannot share it.
    here = attached if attached is not None else FullConfig().attach(base.anatomy, seed=0)
    rolled = feed(made, base, found if found.train else replace(found, train=prompts, mix=()), here, nullcontext)
    assert isinstance(rolled, Rollouts)
    return rolled.judged(prompts)


def standing(run: Run) -> dict[str, dict[str, float]]:
    """What the bare base, the policy that the run started from and the one that it trained earn on the run's test
    rows (or validation, or train rows where there are none), and how far each is from the start."""
    made = open_recipe(run.existing())
    base = factory.family(made.model)
    found = factory.datasets(made, base)
    attached, reference = begin(made, base)
    policy = attached.parts[0] if isinstance(attached, Several) and made.objective.heads else attached
    rolled = rolling(made, base, found, attached, reference)
    prompts = found.test or found.eval or found.train
    told = {}
    with attached.disabled():
        told["base"] = rolled.judged(prompts)
    told["start"] = rolled.judged(prompts)
    policy.load(adapter_weights(run, base.anatomy))
    told["tuned"] = rolled.judged(prompts)
    return {role: {name: value for name, value in one.items() if name != "loss"} | {"prompts": len(prompts)}
            for role, one in told.items()}


def _noted(folder: Path | None) -> Callable[[int, list[dict[str, Any]]], None]:
    """Writes samples.jsonl, from the step on that the run stands at."""
    files: list[JsonLines] = []

    def note(step: int, said: list[dict[str, Any]]) -> None:
        if folder is None:
            return
        if not files:
            files.append(JsonLines(folder / "samples.jsonl", resume_at=step - 1))
        for one in said:
            files[0].log(step, one)
    return note


# ---------------------------------------------------------------- rewards


def _reward(config: WorthConfig, made: Recipe, base: Family, attached: Attached, warn: Warn) -> Reward:
    if config.url is not None:
        return endpoint(config.url, config.timeout)
    if config.function is not None:
        return named(config.function, config.timeout)
    return _of_run(Run(str(config.run)), made, base, attached, warn)


def _of_run(run: Run, made: Recipe, base: Family, attached: Attached, warn: Warn) -> Reward:
    """A reward run on this base, or on a base of its own."""
    found = _reward_recipe(run)
    if run.adapter is None or scopes(attached) is None or base_conflict(run, made.model):
        found, judge, _ = open_run(run)
        judge.train(False)
        count = sum(parameter.numel() for parameter in judge.anatomy.model.parameters())
        warn(f"the reward {str(run.path)!r} cannot share the policy's base, so a second model of {count:,} parameters "
             "is in memory")
        return _scored(run, found, judge, nullcontext)
    bank = _bank(base, attached)
    adapter, before = found.method.attach(base.anatomy, seed=found.seed), base.heads
    base.add(found.objective.heads, found.seed)
    heads, base.heads = base.heads, before
    saved = adapter_weights(run, base.anatomy)
    own = renamed(saved, adapter.state(), base)
    adapter.load({name: own[name] for name in adapter.state() if name in own})
    heads.load({name: saved[name] for name in heads.state() if name in saved})
    name = next(name for i in range(99) if (name := REWARD + str(i or "")) not in bank.members)
    bank.add(name, adapter)
    bank.frozen(name)
    for parameter in heads.parameters().values():
        parameter.requires_grad_(False)

    @contextmanager
    def acting() -> Iterator[None]:
        before, base.heads = base.heads, heads
        try:
            with bank.using(name):
                yield
        finally:
            base.heads = before
    return _scored(run, found, base, acting)


def _bank(base: Family, attached: Attached) -> Bank:
    """The bank on this base; a new one holds what trains, acting."""
    if isinstance(base.router, Bank):
        return base.router
    bank = Bank(base.anatomy)
    bank.add(initialization.POLICY, attached)
    bank.choose(initialization.POLICY)
    base.router = bank
    return bank


def _scored(run: Run, found: Recipe, judge: Family, acting: Reference) -> Reward:
    """Answers put into words as the reward's own training rows were, and its scores of them."""
    config = factory.settled(found, judge)
    if judge.anatomy.task != "CAUSAL_LM" and not judge.divided:
        config = config.model_copy(update={"share_prompt": False})
    micro = factory.resolve_max_tokens(found, judge)

    def reward(answers: Sequence[Answer]) -> list[float]:
        groups = [list(group) for _, group in groupby(answers, key=lambda answer: (answer.ids, str(answer.origin)))]
        encoded = [_compared(run, group, judge, config) for group in groups]
        scores: list[list[float]] = [[] for _ in groups]
        with torch.no_grad(), acting():
            for row in rows.first_fit(encoded, micro):
                there = rows.batch([encoded[i] for i in row]).to(judge.device)
                outputs = judge.forward(there.inputs, there.target, frozenset({"scores"}))
                assert outputs.scores is not None
                given = iter(outputs.scores[:, 0].tolist())
                for i in row:
                    scores[i] = [next(given) for _ in groups[i]]
        return [score for group in scores for score in group]
    return reward


def _compared(run: Run, answers: Sequence[Answer], judge: Family, config: DataConfig) -> Encoded:
    """Answers to one prompt as a row of comparisons."""
    raw = answers[0].facts.get("prompt", answers[0].prompt)
    prompt = raw if isinstance(raw, str) else tuple(_message(turn) for turn in raw)
    example = ComparedExample(prompt, tuple(answer.text for answer in answers), tuple(range(len(answers))),
                              answers[0].origin, tools=tuple(answers[0].facts.get("tools") or ()))
    found = rows.encode(example, judge.tokenizer, config)
    if isinstance(found, list):
        return found[0]
    raise RunError(f"the reward {str(run.path)!r} cannot read an answer to {answers[0].prompt[-80:]!r}: {found}",
                   "train the reward with a longer data.max_length, or let answers be shorter")


def _message(turn: Mapping[str, Any]) -> Message:
    """A turn of a prompt as a row gave it."""
    return Message(turn["role"], turn["content"], extra={k: v for k, v in turn.items() if k not in ("role", "content")})
