"""Answers from a language model: batches with a cache, rows that leave when they are done. Read `loading.py` first.

One loop (`_decode`) serves everything that generates: `generate_outputs` collects its tokens into answers,
`stream_tokens` hands them
on one by one. What differs between families is how a batch is begun and gone on with (`DecodeBatch`): here a causal
language
model's, in `models/families/seq2seq.py` an encoder with a decoder. An answer depends on its prompt, its index and the
settings, never on its neighbours in a batch.

Shape letters: B rows of a batch, L columns so far (left padding, prompt, answer), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from random import Random
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from luthier.core.errors import BaseError, DataError, NotFinite
from luthier.core.protocols import GenerationOutput, SamplingParams
from luthier.models.soft_prompts import causal

# rows leave together, once at most this share still runs: each leaving copies the whole cache
COMPACTION_THRESHOLD = 0.75


class DecodeBatch(Protocol):
    """A batch of answers that are being written, one row each."""

    def logits(self) -> Tensor:
        """[B, V] of every row's next token."""
        ...

    def append(self, chosen: Tensor, kept: Tensor | None) -> None:
        """Put `chosen` [B] at the end of the rows; those at `kept` stay, None for all."""
        ...


StartBatch = Callable[[Sequence[Sequence[int]]], DecodeBatch]  # prompts -> their batch
RouteRows = Callable[[Sequence[int]], AbstractContextManager[None]]


def _no_routing(rows: Sequence[int]) -> AbstractContextManager[None]:
    return nullcontext()


def find_eos_tokens(model: nn.Module, tokenizer: Any) -> set[int]:
    """Every token that ends an answer: those of the model's generation config, and the tokenizer's own."""
    settings = getattr(model, "generation_config", None)
    named = settings.eos_token_id if settings is not None else None
    listed = named if isinstance(named, list) else [named]
    return {token for token in [*listed, tokenizer.eos_token_id] if token is not None}


def generate(model: nn.Module, prompts: Sequence[Sequence[int]], sampling: SamplingParams, eos: Set[int], pad: int,
             device: torch.device | str, routed: RouteRows = _no_routing) -> Iterator[GenerationOutput]:
    """Answer every prompt; each answer is yielded as soon as it is done, with the index of its prompt.

    Args:
        model: a Transformers causal language model in evaluation mode, on `device`.
        prompts: token ids; prompts of similar length share a batch, the longest first.
        eos: tokens that end an answer, as those of `sampling.stop` do; neither is part of it.
        pad: any token; it fills places that no one attends to.
        routed: the prompts that a batch's rows belong to -> a context in which each row goes through its own adapter.

    Raises:
        BaseError: a prompt fills the model's context.
        DataError: a prompt is empty.
        NotFinite: the model's output is not a number.
    """
    begin = partial(CausalDecodeBatch, model, pad, device)
    return generate_outputs(begin, prompts, _limit_new_tokens(model, prompts, sampling, routed), sampling, eos, routed)


def stream_batch(model: nn.Module, prompts: Sequence[Sequence[int]], sampling: SamplingParams, eos: Set[int], pad: int,
            device: torch.device | str, routed: RouteRows = _no_routing) -> Iterator[tuple[int, int | None]]:
    """`generate` with all prompts in one batch, token by token: (index, token), and (index, None) where an answer ended
    by itself. Whoever stops listening ends the batch."""
    stops = eos | set(sampling.stop)
    limits = _limit_new_tokens(model, prompts, sampling, routed)
    for index, token in _decode(partial(CausalDecodeBatch, model, pad, device), dict(enumerate(prompts)), limits,
                                sampling, stops,
                                routed):
        yield index, None if token in stops else token


def stream_tokens(model: nn.Module, prompt: Sequence[int], sampling: SamplingParams, eos: Set[int]) -> Iterator[int]:
    """The answer to one prompt, token by token: the same tokens that `generate` gives it as its only prompt."""
    begin = partial(CausalDecodeBatch, model, 0, next(model.parameters()).device)
    return stream_single(begin, prompt, _limit_new_tokens(model, [prompt], sampling), sampling, eos)


def generate_outputs(begin: StartBatch, prompts: Sequence[Sequence[int]], limits: Sequence[int],
                     sampling: SamplingParams,
            eos: Set[int], routed: RouteRows = _no_routing, apart: Sequence[int] = ()) -> Iterator[GenerationOutput]:
    """`generate` for any family.

    Args:
        limits: how many tokens each answer may have.
        apart: a number for each prompt; those with different ones share no batch.
    """
    stops = eos | set(sampling.stop)
    kinds = apart or [0] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: (kinds[index], -len(prompts[index])))
    while order:
        alike = [index for index in order[:sampling.batch_size] if kinds[index] == kinds[order[0]]]
        order = order[len(alike):]
        batch = {index: prompts[index] for index in alike}
        found: dict[int, list[int]] = {index: [] for index in batch}
        for index, token in _decode(begin, batch, limits, sampling, stops, routed):
            if token in stops:
                yield GenerationOutput(index, tuple(found[index]), True, token)
                continue
            found[index].append(token)
            if len(found[index]) == limits[index]:
                yield GenerationOutput(index, tuple(found[index]), False)


def stream_single(begin: StartBatch, prompt: Sequence[int], limits: Sequence[int], sampling: SamplingParams,
           eos: Set[int]) -> Iterator[int]:
    """`stream_tokens` for any family."""
    stops = eos | set(sampling.stop)
    for _, token in _decode(begin, {0: prompt}, limits, sampling, stops):
        if token in stops:
            return
        yield token


def _limit_new_tokens(model: nn.Module, prompts: Sequence[Sequence[int]], sampling: SamplingParams,
            routed: RouteRows = _no_routing) -> list[int]:
    """How many tokens each answer may have: what was asked for, or what the context and virtual tokens leave to it."""
    assert sampling.max_new_tokens > 0, sampling
    assert sampling.batch_size > 0, sampling
    with routed(range(len(prompts))):
        contexts = _remaining_contexts(model, len(prompts))
    for index, (prompt, context) in enumerate(zip(prompts, contexts, strict=True)):
        if not prompt:
            raise DataError(f"prompt {index} has no tokens, and a model can only go on from something",
                            "give the prompt at least one token, such as the one that begins a text")
        if len(prompt) >= context:
            raise BaseError(f"prompt {index} has {len(prompt)} tokens, and the base's context of {context} must hold "
                            "the answer too", "shorten the prompt, or choose a base with a longer context")
    return [min(sampling.max_new_tokens, context - len(prompt))
            for prompt, context in zip(prompts, contexts, strict=True)]


def _remaining_contexts(model: nn.Module, rows: int) -> list[int]:
    """Positions that the model knows and each row's virtual tokens leave; endless where its config does not say."""
    described: Any = model.config
    context = int(getattr(described.get_text_config(), "max_position_embeddings", None) or 2**62)
    return [context - taken for taken in causal.count_virtual_tokens(model, rows)]


@torch.inference_mode()
def _decode(begin: StartBatch, prompts: Mapping[int, Sequence[int]], limits: Sequence[int], sampling: SamplingParams,
            stops: Set[int], routed: RouteRows = _no_routing) -> Iterator[tuple[int, int]]:
    """(index, token) for every prompt of one batch and every step, until it has met a stop token or its limit."""
    rows = list(prompts)  # rows[i]: the prompt that row i of the batch belongs to
    with routed(rows):
        batch = begin(list(prompts.values()))
    left = {index: limits[index] for index in rows}
    dice = {index: Random(f"{sampling.seed} {sampling.first_prompt_index + index}") for index in rows}
    while True:
        with routed(rows):  # not around a `yield`: whoever takes the answer works outside of it
            logits = batch.logits()
        if lost := [index for index, top in zip(rows, logits.amax(-1).tolist(), strict=True) if top != top]:
            raise NotFinite(f"the model's output for prompts {lost[:5]} is not a number, so there is no next token",
                            "set the base's dtype to float32; if it is, the weights or the run are damaged")
        chosen = sample_tokens(logits, sampling, [dice[index].random() for index in rows])
        for index, token in zip(rows, chosen.tolist(), strict=True):
            if index in left:
                left[index] -= 1
                if token in stops or not left[index]:
                    del left[index]
                yield index, token
        if not left:
            return
        kept = None
        if len(left) <= COMPACTION_THRESHOLD * len(rows):
            kept = torch.tensor([i for i, index in enumerate(rows) if index in left], device=logits.device)
            rows = [index for index in rows if index in left]
        batch.append(chosen, kept)


class CausalDecodeBatch:
    """Prompts and the answers that go on from them, with the keys and values of all but their last tokens."""

    def __init__(self, model: nn.Module, pad: int, device: torch.device | str,
                 prompts: Sequence[Sequence[int]]) -> None:
        assert not model.training, "dropout would fall on the answers: call model.eval() first"
        self.model = model
        self.tokens, self.mask = pad_left(prompts, pad, device)
        self.positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        # position of each row
        self.last = torch.tensor(_remaining_contexts(model, len(prompts)), device=device)[:, None] - 1
        described: Any = model.config
        self.cache = DynamicCache(config=described)

    def logits(self) -> Tensor:
        found: Tensor = self.model(input_ids=self.tokens, attention_mask=self.mask, position_ids=self.positions,
                                   past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        return found

    def append(self, chosen: Tensor, kept: Tensor | None) -> None:
        if kept is not None:
            self.cache.batch_select_indices(kept)
            chosen, self.mask = chosen[kept], self.mask[kept]
            self.positions, self.last = self.positions[kept], self.last[kept]
        self.tokens = chosen[:, None]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(chosen), 1)], dim=1)
        # Only a row that is done, and waits for others to leave with it, can meet the end of the context.
        self.positions = (self.positions[:, -1:] + 1).clamp(max=self.last)


def pad_left(prompts: Sequence[Sequence[int]], pad: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """[B, L] token ids with padding on the left, and [B, L] 1 where there is a token."""
    width = max(map(len, prompts))
    tokens = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return tokens, mask


def sample_tokens(logits: Tensor, sampling: SamplingParams, dice: Sequence[float]) -> Tensor:
    """The next token of each row, [B].

    Greedy at temperature 0. Else the row's die u in [0, 1) picks the token at which the cumulative probability passes
    u, after temperature, then the `top_k` most probable, then the fewest of those that hold `top_p` of the rest.

    Args:
        logits: [B, V].
        dice: one number for each row.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    wide = torch.float32 if logits.device.type == "mps" else torch.float64  # MPS knows no float64
    logits = logits.to(wide) / sampling.temperature
    order = None
    if sampling.top_k:
        logits, order = logits.topk(min(sampling.top_k, logits.shape[-1]))
    elif sampling.top_p < 1:
        logits, order = logits.sort(descending=True)
    probabilities = logits.softmax(-1)
    if sampling.top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        before[:, 0] = 0  # exactly: the most probable token stays, whatever was rounded
        probabilities = probabilities.where(before < sampling.top_p, 0)
    reached = probabilities.cumsum(-1)
    thrown = torch.tensor(dice, dtype=wide, device=logits.device)[:, None] * reached[:, -1:]
    picked = torch.searchsorted(reached, thrown, right=True).clamp(max=logits.shape[-1] - 1)
    return (picked if order is None else order.gather(-1, picked))[:, 0]
