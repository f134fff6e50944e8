"""What cannot learn, or has no effect, is said before the first step; the healthy neighbor of each case is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier import assembly
from luthier.assembly.recipe import Recipe
from luthier.assembly.rl_setup import check_rewards
from luthier.assembly.run_warnings import RULES, find_data_problems, find_schedule_problems, find_unused_settings
from luthier.core.errors import LuthierError, RecipeError
from luthier.data import read_datasets
from luthier.data.batch_source import InMemoryBatchSource
from luthier.training.learning_monitor import STEPS, LearningMonitor
from tiny import tiny_tokenizer

GRPO, PPO = ({"name": name, "reward": "numeric_match"} for name in ("grpo", "ppo"))
EVALUATED = {"eval": "rows.jsonl"}


def made(data: Any = None, **raw: Any) -> Recipe:
    return assembly.build_recipe({"data": {"train": "rows.jsonl", **(data or {})}, **raw})


# Each: the setting that has no effect, the recipe, and what to change so that it has one.
UNUSED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("training.save_total_limit", {"training": {"save_total_limit": 5}}, {"training": {"save_total_limit": 5, "save_steps": 2}}),
    ("training.early_stopping_patience", {"training": {"early_stopping_patience": 2}}, {"training": {"early_stopping_patience": 2}, "data": EVALUATED}),
    ("training.eval_steps", {"training": {"eval_steps": 2}}, {"training": {"eval_steps": 2}, "data": EVALUATED}),
    ("training.num_train_epochs", {"training": {"num_train_epochs": 3, "max_steps": 5}}, {"training": {"num_train_epochs": 3}}),
    ("optimizer.learning_rate", {"training": {"max_steps": 5}, "optimizer": {"warmup_steps": 5}}, {"training": {"max_steps": 5}}),
    ("optimizer.min_lr_ratio", {"optimizer": {"lr_scheduler_type": "constant", "min_lr_ratio": 0.1}}, {"optimizer": {"min_lr_ratio": 0.1}}),
    ("evaluate.metrics", {"evaluate": {"metrics": "exact_match"}}, {"evaluate": {"metrics": "exact_match"}, "data": EVALUATED}),
    ("evaluate.max_new_tokens", {"evaluate": {"max_new_tokens": 9}, "data": EVALUATED},
     {"evaluate": {"max_new_tokens": 9, "metrics": "exact_match"}, "data": EVALUATED}),
    ("evaluate.batch_size", {"evaluate": {"batch_size": 9}, "data": EVALUATED},
     {"evaluate": {"batch_size": 9, "metrics": "exact_match"}, "data": EVALUATED}),
    ("evaluate.max_samples", {"evaluate": {"max_samples": 9}}, {"evaluate": {"max_samples": 9}, "data": EVALUATED}),
    ("evaluate.before_training", {"evaluate": {"before_training": False}}, {"evaluate": {"before_training": False}, "data": EVALUATED}),
    ("model.pooling", {"model": {"pooling": "mean"}}, {"model": {"pooling": "mean"}, "objective": "contrastive"}),
    ("model.revision", {"model": {"revision": "x"}}, {"model": {"name_or_path": "owner/name", "revision": "x"}}),
    ("data.loss_on", {"data": {"loss_on": "all"}, "objective": "dpo"}, {"data": {"loss_on": "all"}}),
    ("data.system", {"data": {"system": "x"}, "objective": "contrastive"}, {"data": {"system": "x"}}),
    ("data.share_prompt", {"data": {"share_prompt": False}}, {"data": {"share_prompt": False}, "objective": "dpo"}),
    ("data.score_scale", {"data": {"score_scale": 5.0}, "objective": "contrastive"},
     {"data": {"score_scale": 5.0}, "objective": {"name": "contrastive", "loss": "cosent"}}),
    ("data.train: weight", {"data": {"train": {"path": "rows.jsonl", "weight": 2}}, "training": {"max_steps": 3}},
     {"data": {"train": ["rows.jsonl", {"path": "rows.jsonl", "weight": 2}]}, "training": {"max_steps": 3}}),
    ("data.train: document", {"data": {"train": {"path": "rows.jsonl", "document": "file"}}},
     {"data": {"train": {"path": "rows.txt", "document": "file"}}}),
    ("objective.symmetric", {"objective": {"name": "contrastive", "loss": "supcon", "symmetric": True}},
     {"objective": {"name": "contrastive", "symmetric": True}}),
    ("objective.mask_duplicates", {"objective": {"name": "contrastive", "loss": "cosent", "mask_duplicates": True}},
     {"objective": {"name": "contrastive", "mask_duplicates": True}}),
    ("objective.margin", {"objective": {"name": "contrastive", "margin": 0.1}},
     {"objective": {"name": "contrastive", "margin": 0.1, "loss": "triplet"}}),
    ("objective.labels", {"objective": {"name": "contrastive", "labels": ["a"]}},
     {"objective": {"name": "contrastive", "labels": ["a"], "loss": "supcon"}}),
    ("objective.temperature", {"objective": {"name": "contrastive", "temperature": 0.1, "loss": "triplet"}},
     {"objective": {"name": "contrastive", "temperature": 0.1}}),
    ("objective.cliprange", {"objective": {**PPO, "cliprange": 0.1}},
     {"objective": {**PPO, "cliprange": 0.1, "num_ppo_epochs": 2}}),
    ("objective.epsilon", {"objective": {**GRPO, "epsilon": 0.1}}, {"objective": {**GRPO, "epsilon": 0.1, "num_iterations": 2}}),
    ("objective.epsilon_high", {"objective": {**GRPO, "epsilon_high": 0.3}},
     {"objective": {**GRPO, "epsilon_high": 0.3, "num_mini_batches": 2}}),
    ("objective.early_stop_kl", {"objective": {**PPO, "early_stop_kl": 0.3}},
     {"objective": {**PPO, "early_stop_kl": 0.3, "num_mini_batches": 2}}),
    ("objective.cliprange_value", {"objective": {**PPO, "cliprange_value": 0.3}},
     {"objective": {**PPO, "cliprange_value": 0.3, "num_ppo_epochs": 2}}),
    ("objective.critic", {"objective": {**PPO, "critic": "adapter", "vf_coef": 0}},
     {"objective": {**PPO, "critic": "adapter"}}),
    ("objective.kl_penalty_in", {"objective": {**PPO, "kl_penalty_in": "loss", "kl_coef": 0}}, {"objective": {**PPO, "kl_penalty_in": "loss"}}),
    ("objective.reward: weight", {"objective": {"name": "grpo", "reward": {"function": "numeric_match", "weight": 2}}},
     {"objective": {"name": "ppo", "reward": {"function": "numeric_match", "weight": 2}}}),
    ("objective.reward: 'numeric_match' has weight 0",
     {"objective": {"name": "ppo", "reward": [{"function": "numeric_match", "weight": 0}, {"function": "length"}]}},
     {"objective": {"name": "ppo", "reward": [{"function": "numeric_match", "weight": 1}, {"function": "length"}]}}),
    ("method.dropout", {"method": {"name": "lora", "dropout": 0.1}, "objective": GRPO},
     {"method": {"name": "lora", "dropout": 0.1}}),
]


@pytest.mark.parametrize(("setting", "idle", "used"), UNUSED, ids=[setting for setting, *_ in UNUSED])
def test_a_setting_without_effect_is_named_and_one_with_effect_is_not(setting: str, idle: dict[str, Any],
                                                                      used: dict[str, Any]) -> None:
    assert [line for line in find_unused_settings(made(**idle)) if line.startswith(setting)]
    assert not [line for line in find_unused_settings(made(**used)) if line.startswith(setting)]


def test_every_rule_has_a_row_and_plain_recipes_are_silent() -> None:
    assert {setting for setting, *_ in RULES} <= {setting for setting, *_ in UNUSED}
    for objective in ("sft", "dpo", "kto", "reward", "classify", "contrastive", "multiple_choice", "pretrain", GRPO, PPO):
        assert not find_unused_settings(made(objective=objective))


# ---------------------------------------------------------------- of the rows


def pairs(*rows: tuple[str, ...]) -> list[dict[str, Any]]:
    return [dict(zip(("anchor", "positive", "negative"), row, strict=False)) for row in rows]


def labeled(*labels: Any) -> list[dict[str, Any]]:
    return [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]


def scored(*scores: float) -> list[dict[str, Any]]:
    return [{"sentence1": f"a {i}", "sentence2": f"b {i}", "score": score} for i, score in enumerate(scores)]


def verdicts(*labels: bool) -> list[dict[str, Any]]:
    return [{"prompt": f"q{i}", "completion": f"a{i}", "label": label} for i, label in enumerate(labels)]


APART = pairs(("a", "1"), ("b", "2"), ("c", "3"), ("d", "4"))
SAME = pairs(("a", "1"), ("b", "1"), ("c", "1"), ("d", "1"))
TWICE = pairs(("a", "1"), ("b", "1"), ("c", "3"), ("d", "4"))
MASKED = {"name": "contrastive", "mask_duplicates": True}
LABELS = {"name": "contrastive", "loss": "supcon"}
SCORES = {"name": "contrastive", "loss": "cosent"}
TRIPLET = {"name": "contrastive", "loss": "triplet"}
# (objective, rows, batch size, words of the warning; none: a healthy run)
ROWS: list[tuple[Any, list[dict[str, Any]], int, str]] = [
    ("contrastive", APART, 1, "every batch: no anchor has a negative"), ("contrastive", APART, 2, ""),
    ("contrastive", APART[:1], 8, "every batch: no anchor has a negative"),
    ("contrastive", SAME, 4, "every batch: no anchor has a negative"), ("contrastive", TWICE, 4, "2 of 4 positives"),
    (MASKED, TWICE, 4, ""), (MASKED, SAME, 4, "every batch: no anchor has a negative"),
    (MASKED, APART, 4, "objective.mask_duplicates has no effect"),
    (MASKED, pairs(("a", "1"), ("a", "2"), ("b", "3")), 3, ""),
    (MASKED, pairs(("a", "1"), ("a", "2")), 2, "every batch: no anchor has a negative"),
    ("contrastive", pairs(("a", "1", "x"), ("b", "2", "y")), 1, ""),
    (LABELS, labeled("a", "a", "b", "b"), 1, "every batch: no row has both"), (LABELS, labeled(*"aabb"), 4, ""),
    (LABELS, labeled(*"abcd"), 4, "every batch: no row has both"),
    (LABELS, labeled(*"aaaa"), 4, "every batch: no row has both"),
    (SCORES, scored(1, 1, 1), 3, "every batch: all pairs have the same score"), (SCORES, scored(0, 1, 1), 3, ""),
    (SCORES, scored(0, 1, 1), 1, "every batch: all pairs have the same score"),
    (TRIPLET, pairs(("a", "1", "1"), ("b", "2", "2")), 2, "every negative is the same text"),
    (TRIPLET, pairs(("a", "1", "x"), ("b", "2", "y")), 1, ""),
    ("kto", verdicts(True, True, True), 3, "all 3 train rows are desirable"),
    ("kto", verdicts(False, False), 2, "all 2 train rows are undesirable"), ("kto", verdicts(True, False), 2, ""),
    ({"name": "classify", "labels": ["a", "b"]}, labeled("a", "a"), 2, "all train rows have the class 'a'"),
    ({"name": "classify", "labels": ["a", "b", "c"]}, labeled("a", "b"), 2, "no train row has the class 'c'"),
    ("classify", labeled("a", "b"), 1, ""),
    ({"name": "classify", "task": "multi"}, labeled(["a"], ["a", "b"]), 2, "all of the 2 train rows have the class 'a'"),
    ({"name": "classify", "task": "multi"}, labeled(["a"], ["b"]), 2, ""),
    ({"name": "classify", "task": "regression"}, labeled(0.5, 0.5), 2, "only a constant"),
    ({"name": "classify", "task": "regression"}, labeled(0.5, 0.25), 2, ""),
    ({"name": "reward", "ranking": "all_pairs"}, [{"prompt": "q", "chosen": "a", "rejected": "b"}], 1, "objective.ranking"),
    ({"name": "reward", "ranking": "all_pairs"}, [{"prompt": "q", "answers": ["a", "b", "c"]}], 1, ""),
]


@pytest.mark.parametrize(("objective", "rows", "size", "words"), ROWS)
def test_rows_that_teach_nothing_are_named_before_training(objective: Any, rows: list[dict[str, Any]], size: int, words: str,
                                                           tmp_path: Path) -> None:
    recipe, found = read(objective, rows, tmp_path, training={"batch_size": size})
    lines = find_data_problems(recipe, found)
    assert bool(lines) == bool(words), lines
    assert not words or any(words in line for line in lines), lines


def test_sorted_classes_without_shuffling_are_named(tmp_path: Path) -> None:
    rows, data = labeled(*"aaaabbbb"), {"shuffle": False}
    assert "all rows have one class" in find_data_problems(*read(
        "classify", rows, tmp_path, data, training={"batch_size": 4}))[0]
    for size, shuffled in ((4, {"shuffle": True}), (1, data), (8, data)):
        assert not find_data_problems(*read("classify", rows, tmp_path, shuffled, training={"batch_size": size}))


def read(objective: Any, rows: list[dict[str, Any]], folder: Path, data: Any = None, **raw: Any) -> tuple[Any, Any]:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = made({"train": str(folder / "rows.jsonl"), **(data or {})}, objective=objective, **raw)
    found = read_datasets(recipe.data, tiny_tokenizer(), seed=0, reads=recipe.objective.example_types, classes=recipe.objective.classes)
    assert len(found.train) == len(rows), found.report.lines()
    return recipe.model_copy(update={"objective": recipe.objective.with_labels(found.labels, found.counts)}), found


# ---------------------------------------------------------------- of the number of steps


@pytest.mark.parametrize(("raw", "words"), [
    ({"optimizer": {"warmup_steps": 4}}, "never reached"), ({"optimizer": {"warmup_steps": 3}}, ""),
    ({"optimizer": {"warmup_steps": 8}, "training": {"num_train_epochs": 3, "batch_size": 2}}, ""),
    ({"training": {"save_steps": 9, "batch_size": 2}}, "training.save_steps 9"),
    ({"training": {"save_steps": 4, "batch_size": 2}}, ""),
    ({"data": EVALUATED, "training": {"eval_steps": 9, "batch_size": 2}}, "training.eval_steps 9"),
    ({"data": EVALUATED, "training": {"eval_steps": 2, "batch_size": 2}}, ""),
    ({"data": EVALUATED, "training": {"early_stopping_patience": 2, "eval_steps": 2, "batch_size": 2}}, "training.early_stopping_patience 2"),
    ({"data": EVALUATED, "training": {"early_stopping_patience": 1, "eval_steps": 2, "batch_size": 2}}, ""),
])
def test_what_does_not_happen_within_the_run_is_named(raw: dict[str, Any], words: str, tmp_path: Path) -> None:
    _, found = read("sft", [{"prompt": "q", "completion": f"a{i}"} for i in range(8)], tmp_path)
    raw = {"training": {"batch_size": 2}, **raw}
    lines = find_schedule_problems(made(**raw), InMemoryBatchSource(found.train, 2, None))
    assert bool(lines) == bool(words), lines
    assert not words or words in lines[0]


# ---------------------------------------------------------------- while it trains


def observed(objective: str, *lines: dict[str, float]) -> list[str]:
    heard: list[str] = []
    monitor = LearningMonitor(objective, objective == "grpo", heard.append)
    for step, line in enumerate(lines, 1):
        monitor.log(step, line)
    monitor.close()
    return heard


STILL, MOVING = {"grad_norm": 0.0}, {"grad_norm": 1e-9}
FLAT = {"reward_std": 0.4, "frac_reward_zero_std": 1.0, "grad_norm": 1.0}
MIXED = {"reward_std": 0.4, "frac_reward_zero_std": 0.9, "grad_norm": 1.0}
CONSTANT = {"reward_std": 0.0, "frac_reward_zero_std": 1.0, "grad_norm": 1.0}


@pytest.mark.parametrize(("objective", "lines", "words"), [
    ("sft", [STILL] * STEPS, "grad_norm is exactly 0"), ("sft", [STILL] * 9, "grad_norm is exactly 0"),
    ("sft", [STILL, STILL, MOVING] * 3, ""), ("sft", [STILL], "grad_norm is exactly 0"), ("sft", [MOVING], ""),
    ("contrastive", [MOVING, *[STILL] * STEPS], "raise training.batch_size"), ("sft", [{"eval_loss": 1.0}] * 9, ""),
    ("grpo", [FLAT] * STEPS, "all answers to the same prompt had the same reward"), ("grpo", [FLAT, FLAT, MIXED] * 3, ""),
    ("grpo", [FLAT, {"grad_norm": 1.0}] * STEPS, "all answers to the same prompt"),
    ("ppo", [FLAT] * STEPS, ""), ("ppo", [CONSTANT] * STEPS, "all answers had the same reward"),
])
def test_a_run_says_within_its_first_steps_that_it_learns_nothing(objective: str, lines: list[dict[str, float]],
                                                                  words: str) -> None:
    heard = observed(objective, *lines)
    assert len(heard) == bool(words)  # once, however long it lasts
    assert not words or words in heard[0]


# ---------------------------------------------------------------- rewards, before the base is loaded


MODULES: list[tuple[str, str]] = [
    ("LIMIT = undefined_name\ndef f(p, a, x): return a", "NameError.*mine.py:1"), ("def f(p, a, x) return a", "invalid syntax|expected"),
    ("import no_such_module_here\ndef f(p, a, x): return a", "no_such_module_here"), ("import sys\nsys.exit(3)", "SystemExit"),
    ("raise KeyError('x')", "KeyError"), ("def g(p, a, x): return a", "defines no function 'f'"), ("f = 3", "defines no function"),
    ("def f(p, a): return a", "cannot be called: too many positional"), ("def f(): return 1", "cannot be called"),
    ("def f(p, a, x, y): return a", "cannot be called: missing a required argument"),
]


@pytest.mark.parametrize(("body", "words"), MODULES)
def test_a_reward_that_cannot_be_had_is_one_error_before_the_base_is_loaded(body: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(body)
    for objective in ("grpo", "ppo"):
        with pytest.raises(RecipeError, match=words):
            check_rewards(made(objective={"name": objective, "reward": f"{tmp_path}/mine.py:f"}))


@pytest.mark.parametrize("body", ["def f(p, a, x): return [1.0]", "def f(*args): return [1]", "def f(p, a, x=None): return [1]",
                                  "class F:\n    def __call__(self, p, a, x): return [1]\nf = F()"])
def test_a_whole_reward_is_accepted(body: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(body)
    check_rewards(made(objective={"name": "grpo", "reward": f"{tmp_path}/mine.py:f"}))


def test_rewards_that_are_missing_are_refused_before_the_base_is_loaded(tmp_path: Path) -> None:
    for reward in ([], {"model": str(tmp_path / "none")}, {"url": "no-address"}, "lenght", {"function": "no.such:thing"}):
        with pytest.raises(LuthierError):
            check_rewards(made(objective={"name": "grpo", "reward": reward}))
