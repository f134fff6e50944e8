"""Names of other tools and of older recipes: each is accepted, or answered with the name used here."""

from __future__ import annotations

import re
from typing import Any

import pytest

from luthier.assembly import build_recipe
from luthier.assembly.field_names import ACCEPTED, RENAMED
from luthier.assembly.recipe import Recipe
from luthier.core.errors import RecipeError
from luthier.methods import METHODS
from luthier.objectives import OBJECTIVES
from luthier.training.optimizer import OptimizerConfig
from test_surface import settings

FIELDS = {re.sub(r"\[[^\]]*\]", "", line.removeprefix("recipe ").partition(":")[0]) for line in settings(Recipe)}
SECTIONS = ("model", "training", "optimizer", "data", "evaluate", "method", "objective")


def place(name: str) -> dict[str, Any]:
    """A recipe with `name` where a user would write it: in its section, or at the top level for a bare name."""
    section, _, field = name.rpartition(".")
    return {"data": {"train": "rows.jsonl"}} | ({section: {field: 1}} if section and section != "data" else
                                                {"data": {"train": "rows.jsonl", field: 1}} if section else {name: 1})


def is_field(section: str, name: str) -> bool:
    """Whether some config of this section has a field of this name."""
    table = {"method": METHODS, "objective": OBJECTIVES}.get(section, {})
    return any(name in config.model_fields for config in table.values())


@pytest.mark.parametrize("name", RENAMED)
def test_a_foreign_name_is_answered_with_ours(name: str) -> None:
    section, _, field = name.rpartition(".")
    if is_field(section, field):
        pytest.fail(f"{name} is a field here") if section in SECTIONS[:5] else None
        return
    with pytest.raises(RecipeError) as caught:
        build_recipe(place(name))
    assert f"unknown setting {name!r}: use {RENAMED[name]}" in str(caught.value)


@pytest.mark.parametrize(("name", "ours"), RENAMED.items())
def test_the_answer_is_a_field(name: str, ours: str) -> None:
    """Answers about methods and objectives are checked where the old name is no field any more."""
    section, _, old = name.rpartition(".")
    for found in re.findall(r"(?:model|training|optimizer|data|evaluate)(?:\.\w+)+", ours):
        assert found in FIELDS
    for part, field in re.findall(r"(method|objective)\.(\w+)", ours):
        assert field == "name" or is_field(part, old) or is_field(part, field) or not section


@pytest.mark.parametrize("section", ["training", "optimizer", "model", "evaluate"])
def test_a_bare_foreign_name_is_answered_in_every_section(section: str) -> None:
    with pytest.raises(RecipeError, match=r"unknown setting '\w+\.lr': use optimizer\.learning_rate"):
        build_recipe({"data": "rows.jsonl", section: {"lr": 1e-3}})


def test_all_faults_come_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        build_recipe({"data": "rows.jsonl", "base": {"name": "x"}, "training": {"epochs": 2, "batch_size": 0}})
    for words in ("'base.name': use model.name_or_path", "'training.epochs': use training.num_train_epochs", "training.batch_size"):
        assert words in str(caught.value)


@pytest.mark.parametrize(("theirs", "ours"), ACCEPTED.items())
def test_pefts_names_of_a_lora_are_accepted(theirs: str, ours: str) -> None:
    value = 0.5 if ours == "dropout" else 4
    wanted = build_recipe({"data": "rows.jsonl", "method": {"name": "lora", ours: value}})
    assert build_recipe({"data": "rows.jsonl", "method": {theirs: value}}) == wanted
    assert build_recipe({"data": "rows.jsonl", "method": {ours: 1 if ours != "dropout" else 0.1}}, {f"method.{theirs}": value}) == wanted
    assert build_recipe({"data": "rows.jsonl", "method": ["bitfit", {"name": "lora", theirs: value}]}).method == \
        build_recipe({"data": "rows.jsonl", "method": ["bitfit", {"name": "lora", ours: value}]}).method
    with pytest.raises(RecipeError, match="the same setting"):
        build_recipe({"data": "rows.jsonl", "method": {theirs: value, ours: value}})


def test_the_warm_up_is_a_ratio_or_a_number_of_steps() -> None:
    assert OptimizerConfig().count_warmup_steps(100) == 3
    assert OptimizerConfig(warmup_ratio=0.1).count_warmup_steps(50) == 5
    saved = build_recipe({"data": "rows.jsonl", "optimizer": {"warmup_steps": 7}})
    assert saved.optimizer.count_warmup_steps(50) == 7
    assert build_recipe(saved) == saved  # a saved recipe holds both fields
    for given in ({"warmup_ratio": 0.1, "warmup_steps": 7}, {"warmup_ratio": None}):
        with pytest.raises(RecipeError, match="warmup_ratio and warmup_steps are both"):
            build_recipe({"data": "rows.jsonl", "optimizer": given})
