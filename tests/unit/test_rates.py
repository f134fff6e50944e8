"""Default learning rates follow method and objective, in one place, with their reasons on a page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from luthier import assembly
from luthier.assembly.recipe import Recipe, compute_default_learning_rate, describe_learning_rate
from luthier.methods import METHODS
from luthier.objectives import OBJECTIVES, SHORT_FORMS, expand_short_form
from luthier.objectives.base import ObjectiveConfig

ROOT = Path(__file__).parents[2]
PREFERENCES = {"dpo", "ipo", "cdpo", "robust", "hinge", "simpo", "kto"}


def config_of(objective: str) -> type[ObjectiveConfig]:
    return OBJECTIVES[expand_short_form({"name": objective})["name"]]


def is_online(objective: str) -> bool:
    return config_of(objective).is_online


def made(objective: str, method: str = "lora", **optimizer: float) -> Recipe:
    named = {"name": objective, "reward": "numeric_match"} if is_online(objective) else {"name": objective}
    return assembly.build_recipe({"data": "-", "objective": named, "method": method, "optimizer": optimizer})


def page() -> dict[str, tuple[float, float, float]]:
    """Objective -> factor, rate of full and of LoRA, as the page says."""
    found = {}
    for line in (ROOT / "docs/learning_rates.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `"):
            assert cells[4], line  # the reason
            found |= {name: (float(cells[1]), float(cells[2]), float(cells[3])) for name in re.findall(r"`(\w+)`", cells[0])}
    return found


@pytest.mark.parametrize("objective", [*OBJECTIVES, *SHORT_FORMS])
def test_the_page_has_every_objective_and_says_what_is_used(objective: str) -> None:
    factor, full, lora = page()[objective]
    assert config_of(objective).learning_rate_factor == factor
    assert compute_default_learning_rate(made(objective, "full")) == pytest.approx(full)
    assert compute_default_learning_rate(made(objective, "lora")) == pytest.approx(lora)


@pytest.mark.parametrize("method", METHODS)
def test_preferences_and_rewards_are_far_below_instruction_tuning(method: str) -> None:
    tuned = compute_default_learning_rate(made("sft", method))
    for objective in (*OBJECTIVES, *SHORT_FORMS):
        rate = compute_default_learning_rate(made(objective, method))
        low = objective in PREFERENCES or is_online(objective)
        assert rate <= tuned / 10 if low else tuned / 10 < rate <= tuned, objective


def test_a_run_says_which_rate_and_why() -> None:
    assert describe_learning_rate(made("sft")) == "0.0005 (the default: 0.0005 of lora)"
    assert describe_learning_rate(made("dpo")) == "2.5e-05 (the default: 0.0005 of lora times 0.05 for dpo)"
    assert describe_learning_rate(made("dpo", learning_rate=1e-4)) == "0.0001 (optimizer.learning_rate)"


def test_recipes_whose_objective_has_a_factor_name_their_rate() -> None:
    """Their expected results were measured at it."""
    for path in (ROOT / "recipes").glob("*.yaml"):
        raw = yaml.safe_load(path.read_text())
        for part in [raw[name] for name in ("sft", "reward", "ppo") if name in raw] or [raw]:
            objective = part.get("objective", "sft")
            name = objective if isinstance(objective, str) else objective.get("name", "ppo")
            assert config_of(name).learning_rate_factor == 1 or part["optimizer"]["learning_rate"], path
