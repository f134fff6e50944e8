"""Loads runs and base models to be served by name, on one copy of the base. Read `initialization.py` (`attach_runs`)
and `run_io.py` first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from luthier import data as rows
from luthier.assembly.factory import PromptFormat, compute_text_length, encode_chat_prompt, load_family
from luthier.assembly.initialization import attach_runs
from luthier.assembly.provenance import Report, describe_model_conflict, ignore, open_recipe
from luthier.assembly.recipe import load_recipe
from luthier.assembly.run_io import build_prompt_format, open_run
from luthier.core.errors import RecipeError, suggest_nearest
from luthier.core.examples import ClassificationExample, Message, Origin
from luthier.core.protocols import Family
from luthier.data import DataConfig
from luthier.methods.composite import list_parts
from luthier.methods.multi_adapter import AdapterManager
from luthier.methods.peft import PeftConfig
from luthier.models import CausalLM
from luthier.training.run_folder import Run

ROW = 4096  # tokens of texts that are embedded in one forward pass


@dataclass(frozen=True)
class ServedModels:
    """The models that a server offers, on one base.

    Args:
        names: name of each model -> name of its adapter in the manager; None for the base model alone.
        formats: how the prompts of each model are rendered.
        context_lengths: text tokens that fit into each model's context, without a run's virtual tokens.
    """

    base: Family
    manager: AdapterManager | None
    names: dict[str, str | None]
    formats: Mapping[str, PromptFormat]
    context_lengths: Mapping[str, int]

    @property
    def can_generate(self) -> bool:
        return isinstance(self.base, CausalLM)

    def remove(self, name: str) -> None:
        """Serve this model no more. Requests that run go on; its adapter stays in memory until the server ends."""
        del self.names[name]

    def get_adapter(self, name: str) -> str | None:
        """The adapter of a model. Raises `RecipeError` for an unknown name."""
        if name not in self.names:
            raise RecipeError(f"unknown model {name!r}: {suggest_nearest(name, self.names)}",
                              "GET /v1/models lists them")
        return self.names[name]

    def get_adapter_indices(self, adapters: Iterable[str | None]) -> tuple[int, ...]:
        """Indices of adapters, as `generate` takes them; empty where there is no manager."""
        return () if self.manager is None else self.manager.resolve_indices(adapters)

    def encode_chat(self, name: str, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation up to where the answer begins, rendered as the run's training rows were."""
        return encode_chat_prompt(self.base, messages, self.formats[name])

    def encode_text(self, name: str, text: str) -> list[int]:
        """Token ids of a text to continue."""
        return rows.encode_prompt_text(text, self.base.tokenizer, self.formats[name].data).ids

    @torch.no_grad()
    def embed_texts(self, name: str, texts: Sequence[str]) -> Tensor:
        """[texts, D] pooled states, float32. Raises `RecipeError` for a text without tokens or beyond the context."""
        adapter = self.get_adapter(name)
        config = DataConfig.parse({"train": "-", "max_length": self.context_lengths[name], "truncation": "refuse"})
        encoded = []
        for number, text in enumerate(texts):
            example = ClassificationExample(text, 0.0, Origin("input", number + 1))
            tokenized = rows.encode_example(example, self.base.tokenizer, config)
            if not isinstance(tokenized, list):
                raise RecipeError(f"input {number} cannot be read: {tokenized}",
                                  f"give texts with at least one token and at most {self.context_lengths[name]} tokens")
            encoded.append(tokenized[0])
        states = torch.zeros(len(encoded), self.base.structure.sizes["hidden"])
        for row in rows.assign_rows(encoded, ROW):
            batch = rows.build_batch([encoded[i] for i in row]).to(self.base.device)
            with nullcontext() if self.manager is None else self.manager.use_adapter(adapter):
                pooled = self.base.forward(batch.inputs, batch.target, frozenset({"pooled"})).pooled
            assert pooled is not None
            states[row] = pooled.float().cpu()
        return states


def display_name(place: Path | str) -> str:
    """The name of a run or base from its path: the last part, for a file without the suffix. A folder name is kept
    whole, because dots in it are not suffixes (Qwen2.5-0.5B).

    >>> display_name("runs/lora-0.1"), display_name("Qwen/Qwen2.5-0.5B"), display_name("models/tiny.Q4_1.gguf")
    ('lora-0.1', 'Qwen2.5-0.5B', 'tiny.Q4_1')
    """
    path = Path(place)
    return path.stem if path.suffix == ".gguf" else path.name or path.resolve().name


def _modifies_base(run: Run) -> bool:
    """Whether the run's method modifies the base's own modules, so that the base cannot be shared."""
    return any(isinstance(part, PeftConfig) for part in list_parts(load_recipe(run.require_exists()).method))


def load_served_models(runs: Mapping[str, Path | str], base_model: Path | str | None = None,
                       report: Report = ignore) -> ServedModels:
    """Load the models to serve: one base or full model, or several runs of one base.

    Args:
        base_model: where their base is now, if it was moved.
        report: called with a sentence for everything that has changed since a run was made.

    Raises:
        RecipeError: runs of different bases, or a whole model among several.
        RunError, BaseError: something cannot be read.
    """
    if not runs:
        raise RecipeError("nothing to serve", "give a run folder or a base model")
    folders = {name: Run(path) for name, path in runs.items()}
    alone = next((name for name, run in folders.items() if run.adapter is None or _modifies_base(run)), None)
    if alone is not None and (len(folders) == 1 or folders[alone].adapter is None):
        if len(folders) > 1:
            whole = alone
            raise RecipeError(f"{whole!r} is a full model, which cannot share a base with the others",
                              "serve it separately, on another port")
        (name, run), = folders.items()
        recipe, base, _ = open_run(run, False, base_model, report)
        base.train(False)
        return ServedModels(base, None, {name: None}, {name: build_prompt_format(run, recipe)},
                            {name: base.structure.sizes["context"]})
    recipes = {name: open_recipe(run.require_exists(), base_model, report) for name, run in folders.items()}
    first = next(iter(recipes))
    for name, recipe in recipes.items():
        if base_model is None and (conflict := describe_model_conflict(folders[name], recipes[first].model)):
            raise RecipeError(f"{name!r} was made on {recipe.model.name_or_path!r}, and {first!r} on "
                              f"{recipes[first].model.name_or_path!r}: {conflict}", "serve runs of one base together")
    base = load_family(recipes[first].model)
    manager = attach_runs(base, folders)
    base.train(False)
    plain = display_name(recipes[first].model.name_or_path)
    names: dict[str, str | None] = {plain: None} if plain not in runs else {}
    return ServedModels(base, manager, {**names, **{name: name for name in runs}},
                        {plain: PromptFormat(),
                         **{name: build_prompt_format(run, recipes[name]) for name, run in folders.items()}},
                        {plain: base.structure.sizes["context"],
                         **{name: compute_text_length(recipe.method, base) for name, recipe in recipes.items()}})
