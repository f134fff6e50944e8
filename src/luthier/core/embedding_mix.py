"""Mixup of texts: which embeddings are mixed with those of a row's own tokens. Read `device.py` first."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from luthier.core.device import DeviceMovable


@dataclass(frozen=True)
class SpanMix:
    """Tokens that are mixed into one span.

    Args:
        ids: one token id for each token of the span; -1 for an embedding of zeros.
        share: weight of the span's own embeddings; those of `ids` have 1 - `share`.
    """

    ids: tuple[int, ...]
    share: float


@dataclass(frozen=True)
class EmbeddingMix(DeviceMovable):
    """Tokens that are mixed into a packed row of T tokens.

    Args:
        ids: [T] token ids; -1 for an embedding of zeros.
        shares: [T] float32, weight of each token's own embedding; that of `ids` has 1 - `shares`.
    """

    ids: Tensor  # [T]
    shares: Tensor  # [T]
