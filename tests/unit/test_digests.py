"""The comparison of `digests.py` notices one bit; its names are translated as the table says. Nothing is trained."""

from __future__ import annotations

import copy
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import digests
from digest_names import new_command, new_metric, new_recipe


def report(speaks: str = "old", metric: str = "clip_share") -> dict[str, Any]:
    lines = [{"step": 1, metric: 0.1, "loss": 1.5}, {"step": 1, f"eval_{metric}": float("nan")}]
    return {"names": speaks, "cases": {"one": {
        "weights": {"tensors": {"model.safetensors: a": "00"}}, "metrics": {"lines": lines},
        "results": {"metric": metric, "test": {metric: 0.3}}, "printed": [{"loss": 0.25}, "an answer\n"],
        "answers": {"lines": {"answers.jsonl": ['{"prompt": "a", "answer": "b"}']}}}}}


def test_equal_reports_have_no_differences() -> None:
    assert list(digests.differences(report(), report())) == []


def test_old_names_are_compared_under_the_new_ones() -> None:
    assert list(digests.differences(report(), report("new", "clip_fraction"))) == []
    assert list(digests.differences(report("new"), report("new", "clip_fraction"))) != []


def next_bit(number: float) -> float:
    return float(np.nextafter(number, 2.0))


@pytest.mark.parametrize(("way", "value", "said"), [
    (("metrics", "lines", 0, "clip_share"), next_bit(0.1), "one: metrics line of step 1: clip_fraction: 0.1 and 0.10000000000000002"),
    (("metrics", "lines", 1, "eval_clip_share"), 0.0, "metrics evaluation of step 1: eval_clip_fraction: NaN and 0.0"),
    (("metrics", "lines", 0, "step"), 2, "metrics line of step 1: loss: 1.5 and nothing"),
    (("results", "test", "clip_share"), next_bit(0.3), "results test clip_fraction"),
    (("printed", 0, "loss"), next_bit(0.25), "printed 0 loss"),
    (("printed", 1), "an answer", "printed 1"),
    (("answers", "lines", "answers.jsonl", 0), '{"prompt": "a", "answer": "c"}', "answers answers.jsonl:1 answer: \"b\" and \"c\""),
    (("weights", "tensors", "model.safetensors: a"), "01", "weights model.safetensors: a"),
    (("weights", "tensors", "model.safetensors: b"), "00", "weights model.safetensors: b: nothing and 00"),
])
def test_every_change_is_noticed(way: tuple[Any, ...], value: Any, said: str) -> None:
    changed = copy.deepcopy(report())
    place = changed["cases"]["one"]
    for step in way[:-1]:
        place = place[step]
    place[way[-1]] = value
    found = list(digests.differences(report(), json.loads(json.dumps(changed))))
    assert any(said in line for line in found), found


def test_a_missing_case_and_a_failed_one_are_differences() -> None:
    failed = {"names": "old", "cases": {"one": {"error": "broke"}}}
    assert "one: failed in the second: broke" in list(digests.differences(failed, failed))
    assert list(digests.differences(report(), {"names": "old", "cases": {}})) == ["one: only in the first"]


def test_two_values_under_one_name_are_an_error() -> None:
    twice = report()
    twice["cases"]["one"]["results"] = {"clip_share": 1, "clip_fraction": 2}
    with pytest.raises(ValueError, match="two values are called results clip_fraction"):
        digests.renamed(twice)


def test_one_bit_of_a_tensor_its_shape_and_its_dtype_are_noticed(tmp_path: Path) -> None:
    weight = torch.arange(6, dtype=torch.float32)
    bit = weight.clone()
    bit.view(torch.int32)[3] ^= 1
    found = []
    for i, tensor in enumerate((weight, bit, weight.view(2, 3), weight.view(torch.int32), weight.clone())):
        save_file({"b": torch.zeros(1), "a": tensor}, tmp_path / f"{i}.safetensors", metadata={"number": str(i)})
        found.append(digests.tensors(tmp_path / f"{i}.safetensors", "x"))
    assert [set(one) for one in found] == [{"x: a", "x: b"}] * 5
    assert found[0] == found[4]
    assert len({one["x: a"] for one in found}) == 4
    assert len({one["x: b"] for one in found}) == 1
    (tmp_path / "empty.safetensors").write_bytes(b"")
    with pytest.raises(struct.error):
        digests.tensors(tmp_path / "empty.safetensors", "x")


def test_what_the_clock_decides_is_left_out() -> None:
    measured = {"loss": 1.0, "tokens_per_second": 3.0, "train_seconds": 2.0, "peak_memory_gb": 1.0, "base": "x",
                "test": {"file_bytes": 3, "seconds": 1.0, "tokens": 7}}
    assert digests.kept(measured) == {"loss": 1.0, "test": {"tokens": 7}}


def test_recipes_are_translated() -> None:
    old = {"base": {"name": "m", "structure": {"add_blocks": [0]}}, "method": [{"name": "lora", "plus": 4}, {"name": "ln"}],
           "objective": {"name": "ppo", "epochs": 2, "reward": [{"run": "r"}]}, "start": "a", "run": "b",
           "data": {"augment": [{"name": "crop", "chance": 0.5}], "format": "judged"},
           "training": {"epochs": 2}, "optimizer": {"warmup": 0.1}, "seed": 1}
    assert new_recipe(old) == {
        "model": {"name_or_path": "m", "surgery": {"expand_layers": [0]}},
        "method": [{"name": "lora", "loraplus_lr_ratio": 4}, {"name": "ln_tuning"}],
        "objective": {"name": "ppo", "num_ppo_epochs": 2, "reward": [{"model": "r"}]}, "init_from": "a", "output_dir": "b",
        "data": {"augment": [{"name": "crop", "probability": 0.5}], "format": "unpaired_preference"},
        "training": {"num_train_epochs": 2}, "optimizer": {"warmup_ratio": 0.1}, "seed": 1}


def test_one_number_became_two_fields_and_four_objectives_one() -> None:
    assert new_recipe({"optimizer": {"warmup": 2}}) == {"optimizer": {"warmup_steps": 2}}
    assert new_recipe({"objective": {"name": "cdpo", "flipped": 0.2}}) == {
        "objective": {"name": "dpo", "loss_type": "cdpo", "label_smoothing": 0.2}}


def test_words_of_commands_and_metrics_are_translated() -> None:
    assert new_command(["evaluate", "r", "--base"]) == ["evaluate", "r", "--base-model-only"]
    assert new_command(["combine", "a", "b", "--how", "sum"]) == ["merge-adapters", "a", "b", "--combination-type", "linear"]
    assert new_command(["chat", "--base"]) == ["chat", "--base"]
    assert [new_metric(n) for n in ("eval_pair_accuracy", "kl_old", "loss", "eval_loss")] == [
        "eval_rewards/accuracies", "approx_kl", "loss", "eval_loss"]


def test_an_interrupted_run_has_nothing_of_later_steps(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        (tmp_path / "checkpoints" / f"step-{step}").mkdir(parents=True)
    for name in ("README.md", "model.safetensors", "recipe.yaml"):
        (tmp_path / name).write_text("")
    digests.interrupt(tmp_path, 4)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-2", "step-4"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", "recipe.yaml"]
    (tmp_path / "README.md").write_text("")
    with pytest.raises(RuntimeError, match="no checkpoint of step 3"):
        digests.interrupt(tmp_path, 3)


def test_cases_that_need_a_run_come_after_it() -> None:
    from digest_cases import CASES
    order = digests.chains(CASES)
    assert sorted(name for chain in order for name in chain) == sorted(CASES)
    for chain in order:
        assert all(CASES[name].needs in ("", *chain[:i]) for i, name in enumerate(chain))
