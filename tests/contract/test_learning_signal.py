"""Whole runs that cannot learn say so, in words, and the healthy run beside each does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier import assembly
from luthier.assembly.factory import attach_method, load_datasets, load_family
from luthier.assembly.run_warnings import find_method_problems
from luthier.cli.main import main
from luthier.core.types import LossInputs, Outputs
from luthier.data import pack_examples
from luthier.objectives import OBJECTIVES
from luthier.objectives.base import count_correct_pairs
from luthier.objectives.preference import PreferenceConfig
from luthier.rl.rewards import to_floats
from luthier.training.run_folder import Run
from tiny import save_tiny

Output = tuple[int, str, str]
Call = Callable[..., Output]


def jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("signal") / "base", "llama", dtype=torch.float32, num_hidden_layers=1)


@pytest.fixture
def call(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """`luthier train` on rows with settings: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def called(rows: list[Any], objective: str, *settings: str) -> Output:
        code = main(["train", "--model", str(base), "--data", jsonl(tmp_path / "rows.jsonl", rows), "--objective", objective,
                     "--output-dir", "run", "method.rank=2", *settings])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err
    return called


PROMPTS = [{"prompt": f"say {i}", "reference": str(i)} for i in range(4)]
ROLLS = ("training.max_steps=3", "training.batch_size=2", "objective.num_generations=2", "objective.max_new_tokens=3")
REWARDS = """import random
dice = random.Random(0)
def constant(prompts, completions, metadata): return [1.0] * len(completions)
def by_prompt(prompts, completions, metadata): return [float(len(prompt) + ord(prompt[-1])) for prompt in prompts]
def spread(prompts, completions, metadata): return [dice.random() for _ in completions]
"""


@pytest.mark.parametrize(("objective", "reward", "words"), [
    ("grpo", "constant", "all answers to the same prompt had the same reward"),
    ("grpo", "by_prompt", "all answers to the same prompt had the same reward"), ("grpo", "spread", ""),
    ("ppo", "constant", "all answers had the same reward"), ("ppo", "by_prompt", ""), ("ppo", "spread", "")])
def test_rewards_without_spread_are_told_within_three_rounds(call: Call, tmp_path: Path, objective: str, reward: str,
                                                             words: str) -> None:
    (tmp_path / "mine.py").write_text(REWARDS)
    code, _, err = call(PROMPTS, objective, *ROLLS, f"objective.reward=mine.py:{reward}")
    assert code == 0, err
    assert ("had the same reward" in err) == bool(words), err
    assert words in err
    lines = [line for line in Run(tmp_path / "run").metrics if "reward_std" in line]
    assert len(lines) == 3
    for line in lines:
        assert line["frac_reward_zero_std"] == (0 if reward == "spread" else 1)
        assert (line["reward_std"] == 0) == (reward == "constant")


def test_no_gradient_is_told_with_its_likely_reason(call: Call, tmp_path: Path) -> None:
    rows = [{"anchor": f"question {i}", "positive": "the same answer"} for i in range(8)]
    code, _, err = call(rows, "contrastive", "training.batch_size=1", "training.max_steps=4")
    assert code == 0
    assert "nothing can be learned from every batch" in err  # before the first step
    assert "grad_norm is exactly 0 in 3 consecutive steps" in err


def test_the_healthy_neighbours_are_silent(call: Call) -> None:
    rows = [{"anchor": f"question {i}", "positive": f"answer {i}"} for i in range(8)]
    code, _, err = call(rows, "contrastive", "training.batch_size=4", "training.max_steps=4")
    assert code == 0
    assert "warning" not in err


def test_only_one_verdict_is_told(call: Call) -> None:
    rows = [{"prompt": f"q{i}", "completion": f"a{i}", "label": True} for i in range(4)]
    assert "all 4 train rows are desirable" in call(rows, "kto", "training.max_steps=1")[2]


def test_a_broken_reward_is_one_error_and_no_run(call: Call, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("LIMIT = undefined_name\ndef one(prompts, completions, metadata): return [1.0] * len(completions)\n")
    code, _, err = call(PROMPTS, "grpo", *ROLLS, "objective.reward=mine.py:one")
    assert code != 0
    assert "NameError: name 'undefined_name' is not defined" in err
    assert "mine.py:1" in err
    assert not (tmp_path / "run").exists()


BROKEN: list[tuple[str, Any, str]] = [
    ("None", None, "NoneType None, not a list"), ("a number", 1.0, "float 1.0, not a list"), ("a string", "12", "str '12'"),
    ("bytes", b"12", "bytes"), ("a mapping", {0: 1.0, 1: 2.0}, "dict"), ("a set", {1.0, 2.0}, "set"),
    ("too few", [1.0], "1 numbers for 2"), ("too many", [1.0] * 3, "3 numbers for 2"), ("none at all", [], "0 numbers for 2"),
    ("a None inside", [1.0, None], "NoneType None for completion 1"), ("a string inside", ["0.5", 1.0], "str '0.5' for completion 0"),
    ("NaN", [float("nan"), 1.0], "float nan for completion 0"), ("infinity", [1.0, float("inf")], "float inf for completion 1"),
    ("huge", [10 ** 400, 1], "for completion 0"), ("nested", [[1.0, 2.0], 1.0], "list"), ("complex", [1j, 1.0], "complex"),
    ("rows of a tensor", torch.ones(2, 2), "list"), ("a NaN of a tensor", torch.tensor([1.0, float("nan")]), "for completion 1"),
]


@pytest.mark.parametrize(("name", "found", "words"), BROKEN, ids=[name for name, *_ in BROKEN])
def test_what_is_no_list_of_numbers_is_said(name: str, found: Any, words: str) -> None:
    with pytest.raises(ValueError, match="returned") as caught:
        to_floats(found, 2)
    assert words in str(caught.value)


@pytest.mark.parametrize("found", [[1, 2.0], (1, 2), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]).numpy(),
                                   [torch.tensor(1.0), torch.tensor([2.0])], [True, 2], iter([1, 2])])
def test_lists_of_numbers_of_any_make_are_taken(found: Any) -> None:
    assert to_floats(found, 2) == [1.0, 2.0]


# ---------------------------------------------------------------- the method on its base


@pytest.mark.parametrize(("raw", "words"), [
    ({"method": {"name": "lora", "rank": 64}}, "method.rank: lora has rank 64"), ({"method": {"name": "lora", "rank": 16}}, ""),
    ({"method": {"name": "adalora", "target_r": 64}}, "method.target_r: adalora has rank 96"),
    ({"method": {"name": "lora", "rank_pattern": {"nothing": 4}}}, "method.rank_pattern: 'nothing'"),
    ({"method": {"name": "lora", "alpha_pattern": {"nothing": 4}}}, "method.alpha_pattern: 'nothing'"),
    ({"method": {"name": "lora", "rank_pattern": {"q": 4}, "alpha_pattern": {"v": 4}}}, ""),
    ({"method": "ln_tuning", "optimizer": {"weight_decay": 0.1}}, "optimizer.weight_decay"),
    ({"method": "lora", "optimizer": {"weight_decay": 0.1}}, ""), ({"method": ["bitfit", {"name": "lora", "rank": 64}]}, "rank 64")])
def test_ranks_and_patterns_that_reach_nothing_are_named(base: Path, raw: dict[str, Any], words: str) -> None:
    made = assembly.build_recipe({"model": str(base), "data": "-", **raw})
    family = load_family(made.model)
    lines = find_method_problems(made, family, attach_method(family, made.method, 0))
    assert bool(lines) == bool(words), lines
    assert not words or words in lines[0]


# ---------------------------------------------------------------- figures


def test_equal_scores_count_half() -> None:
    assert count_correct_pairs(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 1.0, 2.0])).tolist() == [1, 0, 0.5]
    logps = torch.tensor([-2.0, -1.0])
    pair = LossInputs(torch.arange(2), torch.zeros(2), torch.ones(2), 1, labeled_segments=torch.tensor([1, 2]),
                      labels=torch.tensor([0.0, 1.0]), groups=torch.tensor([0, 0]), item_of=torch.tensor([0, 1]),
                      margins=torch.zeros(2))
    for name, known in OBJECTIVES.items():
        if issubclass(known, PreferenceConfig):
            outputs = Outputs(token_logps=logps, reference_logps=logps)
            total, count = known()(outputs, pair).metrics["rewards/accuracies"]
            assert float(total / count) == (0.5 if "reference_logps" in known.required_outputs else 0.0), name
    total, count = OBJECTIVES["reward"]()(Outputs(scores=torch.zeros(2, 1)), pair).metrics["rewards/accuracies"]
    assert float(total / count) == 0.5


def test_equal_texts_have_equal_numbers_however_the_batch_is_cut(base: Path, tmp_path: Path) -> None:
    rows = [{"anchor": a, "positive": p} for a, p in (("a", "one"), ("b", "one"), ("one", "two"))]
    made = assembly.build_recipe({"model": str(base), "data": jsonl(tmp_path / "rows.jsonl", rows), "objective": "contrastive"})
    encoded = load_datasets(made, load_family(made.model)).train
    whole = pack_examples(encoded, None)[0].target.text_ids.tolist()
    assert whole[1] == whole[3] == whole[4]
    assert len(set(whole)) == 4
    parts = [pack_examples([one], None)[0].target for one in encoded]
    assert LossInputs.concatenate(parts).text_ids.tolist() == whole


CHAT = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(6)]


def test_rows_that_choose_the_checkpoint_are_called_validation(call: Call, tmp_path: Path,
                                                               capsys: pytest.CaptureFixture[str]) -> None:
    rows = jsonl(tmp_path / "others.jsonl", CHAT)
    for data, part, other in (("data.eval=0.5", "validation", "test"), (f"data.test={rows}", "test", "validation")):
        code, out, err = call(CHAT, "sft", "training.max_steps=1", data, f"output_dir=run-{part}", "method.rank=3")
        assert code == 0, err
        results = json.loads((tmp_path / f"run-{part}/results.json").read_text())
        assert results["measured_on"] == part
        assert results["examples"] == (3 if part == "validation" else 6)
        assert {part, f"{part}_before"} <= results.keys()
        assert not {other, f"{other}_before", "unseen"} & results.keys()
        assert f"({results['examples']} {part} rows)" in out
        assert "unseen" not in out + err + (tmp_path / f"run-{part}/README.md").read_text()


def test_evaluate_tells_refused_rows_as_train_does(call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*CHAT[:3], "not json", {"prompt": "q"}, {"prompt": "q", "completion": 5}]
    code, _, err = call(rows, "sft", "training.max_steps=1", "data.eval=0.3")
    assert code == 0, err
    told = sorted(line.partition(": ")[2] for line in err.splitlines() if " rejected: " in line)
    assert len(told) >= 2
    assert main(["evaluate", "run", "--data", str(tmp_path / "rows.jsonl"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert sorted(line.partition(": ")[2] for line in err.splitlines() if " rejected: " in line) == told
    found = json.loads(out)
    assert found["measured_on"] == "data"
    assert found["examples"] == found["rows"]["kept"] == 3
    assert found["rows"]["read"] == 6
    assert sum(found["rows"]["reasons"].values()) == 3
    assert {(row["file"], row["line"]) for row in found["rows"]["refused"]} == {
        (str(tmp_path / "rows.jsonl"), str(line)) for line in (4, 5, 6)}
    assert "also in train" not in err


def test_columns_that_match_nothing_are_told(call: Call) -> None:
    rows = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(3)]
    for columns, there in (("data.columns={system: sys}", True), ("data.columns={prompt: prompt}", False)):
        _, _, err = call(rows, "sft", "training.max_steps=1", columns, f"output_dir=run-{there}")
        assert ("data.columns maps 'sys', which is in no row" in err) == there, err
