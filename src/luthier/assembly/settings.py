"""Settings that a recipe leaves out and that the start of a run decides; and paths in recipes. Read `recipe.py` first.

A saved recipe holds the value of every setting in `RESOLVED`, so that training from it gives the same run when a
default changes or when it is read in another working directory. `LEFT_OUT` lists the settings for which leaving them
out is itself the value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier.assembly.factory import micro_tokens, settled
from luthier.assembly.recipe import AnyMethod, Recipe, flatten
from luthier.core.config import Config
from luthier.core.protocols import Family
from luthier.data.config import Source
from luthier.methods.adalora import AdaLoraConfig
from luthier.methods.adapter import AdapterConfig
from luthier.methods.composite import CompositeConfig, list_parts
from luthier.methods.freeze import FreezeConfig
from luthier.methods.prefix import PrefixConfig
from luthier.methods.ptuning import PTuningConfig
from luthier.models import Identity, is_local, public_name
from luthier.objectives.grpo import GrpoConfig
from luthier.objectives.rl_config import RollsConfig

UNSET = (None, "auto")
RESOLVED: Mapping[str, tuple[str, ...]] = {  # section of a recipe -> settings that the start of a run decides
    "base": ("revision", "pooling"),
    "method": ("keep_base", "init_r", "scale", "num_trainable_layers", "encoder_hidden_size"),
    "objective": ("clip_high",),
    "data": ("max_length",),
    "training": ("micro_tokens",),
    "optimizer": ("learning_rate",),
    "": ("run",),
}
LEFT_OUT = {  # setting -> what leaving it out means, whatever the version
    "base.device": "every machine has its own", "base.structure": "no change", "method.layers": "none",
    "method.prompt_tuning_init_text": "words are drawn by the seed", "objective.run": "another kind of reward",
    "objective.function": "another kind of reward", "objective.url": "another kind of reward",
    "objective.target_kl": "no early end", "objective.kl_target": "a fixed weight", "data.subset": "the only one",
    "data.split": "by the part that it is named for", "data.first_choice": "as all rows show it",
    "data.columns": "those of the whole part",
    "data.document": "by the file's ending", "data.eval": "no rows", "data.test": "no rows",
    "data.format": "by the columns, whose rows have a digest", "data.system": "none",
    "data.share_prompt": "the result is the same", "data.score_scale": "read off the rows, which have a digest",
    "data.file": "none", "data.limit": "all rows", "training.steps": "as many as the epochs have",
    "training.eval_every": "once an epoch", "training.save_every": "never", "training.patience": "never",
    "evaluate.limit": "all rows", "start": "the bare base",
}


# ---------------------------------------------------------------- what is left out


def resolve_settings(made: Recipe, base: Family, identity: Identity, rate: float, run: Path) -> Recipe:
    """The recipe with every setting in `RESOLVED` at its value for this base and machine.

    Args:
        identity: of the base.
        rate: the learning rate of the run.
        run: its folder.
    """
    micro = made.training.micro_tokens or micro_tokens(made, base) * base.anatomy.sizes.get("unit", 1)
    length = made.data.max_length if "channels" in base.anatomy.sizes else settled(made, base).max_length
    pools = "pooled" in made.objective.needs  # a head pools as its class does, unless the recipe says how
    methods = [_resolve_method(part, base) for part in list_parts(made.method)]
    objective = made.objective
    if isinstance(objective, GrpoConfig) and objective.clip_high is None:
        objective = objective.model_copy(update={"clip_high": objective.clip})
    return made.model_copy(update={
        "base": made.base.model_copy(update={"pooling": base.pooling if pools else made.base.pooling,
                                             "revision": identity.revision or made.base.revision}),
        "method": _join_methods(made.method, methods),
        "objective": objective,
        "data": made.data.model_copy(update={"max_length": length}),
        "training": made.training.model_copy(update={"micro_tokens": micro}),
        "optimizer": made.optimizer.model_copy(update={"learning_rate": rate}),
        "run": str(run)})


def _resolve_method(method: AnyMethod, base: Family) -> AnyMethod:
    """One method with what it takes from the base or from its other settings."""
    found: dict[str, Any] = {}
    if isinstance(method, AdaLoraConfig):
        found = {"init_r": method.initial_rank}
    elif isinstance(method, AdapterConfig):
        found = {"scale": method.factor}
    elif isinstance(method, FreezeConfig):
        found = {"num_trainable_layers": method.num_trained_layers}
    elif isinstance(method, PrefixConfig) and method.prefix_projection:
        found = {"encoder_hidden_size": method.encoder_hidden_size or base.anatomy.sizes["hidden"]}
    elif isinstance(method, PTuningConfig):
        found = {"encoder_hidden_size": method.encoder_hidden_size or int(base.anatomy.embedding.weight.shape[1])}  # type: ignore[index]
    return method.model_copy(update=found)


def _join_methods(method: AnyMethod, parts: Sequence[AnyMethod]) -> AnyMethod:
    return method.model_copy(update={"parts": tuple(parts)}) if isinstance(method, CompositeConfig) else parts[0]


def fill_left_out(made: Recipe, saved: Recipe) -> Recipe:
    """The recipe with the values that a run's saved recipe holds for settings in `RESOLVED` that it leaves out."""
    update: dict[str, Any] = {section: _fill(dict(made)[section], dict(saved)[section], RESOLVED[section])
                              for section in ("base", "objective", "data", "training", "optimizer")}
    ours, theirs = list_parts(made.method), list_parts(saved.method)
    if [part.name for part in ours] == [part.name for part in theirs]:
        update["method"] = _join_methods(made.method, [_fill(one, other, RESOLVED["method"])
                                                       for one, other in zip(ours, theirs, strict=True)])
    return made.model_copy(update=update)


def _fill(config: Config, saved: Config, names: Sequence[str]) -> Config:
    ours, theirs = dict(config), dict(saved)
    return config.model_copy(update={name: theirs[name] for name in names
                                     if name in ours and name in theirs and ours[name] in UNSET})


def list_resolved(before: Recipe, after: Recipe) -> list[str]:
    """The settings that were left out and now have a value."""
    ours, theirs = flatten(before), flatten(after)
    return [key for key, value in theirs.items() if value not in UNSET and ours.get(key, None) in UNSET]


# ---------------------------------------------------------------- paths


def map_paths(made: Recipe, path: Callable[[str], str]) -> Recipe:
    """The recipe with `path` applied to every setting that can be a path, but for the base."""
    def source(found: Any) -> Any:
        return found.model_copy(update={"path": path(found.path)}) if isinstance(found, Source) else found

    def optional(found: str | None) -> str | None:
        return found if found is None else path(found)

    data = made.data
    changes = tuple(change.model_copy(update={"file": path(str(dict(change)["file"]))})
                    if dict(change).get("file") else change for change in data.augment)
    objective = made.objective
    if isinstance(objective, RollsConfig):
        objective = objective.model_copy(update={"reward": tuple(
            worth.model_copy(update={"run": optional(worth.run), "function": _map_function(worth.function, path)})
            for worth in objective.reward)})
    return made.model_copy(update={
        "data": data.model_copy(update={"train": tuple(source(one) for one in data.train), "eval": source(data.eval),
                                        "test": source(data.test), "augment": changes}),
        "objective": objective, "start": optional(made.start), "run": optional(made.run)})


def _map_function(function: str | None, path: Callable[[str], str]) -> str | None:
    """A reward `file.py:name` with its file's path mapped; other names stay."""
    file, colon, name = (function or "").rpartition(":")
    return path(file) + colon + name if file.endswith(".py") else function


def make_paths_absolute(made: Recipe) -> Recipe:
    """The recipe with an absolute path for every file and folder that exists here."""
    base = made.base
    if is_local(base.name):
        base = base.model_copy(update={"name": str(Path(base.name).expanduser().absolute())})
    absolute = map_paths(made, lambda path: str(Path(path).expanduser().absolute()) if _exists(path) else path)
    run = None if made.run is None else str(Path(made.run).expanduser().absolute())
    return absolute.model_copy(update={"base": base, "run": run})


def make_public(made: Recipe, upstream: str | None = None) -> Recipe:
    """The recipe as it may leave this machine: hub ids and bare names in place of local paths.

    Args:
        upstream: the base's hub id, where it is known to have one.
    """
    public = map_paths(made, lambda path: Path(path).name if _exists(path) or Path(path).is_absolute() else path)
    base = made.base.model_copy(update={"name": public_name(made.base, upstream)})
    return public.model_copy(update={"base": base, "run": Path(made.run).name if made.run else None})


def _exists(path: str) -> bool:
    return Path(path).expanduser().exists()
