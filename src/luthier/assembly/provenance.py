"""Records digests of everything that decides a run's result, and compares them later. Read `recipe.py` first.

| kept in                     | what                                                                                |
|-----------------------------|-------------------------------------------------------------------------------------|
| `provenance` of recipe.yaml | the base (digests, absolute path, hub id), runs that the recipe names, the recipe   |
| each checkpoint's state     | the same, the recipe itself, and length and digest of metrics.jsonl                 |
| results.json, at the end    | the base, and digests of what was trained, of the recipe and of metrics.jsonl       |

Another base is an error in every command that opens a run. A changed recipe, or another run in `init_from`, is an
error for `--resume`, because it changes the result. All other changes are reported.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from luthier.assembly.python_rows import FOLDER, find_kept_rows
from luthier.assembly.recipe import Recipe, collect_provenance, diff_recipes, dump_recipe, load_recipe
from luthier.assembly.settings import fill_left_out, map_paths
from luthier.core.consent import is_allowed
from luthier.core.digests import compute_file_sha256, compute_json_sha256, compute_path_sha256
from luthier.core.errors import BaseError, RecipeError, RunError
from luthier.data import Source
from luthier.models import Identity, ModelConfig, get_public_name, identify_base, is_local_path, prepare_folder
from luthier.models.identity import DECISIVE_DIGESTS
from luthier.objectives.rl_config import OnlineRLConfig
from luthier.training.run_folder import Run

Report = Callable[[str], None]
T = TypeVar("T")
METRICS = "metrics.jsonl"
BASE_FILE = "base_model.json"  # in an exported adapter, which has no recipe
TRAINED = ("*.safetensors", "adapter_config.json", "config.json")
SHOWN = 16  # digits of a digest in a message


def ignore(line: str) -> None:
    """A `Report` that drops every line."""


# ---------------------------------------------------------------- what is kept


def record_start(recipe: Recipe, identity: Identity, left_out: list[str]) -> dict[str, Any]:
    """The `provenance` of recipe.yaml. `left_out`: settings that were not set but resolved at the start."""
    return {**collect_provenance(recipe), "base": identity.to_json(),
            "recipe_sha256": compute_json_sha256(dump_recipe(recipe)),
            "runs_sha256": _digest_runs(recipe), "resolved": left_out}


@dataclass(frozen=True)
class CheckpointRecord:
    """Builds the record that a checkpoint keeps in addition to the training state; called at every save."""

    run: Run

    def __call__(self) -> dict[str, Any]:
        kept = self.run.provenance
        return {"base": kept.get("base"), "runs_sha256": kept.get("runs_sha256"), "recipe": self.run.recipe,
                "recipe_sha256": compute_json_sha256(self.run.recipe), "metrics": digest_metrics(self.run)}


def record_results(run: Run) -> dict[str, Any]:
    """The digests that results.json keeps in addition to the results."""
    return {"base": run.provenance.get("base"),
            "digests": {"trained": digest_trained(run), "recipe": compute_json_sha256(run.recipe),
                        "metrics": digest_metrics(run)}}


def digest_trained(run: Run) -> dict[str, str]:
    """File -> sha256 of the weight files of a run folder and of their configs."""
    return {file.name: compute_file_sha256(file) for pattern in TRAINED for file in sorted(run.path.glob(pattern))}


def digest_metrics(run: Run, size: int | None = None) -> dict[str, Any]:
    """Length and sha256 of metrics.jsonl, or of its first `size` bytes."""
    file = run.path / METRICS
    content = b""
    if file.exists():
        with open(file, "rb") as written:
            content = written.read(-1 if size is None else size)
    return {"bytes": len(content), "sha256": sha256(content).hexdigest()}


def _digest_runs(recipe: Recipe) -> dict[str, dict[str, str]]:
    """Digests of the runs that a recipe names: the one to start from, and reward models."""
    rewards = recipe.objective.reward if isinstance(recipe.objective, OnlineRLConfig) else ()
    named = {"init_from": recipe.init_from, **{f"objective.reward.{i}.model": worth.model for i,
                                             worth in enumerate(rewards)}}
    return {key: {file.name: compute_file_sha256(file) for file in sorted(Path(place).glob("*.safetensors"))}
            for key, place in named.items() if place is not None and Path(place).is_dir()}


def describe_base(base: ModelConfig) -> dict[str, Any]:
    """The record of the base in an exported adapter: public name and digests, no path."""
    identity = identify_base(base)
    return {"name": get_public_name(base, identity.upstream), "revision": identity.revision,
            "sha256": dict(identity.digests)}


# ---------------------------------------------------------------- the base


def open_recipe(run: Run, base_model: Path | str | None = None, report: Report = ignore) -> Recipe:
    """The recipe of a run, with its base model found and verified by digest. Code that comes with the base is off,
    unless the present call allows it.

    Args:
        base_model: where the base is now, if it was moved.
        report: called with a sentence for every change and for what cannot be checked.

    Raises:
        BaseError: the base is missing, or has other weights or another config.
        RunError: `base_model` for a run that needs no base.
    """
    recipe = find_kept_rows(load_recipe(run), run)
    for line in list_changes(run):
        report(f"warning: {line}")
    if run.adapter is None:
        if base_model is not None:
            raise RunError(f"{str(run.path)!r} holds a full model, so it has no base model",
                           "omit the base model (--base-model)")
        model = recipe.model
    else:
        model = check_base(run, recipe.model, base_model, report)
    return recipe.model_copy(update={"model": deny_remote_code(model, str(run.path))})


def deny_remote_code(model: ModelConfig, *names: str) -> ModelConfig:
    """A stored model config, in which remote code is off unless the present call allows it for this base."""
    if not model.trust_remote_code or is_allowed(model.name_or_path, *names):
        return model
    return model.model_copy(update={"trust_remote_code": False})


def check_base(run: Run, base: ModelConfig, base_model: Path | str | None = None,
               report: Report = ignore) -> ModelConfig:
    """The base of a run, or `base_model` in its place. Raises `BaseError` where it is not the one trained on."""
    config = base if base_model is None else base.model_copy(update={"name_or_path": str(base_model), "revision": None})
    kept = read_digests(run)
    if not kept:
        if run.recipe:
            report(f"note: {str(run.path)!r} has no digests of its base: the base {config.name_or_path!r} is not "
                   f"checked")
        if base_model is None:
            _find_model(run, config, prepare_folder)
        return config
    identity = _find_model(run, config, identify_base)
    if conflict := compare_digests(kept, identity.digests):
        raise BaseError(f"{str(run.path)!r} was trained on another base than {config.name_or_path!r}: {conflict}",
                        "give the base that it was trained on: --base-model PATH (in Python: base_model=PATH)")
    if (old := kept.get("tokenizer")) and old != identity.digests.get("tokenizer"):
        report(f"warning: tokenizer or chat template of the base {config.name_or_path!r} have changed since "
               f"{str(run.path)!r} was trained (sha256 {old[:SHOWN]}, now {identity.digests['tokenizer'][:SHOWN]}): "
               "prompts may be rendered in another way")
    return config


def _find_model(run: Run, config: ModelConfig, find: Callable[[ModelConfig], T]) -> T:
    """Calls `find(config)`; its error names the run and how to give the base."""
    try:
        return find(config)
    except BaseError as error:
        raise BaseError(f"the base of {str(run.path)!r} cannot be used: {error.what}",
                        f"{error.remedy}; or give the present path of that base: --base-model PATH (in Python: "
                        f"base_model=PATH)") from error


def apply_base_model(recipe: Recipe, base_model: Path | str | None, resume: bool) -> Recipe:
    """The recipe with the new location of the base. Raises `RecipeError` where no earlier run identifies the base."""
    if base_model is None:
        return recipe
    if not resume and recipe.init_from is None:
        raise RecipeError(f"base_model {str(base_model)!r} gives the new path of an existing run's base, and this run "
                          "is new", "set its base as model.name_or_path (--model)")
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"name_or_path": str(base_model),
                                                                          "revision": None})})


def read_digests(run: Run) -> Mapping[str, str]:
    """Digests of the base that a run or exported adapter was trained on; empty where none were recorded."""
    file = run.path / BASE_FILE
    kept = run.provenance.get("base") or (json.loads(file.read_text(encoding="utf-8")) if file.exists() else {})
    return dict(kept.get("sha256") or {})


def compare_digests(kept: Mapping[str, str], current: Mapping[str, str]) -> str:
    """A sentence on the first digest that differs; empty where all are equal."""
    return next((f"its {part} should have the sha256 {kept[part][:SHOWN]}, and "
                 + (f"{current[part][:SHOWN]} was found" if part in current else f"it has no {part} file")
                 for part in DECISIVE_DIGESTS if part in kept and kept[part] != current.get(part)), "")


def describe_model_conflict(run: Run, base: ModelConfig) -> str:
    """Why this is not the base of a run; empty where it is. Without digests, names are compared."""
    own, kept = load_recipe(run).model, read_digests(run)
    if kept and own.surgery == base.surgery:
        return compare_digests(kept, _find_model(run, base, identify_base).digests)
    return "" if is_same_model(own, base) else f"it was trained on {own.name_or_path!r}"


def is_same_model(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether both name the same weights; PEFT's files may name the folder of an alias."""
    named = (one.name_or_path, one.surgery) == (other.name_or_path, other.surgery)
    return one.revision == other.revision and (named or prepare_folder(one) == prepare_folder(other))


# ---------------------------------------------------------------- the data


def check_data(run: Run, sources: Iterable[Source]) -> None:
    """Compare the data files that a run names with those that it was trained with. Files in its own folder may change,
    except the rows that were given in Python.

    This also keeps a stranger's run folder from reading the user's other files: their digests are not known to it.

    Raises:
        RunError: a file is not the recorded one.
    """
    kept = run.provenance.get("data_sha256") or {}
    for source in sources:
        path = Path(source.path).expanduser()
        if not path.exists():
            continue
        if path.resolve().is_relative_to(run.path.resolve()):
            recorded = {digest for name, digest in kept.items() if Path(name).parts[-2:] == (FOLDER, path.name)}
            if path.parent.name == FOLDER and recorded and compute_path_sha256(path) not in recorded:
                raise RunError(f"the rows {str(path)!r} have changed since the run began",
                               "put the file back as it was, or start another run (output_dir=NAME)")
            continue
        if compute_path_sha256(path) not in kept.values():
            known = str(path.absolute()) in kept
            changed = "has changed since the run began" if known else "is not recorded in its provenance"
            raise RunError(f"{str(run.path)!r} names the rows {source.path!r}, whose content {changed}",
                           "put the file back as it was; or name the rows yourself: --data FILE for evaluate, or start "
                           "another run (output_dir=NAME)")


# ---------------------------------------------------------------- what has changed


def list_changes(run: Run) -> list[str]:
    """Sentences on the files of a finished run that have changed since it ended."""
    kept = run.results.get("digests")
    if not kept:
        return []
    changes = [f"{run.path / name} has changed since the run ended (sha256 {old[:SHOWN]}, now "
               f"{now[:SHOWN] or 'no file'})"
               for name, old in kept["trained"].items()
               if (now := compute_file_sha256(run.path / name) if (run.path / name).exists() else "") != old]
    if compute_json_sha256(run.recipe) != kept["recipe"]:
        changes.append(f"{run.path / 'recipe.yaml'} has changed since the run ended")
    changes += _describe_changed_metrics(run, kept["metrics"], "the run ended")
    if run.recipe and _digest_runs(load_recipe(run)) != (run.provenance.get("runs_sha256") or {}):
        changes.append(f"a run that {run.path / 'recipe.yaml'} names (init_from, objective.reward) was removed, or "
                       f"its weights have changed")
    return changes


def _describe_changed_metrics(run: Run, kept: Mapping[str, Any], since: str) -> list[str]:
    now = digest_metrics(run, kept["bytes"])
    return [] if now == kept else [
        f"{run.path / METRICS} has changed since {since}: its first {kept['bytes']:,} bytes are not those that were "
        "written"]


def check_resumable(run: Run, record: Mapping[str, Any], report: Report) -> None:
    """Compare a run with the record of its newest checkpoint. Raises `RunError` where a change would alter the result;
    reports all other changes."""
    if not record:
        return
    if compute_json_sha256(run.recipe) != record["recipe_sha256"]:
        if lines := diff_recipes(*(_drop_paths(Recipe.parse(raw)) for raw in (record["recipe"], run.recipe))):
            raise RunError(f"{run.path / 'recipe.yaml'} was changed after the checkpoint was written:\n  "
                           + "\n  ".join(lines), "restore these settings, or start another run (output_dir=NAME)")
        report(f"warning: {run.path / 'recipe.yaml'} has changed since the checkpoint; no setting that decides the "
               "result")
    if _digest_runs(Recipe.parse(run.recipe)) != (record["runs_sha256"] or {}):
        raise RunError(f"{str(run.path)!r}: a run that its recipe names (init_from, objective.reward) was removed, or "
                       f"its weights have changed since this run started",
                       "restore it, or start another run (output_dir=NAME)")
    for line in _describe_changed_metrics(run, record["metrics"], "the checkpoint"):
        report(f"warning: {line}")


def check_runs(recipe: Recipe, report: Report) -> None:
    """Check the runs that a recipe names, before anything is loaded. Raises `RunError` or `RecipeError` where the run
    to start from is missing or has another base."""
    if recipe.init_from is None:
        return
    start = Run(recipe.init_from).require_exists()
    if conflict := describe_model_conflict(start, recipe.model):
        raise RecipeError(f"init_from: the run {str(start.path)!r} was trained on another base:\n  model.name_or_path: "
                          f"{load_recipe(start).model.name_or_path!r}, now {recipe.model.name_or_path!r}: {conflict}",
                          "omit model in the recipe, which is then taken from that run; if the base was moved, give "
                          "--base-model PATH (in Python: base_model=PATH)")
    for line in list_changes(start):
        report(f"warning: {line}")


def _drop_paths(recipe: Recipe) -> Recipe:
    """The recipe with file names in place of paths: base, runs and data are compared by digest."""
    base = recipe.model.model_copy(update={"name_or_path": "-"})
    return map_paths(recipe, lambda path: Path(path).name).model_copy(update={"model": base})


def list_differences(run: Run, recipe: Recipe) -> list[str]:
    """The settings in which a recipe differs from the run's own. Settings that it omits are those of the run; paths do
    not depend on the working directory; a base is compared by digest."""
    saved, kept = find_kept_rows(Recipe.parse(run.recipe), run), read_digests(run)
    if not kept:
        saved = _make_absolute(saved)
    known: set[str] = set()
    map_paths(saved, lambda path: known.add(path) or path)  # type: ignore[func-returns-value]
    ours = _make_absolute(fill_left_out(recipe, saved), known)
    conflict = ""
    if kept and ours.model.name_or_path != saved.model.name_or_path:
        conflict = compare_digests(kept, identify_base(ours.model).digests)
        if conflict:
            conflict = f"model.name_or_path: {saved.model.name_or_path!r}, now {ours.model.name_or_path!r}: {conflict}"
        ours = ours.model_copy(update={"model": ours.model.model_copy(update={
            "name_or_path": saved.model.name_or_path, "revision": saved.model.revision})})
    return [*([conflict] if conflict else []), *diff_recipes(saved, ours)]


def _make_absolute(recipe: Recipe, known: Collection[str] = ()) -> Recipe:
    """As `make_paths_absolute`, for a recipe whose files may not exist; `known` are absolute paths that existed."""
    base = recipe.model
    if Path(base.name_or_path).expanduser().exists() and is_local_path(base.name_or_path):
        base = base.model_copy(update={"name_or_path": str(Path(base.name_or_path).expanduser().absolute())})

    def absolute(path: str) -> str:
        place = str(Path(path).expanduser().absolute())
        return place if place in known or Path(place).exists() else path
    return map_paths(recipe, absolute).model_copy(update={"model": base})
