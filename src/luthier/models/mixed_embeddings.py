"""Mixed embeddings for mixup: two texts in one input. Read `core/types.py` first."""

from __future__ import annotations

from torch import Tensor, nn

from luthier.core.types import Inputs


def mix_embeddings(embedding: nn.Module, inputs: Inputs) -> Tensor | None:
    """[T, D] s E[a] + (1 - s) E[b], with E[-1] = 0, for tokens a, other tokens b and shares s, all [T]; None if
    nothing is mixed. Guo et al. 2019 (arXiv:1905.08941). A token whose share is 1 keeps its embedding bit for bit."""
    if inputs.mix is None:
        return None
    own: Tensor = embedding(inputs.tokens)  # [T, D]
    # [T, D] The index -1 is clamped, then its embedding is set to zero.
    other = embedding(inputs.mix.ids.clamp(min=0)) * (inputs.mix.ids >= 0)[:, None]
    shares = inputs.mix.shares[:, None].to(own.dtype)  # [T, 1]
    return shares * own + (1 - shares) * other  # [T, D]
