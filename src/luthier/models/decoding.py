"""Text generation: batched decoding with a cache, in which finished rows are removed. Read `loading.py` first.

All generation uses one loop (`_decode`): `generate_outputs` collects its tokens into outputs,
`stream_tokens` yields
them one by one. Families differ in how a batch is started and extended (`DecodeBatch`): this file has the version for
causal
language models, `families/seq2seq.py` that for an encoder with a decoder. An output depends on its prompt, its
index and the sampling parameters, never on the other rows of a batch.

Shape letters: B rows of a batch, L columns so far (left padding, prompt, output), V vocabulary.
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
from luthier.models.hf_attributes import get_optional
from luthier.models.soft_prompts import causal

# Finished rows are removed when at most this share of the rows is unfinished: every removal copies the whole cache.
COMPACTION_THRESHOLD = 0.75
COMPACTION_THRESHOLD = 0.75


class DecodeBatch(Protocol):
    """A batch of outputs that are being generated, one row each."""

    def logits(self) -> Tensor:
        """[B, V] The logits of every row's next token."""
        ...

    def append(self, next_tokens: Tensor, kept_rows: Tensor | None) -> None:
        """Put `next_tokens` [B] at the end of the rows; those at `kept_rows` stay, None for all."""
        ...


StartBatch = Callable[[Sequence[Sequence[int]]], DecodeBatch]  # prompts -> a batch
RouteRows = Callable[[Sequence[int]], AbstractContextManager[None]]


def _no_routing(rows: Sequence[int]) -> AbstractContextManager[None]:
    return nullcontext()


def find_eos_tokens(model: nn.Module, tokenizer: Any) -> set[int]:
    """All tokens that end an output: those of the model's generation config, and the tokenizer's eos token."""
    generation_config = get_optional(model, "generation_config")
    eos_id = generation_config.eos_token_id if generation_config is not None else None
    eos_ids = eos_id if isinstance(eos_id, list) else [eos_id]
    return {token for token in [*eos_ids, tokenizer.eos_token_id] if token is not None}


def generate(model: nn.Module, prompts: Sequence[Sequence[int]], sampling: SamplingParams, eos: Set[int], pad: int,
             device: torch.device | str, route: RouteRows = _no_routing) -> Iterator[GenerationOutput]:
    """Generate from every prompt; each output is yielded when it is finished, with the index of its prompt.

    Args:
        model: a Transformers causal language model in evaluation mode, on `device`.
        prompts: token ids; prompts of similar length share a batch, the longest first.
        eos: tokens that end an output, like those of `sampling.stop`; they are not part of the output.
        pad: any token; it fills positions that are masked.
        route: prompt indices of a batch's rows -> a context in which each row uses its own adapter.

    Raises:
        BaseError: a prompt fills the model's context.
        DataError: a prompt is empty.
        NotFinite: the model's output is not a number.
    """
    start_batch = partial(CausalDecodeBatch, model, pad, device)
    return generate_outputs(start_batch, prompts, _limit_new_tokens(model, prompts, sampling, route), sampling, eos,
                            route)


def stream_batch(model: nn.Module, prompts: Sequence[Sequence[int]], sampling: SamplingParams, eos: Set[int], pad: int,
            device: torch.device | str, route: RouteRows = _no_routing) -> Iterator[tuple[int, int | None]]:
    """`generate` with all prompts in one batch, token by token: yields (index, token), and (index, None) when an output
    ends with a stop token. Closing the iterator ends the batch."""
    stops = eos | set(sampling.stop)
    limits = _limit_new_tokens(model, prompts, sampling, route)
    for index, token in _decode(partial(CausalDecodeBatch, model, pad, device), dict(enumerate(prompts)), limits,
                                sampling, stops,
                                route):
        yield index, None if token in stops else token


def stream_tokens(model: nn.Module, prompt: Sequence[int], sampling: SamplingParams, eos: Set[int]) -> Iterator[int]:
    """The output for one prompt, token by token: the same tokens as those of `generate` with this prompt alone."""
    start_batch = partial(CausalDecodeBatch, model, 0, next(model.parameters()).device)
    return stream_single(start_batch, prompt, _limit_new_tokens(model, [prompt], sampling), sampling, eos)


def generate_outputs(start_batch: StartBatch, prompts: Sequence[Sequence[int]], limits: Sequence[int],
                     sampling: SamplingParams,
            eos: Set[int], route: RouteRows = _no_routing,
            batch_groups: Sequence[int] = ()) -> Iterator[GenerationOutput]:
    """`generate` for any family.

    Args:
        limits: the maximum number of tokens of each output.
        batch_groups: a number for each prompt; prompts with different numbers are never in one batch.
    """
    stops = eos | set(sampling.stop)
    groups = batch_groups or [0] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: (groups[index], -len(prompts[index])))
    while order:
        members = [index for index in order[:sampling.batch_size] if groups[index] == groups[order[0]]]
        order = order[len(members):]
        batch = {index: prompts[index] for index in members}
        outputs: dict[int, list[int]] = {index: [] for index in batch}
        for index, token in _decode(start_batch, batch, limits, sampling, stops, route):
            if token in stops:
                yield GenerationOutput(index, tuple(outputs[index]), True, token)
                continue
            outputs[index].append(token)
            if len(outputs[index]) == limits[index]:
                yield GenerationOutput(index, tuple(outputs[index]), False)


def stream_single(start_batch: StartBatch, prompt: Sequence[int], limits: Sequence[int], sampling: SamplingParams,
           eos: Set[int]) -> Iterator[int]:
    """`stream_tokens` for any family."""
    stops = eos | set(sampling.stop)
    for _, token in _decode(start_batch, {0: prompt}, limits, sampling, stops):
        if token in stops:
            return
        yield token


def _limit_new_tokens(model: nn.Module, prompts: Sequence[Sequence[int]], sampling: SamplingParams,
            route: RouteRows = _no_routing) -> list[int]:
    """The maximum number of tokens of each output: `max_new_tokens`, or what context and virtual tokens leave."""
    assert sampling.max_new_tokens > 0, sampling
    assert sampling.batch_size > 0, sampling
    with route(range(len(prompts))):
        contexts = _remaining_contexts(model, len(prompts))
    for index, (prompt, context) in enumerate(zip(prompts, contexts, strict=True)):
        if not prompt:
            raise DataError(f"prompt {index} has no tokens",
                            "give the prompt at least one token, such as the bos token")
        if len(prompt) >= context:
            raise BaseError(f"prompt {index} has {len(prompt)} tokens, and the base's context of {context} must hold "
                            "the answer too", "shorten the prompt, or choose a base with a longer context")
    return [min(sampling.max_new_tokens, context - len(prompt))
            for prompt, context in zip(prompts, contexts, strict=True)]


def _remaining_contexts(model: nn.Module, rows: int) -> list[int]:
    """Each row's context length without its virtual tokens; practically unlimited if the config has none."""
    described: Any = model.config
    context = int(get_optional(described.get_text_config(), "max_position_embeddings") or 2**62)
    return [context - count for count in causal.count_virtual_tokens(model, rows)]


@torch.inference_mode()
def _decode(start_batch: StartBatch, prompts: Mapping[int, Sequence[int]], limits: Sequence[int],
            sampling: SamplingParams,
            stops: Set[int], route: RouteRows = _no_routing) -> Iterator[tuple[int, int]]:
    """Yields (index, token) for every prompt of one batch and every step, until a stop token or the limit."""
    rows = list(prompts)  # rows[i]: the index of the prompt of row i
    with route(rows):
        batch = start_batch(list(prompts.values()))
    remaining = {index: limits[index] for index in rows}
    # One generator for each output, so its numbers do not depend on the batch.
    uniforms = {index: Random(f"{sampling.seed} {sampling.first_prompt_index + index}") for index in rows}
    while True:
        with route(rows):  # not around a `yield`: the consumer's code must run outside of it
            logits = batch.logits()
        if not_finite := [index for index, top in zip(rows, logits.amax(-1).tolist(), strict=True) if top != top]:
            raise NotFinite(f"the model's output for prompts {not_finite[:5]} is not a number, so no next token can "
                            "be selected",
                            "set the base's dtype to float32; if it is, the weights or the run are damaged")
        next_tokens = sample_tokens(logits, sampling, [uniforms[index].random() for index in rows])
        for index, token in zip(rows, next_tokens.tolist(), strict=True):
            if index in remaining:
                remaining[index] -= 1
                if token in stops or not remaining[index]:
                    del remaining[index]
                yield index, token
        if not remaining:
            return
        kept_rows = None
        if len(remaining) <= COMPACTION_THRESHOLD * len(rows):
            # [rows that stay]
            kept_rows = torch.tensor([i for i, index in enumerate(rows) if index in remaining], device=logits.device)
            rows = [index for index in rows if index in remaining]
        batch.append(next_tokens, kept_rows)


class CausalDecodeBatch:
    """Prompts and their outputs so far, with a cache of the keys and values of all tokens but the last."""

    def __init__(self, model: nn.Module, pad: int, device: torch.device | str,
                 prompts: Sequence[Sequence[int]]) -> None:
        assert not model.training, "dropout would change the outputs: call model.eval() first"
        self.model = model
        self.tokens, self.mask = pad_left(prompts, pad, device)  # [B, L] each
        self.positions = (self.mask.cumsum(1) - 1).clamp(min=0)  # [B, L] padding has position 0
        # [B, 1] last position
        self.last = torch.tensor(_remaining_contexts(model, len(prompts)), device=device)[:, None] - 1
        described: Any = model.config
        self.cache = DynamicCache(config=described)

    def logits(self) -> Tensor:
        outputs: Tensor = self.model(input_ids=self.tokens, attention_mask=self.mask, position_ids=self.positions,
                                   past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits[:, -1]  # [B, V]
        return outputs

    def append(self, next_tokens: Tensor, kept_rows: Tensor | None) -> None:
        if kept_rows is not None:
            self.cache.batch_select_indices(kept_rows)
            next_tokens, self.mask = next_tokens[kept_rows], self.mask[kept_rows]
            self.positions, self.last = self.positions[kept_rows], self.last[kept_rows]
        self.tokens = next_tokens[:, None]  # [B, 1]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(next_tokens), 1)], dim=1)  # [B, L + 1]
        # Only a finished row that has not been removed yet can reach the end of the context.
        self.positions = (self.positions[:, -1:] + 1).clamp(max=self.last)  # [B, 1]


def pad_left(prompts: Sequence[Sequence[int]], pad: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """[B, L] token ids with padding on the left, and [B, L] their mask: 1 for a token, 0 for padding."""
    width = max(map(len, prompts))
    tokens = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return tokens, mask


def sample_tokens(logits: Tensor, sampling: SamplingParams, uniforms: Sequence[float]) -> Tensor:
    """[B] The next token of each row.

    Greedy at temperature 0. Otherwise inverse transform sampling: the token at which the cumulative probability exceeds
    the row's uniform number u in [0, 1), after temperature, then `top_k`, then nucleus filtering by `top_p`.

    Args:
        logits: [B, V].
        uniforms: [B] a uniform random number for each row.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)  # [B]
    wide = torch.float32 if logits.device.type == "mps" else torch.float64  # MPS does not support float64
    logits = logits.to(wide) / sampling.temperature  # [B, V] in float64: V probabilities are summed below
    order = None
    if sampling.top_k:
        logits, order = logits.topk(min(sampling.top_k, logits.shape[-1]))  # [B, top_k] each
    elif sampling.top_p < 1:
        logits, order = logits.sort(descending=True)  # [B, V] each
    probabilities = logits.softmax(-1)  # [B, V or top_k]
    if sampling.top_p < 1:
        before = probabilities.cumsum(-1) - probabilities  # [B, V or top_k] mass of the more probable tokens
        before[:, 0] = 0  # exactly 0: rounding must never remove the most probable token
        probabilities = probabilities.where(before < sampling.top_p, 0)
    reached = probabilities.cumsum(-1)  # [B, V or top_k]
    # [B, 1] Scaled by the mass that is left, in place of a second normalization.
    thrown = torch.tensor(uniforms, dtype=wide, device=logits.device)[:, None] * reached[:, -1:]
    # [B, 1] Clamped: rounding can lead behind the last token.
    picked = torch.searchsorted(reached, thrown, right=True).clamp(max=logits.shape[-1] - 1)
    return (picked if order is None else order.gather(-1, picked))[:, 0]  # [B]
