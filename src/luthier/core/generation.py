"""How to generate, how conversations are written, what was generated. Read first; `protocols.py` goes on from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SamplingParams:
    """How to generate. `temperature` 0 is greedy. `first`: the number of the first prompt among all those that share
    `seed`, which are answered in several calls; a prompt's random numbers follow from its number and the seed."""

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
    """One answer: which prompt, its token ids without the stop token, whether it ended by itself, and on which one."""

    index: int
    token_ids: tuple[int, ...]
    finished: bool
    stop_token: int | None = None


@dataclass(frozen=True)
class ChatFormat:
    """How conversations with a base are written.

    Args:
        template: what a tokenizer's `chat_template` must be to render them: Jinja source, or several by name.
        stop_tokens: the tokens that end a turn of the assistant; the first is the default template's.
        trained: whether the model is tuned on conversations; what is saved then holds the template and the stop tokens.
    """

    template: Any = None
    stop_tokens: tuple[int, ...] = ()
    trained: bool = False
