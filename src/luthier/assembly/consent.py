"""The code that a recipe names, and whether the present call allows it. Read `core/consent.py` first.

| setting                       | what would run                               | its name for `--allow-code`        |
|-------------------------------|----------------------------------------------|------------------------------------|
| `model.trust_remote_code`     | Python files that come with the base model   | the base, as `model.name_or_path`  |
| `objective.reward.function`   | a Python function of the user                | the file or module, or file:function |
| `objective.reward.sandbox`    | programs of a model, without walls           | `code_tests`                       |
| `objective.reward.url`        | nothing here, but prompts are sent there     | the URL                            |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.assembly.recipe import Recipe, build_recipe
from luthier.core.consent import is_allowed
from luthier.core.errors import RecipeError
from luthier.objectives.rl_config import OnlineRLConfig, RewardSourceConfig


@dataclass(frozen=True)
class CodeReference:
    """One setting that names code: `setting` is its dotted name, `name` what `--allow-code` takes, `value` what the
    setting holds, and `danger` what happens if it is allowed."""

    setting: str
    name: str
    value: str
    danger: str

    def is_allowed(self) -> bool:
        return is_allowed(self.name, self.value)


def list_code(recipe: Recipe) -> list[CodeReference]:
    """All the code that a recipe names."""
    found = []
    if recipe.model.trust_remote_code:
        found.append(CodeReference("model.trust_remote_code", recipe.model.name_or_path, recipe.model.name_or_path,
                                   "would run Python files of the base model"))
    rewards = recipe.objective.reward if isinstance(recipe.objective, OnlineRLConfig) else ()
    for number, reward in enumerate(rewards):
        found += _list_reward_code(reward, f"objective.reward.{number}")
    return found


def _list_reward_code(reward: RewardSourceConfig, setting: str) -> Iterator[CodeReference]:
    if reward.function is not None and ":" in reward.function:
        yield CodeReference(f"{setting}.function", reward.function.rpartition(":")[0], reward.function,
                            "would run that Python code")
    if reward.function == "code_tests" and reward.sandbox == "process":
        yield CodeReference(f"{setting}.sandbox", "code_tests", "process",
                            "would run programs of the model without the kernel's walls")
    if reward.url is not None:
        yield CodeReference(f"{setting}.url", reward.url, reward.url, "would send prompts and completions there")


def read_recipe(source: str | Path | Mapping[str, Any] | Recipe | None, settings: Mapping[str, Any]) -> Recipe:
    """`build_recipe`, with consent to the code that a recipe file, or the run in its `init_from`, names."""
    recipe = build_recipe(source, settings)
    if isinstance(source, Recipe):
        return recipe
    return require_consent(recipe, {**source, **settings} if isinstance(source, Mapping) else settings)


def require_consent(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """The recipe itself. `settings`: those that the present call gives, which are consent to what they name.

    Raises `RecipeError` with everything that is not allowed.
    """
    denied = [code for code in list_code(recipe) if not code.is_allowed() and not _is_named_in(code, settings)]
    if not denied:
        return recipe
    allowing = " ".join(f"--allow-code {name}" for name in dict.fromkeys(code.name for code in denied))
    raise RecipeError("\n".join(f"{code.setting}: {code.value!r} {code.danger}, and a file that names it is no consent"
                                for code in denied),
                      f"read that code; if you trust it, add {allowing} (in Python: allow_code=[...])")


def _is_named_in(code: CodeReference, settings: Mapping[str, Any]) -> bool:
    """Whether the present call itself sets what would run."""
    if code.setting == "model.trust_remote_code":
        return settings.get(code.setting) is True or (isinstance(model := settings.get("model"), Mapping)
                                                      and model.get("trust_remote_code") is True)
    return code.value in set(_list_strings(settings))


def _list_strings(value: Any) -> Iterator[str]:
    """All strings in nested mappings and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _list_strings(inner)


def drop_denied_rewards(recipe: Recipe, settings: Mapping[str, Any]) -> tuple[Recipe, list[str]]:
    """A stored recipe without the rewards that would run denied code, and a sentence on each of them."""
    if not isinstance(recipe.objective, OnlineRLConfig):
        return recipe, []
    kept, notes = [], []
    for reward in recipe.objective.reward:
        denied = [code for code in _list_reward_code(reward, "objective.reward")
                  if not code.is_allowed() and not _is_named_in(code, settings)]
        if not denied:
            kept.append(reward)
        notes += [f"the reward {code.value!r} is not computed: it {code.danger} (--allow-code {code.name})"
                  for code in denied]
    objective = recipe.objective.model_copy(update={"reward": tuple(kept)})
    return (recipe.model_copy(update={"objective": objective}), notes) if notes else (recipe, notes)
