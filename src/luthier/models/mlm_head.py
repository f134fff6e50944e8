"""An encoder's own head for masked words: states to logits, by the base's modules as they are. Read
`models/ops/fused_logprobs.py` first.

Architectures differ in the names of these modules and in nothing else: a map, a norm, and the projection onto the
vocabulary, most often the embedding's own weight with a bias. They work on each position by itself, so `log_probs` may
apply all of them chunk by chunk. Whether the base's logits are what they give is proved when it is loaded.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from luthier.core.errors import BaseError

# Names of the modules that follow one another behind the stack: BERT's and its heirs', RoBERTa's and its heirs',
# ALBERT's, DistilBERT's, ModernBERT's, ELECTRA's.
HEAD_MODULES = (("cls",), ("lm_head",), ("predictions",),
          ("vocab_transform", "activation", "vocab_layer_norm", "vocab_projector"), ("head", "decoder"),
          ("generator_predictions", "generator_lm_head"))


class MaskedLMHead:
    """states [P, D] -> logits [P, V].

    Args:
        model: an `AutoModelForMaskedLM` model.

    Raises:
        BaseError: its head has modules of unknown names.
    """

    def __init__(self, model: Any) -> None:
        there = dict(model.named_children())
        chain = next((chain for chain in HEAD_MODULES if there.keys() >= set(chain)), None)
        if chain is None:
            raise BaseError(f"a {type(model).__name__} has a head for masked words that is not known here",
                            "choose another encoder, such as BERT or RoBERTa")
        self.model, self.chain = model, chain

    def __call__(self, states: Tensor) -> Tensor:
        for name in self.chain:  # looked up anew: a method may have exchanged one
            states = self.model.get_submodule(name)(states)
        return states

    @property
    def weight(self) -> Tensor:
        """[V, ...] of the projection."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight
