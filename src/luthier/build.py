"""Names to objects: the only module that sees every axis. Assembly is a straight line; each line feeds the next.

    recipe -> base -> family -> method attached -> data -> feed

Read `core/protocols.py` first. A verb calls these functions; nothing here trains, prints or writes.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from functools import reduce
from importlib import metadata
from operator import or_
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import torch
import yaml
from pydantic import Field, SerializeAsAny, ValidationInfo, field_validator
from safetensors.torch import load_file, save_file

from luthier import data as rows
from luthier.core.config import Config
from luthier.core.errors import RecipeError, RunError
from luthier.core.examples import ChatExample, CompletionExample, Example, Message, Origin, TextExample
from luthier.core.protocols import Attached, Family, Feed, Objective
from luthier.core.types import Batch
from luthier.data import DataConfig, Datasets, Loader, Stream
from luthier.families import ALIASES, BaseConfig, CausalLM, cache, folder, load, load_tokenizer, resolve
from luthier.measure import EvaluateConfig, Question
from luthier.methods import METHODS
from luthier.methods.lora import LoraConfig
from luthier.methods.several import Several
from luthier.objectives import OBJECTIVES
from luthier.runtime.loop import TrainingConfig
from luthier.runtime.optim import OptimizerConfig
from luthier.runtime.run import Run, digest

__all__ = ["ALIASES", "BaseConfig", "CausalLM", "Recipe", "Run", "attach", "cache", "changed", "chat_prompt", "check",
           "datasets", "dump", "family", "feed", "fitted", "held_out", "idle", "micro_tokens", "open_run", "provenance",
           "questions", "recipe", "resolve", "rows", "save_tuned", "tokenizer", "version",
           "with_heads"]

AnyMethod: TypeAlias = Annotated[reduce(or_, METHODS.values()), Field(discriminator="name")]  # type: ignore[valid-type]
AnyObjective: TypeAlias = Annotated[reduce(or_, OBJECTIVES.values()), Field(discriminator="name")]  # type: ignore[valid-type]

# The beginnings of settings that a run may change when it goes on: they decide nothing about what is learned.
FREE = ("run", "evaluate.", "base.device", "data.test", "training.micro_tokens", "training.gradient_checkpointing",
        "training.save_every", "training.keep", "training.trackers",
        "objective.labels")  # the last is read off the data, whose own fingerprint is compared

HEADS = "heads.safetensors"  # beside a whole model's weights; an adapter keeps them among its own


class Recipe(Config):
    """A whole run as data; one-to-one with a YAML file. `data: file.jsonl`, `method: lora` and the like are short for
    `data: {train: file.jsonl}` and `method: {name: lora}`."""

    base: BaseConfig = Field(BaseConfig(), description="the pretrained model")
    method: SerializeAsAny[AnyMethod] = Field(LoraConfig(), description="which parameters train")
    objective: SerializeAsAny[AnyObjective] = Field(OBJECTIVES["sft"](), description="what is minimised")
    data: DataConfig = Field(description="what is trained and evaluated on")
    training: TrainingConfig = TrainingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    seed: int = Field(0, ge=0, description="of everything random")
    run: str | None = Field(None, description="the run folder; left out: runs/<method>-<base>, numbered")

    @field_validator("base", "method", "objective", mode="before")
    @classmethod
    def _by_name(cls, given: Any, info: ValidationInfo) -> Any:
        if isinstance(given, dict):  # settings without a name are those of the default
            return {"name": cls.model_fields[str(info.field_name)].default.name, **given}
        return {"name": given} if isinstance(given, str) else given

    @field_validator("data", mode="before")
    @classmethod
    def _by_path(cls, given: Any) -> Any:
        return {"train": given} if isinstance(given, (str, list, tuple)) else given


# ---------------------------------------------------------------- recipes


def recipe(source: str | Path | Mapping[str, Any] | Recipe | None, settings: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe from a file, a mapping or nothing, with `settings` (nested, or dotted keys) laid over it.

    Raises one `RecipeError` that names every fault.
    """
    if isinstance(source, Recipe):
        source = dump(source)
    raw = _read(Path(source)) if isinstance(source, (str, Path)) else dict(source or {})
    for key, value in (settings or {}).items():
        if value is not None:
            raw = _laid(raw, key.split("."), value)
    return Recipe.parse(raw)


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = sorted(str(p) for p in Path("recipes").glob("*.yaml"))
        raise RecipeError(f"there is no recipe {str(path)!r}", f"recipes here: {', '.join(near) or 'none'}") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"the recipe {str(path)!r} cannot be read: {error}",
                          "mend the YAML at the place named") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"the recipe {str(path)!r} holds a {type(raw).__name__}, not settings",
                          "write lines such as `method: lora`")
    return {key: value for key, value in raw.items() if key != "provenance"}


def _laid(raw: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """`raw` with `value` at the dotted place; a short form on the way (``method: lora``) is spelt out."""
    first, *rest = path
    old = raw.get(first, {})
    if isinstance(old, (str, list)) and (rest or isinstance(value, dict)):
        old = {"train" if first == "data" else "name": old}
    if rest:
        return {**raw, first: _laid(old, rest, value)}
    if isinstance(value, dict) and isinstance(old, dict):
        for key, inner in value.items():
            old = _laid(old, [key], inner)
        return {**raw, first: old}
    if first == "data" and isinstance(old, dict) and isinstance(value, (str, list)):
        return {**raw, first: {**old, "train": value}}
    return {**raw, first: value}


def dump(made: Recipe) -> dict[str, Any]:
    """A recipe as YAML can hold it, every setting spelt out."""
    return made.model_dump(mode="json")


def idle(made: Recipe) -> list[str]:
    """Settings that were given and have no effect, each with the reason."""
    training, found = made.training, []
    evaluates = made.data.eval is not None
    if training.patience and not evaluates:
        found.append("training.patience has no effect: there is nothing to evaluate on (data.eval)")
    if training.eval_every and not evaluates:
        found.append("training.eval_every has no effect: there is nothing to evaluate on (data.eval)")
    if training.steps and "epochs" in training.model_fields_set and training.epochs != 1.0:
        found.append("training.epochs has no effect: training.steps is given")
    if made.evaluate.metrics and not evaluates and made.data.test is None:
        found.append("evaluate.metrics has no effect: there are no rows to answer (data.test or data.eval)")
    if made.data.train_on != "assistant" and made.objective.name == "pretrain":
        found.append("data.train_on has no effect on documents (objective pretrain)")
    return found


def changed(old: Recipe, new: Recipe) -> list[str]:
    """The settings that differ, each as ``optimizer.learning_rate: 0.001, now 0.01``, but for those in `FREE`."""
    before, now = _flat(dump(old)), _flat(dump(new))
    return [f"{key}: {before.get(key)!r}, now {now.get(key)!r}" for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and not key.startswith(FREE)]


def _flat(nested: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Dotted keys to values."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        found |= _flat(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
    return found


def provenance(made: Recipe) -> dict[str, Any]:
    """What the recipe alone does not say: versions and the digests of the data files."""
    named = [*made.data.train, made.data.eval, made.data.test]
    paths = [Path(s.path) for s in named if s is not None and not isinstance(s, float)]
    packages = ("luthier", "torch", "transformers", "tokenizers", "safetensors", "datasets")
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "data_sha256": {str(path): digest(path) for path in paths if path.exists()},
    }


def version(package: str) -> str:
    """Of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "from source"


# ---------------------------------------------------------------- objects


def family(config: BaseConfig) -> CausalLM:
    """The base, loaded."""
    model, tokenizer = load(config)
    return CausalLM(model, tokenizer)


def tokenizer(config: BaseConfig) -> Any:
    """The base's tokenizer, without its weights."""
    return load_tokenizer(config)


def attach(base: CausalLM, method: AnyMethod, seed: int) -> Attached:
    """The method on the base; everything that it does not train is frozen."""
    base.model.requires_grad_(False)
    return method.attach(base.anatomy, seed=seed)


def with_heads(base: Family, attached: Attached, objective: Objective, seed: int) -> Attached:
    """The method together with what the objective adds to the base's states."""
    return Several([attached, base.add(objective.heads, seed)]) if objective.heads else attached


def fitted(made: Recipe, found: Datasets) -> Recipe:
    """The recipe with its objective made for the classes in the training rows. Raises `RecipeError` where the rows mean
    nothing to it."""
    strange = found.kinds - made.objective.reads
    if strange:
        raise RecipeError(f"objective {made.objective.name!r} cannot learn from {', '.join(sorted(strange))}: it reads "
                          f"{', '.join(sorted(made.objective.reads))}",
                          "choose an objective for these rows: " + ", ".join(
                              name for name, known in OBJECTIVES.items() if found.kinds <= known.reads))
    return made.model_copy(update={"objective": made.objective.fitted(found.labels)})


def check(made: Recipe, base: CausalLM) -> None:
    """What can only be known once the base is loaded. Raises `RecipeError`."""
    if made.data.streaming and not made.training.steps:
        raise RecipeError("data.streaming: nobody knows how many rows an epoch has", "say how long: training.steps")
    context = base.anatomy.sizes["context"]
    if made.data.max_length > context:
        raise RecipeError(f"data.max_length {made.data.max_length} is longer than the base's context, {context} tokens",
                          f"set data.max_length to {context} or less")


def datasets(made: Recipe, base: CausalLM, progress: Any = None) -> Datasets:
    """Everything the recipe trains and evaluates on."""
    return rows.load(made.data, base.tokenizer, seed=made.seed, progress=progress)


def micro_tokens(made: Recipe, device: torch.device) -> int:
    """Tokens in memory at once: small rows keep a CPU's caches and memory small, a GPU wants large products."""
    return made.training.micro_tokens or (8192 if device.type == "cuda" else 384)


def feed(made: Recipe, base: CausalLM, found: Datasets) -> Feed:
    """The batches of the run."""
    micro = micro_tokens(made, base.device)
    if made.data.streaming:
        return Stream(made.data, base.tokenizer, made.training.batch_size, micro, seed=made.seed)
    return Loader(found.train, made.training.batch_size, micro, shuffle=made.data.shuffle, seed=made.seed,
                  mix=found.mix)


def held_out(made: Recipe, base: CausalLM, found: Datasets) -> list[Batch]:
    """The rows to evaluate on while training."""
    return rows.eval_batches(found.eval, micro_tokens(made, base.device))


def questions(made: Recipe, base: CausalLM, examples: Sequence[Example]) -> list[Question]:
    """Prompts and right answers of test rows."""
    found = []
    for example in examples[:made.evaluate.limit]:
        ids, reference = rows.prompt_of(example, base.tokenizer, made.data)
        found.append(Question(tuple(ids), _asked(example), reference))
    return found


def _asked(example: Example) -> str:
    """What a person would say was asked."""
    if isinstance(example, ChatExample):
        return next((m.content for m in reversed(example.messages) if m.role != "assistant"), "")
    if isinstance(example, CompletionExample):
        return example.prompt
    return example.text if isinstance(example, TextExample) else ""


def chat_prompt(base: CausalLM, messages: Sequence[Message], system: str | None) -> list[int]:
    """Token ids of a conversation that ends with the user's turn, up to where the answer begins."""
    opened = ([Message("system", system)] if system and messages[0].role != "system" else []) + list(messages)
    example = ChatExample((*opened, Message("assistant", "")), Origin("chat", 1))
    return rows.prompt_of(example, base.tokenizer, DataConfig.parse({"train": "-"}))[0]


# ---------------------------------------------------------------- runs


def open_run(run: Run) -> tuple[Recipe, CausalLM, Attached | None]:
    """What a run folder holds: its recipe, its base, and the method with its trained weights.

    The folder may have been made by PEFT (then the recipe is read off its adapter_config.json), or be a whole model
    (then there is no method to attach). The name of a base in place of a folder is such a whole model.
    """
    if _names_base(run.path):
        bare = Recipe(base=BaseConfig(name=str(run.path)), data=DataConfig.parse({"train": "-"}))
        return bare, family(bare.base), None
    run.existing()
    made = _recipe_of(run)
    if run.adapter is None:
        if not (run.path / "config.json").exists():
            raise RunError(f"the run {str(run.path)!r} has not ended, so there is nothing trained in it yet",
                           f"go on with it: luthier train --resume {run.path}")
        base = family(made.base.model_copy(update={"name": str(run.path)}))
        if made.objective.heads:
            base.add(made.objective.heads, made.seed).load(load_file(run.path / HEADS))
        return made, base, None
    base = family(made.base)
    attached = with_heads(base, attach(base, made.method, made.seed), made.objective, made.seed)
    attached.load(_adapter_weights(run))
    return made, base, attached


def _names_base(path: Path) -> bool:
    """Whether this is a base's name: an alias, a file, or owner/name where no folder `owner` is (a run, else)."""
    if path.is_dir():
        return False
    return str(path) in ALIASES or path.is_file() or (len(path.parts) == 2 and path.parts[0] not in ("/", "..", "~")
                                                      and not path.parent.is_dir())


def _recipe_of(run: Run) -> Recipe:
    if raw := run.recipe:
        return Recipe.parse(raw)
    if (adapter := run.adapter) is not None:
        if adapter.get("peft_type") != "LORA":
            raise RunError(f"{str(run.path)!r} holds PEFT's {adapter.get('peft_type')} adapter; only LORA can be read",
                           "give a run of Luthier, or a LoRA of PEFT")
        base = BaseConfig(name=adapter["base_model_name_or_path"] or "")
        return Recipe(base=base, method=LoraConfig.from_peft(adapter), data=DataConfig.parse({"train": "-"}))
    return Recipe(base=BaseConfig(name=str(run.path)), data=DataConfig.parse({"train": "-"}))


def _adapter_weights(run: Run) -> dict[str, torch.Tensor]:
    file = run.path / "adapter_model.safetensors"
    if not file.exists():
        raise RunError(f"{str(run.path)!r} has an adapter_config.json but no adapter_model.safetensors",
                       "resume the run (--resume) so that it ends, or convert adapter_model.bin to safetensors")
    return load_file(file)


def save_tuned(run: Run, made: Recipe, base: CausalLM, attached: Attached) -> None:
    """Write the trained weights as Transformers and PEFT read them, and the tokenizer."""
    config = attached.peft()
    if config is None:
        base.save(run.path)
        if heads := base.heads.state():
            save_file(heads, run.path / HEADS, metadata={"format": "pt"})
        return
    state = {name: tensor.contiguous().cpu() for name, tensor in attached.state().items()}
    file = run.path / "adapter_model.safetensors"
    save_file(state, file, metadata={"format": "pt"})
    file.chmod(run.path.stat().st_mode & 0o666)  # the library makes its files readable to their owner alone
    # PEFT loads the base by this name: a hub id as it is, anything else as the Transformers folder that it became.
    name = made.base.name if isinstance(resolve(made.base.name), str) else str(folder(made.base))
    run.write("adapter_config.json", {**config, "base_model_name_or_path": name, "revision": made.base.revision})
    base.tokenizer.save_pretrained(run.path)
