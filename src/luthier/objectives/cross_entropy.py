"""Weighted token cross-entropy: the loss of supervised fine-tuning and of continued pretraining. Read this file first.

    total = - sum_p w_p log p(t_p | all tokens before it)          count = sum_p w_p

`sft` and `pretrain` use the same function on different data: completions with weights, or whole documents. Their
perplexities therefore mean different things. docs/metrics.md defines each metric.

Shape letter: P predicted tokens.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field

from luthier.core.types import Loss, LossInputs, Outputs
from luthier.objectives.base import ObjectiveConfig


class CrossEntropyConfig(ObjectiveConfig):
    """Weighted token cross-entropy.

    Requires: `token_logps` and `token_hits` of the family.
    Metrics: `nll` (weighted, per unit of weight), `token_accuracy` (unweighted), `bits_per_byte` (unweighted).

    Example:
        >>> import torch
        >>> from luthier.core.types import Outputs, LossInputs
        >>> target = LossInputs(state_index=torch.tensor([0, 1]), token_ids=torch.tensor([5, 6]),
        ...                     weights=torch.tensor([1.0, 3.0]), num_examples=1, num_bytes=2)
        >>> logps = torch.tensor([-2.0, -1.0])
        >>> loss = SftConfig()(Outputs(token_logps=logps, token_hits=torch.tensor([False, True])), target)
        >>> float(loss.total), float(loss.count)
        (5.0, 4.0)
    """

    example_types: ClassVar[frozenset[str]] = frozenset({"ChatExample", "CompletionExample", "TextExample"})
    required_outputs: ClassVar[frozenset[str]] = frozenset({"token_logps", "token_hits"})

    def count(self, target: LossInputs) -> float:
        return float(target.weights.double().sum())  # float64: a float32 sum of many weights would round

    def __call__(self, outputs: Outputs, target: LossInputs) -> Loss:
        assert outputs.token_logps is not None
        assert outputs.token_hits is not None
        logps = outputs.token_logps  # [P]
        total = -(target.weights.to(logps.dtype) * logps).sum()  # []
        unweighted = logps.detach().sum()  # []
        weight = target.weights.sum()  # []
        return Loss(total, weight, {
            "nll": (total.detach(), weight),
            "token_accuracy": (outputs.token_hits.sum(), float(logps.shape[0])),
            "bits_per_byte": (-unweighted / math.log(2), float(target.num_bytes)),
        })


class SftConfig(CrossEntropyConfig):
    """Supervised fine-tuning: only the assistant's tokens have a weight."""

    name: Literal["sft"] = "sft"


class PretrainConfig(CrossEntropyConfig):
    """Continued pretraining on documents, with the task that the model was pretrained with.

    A causal language model predicts every token from the tokens before it. For encoders and sequence-to-sequence
    models a set P of tokens is masked (`data/masking.py`), and only these are predicted:

        encoder                 total = - sum_(p in P) w_p log p(t_p | the text without P)
        sequence to sequence    total = - sum_p w_p log p(t_p | the text without P, the target tokens before p)

    Devlin et al. 2019 (arXiv:1810.04805) section 3.1; Raffel et al. 2020 (1910.10683) section 3.1.4.
    """

    uses_masking: ClassVar[bool] = True

    name: Literal["pretrain"] = "pretrain"
    mlm_probability: float = Field(0.15, gt=0, le=0.5, description=(
        "encoders and sequence-to-sequence models: share of a document's tokens that is masked"))
    whole_word_mask: bool = Field(False, description="encoders: mask all tokens of a word together")
    mean_noise_span_length: float = Field(3.0, ge=1, description=(
        "sequence-to-sequence models: mean length of a masked span, in tokens"))
