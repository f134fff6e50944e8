"""Interpretable diagnostics of a trained method: nearest tokens of virtual tokens, size and rank of LoRA updates.

Read `prompt.py` and `lora.py` first.

A virtual token is compared with every token of the vocabulary by distance = 1 - cosine similarity: 0 for an equal
direction, about 1 for an unrelated token. Prompts are compared with token embeddings. A prefix has no embeddings: its
first layer's key is compared with the key that the first layer computes for each token at the same position. Keys of
deeper layers depend on the context, so they cannot be compared. For a base without a vocabulary (images) only the size
relative to the first layer's usual inputs is reported.

Shape letters: N virtual tokens, D hidden size, G key heads of width d, n vectors of the vocabulary, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.core.protocols import ModelStructure, Tuner
from luthier.methods.adalora import AdaLora, AdaLoraLayer
from luthier.methods.composite import CompositeMethod
from luthier.methods.lora import Lora, LoraLayer
from luthier.methods.prefix import Prefix, ProjectedPrefix
from luthier.methods.prompt import Prompt, get_injector
from luthier.methods.ptuning import PTuning

CHUNK = 8192  # tokens compared at once
NEAREST = 5  # tokens reported for each virtual token
SAMPLE = 64  # typical inputs that are averaged where there is no vocabulary


@dataclass(frozen=True)
class Diagnostic:
    """A table of diagnostics of one method.

    Args:
        kind: `words` has a row for each virtual token, `layers` one for each changed linear layer.
        about: one sentence on what is compared.
        rows: column -> value. `words`: size (1: a token embedding's), nearest (token, distance; empty without a
            vocabulary). `layers`: name, block, role, size (of the update, relative to the weight), rank (effective), of
            (the largest possible rank).
    """

    kind: Literal["words", "layers"]
    about: str
    rows: tuple[dict[str, Any], ...]


@torch.no_grad()
def diagnose(attached: Tuner, structure: ModelStructure) -> list[Diagnostic]:
    """The diagnostics of a tuner; empty for methods without interpretable numbers."""
    if isinstance(attached, CompositeMethod):
        return [diagnostic for part in attached.parts for diagnostic in diagnose(part, structure)]
    if isinstance(attached, Prompt | PTuning):
        if (usual := get_injector(structure).typical_embeddings) is not None:
            return [_measure_norms(attached.compute_virtual_tokens(), usual(SAMPLE, 0), "the virtual tokens")]
        return [Diagnostic("words", "embeddings of the virtual tokens and of every token of the vocabulary",
                           tuple(_diagnose_prompt(attached.compute_virtual_tokens(), structure)))]
    if isinstance(attached, Prefix | ProjectedPrefix):
        if (usual := get_injector(structure).typical_embeddings) is not None:
            keys = get_injector(structure).compute_keys_values(usual(SAMPLE, 0))[0][0]
            return [_measure_norms(_flatten_heads(attached.compute_virtual_tokens()[0, 0]), _flatten_heads(keys),
                                   "the first layer's keys of the prefix")]
        return [Diagnostic("words",
                           "the first layer's keys of the prefix and of every token at the same position",
                           tuple(_diagnose_prefix(attached.compute_virtual_tokens()[0, 0], structure)))]
    if isinstance(attached, AdaLora):
        return [Diagnostic("layers", "the norm |s B diag(e) A| of each update relative to its weight's |W|, and its "
                           "effective rank among the remaining ranks",
                           tuple(_diagnose_layer(la, int(la.get_active_mask().sum())) for la in attached.layers))]
    if isinstance(attached, Lora):
        return [Diagnostic("layers",
                           "the norm |s B A| of each update relative to its weight's |W|, and its effective "
                           "rank", tuple(_diagnose_layer(la, la.rank) for la in attached.layers
                                         if isinstance(la, LoraLayer)))]
    return []


# ---------------------------------------------------------------- virtual tokens


def _diagnose_prompt(virtual: Tensor, structure: ModelStructure) -> Iterator[dict[str, Any]]:
    device = next(structure.embedding.parameters()).device
    yield from _find_nearest_tokens(virtual, lambda ids: structure.embedding(torch.tensor(ids, device=device)),
                                    structure)


def _diagnose_prefix(keys: Tensor, structure: ModelStructure) -> Iterator[dict[str, Any]]:
    """`keys` [G, N, d]."""
    ports = get_injector(structure)
    for i, key in enumerate(_flatten_heads(keys)):
        yield from _find_nearest_tokens(key[None], lambda ids, i=i: ports.compute_first_layer_keys(ids, i), structure)  # type: ignore[misc]


def _flatten_heads(keys: Tensor) -> Tensor:
    """[G, N, d] to [N, G d]."""
    return keys.transpose(0, 1).flatten(1)


def _measure_norms(virtual: Tensor, usual: Tensor, what: str) -> Diagnostic:
    """A row for each virtual token, without a vocabulary. Both arguments are [n, D]."""
    # [n of `virtual`]
    sizes = virtual.norm(dim=1) / usual.to(virtual).norm(dim=1).mean()
    return Diagnostic("words",
                      f"the size of {what}, relative to a typical patch: this base has no vocabulary",
                      tuple({"size": size, "nearest": []} for size in sizes.tolist()))


def _find_nearest_tokens(virtual: Tensor, table: Callable[[list[int]], Tensor],
                         structure: ModelStructure) -> Iterator[dict[str, Any]]:
    """A row for each virtual token [N, D]; `table` gives the vectors [n, D] of token ids."""
    size, norms = structure.sizes["vocabulary"], []
    best = torch.full((len(virtual), 0), 2.0).to(virtual)  # [N, found] distances, the nearest first
    who = torch.zeros(len(virtual), 0, dtype=torch.int64, device=virtual.device)  # [N, found] their token ids
    for start in range(0, size, CHUNK):
        ids = list(range(start, min(start + CHUNK, size)))
        words = table(ids).to(virtual)  # [n, D]
        norms.append(words.norm(dim=1))
        # [N, found + n] The nearest so far compete with each chunk: the whole [N, V] is never in memory.
        best = torch.cat([best, 1 - F.normalize(virtual, dim=1) @ F.normalize(words, dim=1).T], dim=1)
        who = torch.cat([who, torch.tensor(ids, device=who.device).expand(len(virtual), -1)], dim=1)
        best, order = best.topk(min(NEAREST, best.shape[1]), largest=False)  # [N, NEAREST] each
        who = who.gather(1, order)  # [N, NEAREST]
    usual = torch.cat(norms).mean()  # []
    assert structure.tokenizer is not None, "a base with a vocabulary has a tokenizer"
    for vector, distances, found in zip(virtual, best.tolist(), who.tolist(), strict=True):
        yield {"size": float(vector.norm() / usual),
               "nearest": [{"word": structure.tokenizer.decode([token]), "distance": distance}
                           for token, distance in zip(found, distances, strict=True)]}


# ---------------------------------------------------------------- LoRA


def _diagnose_layer(layer: LoraLayer | AdaLoraLayer, max_rank: int) -> dict[str, Any]:
    """Size and effective rank: exp(-sum p log p) of the normalized singular values p (Roy and Vetterli 2007), which is
    1 for one direction and R for R equal ones. DoRA's magnitudes are not included."""
    a, b = layer.get_factors()  # [R, in], [out, R]
    # The singular values of B A are those of a small matrix: B = Q_b R_b, A^T = Q_a R_a.
    singular_values = layer.scale * torch.linalg.svdvals(torch.linalg.qr(b)[1] @ torch.linalg.qr(a.T)[1].T)
    # Clamped: an update of zero would give 0 / 0.
    total = singular_values.sum().clamp(min=torch.finfo(singular_values.dtype).tiny)
    shares = singular_values / total  # [R]
    rank = torch.special.entr(shares).sum().exp() if singular_values.any() else singular_values.new_zeros(())
    weight = layer.base_weight()
    return {"name": layer.site.name, "block": layer.site.layer_index, "role": layer.site.role,
            "size": float(singular_values.norm() / weight.to(singular_values.dtype).norm()),
            "rank": float(rank), "of": max_rank}
