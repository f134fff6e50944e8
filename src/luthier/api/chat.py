"""The verb `chat`: a conversation with a run, its base model, or both. Read `assembly/run_io.py` (`open_run`) first."""

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
from luthier.core.protocols import SamplingParams, Tuner
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


@accepts_consent
def open_chat(run: Run | Path | str, *, compare: bool = False, system: str | None = None, temperature: float = 0.0,
              max_new_tokens: int = 256, quiet: bool = False, base_model: str | None = None,
              allow_code: Sequence[str] = ()) -> list[ChatSession]:
    """Conversations with a run or a base model: one; with `compare` two, of the base model and of the trained model.

    Args:
        system: system prompt; default: that of the run's training data, if any.
        temperature: 0 is greedy decoding.
        allow_code: files, modules, URLs or base models whose code the run may use (`core/consent.py`).
        base_model: where the base is now, if it was moved.
    """
    if not 0 <= temperature < math.inf or max_new_tokens < 1:
        raise RecipeError(f"temperature {temperature}, max_new_tokens {max_new_tokens}: temperature must be at least 0 "
                          "and max_new_tokens at least 1", "omit them, or give such numbers")
    with status("loading the model", quiet=quiet):
        recipe, base, tuner = open_run(run if isinstance(run, Run) else Run(run), False, base_model,
                                       partial(print_line, quiet=quiet))
    if not isinstance(base, assembly.CausalLM):
        raise RecipeError(f"{str(run)!r} has the base {recipe.model.name_or_path!r}, which cannot generate text",
                          "chat with a causal language model, such as 'smollm2'")
    if compare and tuner is None:
        raise RecipeError(f"{str(run)!r} is a full model without an adapter, so there is no base model to compare with",
                          "omit --compare, or name a run that trained an adapter")
    base.train(False)
    sampling = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature)
    form = build_prompt_format(run if isinstance(run, Run) else Run(run), recipe)
    if system:
        form = replace(form, data=form.data.model_copy(update={"system": system}))
    return [ChatSession(base, tuner, form, sampling, bare)
            for bare in ((True, False) if compare else (False,))]
