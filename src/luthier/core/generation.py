"""Sampling parameters, generation outputs and chat formats. Read this first; `protocols.py` continues."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of one call of `generate`.

    Args:
        temperature: 0 is greedy decoding.
        top_k: 0 is off.
        batch_size: prompts decoded at once.
        stop: token ids that end an output, in addition to the model's eos tokens.
        first_prompt_index: index of the call's first prompt among all prompts that share `seed`. A prompt's random
            numbers depend on its index and the seed alone, so prompts may be split over several calls.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    batch_size: int = 16
    stop: tuple[int, ...] = ()
    seed: int = 0
    first_prompt_index: int = 0


@dataclass(frozen=True)
class GenerationOutput:
    """One generated output.

    Args:
        index: of its prompt in the call.
        token_ids: without the stop token.
        finished: whether it ended with a stop token; otherwise at the length limit.
        stop_token: the token that ended it.
    """

    index: int
    token_ids: tuple[int, ...]
    finished: bool
    stop_token: int | None = None


@dataclass(frozen=True)
class ChatFormat:
    """How conversations with a model are rendered.

    Args:
        template: the value for the tokenizer's `chat_template`: Jinja source, or several by name.
        stop_tokens: the tokens that end an assistant turn; the first is that of the default template.
        trained: whether the model was trained on conversations; saved files then include template and stop tokens.
    """

    template: Any = None
    stop_tokens: tuple[int, ...] = ()
    trained: bool = False
