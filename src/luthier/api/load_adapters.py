"""The verb `load_adapters`: several runs on one copy of their base model. Read `methods/multi_adapter.py` first.

    tuned = luthier.load_adapters("smollm2", {"law": "runs/law", "medicine": "runs/medicine"})
    tuned.answer(["Who may sue?", "What is a fever?", "Hello"], adapters=["law", "medicine", None])
    with tuned.use_adapter("law"):
        tuned.answer(["Who may sue?"])
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from luthier import assembly
from luthier.assembly.factory import PromptFormat, encode_chat_prompt, load_family
from luthier.assembly.initialization import attach_runs
from luthier.assembly.provenance import describe_model_conflict
from luthier.assembly.run_io import build_prompt_format
from luthier.core.errors import RecipeError, RunError
from luthier.core.examples import Message
from luthier.core.protocols import SamplingParams
from luthier.training.run_folder import Run


class MultiAdapterModel:
    """A base model and the adapters of the runs trained on it.

    Attributes:
        family: the base model; `use_adapter` selects the active adapter.
        manager: the adapters by name; none is active at first.
    """

    def __init__(self, family: assembly.CausalLM, manager: assembly.AdapterManager,
                 formats: Mapping[str, PromptFormat]) -> None:
        self.family, self.manager, self.formats = family, manager, formats
        self._active: str | None = None

    @contextmanager
    def use_adapter(self, choice: str | Mapping[str, float] | None) -> Iterator[assembly.CausalLM]:
        """A context in which one adapter is active, several with weights, or (None) none."""
        before = self._active
        with self.manager.use_adapter(choice):
            self._active = choice if isinstance(choice, str) else None
            try:
                yield self.family
            finally:
                self._active = before

    def answer(self, prompts: Sequence[str], adapters: Sequence[str | None] | str | None = None,
               sampling: SamplingParams | None = None) -> list[str]:
        """Generate answers to user messages in one batch, each with its own adapter.

        Args:
            adapters: one for each prompt, None for the base model; or one for all. Default: the adapter that
            `use_adapter` selected. sampling: default: greedy decoding of at most 256 tokens.
        """
        choice = self._active if adapters is None else adapters
        names = [choice] * len(prompts) if choice is None or isinstance(choice, str) else list(choice)
        if len(names) != len(prompts):
            raise RecipeError(f"{len(prompts)} prompts and {len(names)} adapters", "name one adapter for each prompt")
        # Refuses unknown names before any work.
        numbers = () if adapters is None else self.manager.resolve_indices(names)
        prompt_formats = [self.formats.get(name or "", PromptFormat()) for name in names]
        ids = [encode_chat_prompt(self.family, [Message("user", prompt)], prompt_format)
               for prompt, prompt_format in zip(prompts, prompt_formats, strict=True)]
        self.family.train(False)
        outputs = self.family.generate(ids, sampling or SamplingParams(),
                                                                             numbers)
        token_ids = {output.index: output.token_ids for output in outputs}
        return [self.family.tokenizer.decode(token_ids[i], skip_special_tokens=True) for i in range(len(prompts))]


def load_adapters(base: Path | str, runs: Mapping[str, Run | Path | str]) -> MultiAdapterModel:
    """Load a base model once, with the adapters of several runs.

    Args:
        base: the name of the base model, as in the runs' recipes.
        runs: a name for each run folder.

    Raises:
        RunError: a run holds a full model, or its method cannot share the base.
        RecipeError: a run was trained on another base.
    """
    config = assembly.ModelConfig(name_or_path=str(base))
    family = load_family(config)
    if not isinstance(family, assembly.CausalLM):
        raise RunError(f"{str(base)!r} is not a causal language model, so it cannot generate answers",
                       "evaluate its runs one by one: luthier evaluate RUN")
    folders = {name: run if isinstance(run, Run) else Run(run) for name, run in runs.items()}
    recipes = {name: assembly.load_recipe(run.require_exists()) for name, run in folders.items()}
    for name, recipe in recipes.items():
        if conflict := describe_model_conflict(folders[name], config):
            raise RecipeError(f"the run {name!r} was trained on {recipe.model.name_or_path!r}, not on "
                              f"{str(base)!r}: {conflict}",
                              "load it with runs of the same base")
    return MultiAdapterModel(family, attach_runs(family, folders),
                             {name: build_prompt_format(run, recipes[name]) for name, run in folders.items()})
