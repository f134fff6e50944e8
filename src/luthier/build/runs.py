"""Run folders to objects and back. Read `objects.py` first."""

from __future__ import annotations

from pathlib import Path

import yaml
from safetensors.torch import load_file, save_file

from luthier import data as rows
from luthier.build.adapters import adapter_weights, without_base_weights
from luthier.build.objects import PromptFormat, attach, family, with_heads
from luthier.build.provenance import BASE_FILE, Report, describe_base, ignore, open_recipe
from luthier.build.recipe import Recipe, dump
from luthier.build.settings import make_public
from luthier.core.errors import RunError
from luthier.core.protocols import TRAINING, Attached, ChatFormat, Family, Objective
from luthier.data import DataConfig
from luthier.families import ALIASES, BaseConfig, folder, public_name, resolve
from luthier.methods.peft_settings import with_whole_alphas
from luthier.methods.plain import fold_into_plain_lora
from luthier.methods.several import Several
from luthier.objectives.rolls import RollsConfig
from luthier.runtime.run import Run

STOPS = "generation_config.json"  # beside an adapter: which tokens end a turn
HEADS = "heads.safetensors"  # beside a whole model's weights; an adapter keeps them among its own


def open_run(run: Run, whole: bool = False, base_model: str | None = None,
             report: Report = ignore) -> tuple[Recipe, Family, Attached | None]:
    """What a run folder holds: its recipe, its base, and the method with its trained weights.

    The folder may have been made by PEFT (then the recipe is read off its adapter_config.json), or be a whole model
    (then there is no method to attach). The name of a base in place of a folder is such a whole model.

    Args:
        whole: keep the base in its own numbers, also where the run was trained on one in few bits.
        base_model: where the base is now, if it was moved; it must be the one that the run was trained on.
        report: called with a sentence for everything that has changed since the run was made.

    Raises `BaseError` where the base is not the one that the run was trained on (see `provenance.py`).
    """
    if _names_base(run.path):
        if base_model is not None:
            raise RunError(f"{str(run.path)!r} is a base itself", "leave the base model out (--base-model)")
        bare = Recipe(base=BaseConfig(name=str(run.path)), data=DataConfig.parse({"train": "-"}))
        return bare, family(bare.base), None
    run.existing()
    made = open_recipe(run, base_model, report)
    if whole and made.base.quantize != "none":
        made = made.model_copy(update={"base": made.base.model_copy(update={"quantize": "none"})})
    if run.adapter is None:
        if not (run.path / "config.json").exists():
            raise RunError(f"the run {str(run.path)!r} has not ended, so there is nothing trained in it yet",
                           f"go on with it: luthier train --resume {run.path}")
        base = family(made.base.model_copy(update={"name": str(run.path), "structure": None}),  # it is in the weights
                      made.objective.hides)
        if kept_heads(made.objective):
            base.add(made.objective.heads, made.seed).load(load_file(run.path / HEADS))
        return made, base, None
    base = family(made.base, made.objective.hides)
    _restore_chat_format(run, base)
    attached = attach(base, made.method, made.seed)
    if kept_heads(made.objective):
        attached = with_heads(base, attached, made.objective, made.seed)
    attached.load(without_base_weights(adapter_weights(run, base.anatomy), attached.state(), base.anatomy.model))
    return made, base, attached


def _restore_chat_format(run: Run, base: Family) -> None:
    """The chat template and the stop tokens that the run was trained with, for a run of conversations."""
    if not base.writes or not (run.path / STOPS).is_file():
        return
    template = run.path / "chat_template.jinja"
    if isinstance(base.tokenizer.chat_template, str) and template.is_file():
        base.tokenizer.chat_template = template.read_text(encoding="utf-8")
    template, stops = rows.saved_chat_template(base.tokenizer), rows.stop_tokens(base.tokenizer)
    base.chat_format = ChatFormat(template, stops, trained=True)


def prompt_format(run: Run, made: Recipe) -> PromptFormat:
    """How prompts of a run, or of a base, are written. What was trained on conversations keeps its stop tokens; of what
    others made nothing is known, and it is asked as a base is."""
    known = bool(run.recipe) and run.adapter is not None
    return PromptFormat(made.data, not known or (run.path / STOPS).is_file())


def kept_heads(objective: Objective) -> bool:
    """Whether a run is saved with its objective's heads. A critic has done its work when the policy is trained."""
    return bool(objective.heads) and not isinstance(objective, RollsConfig)


def _names_base(path: Path) -> bool:
    """Whether this is a base's name: an alias, a file, or owner/name where no folder `owner` is (a run, else)."""
    if path.is_dir():
        return False
    return str(path) in ALIASES or path.is_file() or (len(path.parts) == 2 and path.parts[0] not in ("/", "..", "~")
                                                      and not path.parent.is_dir())


def save_whole(run: Run, made: Recipe, base: Family) -> None:
    """Write the model as it now is, and the objective's heads beside it, which a folder of Transformers has no place
    for; the recipe says what they are for."""
    base.save(run.path)
    if kept_heads(made.objective) and (heads := base.heads.state()):
        save_file(heads, run.path / HEADS, metadata={"format": "pt"})
        if not run.recipe:
            run.write("recipe.yaml", yaml.safe_dump(dump(make_public(made)), sort_keys=False, allow_unicode=True))


def save_tuned(run: Run, made: Recipe, base: Family, attached: Attached, public: bool = False) -> None:
    """Write the trained weights as Transformers and PEFT read them, and the tokenizer.

    `public`: adapter_config.json names the base by its hub id or bare name, else by a path that PEFT loads here; and
    base_model.json holds the base's digests.
    """
    if isinstance(made.objective, RollsConfig) and made.objective.heads:
        assert isinstance(attached, Several), "the critic stands beside the method"
        attached = attached.parts[0]
    config = attached.peft()
    if config is None:
        save_whole(run, made, base)
        return
    state = {name: tensor.contiguous().cpu() for name, tensor in attached.state().items()
             if not name.startswith(TRAINING)}
    file = run.path / "adapter_model.safetensors"
    save_file(state, file, metadata={"format": "pt"})
    file.chmod(run.path.stat().st_mode & 0o666)  # the library makes its files readable to their owner alone
    name = name_base(made.base, public)
    run.write("adapter_config.json", {**with_whole_alphas(config), "base_model_name_or_path": name,
                                      "revision": made.base.revision})
    if public:
        run.write(BASE_FILE, describe_base(made.base))
    base.saved_tokenizer().save_pretrained(run.path)
    base.save_generation_config(run.path)


def name_base(config: BaseConfig, public: bool = False) -> str:
    """The name by which PEFT loads the base: a hub id as it is, anything else as the Transformers folder that it
    became. `public`: by its hub id or bare name, which other machines may know."""
    if public:
        return public_name(config) if config.structure is None else folder(config).name
    hub = config.structure is None and isinstance(resolve(config.name), str)
    return config.name if hub else str(folder(config).absolute())


def convert_to_plain_lora(base: Family, attached: Attached, rank: int | None) -> Attached:
    """A LoRA or an AdaLoRA as a plain LoRA of one rank, with the heads that stand beside it. It is put on the base only
    to be saved. Raises as `fold_into_plain_lora` does, and for a list of methods."""
    parts = list(attached.parts) if isinstance(attached, Several) else [attached]
    forms = [part.peft() or {} for part in parts]
    heads = [part for part, form in zip(parts, forms, strict=True) if form.get("peft_type", "") is None]
    tuned = [part for part in parts if part not in heads]
    if len(tuned) > 1:
        raise RunError("a list of methods is no plain LoRA", "leave --lora-rank out, or export with --to merged")
    config, state = fold_into_plain_lora(tuned[0], rank)
    found = config.attach(base.anatomy, seed=0)
    found.load(state)
    return Several([found, *heads]) if heads else found
