"""The verb `load_adapters`: several runs on one copy of their base, answering side by side. Read
`methods/multi_adapter.py` first.

    tuned = luthier.load_adapters("smollm2", {"law": "runs/law", "medicine": "runs/medicine"})
    tuned.answer(["Who may sue?", "What is a fever?", "Hello"], adapters=["law", "medicine", None])
    with tuned.using("law"):
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
    """A base and the runs tuned on it.

    Attributes:
        family: the base; what acts on it is what `using` says.
        bank: the adapters by name; none acts until one is chosen.
    """

    def __init__(self, family: assembly.CausalLM, bank: assembly.Bank,
                 formats: Mapping[str, PromptFormat]) -> None:
        self.family, self.bank, self.formats = family, bank, formats
        self._chosen: str | None = None

    @contextmanager
    def using(self, choice: str | Mapping[str, float] | None) -> Iterator[assembly.CausalLM]:
        """While open, the base speaks as that run, as several of them by their weights, or (None) as itself."""
        before = self._chosen
        with self.bank.using(choice):
            self._chosen = choice if isinstance(choice, str) else None
            try:
                yield self.family
            finally:
                self._chosen = before

    def answer(self, prompts: Sequence[str], adapters: Sequence[str | None] | str | None = None,
               sampling: SamplingParams | None = None) -> list[str]:
        """Answers to users' messages, in one batch, each through its own adapter.

        Args:
            adapters: one for each prompt, None for the bare base; or one for all. Left out: as `using` says.
            sampling: how to generate; left out: greedily, 256 tokens at most.
        """
        one = self._chosen if adapters is None else adapters
        through = [one] * len(prompts) if one is None or isinstance(one, str) else list(one)
        if len(through) != len(prompts):
            raise RecipeError(f"{len(prompts)} prompts and {len(through)} adapters", "name one adapter for each prompt")
        numbers = () if adapters is None else self.bank.numbers(through)  # refuses unknown names, before any work
        forms = [self.formats.get(name or "", PromptFormat()) for name in through]
        ids = [encode_chat_prompt(self.family, [Message("user", prompt)], form)
               for prompt, form in zip(prompts, forms, strict=True)]
        self.family.train(False)
        outputs = self.family.generate(ids, sampling or SamplingParams(), numbers)
        token_ids = {output.index: output.token_ids for output in outputs}
        return [self.family.tokenizer.decode(token_ids[i], skip_special_tokens=True) for i in range(len(prompts))]


def load_adapters(base: str, runs: Mapping[str, Run | Path | str]) -> MultiAdapterModel:
    """Load a base once and the adapters of several runs beside one another.

    Args:
        base: the name of the base, as in the runs' recipes.
        runs: a name for each run folder.

    Raises:
        RunError: a run that holds a whole model, or a method that cannot share its base.
        RecipeError: a run of another base.
    """
    config = assembly.BaseConfig(name=base)
    family = load_family(config)
    if not isinstance(family, assembly.CausalLM):
        raise RunError(f"{base!r} is no causal language model, so it answers nothing",
                       "open its runs one by one: luthier evaluate RUN")
    folders = {name: run if isinstance(run, Run) else Run(run) for name, run in runs.items()}
    made = {name: assembly.recorded(run.existing()) for name, run in folders.items()}
    for name, recipe in made.items():
        if conflict := describe_model_conflict(folders[name], config):
            raise RecipeError(f"the run {name!r} was made on {recipe.base.name!r}, not on {base!r}: {conflict}",
                              "open it with the runs of its own base")
    return MultiAdapterModel(family, attach_runs(family, folders),
                             {name: build_prompt_format(run, made[name]) for name, run in folders.items()})
