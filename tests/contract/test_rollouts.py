"""Rollouts as a feed: what it says of every token is true, resumes to the bit, and learns problems with a known optimum."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lab import attach, base
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from luthier import assembly
from luthier.api.train import train
from luthier.assembly.factory import attach_heads, load_datasets, load_family
from luthier.assembly.rl_setup import init_rl_policy
from luthier.assembly.run_io import open_run
from luthier.core.errors import RecipeError, RunError
from luthier.core.examples import Origin
from luthier.core.protocols import Tuner
from luthier.core.types import Batch, Inputs, LossInputs, SegmentTree, TokenizedExample, TokenSpan
from luthier.data.batch_source import InMemoryBatchSource
from luthier.data.packing import pack_examples
from luthier.models import CausalLM
from luthier.objectives import OBJECTIVES
from luthier.objectives.grpo import GrpoConfig
from luthier.objectives.ppo import PpoConfig
from luthier.rl import Completion, RolloutCollector, RolloutSource
from luthier.training.loop import _follow_rollout
from luthier.training.optimizer import Optimizer, OptimizerConfig
from luthier.training.run_folder import Run
from luthier.training.step import forward_objective, step
from tiny import save_tiny

PROMPTS = [TokenizedExample((TokenSpan(tuple(range(65, 65 + n)), (0.0,) * n),), Origin("prompts", i), metadata={"numeric_match": i})
           for i, n in enumerate((3, 7, 5, 4))]


def letters(answers: Sequence[Completion]) -> list[float]:
    """The share of an answer's tokens that are P, Q, ... W: countable, and best at 1."""
    return [sum(80 <= token < 88 for token in answer.token_ids) / len(answer.token_ids) for answer in answers]


def rolls(objective: Any, family: CausalLM, attached: Tuner, seed: int = 0, micro: int = 1000, rounds: int = 4,
          reward: Callable[[Sequence[Completion]], Sequence[float]] = letters, **named: Any) -> RolloutSource:
    source = {name: named.pop(name) for name in ("log_samples",) if name in named}
    collector = RolloutCollector(PROMPTS, objective, [(reward, 1.0)], InMemoryBatchSource(PROMPTS, rounds, None, seed=seed),
                                 micro, seed, attached.disabled, **named)
    return RolloutSource(collector, family, **source)


def set_up(objective: Any, kind: str = "llama", seed: int = 3, stirred: bool = True,
           **model: Any) -> tuple[CausalLM, Tuner]:
    family = base(kind, **model)
    attached = attach(family, "lora", seed, stirred, rank=4, dropout=0.0)
    return family, attach_heads(family, attached, objective, seed)


def alone(family: CausalLM, prompt: Sequence[int], answer: Sequence[int], temperature: float = 1.0) -> Tensor:
    """log p of each token of an answer behind its prompt, from Transformers' own logits."""
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        logits = family.model(input_ids=ids).logits[0, len(prompt) - 1:-1] / temperature
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt):, None])[:, 0]


def gradients(family: CausalLM, objective: Any, attached: Tuner, batches: Sequence[Batch]) -> dict[str, Tensor]:
    count = sum(objective.count(batch.target) for batch in batches)
    for parameter in attached.parameters().values():
        parameter.grad = None
    for batch in batches:
        (objective(forward_objective(family, objective, batch, attached.disabled), batch.target).total / count).backward()
    return {name: p.grad.clone() for name, p in attached.parameters().items() if p.grad is not None}


# ---------------------------------------------------------------- what is said of a token


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_every_column_stands_at_its_token(temperature: float, kind: str) -> None:
    objective = PpoConfig(num_generations=3, max_new_tokens=6, temperature=temperature, kl_coef=0.2, num_mini_batches=2)
    family, attached = set_up(objective, kind)
    feed = rolls(objective, family, attached, micro=25)
    seen: list[tuple[int, ...]] = []
    for batches in (next(feed), next(feed)):
        for batch in batches:
            segment_tree, target = batch.inputs.segment_tree, batch.target
            for item, segment in enumerate(target.labeled_segments.tolist()):
                parent = segment_tree.parents[segment]
                prompt, answer = (tuple(batch.inputs.tokens[segment_tree.starts[s]:][:segment_tree.lengths[s]].tolist())
                                  for s in (parent, segment))
                mine = target.item_of == item
                assert target.token_ids[mine].tolist() == list(answer)
                wanted = alone(family, prompt, answer, temperature)
                torch.testing.assert_close(target.precomputed["old_logps"][mine], wanted, rtol=1e-4, atol=1e-5)
                with attached.disabled():
                    reference = alone(family, prompt, answer, temperature)
                torch.testing.assert_close(target.precomputed["reference_logps"][mine], reference, rtol=1e-4, atol=1e-5)
                assert (wanted - reference).abs().max() > 1e-3
                seen.append((*prompt, -1, *answer))
    assert len(seen) == 12
    assert len(set(seen)) > 8


def test_the_temperature_is_that_of_the_rollouts_batches_alone() -> None:
    """What measures the family between or after rollouts gets log-probabilities at temperature 1."""
    objective = GrpoConfig(num_generations=2, max_new_tokens=6, temperature=0.5, beta=0.1)
    family, attached = set_up(objective)
    feed = rolls(objective, family, attached)
    rolled, *_ = next(feed)
    assert rolled.target.temperature == 0.5
    feed.evaluate(PROMPTS)
    plain = replace(rolled, target=replace(rolled.target, temperature=1.0))
    cool, warm = (family.forward(b.inputs, b.target, frozenset({"token_logps"})).token_logps for b in (rolled, plain))
    assert cool is not None
    assert warm is not None
    fresh = pack_examples([TokenizedExample((TokenSpan((1, 2, 3, 4), (1.0,) * 4),), Origin("rows", 0))], None)[0]
    assert fresh.target.temperature == 1.0
    torch.testing.assert_close(family.forward(fresh.inputs, fresh.target, frozenset({"token_logps"})).token_logps,
                               alone(family, (1,), (2, 3, 4)), rtol=1e-4, atol=1e-5)
    assert (cool - warm).abs().max() > 0.1


def test_micro_tokens_change_nothing_but_the_rows() -> None:
    for objective in (PpoConfig(num_generations=3, max_new_tokens=6, kl_penalty_in="loss"),
                      GrpoConfig(num_generations=3, max_new_tokens=6, beta=0.1)):
        found = []
        for micro in (1000, 14):
            family, attached = set_up(objective)
            batches = next(rolls(objective, family, attached, micro=micro))
            found.append((len(batches), gradients(family, objective, attached, batches)))
        assert found[0][0] == 1
        assert found[1][0] > 4
        assert found[0][1].keys() == found[1][1].keys()
        for name, wanted in found[0][1].items():
            torch.testing.assert_close(found[1][1][name], wanted, rtol=1e-3, atol=1e-6)
        assert max(float(g.abs().max()) for g in found[0][1].values()) > 1e-3


def test_a_round_is_learned_from_as_often_as_it_says() -> None:
    objective = GrpoConfig(num_generations=2, max_new_tokens=4, num_iterations=3, num_mini_batches=2)
    family, attached = set_up(objective)
    feed = rolls(objective, family, attached, rounds=3)
    assert feed.steps_per_epoch == 3 * 2 + 3 * 1  # a round of three prompts, and one of the fourth alone
    steps = [next(feed) for _ in range(6)]
    assert feed.collector.rollouts == 1
    for epoch in range(3):
        origins = [o.line for batches in steps[2 * epoch:2 * epoch + 2] for b in batches for o in b.origins]
        assert len(set(origins)) == 3
    next(feed)
    assert feed.collector.rollouts == 2
    assert len({line for batches in steps for b in batches for line in [o.line for o in b.origins]}
               | {o.line for b in next(feed) for o in b.origins}) == 4


def test_the_first_step_is_on_policy_and_its_kl_is_none() -> None:
    objective = PpoConfig(num_generations=2, max_new_tokens=5, kl_coef=0.1)
    family, attached = set_up(objective)
    batch, = next(rolls(objective, family, attached))
    loss = objective(forward_objective(family, objective, batch, attached.disabled), batch.target)
    assert abs(float(loss.metrics["approx_kl"][0])) < 1e-9
    assert float(loss.metrics["clip_fraction"][0]) == 0


def test_a_round_of_ppo_says_its_entropy() -> None:
    objective = PpoConfig(num_generations=2, max_new_tokens=5, temperature=0.7)
    family, attached = set_up(objective)
    feed = rolls(objective, family, attached)
    batches = next(feed)
    spread = []
    for batch in batches:
        segment_tree, tokens = batch.inputs.segment_tree, batch.inputs.tokens
        for segment in batch.target.labeled_segments.tolist():
            prompt, answer = (tokens[segment_tree.starts[s]:][:segment_tree.lengths[s]] for s in (segment_tree.parents[segment], segment))
            with torch.no_grad():
                logits = family.model(input_ids=torch.cat([prompt, answer])[None]).logits[0, len(prompt) - 1:-1]
            spread.append(torch.distributions.Categorical(logits=logits / 0.7).entropy())
        assert "entropies" not in batch.target.precomputed
    wanted = torch.cat(spread)
    assert feed.take_metrics()["entropy"] == pytest.approx(float(wanted.mean()), rel=1e-4)
    assert float(wanted.std()) > 1e-3


def follow(feed: RolloutSource, approx_kl: float) -> Mapping[str, float]:
    """What the loop does after a step that measured this KL."""
    measured: Any = SimpleNamespace(read_metrics=lambda: {"approx_kl": approx_kl})
    return _follow_rollout(feed, measured)


def test_a_round_ends_early_where_the_policy_has_moved_too_far() -> None:
    objective = GrpoConfig(num_generations=2, max_new_tokens=4, num_iterations=5, early_stop_kl=0.1)
    family, attached = set_up(objective)
    feed = rolls(objective, family, attached)
    next(feed)
    said = follow(feed, 0.05)
    assert {"reward", "completion_length", "eos_rate"} <= said.keys()
    next(feed)
    assert feed.collector.rollouts == 1
    assert not follow(feed, 0.2)  # reported once per rollout
    next(feed)
    assert feed.collector.rollouts == 2


def test_rewards_reach_their_answers_and_unfinished_ones_pay() -> None:
    objective = GrpoConfig(num_generations=2, max_new_tokens=4, missing_eos_penalty=0.25, advantage_estimator="dr_grpo")
    family, attached = set_up(objective)
    told: list[Completion] = []

    def reward(answers: Sequence[Completion]) -> list[float]:
        told.extend(answers)
        return [float(i) for i in range(len(answers))]
    noted: list[Any] = []
    feed = rolls(objective, family, attached, reward=reward, log_samples=lambda at, said: noted.append((at, list(said))))
    batch, = next(feed)
    assert [answer.metadata["numeric_match"] for answer in told] == [n for o in batch.origins for n in (o.line, o.line)]
    wanted = [i - 0.25 * (not answer.finished) for i, answer in enumerate(told)]
    assert batch.target.labels.tolist() == pytest.approx(wanted)
    assert noted == [(1, [{"prompt": a.prompt, "answer": a.text, "reward": r}
                          for a, r in zip(told[:4], wanted[:4], strict=True)])]


# ---------------------------------------------------------------- problems with a known optimum


def learn(objective: Any, seed: int, steps: int, rate: float = 0.05, **settings: Any) -> list[dict[str, float]]:
    """What every round said, over so many steps. 88 tokens, and a head whose logits can come near certainty."""
    family, attached = set_up(objective, seed=seed, stirred=False, dtype=torch.float32, num_hidden_layers=1,
                              vocab_size=88, initializer_range=0.3, eos_token_id=None)
    feed = rolls(objective, family, attached, seed, **settings)
    optimizer = Optimizer(attached.parameters(), attached.lr_multiplier, rate, OptimizerConfig(lr_scheduler_type="constant", warmup_ratio=0.0),
                          steps)
    said = []
    family.train(True)
    for number in range(steps):
        optimizer.set_learning_rate(number)
        found = step(family, objective, next(feed), optimizer, reference=attached.disabled)
        said.append(dict(_follow_rollout(feed, found)))
    return [one for one in said if one]


OPTIMIZED = {
    "ppo": PpoConfig(num_generations=16, max_new_tokens=3, kl_coef=0.0, num_ppo_epochs=2),
    **{kind: GrpoConfig(num_generations=16, max_new_tokens=3, advantage_estimator=kind) for kind in ("grpo", "rloo", "dr_grpo")},
}


@pytest.mark.parametrize(("name", "seed"), [("ppo", 0), ("ppo", 1), ("ppo", 2), ("grpo", 0), ("grpo", 1), ("grpo", 2),
                                            ("rloo", 0), ("dr_grpo", 1)])
def test_a_countable_reward_reaches_its_optimum(name: str, seed: int) -> None:
    said = learn(OPTIMIZED[name], seed, 60 if name == "ppo" else 20)
    assert said[0]["reward"] < 0.2
    assert sum(one["reward"] for one in said[-5:]) / 5 > 0.95, [round(one["reward"], 2) for one in said]


@pytest.mark.parametrize("seed", [0, 1])
def test_a_bandit_finds_its_best_arm(seed: int) -> None:
    """Half of the tokens pay 1, a tenth pays 2: the best that can be is 2, and 1 is the trap."""
    def pay(answers: Sequence[Completion]) -> list[float]:
        return [2.0 if a.token_ids[0] >= 80 else 1.0 if a.token_ids[0] >= 36 else 0.0 for a in answers]
    said = learn(PpoConfig(num_generations=32, max_new_tokens=1, kl_coef=0.0, num_ppo_epochs=2), seed, 50, reward=pay)
    assert sum(one["reward"] for one in said[-3:]) / 3 > 1.9, [round(one["reward"], 2) for one in said]


@pytest.mark.parametrize("where", ["reward", "loss"])
def test_a_large_price_of_kl_holds_the_policy_and_none_lets_it_drift(where: Any) -> None:
    kl = {weight: learn(PpoConfig(num_generations=16, max_new_tokens=3, kl_coef=weight, kl_penalty_in=where, num_ppo_epochs=2),
                        0, 30, rate=0.01)[-1]["kl"]
          for weight in (1e-9, 0.1, 10.0)}  # the smallest is no price at all, but measures
    assert kl[1e-9] > 5
    assert abs(kl[10.0]) < 0.1 * kl[0.1]
    assert kl[0.1] < 0.95 * kl[1e-9]


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rollouts")
    save_tiny(folder / "base", "llama", dtype=torch.float32, num_hidden_layers=1)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{w}?", "length": i + 1}) + "\n"
                                                  for i, w in enumerate(("one", "two", "three", "four", "five"))))
    (folder / "held.jsonl").write_text(json.dumps({"prompt": "six?", "length": 2}) + "\n")
    rows = [{"prompt": f"p{i}?", "chosen": "a" * (1 + i % 3), "rejected": "zz" * (1 + i % 2)} for i in range(12)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sft = [{"prompt": f"p{i}?", "completion": "a" * (1 + i % 4)} for i in range(12)]
    (folder / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sft))
    return folder


def recipe(home: Path, name: str, **objective: Any) -> dict[str, Any]:
    return {"model": str(home / "base"), "method": {"name": "lora", "rank": 2, "dropout": 0.2},
            "data": {"train": str(home / "prompts.jsonl"), "eval": str(home / "held.jsonl")},
            "objective": {"name": name, "reward": "length", "num_generations": 2, "max_new_tokens": 4, **objective},
            "training": {"max_steps": 9, "batch_size": 2, "max_tokens_per_micro_batch": 60, "save_steps": 1, "save_total_limit": 20,
                         "eval_steps": 4, "load_best_model_at_end": False},
            "optimizer": {"learning_rate": 0.01}, "evaluate": {"before_training": False}, "seed": 5}


def outcome(run: Run) -> tuple[dict[str, Tensor], list[dict[str, Any]], str]:
    timed = ("seconds", "per_second", "memory")
    lines = [{k: v for k, v in line.items() if not any(word in k for word in timed)} for line in run.metrics]
    return load_file(run.path / "adapter_model.safetensors"), lines, (run.path / "samples.jsonl").read_text()


@pytest.mark.parametrize("method", ["bitfit", "ln_tuning", "prefix", ["bitfit", {"name": "lora", "rank": 2}]], ids=str)
def test_other_methods_roll_too(home: Path, tmp_path: Path, method: Any) -> None:
    made = recipe(home, "ppo", kl_coef=0.1) | {"method": method}
    made["training"] |= {"max_steps": 2, "save_total_limit": 1}
    run = train(made, output_dir=str(tmp_path / "run"), quiet=True)
    assert all("kl" in line for line in run.metrics if "reward" in line)
    _, family, _ = open_run(run)  # what was saved is the policy alone, and fits
    assert not family.heads.parameters()


@pytest.mark.parametrize(("name", "settings"), [
    ("ppo", {"num_ppo_epochs": 2, "num_mini_batches": 2, "adaptive_kl_target": 0.5}), ("grpo", {"num_iterations": 2, "beta": 0.1}), ("grpo", {})])
def test_a_resumed_run_ends_with_the_same_bits(home: Path, tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    made = recipe(home, name, **settings)
    whole = train(made, output_dir=str(tmp_path / "whole"), quiet=True)
    tensors, lines, samples = outcome(whole)
    assert any("eval_reward" in line for line in lines)
    assert samples.count("\n") >= 4
    assert all("value" not in key and "critic" not in key for key in tensors)  # what is kept is the policy
    for at in (1, 4):
        killed = tmp_path / f"killed-{at}"
        shutil.copytree(whole.path, killed)
        (killed / "README.md").unlink()
        for folder in (killed / "checkpoints").glob("step-*"):
            if int(folder.name[5:]) > at:
                shutil.rmtree(folder)
        again = outcome(train(made, output_dir=str(killed), resume=True, quiet=True))
        assert all(torch.equal(again[0][key], tensors[key]) for key in tensors), at
        assert again[1:] == (lines, samples), at


def test_the_reward_is_a_run_on_the_same_base(home: Path, tmp_path: Path) -> None:
    reward = train({"model": str(home / "base"), "method": {"name": "lora", "rank": 2}, "objective": "reward",
                    "data": str(home / "pairs.jsonl"), "training": {"max_steps": 6, "batch_size": 6},
                    "optimizer": {"learning_rate": 0.01}, "output_dir": str(tmp_path / "reward")}, quiet=True)
    start = train({"model": str(home / "base"), "method": {"name": "lora", "rank": 3}, "objective": "sft",
                   "data": str(home / "sft.jsonl"), "training": {"max_steps": 6, "batch_size": 6},
                   "optimizer": {"learning_rate": 0.01}, "output_dir": str(tmp_path / "sft")}, quiet=True)
    raw = recipe(home, "ppo", reward={"model": str(reward.path)}, kl_coef=0.1)
    made = assembly.build_recipe({key: raw[key] for key in raw if key not in ("model", "method")} | {"init_from": str(start.path)})
    family = load_family(made.model)
    assert isinstance(family, CausalLM)
    found = load_datasets(made, family)
    attached, reference = init_rl_policy(made, family)
    warned: list[str] = []
    feed = assembly.build_training_source(made, family, found, attached, reference, None, warned.append)
    assert isinstance(feed, RolloutSource)
    assert not warned  # one copy of the weights
    assert not any("reward" in name for name in attached.parameters())

    answers = [Completion("p1?", text, Origin("x", 1), {"prompt": "p1?"}) for text in ("aa", "zz", "")]
    mine = feed.collector.rewards[0][0](answers)
    _, judge, _ = open_run(reward)  # the same run, opened by itself
    judge.train(False)
    scores = []
    for answer in answers:
        words = judge.tokenizer.apply_chat_template(
            [{"role": "user", "content": "p1?"}, {"role": "assistant", "content": answer.text}], tokenize=True)
        ids = torch.tensor(words["input_ids"] if not isinstance(words, list) else words)[:-1]  # no line break at the end
        target = LossInputs(torch.zeros(0).long(), torch.zeros(0).long(), torch.zeros(0), 1, labeled_segments=torch.tensor([0]))
        inputs = Inputs(ids, torch.arange(len(ids)), SegmentTree((len(ids),), (-1,)))
        with torch.no_grad():
            found_scores = judge.forward(inputs, target, frozenset({"scores"})).scores
        assert found_scores is not None
        scores.append(float(found_scores))
    assert mine == pytest.approx(scores, rel=1e-4, abs=1e-5)
    assert abs(scores[0] - scores[1]) > 1e-3

    batch = next(feed)[0]
    said = feed.take_metrics()
    assert said["kl"] == pytest.approx(0, abs=1e-4)  # the policy is still what it started from
    with attached.disabled(), torch.no_grad():
        bare = family.forward(batch.inputs, batch.target, frozenset({"token_logps"})).token_logps
    assert bare is not None
    assert (batch.target.precomputed["reference_logps"] - bare).abs().max() > 1e-3  # which is not the bare base


def test_a_reward_on_another_base_is_a_second_model_and_is_said_to_be(home: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "other", "gpt2", seed=8, dtype=torch.float32)
    reward = train({"model": str(tmp_path / "other"), "method": "lora", "objective": "reward",
                    "data": str(home / "pairs.jsonl"), "training": {"max_steps": 1, "batch_size": 4},
                    "output_dir": str(tmp_path / "reward")}, quiet=True)
    made = assembly.build_recipe(recipe(home, "grpo", reward={"model": str(reward.path)}))
    family = load_family(made.model)
    found = load_datasets(made, family)
    warned: list[str] = []
    feed = assembly.build_training_source(made, family, found, *init_rl_policy(made, family), None, warned.append)
    assert "second model of" in warned[0]
    assert len(next(feed)) > 0


def test_a_critic_of_its_own_learns_beside_the_policy(home: Path) -> None:
    made = assembly.build_recipe(recipe(home, "ppo", critic="adapter", kl_coef=0.1, vf_coef=1.0))
    found: list[dict[str, Tensor]] = []
    for over in (10_000, 0):  # kept, and recomputed in the backward pass, when the manager stands elsewhere
        family = load_family(made.model)
        assert isinstance(family, CausalLM)
        data = load_datasets(made, family)
        attached, reference = init_rl_policy(made, family)
        assert {name: attached.lr_multiplier(name) * made.method.default_learning_rate for name in attached.parameters() if "value" in name} == {
            f"base_model.model.value.{part}": pytest.approx(1e-3) for part in ("weight", "bias")}  # as a head of any objective
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            for parameter in attached.parameters().values():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        feed = assembly.build_training_source(made, family, data, attached, reference)
        family.enable_gradient_checkpointing(over)
        found.append(gradients(family, made.objective, attached, next(feed)))
    first, second = found
    assert first.keys() == second.keys()
    for name, wanted in first.items():
        torch.testing.assert_close(second[name], wanted, rtol=1e-3, atol=1e-5)
    for part in ("critic/", "value"):
        assert any(part in name and float(g.abs().max()) > 1e-6 for name, g in first.items()), part
    # The policy's own gradient knows nothing of the critic's error.
    quiet = made.objective.model_copy(update={"vf_coef": 0.0})
    again = gradients(family, quiet, attached, next(feed_of(made, family, data, attached, reference)))
    assert all(float(g.abs().max()) == 0 for name, g in again.items() if "critic/" in name)


def feed_of(made: Any, family: Any, data: Any, attached: Any, reference: Any) -> Any:
    return assembly.build_training_source(made, family, data, attached, reference)


def test_a_critic_of_its_own_trains_and_resumes(home: Path, tmp_path: Path) -> None:
    made = recipe(home, "ppo", critic="adapter")
    made["training"] |= {"max_steps": 3}
    run = train(made, output_dir=str(tmp_path / "run"), quiet=True)
    tensors = load_file(run.path / "adapter_model.safetensors")
    assert tensors
    assert not any("critic" in name or "value" in name for name in tensors)
    saved = load_file(run.path / "checkpoints" / "step-3" / "method.safetensors")
    assert any("critic/" in name for name in saved)
    _, _, attached = open_run(run)
    assert attached is not None


@pytest.mark.parametrize(("change", "word"), [
    ({"objective": {"name": "ppo"}}, "objective.reward"),
    ({"objective": {"name": "ppo", "reward": "numeric_matc"}}, "did you mean 'numeric_match'"),
    ({"objective": {"name": "ppo", "reward": "nowhere:f"}}, "cannot be imported"),
    ({"objective": {"name": "ppo", "reward": "math:nothing"}}, "defines no function"),
    ({"objective": {"name": "ppo", "reward": {"url": "ftp://x"}}}, "http"),
    ({"objective": {"name": "ppo", "reward": {"url": "http://x", "model": "y"}}}, "one of"),
    ({"objective": {"name": "ppo", "reward": "length", "num_mini_batches": 9}}, "num_mini_batches"),
    ({"objective": {"name": "ppo", "reward": "length"}, "method": {"name": "full", "keep_base": False}}, "keep_base"),
    ({"objective": {"name": "grpo", "reward": "length", "num_generations": 1}}, "num_generations"),
    ({"objective": {"name": "ppo", "reward": "length", "kl_coef": 0, "adaptive_kl_target": 1}}, "adaptive_kl_target"),
])
def test_a_recipe_that_cannot_be_is_refused(home: Path, tmp_path: Path, change: dict[str, Any], word: str) -> None:
    with pytest.raises(RecipeError, match=word):
        train({**recipe(home, "ppo"), "output_dir": str(tmp_path / "run"), **change}, quiet=True)


def test_a_reward_that_lacks_its_fact_names_the_prompt(home: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"prompts.jsonl.*'reference'"):
        train(recipe(home, "grpo", reward="numeric_match"), output_dir=str(tmp_path / "run"), quiet=True)


def test_a_full_policy_trains_with_a_copy_of_its_base(home: Path, tmp_path: Path) -> None:
    made = recipe(home, "ppo", kl_coef=0.1) | {"method": "full"}
    made["training"] |= {"max_steps": 3, "save_total_limit": 1}
    made["optimizer"] = {"learning_rate": 0.001}
    run = train(made, output_dir=str(tmp_path / "run"), quiet=True)
    rounds = [line for line in run.metrics if "kl" in line]
    assert abs(rounds[0]["kl"]) < 1e-4
    assert abs(rounds[-1]["kl"]) > 1e-4


# ---------------------------------------------------------------- memory


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if not isinstance(tensor, Tensor) or (storage := tensor.untyped_storage()).data_ptr() in self.known:
                continue
            key, size = storage.data_ptr(), storage.nbytes()
            if size:
                self.known.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, key, size)
        return made

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def test_the_four_roles_of_ppo_cost_at_most_half_more_memory_than_sft() -> None:
    objective = PpoConfig(num_generations=8, max_new_tokens=16, kl_coef=0.1, generation_batch_size=8)
    peaks = {}
    for name in ("sft", "ppo"):
        family, attached = set_up(objective, dtype=torch.float32)
        family.enable_gradient_checkpointing(384)
        optimizer = Optimizer(attached.parameters(), attached.lr_multiplier, 0.01, OptimizerConfig(), 2)
        optimizer.set_learning_rate(0)
        feed = rolls(objective, family, attached, micro=384)
        family.train(True)
        batches = next(feed) if name == "sft" else None
        counted = OBJECTIVES["sft"]() if name == "sft" else objective
        with Live() as live:
            step(family, counted, batches or next(feed), optimizer, reference=attached.disabled)
        peaks[name] = live.peak
    assert peaks["sft"] > 500_000
    assert peaks["ppo"] <= 1.5 * peaks["sft"], peaks


def test_prompts_that_processes_share_get_the_answers_that_one_process_gives() -> None:
    """Shards as on two ranks: the same answers, rewards and columns; the control numbers the second shard from 0."""
    objective = PpoConfig(num_generations=3, max_new_tokens=6, kl_coef=0.2)

    def drawn(start: int | None) -> dict[str, Any]:
        family, attached = set_up(objective)
        shards = {} if start is None else {"map_shards": lambda work, items: [work(items[:1], 0), work(items[1:], start)]}
        feed = rolls(objective, family, attached, **shards)
        next(feed)
        assert feed.rollout is not None
        return vars(feed.rollout)

    whole, shared, control = drawn(None), drawn(1), drawn(0)
    assert whole["completions"] == shared["completions"] != control["completions"]
    assert whole["rewards"] == shared["rewards"]
    for name, column in whole["token_values"].items():
        torch.testing.assert_close(shared["token_values"][name], column, rtol=1e-4, atol=1e-5)
