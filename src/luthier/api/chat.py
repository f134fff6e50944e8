"""The verb `chat`: a conversation with a run, its base model, or both; and answers to single prompts. Read
`assembly/run_io.py` (`open_run`) first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from luthier import assembly
from luthier.assembly.factory import PromptFormat, encode_chat_prompt
from luthier.assembly.run_io import build_prompt_format, open_run
from luthier.core.consent import accepts_consent
from luthier.core.errors import RecipeError
from luthier.core.examples import Message
from luthier.core.protocols import Family, SamplingParams, Tuner
from luthier.reporting.progress import print_line, status
from luthier.serving.detokenizer import stream_text
from luthier.training.run_folder import Run


@dataclass
class ChatSession:
    """A conversation with its history.

    Args:
        bare: use the base model, with the method disabled.
        messages: the history, without the system prompt.
    """

    base: assembly.CausalLM
    tuner: Tuner | None
    form: PromptFormat
    sampling: SamplingParams
    bare: bool = False
    messages: list[Message] = field(default_factory=list)

    def say(self, text: str) -> Iterator[str]:
        """The answer to `text`, as it is generated. If the iteration is not finished, the history stays unchanged."""
        messages = [*self.messages, Message("user", text)]
        prompt = encode_chat_prompt(self.base, messages, self.form)
        answer = ""
        with self.tuner.disabled() if self.bare and self.tuner else nullcontext():
            for part in stream_text(self.base.stream(prompt, self.sampling), self.base.tokenizer.decode):
                answer += part
                yield part
        self.messages = [*messages, Message("assistant", answer)]

    def reset(self) -> None:
        """Clear the history."""
        self.messages = []


@dataclass(frozen=True)
class LoadedModel:
    """A run or base model that is loaded for chatting. `name` is what the user called it, `base_name` its base."""

    name: str
    base_name: str
    base: Family
    tuner: Tuner | None
    form: PromptFormat

    def with_system(self, system: str | None) -> PromptFormat:
        """How its prompts are written, with another system prompt if one is given."""
        if not system:
            return self.form
        return replace(self.form, data=self.form.data.model_copy(update={"system": system}))


@accepts_consent
def open_chat(run: Run | Path | str, *, compare: bool = False, system: str | None = None, temperature: float = 0.0,
              max_new_tokens: int = 256, quiet: bool = False, base_model: Path | str | None = None,
              allow_code: Sequence[str] = ()) -> list[ChatSession]:
    """Conversations with a run or a base model: one; with `compare` two, of the base model and of the trained model.

    Args:
        system: system prompt; default: that of the run's training data, if any.
        temperature: 0 is greedy decoding.
        allow_code: files, modules, URLs or base models whose code the run may use (`core/consent.py`).
        base_model: where the base is now, if it was moved.
    """
    _check_sampling(temperature, max_new_tokens)
    loaded = load_for_chat(run if isinstance(run, Run) else Run(run), base_model, quiet)
    if compare and loaded.tuner is None and isinstance(loaded.base, assembly.CausalLM):
        raise RecipeError(f"{loaded.name!r} is a full model without an adapter, so there is no base model to compare "
                          "with", "omit --compare, or name a run that trained an adapter")
    return [start_session(loaded, bare=bare, system=system, temperature=temperature, max_new_tokens=max_new_tokens)
            for bare in ((True, False) if compare else (False,))]


def load_for_chat(run: Run, base_model: Path | str | None, quiet: bool) -> LoadedModel:
    """Load a run or a base model, and how its prompts are written."""
    with status("loading the model", quiet=quiet):
        recipe, base, tuner = open_run(run, False, base_model, partial(print_line, quiet=quiet))
    return LoadedModel(str(run.path), recipe.model.name_or_path, base, tuner, build_prompt_format(run, recipe))


def start_session(loaded: LoadedModel, *, bare: bool = False, system: str | None = None, temperature: float = 0.0,
                  max_new_tokens: int = 256) -> ChatSession:
    """A new conversation with a loaded model. Raises `RecipeError` for a model that cannot chat."""
    _check_sampling(temperature, max_new_tokens)
    if not isinstance(loaded.base, assembly.CausalLM):
        raise RecipeError(f"{loaded.name!r} has the base {loaded.base_name!r}, which cannot generate text",
                          "chat with a causal language model, such as 'smollm2'")
    loaded.base.train(False)
    sampling = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature)
    return ChatSession(loaded.base, loaded.tuner, loaded.with_system(system), sampling, bare)


def generate_answers(loaded: LoadedModel, prompts: Sequence[str], *, system: str | None = None, temperature: float,
                     max_new_tokens: int, top_p: float, seed: int) -> list[str]:
    """One answer to each prompt, in their order. Raises `RecipeError` for a model that cannot generate text."""
    _check_sampling(temperature, max_new_tokens)
    base = loaded.base
    if not base.can_generate:
        raise RecipeError(f"{loaded.name!r} has the base {loaded.base_name!r}, which cannot generate text",
                          "use evaluate, or a run of a base that generates text")
    base.train(False)
    form = loaded.with_system(system)
    sampling = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    encoded = [encode_chat_prompt(base, [Message("user", prompt)], form) for prompt in prompts]
    answers = [""] * len(encoded)
    for output in base.generate(encoded, sampling):
        answers[output.index] = base.tokenizer.decode(output.token_ids, skip_special_tokens=True)
    return answers


def _check_sampling(temperature: float, max_new_tokens: int) -> None:
    if not 0 <= temperature < math.inf or max_new_tokens < 1:
        raise RecipeError(f"temperature {temperature}, max_new_tokens {max_new_tokens}: temperature must be at least 0 "
                          "and max_new_tokens at least 1", "omit them, or give such numbers")
