"""What a trained method says to a person: virtual tokens as words, LoRA's changes by size and rank. Read `prompt.py`
and `lora.py` first.

Virtual tokens are compared with every word of the vocabulary by the angle between the two: distance = 1 - cosine, 0 for
the word itself, about 1 for what has nothing to do with it. Prompts are compared with the words' embeddings. A prefix
has none; its first layer's key is compared with the key that the first layer gives to each word, standing where the
virtual token stands. There alone a word's key does not depend on others: deeper layers have nothing to compare with.
Where the base has no words (pictures), what is left to say is their size, beside that of what the first layer usually
gets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.core.protocols import Anatomy, Tuner
from luthier.methods.adalora import AdaLora
from luthier.methods.adalora import AdaLoraLayer as Searched
from luthier.methods.composite import CompositeMethod
from luthier.methods.lora import Lora, LoraLayer
from luthier.methods.prefix import Prefix, ProjectedPrefix
from luthier.methods.prompt import Prompt, get_injector
from luthier.methods.ptuning import PTuning

CHUNK = 8192  # words that are compared at once
NEAREST = 5  # words that are named for each virtual token
SAMPLE = 64  # vectors that stand for the usual ones where there are no words


@dataclass(frozen=True)
class Diagnostic:
    """A table of what was read off a method.

    Args:
        kind: `words` has a row for each virtual token, `layers` one for each changed linear map.
        about: what is compared with what, in a sentence.
        rows: column -> value. `words`: size (1 is a word's), nearest (word, distance; none where the base has no
            words). `layers`: name, block, role,
            size (of the change, relative to the weight's), rank (effective), of (what the rank could be at most).
    """

    kind: Literal["words", "layers"]
    about: str
    rows: tuple[dict[str, Any], ...]


@torch.no_grad()
def diagnose(attached: Tuner, anatomy: Anatomy) -> list[Diagnostic]:
    """All that can be read off a method; nothing of methods whose numbers mean nothing by themselves."""
    if isinstance(attached, CompositeMethod):
        return [reading for part in attached.parts for reading in diagnose(part, anatomy)]
    if isinstance(attached, Prompt | PTuning):
        if (usual := get_injector(anatomy).usual) is not None:
            return [_measure_norms(attached.compute_virtual_tokens(), usual(SAMPLE, 0), "the virtual tokens")]
        return [Diagnostic("words", "embeddings of the virtual tokens, and of every word of the vocabulary",
                        tuple(_diagnose_prompt(attached.compute_virtual_tokens(), anatomy)))]
    if isinstance(attached, Prefix | ProjectedPrefix):
        if (usual := get_injector(anatomy).usual) is not None:
            keys = get_injector(anatomy).keys_values(usual(SAMPLE, 0))[0][0]
            return [_measure_norms(_flatten_heads(attached.compute_virtual_tokens()[0, 0]), _flatten_heads(keys), "the first layer's keys of the prefix")]
        return [Diagnostic("words", "the first layer's keys of the prefix, and of every word as if it stood in that place",
                        tuple(_diagnose_prefix(attached.compute_virtual_tokens()[0, 0], anatomy)))]
    if isinstance(attached, AdaLora):
        return [Diagnostic("layers", "the length |s B diag(e) A| of each change relative to its weight's |W|, and its "
                        "effective rank, of the ranks that the search left",
                        tuple(_diagnose_layer(la, int(la.get_active_mask().sum())) for la in attached.layers))]
    if isinstance(attached, Lora):
        return [Diagnostic("layers", "the length |s B A| of each change relative to its weight's |W|, and its effective "
                        "rank", tuple(_diagnose_layer(la, la.rank) for la in attached.layers if isinstance(la, LoraLayer)))]
    return []


# ---------------------------------------------------------------- words


def _diagnose_prompt(virtual: Tensor, anatomy: Anatomy) -> Iterator[dict[str, Any]]:
    device = next(anatomy.embedding.parameters()).device
    yield from _find_nearest_tokens(virtual, lambda ids: anatomy.embedding(torch.tensor(ids, device=device)), anatomy)


def _diagnose_prefix(keys: Tensor, anatomy: Anatomy) -> Iterator[dict[str, Any]]:
    """`keys` [G, N, d]."""
    ports = get_injector(anatomy)
    for i, key in enumerate(_flatten_heads(keys)):
        yield from _find_nearest_tokens(key[None], lambda ids, i=i: ports.first_keys(ids, i), anatomy)  # type: ignore[misc]


def _flatten_heads(keys: Tensor) -> Tensor:
    """[N, G d] of [G, N, d]."""
    return keys.transpose(0, 1).flatten(1)


def _measure_norms(virtual: Tensor, usual: Tensor, what: str) -> Diagnostic:
    """A row for each virtual token, without words: both [n, D]."""
    sizes = virtual.norm(dim=1) / usual.to(virtual).norm(dim=1).mean()
    return Diagnostic("words", f"the size of {what}, 1 for a plain patch's: this base has no words to compare them with",
                   tuple({"size": size, "nearest": []} for size in sizes.tolist()))


def _find_nearest_tokens(virtual: Tensor, table: Callable[[list[int]], Tensor], anatomy: Anatomy) -> Iterator[dict[str, Any]]:
    """A row for each virtual token [N, D], out of the vectors of words, [n, D]."""
    size, lengths = anatomy.sizes["vocabulary"], []
    best = torch.full((len(virtual), 0), 2.0).to(virtual)
    who = torch.zeros(len(virtual), 0, dtype=torch.int64, device=virtual.device)
    for start in range(0, size, CHUNK):
        ids = list(range(start, min(start + CHUNK, size)))
        words = table(ids).to(virtual)
        lengths.append(words.norm(dim=1))
        best = torch.cat([best, 1 - F.normalize(virtual, dim=1) @ F.normalize(words, dim=1).T], dim=1)
        who = torch.cat([who, torch.tensor(ids, device=who.device).expand(len(virtual), -1)], dim=1)
        best, order = best.topk(min(NEAREST, best.shape[1]), largest=False)
        who = who.gather(1, order)
    usual = torch.cat(lengths).mean()
    for vector, distances, found in zip(virtual, best.tolist(), who.tolist(), strict=True):
        yield {"size": float(vector.norm() / usual),
               "nearest": [{"word": anatomy.tokenizer.decode([token]), "distance": distance}
                           for token, distance in zip(found, distances, strict=True)]}


# ---------------------------------------------------------------- LoRA


def _diagnose_layer(layer: LoraLayer | Searched, of: int) -> dict[str, Any]:
    """Size and effective rank, exp(-sum p log p) of the shares p of the singular values (Roy and Vetterli 2007), which
    is 1 for one direction and R for R equal ones. DoRA's lengths are not part of it."""
    a, b = layer.get_factors()
    # The singular values of B A are those of a small matrix: B = Q_b R_b, A^T = Q_a R_a.
    found = layer.scale * torch.linalg.svdvals(torch.linalg.qr(b)[1] @ torch.linalg.qr(a.T)[1].T)
    shares = found / found.sum().clamp(min=torch.finfo(found.dtype).tiny)
    rank = torch.special.entr(shares).sum().exp() if found.any() else found.new_zeros(())
    weight = layer.base_weight()
    return {"name": layer.site.name, "block": layer.site.block, "role": layer.site.role,
            "size": float(found.norm() / weight.to(found.dtype).norm()), "rank": float(rank), "of": of}
