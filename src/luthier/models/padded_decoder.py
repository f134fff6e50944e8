"""Decoding of one padded batch at a time, for models that cannot decode sequences apart. Read `decoding.py` first.

Families differ in how a batch is started and extended (`DecodeBatch`): this file has the version for causal language
models, `families/seq2seq.py` that for an encoder with a decoder.

Shape letters: B rows of a batch, L columns so far (left padding, prompt, output), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from luthier.core.generation import GenerationOutput, SamplingParams
from luthier.models.decoding import DecodingEngine, build_requests, restore_order, run_requests, sort_by_length
from luthier.models.hf_attributes import get_optional
from luthier.models.sequence_decoder import DecodedSequence
from luthier.models.soft_prompts import causal

# Finished rows are removed when at most this share of the rows is unfinished: every removal copies the whole cache.
COMPACTION_THRESHOLD = 0.75


class DecodeBatch(Protocol):
    """A padded batch of outputs that are being generated, one row each."""

    def logits(self) -> Tensor:
        """[B, V] The logits of every row's next token."""
        ...

    def append(self, next_tokens: Tensor, kept_rows: Tensor | None) -> None:
        """Put `next_tokens` [B] at the end of the rows; those at `kept_rows` stay, None for all."""
        ...


StartBatch = Callable[[Sequence[Sequence[int]]], DecodeBatch]  # prompts -> a batch
RouteRows = Callable[[Sequence[int | None]], AbstractContextManager[None]]  # adapters of the rows -> a context


def _no_routing(adapters: Sequence[int | None]) -> AbstractContextManager[None]:
    return nullcontext()


class BatchDecoder:
    """A `Decoder` that computes one padded batch at a time. Finished rows are removed now and then."""

    can_join = False

    def __init__(self, start_batch: StartBatch, route: RouteRows = _no_routing) -> None:
        self._start_batch, self._route = start_batch, route
        self._rows: list[DecodedSequence] = []

    def begin(self, sequences: Sequence[DecodedSequence], chunk: int) -> Tensor:
        self._rows = list(sequences)
        with self._route([sequence.adapter for sequence in sequences]):
            self._batch = self._start_batch([sequence.tokens for sequence in sequences])
        return self._read()

    def extend(self, sequences: Sequence[DecodedSequence], chunk: int) -> Tensor:
        living = {id(sequence): i for i, sequence in enumerate(sequences)}
        device = self._device
        next_tokens = torch.tensor([row.tokens[-1] for row in self._rows], device=device)
        kept = None
        if len(sequences) <= COMPACTION_THRESHOLD * len(self._rows):
            kept = torch.tensor([i for i, row in enumerate(self._rows) if id(row) in living], device=device)
            self._rows = [row for row in self._rows if id(row) in living]
        self._batch.append(next_tokens, kept)
        logits = self._read()
        order = {id(row): i for i, row in enumerate(self._rows)}
        return logits[torch.tensor([order[id(sequence)] for sequence in sequences], device=device)]

    def _read(self) -> Tensor:
        with self._route([row.adapter for row in self._rows]):
            logits = self._batch.logits()
        self._device = logits.device
        for row in self._rows:
            row.read = len(row.tokens)
        return logits

    def take_prefix(self, sequence: DecodedSequence) -> bool:
        return False

    def release(self, sequence: DecodedSequence, keep: bool) -> None:
        pass  # its row is removed from the batch later


class CausalDecodeBatch:
    """Prompts and their outputs so far, with a cache of the keys and values of all tokens but the last."""

    def __init__(self, model: nn.Module, pad: int, device: torch.device | str,
                 prompts: Sequence[Sequence[int]]) -> None:
        assert not model.training, "dropout would change the outputs: call model.eval() first"
        self.model = model
        self.tokens, self.mask = pad_left(prompts, pad, device)
        self.positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        # [B, 1] last position
        self.last = torch.tensor(measure_contexts(model, len(prompts)), device=device)[:, None] - 1
        described: Any = model.config
        self.cache = DynamicCache(config=described)

    def logits(self) -> Tensor:
        outputs: Tensor = self.model(input_ids=self.tokens, attention_mask=self.mask, position_ids=self.positions,
                                   past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        return outputs

    def append(self, next_tokens: Tensor, kept_rows: Tensor | None) -> None:
        if kept_rows is not None:
            self.cache.batch_select_indices(kept_rows)
            next_tokens, self.mask = next_tokens[kept_rows], self.mask[kept_rows]
            self.positions, self.last = self.positions[kept_rows], self.last[kept_rows]
        self.tokens = next_tokens[:, None]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(next_tokens), 1)], dim=1)
        # Only a finished row that has not been removed yet can reach the end of the context.
        self.positions = (self.positions[:, -1:] + 1).clamp(max=self.last)


def pad_left(prompts: Sequence[Sequence[int]], pad: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """[B, L] token ids with padding on the left, and [B, L] their mask: 1 for a token, 0 for padding."""
    width = max(map(len, prompts))
    tokens = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return tokens, mask


def measure_contexts(model: nn.Module, rows: int) -> list[int]:
    """Each row's context length without its virtual tokens; practically unlimited if the config has none."""
    described: Any = model.config
    context = int(get_optional(described.get_text_config(), "max_position_embeddings") or 2**62)
    return [context - count for count in causal.count_virtual_tokens(model, rows)]


def build_padded_engine(model: nn.Module, stops: Set[int], pad: int, device: torch.device | str, max_num_seqs: int,
                        route: RouteRows = _no_routing) -> DecodingEngine:
    """An engine for a causal language model of Transformers that computes padded batches.

    Args:
        model: in evaluation mode, on `device`.
        pad: any token; it fills positions that are masked.
        route: adapters of a batch's rows -> a context in which each row uses its own.
    """
    def measure(adapter: int | None) -> int:
        with route([adapter]):
            return measure_contexts(model, 1)[0]

    return DecodingEngine(BatchDecoder(partial(CausalDecodeBatch, model, pad, device), route), stops, measure,
                          max_num_seqs=max_num_seqs)


def generate(model: nn.Module, prompts: Sequence[Sequence[int]], sampling: SamplingParams, eos: Set[int], pad: int,
             device: torch.device | str) -> Iterator[GenerationOutput]:
    """Generate from every prompt with a model of Transformers, without a family; outputs are yielded as they finish.

    Raises:
        BaseError: a prompt fills the model's context.
        DataError: a prompt is empty.
        NotFinite: the model's output is not a number.
    """
    engine = build_padded_engine(model, eos, pad, device, sampling.batch_size)
    requests = build_requests(prompts, sampling)
    yield from restore_order(requests, run_requests(engine, order := sort_by_length(requests)), order)
