"""The causal language model family: one packed row in, what the objective asked for out.

Read `hf_model.py` (how a row runs) and `models/ops/fused_logprobs.py` (the loss's end) first; this file joins them and
generates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from luthier.core.protocols import Generated, Sampling
from luthier.models.adapter_routing import through
from luthier.models.architectures import NoHead
from luthier.models.decoding import eos_tokens, generate, stream, written
from luthier.models.hf_model import Layout, Packed
from luthier.models.ops.fused_logprobs import log_probs
from luthier.models.task_heads import Pooling


class CausalLM(Packed):
    """A decoder of Transformers behind the family's contract.

    Args:
        model: an `AutoModelForCausalLM` model.
        tokenizer: its tokenizer.
        layout: see `Packed`.
        pooling: of items; the last token alone has seen all the others.
    """

    task: ClassVar[str] = "CAUSAL_LM"
    writes: ClassVar[bool] = True
    options: ClassVar[Mapping[str, Any]] = {"use_cache": False}

    def __init__(self, model: Any, tokenizer: Any, layout: Layout | None = None, pooling: Pooling = "last") -> None:
        super().__init__(model, tokenizer, layout)
        self.pooling = pooling
        config = model.config.get_text_config()
        self._softcap = getattr(config, "final_logit_softcapping", None)
        times, over = (getattr(config, name, None) or 1.0 for name in ("logit_scale", "logits_scaling"))
        self._scale = float(times) / float(over)

    def _log_probs(self, states: Tensor, tokens: Tensor, entropies: bool,
                   temperature: float) -> tuple[Tensor, Tensor, Tensor | None]:
        if self.anatomy.head is None:
            NoHead()(states)
        head = self.model.get_output_embeddings()  # looked up anew: a method may have exchanged it
        return log_probs(head, states, tokens, self._softcap, self._scale, entropies, temperature)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling,
                 adapters: Sequence[int] = ()) -> Iterator[Generated]:
        """See `Family`. `adapters`: each prompt's index into the manager, -1 for the bare base; empty: as it is."""
        assert not adapters or len(adapters) == len(prompts), (len(adapters), len(prompts))
        return generate(self.model, prompts, sampling, eos=self.stops, pad=0, device=self.device,
                        routed=lambda rows: through(self.router, 0, [adapters[i] for i in rows] if adapters else []))

    def tokens(self, prompts: Sequence[Sequence[int]], sampling: Sampling,
               adapters: Sequence[int] = ()) -> Iterator[tuple[int, int | None]]:
        """As `generate`, all prompts in one batch, token by token: (index, token); None where an answer has ended."""
        return written(self.model, prompts, sampling, self.stops, pad=0, device=self.device,
                       routed=lambda rows: through(self.router, 0, [adapters[i] for i in rows] if adapters else []))

    def stream(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """One answer token by token."""
        return stream(self.model, prompt, sampling, eos=self.stops)

    @property
    def stops(self) -> set[int]:
        return eos_tokens(self.model, self.tokenizer) | set(self.chat_format.stop_tokens)
