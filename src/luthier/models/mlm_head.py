"""An encoder's masked-language-modeling head: states to logits, by the base's own modules. Read
`ops/fused_logprobs.py` first.

Architectures differ only in the names of these modules: a linear layer, a norm, and the projection onto the vocabulary,
usually the tied embedding with a bias. They are applied to each position separately, so `compute_logprobs` may apply
them in chunks. The family checks on loading that they reproduce the base's logits.

Shape letters: P positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from luthier.core.errors import BaseError

# The names of the head's modules in order: BERT and derivatives, RoBERTa and derivatives, ALBERT, DistilBERT,
# ModernBERT,
# ELECTRA.
HEAD_MODULES = (("cls",), ("lm_head",), ("predictions",),
          ("vocab_transform", "activation", "vocab_layer_norm", "vocab_projector"), ("head", "decoder"),
          ("generator_predictions", "generator_lm_head"))


class MaskedLMHead:
    """states [P, D] -> logits [P, V].

    Args:
        model: an `AutoModelForMaskedLM` model.

    Raises:
        BaseError: the names of its head's modules are unknown.
    """

    def __init__(self, model: Any) -> None:
        there = dict(model.named_children())
        chain = next((chain for chain in HEAD_MODULES if there.keys() >= set(chain)), None)
        if chain is None:
            raise BaseError(f"the masked-language-modeling head of {type(model).__name__} is not supported",
                            "choose another encoder, such as BERT or RoBERTa")
        self.model, self.chain = model, chain

    def __call__(self, states: Tensor) -> Tensor:
        for name in self.chain:  # read on every call: a method may have replaced one
            states = self.model.get_submodule(name)(states)  # [P, D], after the last one [P, V]
        return states

    @property
    def weight(self) -> Tensor:
        """[V, ...] The weight of the projection."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight
