"""PPO and GRPO on a base that reads sources and writes answers. Read `lab_t5.py` and `test_rollouts.py` first."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import attach
from lab_t5 import FAR, KIND, SAME, t5, tokenizer, widen
from torch import Tensor

from luthier import assembly
from luthier.api.train import train
from luthier.assembly.factory import attach_heads, load_datasets, load_family
from luthier.assembly.policy_evaluation import evaluate_policies
from luthier.assembly.rl_setup import init_rl_policy
from luthier.assembly.run_io import open_run
from luthier.core.examples import Origin
from luthier.core.types import Batch, Inputs, LossInputs, SegmentTree, TokenizedExample, TokenSpan
from luthier.data.batch_source import InMemoryBatchSource
from luthier.models.families.seq2seq import Seq2Seq
from luthier.objectives.grpo import GrpoConfig
from luthier.objectives.ppo import PpoConfig
from luthier.rl import Completion, RolloutCollector, RolloutSource
from luthier.training.loop import _follow_rollout
from luthier.training.optimizer import Optimizer, OptimizerConfig
from luthier.training.step import forward_objective, step
from tiny import END_OF_TEXT, IM_END
from trials import vowels

PROMPTS = [TokenizedExample((TokenSpan((*range(65, 65 + n), IM_END), (0.0,) * (n + 1)),), Origin("prompts", i))
           for i, n in enumerate((3, 7, 5, 4))]


def letters(answers: Sequence[Completion]) -> list[float]:
    """The share of an answer's tokens that are P, Q, ... W: countable, and best at 1."""
    return [sum(80 <= token < 88 for token in answer.token_ids) / len(answer.token_ids) for answer in answers]


def set_up(objective: Any, kind: str = "gated", seed: int = 3, stirred: bool = True, **model: Any) -> tuple[Seq2Seq, Any]:
    family = Seq2Seq(t5(kind, **model), tokenizer())
    attached = attach(family, "lora", seed, stirred, rank=4, dropout=0.0)  # type: ignore[arg-type]
    return family, attach_heads(family, attached, objective, seed)


def rolls(objective: Any, family: Seq2Seq, attached: Any, seed: int = 0, micro: int = 1000, rounds: int = 4) -> RolloutSource:
    return RolloutSource(RolloutCollector(PROMPTS, objective, [(letters, 1.0)], InMemoryBatchSource(PROMPTS, rounds, None, seed=seed),
                                          micro, seed, attached.disabled), family)


def alone(family: Seq2Seq, prompt: Sequence[int], answer: Sequence[int], temperature: float) -> Tensor:
    """log p of each token of an answer to its source, from Transformers' own logits."""
    with torch.no_grad():
        logits = family.model(input_ids=torch.tensor([prompt]),
                              decoder_input_ids=torch.tensor([[END_OF_TEXT, *answer[:-1]]])).logits[0]
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


def gradients(family: Seq2Seq, objective: Any, attached: Any, batches: Sequence[Batch]) -> dict[str, Tensor]:
    count = sum(objective.count(batch.target) for batch in batches)
    for parameter in attached.parameters().values():
        parameter.grad = None
    for batch in batches:
        (objective(forward_objective(family, objective, batch, attached.disabled), batch.target).total / count).backward()
    return {name: p.grad.clone() for name, p in attached.parameters().items() if p.grad is not None}


@KIND
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_every_column_stands_at_its_token(kind: str, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a round remembers of its answers is what Transformers computes of them, end marks too."""
    widen(monkeypatch)
    objective = PpoConfig(num_generations=3, max_new_tokens=6, temperature=temperature, kl_coef=0.2)
    family, attached = set_up(objective, kind)
    if kind == "gated":
        with torch.no_grad():  # so that some answers end by themselves
            family.model.lm_head.weight[IM_END] *= 8
    batches = next(rolls(objective, family, attached, micro=25))
    assert len(batches) > 2
    ended, seen = 0, []
    for batch in batches:
        segment_tree, target = batch.inputs.segment_tree, batch.target
        for item, segment in enumerate(target.labeled_segments.tolist()):
            prompt, answer = (tuple(batch.inputs.tokens[segment_tree.starts[s]:][:segment_tree.lengths[s]].tolist())
                              for s in (segment_tree.parents[segment], segment))
            mine = target.item_of == item
            assert target.token_ids[mine].tolist() == list(answer)
            wanted = alone(family, prompt, answer, temperature)
            assert (target.precomputed["old_logps"][mine] - wanted).abs().max() < SAME
            with attached.disabled():
                reference = alone(family, prompt, answer, temperature)
            assert (target.precomputed["reference_logps"][mine] - reference).abs().max() < SAME
            assert (wanted - reference).abs().max() > FAR
            assert (wanted - alone(family, prompt, answer, 1.3)).abs().max() > FAR
            assert IM_END not in answer[:-1]
            assert prompt.count(IM_END) == 1
            ended += answer[-1] == IM_END
            seen.append((prompt, answer))
            assert answer[-1] == IM_END or len(answer) == 6
    assert len(seen) == 12
    if kind == "gated":
        assert 0 < ended < 12
    again = forward_objective(family, objective, batches[0], attached.disabled).token_logps
    assert torch.equal(again, batches[0].target.precomputed["old_logps"])  # the same row, the same bits


@pytest.mark.parametrize("objective", [PpoConfig(num_generations=3, max_new_tokens=6, kl_penalty_in="loss"),
                                       GrpoConfig(num_generations=3, max_new_tokens=6, beta=0.1)], ids=lambda o: o.name)
def test_micro_tokens_change_nothing_but_the_rows(objective: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    widen(monkeypatch)
    found = []
    for micro in (1000, 14):
        family, attached = set_up(objective)
        batches = next(rolls(objective, family, attached, micro=micro))
        found.append((len(batches), gradients(family, objective, attached, batches)))
    assert found[0][0] == 1
    assert found[1][0] > 4
    assert max(float(g.abs().max()) for g in found[0][1].values()) > 1e-3
    for name, wanted in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("objective", [PpoConfig(num_generations=16, max_new_tokens=3, kl_coef=0.0, num_ppo_epochs=2),
                                       GrpoConfig(num_generations=16, max_new_tokens=3)], ids=lambda o: o.name)
def test_a_countable_reward_rises(objective: Any) -> None:
    family, attached = set_up(objective, stirred=False, dtype=torch.float32, num_decoder_layers=1)
    with torch.no_grad():
        family.model.lm_head.weight[88:] *= 0.05  # a few likely words, among them the eight that pay
    feed = rolls(objective, family, attached)
    optimizer = Optimizer(attached.parameters(), attached.lr_multiplier, 0.05, OptimizerConfig(lr_scheduler_type="constant", warmup_ratio=0.0), 40)
    family.train(True)
    said = []
    for number in range(40 if objective.name == "ppo" else 20):
        optimizer.set_learning_rate(number)
        found = step(family, objective, next(feed), optimizer, reference=attached.disabled)
        said.append(dict(_follow_rollout(feed, found)))
    rewards = [one["reward"] for one in said if one]
    assert rewards[0] < 0.2
    assert sum(rewards[-3:]) / 3 > 0.8, [round(one, 2) for one in rewards]


def test_a_run_is_rewarded_by_a_run_and_resumes(tmp_path: Path) -> None:
    """SFT, a reward of pairs, then PPO from the one by the other, all on one T5; a held-out prompt is judged."""
    t5("gated", torch.float32).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    rows = {"sft": [{"prompt": f"p{i}:", "completion": "a" * (1 + i % 3)} for i in range(6)],
            "pairs": [{"prompt": f"p{i}:", "chosen": "ab"[i % 2] * 3, "rejected": "zz"} for i in range(6)],
            "prompts": [{"prompt": f"q{i}:"} for i in range(4)]}
    for name, found in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    common: dict[str, Any] = {"model": str(tmp_path / "base"), "method": {"name": "lora", "rank": 2, "dropout": 0.0},
                              "training": {"max_steps": 6, "batch_size": 3}, "optimizer": {"learning_rate": 0.01}}
    sft = train({**common, "data": str(tmp_path / "sft.jsonl"), "output_dir": str(tmp_path / "sft")}, quiet=True)
    judge = train({**common, "objective": "reward", "data": str(tmp_path / "pairs.jsonl"),
                   "output_dir": str(tmp_path / "reward")}, quiet=True)
    made = assembly.build_recipe({"init_from": str(sft.path), "seed": 3,
                         "objective": {"name": "ppo", "reward": {"model": str(judge.path)}, "kl_coef": 0.1,
                                       "critic": "adapter", "num_generations": 2, "max_new_tokens": 4},
                         "data": {"train": str(tmp_path / "prompts.jsonl"), "test": str(tmp_path / "prompts.jsonl")},
                         "training": {"max_steps": 4, "batch_size": 2}, "optimizer": {"learning_rate": 0.01}})
    family = load_family(made.model)
    found = load_datasets(made, family)
    attached, reference = init_rl_policy(made, family)
    warned: list[str] = []
    feed = assembly.build_training_source(made, family, found, attached, reference, None, warned.append)
    assert isinstance(feed, RolloutSource)
    assert not warned  # one copy of the weights
    answers = [Completion("p1:", text, Origin("x", 1), {"prompt": "p1:"}) for text in ("aa", "zz", "b")]
    mine = feed.collector.rewards[0][0](answers)
    _, alone_, _ = open_run(judge)  # the same run, opened by itself
    alone_.train(False)
    for answer, given in zip(answers, mine, strict=True):
        source, said = (torch.tensor(alone_.tokenizer(text)["input_ids"]) for text in ("p1:", answer.text))
        target = LossInputs(torch.zeros(0).long(), torch.zeros(0).long(), torch.zeros(0), 1, labeled_segments=torch.tensor([1]))
        inputs = Inputs(torch.cat([source, said]), torch.arange(len(source) + len(said)),
                        SegmentTree((len(source), len(said)), (-1, 0)))
        with torch.no_grad():
            scores = alone_.forward(inputs, target, frozenset({"scores"})).scores
        assert scores is not None
        assert given == pytest.approx(float(scores), rel=1e-4, abs=1e-5)
    assert abs(mine[0] - mine[1]) > 1e-3
    batch = next(feed)[0]
    assert feed.take_metrics()["kl"] == pytest.approx(0, abs=1e-4)  # the policy is still what it started from
    with attached.disabled(), torch.no_grad():
        bare = family.forward(batch.inputs, batch.target, frozenset({"token_logps"})).token_logps
    assert bare is not None
    assert (batch.target.precomputed["reference_logps"] - bare).abs().max() > 1e-3  # which is not the bare base
    run = train(made, output_dir=str(tmp_path / "run"), quiet=True)
    assert run.results["metric"] == "reward"
    standing = evaluate_policies(run)
    assert standing["start"]["kl"] == pytest.approx(0, abs=1e-4)
    assert abs(standing["tuned"]["kl"]) > 1e-5


def test_a_prompt_may_fill_the_source(tmp_path: Path) -> None:
    """Its answer has a length of its own; what is longer is refused."""
    t5("gated", torch.float32).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": "p" * n}) + "\n" for n in (3, 7, 8)))
    made = assembly.build_recipe({"model": str(tmp_path / "base"), "objective": {
        "name": "grpo", "reward": f"{Path(__file__).parents[1] / 'trials.py'}:{vowels.__name__}", "max_new_tokens": 6},
        "data": {"train": str(tmp_path / "prompts.jsonl"), "max_length": 8}})
    found = load_datasets(made, load_family(made.model))
    assert [one.num_tokens for one in found.train] == [4, 8]
    assert found.report.parts["train"].reasons == {"longer than max_length": 1}
