"""Weighted token cross-entropy: what instruction tuning and continued pretraining minimise.

    total = - sum_p w_p log p(t_p | what stands before it)          count = sum_p w_p

`sft` and `pretrain` are the same function; they differ in the data they are given (answers with a weight, or whole
documents) and so in what their perplexity means. See docs/metrics.md for each metric.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field

from luthier.core.types import Loss, Outputs, Target
from luthier.objectives.base import ObjectiveConfig


class TokensConfig(ObjectiveConfig):
    """Weighted token cross-entropy.

    Requires: `token_logps` and `token_hits` of the family.
    Metrics: `nll` (weighted, per unit of weight), `token_accuracy` (unweighted), `bits_per_byte` (unweighted).

    Example:
        >>> import torch
        >>> from luthier.core.types import Outputs, Target
        >>> target = Target(at=torch.tensor([0, 1]), tokens=torch.tensor([5, 6]), weights=torch.tensor([1.0, 3.0]),
        ...                 examples=1, bytes=2)
        >>> logps = torch.tensor([-2.0, -1.0])
        >>> loss = SftConfig()(Outputs(token_logps=logps, token_hits=torch.tensor([False, True])), target)
        >>> float(loss.total), float(loss.count)
        (5.0, 4.0)
    """

    example_types: ClassVar[frozenset[str]] = frozenset({"ChatExample", "CompletionExample", "TextExample"})
    required_outputs: ClassVar[frozenset[str]] = frozenset({"token_logps", "token_hits"})

    def count(self, target: Target) -> float:
        return float(target.weights.double().sum())

    def __call__(self, outputs: Outputs, target: Target) -> Loss:
        assert outputs.token_logps is not None
        assert outputs.token_hits is not None
        logps = outputs.token_logps
        total = -(target.weights.to(logps.dtype) * logps).sum()
        plain = logps.detach().sum()
        weight = target.weights.sum()
        return Loss(total, weight, {
            "nll": (total.detach(), weight),
            "token_accuracy": (outputs.token_hits.sum(), float(logps.shape[0])),
            "bits_per_byte": (-plain / math.log(2), float(target.bytes)),
        })


class SftConfig(TokensConfig):
    """Instruction tuning: the weight is on the assistant's words."""

    name: Literal["sft"] = "sft"


class PretrainConfig(TokensConfig):
    """Continued pretraining on documents, as the base was pretrained.

    A causal language model predicts every token from those before it. Of a base that reads a text whole a part is
    hidden (`data/masking.py`), and the sum is over that part, P, alone:

        encoder                 total = - sum_(p in P) w_p log p(t_p | the text without P)
        encoder and decoder     total = - sum_p w_p log p(t_p | the text without P, the answer so far)

    Devlin et al. 2019 (arXiv:1810.04805) section 3.1; Raffel et al. 2020 (1910.10683) section 3.1.4.
    """

    uses_masking: ClassVar[bool] = True

    name: Literal["pretrain"] = "pretrain"
    rate: float = Field(0.15, gt=0, le=0.5, description="an encoder, or a sequence-to-sequence base: the share of a "
                                                        "document's tokens that is hidden")
    whole_words: bool = Field(False, description="an encoder: hide all tokens of a word, or none")
    span: float = Field(3.0, ge=1, description="a sequence-to-sequence base: mean length of a hidden span, in tokens")
