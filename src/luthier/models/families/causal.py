"""The family of causal language models: a packed row in, the outputs that the objective needs out.

Read `hf_model.py` (how a row is computed) and `ops/fused_logprobs.py` (log-probabilities) first; this file combines
them and adds generation.

Shape letters: P predictions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from luthier.core.protocols import GenerationOutput, SamplingParams
from luthier.models.adapter_routing import route_indices
from luthier.models.architectures import MissingLMHead
from luthier.models.decoding import find_eos_tokens, generate, stream_batch, stream_tokens
from luthier.models.hf_attributes import get_optional
from luthier.models.hf_model import Layout, PackedHFModel
from luthier.models.ops.fused_logprobs import compute_logprobs
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
        assert not adapters or len(adapters) == len(prompts), (len(adapters), len(prompts))
        return generate(self.model, prompts, sampling, eos=self.stop_tokens, pad=0, device=self.device,
                        route=lambda rows: route_indices(self.router, 0,
                                                         [adapters[i] for i in rows] if adapters else []))

    def stream_batch(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams,
               adapters: Sequence[int] = ()) -> Iterator[tuple[int, int | None]]:
        """Like `generate`, with all prompts in one batch, token by token: (index, token), and None at the end of
        one."""
        return stream_batch(self.model, prompts, sampling, self.stop_tokens, pad=0, device=self.device,
                       route=lambda rows: route_indices(self.router, 0,
                                                        [adapters[i] for i in rows] if adapters else []))

    def stream(self, prompt: Sequence[int], sampling: SamplingParams) -> Iterator[int]:
        """One output, token by token."""
        return stream_tokens(self.model, prompt, sampling, eos=self.stop_tokens)

    @property
    def stop_tokens(self) -> set[int]:
        return find_eos_tokens(self.model, self.tokenizer) | set(self.chat_format.stop_tokens)
