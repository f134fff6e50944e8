"""Sampling parameters, generation requests and outputs, and chat formats. Read this first; `protocols.py` continues."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor

FinishReason = Literal["", "stop", "length", "error"]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are selected.

    Args:
        temperature: 0 is greedy decoding.
        top_k: only the k most probable tokens; 0 is off.
        top_p: only the most probable tokens that together reach this probability; 1 is off.
        min_p: only tokens with at least this share of the highest probability; 0 is off.
        presence_penalty, frequency_penalty: subtracted from the logit of every generated token, once and per
            occurrence.
        repetition_penalty: divides positive and multiplies negative logits of tokens of the prompt and the output
            (Keskar et al. 2019, arXiv:1909.05858, section 4.1); 1 is off.
        logit_bias: token -> value added to its logit.
        logprobs: with how many of the most probable tokens a token's log-probability is reported; None: not at all.
        batch_size: sequences decoded at once by `generate`.
        stop: token ids that end an output, in addition to the model's eos tokens.
        first_prompt_index: index of a call's first prompt among all prompts that share `seed`. A prompt's random
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
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None

    @property
    def changes_logits(self) -> bool:
        """Whether logits depend on the tokens so far or are biased."""
        return bool(self.presence_penalty or self.frequency_penalty or self.logit_bias or self.repetition_penalty != 1)


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


@dataclass(frozen=True, eq=False)
class SequenceRequest:
    """One sequence for a decoding engine.

    Args:
        prompt: token ids.
        adapter: an index of the adapter manager, -1 for the base; None: no routing.
        index: its output depends on `sampling.seed` and this number, and on no other sequence.
        allowed_tokens: called with the tokens generated so far before each selection; returns [V] bool, the tokens that
            may follow, or None for all.
        use_prefix_cache: whether keys and values of earlier sequences may be used.
    """

    prompt: Sequence[int]
    sampling: SamplingParams
    adapter: int | None = None
    index: int = 0
    allowed_tokens: Callable[[Sequence[int]], Tensor | None] | None = field(default=None, repr=False)
    use_prefix_cache: bool = True


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of a token before temperature, penalties and filters, and the most probable tokens there."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TokenOutput:
    """One new token of a sequence.

    Args:
        token: None where the sequence has ended without one.
        finish_reason: empty until the sequence has ended. `stop`: the token is a stop token, which is not part of the
            output. `length`: it is the last token that is allowed.
        error: why the sequence failed.
        cached_tokens: prompt tokens whose keys and values came from the prefix cache.
    """

    request: SequenceRequest
    token: int | None
    finish_reason: FinishReason = ""
    logprob: TokenLogprob | None = None
    error: Exception | None = None
    cached_tokens: int = 0


class GenerationEngine(Protocol):
    """Decodes many sequences together; they may be added and cancelled between any two steps."""

    def add(self, request: SequenceRequest) -> None:
        """Queue a sequence. Raises `DataError` or `BaseError` for a prompt that cannot be read."""
        ...

    def cancel(self, request: SequenceRequest) -> None:
        """Drop a sequence, if it is still there; it gives no more outputs."""
        ...

    def step(self) -> list[TokenOutput]:
        """At most one new token of every sequence."""
        ...

    @property
    def has_work(self) -> bool: ...

    @property
    def statistics(self) -> Mapping[str, float]:
        """`running` and `waiting` sequences, `kv_cache_bytes`, `prefix_cache_hits` and `prefix_cache_queries` in
        tokens."""
        ...


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
