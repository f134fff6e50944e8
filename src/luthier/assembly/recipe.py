"""The recipe: all settings of a run, how they are read, and what can be checked before a model is loaded.

Read `core/config.py` first.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from functools import reduce
from importlib import metadata
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Self, TypeAlias

import yaml
from pydantic import Field, SerializeAsAny, ValidationInfo, field_validator

from luthier.assembly.field_names import accept_peft_names, take_renamed
from luthier.assembly.peft_adapters import read_method
from luthier.core.config import NULL, Config
from luthier.core.digests import compute_path_sha256
from luthier.core.errors import RecipeError, RunError
from luthier.data import TYPES_WITH_ANSWER, DataConfig, Source
from luthier.evaluation.generation_eval import EvaluateConfig
from luthier.methods import METHODS
from luthier.methods.composite import CompositeConfig, list_parts
from luthier.methods.freeze import FreezeConfig
from luthier.methods.full import FullConfig
from luthier.methods.lora import LoraConfig
from luthier.models import ModelConfig
from luthier.objectives import OBJECTIVES, expand_short_form
from luthier.objectives.grpo import GrpoConfig
from luthier.objectives.ppo import PpoConfig
from luthier.training.loop import TrainingConfig
from luthier.training.optimizer import OptimizerConfig
from luthier.training.run_folder import Run

AnyMethod: TypeAlias = Annotated[reduce(or_, METHODS.values(), CompositeConfig),  # type: ignore[valid-type]
                                 Field(discriminator="name")]
AnyObjective: TypeAlias = Annotated[reduce(or_, OBJECTIVES.values()), Field(discriminator="name")]  # type: ignore[valid-type]

# Prefixes of settings that may change when a run is resumed: they do not affect what is learned.
FREE = ("output_dir", "evaluate.", "model.device", "data.test", "method.keep_base", "training.load_best_model_at_end",
        "training.max_tokens_per_micro_batch", "training.gradient_checkpointing", "training.save_steps",
        "training.save_total_limit", "training.load_best_model_at_end", "training.report_to",
        "objective.labels")  # the data has its own digest
SHORT = {  # the field that a plain value sets; elsewhere: name
    "model": "name_or_path", "data": "train", "train": "path", "eval": "path", "test": "path"}

class Recipe(Config):
    """A whole run as data; one-to-one with a YAML file. `data: file.jsonl`, `method: lora` and the like are short for
    `data: {train: file.jsonl}` and `method: {name: lora}`; `method: [bitfit, {name: lora, rank: 4}]` is both."""

    model: ModelConfig = Field(ModelConfig(), description="the pretrained model")
    method: SerializeAsAny[AnyMethod] = Field(LoraConfig(), description="which parameters train")
    objective: SerializeAsAny[AnyObjective] = Field(OBJECTIVES["sft"](), description="the training objective")
    data: DataConfig = Field(description="training, validation and test rows")
    training: TrainingConfig = TrainingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    seed: int = Field(0, ge=0, lt=2**63, description="seed of all random number generators")
    init_from: str | None = Field(None, description="a run to start from: training continues from its adapter, and a "
                                                    "frozen copy is the reference; model and method are those of that "
                                                    "run")
    output_dir: str | None = Field(None, description="the run folder; default: runs/<method>-<base>, with a number if "
                                                     "that exists")

    @classmethod
    def parse(cls, raw: Mapping[str, Any], where: str = "") -> Self:
        """`raw` as a recipe. Raises one `RecipeError` with all errors; for names of other tools it gives ours."""
        raw, renamed = take_renamed(accept_peft_names(raw), _list_fields(raw))
        if not renamed:
            return super().parse(raw, where)
        try:
            super().parse(raw, where)
        except RecipeError as error:
            renamed += error.what.splitlines()
        raise RecipeError("\n".join(renamed), "use the names above; `luthier schema` prints all settings")

    @field_validator("model", "method", "objective", mode="before")
    @classmethod
    def _by_name(cls, given: Any, info: ValidationInfo) -> Any:
        if info.field_name == "method" and isinstance(given, list | tuple):
            if not given:
                raise ValueError("the list of methods is empty; give at least one method")
            given = {"name": "composite", "parts": list(given)} if len(given) > 1 else given[0]
        key = SHORT.get(str(info.field_name), "name")
        if isinstance(given, dict):  # settings without a name are those of the default
            given = {key: dict(cls.model_fields[str(info.field_name)].default)[key], **given}
        given = {key: given} if isinstance(given, str) else given
        return expand_short_form(given) if info.field_name == "objective" and isinstance(given, dict) else given

    @field_validator("data", mode="before")
    @classmethod
    def _by_path(cls, given: Any) -> Any:
        return {"train": given} if isinstance(given, (str, list, tuple)) else given


def _list_fields(raw: Mapping[str, Any]) -> dict[str, frozenset[str]]:
    """The fields of each section of this recipe; of the top level under ""."""
    found: dict[str, type[Config]] = {"": Recipe, "model": ModelConfig, "data": DataConfig, "training": TrainingConfig,
                                      "optimizer": OptimizerConfig, "evaluate": EvaluateConfig}
    for section, table in (("method", METHODS), ("objective", OBJECTIVES)):
        default = Recipe.model_fields[section].default.name
        name = raw[section].get("name", default) if isinstance(raw.get(section), Mapping) else ""
        if config := table.get(str(name)):
            found[section] = config
    return {section: frozenset(config.model_fields) for section, config in found.items()}


def build_recipe(source: str | Path | Mapping[str, Any] | Recipe | None,
                 settings: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe from a file, a mapping or nothing; `settings` (nested, or dotted keys) override it.

    Raises one `RecipeError` with all errors.
    """
    if isinstance(source, Recipe):
        source = dump_recipe(source)
    raw = accept_peft_names(_read_yaml(Path(source)) if isinstance(source, (str, Path)) else source or {})
    for key, value in (settings or {}).items():
        if value is not None:
            accept_peft_names({"method": value} if key == "method" else {})  # refuses a setting that is given twice
            raw = accept_peft_names(_override(raw, key.split("."), None if value is NULL else value), override=True)
    return _keep_reference(_check_answers(Recipe.parse(_apply_init_from(raw))))


def _check_answers(recipe: Recipe) -> Recipe:
    """Returns the recipe. Raises `RecipeError` for metrics of generated answers if the rows have no prompts."""
    if recipe.evaluate.metrics and not recipe.objective.example_types & TYPES_WITH_ANSWER:
        raise RecipeError(f"evaluate.metrics {', '.join(recipe.evaluate.metrics)}: these score generated answers, and "
                          f"the rows of objective {recipe.objective.name!r} have no prompts",
                          "omit evaluate.metrics; the objective's own metrics are always computed")
    return recipe


def _keep_reference(recipe: Recipe) -> Recipe:
    """The recipe with `method.keep_base` resolved."""
    if not isinstance(recipe.method, FullConfig | FreezeConfig) or recipe.method.keep_base is not None:
        return recipe
    keep = needs_reference(recipe.objective) and not precomputes_reference(recipe)
    return recipe.model_copy(update={"method": recipe.method.model_copy(update={"keep_base": keep})})


def needs_reference(objective: AnyObjective) -> bool:
    """Whether the objective needs a reference model."""
    asks: frozenset[str] = objective.rollout_outputs if isinstance(objective, PpoConfig | GrpoConfig) else frozenset()
    return "reference_logps" in objective.required_outputs | asks


def precomputes_reference(recipe: Recipe) -> bool:
    """Whether the reference log-probabilities are computed once, before training."""
    return bool(recipe.objective.model_dump().get("precompute_reference"))


def _apply_init_from(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """With `init_from`, the recipe takes base and method from that run, unless it sets them."""
    start = raw.get("init_from")
    if start is None or {"model", "method"} <= raw.keys():
        return raw
    found = dump_recipe(load_recipe(require_adapter(Run(str(start)))))
    return {"model": found["model"], "method": found["method"], **raw}


def require_adapter(run: Run) -> Run:
    """Returns the run. Raises `RecipeError` if it cannot be a starting point."""
    if run.require_exists().adapter is None:
        raise RecipeError(f"{str(run.path)!r} holds a full model or is not finished; init_from needs a run with an "
                          f"adapter",
                          f"use a full model as the base: model.name_or_path={run.path}")
    return run


def load_recipe(run: Run) -> Recipe:
    """The recipe of a run; for folders of PEFT or Transformers, the settings that can be read from the folder."""
    if raw := run.recipe:
        return Recipe.parse(raw)
    adapter = run.adapter
    if adapter is None:
        return Recipe(model=ModelConfig(name_or_path=str(run.path)), data=DataConfig.parse({"train": "-"}))
    if not adapter.get("base_model_name_or_path"):
        raise RunError(f"{str(run.path / 'adapter_config.json')!r} names no base (base_model_name_or_path)",
                       "write the hub id or folder of the base into it")
    base = ModelConfig(name_or_path=adapter["base_model_name_or_path"], revision=adapter.get("revision"))
    return Recipe.parse({"model": base.model_dump(), "method": read_method(adapter, run), "data": "-"})


def _read_yaml(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise RecipeError(f"the recipe {str(path)!r} is a folder",
                          "give a YAML file; to continue a run: luthier train --resume RUN")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8-sig"), _YamlLoader)
    except FileNotFoundError:
        near = sorted(str(p) for folder in (path.parent, Path("recipes")) for p in folder.glob("*.y*ml"))
        raise RecipeError(f"recipe {str(path)!r} not found", f"recipes here: {', '.join(near) or 'none'}") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"the recipe {str(path)!r} cannot be read: {error}",
                          "fix the YAML at the given line; training rows are given with --data") from None
    if not isinstance(raw, dict):
        held = "is empty" if raw is None else f"holds a {type(raw).__name__}, not settings"
        raise RecipeError(f"the recipe {str(path)!r} {held}", "write lines such as `method: lora`")
    return {key: value for key, value in raw.items() if key != "provenance"}


class _YamlLoader(yaml.SafeLoader):
    """Plain YAML. A duplicate key is an error, because the second value would replace the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} occurs twice",
                                                        key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


def _override(raw: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """`raw` with `value` at a dotted path. Short forms on the path (``method: lora``) are expanded, mappings are
    merged, and an empty mapping clears."""
    first, *rest = path
    old: Any = raw.get(first) or {}
    if first == "method" and isinstance(old, list):
        return {**raw, first: _override_in_list(old, rest, value) if rest else value}
    if isinstance(old, str) or (first == "data" and isinstance(old, list)):
        old = {SHORT.get(first, "name"): old} if rest or isinstance(value, dict) else old
    if first == "method" and len(rest) > 1 and rest[0] == old.get("name", LoraConfig().name):
        rest = rest[1:]  # method.lora.rank, the form for a list of methods
    if rest:
        return {**raw, first: _override(old, rest, value)}
    if value and isinstance(value, dict) and isinstance(old, dict):
        for key, inner in value.items():
            old = _override(old, [key], inner)
        return {**raw, first: old}
    if first == "data" and isinstance(old, dict) and isinstance(value, (str, list)):
        return {**raw, first: {**old, "train": value}}
    return {**raw, first: value}


def _override_in_list(methods: list[Any], path: Sequence[str], value: Any) -> list[Any]:
    """A list of methods with `value` at ``<method>.<setting>``."""
    spelt = [{"name": part} if isinstance(part, str) else dict(part) for part in methods]
    names = [str(part.get("name", LoraConfig().name)) for part in spelt]
    if path[0] not in names or len(path) < 2:
        raise RecipeError(f"method.{'.'.join(path)}: the recipe has a list of methods, {', '.join(names)}",
                          f"name the method, such as method.{names[0]}.{path[-1]}")
    return [_override(part, path[1:], value) if name == path[0] else part for name,
            part in zip(names, spelt, strict=True)]


def compute_default_learning_rate(recipe: Recipe) -> float:
    """The default learning rate: the method's default (for instruction tuning) times the objective's factor."""
    return float(recipe.method.default_learning_rate * recipe.objective.learning_rate_factor)


def describe_learning_rate(recipe: Recipe) -> str:
    """The peak learning rate as text, with its origin."""
    if recipe.optimizer.learning_rate is not None:
        return f"{recipe.optimizer.learning_rate:g} (optimizer.learning_rate)"
    factor = recipe.objective.learning_rate_factor
    times = f" times {factor:g} for {recipe.objective.name}" if factor != 1 else ""
    return (f"{compute_default_learning_rate(recipe):g} (the default: {recipe.method.default_learning_rate:g} of "
            f"{get_method_name(recipe)}{times})")


def get_method_name(recipe: Recipe) -> str:
    """The name of the run's method: ``lora``, or ``bitfit+lora`` for a list."""
    return "+".join(part.name for part in list_parts(recipe.method))


def dump_recipe(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain data for YAML, with every setting."""
    return recipe.model_dump(mode="json")


def list_unused_settings(recipe: Recipe) -> list[str]:
    """Settings that have no effect or an unwanted one, each with the reason."""
    training, found = recipe.training, []
    evaluates = recipe.data.eval is not None
    if training.early_stopping_patience and not evaluates:
        found.append("training.early_stopping_patience has no effect: there are no validation rows (data.eval)")
    if training.eval_steps and not evaluates:
        found.append("training.eval_steps has no effect: there are no validation rows (data.eval)")
    if training.max_steps and recipe.optimizer.count_warmup_steps(training.max_steps) >= training.max_steps:
        found.append("optimizer.learning_rate is never reached: the warm-up is as long as the run "
                     f"({training.max_steps} steps)")
    if training.max_steps and "num_train_epochs" in training.model_fields_set and training.num_train_epochs != 1.0:
        found.append("training.num_train_epochs has no effect: training.max_steps is set")
    if recipe.evaluate.metrics and not evaluates and recipe.data.test is None:
        found.append("evaluate.metrics has no effect: there are no rows with prompts (data.test or data.eval)")
    structure = recipe.model.surgery
    names = {m.name for m in list_parts(recipe.method)}
    if structure and structure.new_tokens and not {"full", "freeze",
                                                   "peft"} & names:
        found.append(f"model.surgery.new_tokens: {get_method_name(recipe)} does not train embeddings, so the new "
                     f"tokens keep their initial embeddings")
    if recipe.objective.is_online and any(method.model_dump().get("dropout") for method in list_parts(recipe.method)):
        found.append(f"method.dropout: objective {recipe.objective.name!r} generates without dropout and trains with "
                     f"it: the first step of a rollout is already off-policy")
    if recipe.data.loss_on != "assistant" and recipe.objective.name == "pretrain":
        found.append("data.loss_on has no effect on documents (objective pretrain)")
    return found


def diff_recipes(old: Recipe, new: Recipe) -> list[str]:
    """The settings that differ, each as ``optimizer.learning_rate: 0.001, now 0.01``, except those in `FREE`."""
    before, now = flatten_recipe(old), flatten_recipe(new)
    weights = "objective.class_weights"  # `balanced` becomes numbers later, and is compared then
    free = (*FREE, weights) if now.get(weights) == "balanced" else FREE
    return [f"{key}: {before.get(key)!r}, now {now.get(key)!r}" for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and not key.startswith(free)]


def flatten_recipe(recipe: Recipe) -> dict[str, Any]:
    """A recipe as dotted keys and values."""
    return _flatten(dump_recipe(recipe))


def _flatten(nested: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Dotted keys to values."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        if path + key == "method" and isinstance(value, list):
            value = {part["name"]: part for part in value}
        found |= _flatten(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
    return found


def collect_provenance(recipe: Recipe) -> dict[str, Any]:
    """Versions, and digests of the data files."""
    paths = [Path(source.path) for source in list_sources(recipe)]
    packages = ("luthier", "torch", "transformers", "tokenizers", "safetensors", "datasets")
    return {
        "versions": {"python": platform.python_version(), **{name: get_version(name) for name in packages}},
        "data_sha256": {str(path): compute_path_sha256(path) for path in paths if path.exists()},
    }


def list_sources(recipe: Recipe, *parts: str) -> list[Source]:
    """The sources of rows that a recipe names, of these parts (`train`, `eval`, `test`) or of all."""
    named = {"train": recipe.data.train, "eval": (recipe.data.eval,), "test": (recipe.data.test,)}
    return [source for part in parts or named for source in named[part] if isinstance(source, Source)]


def get_version(package: str) -> str:
    """The version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "from source"
