"""Loads a run folder into a recipe, a model and a tuner, and saves them. Read `factory.py` first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from luthier import data as rows
from luthier.assembly.factory import PromptFormat, attach_heads, attach_method, load_family, resolve_data_config
from luthier.assembly.peft_adapters import HEADS, drop_base_weights, load_adapter_weights
from luthier.assembly.provenance import BASE_FILE, Report, describe_base, ignore, open_recipe
from luthier.assembly.recipe import Recipe, dump_recipe
from luthier.assembly.settings import make_public
from luthier.core.errors import BaseError, RunError
from luthier.core.protocols import TRAINING, ChatFormat, Family, Objective, Tuner
from luthier.data import DataConfig
from luthier.methods.adapter_format import NATIVE_TYPE, PEFT_PREFIX
from luthier.methods.composite import CompositeMethod
from luthier.methods.freeze import FreezeConfig
from luthier.methods.peft_settings import make_alphas_integers
from luthier.methods.plain_lora import fold_into_plain_lora
from luthier.models import (
    ALIASES,
    ModelConfig,
    get_public_name,
    list_weight_files,
    make_embedding_tokenizer,
    prepare_folder,
    read_stored_dtype,
    read_weights,
    resolve_name,
    write_sentence_files,
)
from luthier.objectives.rl_config import OnlineRLConfig
from luthier.training.run_folder import Run

STOPS = "generation_config.json"  # in an adapter's folder: the tokens that end a turn
NAMES_OF_MODULES = ("target_modules", "target_parameters", "feedforward_modules", "rank_pattern", "alpha_pattern")
VIRTUAL = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")  # PEFT types with virtual tokens


def open_run(run: Run, whole: bool = False, base_model: Path | str | None = None,
             report: Report = ignore) -> tuple[Recipe, Family, Tuner | None]:
    """Load a run folder: its recipe, its base model, and the method with its trained weights.

    The folder may be a PEFT adapter (the recipe is then read from adapter_config.json) or a full model (without a
    method to attach). A base model's name is treated as a full model.

    Args:
        whole: load the base unquantized, even if the run was trained on a quantized base.
        base_model: where the base is now, if it was moved; it must be the one that the run was trained on.
        report: called with a sentence for everything that has changed since the run was made.

    Raises `BaseError` where the base is not the one that the run was trained on (see `provenance.py`).
    """
    if _is_model_name(run.path):
        if base_model is not None:
            raise RunError(f"{str(run.path)!r} is itself a base model", "omit the base model (--base-model)")
        bare = Recipe(model=ModelConfig(name_or_path=str(run.path)), data=DataConfig.parse({"train": "-"}))
        return bare, load_family(bare.model), None
    run.require_exists()
    recipe = open_recipe(run, base_model, report)
    if whole and recipe.model.quantize != "none":
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"quantize": "none"})})
    if run.adapter is None:
        if not (run.path / "config.json").exists():
            raise RunError(f"the run {str(run.path)!r} is not finished and has no trained weights yet",
                           f"continue it: luthier train --resume {run.path}")
        # it is already in the weights
        base = load_family(recipe.model.model_copy(update={"name_or_path": str(run.path),
                                                    "surgery": None}),
                           recipe.objective.uses_masking)
        if has_saved_heads(recipe.objective):
            base.add_heads(recipe.objective.heads, recipe.seed).load(_read_full_model_heads(run, base))
        return recipe, base, None
    base = load_family(recipe.model, recipe.objective.uses_masking)
    _restore_chat_format(run, base)
    method = recipe.method
    if isinstance(method, FreezeConfig):  # the base is here, so it can be restored
        method = method.model_copy(update={"keep_base": True})
    tuner = attach_method(base, method, recipe.seed)
    if has_saved_heads(recipe.objective):
        tuner = attach_heads(base, tuner, recipe.objective, recipe.seed)
    saved = rename_weights(load_adapter_weights(run, base.structure), tuner.state(), base)
    tuner.load(drop_base_weights(saved, tuner.state(), base.structure.model))
    return recipe, base, tuner


def _restore_chat_format(run: Run, base: Family) -> None:
    """The chat template and the stop tokens that the run was trained with, if its rows were conversations."""
    if not base.can_generate or not (run.path / STOPS).is_file():
        return
    template = run.path / "chat_template.jinja"
    if isinstance(base.tokenizer.chat_template, str) and template.is_file():
        base.tokenizer.chat_template = template.read_text(encoding="utf-8")
    template, stops = rows.get_saved_chat_template(base.tokenizer), rows.find_stop_tokens(base.tokenizer)
    base.chat_format = ChatFormat(template, stops, trained=True)


def build_prompt_format(run: Run, recipe: Recipe) -> PromptFormat:
    """How prompts of a run or a base model are rendered. Runs on conversations keep their stop tokens; for folders of
    other tools nothing is known, so they are prompted like a base model."""
    known = bool(run.recipe) and run.adapter is not None
    return PromptFormat(recipe.data, not known or (run.path / STOPS).is_file())


def has_saved_heads(objective: Objective) -> bool:
    """Whether a run is saved with its objective's heads. A critic is needed for training only."""
    return bool(objective.heads) and not isinstance(objective, OnlineRLConfig)


def _is_model_name(path: Path) -> bool:
    """Whether this names a base model: an alias, a file, or owner/name where no folder `owner` exists."""
    if path.is_dir():
        return False
    return str(path) in ALIASES or path.is_file() or (len(path.parts) == 2 and path.parts[0] not in ("/", "..", "~")
                                                      and not path.parent.is_dir())


def _read_full_model_heads(run: Run, base: Family) -> dict[str, torch.Tensor]:
    """The heads of a full model, by their names in an adapter's file. Heads that Transformers' class has are among the
    model's weights, others in a file of their own."""
    found = load_file(run.path / HEADS) if (run.path / HEADS).exists() else {}
    names = [name.removeprefix(PEFT_PREFIX) for name in base.heads.state() if name not in found]
    return found | {PEFT_PREFIX + name: tensor for name, tensor in read_weights(names,
                                                                                list_weight_files(run.path)).items()}


def rename_weights(saved: Mapping[str, torch.Tensor], names: Iterable[str], base: Family) -> dict[str, torch.Tensor]:
    """The tensors of an adapter's file, by the names of this model.

    A stack has one part more in its names under a head than alone, and a file is named after the model that others load
    it on: a classifier's for a run with classes, the stack alone for embeddings.
    """
    homes = {f"{base.structure.model.base_model_prefix}.", base.backbone_prefix} - {""}
    if base.heads.task_head is not None:
        homes.add(base.heads.task_head.backbone_prefix)

    def others(name: str) -> list[str]:
        rest = name.removeprefix(PEFT_PREFIX)
        stem = next((rest.removeprefix(home) for home in homes if rest.startswith(home)), rest)
        return [name, PEFT_PREFIX + stem, *(PEFT_PREFIX + home + stem for home in sorted(homes))]

    there = {next((other for other in others(name) if other in saved), name): name for name in names}
    return {there.get(name, name): tensor for name, tensor in saved.items()}


def is_embedding_objective(objective: Objective) -> bool:
    """Whether the run computes text embeddings."""
    return objective.required_outputs == frozenset({"pooled"})


def save_full_model(run: Run, recipe: Recipe, base: Family) -> None:
    """Write the model in its current state. Heads that Transformers' class has are part of it; other heads and scalars
    go to a file of their own, which the recipe explains."""
    base.save(run.path)
    _save_embedding(run, recipe, base)
    if not has_saved_heads(recipe.objective):
        return
    inside = base.heads.task_head.weights() if base.heads.task_head is not None else {}
    if heads := {name: tensor for name, tensor in base.heads.state().items()
                 if name.removeprefix(PEFT_PREFIX) not in inside}:
        save_file(heads, run.path / HEADS, metadata={"format": "pt"})
    if not run.recipe:
        run.write("recipe.yaml", yaml.safe_dump(dump_recipe(make_public(recipe)), sort_keys=False, allow_unicode=True))


def resolve_saved_dtype(recipe: Recipe, base: Family) -> torch.dtype:
    """The default dtype of an exported model: that of the base's files, or of the loaded model if they do not exist."""
    try:
        return read_stored_dtype(recipe.model)
    except BaseError:
        weight = base.structure.embedding.weight
        assert isinstance(weight, torch.Tensor)
        return weight.dtype


def _save_embedding(run: Run, recipe: Recipe, base: Family) -> None:
    """Write the files of Sentence Transformers for a run that computes text embeddings."""
    is_text_encoder = not base.is_encoder_decoder and "channels" not in base.structure.sizes
    if is_embedding_objective(recipe.objective) and is_text_encoder:
        make_embedding_tokenizer(base.tokenizer).save_pretrained(run.path)
        write_sentence_files(run.path, base.structure.sizes["hidden"], base.pooling,
                             max_length=resolve_data_config(recipe, base).max_length, normalize=True)


def save_tuned(run: Run, recipe: Recipe, base: Family, tuner: Tuner, public: bool = False) -> None:
    """Write the trained weights as Transformers and PEFT read them, and the tokenizer.

    `public`: adapter_config.json names the base by its hub id or bare name, else by a path that PEFT loads here; and
    base_model.json holds the base's digests.
    """
    if isinstance(recipe.objective, OnlineRLConfig) and recipe.objective.heads:
        assert isinstance(tuner, CompositeMethod), "the critic is a separate part"
        tuner = tuner.parts[0]
    config = tuner.get_peft_config()
    if config is None:
        save_full_model(run, recipe, base)
        return
    state = {name: tensor.contiguous().cpu() for name, tensor in tuner.state().items()
             if not name.startswith(TRAINING)}
    if scalars := {PEFT_PREFIX + name: state.pop(PEFT_PREFIX + name) for name in base.heads.scalars}:
        save_file(scalars, run.path / HEADS, metadata={"format": "pt"})
    state, config = _rename_for_loading(state, config, recipe, base)
    file = run.path / "adapter_model.safetensors"
    save_file(state, file, metadata={"format": "pt"})
    file.chmod(run.path.stat().st_mode & 0o666)  # safetensors makes its files readable by the owner only
    name = name_base(recipe.model, public)
    run.write("adapter_config.json", {**make_alphas_integers(config), "base_model_name_or_path": name,
                                      "revision": recipe.model.revision})
    if public:
        run.write(BASE_FILE, describe_base(recipe.model))
    base.get_padded_tokenizer().save_pretrained(run.path)
    base.save_generation_config(run.path)
    # Sentence Transformers loads adapters by Transformers, which reads neither DoRA's nor AdaLoRA's own weights.
    if config["peft_type"] not in (NATIVE_TYPE, *VIRTUAL, "ADALORA") and not config.get("use_dora"):
        _save_embedding(run, recipe, base)


def name_base(config: ModelConfig, public: bool = False) -> str:
    """The name by which PEFT loads the base: a hub id unchanged, anything else as its Transformers folder. `public`:
    the hub id or the folder's name, without a local path."""
    if public:
        return get_public_name(config) if config.surgery is None else prepare_folder(config).name
    hub = config.surgery is None and isinstance(resolve_name(config.name_or_path), str)
    return config.name_or_path if hub else str(prepare_folder(config).absolute())


def convert_to_plain_lora(base: Family, tuner: Tuner, rank: int | None) -> Tuner:
    """A LoRA or AdaLoRA as a plain LoRA of one rank, together with the heads. It is attached only to be saved. Raises
    as `fold_into_plain_lora` does, and for composite methods."""
    parts = list(tuner.parts) if isinstance(tuner, CompositeMethod) else [tuner]
    forms = [part.get_peft_config() or {} for part in parts]
    heads = [part for part, form in zip(parts, forms, strict=True) if form.get("peft_type", "") is None]
    tuned = [part for part in parts if part not in heads]
    if len(tuned) > 1:
        raise RunError("a list of methods cannot be written as a plain LoRA", "omit --lora-rank, or export with --to "
                                                                              "merged")
    config, state = fold_into_plain_lora(tuned[0], rank)
    found = config.attach(base.structure, seed=0)
    found.load(state)
    return CompositeMethod([found, *heads]) if heads else found


def _rename_for_loading(state: dict[str, torch.Tensor], config: dict[str, Any], recipe: Recipe,
                        base: Family) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights and config by the names of the model that other libraries load the adapter on (see `rename_weights`)."""
    own, home = base.heads.task_head, base.backbone_prefix
    if own is None and (not is_embedding_objective(recipe.objective) or base.is_encoder_decoder):
        return state, config
    new = "" if own is None else own.backbone_prefix
    heads = set() if own is None else {PEFT_PREFIX + name for name in own.weights()}

    sites = {site.name for site in base.structure.linears}

    def moved(name: str, start: str = "") -> str:
        if not home and not start and not any(name == site or name.startswith(f"{site}.") for site in sites):
            return name  # the end of a path
        return start + new + name.removeprefix(start + home) if name.startswith(start + home) else name

    state = {name if name in heads else moved(name, PEFT_PREFIX): tensor for name, tensor in state.items()}
    if own is None:
        config = {**config, "task_type": "FEATURE_EXTRACTION"}
    config = {key: ([moved(x) for x in value] if isinstance(value, list) else
                    {moved(x): y for x, y in value.items()} if isinstance(value, dict) else value)
              if key in NAMES_OF_MODULES else value for key, value in config.items()}
    return state, config
