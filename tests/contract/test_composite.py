"""Lists of methods: what a recipe says, what trains at which rate, and that a list obeys the law of one method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lab import SFT, apart, base, digest, documents, logits, stir
from safetensors.torch import load_file

from luthier import assembly
from luthier.api.train import train
from luthier.assembly.factory import attach_heads, attach_method, load_family
from luthier.assembly.initialization import reference_context
from luthier.assembly.recipe import Recipe, get_method_name
from luthier.assembly.rl_setup import init_rl_policy
from luthier.assembly.run_io import open_run
from luthier.core.errors import RecipeError
from luthier.core.protocols import Head, SamplingParams
from luthier.data.packing import build_batch
from luthier.methods import METHODS
from luthier.methods.composite import CompositeConfig, CompositeMethod
from luthier.methods.multi_adapter import AdapterManager
from luthier.models import CausalLM
from luthier.training.optimizer import Optimizer, OptimizerConfig
from luthier.training.run_folder import Run
from luthier.training.step import step
from tiny import save_tiny

LORA = {"name": "lora", "rank": 4}
LISTS: list[list[Any]] = [
    ["bitfit", LORA], [LORA, "bitfit"], [{**LORA, "use_dora": True}, "bitfit"], ["ia3", LORA], [LORA, "ia3"],
    [{**LORA, "init_lora_weights": "pissa"}, "adapter"], ["prompt", "lora"], ["bitfit", "ia3", "lora"],
    ["ia3", "bitfit", {**LORA, "use_dora": True}],
]
MERGED = [parts for parts in LISTS if not {"adapter", "prompt"} & set(map(str, parts))]
NAMED = {"ids": lambda parts: "+".join(p if isinstance(p, str) else "+".join(map(str, p.values())) for p in parts)}


def settings(parts: Any) -> Any:
    return assembly.build_recipe({"data": "-", "method": parts}).method


def put(family: CausalLM, parts: Any, stirred: bool = True) -> Any:
    found = attach_method(family, settings(parts), 3)
    if stirred:
        stir(found)
    return found


# ---------------------------------------------------------------- what a recipe says


def test_a_list_is_read_written_and_laid_over() -> None:
    made = assembly.build_recipe({"data": "-", "method": ["bitfit", LORA]})
    assert get_method_name(made) == "bitfit+lora"
    written = assembly.dump_recipe(made)["method"]
    assert [part["name"] for part in written] == ["bitfit", "lora"]
    assert written[1]["rank"] == 4
    assert assembly.build_recipe(yaml.safe_load(yaml.safe_dump(assembly.dump_recipe(made)))) == made
    over = assembly.build_recipe(assembly.dump_recipe(made), {"method.lora.rank": 2})
    assert assembly.dump_recipe(over)["method"][1]["rank"] == 2
    assert assembly.diff_recipes(made, over) == ["method.lora.rank: 4, now 2"]
    assert assembly.build_recipe(made, {"method": "lora"}).method == METHODS["lora"]()
    assert assembly.build_recipe(assembly.dump_recipe(made), {"method": ["ia3", "bitfit"]}).method == settings(["ia3", "bitfit"])
    assert settings(["bitfit"]) == METHODS["bitfit"]() == settings("bitfit")
    assert get_method_name(assembly.build_recipe({"data": "-", "method": "lora"})) == "lora"


@pytest.mark.parametrize(("parts", "words"), [
    ([], "list of methods is empty"),
    (["lora", {"name": "lora", "rank": 2}], "lora is in the list twice"),
    (["bitfit", {"name": "lora", "ranc": 2}], "did you mean 'rank'"),
    (["bitfit", "lorra"], "lorra"),
    (["bitfit", ["lora"]], "parts"),
])
def test_a_list_that_cannot_be_is_refused(parts: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        settings(parts)


def test_a_setting_of_a_list_says_whose_it_is() -> None:
    with pytest.raises(RecipeError, match=r"method\.rank: the recipe has a list of methods, bitfit, lora") as caught:
        assembly.build_recipe({"data": "-", "method": ["bitfit", "lora"]}, {"method.rank": 2})
    assert "method.bitfit.rank" in caught.value.remedy


@pytest.mark.parametrize(("parts", "words"), [
    (["lora", "full"], "own weights"), (["freeze", "lora"], "own weights"),
    (["bitfit", "ln_tuning"], "own weights"), (["prompt", "prefix"], "only one kind"),
])
def test_parts_that_no_file_could_hold_are_refused(parts: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        put(base("llama"), parts)


# ---------------------------------------------------------------- rates


def rates(found: Any, peak: float) -> dict[str, float]:
    adam = Optimizer(found.parameters(), found.lr_multiplier, peak, OptimizerConfig(lr_scheduler_type="constant", warmup_ratio=0), 3)
    adam.set_learning_rate(0)
    by_parameter = {id(p): group["lr"] for group in adam.adam.param_groups for p in group["params"]}
    return {name: by_parameter[id(p)] for name, p in found.parameters().items()}


def test_every_part_trains_at_its_own_default() -> None:
    method = settings(["bitfit", {**LORA, "loraplus_lr_ratio": 16}])
    assert isinstance(method, CompositeConfig)
    assert method.default_learning_rate == METHODS["bitfit"].default_learning_rate  # type: ignore[attr-defined]
    found = rates(method.attach(base("llama").structure, seed=0), method.default_learning_rate)
    for name, rate in found.items():
        wanted = 1e-3 if name.endswith("bitfit") else 5e-4 * (16 if "lora_B" in name else 1)
        assert rate == pytest.approx(wanted)
    doubled = rates(method.attach(base("llama").structure, seed=0), 2 * method.default_learning_rate)
    assert doubled == pytest.approx({name: 2 * rate for name, rate in found.items()})


@pytest.mark.parametrize("name", ["full", "lora", "bitfit", "prompt"])
def test_heads_train_at_a_rate_of_their_own(name: str) -> None:
    class Scoring:
        heads = (Head("score", "item"), Head("temperature", "scalar"))

    family, method = base("llama"), METHODS[name]()
    scoring: Any = Scoring()
    default: float = method.default_learning_rate  # type: ignore[attr-defined]
    whole = attach_heads(family, attach_method(family, settings(name), 3), scoring, 3, default)
    found = rates(whole, default)
    heads = set(family.heads.parameters())
    assert len(heads) == 3
    assert all(rate == pytest.approx(1e-3) for n, rate in found.items() if n in heads)
    alone = base("llama")
    assert {n: r for n, r in found.items() if n not in heads} == pytest.approx(
        rates(attach_method(alone, settings(name), 3), default))


# ---------------------------------------------------------------- the law of a method


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("parts", LISTS, **NAMED)
def test_a_list_is_a_method(parts: list[Any]) -> None:
    family = base("llama")
    bare, before = logits(family), digest(family)
    found = put(family, parts, stirred=False)
    if "prompt" not in parts:  # which starts as words
        assert (logits(family) - bare).abs().max() < 1e-9
    stir(found)
    tuned = logits(family)
    assert (tuned - bare).abs().max() > 0.01
    with found.disabled():
        assert torch.equal(logits(family), bare)
        with found.parts[0].disabled(), found.disabled():
            assert torch.equal(logits(family), bare)
    assert torch.equal(logits(family), tuned)
    for part in found.parts:
        with part.disabled():
            assert not torch.equal(logits(family), tuned)  # every part has its share
    start = {name: p.detach().clone() for name, p in found.parameters().items()}
    adam = Optimizer(found.parameters(), found.lr_multiplier, 1e-2, OptimizerConfig(), 2)
    adam.set_learning_rate(0)
    step(family, SFT, [build_batch(documents())], adam)
    assert all(not torch.equal(p, start[name]) for name, p in found.parameters().items())
    assert digest(family) == before


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("parts", MERGED, **NAMED)
def test_merged_is_unmerged(parts: list[Any]) -> None:
    family = base("qwen2")
    before, found = digest(family), put(family, parts)
    tuned = logits(family)
    found.merge()
    assert (logits(family) - tuned).abs().max() < 1e-9
    found.unmerge()
    assert digest(family) == before
    assert torch.equal(logits(family), tuned)


# ---------------------------------------------------------------- run folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "base", "llama", dtype=torch.float32)
    rows = [{"prompt": f"{i} and {i}?", "completion": str(2 * i)} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def trained(folder: Path, name: str, **more: Any) -> Run:
    given = {"model.name_or_path": str(folder / "base"), **more} if "init_from" not in more else more
    return train(data=str(folder / "rows.jsonl"), output_dir=str(folder / name), quiet=True, **{
        "training.max_steps": 2, "training.batch_size": 4, "optimizer.learning_rate": 1e-2, "evaluate.before_training": False, **given})


def test_a_run_of_a_list_is_opened_again_with_and_without_its_recipe(folder: Path) -> None:
    run = trained(folder, "run", method=["bitfit", LORA])
    assert run.adapter is not None
    assert run.adapter["peft_type"] == "LUTHIER"
    assert [part["peft_type"] for part in run.adapter["parts"]] == ["LORA", "LUTHIER"]  # in the order in which they act
    assert "`bitfit+lora`" in (run.path / "README.md").read_text()
    _, family, found = open_run(run)
    assert isinstance(found, CompositeMethod)
    wanted = logits(family)
    with found.disabled():
        assert not torch.equal(logits(family), wanted)
    (run.path / "recipe.yaml").unlink()
    assert torch.equal(logits(open_run(run)[1]), wanted)
    whole = load_file(run.path / "adapter_model.safetensors")
    assert any("lora_A" in name for name in whole)
    assert any("bitfit" in name for name in whole)


# ---------------------------------------------------------------- starting from a tuned run


@pytest.mark.parametrize("method", [LORA, ["bitfit", LORA], "prompt"], ids=str)
def test_a_run_starts_from_a_tuned_one_which_stays_its_reference(folder: Path, method: Any) -> None:
    first = trained(folder, "first", method=method)
    wanted = logits(open_run(first)[1])
    made = assembly.build_recipe({"data": str(folder / "rows.jsonl"), "init_from": str(first.path)})
    assert made.method == Recipe.parse(first.recipe).method
    assert made.model.name_or_path == str(folder / "base")
    family = load_family(made.model)
    bare = logits(family)
    policy, reference = init_rl_policy(made, family)
    assert torch.equal(logits(family), wanted)
    assert not torch.equal(bare, wanted)
    stir(policy)
    moved = logits(family)
    assert not torch.equal(moved, wanted)
    with reference():
        assert torch.equal(logits(family), wanted)
        rows = build_batch(documents())
        assert not family.forward(rows.inputs, rows.target, SFT.required_outputs).token_logps.requires_grad  # type: ignore[union-attr]
    with policy.disabled():
        assert torch.equal(logits(family), bare)
    assert torch.equal(logits(family), moved)
    assert isinstance(family.router, AdapterManager)


def test_a_started_run_goes_on_from_there_and_stands_alone(folder: Path) -> None:
    first = trained(folder, "first", method=LORA)
    second = trained(folder, "second", init_from=str(first.path))
    before, after = (load_file(run.path / "adapter_model.safetensors") for run in (first, second))
    assert before.keys() == after.keys()
    assert apart(after, before) > 1e-3
    one, two = (run.metrics for run in (first, second))
    assert two[1]["loss"] < one[1]["loss"]
    assert second.recipe["method"]["rank"] == 4
    wanted = logits(open_run(first)[1])
    made, family, attached = open_run(second)
    assert attached is not None
    own = logits(family)
    with reference_context(made, family, attached)():
        assert torch.equal(logits(family), wanted)
    assert torch.equal(logits(family), own)
    assert not torch.equal(own, wanted)
    first.path.rename(folder / "elsewhere")  # a finished run needs its start no more
    assert open_run(second)[2] is not None


def test_a_start_that_does_not_fit_is_refused_with_a_remedy(folder: Path) -> None:
    first = trained(folder, "first", method=LORA)
    with pytest.raises(RecipeError, match=r"method\.rank: 4, now 8") as caught:
        trained(folder, "second", init_from=str(first.path), method="lora")
    assert "omit model and method" in caught.value.remedy
    save_tiny(folder / "other", "llama", seed=1, dtype=torch.float32)
    with pytest.raises(RecipeError, match=r"model\.name_or_path"):
        trained(folder, "third", init_from=str(first.path), **{"model.name_or_path": str(folder / "other")})
    whole = trained(folder, "whole", method="full")
    with pytest.raises(RecipeError, match="holds a full model") as caught:
        trained(folder, "fourth", init_from=str(whole.path))
    assert f"model.name_or_path={whole.path}" in caught.value.remedy


# ---------------------------------------------------------------- several runs in one process


def test_several_runs_answer_side_by_side_on_one_base(folder: Path) -> None:
    import luthier
    runs = {"a": trained(folder, "a", method=LORA), "b": trained(folder, "b", method=["bitfit", LORA], seed=5)}
    tuned = luthier.load_adapters(str(folder / "base"), runs)
    bare = logits(tuned.family)
    for name, run in runs.items():
        with tuned.use_adapter(name) as family:
            assert torch.equal(logits(family), logits(open_run(run)[1]))
    with tuned.use_adapter({"a": 0.5, "b": 0.5}):
        assert not torch.equal(logits(tuned.family), bare)
    assert torch.equal(logits(tuned.family), bare)
    sampling = SamplingParams(max_new_tokens=12)
    prompts, names = ["1 and 1?", "2 and 2?", "3?"], ["a", None, "b"]
    alone = [tuned.answer([prompt], name, sampling)[0] for prompt, name in zip(prompts, names, strict=True)]
    assert tuned.answer(prompts, names, sampling) == alone
    assert len(set(tuned.answer(prompts[:1] * 3, names, sampling))) == 3
    with pytest.raises(RecipeError, match="unknown adapter 'c'"):
        tuned.answer(prompts, ["a", "b", "c"])
    with pytest.raises(RecipeError, match="2 adapters"):
        tuned.answer(prompts, ["a", "b"])
    with pytest.raises(RecipeError, match="holds a full model"):
        luthier.load_adapters(str(folder / "base"), {"w": trained(folder, "w", method="full")})
