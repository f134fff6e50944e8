"""The family of causal language models: a packed row in, the outputs that the objective needs out.

Read `hf_model.py` (how a row is computed) and `ops/fused_logprobs.py` (log-probabilities) first; this file combines
them and adds generation.

Shape letters: P predictions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor

from luthier.core.protocols import GenerationOutput, SamplingParams
from luthier.core.types import Inputs, SegmentTree
from luthier.models.adapter_routing import route_indices, route_segments
from luthier.models.architectures import MissingLMHead
from luthier.models.attention.cached import AttentionCache, RecordingCache, check_same_shapes
from luthier.models.decoding import (
    DecodingEngine,
    build_requests,
    find_eos_tokens,
    restore_order,
    run_requests,
    sort_by_length,
    stream_request,
)
from luthier.models.hf_attributes import get_optional
from luthier.models.hf_model import Layout, PackedHFModel
from luthier.models.ops.fused_logprobs import compute_logprobs
from luthier.models.padded_decoder import build_padded_engine, measure_contexts
from luthier.models.sequence_decoder import DecodedSequence, SequenceDecoder
from luthier.models.soft_prompts.causal import count_virtual_tokens, suspend_injection
from luthier.models.task_heads import Pooling


class CausalLM(PackedHFModel):
    """A decoder of Transformers as a `Family`.

    Args:
        model: an `AutoModelForCausalLM` model.
        tokenizer: its tokenizer.
        layout: see `PackedHFModel`.
        pooling: of items; only the last token attends to all others.
    """

    task: ClassVar[str] = "CAUSAL_LM"
    can_generate: ClassVar[bool] = True
    options: ClassVar[Mapping[str, Any]] = {"use_cache": False}

    def __init__(self, model: Any, tokenizer: Any, layout: Layout | None = None, pooling: Pooling = "last") -> None:
        super().__init__(model, tokenizer, layout)
        self.pooling = pooling
        config = model.config.get_text_config()
        self._softcap = get_optional(config, "final_logit_softcapping")
        times, over = (get_optional(config, name) or 1.0 for name in ("logit_scale", "logits_scaling"))
        # Cohere multiplies the logits, Granite divides them.
        self._scale = float(times) / float(over)
        self._has_sequence_decoder: bool | None = None  # not checked yet

    def _log_probs(self, states: Tensor, tokens: Tensor, entropies: bool,
                   temperature: float) -> tuple[Tensor, Tensor, Tensor | None]:
        if self.structure.head is None:
            MissingLMHead()(states)
        head = self.model.get_output_embeddings()  # read on every call: a method may have replaced it
        return compute_logprobs(head, states, tokens, self._softcap, self._scale, entropies, temperature)  # [P] each

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams,
                 adapters: Sequence[int] = ()) -> Iterator[GenerationOutput]:
        """See `Family`. `adapters`: for each prompt an index of the adapter manager, -1 for the base; empty: no
        routing."""
        engine = self.build_engine(sampling.batch_size)
        requests = build_requests(prompts, sampling, adapters)
        order = requests if engine.decoder.can_join else sort_by_length(requests)
        return restore_order(requests, run_requests(engine, order), order)

    def stream(self, prompt: Sequence[int], sampling: SamplingParams) -> Iterator[int]:
        """One output, token by token."""
        return stream_request(self.build_engine(1), build_requests([prompt], sampling)[0])

    def build_engine(self, max_num_seqs: int, *, max_cache_bytes: int | None = None, prefix_cache_bytes: int = 0,
                     is_continuous: bool = True,
                     versions: Callable[[int | None], int] = lambda adapter: 0) -> DecodingEngine:
        """An engine that decodes with this model. Several may exist; calls of their steps may alternate.

        Args:
            max_num_seqs: sequences decoded together.
            max_cache_bytes: of keys and values; further sequences wait.
            prefix_cache_bytes: how much of ended sequences is kept for others that begin alike.
            is_continuous: False: sequences begin only when all others have ended.
            versions: adapter -> a number that changes when the adapter is loaded again.
        """
        assert not self.training, "dropout would change the outputs: call train(False) first"
        if not self._decodes_sequences():
            return build_padded_engine(self.model, self.stop_tokens, 0, self.device, max_num_seqs, self._route_rows)
        decoder = SequenceDecoder(self._run_with_cache, self._compute_logits, self._count_virtual_tokens, self.device,
                                  prefix_cache_bytes)
        return DecodingEngine(decoder, self.stop_tokens, self._measure_context, max_num_seqs=max_num_seqs,
                              max_cache_bytes=max_cache_bytes, is_continuous=is_continuous, versions=versions)

    # ---------------------------------------------------------------- what an engine calls

    def _run_with_cache(self, inputs: Inputs, cache: AttentionCache, with_virtual_tokens: bool) -> Tensor:
        """[T, D] The states of a packed row whose attention is that of `cache`."""
        with (route_segments(self.router, inputs.segment_tree, packed=True),
              nullcontext() if with_virtual_tokens else suspend_injection(self.model)):
            return self._run_packed(inputs, attention_cache=cache)

    def _compute_logits(self, states: Tensor) -> Tensor:
        """[B, V] from [B, D]."""
        logits: Tensor = self.model.get_output_embeddings()(states) * self._scale
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap

    def _count_virtual_tokens(self, adapters: Sequence[int | None]) -> list[int]:
        with self._route_rows(adapters):
            return count_virtual_tokens(self.model, len(adapters))

    def _measure_context(self, adapter: int | None) -> int:
        with self._route_rows([adapter]):
            return measure_contexts(self.model, 1)[0]

    def _route_rows(self, adapters: Sequence[int | None]) -> AbstractContextManager[None]:
        routed = any(adapter is not None for adapter in adapters)
        return route_indices(self.router, 0, [-1 if a is None else a for a in adapters] if routed else [])

    @torch.inference_mode()
    def _decodes_sequences(self) -> bool:
        """Whether sequences can be decoded apart: packed rows, and equal states with a cache and without."""
        if self._has_sequence_decoder is None:
            self._has_sequence_decoder = self.layout == "packed" and self._check_sequence_decoder()
        return self._has_sequence_decoder

    def _check_sequence_decoder(self) -> bool:
        tokens = [1, 2, 3, 4]
        inputs = Inputs(torch.tensor(tokens, device=self.device), torch.arange(4, device=self.device),
                        SegmentTree((4,), (-1,)))
        recorded = RecordingCache(1)
        with suspend_injection(self.model):
            whole = self._run_with_cache(inputs, recorded, True).float()  # [4, D]
            if not recorded.keys[0] or not check_same_shapes(recorded.keys[0]):
                return False
            decoder = SequenceDecoder(self._run_with_cache, lambda states: states, lambda adapters: [0] * len(adapters),
                                      self.device)
            sequence = DecodedSequence(tokens, None)
            decoder.begin([sequence], 3)
            last = decoder.extend([sequence], 1)[0].float()  # [D]
        return torch.allclose(last, whole[-1], rtol=1e-2, atol=1e-2 * float(whole.abs().max()))

    @property
    def stop_tokens(self) -> set[int]:
        return find_eos_tokens(self.model, self.tokenizer) | set(self.chat_format.stop_tokens)
