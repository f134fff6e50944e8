"""A feed whose answers are the model's own: PPO's and GRPO's data. Read `data/batch_source.py` first.

A round takes the next prompts, has the current policy answer each several times, judges the answers, and computes once
what the loss must know of every token. Then it yields the optimiser steps of every epoch over them, and only then the
next round begins. A prompt and its answers are a tree, so the prompt is computed once for all of them.

Where several processes train one model, each answers, judges and measures its share of the prompts, and all of them
learn from the same answers, rewards and columns: every reward is asked once for an answer.

The cursor holds a round's answers and columns while steps of it are left; between rounds it holds none, since the
weights and the seed give the same answers again.

Shape letters: N answers of a round, those of one prompt beside one another; M tokens of all of them, in that order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from luthier.core.protocols import Family, SamplingParams
from luthier.core.types import Batch, LabeledSpan, TokenizedExample, TokenSpan
from luthier.data.batch_source import InMemoryBatchSource
from luthier.data.packing import assign_rows, build_batch
from luthier.rl.rewards import Completion, Reward, compute_rewards

DTYPES = {"torch.float32": torch.float32, "torch.float64": torch.float64}
NO_SPREAD = 1e-8  # rewards that differ by no more are equal, as in TRL
SHOWN = 4  # answers of a round that are written down


Found = tuple[list[Completion], list[float], dict[str, Tensor]]  # answers, rewards [N], columns [M]


class MapShards(Protocol):
    """How processes share work; see `luthier.distributed.process_group.map_shards`."""

    def __call__(self, function: Callable[[Sequence[TokenizedExample], int], Found],
                 items: Sequence[TokenizedExample]) -> list[Found]: ...


def _map_locally(function: Callable[[Sequence[TokenizedExample], int], Found],
                 items: Sequence[TokenizedExample]) -> list[Found]:
    return [function(items, 0)]


class RolloutObjective(Protocol):
    """What a rollout asks of its objective; see `objectives/rl_config.py`."""

    @property
    def num_generations(self) -> int: ...
    @property
    def max_new_tokens(self) -> int: ...
    @property
    def temperature(self) -> float: ...
    @property
    def generation_batch_size(self) -> int: ...
    @property
    def epochs_per_rollout(self) -> int: ...
    @property
    def num_mini_batches(self) -> int: ...
    @property
    def missing_eos_penalty(self) -> float: ...
    @property
    def early_stop_kl(self) -> float | None: ...
    @property
    def kl_coef(self) -> float: ...
    @property
    def rollout_outputs(self) -> frozenset[str]: ...
    def compute_advantages(self, rewards: Tensor, lengths: Tensor, found: Mapping[str, Tensor],
                kl_coef: float) -> dict[str, Tensor]: ...
    def update_kl_coef(self, kl_coef: float, kl: float) -> float: ...


@dataclass(frozen=True)
class RolloutBatch:
    """Answers that are being learned from.

    Args:
        prompts: their places among all prompts, [n].
        answers: [N] token ids, each with the token that ended it.
        rewards: [N].
        columns: name -> [M].
    """

    prompts: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    rewards: tuple[float, ...]
    columns: Mapping[str, Tensor]

    def state(self) -> dict[str, Any]:
        """As JSON holds it; numbers come back bit for bit."""
        dtype = next((str(column.dtype) for column in self.columns.values()), "torch.float32")
        return {"prompts": self.prompts, "answers": self.answers, "rewards": self.rewards, "dtype": dtype,
                "columns": {name: column.tolist() for name, column in self.columns.items()}}

    @staticmethod
    def loaded(state: Mapping[str, Any]) -> RolloutBatch:
        columns = {name: torch.tensor(column, dtype=DTYPES[state["dtype"]])
                   for name, column in state["columns"].items()}
        return RolloutBatch(tuple(state["prompts"]), tuple(map(tuple, state["answers"])), tuple(state["rewards"]),
                            columns)


class RolloutCollector:
    """An endless run of steps over answers of the policy itself; a `core.protocols.BatchSource`.

    Args:
        family: the policy. It is asked with dropout off.
        prompts: one piece each, in the order that `cursor` numbers.
        objective: its settings of a rollout, and its columns.
        rewards: what an answer is worth, each with its weight.
        cursor: which prompts are next; its batch size is the prompts of a round.
        micro_tokens: the most tokens of one micro-batch; a prompt's answers are spread over several where they must be.
        reference: makes the context in which the family is the reference.
        autocast: makes the context for mixed precision.
        held: prompts that `judged` answers, and nobody learns from.
        note: told (step, rows) of some answers of every round.
        map_shards: how several processes share the prompts of a round.
    """

    def __init__(self, family: Family, prompts: Sequence[TokenizedExample], objective: RolloutObjective,
                 rewards: Sequence[tuple[Reward, float]], cursor: InMemoryBatchSource, micro_tokens: int, seed: int = 0,
                 reference: Callable[[], AbstractContextManager[None]] = nullcontext,
                 autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
                 held: Sequence[TokenizedExample] = (),
                 note: Callable[[int, list[dict[str, Any]]], None] = lambda step, said: None,
                 map_shards: MapShards = _map_locally) -> None:
        self.family, self.prompts, self.objective, self.rewards = family, prompts, objective, rewards
        self.cursor, self.micro_tokens, self.seed = cursor, micro_tokens, seed
        self.reference, self.autocast, self.held, self.note = reference, autocast, held, note
        self.map_shards = map_shards
        self.kl_coef = objective.kl_coef
        self.rounds, self.steps, self.taken = 0, 0, 0
        self._round: RolloutBatch | None = None
        self._news: dict[str, float] = {}
        whole, rest = divmod(len(cursor.order(0)), cursor.batch_size)
        parts = whole * min(objective.num_mini_batches, cursor.batch_size) + min(objective.num_mini_batches, rest)
        self.steps_per_epoch = objective.epochs_per_rollout * parts

    # ------------------------------------------------------------ the feed

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> list[Batch]:
        plan = self._plan() if self._round else []
        if self.taken >= len(plan):
            self._round, self.taken = self._roll(), 0
            plan = self._plan()
        assert self._round is not None
        chosen = plan[self.taken]
        self.taken, self.steps = self.taken + 1, self.steps + 1
        return [self._known(found, places) for found, places in self._batches(self._round, chosen)]

    def _plan(self) -> list[list[int]]:
        """The prompts (by their place in the round) of every step of the round."""
        assert self._round is not None
        count, found = len(self._round.prompts), []
        for epoch in range(self.objective.epochs_per_rollout):
            order = np.random.default_rng([self.seed, self.rounds, epoch]).permutation(count)
            parts = np.array_split(order, min(self.objective.num_mini_batches, count))
            found += [sorted(part.tolist()) for part in parts]
        return found

    def _known(self, found: Batch, places: Tensor) -> Batch:
        assert self._round is not None
        columns = {name: column[places] for name, column in self._round.columns.items()}
        return replace(found, target=replace(found.target, precomputed=columns))

    def state(self) -> dict[str, Any]:
        left = self._round is not None and self.taken < len(self._plan())
        return {"cursor": self.cursor.state(), "rounds": self.rounds, "steps": self.steps, "taken": self.taken,
                "kl_coef": self.kl_coef, "round": self._round.state() if left and self._round else None}

    def load(self, state: Mapping[str, Any]) -> None:
        self.cursor.load(state["cursor"])
        self.rounds, self.steps, self.taken = state["rounds"], state["steps"], state["taken"]
        self.kl_coef = state["kl_coef"]
        self._round = RolloutBatch.loaded(state["round"]) if state["round"] else None

    def heard(self, numbers: Callable[[], Mapping[str, float]]) -> Mapping[str, float]:
        """Told after each step how to learn what it measured; answers what there is to say of its round."""
        if self.objective.early_stop_kl is not None and numbers()["approx_kl"] > self.objective.early_stop_kl:
            self._round = None
        news, self._news = self._news, {}
        return news

    # ------------------------------------------------------------ a round

    def _roll(self) -> RolloutBatch:
        """The next prompts, answered, judged and measured."""
        cursor = self.cursor
        if cursor.row >= len(order := cursor.order(cursor.epoch)):
            cursor.epoch, cursor.row = cursor.epoch + 1, 0
            order = cursor.order(cursor.epoch)
        chosen = tuple(int(i) for i in order[cursor.row:cursor.row + cursor.batch_size])
        cursor.row += len(chosen)
        self.rounds += 1
        answers, rewards, found = self._answered([self.prompts[i] for i in chosen], self.objective.num_generations,
                                                 self.seed * 1_000_003 + self.rounds, self.objective.rollout_outputs)
        lengths = torch.tensor([len(answer.tokens) for answer in answers])
        columns = self.objective.compute_advantages(torch.tensor(rewards, dtype=torch.float64), lengths, found,
                                                    self.kl_coef)
        dtype = next((column.dtype for column in found.values()), torch.float32)
        self._news = self._said(answers, rewards, found) | _compute_reward_std(rewards, self.objective.num_generations)
        found.pop("entropies", None)  # told, and nothing that the loss must know
        self.note(self.steps + 1, [{"prompt": a.prompt, "answer": a.text, "reward": r}
                                   for a, r in list(zip(answers, rewards, strict=True))[:SHOWN]])
        if "kl" in self._news:
            self._news["kl_coef"] = self.kl_coef
            self.kl_coef = self.objective.update_kl_coef(self.kl_coef, self._news["kl"])
        return RolloutBatch(chosen, tuple(answer.tokens for answer in answers), tuple(rewards),
                            {name: column.to(dtype) for name, column in {**found, **columns}.items()})

    def judged(self, prompts: Sequence[TokenizedExample] | None = None) -> dict[str, float]:
        """What the policy earns on prompts that it does not learn from (left out: those held out): one answer each,
        always by the same dice. `loss` is the reward with its sign turned, so that the best evaluation is the lowest
        here too."""
        prompts = self.held if prompts is None else prompts
        if not prompts:
            return {}
        asks = self.objective.rollout_outputs & {"reference_logps"}
        answers, rewards, found = self._answered(prompts, 1, self.seed, asks | ({"token_logps"} if asks else set()))
        said = self._said(answers, rewards, found)
        return {"loss": -said["reward"], **said}

    @torch.no_grad()
    def _answered(self, prompts: Sequence[TokenizedExample], times: int, seed: int, asks: frozenset[str]) -> Found:
        """Answers, rewards [N], and what `asks` names of their tokens, [M] each; the same on all ranks."""
        training = self.family.training
        self.family.train(False)
        shards = self.map_shards(partial(self._answer_shard, times, seed, asks), prompts)
        self.family.train(training)
        columns = {name: torch.cat([found[name] for _, _, found in shards]) for name in shards[0][2]}
        rewards = [reward for _, own, _ in shards for reward in own]
        return [answer for own, _, _ in shards for answer in own], rewards, columns

    def _answer_shard(self, times: int, seed: int, asks: frozenset[str], prompts: Sequence[TokenizedExample],
                      start: int) -> Found:
        """`_answered` for some consecutive prompts, of which the first is number `start`."""
        with self.autocast():
            answers = self._answers(prompts, times, seed, start)
            rewards = compute_rewards(answers, self.rewards)
            found = self._measured(prompts, [answer.tokens for answer in answers], asks)
        off = self.objective.missing_eos_penalty
        return answers, [r - off * (not a.finished) for a, r in zip(answers, rewards, strict=True)], found

    def _answers(self, prompts: Sequence[TokenizedExample], times: int, seed: int, start: int = 0) -> list[Completion]:
        asked = [prompt.spans[0].ids for prompt in prompts for _ in range(times)]
        sampling = SamplingParams(self.objective.max_new_tokens, self.objective.temperature,
                            batch_size=self.objective.generation_batch_size, seed=seed,
                            first_prompt_index=start * times)
        said = sorted(self.family.generate(asked, sampling), key=lambda answer: answer.index)
        words = self.family.tokenizer
        texts = [_format_prompt(prompt, words) for prompt in prompts]
        return [Completion(texts[i // times], words.decode(one.token_ids, skip_special_tokens=True),
                           prompts[i // times].origin, prompts[i // times].metadata, asked[i],
                           one.token_ids + ((one.stop_token,) if one.stop_token is not None else ()), one.finished)
                for i, one in enumerate(said)]

    def _measured(self, prompts: Sequence[TokenizedExample], answers: Sequence[tuple[int, ...]],
                  asks: frozenset[str]) -> dict[str, Tensor]:
        """`old_logps`, `old_values`, `entropies` and `reference_logps` of the answers' tokens, as far as `asks` names
        them."""
        found: dict[str, Tensor] = {}
        if not asks:
            return found
        drawn = RolloutBatch(tuple(range(len(prompts))), tuple(answers), (0.0,) * len(answers), {})
        for one, places in _build_micro_batches(prompts, drawn, range(len(prompts)), self.micro_tokens,
                                                self.objective.temperature):
            there = one.to(self.family.device)
            outputs = self.family.forward(there.inputs, there.target, asks - {"reference_logps"})
            made = {"old_logps": outputs.token_logps}
            if outputs.token_scores is not None:
                made["old_values"] = outputs.token_scores[:, 0]
            if outputs.token_entropies is not None:
                made["entropies"] = outputs.token_entropies
            if "reference_logps" in asks:
                with self.reference():
                    made["reference_logps"] = self.family.forward(there.inputs, there.target,
                                                                  frozenset({"token_logps"})).token_logps
            for name, column in made.items():
                assert column is not None
                assert outputs.token_logps is not None
                whole = found.setdefault(name, torch.zeros(sum(map(len, answers)), dtype=outputs.token_logps.dtype))
                whole[places] = column.to(whole)
        return found

    def _said(self, answers: Sequence[Completion], rewards: Sequence[float],
              found: Mapping[str, Tensor]) -> dict[str, float]:
        count = len(answers)
        said = {"reward": sum(rewards) / count, "completion_length": sum(len(a.tokens) for a in answers) / count,
                "eos_rate": sum(a.finished for a in answers) / count}
        if "entropies" in found:
            said["entropy"] = float(found["entropies"].double().mean())
        if "reference_logps" in found:
            said["kl"] = float((found["old_logps"] - found["reference_logps"]).double().sum()) / count
        return said

    def _batches(self, drawn: RolloutBatch, chosen: Sequence[int]) -> list[tuple[Batch, Tensor]]:
        return _build_micro_batches([self.prompts[i] for i in drawn.prompts], drawn, chosen, self.micro_tokens,
                                    self.objective.temperature)


def _compute_reward_std(rewards: Sequence[float], group: int) -> dict[str, float]:
    """`reward_std` of all the answers, and of groups of several answers the share without any spread."""
    table = torch.tensor(rewards, dtype=torch.float64).view(-1, group)
    found = {"reward_std": float(table.std()) if table.numel() > 1 else 0.0}
    if group > 1:
        flat = table.amax(1) - table.amin(1) <= NO_SPREAD
        found["frac_reward_zero_std"] = float(flat.double().mean())
    return found


def _format_prompt(prompt: TokenizedExample, words: Any) -> str:
    """What was asked, as a person reads it: the prompt, or the last thing said before the answer."""
    said = prompt.metadata.get("prompt", "")
    return (said if isinstance(said, str) else str(said[-1]["content"])) or \
        str(words.decode(prompt.spans[0].ids, skip_special_tokens=True))


def _build_micro_batches(prompts: Sequence[TokenizedExample], drawn: RolloutBatch, chosen: Sequence[int],
                         micro_tokens: int, temperature: float) -> list[tuple[Batch, Tensor]]:
    """Micro-batches of the chosen prompts and their answers, whose log-probabilities are those of sampling at
    `temperature`; for each the places of its predictions among all M.

    A tree that is longer than `micro_tokens` is cut into several, each with the prompt and some of its answers.
    """
    times = len(drawn.answers) // len(drawn.prompts)
    starts = np.concatenate([[0], np.cumsum([len(answer) for answer in drawn.answers])])
    trees: list[tuple[TokenizedExample, list[int]]] = []
    for place in chosen:
        prompt = prompts[place].spans[0].ids
        parts: list[list[int]] = []
        room = 0
        for answer in range(place * times, (place + 1) * times):
            size = len(drawn.answers[answer])
            if not parts or size > room:
                parts.append([])
                room = micro_tokens - len(prompt)
            parts[-1].append(answer)
            room -= size
        trees += [(_build_tree(prompts[place], drawn, part), part) for part in parts]
    found = []
    for row in assign_rows([tree for tree, _ in trees], micro_tokens):
        owners = [answer for i in row for answer in trees[i][1]]
        places = np.concatenate([np.arange(starts[a], starts[a + 1]) for a in owners])
        made = build_batch([trees[i][0] for i in row])
        made = replace(made, target=replace(made.target, temperature=temperature))
        found.append((made, torch.from_numpy(places)))
    return found


def _build_tree(prompt: TokenizedExample, drawn: RolloutBatch, answers: Sequence[int]) -> TokenizedExample:
    root = TokenSpan(prompt.spans[0].ids, (0.0,) * len(prompt.spans[0].ids))
    children = [TokenSpan(drawn.answers[a], (1.0,) * len(drawn.answers[a]), 0) for a in answers]
    return TokenizedExample((root, *children), prompt.origin,
                            labeled_spans=tuple(LabeledSpan(1 + i, drawn.rewards[a]) for i, a in enumerate(answers)))
