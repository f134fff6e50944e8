"""Resolves settings that a recipe omits, and paths in recipes. Read `recipe.py` first.

A saved recipe has the value of every setting in `RESOLVED`, so that training from it gives the same run after a default
changes, or in another working directory. `LEFT_OUT` lists the settings that stay omitted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier.assembly.factory import resolve_data_config, resolve_micro_batch_tokens
from luthier.assembly.recipe import AnyMethod, Recipe, flatten_recipe
from luthier.core.config import Config
from luthier.core.protocols import Family
from luthier.data.config import Source
from luthier.methods.adalora import AdaLoraConfig
from luthier.methods.adapter import AdapterConfig
from luthier.methods.composite import CompositeConfig, list_parts
from luthier.methods.freeze import FreezeConfig
from luthier.methods.prefix import PrefixConfig
from luthier.methods.ptuning import PTuningConfig
from luthier.models import Identity, get_public_name, is_local_path
from luthier.objectives.grpo import GrpoConfig
from luthier.objectives.rl_config import OnlineRLConfig

UNSET = (None, "auto")
RESOLVED: Mapping[str, tuple[str, ...]] = {  # section of a recipe -> settings that are resolved at the start of a run
    "model": ("revision", "pooling"),
    "method": ("keep_base", "init_r", "scale", "num_trainable_layers", "encoder_hidden_size"),
    "objective": ("epsilon_high",),
    "data": ("max_length",),
    "training": ("max_tokens_per_micro_batch",),
    "optimizer": ("learning_rate",),
    "": ("output_dir",),
}
LEFT_OUT = {  # setting -> its meaning when omitted, the same in every version
    "model.device": "depends on the machine", "model.surgery": "no change", "method.layers": "none",
    "method.prompt_tuning_init_text": "tokens are sampled with the seed", "objective.model": "another kind of reward",
    "objective.label_smoothing": "resolved for robust and cdpo; the other losses do not use it",
    "objective.function": "another kind of reward", "objective.url": "another kind of reward",
    "objective.early_stop_kl": "no early stop", "objective.adaptive_kl_target": "a fixed weight",
    "data.subset": "the only one",
    "data.split": "depends on the part of the data", "data.first_choice": "found from all rows",
    "data.columns": "those of the data section",
    "data.document": "depends on the file's suffix", "data.eval": "no rows", "data.test": "no rows",
    "data.format": "detected from the columns; the rows have a digest", "data.system": "none",
    "data.share_prompt": "the result is the same", "data.score_scale": "found from the rows, which have a digest",
    "data.file": "none", "data.max_samples": "all rows", "training.max_steps": "determined by the epochs",
    "optimizer.warmup_steps": "by warmup_ratio", "training.eval_steps": "once an epoch",
    "training.save_steps": "never", "training.early_stopping_patience": "never",
    "evaluate.max_samples": "all rows", "init_from": "the bare base",
}


# ---------------------------------------------------------------- omitted settings


def resolve_settings(recipe: Recipe, base: Family, identity: Identity, rate: float, run: Path) -> Recipe:
    """The recipe with the value of every setting in `RESOLVED` for this base and machine.

    Args:
        identity: of the base.
        rate: the learning rate of the run.
        run: its folder.
    """
    unit = base.structure.sizes.get("unit", 1)
    micro = recipe.training.max_tokens_per_micro_batch or resolve_micro_batch_tokens(recipe, base) * unit
    length = recipe.data.max_length if "channels" in base.structure.sizes else resolve_data_config(recipe,
                                                                                                   base).max_length
    pools = "pooled" in recipe.objective.required_outputs  # a head's default is its Transformers class's
    methods = [_resolve_method(part, base) for part in list_parts(recipe.method)]
    objective = recipe.objective
    if isinstance(objective, GrpoConfig) and objective.epsilon_high is None:
        objective = objective.model_copy(update={"epsilon_high": objective.epsilon})
    return recipe.model_copy(update={
        "model": recipe.model.model_copy(update={"pooling": base.pooling if pools else recipe.model.pooling,
                                             "revision": identity.revision or recipe.model.revision}),
        "method": _join_methods(recipe.method, methods),
        "objective": objective,
        "data": recipe.data.model_copy(update={"max_length": length}),
        "training": recipe.training.model_copy(update={"max_tokens_per_micro_batch": micro}),
        "optimizer": recipe.optimizer.model_copy(update={"learning_rate": rate}),
        "output_dir": str(run)})


def _resolve_method(method: AnyMethod, base: Family) -> AnyMethod:
    """One method with the settings that depend on the base or on its other settings."""
    found: dict[str, Any] = {}
    if isinstance(method, AdaLoraConfig):
        found = {"init_r": method.initial_rank}
    elif isinstance(method, AdapterConfig):
        found = {"scale": method.factor}
    elif isinstance(method, FreezeConfig):
        found = {"num_trainable_layers": method.num_trained_layers}
    elif isinstance(method, PrefixConfig) and method.prefix_projection:
        found = {"encoder_hidden_size": method.encoder_hidden_size or base.structure.sizes["hidden"]}
    elif isinstance(method, PTuningConfig):
        found = {"encoder_hidden_size": method.encoder_hidden_size or int(base.structure.embedding.weight.shape[1])}  # type: ignore[index]
    return method.model_copy(update=found)


def _join_methods(method: AnyMethod, parts: Sequence[AnyMethod]) -> AnyMethod:
    return method.model_copy(update={"parts": tuple(parts)}) if isinstance(method, CompositeConfig) else parts[0]


def fill_left_out(recipe: Recipe, saved: Recipe) -> Recipe:
    """The recipe; omitted settings in `RESOLVED` get the values of a run's saved recipe."""
    update: dict[str, Any] = {section: _fill(dict(recipe)[section], dict(saved)[section], RESOLVED[section])
                              for section in ("model", "objective", "data", "training", "optimizer")}
    ours, theirs = list_parts(recipe.method), list_parts(saved.method)
    if [part.name for part in ours] == [part.name for part in theirs]:
        update["method"] = _join_methods(recipe.method, [_fill(one, other, RESOLVED["method"])
                                                       for one, other in zip(ours, theirs, strict=True)])
    return recipe.model_copy(update=update)


def _fill(config: Config, saved: Config, names: Sequence[str]) -> Config:
    ours, theirs = dict(config), dict(saved)
    return config.model_copy(update={name: theirs[name] for name in names
                                     if name in ours and name in theirs and ours[name] in UNSET})


def list_resolved(before: Recipe, after: Recipe) -> list[str]:
    """The settings that were omitted and now have a value."""
    ours, theirs = flatten_recipe(before), flatten_recipe(after)
    return [key for key, value in theirs.items() if value not in UNSET and ours.get(key, None) in UNSET]


# ---------------------------------------------------------------- paths


def map_paths(recipe: Recipe, path: Callable[[str], str]) -> Recipe:
    """The recipe with `path` applied to every setting that can be a path, except the base."""
    def source(found: Any) -> Any:
        return found.model_copy(update={"path": path(found.path)}) if isinstance(found, Source) else found

    def optional(found: str | None) -> str | None:
        return found if found is None else path(found)

    data = recipe.data
    changes = tuple(change.model_copy(update={"file": path(str(dict(change)["file"]))})
                    if dict(change).get("file") else change for change in data.augment)
    objective = recipe.objective
    if isinstance(objective, OnlineRLConfig):
        objective = objective.model_copy(update={"reward": tuple(
            worth.model_copy(update={"model": optional(worth.model), "function": _map_function(worth.function, path)})
            for worth in objective.reward)})
    return recipe.model_copy(update={
        "data": data.model_copy(update={"train": tuple(source(one) for one in data.train), "eval": source(data.eval),
                                        "test": source(data.test), "augment": changes}),
        "objective": objective, "init_from": optional(recipe.init_from), "output_dir": optional(recipe.output_dir)})


def _map_function(function: str | None, path: Callable[[str], str]) -> str | None:
    """A reward `file.py:name` with its path mapped; other names are unchanged."""
    file, colon, name = (function or "").rpartition(":")
    return path(file) + colon + name if file.endswith(".py") else function


def make_paths_absolute(recipe: Recipe) -> Recipe:
    """The recipe with an absolute path for every file and folder that exists here."""
    base = recipe.model
    if is_local_path(base.name_or_path):
        base = base.model_copy(update={"name_or_path": str(Path(base.name_or_path).expanduser().absolute())})
    absolute = map_paths(recipe, lambda path: str(Path(path).expanduser().absolute()) if _exists(path) else path)
    run = None if recipe.output_dir is None else str(Path(recipe.output_dir).expanduser().absolute())
    return absolute.model_copy(update={"model": base, "output_dir": run})


def make_public(recipe: Recipe, upstream: str | None = None) -> Recipe:
    """The recipe without local paths: hub ids and bare names instead.

    Args:
        upstream: the hub id of the base, if it is known.
    """
    public = map_paths(recipe, lambda path: Path(path).name if _exists(path) or Path(path).is_absolute() else path)
    base = recipe.model.model_copy(update={"name_or_path": get_public_name(recipe.model, upstream)})
    folder = Path(recipe.output_dir).name if recipe.output_dir else None
    return public.model_copy(update={"model": base, "output_dir": folder})


def _exists(path: str) -> bool:
    return Path(path).expanduser().exists()
