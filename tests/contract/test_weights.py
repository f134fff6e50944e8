"""A row's weight is a factor on its loss: 2 is as good as the row twice, 0 as good as no row. Read `trials.py` first.

Rows go the whole way, from a file through the data and a tiny base to the loss and every gradient, in float64.
"""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from cases import cases
from luthier import assembly
from luthier.api.train import train
from luthier.assembly.factory import fit_objective, load_datasets, load_family
from luthier.assembly.recipe import Recipe
from luthier.assembly.rl_setup import init_rl_policy
from luthier.core.errors import RecipeError, RunError
from luthier.data import DataConfig, read_datasets
from luthier.objectives import OBJECTIVES
from luthier.objectives.contrastive import infonce_loss, supcon_loss
from luthier.objectives.preference import compute_completion_logps
from luthier.training.grad_cache import backward
from luthier.training.step import forward_objective
from tiny import save_tiny, tiny_tokenizer

WORDS = ("alpha", "beta", "gamma", "delta", "epsilon")
WEIGHTS = (2, 1, 3, 2, 1)
COMPARED = [{"prompt": f"{w}?", "chosen": w, "rejected": f"no {w[:2]}"} for w in WORDS]
RANKED = [{"prompt": f"{w}?", "answers": [w, w[:3], "no"][:2 + i % 2]} for i, w in enumerate(WORDS)]
LABELED = [{"text": w, "label": "abacb"[i]} for i, w in enumerate(WORDS)]
TWICE: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {  # where 2 is as good as the row twice
    "classify": ({"name": "classify"}, LABELED),
    "balanced": ({"name": "classify", "class_weights": "balanced"}, LABELED),
    "several": ({"name": "classify", "task": "multi", "class_weights": {"b": 3.0}},
                [{"text": w, "label": [["a"], ["a", "b"], [], ["c"], ["b"]][i]} for i, w in enumerate(WORDS)]),
    "regression": ({"name": "classify", "task": "regression"}, [{"text": w, "label": 1.5 * i - 2} for i, w in enumerate(WORDS)]),
    "tags": ({"name": "classify", "task": "tokens", "class_weights": "balanced"},
             [{"words": [w, "and", w[::-1]], "tags": ["ABAB"[i % 4], "C", "BABA"[i % 4]]} for i, w in enumerate(WORDS)]),
    "scores": ({"name": "contrastive", "loss": "cosent"},
               [{"sentence1": w, "sentence2": w[::-1], "score": i / 4} for i, w in enumerate(WORDS)]),
    "triplet": ({"name": "contrastive", "loss": "triplet", "margin": 2.0},
                [{"anchor": w, "positive": w[::-1], "negative": "no"} for w in WORDS]),
    "reward": ({"name": "reward", "center_rewards_coefficient": 0.1}, RANKED),
    "choice": ({"name": "multiple_choice"}, RANKED),
    "all pairs": ({"name": "reward", "ranking": "all_pairs"}, RANKED),
    "kto": ({"name": "kto"}, [{"prompt": f"{w}?", "completion": w[::-1], "label": i % 2} for i, w in enumerate(WORDS)]),
    "sft": ({"name": "sft"}, [{"prompt": f"{w}?", "completion": w[::-1]} for w in WORDS]),
    **{name: ({"name": name}, RANKED if name in ("dpo", "simpo") else COMPARED)
       for name in ("dpo", "ipo", "cdpo", "robust", "hinge", "simpo", "orpo")},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    save_tiny(folder / "base", "llama", num_hidden_layers=1)
    return folder


def made(home: Path, objective: dict[str, Any], rows: list[dict[str, Any]], **more: Any) -> Recipe:
    path = home / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return assembly.build_recipe({"model": {"name_or_path": str(home / "base"), "dtype": "float64"}, "method": {"name": "lora", "rank": 2},
                         "objective": objective, "data": str(path), **more})


def measured(recipe: Recipe, max_tokens: int = 10_000) -> dict[str, Tensor]:
    """The loss of all rows as one batch, cut into rows of at most `max_tokens`, and every gradient."""
    base = load_family(recipe.model)
    found = load_datasets(recipe, base)
    recipe = fit_objective(recipe, found)
    attached, reference = init_rl_policy(recipe, base)
    with torch.no_grad():
        for i, parameter in enumerate(attached.parameters().values()):
            parameter.data = parameter.double()
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
    batches = assembly.rows.build_eval_batches(found.train, max_tokens)
    objective = recipe.objective
    count = sum(objective.count(batch.target) for batch in batches)
    loss = torch.zeros((), dtype=torch.float64)
    for part in [batches] if objective.needs_full_batch else [[batch] for batch in batches]:
        loss += backward(lambda batch: forward_objective(base, objective, batch, reference), objective, part, count, base.device,
                         nullcontext)[0]
    return {"loss": loss, **{name: p.grad for name, p in attached.parameters().items() if p.grad is not None}}


def apart(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert found.keys() == wanted.keys()
    assert len(wanted) > 3
    return max(float((found[name] - wanted[name]).abs().max()) for name in wanted)


def weighted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "weight": weight} for row, weight in zip(rows, WEIGHTS, strict=True)]


def repeated(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row, weight in zip(rows, WEIGHTS, strict=True) for _ in range(weight)]


@pytest.mark.parametrize("name", TWICE)
def test_a_weight_of_two_is_the_row_twice(home: Path, double: None, name: str) -> None:
    objective, rows = TWICE[name]
    found = measured(made(home, objective, weighted(rows)))
    near = 1e-6 if objective.get("class_weights") else 1e-9  # class weights are thirds in 32 bits
    assert apart(found, measured(made(home, objective, repeated(rows)))) < near
    assert apart(found, measured(made(home, objective, rows))) > 1e-4  # the control
    assert apart(found, measured(made(home, objective, weighted(rows)), 40)) < near  # however the batch is cut


@pytest.mark.parametrize("name", ["classify", "scores", "reward", "dpo", "kto"])
def test_a_weight_of_nothing_is_no_row_and_is_counted(home: Path, double: None, name: str) -> None:
    objective, rows = TWICE[name]
    none = [{**row, "weight": float(i != 1)} for i, row in enumerate(rows)]
    found = measured(made(home, objective, none))
    assert apart(found, measured(made(home, objective, [row for i, row in enumerate(rows) if i != 1]))) < 1e-9
    made(home, objective, none)
    report = read_datasets(DataConfig.parse({"train": str(home / "rows.jsonl")}), tiny_tokenizer(), seed=0).report.parts["train"]
    assert (report.read, report.kept, report.reasons) == (5, 4, {"nothing to train on": 1})
    assert report.refused[0]["line"] == "2"


def test_a_weight_that_is_none_is_refused(home: Path) -> None:
    made(home, {"name": "classify"}, [{**LABELED[0], "weight": -1}, *LABELED[1:]])
    report = read_datasets(DataConfig.parse({"train": str(home / "rows.jsonl")}), tiny_tokenizer(), seed=0).report.parts["train"]
    assert report.reasons == {"weight is not a finite number from 0 up": 1}


@pytest.mark.parametrize("kind", ["contrastive", "contrastive-symmetric", "contrastive-supcon"])
def test_among_negatives_it_is_a_factor_on_the_anchors_own_loss(kind: str) -> None:
    case = cases()[f"{kind}-weighted"]
    target, objective = case.target, case.objective
    states = F.normalize(case.outputs.pooled, dim=-1)
    similar = states @ states.T / objective.temperature
    weights = target.item_weights.double()
    if kind == "contrastive-supcon":
        each = supcon_loss(similar, target.labels)
    else:
        anchor = target.labels == 0
        own = (target.groups[anchor][:, None] == target.groups[~anchor][None]) & (target.labels[~anchor] == 1)
        each, weights = infonce_loss(similar[anchor][:, ~anchor], own, objective.symmetric), weights[anchor]
    found, wanted = case.loss(), (weights * each).sum()
    torch.testing.assert_close(found.total, wanted, rtol=1e-6, atol=0)
    assert float(found.count) == float(weights.sum())
    assert abs(float(wanted - each.sum())) > 1e-2  # the control


def test_ktos_divergence_is_a_mean_by_weight() -> None:
    case = cases()["kto-weighted"]
    weights = torch.tensor([2.0, 0.5, 3.0, 1.0])[case.target.groups]
    case = replace(case, target=replace(case.target, item_weights=weights))
    target, settings = case.target, case.objective
    ratios = compute_completion_logps(case.outputs.token_logps - case.outputs.reference_logps, target, mean=False)
    weights, other = target.item_weights.double(), target.labels < 0
    z0 = ((weights * ratios)[other].sum() / weights[other].sum()).detach()
    assert z0 > 1e-2
    assert abs(float(z0 - ratios[other].mean())) > 1e-2  # the control
    sign = 2 * target.labels.double() - 1
    scale = torch.where(target.labels == 1, settings.desirable_weight, settings.undesirable_weight) * weights
    wanted = (scale * (1 - torch.sigmoid(settings.beta * sign * (ratios - z0))))[~other].sum()
    torch.testing.assert_close(case.loss().total, wanted, rtol=1e-12, atol=0)
    assert float(case.loss().count) == float(weights[~other].sum())


# ---------------------------------------------------------------- balanced classes


def test_balanced_weights_are_scikit_learns() -> None:
    utils = pytest.importorskip("sklearn.utils")
    labels = ["a"] * 7 + ["b"] * 2 + ["c"] * 3
    counts = {name: float(labels.count(name)) for name in "abc"}
    made = OBJECTIVES["classify"](class_weights="balanced").with_labels(("a", "b", "c"), counts)
    wanted = utils.compute_class_weight("balanced", classes=np.array(list("abc")), y=labels)
    assert made.class_weights == pytest.approx(dict(zip("abc", wanted, strict=True)), rel=1e-12)
    shares = [made.class_weights[name] * counts[name] for name in "abc"]
    assert shares == pytest.approx([4.0] * 3)
    for lacking in ({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 2.0, "c": 0.0}, None):
        with pytest.raises(RecipeError, match="no train row has the class"):
            OBJECTIVES["classify"](class_weights="balanced", labels=("a", "b", "c")).with_labels(("a", "b"), lacking)
    with pytest.raises(RecipeError, match="class_weights"):
        OBJECTIVES["classify"].parse({"class_weights": "balance"})


def test_they_count_rows_by_weight_and_by_how_often_their_source_is_seen(home: Path) -> None:
    made(home, {"name": "classify"}, weighted(LABELED))
    path = str(home / "rows.jsonl")
    found = read_datasets(DataConfig.parse({"train": [path, {"path": path, "weight": 0.5}]}), tiny_tokenizer(), seed=0)
    assert found.counts == {"a": 7.5, "b": 3.0, "c": 3.0}


def test_a_run_keeps_the_numbers_and_goes_on_from_balanced(home: Path) -> None:
    recipe = made(home, {"name": "classify", "class_weights": "balanced"}, weighted(LABELED), output_dir=str(home / "run"),
                  training={"max_steps": 2, "batch_size": 2, "save_steps": 1})
    run = train(recipe, quiet=True)
    kept = yaml.safe_load((run.path / "recipe.yaml").read_text())["objective"]["class_weights"]
    assert kept == pytest.approx({"a": 9 / 15, "b": 9 / 6, "c": 9 / 6})
    losses = (run.path / "metrics.jsonl").read_text()
    assert train(recipe, resume=True, quiet=True).path == run.path  # finished, and known as the same
    for unfinished in ("README.md", "results.json"):
        (run.path / unfinished).unlink()
    shutil.rmtree(run.path / "checkpoints" / "step-2")
    train(recipe, resume=True, quiet=True)
    assert [json.loads(line).get("loss") for line in (run.path / "metrics.jsonl").read_text().splitlines()] == [
        json.loads(line).get("loss") for line in losses.splitlines()]
    (run.path / "README.md").unlink()
    raw = yaml.safe_load((run.path / "recipe.yaml").read_text())
    raw["objective"]["class_weights"] = {"a": 2.0, "b": 1.0, "c": 1.0}
    (run.path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(RunError, match="class_weights"):
        train(recipe, resume=True, quiet=True)
