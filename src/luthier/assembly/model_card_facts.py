"""Collects the facts of a model card from a run, its recipe and its model. Read `reporting/model_card.py` first."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from luthier.assembly.recipe import Recipe, get_method_name
from luthier.core.errors import LuthierError
from luthier.core.protocols import Family
from luthier.models import prepare_folder, resolve_name
from luthier.reporting.model_card import ModelCardFacts, TaskHeadFacts
from luthier.training.run_folder import Run

# The embedded base models: hub id and license.
UPSTREAM = {"smollm2": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
            "minilm": ("sentence-transformers/all-MiniLM-L6-v2", "apache-2.0")}


def collect_model_card_facts(out: Run, source: Run, recipe: Recipe, base: Family,
                             title: str | None = None) -> ModelCardFacts:
    """The facts of a model card.

    Args:
        out: the folder that the card is for; everything else of the folder is already written.
        source: the run with the results; the same folder as `out`, except for an export.
        recipe: of the run, with the classes of its rows.
        base: the model as it is saved, with the heads of the objective.
        title: name of the folder; default: that of `out`.
    """
    objective, (base_model, license_name) = recipe.objective, find_base_model(recipe)
    head = next((head for head in objective.heads if head.task), None)
    saved: Any = base.heads.task_head  # of Transformers' own class
    return ModelCardFacts(
        title=title or out.path.name, base_model=base_model,
        base_name=base_model or Path(recipe.model.name_or_path).name,
        license=license_name, gguf_file=_find_gguf_file(recipe), method=get_method_name(recipe),
        objective=objective.name,
        train_sources=tuple(rows.path for rows in recipe.data.train), adapter=out.adapter,
        has_recipe=(out.path / "recipe.yaml").exists(), has_loss_plot=(out.path / "loss.png").exists(),
        results=source.results, task=base.structure.task, head_kind=head.kind if head else "",
        task_head=None if saved is None else TaskHeadFacts(saved.kind, tuple(saved.head.labels), saved.head.width,
                                                           saved.pooling),
        no_task_head_reason=base.heads.no_task_head_reason or "", reads_images="channels" in base.structure.sizes,
        can_generate=base.can_generate, is_encoder_decoder=base.is_encoder_decoder,
        is_embedding=objective.required_outputs == frozenset({"pooled"}), uses_masking=objective.uses_masking,
        uses_chat_template=base.can_generate and bool(base.tokenizer.chat_template)
        and recipe.data.format != "completion" and objective.name != "pretrain",
        system_prompt=recipe.data.system or "")


def find_base_model(recipe: Recipe) -> tuple[str, str]:
    """Hub id and license of the base model, each empty where it is unknown. A local folder is named by its own card."""
    name = recipe.model.name_or_path
    if name in UPSTREAM:
        return UPSTREAM[name]
    try:
        place = resolve_name(name)
        card = _read_front_matter(Path(place) / "README.md") if isinstance(place, Path) and place.is_dir() else {}
        if isinstance(place, str):
            card = _read_front_matter(prepare_folder(recipe.model) / "README.md")
            return place, str(card.get("license") or "")
    except LuthierError:  # the base was moved or deleted after training
        return ("", "")
    base_model = card.get("base_model")
    base_model = base_model[0] if isinstance(base_model, list) and base_model else base_model
    is_hub_id = isinstance(base_model, str) and "/" in base_model and not Path(base_model).is_absolute()
    return str(base_model) if is_hub_id else "", str(card.get("license") or "")


def _find_gguf_file(recipe: Recipe) -> str:
    """Name of the GGUF file that the base was read from; empty for any other base."""
    try:
        place = resolve_name(recipe.model.name_or_path)
    except LuthierError:  # the base was moved or deleted after training
        return ""
    return place.name if isinstance(place, Path) and place.suffix == ".gguf" else ""


def _read_front_matter(file: Path) -> Mapping[str, Any]:
    """The YAML front matter of a card; empty where it has none."""
    if not file.is_file():
        return {}
    text = file.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---\n"):
        return {}
    try:
        read = yaml.safe_load(text[4:].partition("\n---")[0])
    except yaml.YAMLError:  # a card written by hand
        return {}
    return read if isinstance(read, dict) else {}
