"""The reference by its three ways: switched off, a copy, or asked once beforehand. All of them give the same run.

Read `luthier/assembly/reference_model.py` first.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lab import apart
from torch import Tensor

from luthier import assembly
from luthier.api.train import train
from luthier.assembly.compatibility import check_compatibility
from luthier.assembly.factory import attach_method, load_family
from luthier.core.errors import RecipeError
from luthier.methods import METHODS
from luthier.training import checkpoint
from luthier.training.grad_cache import backward
from luthier.training.loop import run_training_loop
from luthier.training.step import forward_objective
from tiny import save_tiny
from trials import Trial, same

TOLERANCE = 1e-9  # float64, in another packing
REFERRED = [("dpo", "lora"), ("ipo", "adapter"), ("hinge", "full"), ("kto", "lora"), ("kto", "full"), ("dpo", "prompt")]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("references")
    save_tiny(folder / "base", "llama", num_hidden_layers=1)
    pairs = [{"prompt": f"say {'so ' * i}{i}?", "chosen": "yes" * (1 + i % 3), "rejected": f"no {i}"} for i in range(7)]
    verdicts = [{"prompt": f"say {i}?", "completion": "yes" * (1 + i), "label": i % 2} for i in range(7)]
    for name, rows in (("pairs", pairs), ("verdicts", verdicts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(home: Path, objective: str, method: Any, *, once: bool = False, dtype: str = "float64", **changes: Any) -> Any:
    """Two shuffled epochs of steps of three rows, each row of tokens shorter than what is asked at once beforehand."""
    said: dict[str, Any] = {"name": objective} | ({"precompute_reference": True} if once else {})
    rows = str(home / ("verdicts.jsonl" if objective == "kto" else "pairs.jsonl"))
    return assembly.build_recipe({
        "model": {"name_or_path": str(home / "base"), "dtype": dtype}, "method": method, "objective": said,
        "data": {"train": rows}, "optimizer": {"learning_rate": 0.0003 if method == "full" else 0.003, "lr_scheduler_type": "constant", "warmup_ratio": 0},
        "training": {"num_train_epochs": 2, "batch_size": 3, "max_tokens_per_micro_batch": 150, "save_steps": 4}, "seed": 1}, changes)


def gradients(one: Trial) -> dict[str, Tensor]:
    """Loss and every gradient of the first step, without dropout; what trains has moved a little, or all would be 0."""
    one.base.train(False)
    with torch.no_grad():
        for number, parameter in enumerate(one.attached.parameters().values()):
            parameter += 0.02 * torch.sin(torch.arange(parameter.numel()).to(parameter) + number).view_as(parameter)
    batches, objective = next(one.feed), one.made.objective
    count = sum(objective.count(batch.target) for batch in batches)
    total = torch.zeros((), dtype=torch.float64)
    for part in [batches] if objective.needs_full_batch else [[batch] for batch in batches]:
        loss, _ = backward(lambda batch: forward_objective(one.base, objective, batch, one.reference), objective, part, count,
                           one.base.device, nullcontext)
        total += loss
    return {"loss": total, **{name: p.grad for name, p in one.attached.parameters().items() if p.grad is not None}}


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("objective", "method"), REFERRED)
def test_asked_once_is_asked_in_every_step(home: Path, tmp_path: Path, objective: str, method: str) -> None:
    live, once = (Trial(recipe(home, objective, method, once=once), tmp_path) for once in (False, True))
    for one in (live, once):
        run_training_loop(one.job)
    assert [line["epoch"] for line in once.lines][-1] == 2
    assert len(once.lines) == 6
    for ours, wanted in zip(once.lines, live.lines, strict=True):
        assert abs(ours["loss"] - wanted["loss"]) < TOLERANCE * wanted["loss"], (ours, wanted)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("objective", "method"), REFERRED)
def test_the_gradients_are_the_same(home: Path, tmp_path: Path, objective: str, method: str) -> None:
    made = recipe(home, objective, method, once=True)
    live, once, other = Trial(recipe(home, objective, method), tmp_path), Trial(made, tmp_path), Trial(made, tmp_path)
    columns = [example.precomputed["reference_logps"] for example in other.feed.encoded]
    other.feed.encoded = [replace(example, precomputed={"reference_logps": column + torch.sin(torch.arange(len(column)) + number)})
                          for number, (example, column) in enumerate(zip(other.feed.encoded, columns, strict=True))]
    found, wanted, control = (gradients(one) for one in (once, live, other))
    assert apart(found, wanted) < TOLERANCE
    assert apart(control, wanted) > 1e-4  # numbers of other rows would be noticed


@pytest.mark.usefixtures("double")
def test_a_run_that_starts_from_a_run_asks_that_one(home: Path, tmp_path: Path) -> None:
    first = train(recipe(home, "orpo", "lora"), output_dir=str(tmp_path / "first"), quiet=True)
    live, once = (Trial(recipe(home, "dpo", "lora", once=once, init_from=str(first.path)), tmp_path) for once in (False, True))
    bare = Trial(recipe(home, "dpo", "lora", once=True), tmp_path)
    assert apart(gradients(once), gradients(live)) < TOLERANCE
    told, other = (one.feed.encoded[0].precomputed["reference_logps"] for one in (once, bare))
    assert (told - other).abs().max() > 1e-3  # the control: the bare base says something else


@pytest.mark.parametrize("method", [{"name": "lora", "dropout": 0.3}, "full"])
def test_it_goes_on_from_a_checkpoint_to_the_same_bits(home: Path, tmp_path: Path, method: Any) -> None:
    made = recipe(home, "dpo", method, once=True, dtype="float32")
    one, again = Trial(made, tmp_path), Trial(made, tmp_path)
    run_training_loop(one.job)
    run_training_loop(again.job, checkpoint.load_checkpoint(tmp_path / "step-4"))
    assert [line["loss"] for line in again.lines] == [line["loss"] for line in one.lines[4:]]
    same(one.attached.state(), again.attached.state())


def test_what_a_model_says_of_rows_is_not_what_the_rows_are(home: Path, tmp_path: Path) -> None:
    live, once = (Trial(recipe(home, "dpo", "lora", once=once), tmp_path) for once in (False, True))
    assert live.feed.fingerprint == once.feed.fingerprint  # so a run on another machine goes on


@pytest.mark.parametrize(("objective", "kept"), [
    ({"name": "dpo"}, True), ({"name": "kto"}, True), ({"name": "sft"}, False), ({"name": "simpo"}, False),
    ({"name": "dpo", "precompute_reference": True}, False), ({"name": "ppo"}, True), ({"name": "grpo"}, False),
    ({"name": "ppo", "kl_coef": 0}, False), ({"name": "grpo", "beta": 0.1}, True)])
@pytest.mark.parametrize("method", ["full", "freeze"])
def test_a_copy_is_kept_where_the_objective_compares(method: str, objective: dict[str, Any], kept: bool) -> None:
    made = assembly.build_recipe({"data": "-", "method": method, "objective": objective})
    assert made.method.keep_base is kept
    assert assembly.build_recipe(made).method.keep_base is kept
    for given in (True, False):
        raw = {"data": "-", "method": {"name": method, "keep_base": given}, "objective": objective}
        assert assembly.build_recipe(raw).method.keep_base is given


def test_a_copy_that_is_forbidden_is_refused_with_what_would_do(home: Path, tmp_path: Path) -> None:
    never = {"name": "full", "keep_base": False}
    with pytest.raises(RecipeError, match="precompute_reference: true"):
        Trial(recipe(home, "dpo", never), tmp_path)
    assert Trial(recipe(home, "dpo", never, once=True), tmp_path).attached.base_copy_size == (0, 0)


@pytest.mark.parametrize("once", [False, True])
def test_a_full_run_says_what_its_reference_costs(home: Path, tmp_path: Path, once: bool,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    rows = str(home / "pairs.jsonl")
    made = recipe(home, "dpo", "full", once=once, dtype="float32", **{"data.eval": rows, "data.test": rows})
    run = train(made, output_dir=str(tmp_path / "run"))
    said = capsys.readouterr().err
    count = int(run.results["parameters"])
    sentence = f"full keeps a copy of the {count:,} weights that it trains ({count * 4 / 1e9:.3g} GB)"
    assert (sentence in said) is not once, said
    assert run.results["test_before"]["rewards/margins"] == 0
    assert run.results["test"]["rewards/margins"] > 0  # held-out and test rows have their reference too
    assert yaml.safe_load((run.path / "recipe.yaml").read_text())["method"]["keep_base"] is not once


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_held_out_rows_are_asked_about_as_they_are_measured(home: Path, tmp_path: Path, precision: str) -> None:
    """Mixed precision is for training alone: before it, the model is its own reference to the last bit."""
    rows = str(home / "pairs.jsonl")
    made = recipe(home, "dpo", "lora", once=True, dtype="float32", **{"data.test": rows, "training.precision": precision})
    run = train(made, output_dir=str(tmp_path / "run"), quiet=True)
    assert run.results["test_before"]["rewards/margins"] == 0


def test_a_critic_of_its_own_wants_a_method_that_stands_beside_the_base(home: Path, tmp_path: Path) -> None:
    family = load_family(assembly.ModelConfig(name_or_path=str(home / "base")))
    for name in METHODS:
        made = assembly.build_recipe({"model": str(home / "base"), "data": "-", "method": name, "objective": {
            "name": "ppo", "critic": "adapter", "reward": "length"}})
        inside = attach_method(load_family(made.model), made.method, 0).gates is None
        if not inside:
            check_compatibility(made, family)
            continue
        with pytest.raises(RecipeError, match=r"objective.critic: adapter .* method '" + name):
            check_compatibility(made, family)
        check_compatibility(made.model_copy(update={"objective": made.objective.model_copy(update={"critic": "shared"})}), family)


def test_rows_that_are_streamed_cannot_be_asked_about_once(home: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="streaming"):
        Trial(recipe(home, "dpo", "lora", once=True, **{"data.streaming": True, "training.max_steps": 2}), tmp_path)
