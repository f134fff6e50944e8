"""LoRAs combined are the sum of their changes: PEFT's `add_weighted_adapter` and dense sums say which."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import base, logits, stir
from torch import Tensor

from luthier.api.merge_adapters import merge_adapters
from luthier.api.train import train
from luthier.assembly.run_io import open_run
from luthier.cli.main import main
from luthier.core.errors import RecipeError, RunError
from luthier.methods.lora import Lora, LoraConfig
from luthier.methods.lora_merging import merge_loras
from luthier.training.run_folder import Run
from tiny import save_tiny, tiny

WEIGHTS = (0.7, -0.4)
EXACT = 1e-9
# Ranks, scales and targets differ; one is written as twice its rank.
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "alike": ({"rank": 4, "alpha": 12.0}, {"rank": 4, "alpha": 12.0}),
    "unlike": ({"rank": 3, "alpha": 6.0, "use_rslora": True, "rank_pattern": {"up": 5}, "alpha_pattern": {"q": 2.0}},
               {"rank": 2, "init_lora_weights": "pissa", "target_modules": ("q", "down")}),
}


def pair(name: str, kind: str = "llama") -> list[Lora]:
    found: list[Lora] = []
    for i, settings in enumerate(PAIRS[name]):
        family = base(kind)
        lora = LoraConfig.parse(settings).attach(family.structure, seed=3 + i)
        stir(lora, seed=7 + i)
        found.append(lora)
    return found


def dense(lora: Lora) -> dict[str, Tensor]:
    """Every map's change as a matrix."""
    return {layer.site.name: (layer.scale * layer.get_factors()[1] @ layer.get_factors()[0]).detach() for layer in lora.layers}


def summed(loras: list[Lora]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for lora, weight in zip(loras, WEIGHTS, strict=True):
        for name, change in dense(lora).items():
            found[name] = found.get(name, torch.zeros_like(change)) + weight * change
    return found


def made(loras: list[Lora], kind: str = "llama", **settings: Any) -> tuple[dict[str, Tensor], Any]:
    found = merge_loras(loras, WEIGHTS, **settings)
    fresh = found.config.attach(base(kind).structure, seed=0)
    fresh.load(found.state)
    return dense(fresh), found


def far(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """|found - wanted| / |wanted|, Frobenius norms over all maps."""
    assert found.keys() == wanted.keys()
    off = sum(float((found[n] - t).square().sum()) for n, t in wanted.items())
    return (off / sum(float(t.square().sum()) for t in wanted.values())) ** 0.5


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("how", ["linear", "cat"])
def test_the_exact_ways_are_the_sum_of_the_changes(name: str, how: str) -> None:
    loras = pair(name)
    found, told = made(loras, combination_type=how)
    assert far(found, summed(loras)) < EXACT
    assert told.error == 0
    other, _ = made(loras[::-1], combination_type=how)  # the weights meet the other adapter
    assert far(other, summed(loras)) > 0.1


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_svd_is_the_closest_of_its_rank_and_says_how_far(kind: str) -> None:
    loras = pair("alike", kind)
    wanted = summed(loras)
    errors = []
    for rank in (1, 3, 6, 8):
        found, told = made(loras, kind, combination_type="svd", rank=rank)
        u = {n: torch.linalg.svd(t.double(), full_matrices=False) for n, t in wanted.items()}
        best = {n: (a[:, :rank] * s[:rank]) @ v[:rank] for n, (a, s, v) in u.items()}
        assert far(found, best) < EXACT
        assert abs(told.error - far(found, wanted)) < EXACT
        assert max(told.config.rank, *told.config.rank_pattern.values(), 0) <= rank
        errors.append(told.error)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.3
    assert errors[-1] == 0


def test_the_sum_of_what_one_rank_holds_stays_at_that_rank() -> None:
    lora = pair("alike")[0]
    found = merge_loras([lora, lora], (0.5, 0.25))
    assert found.config.rank == 4
    assert merge_loras([lora, lora], (0.5, 0.25), "cat").config.rank == 8


@pytest.mark.parametrize(("how", "theirs"), [("linear", "cat"), ("cat", "cat"), ("svd", "svd"), ("linear", "svd")])
def test_it_is_what_peft_makes_of_the_same_adapters(how: str, theirs: str) -> None:
    peft = pytest.importorskip("peft")
    loras = pair("alike")
    modules = sorted({layer.site.name.rsplit(".", 1)[1] for layer in loras[0].layers})
    config = peft.LoraConfig(r=4, lora_alpha=12.0, target_modules=modules, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny("llama"), config, adapter_name="0", autocast_adapter_dtype=False)
    model.add_adapter("1", config)
    with torch.no_grad():
        for i, lora in enumerate(loras):
            for layer in lora.layers:
                target = model.get_submodule(f"base_model.model.{layer.site.name}")
                target.lora_A[str(i)].weight.data = layer.a.detach().clone()
                target.lora_B[str(i)].weight.data = layer.b.detach().clone()
        rank = 3 if how == "svd" else 8 if theirs == "svd" else None
        model.base_model.add_weighted_adapter(["0", "1"], list(WEIGHTS), "sum", combination_type=theirs, svd_rank=rank)
        model.base_model.add_weighted_adapter(["0", "1"], list(WEIGHTS), "rough", combination_type="linear")
        wanted, rough = ({layer.site.name: model.get_submodule(f"base_model.model.{layer.site.name}").get_delta_weight(name)
                          for layer in loras[0].layers} for name in ("sum", "rough"))
    found, _ = made(loras, combination_type=how, rank=3 if how == "svd" else None)
    assert far(found, wanted) < 1e-6  # PEFT keeps the weights in float32
    assert far(found, rough) > 0.1


@pytest.mark.parametrize(("settings", "words"), [
    ({"combination_type": "sum"}, "one of: linear, cat, svd"), ({"rank": 3}, "only svd"),
    ({"combination_type": "svd", "rank": 0}, "of 1 or more"), ({"weights": (1.0,)}, "one weight for each"),
])
def test_what_cannot_be_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        merge_loras(pair("alike"), **{"weights": WEIGHTS, **settings})


def test_a_dora_is_refused_with_the_reason() -> None:
    family = base("llama")
    with pytest.raises(RecipeError, match="DoRA adapters cannot be added"):
        merge_loras([LoraConfig(use_dora=True).attach(family.structure, seed=0)], (1.0,))


# ---------------------------------------------------------------- run folders


def trained(folder: Path, name: str, **more: Any) -> Path:
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i} and {i}?", "completion": str(2 * i)}) + "\n" for i in range(4)))
    return train(data=str(rows), output_dir=str(folder / name), quiet=True, **{
        "model.name_or_path": str(folder / "base"), "training.max_steps": 2, "training.batch_size": 4,
        "optimizer.learning_rate": 1e-2, "evaluate.before_training": False, **more}).path


def test_combined_runs_are_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny(tmp_path / "base", "llama", dtype=torch.float32)
    one, two = trained(tmp_path, "one"), trained(tmp_path, "two", seed=5, **{"method.rank": 3})
    words = ["merge-adapters", str(one), str(two), "--weights", "0.7", "-0.4", "--out", str(tmp_path / "both"), "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out) == {"rank": 11, "relative_error": 0}
    import luthier
    tuned = luthier.load_adapters(str(tmp_path / "base"), {"one": one, "two": two})
    with tuned.use_adapter({"one": 0.7, "two": -0.4}):
        wanted = logits(tuned.family)
    assert (logits(open_run(Run(tmp_path / "both"))[1]) - wanted).abs().max() < 1e-4
    assert (logits(tuned.family) - wanted).abs().max() > 1e-2
    assert merge_adapters([one, two], tmp_path / "small", weights=WEIGHTS, combination_type="svd", rank=2)["relative_error"] > 0.01
    with pytest.raises(RunError, match="already holds a run"):
        merge_adapters([one, two], tmp_path / "both")
    with pytest.raises(RecipeError, match="only runs of the method lora"):
        merge_adapters([one, trained(tmp_path, "biases", method="bitfit")], tmp_path / "none")
    save_tiny(tmp_path / "other", "llama", seed=1, dtype=torch.float32)
    with pytest.raises(RecipeError, match="runs of one base"):
        merge_adapters([one, trained(tmp_path, "far", **{"model.name_or_path": str(tmp_path / "other")})], tmp_path / "none")
    assert not (tmp_path / "none").exists()
