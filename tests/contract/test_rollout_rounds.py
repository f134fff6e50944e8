"""Rounds of a rollout: which prompts come, what of an answer trains, and with which dice. Read `test_rollouts.py` first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from lab import attach, base
from test_rollouts import letters

from luthier.assembly.factory import attach_heads
from luthier.core.examples import Origin
from luthier.core.protocols import SamplingParams, Tuner
from luthier.core.types import Batch, TokenizedExample, TokenSpan
from luthier.data.batch_source import InMemoryBatchSource
from luthier.models import CausalLM
from luthier.objectives.grpo import GrpoConfig
from luthier.objectives.ppo import PpoConfig
from luthier.rl import Completion, RolloutCollector, RolloutSource
from tiny import IM_END

PROMPTS = [TokenizedExample((TokenSpan(tuple(range(65, 68 + n)), (0.0,) * (3 + n)),), Origin("prompts", n)) for n in range(7)]
ENDS = [*range(0, 256, 12), IM_END]  # so that some answers end by themselves and some are cut off


def plain(family: CausalLM) -> Tuner:
    return attach(family, "lora", 3, True, rank=4, dropout=0.0)


def feed(objective: Any, size: int = 2, ends: Sequence[int] = (), seed: int = 0, shuffle: bool = True,
         reward: Any = letters, held: Sequence[TokenizedExample] = ()) -> RolloutSource:
    family = base("llama", eos_token_id=None)
    family.model.generation_config.eos_token_id = list(ends) or None
    attached = plain(family)
    attach_heads(family, attached, objective, 0)
    cursor = InMemoryBatchSource(PROMPTS, size, None, shuffle=shuffle, seed=seed)
    return RolloutSource(RolloutCollector(PROMPTS, objective, [(reward, 1.0)], cursor, 1000, seed, attached.disabled), family, held)


def prompts_of(batches: Sequence[Batch]) -> list[int]:
    return [origin.line for each in batches for origin in each.origins]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_of_rounds_asks_every_prompt_once_in_the_order_of_the_cursor(size: int, shuffle: bool) -> None:
    rolled = feed(GrpoConfig(num_generations=2, max_new_tokens=2), size, shuffle=shuffle)
    for epoch in range(2):
        order = InMemoryBatchSource(PROMPTS, size, None, shuffle=shuffle).order(epoch).tolist()
        for start in range(0, len(PROMPTS), size):
            assert sorted(prompts_of(next(rolled))) == sorted(order[start:start + size])
    assert rolled.collector.rollouts == 2 * -(-len(PROMPTS) // size)


def test_the_token_that_ended_an_answer_is_trained_as_part_of_it() -> None:
    told: list[Completion] = []

    def reward(answers: Sequence[Completion]) -> list[float]:
        told.extend(answers)
        return [0.0] * len(answers)
    rolled = feed(GrpoConfig(num_generations=6, max_new_tokens=6), 4, ENDS, reward=reward)
    batches = next(rolled)
    ended = [answer for answer in told if answer.finished]
    assert 3 < len(ended) < len(told)
    for answer in told:
        ends = [token in ENDS for token in answer.token_ids]
        assert ends == [False] * (len(ends) - 1) + [answer.finished]
        assert len(answer.token_ids) == 6 or answer.finished
    found = []
    for each in batches:
        for item in range(len(each.target.labeled_segments)):
            mine = each.target.item_of == item
            assert (each.target.weights[mine] == 1).all()
            found.append(tuple(each.target.token_ids[mine].tolist()))
    assert sorted(found) == sorted(answer.token_ids for answer in told)


def test_every_round_and_every_seed_throws_other_dice_and_an_evaluation_always_the_same() -> None:
    def drawn(seed: int) -> list[tuple[int, ...]]:
        said: list[Any] = []
        rolled = feed(GrpoConfig(num_generations=2, max_new_tokens=8), 7, seed=seed, shuffle=False, reward=lambda answers: said.append(
            tuple(a.token_ids for a in answers)) or [float(i) for i in range(len(answers))], held=PROMPTS[:2])
        next(rolled)
        next(rolled)
        rolled.evaluate()
        rolled.evaluate()
        return said
    first, again, other = drawn(0), drawn(0), drawn(1)
    assert first == again
    assert len({*first[:2], *other[:2]}) == 4
    assert first[2] == first[3]
    assert len(set(first[0])) > 10  # answers to one prompt differ


def test_what_is_judged_is_the_mean_reward_and_the_best_is_the_lowest_loss() -> None:
    rolled = feed(GrpoConfig(num_generations=3, max_new_tokens=4, missing_eos_penalty=0.5), held=PROMPTS[:4],
                  reward=lambda answers: [float(i) for i in range(len(answers))])
    found = rolled.evaluate()
    assert found["reward"] == pytest.approx(1.5 - 0.5)  # one answer each, none of which ended
    assert found["loss"] == pytest.approx(-found["reward"])
    assert found["eos_rate"] == 0
    assert found["completion_length"] == 4


def test_what_a_round_says_is_means_over_its_answers() -> None:
    said: list[Completion] = []

    def reward(answers: Sequence[Completion]) -> list[float]:
        said.extend(answers)
        return [float(len(a.token_ids)) for a in answers]
    rolled = feed(PpoConfig(num_generations=4, max_new_tokens=6, kl_coef=0.1), 3, ENDS, reward=reward)
    batches = next(rolled)
    told = rolled.take_metrics()
    n = len(said)
    assert told["completion_length"] == pytest.approx(sum(len(a.token_ids) for a in said) / n)
    assert told["reward"] == pytest.approx(told["completion_length"])
    assert told["eos_rate"] == pytest.approx(sum(a.finished for a in said) / n)
    apart = [each.target.precomputed["old_logps"] - each.target.precomputed["reference_logps"] for each in batches]
    assert told["kl"] == pytest.approx(float(torch.cat(apart).double().sum()) / n, rel=1e-6)  # nats an answer
    assert abs(told["kl"]) > 1e-3
    assert not rolled.take_metrics()


def test_the_policy_is_asked_without_dropout_and_goes_on_training() -> None:
    objective = PpoConfig(num_generations=2, max_new_tokens=4, kl_coef=0.1)
    outcomes = []
    for dropout in (0.0, 0.5):
        family = base("gpt2", eos_token_id=None, resid_pdrop=dropout, embd_pdrop=dropout)
        family.model.generation_config.eos_token_id = None
        attached = plain(family)
        attach_heads(family, attached, objective, 0)
        family.train(True)
        rolled = RolloutSource(RolloutCollector(PROMPTS, objective, [(letters, 1.0)], InMemoryBatchSource(PROMPTS, 3, None), 1000, 0,
                                            attached.disabled), family)
        outcomes.append(next(rolled))
        assert family.training
    for calm, shaken in zip(*outcomes, strict=True):
        assert torch.equal(calm.inputs.tokens, shaken.inputs.tokens)
        for name, column in calm.target.precomputed.items():
            torch.testing.assert_close(shaken.target.precomputed[name], column)


def test_the_weight_of_kl_is_steered_after_its_round() -> None:
    objective = PpoConfig(num_generations=2, max_new_tokens=4, kl_coef=0.1, adaptive_kl_target=1e-6)
    family = base("llama", eos_token_id=None)
    attached = plain(family)
    attach_heads(family, attached, objective, 0)
    rolled = RolloutSource(RolloutCollector(PROMPTS, objective, [(letters, 1.0)], InMemoryBatchSource(PROMPTS, 3, None), 1000, 0,
                                            attached.disabled), family)
    next(rolled)
    first = rolled.take_metrics()
    next(rolled)
    second = rolled.take_metrics()
    assert first["kl_coef"] == 0.1
    assert second["kl_coef"] == pytest.approx(0.1 * (1.02 if first["kl"] > 0 else 0.98))


@pytest.mark.parametrize("micro", [1000, 14])
def test_every_token_has_the_advantage_of_its_own_answer(micro: int) -> None:
    """Each answer's reward is another number, so that its advantage tells whose it is."""
    objective = GrpoConfig(num_generations=3, max_new_tokens=4, advantage_estimator="dr_grpo")
    rolled = feed(objective, 4, ENDS, reward=lambda answers: [float(i * i) for i in range(len(answers))])
    rolled.collector.max_tokens = micro
    seen: dict[int, list[tuple[float, float]]] = {}
    for each in next(rolled):
        for item, label in enumerate(each.target.labels.tolist()):
            mine = each.target.precomputed["advantages"][each.target.item_of == item]
            assert len(set(mine.tolist())) == 1
            seen.setdefault(each.origins[int(each.target.groups[item])].line, []).append((label, float(mine[0])))
    assert sorted(map(len, seen.values())) == [3] * 4
    for pairs in seen.values():
        middle = sum(label for label, _ in pairs) / 3
        for label, advantage in pairs:
            assert advantage == pytest.approx(label - middle, rel=1e-6)


def test_an_answer_is_the_policys_own_to_its_prompt() -> None:
    """At a temperature of nearly 0 it is the greedy one, whichever prompts share its batch."""
    told: list[Completion] = []
    objective = GrpoConfig(num_generations=2, max_new_tokens=5, temperature=1e-6)
    rolled = feed(objective, 7, reward=lambda answers: told.extend(answers) or [0.0] * len(answers))
    next(rolled)
    rolled.policy.train(False)
    for answer in told:
        greedy, = rolled.policy.generate([answer.prompt_ids], SamplingParams(5))
        assert answer.token_ids[:len(greedy.token_ids)] == greedy.token_ids
        assert answer.prompt_ids == PROMPTS[answer.origin.line].spans[0].ids
    assert len({answer.token_ids for answer in told}) > 3
