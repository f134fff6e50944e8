"""Attention with a relative position bias and virtual keys, for T5. Read `attention/packed.py` first.

    softmax(q [P_k; K]^T + [b_P; b]) [P_v; V]          b: T5's bias; P_k, P_v: a prefix, with its bias b_P

T5 passes its bias to the attention function named in its config (Raffel et al. 2020, arXiv:1910.10683, section 2.1).
This function is used once a prefix is added to a sequence-to-sequence model. Calls without a prefix go unchanged to
Transformers' own fused attention, so that with the prefix disabled the outputs are exactly those of the base.

Shapes: query [B, H, Q, d], key and value [B, H, K, d], result [B, Q, H, d]; N virtual keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "luthier_relative"


@dataclass(frozen=True)
class BiasedVirtualKeyValues:
    """Virtual keys and values of one attention, with their bias.

    Args:
        key, value: [1, H, N, d].
        bias: [1 or B, H, Q, N] of the scores; None: 0.
    """

    key: Tensor
    value: Tensor
    bias: Tensor | None = None


VirtualKeyValueSource = Callable[[nn.Module, Tensor, Tensor], BiasedVirtualKeyValues | None]


def biased_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
              scaling: float | None = None, dropout: float = 0.0, position_bias: Tensor | None = None,
              virtual: VirtualKeyValueSource | None = None, is_causal: bool | None = None,
              **rest: Any) -> tuple[Tensor, None]:
    """The attention function that Transformers' attention modules call."""
    before = None if virtual is None else virtual(module, key, value)
    if before is None:
        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal,
            position_bias=position_bias, **rest)
        return plain
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    seen = attention_mask
    if seen is None and causal and query.shape[2] > 1:
        own, back = key.shape[2], key.shape[2] - query.shape[2]
        # [Q, K] The queries are the last Q of K tokens: the others are in the cache.
        seen = torch.ones(query.shape[2], own, dtype=torch.bool, device=query.device).tril(back)
    mask = _combine_mask_and_bias(seen, position_bias, before, query)  # broadcasts to [B, H, Q, N + K]
    key, value = (torch.cat([b.to(x).expand(len(x), -1, -1, -1), x], 2)
                  for b, x in ((before.key, key), (before.value, value)))  # [B, H, N + K, d]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    return out.transpose(1, 2).contiguous(), None  # [B, Q, H, d]


def _combine_mask_and_bias(seen: Tensor | None, bias: Tensor | None, before: BiasedVirtualKeyValues,
                           query: Tensor) -> Tensor | None:
    """[1 or B, H or 1, Q, N + K] The bias plus the mask; virtual keys are visible to every query."""
    n = before.key.shape[2]
    if seen is not None:
        seen = F.pad(seen, (n, 0), value=True if seen.dtype == torch.bool else 0.0)  # [..., Q, N + K]
    if bias is None:
        return seen
    # [1 or B, H, Q, N]
    first = bias.new_zeros(1, bias.shape[1], query.shape[2], n) if before.bias is None else before.bias.to(bias)
    rows = max(len(first), len(bias))  # 1 or B
    whole = torch.cat([x.expand(rows, -1, -1, -1) for x in (first, bias)], 3)  # [rows, H, Q, N + K]
    if seen is None:
        return whole
    # Not minus infinity: a row that sees nothing would become NaN.
    return whole.masked_fill(~seen, torch.finfo(query.dtype).min) if seen.dtype == torch.bool else whole + seen


AttentionInterface.register(NAME, biased_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
