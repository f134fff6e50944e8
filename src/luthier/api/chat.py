"""The verb `chat`: a conversation with a run, a bare base, or both side by side. Read `build.py` (open_run) first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from luthier import assembly
from luthier.assembly.factory import PromptFormat, encode_chat_prompt
from luthier.assembly.run_io import build_prompt_format, open_run
from luthier.core.errors import RecipeError
from luthier.core.examples import Message
from luthier.core.protocols import SamplingParams, Tuner
from luthier.reporting.progress import print_line, status
from luthier.serving.detokenizer import stream_text
from luthier.training.run_folder import Run


@dataclass
class ChatSession:
    """A conversation that remembers what was said.

    Args:
        bare: speak with the base, the method switched off.
        said: the turns so far, without the system prompt.
    """

    base: assembly.CausalLM
    tuner: Tuner | None
    form: PromptFormat
    sampling: SamplingParams
    bare: bool = False
    said: list[Message] = field(default_factory=list)

    def say(self, text: str) -> Iterator[str]:
        """The answer to `text`, bit by bit. A conversation that is broken off forgets this turn."""
        turns = [*self.said, Message("user", text)]
        prompt = encode_chat_prompt(self.base, turns, self.form)
        answer = ""
        with self.attached.disabled() if self.bare and self.attached else nullcontext():
            for bit in stream_text(self.base.stream(prompt, self.sampling), self.base.tokenizer.decode):
                answer += bit
                yield bit
        self.said = [*turns, Message("assistant", answer)]

    def reset(self) -> None:
        """Forget what was said."""
        self.said = []


def open_chat(run: Run | Path | str, *, compare: bool = False, system: str | None = None, temperature: float = 0.0,
              max_new_tokens: int = 256, quiet: bool = False, base_model: str | None = None) -> list[ChatSession]:
    """Conversations with a run folder or a base: one, or with `compare` two, the bare base's and the tuned model's.

    Args:
        system: system prompt; left out: the one that the run's data was given, if any.
        temperature: 0 always takes the most probable word.
        base_model: where the base is now, if it was moved.
    """
    if not 0 <= temperature < math.inf or max_new_tokens < 1:
        raise RecipeError(f"temperature {temperature}, max_new_tokens {max_new_tokens}: the first is at least 0, "
                          "the second at least 1", "leave them out, or give such numbers")
    with status("loading the model", quiet=quiet):
        recipe, base, tuner = open_run(run if isinstance(run, Run) else Run(run), False, base_model,
                                              partial(print_line, quiet=quiet))
    if not isinstance(base, assembly.CausalLM):
        raise RecipeError(f"{str(run)!r} stands on {recipe.base.name!r}, which holds no conversations",
                          "chat with a causal language model, such as 'smollm2'")
    if compare and tuner is None:
        raise RecipeError(f"{str(run)!r} is a whole model without an adapter, so there are not two to compare",
                          "leave out --compare, or name a run that trained an adapter")
    base.train(False)
    sampling = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature)
    form = build_prompt_format(run if isinstance(run, Run) else Run(run), recipe)
    if system:
        form = replace(form, data=form.data.model_copy(update={"system": system}))
    return [ChatSession(base, tuner, form, sampling, bare)
            for bare in ((True, False) if compare else (False,))]
