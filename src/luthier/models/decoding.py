"""Text generation: sequences that join and leave at every step. Read `core/generation.py` and `sampling.py` first.

All generation uses one engine (`DecodingEngine`): answers of `evaluate`, `chat`, `serve` and rollouts. It decides which
sequences a step reads or extends; a `Decoder` computes their logits:

    SequenceDecoder (`sequence_decoder.py`)  sequences join and leave at any step: causal models with packed rows
    BatchDecoder (`padded_decoder.py`)       one padded batch at a time: all other models

An output depends on its prompt, its index and the sampling parameters, never on other sequences.

Shape letters: B sequences or rows of a batch, L columns (left padding, prompt, output), V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from luthier.core.errors import BaseError, DataError, NotFinite
from luthier.core.generation import GenerationOutput, SamplingParams, SequenceRequest, TokenOutput
from luthier.models.hf_attributes import get_optional
from luthier.models.sampling import SamplingState, compute_token_logprobs, select_tokens
from luthier.models.sequence_decoder import DecodedSequence, SequenceDecoder

PREFILL_CHUNK = 512  # prompt tokens that are read between two steps of sequences that are being decoded
MAX_NUM_BATCHED_TOKENS = 2048  # prompt tokens of one step while nothing is being decoded


class Decoder(Protocol):
    """Computes logits of sequences. `can_join`: whether sequences may begin while others are being decoded."""

    can_join: bool

    def begin(self, sequences: Sequence[DecodedSequence], chunk: int) -> Tensor:
        """Read at least the first `chunk` tokens of new sequences; [B, V] the logits behind them."""
        ...

    def extend(self, sequences: Sequence[DecodedSequence], chunk: int) -> Tensor:
        """Read up to `chunk` more tokens of each sequence; [B, V] the logits behind them."""
        ...

    def take_prefix(self, sequence: DecodedSequence) -> bool:
        """Let a new sequence continue from what is cached, if anything is."""
        ...

    def release(self, sequence: DecodedSequence, keep: bool) -> None:
        """The sequence has ended; `keep`: its keys and values may be used for others."""
        ...


@dataclass(eq=False)
class _Running:
    """A sequence that the engine works on. `limit`: the largest number of tokens of its output."""

    state: SamplingState
    sequence: DecodedSequence
    limit: int
    prompt_length: int

    @property
    def is_read(self) -> bool:
        """Whether all its tokens have been read, so that the logits behind them give the next one."""
        return self.sequence.read == len(self.sequence.tokens)


class DecodingEngine:
    """Decodes many sequences together. See `core.generation.GenerationEngine`; not for use from several threads.

    Args:
        decoder: computes logits.
        stops: tokens that end every output.
        measure_context: an adapter's index (None: no routing) -> how many tokens prompt and output may have together.
        max_num_seqs: sequences decoded together.
        max_cache_bytes: of keys and values; further sequences wait. None: no limit.
        is_continuous: False: sequences begin only when all others have ended, as in a static batch.
        versions: adapter -> a number that changes when the adapter is loaded again.
    """

    def __init__(self, decoder: Decoder, stops: Set[int], measure_context: Callable[[int | None], int], *,
                 max_num_seqs: int = 16, max_cache_bytes: int | None = None, is_continuous: bool = True,
                 prefill_chunk: int = PREFILL_CHUNK,
                 versions: Callable[[int | None], int] = lambda adapter: 0) -> None:
        assert max_num_seqs > 0, max_num_seqs
        self.decoder, self.stops, self.max_num_seqs = decoder, stops, max_num_seqs
        self.max_cache_bytes, self.prefill_chunk = max_cache_bytes, prefill_chunk
        self._measure_context, self._versions = measure_context, versions
        self._can_join = is_continuous and decoder.can_join
        self._waiting: deque[_Running] = deque()
        self._starting: deque[_Running] = deque()  # admitted, nothing read yet
        self._running: list[_Running] = []
        self.tokens_generated = 0

    def add(self, request: SequenceRequest) -> None:
        sampling = request.sampling
        assert sampling.max_new_tokens > 0, sampling
        context = self._measure_context(request.adapter)
        if not request.prompt:
            raise DataError(f"prompt {request.index} has no tokens",
                            "give the prompt at least one token, such as the bos token")
        if len(request.prompt) >= context:
            raise BaseError(f"prompt {request.index} has {len(request.prompt)} tokens, and the base's context of "
                            f"{context} must hold the answer too",
                            "shorten the prompt, or choose a base with a longer context")
        sequence = DecodedSequence(list(request.prompt), request.adapter,
                                   key=(request.adapter, self._versions(request.adapter)))
        limit = min(sampling.max_new_tokens, context - len(request.prompt))
        self._waiting.append(_Running(SamplingState(request), sequence, limit, len(request.prompt)))

    def cancel(self, request: SequenceRequest) -> None:
        for queue in (self._waiting, self._starting, self._running):
            for one in [one for one in queue if one.state.request is request]:
                queue.remove(one)
                self.decoder.release(one.sequence, keep=False)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._starting or self._running)

    @property
    def statistics(self) -> Mapping[str, float]:
        buffers = [one.sequence.buffer for one in self._running]
        found = {"running": len(self._running) + len(self._starting), "waiting": len(self._waiting),
                 "kv_cache_bytes": sum(buffer.nbytes for buffer in buffers if buffer is not None),
                 "tokens_generated": self.tokens_generated}
        if isinstance(self.decoder, SequenceDecoder):
            cache = self.decoder.prefix_cache
            found |= {"prefix_cache_queries": cache.queried_tokens, "prefix_cache_hits": cache.hit_tokens,
                      "prefix_cache_bytes": cache.nbytes}
        return found

    @torch.inference_mode()
    def step(self) -> list[TokenOutput]:
        """At most two forward passes: sequences that were begun are extended, then new ones begin."""
        self._admit()
        decoding = [one for one in self._running if one.sequence.read >= one.prompt_length]
        budget = self.prefill_chunk if decoding else MAX_NUM_BATCHED_TOKENS
        extended, chunk = list(decoding), 1
        for one in self._running:
            if one.sequence.read < one.prompt_length and budget > 0:  # a long prompt, or what the prefix cache lacked
                extended.append(one)
                chunk = self.prefill_chunk
                budget -= min(chunk, one.prompt_length - one.sequence.read)
        outputs = self._compute(self.decoder.extend, extended, chunk) if extended else []
        begun = self._take_starting(budget)
        if begun:
            self._running += begun
            outputs += self._compute(self.decoder.begin, begun, self.prefill_chunk)
        return outputs

    def _admit(self) -> None:
        """Move waiting sequences to those that start, as far as there is room."""
        if not self._can_join and (self._running or self._starting):
            return
        while self._waiting and len(self._running) + len(self._starting) < self.max_num_seqs:
            if not self._has_memory(self._waiting[0]):
                return
            one = self._waiting.popleft()
            if one.state.request.use_prefix_cache and self.decoder.take_prefix(one.sequence):
                self._running.append(one)
            else:
                self._starting.append(one)

    def _has_memory(self, candidate: _Running) -> bool:
        """Whether the keys and values of one more sequence stay within the limit, if all reach their greatest length.
        One sequence alone always runs."""
        admitted = [*self._running, *self._starting]
        buffers = [one.sequence.buffer for one in admitted if one.sequence.buffer is not None]
        if self.max_cache_bytes is None or not buffers:
            return not admitted or self.max_cache_bytes is None or len(admitted) < 2
        longest = sum(one.prompt_length + one.limit for one in [*admitted, candidate])
        return longest * buffers[0].bytes_per_token <= self.max_cache_bytes

    def _take_starting(self, budget: int) -> list[_Running]:
        """The sequences that begin in this step: at least one if none has been begun, and others within the budget."""
        taken: list[_Running] = []
        known: set[tuple[int | None, tuple[int, ...]]] = set()
        while self._starting:
            first = self._starting[0]
            name = (first.sequence.adapter, tuple(first.sequence.tokens[:self.prefill_chunk]))
            cost = 0 if name in known else len(name[1])  # equal beginnings are computed once
            if self.decoder.can_join and cost > budget and (taken or self._running):
                break
            budget -= cost
            known.add(name)
            taken.append(self._starting.popleft())
        return taken

    def _compute(self, call: Callable[[Sequence[DecodedSequence], int], Tensor], members: Sequence[_Running],
                 chunk: int) -> list[TokenOutput]:
        """One forward pass, and the next token of every sequence whose tokens are all read."""
        logits = call([one.sequence for one in members], chunk)
        places = [i for i, one in enumerate(members) if one.is_read]
        if not places:
            return []
        logits = logits if len(places) == len(members) else logits[torch.tensor(places, device=logits.device)]
        ready = [members[i] for i in places]
        highest = logits.amax(-1).tolist()
        states = [one.state for one in ready]
        tokens = select_tokens(logits.nan_to_num() if any(x != x for x in highest) else logits, states)
        logprobs = compute_token_logprobs(logits, tokens, states)
        outputs = [self._push(one, token, logprob, top == top)
                   for one, token, logprob, top in zip(ready, tokens, logprobs, highest, strict=True)]
        for one, output in zip(ready, outputs, strict=True):
            if output.finish_reason:
                self._running.remove(one)
                self.decoder.release(one.sequence, keep=output.error is None)
        return outputs

    def _push(self, one: _Running, token: int, logprob: Any, is_finite: bool) -> TokenOutput:
        request = one.state.request
        if not is_finite:
            error = NotFinite(f"the model's output for prompt {request.index} is not a number, so no next token can be "
                              "selected",
                              "set the base's dtype to float32; if it is, the weights or the run are damaged")
            return TokenOutput(request, None, "error", error=error)
        one.state.push(token)
        self.tokens_generated += 1
        cached = one.sequence.cached_tokens
        if token in self.stops or token in request.sampling.stop:
            return TokenOutput(request, token, "stop", logprob, cached_tokens=cached)
        one.sequence.tokens.append(token)
        reason = "length" if len(one.state.generated) == one.limit else ""
        return TokenOutput(request, token, reason, logprob, cached_tokens=cached)  # type: ignore[arg-type]


# ---------------------------------------------------------------- whole outputs


def run_requests(engine: DecodingEngine, requests: Sequence[SequenceRequest]) -> Iterator[GenerationOutput]:
    """The output of each request, yielded when it is finished; `index` is the request's place in the call.

    Raises:
        DataError, BaseError: at once, for a prompt that cannot be read.
        NotFinite: the model's output is not a number.
    """
    for request in requests:
        engine.add(request)
    return _collect_outputs(engine, requests)


def _collect_outputs(engine: DecodingEngine, requests: Sequence[SequenceRequest]) -> Iterator[GenerationOutput]:
    places = {id(request): place for place, request in enumerate(requests)}
    outputs: dict[int, list[int]] = {place: [] for place in places.values()}
    try:
        while engine.has_work:
            for output in engine.step():
                place = places[id(output.request)]
                if output.error is not None:
                    raise output.error
                assert output.token is not None
                if output.finish_reason == "stop":
                    yield GenerationOutput(place, tuple(outputs[place]), True, output.token)
                    continue
                outputs[place].append(output.token)
                if output.finish_reason == "length":
                    yield GenerationOutput(place, tuple(outputs[place]), False)
    finally:
        for request in requests:
            engine.cancel(request)


def stream_request(engine: DecodingEngine, request: SequenceRequest) -> Iterator[int]:
    """The output of one request, token by token, without its stop token."""
    engine.add(request)
    try:
        while engine.has_work:
            for output in engine.step():
                if output.error is not None:
                    raise output.error
                if output.finish_reason != "stop":
                    assert output.token is not None
                    yield output.token
    finally:
        engine.cancel(request)


def build_requests(prompts: Sequence[Sequence[int]], sampling: SamplingParams,
                   adapters: Sequence[int] = ()) -> list[SequenceRequest]:
    """One request for each prompt of a call of `generate`."""
    assert not adapters or len(adapters) == len(prompts), (len(adapters), len(prompts))
    return [SequenceRequest(prompt, sampling, adapters[i] if adapters else None, sampling.first_prompt_index + i)
            for i, prompt in enumerate(prompts)]


def sort_by_length(requests: Iterable[SequenceRequest], groups: Sequence[int] = ()) -> list[SequenceRequest]:
    """The order in which padded batches have little padding: the longest first, group by group."""
    listed = list(requests)
    named = groups or [0] * len(listed)
    order = sorted(range(len(listed)), key=lambda i: (named[i], -len(listed[i].prompt)))
    return [listed[i] for i in order]


def restore_order(requests: Sequence[SequenceRequest], outputs: Iterable[GenerationOutput],
                  order: Sequence[SequenceRequest]) -> Iterator[GenerationOutput]:
    """Outputs with the index of their prompt in the call, of requests that were run in another order."""
    places = {id(request): i for i, request in enumerate(requests)}
    for output in outputs:
        yield GenerationOutput(places[id(order[output.index])], output.token_ids, output.finished, output.stop_token)


def find_eos_tokens(model: nn.Module, tokenizer: Any) -> set[int]:
    """All tokens that end an output: those of the model's generation config, and the tokenizer's eos token."""
    generation_config = get_optional(model, "generation_config")
    eos_id = generation_config.eos_token_id if generation_config is not None else None
    eos_ids = eos_id if isinstance(eos_id, list) else [eos_id]
    return {token for token in [*eos_ids, tokenizer.eos_token_id] if token is not None}
