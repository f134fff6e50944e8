"""Several LoRAs into one. Read `lora.py` first.

Each changes a map W by s_i B_i A_i (A_i: [R_i, in], B_i: [out, R_i]). With weights w_i the combined change is

    D = sum_i w_i s_i B_i A_i = [w_1 s_1 B_1 | w_2 s_2 B_2 | ...] [A_1 ; A_2 ; ...]

    concatenation   just these factors: exact, and the ranks add up
    sum             the same change at the smallest rank that holds it: exact to rounding
    svd             the closest change of a given rank (Eckart and Young 1936): D's largest singular directions

D itself is never formed: with B = Q_b R_b and A^T = Q_a R_a its singular values are those of R_b R_a^T, a small matrix.
Adding up the factors instead of the products (PEFT's `linear`) would add B_i A_j for i != j, which nobody trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from luthier.core.errors import RecipeError
from luthier.methods.adapter_format import PEFT_PREFIX
from luthier.methods.lora import Lora, LoraConfig

CombinationType = Literal["sum", "concatenation", "svd"]
Factors = tuple[Tensor, Tensor]  # A [R, in], B [out, R]


@dataclass(frozen=True)
class MergedLora:
    """One LoRA.

    Args:
        config: its settings; every map's scale is 1.
        state: its weights, as `Lora.load` takes them.
        error: |D - its change| / |D|, Frobenius norms over all maps together; 0 where it is exact.
    """

    config: LoraConfig
    state: dict[str, Tensor]
    error: float


@torch.no_grad()
def merge_loras(loras: Sequence[Lora], weights: Sequence[float], how: CombinationType = "sum", rank: int | None = None) -> MergedLora:
    """LoRAs of one base as one LoRA; a map that only some of them change gets the change of those.

    Args:
        weights: one for each, of any sign.
        rank: of the result, for `svd`; left out: the largest of theirs.

    Raises:
        RecipeError: for settings that mean nothing together, and for DoRA, whose change is no sum.
    """
    if how not in get_args(CombinationType):
        raise RecipeError(f"adapters cannot be combined by {how!r}", f"one of: {', '.join(get_args(CombinationType))}")
    if len(weights) != len(loras):
        raise RecipeError(f"{len(loras)} adapters and {len(weights)} weights", "give one weight for each adapter")
    if rank is not None and (how != "svd" or rank < 1):
        raise RecipeError(f"rank {rank} with {how}: only svd brings a change to a rank, of at least 1",
                          "leave the rank out, or combine by svd")
    if any(lora.config.use_dora for lora in loras):
        raise RecipeError("a DoRA stretches the whole of each map, so two of them have no sum",
                          "combine plain LoRAs, or merge one into the base and train on (luthier export --to merged)")
    most = rank or max(layer.rank for lora in loras for layer in lora.layers)
    state, ranks = {}, {}
    kept = lost = 0.0
    for name, parts in _collect_factors(loras, weights).items():
        whole = torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts], dim=1)
        (a, b), inside, outside = (whole, 1.0, 0.0) if how == "concatenation" else _reduce_rank(*whole, most if how == "svd"
                                                                                           else None)
        kept, lost = kept + inside, lost + outside
        ranks[name] = a.shape[0]
        state[f"{PEFT_PREFIX}{name}.lora_A.weight"], state[f"{PEFT_PREFIX}{name}.lora_B.weight"] = a.contiguous(), b.contiguous()
    largest = max(ranks.values())
    others = {name: r for name, r in ranks.items() if r != largest}
    config = LoraConfig(rank=largest, alpha=largest, target_modules=tuple(ranks), rank_pattern=others,
                        alpha_pattern={name: float(r) for name, r in others.items()})
    return MergedLora(config, state, (lost / (kept + lost)) ** 0.5 if lost else 0.0)


def _collect_factors(loras: Sequence[Lora], weights: Sequence[float]) -> dict[str, list[Factors]]:
    """The factors of each map's change by its path, weight and scale in B."""
    found: dict[str, list[Factors]] = {}
    for lora, weight in zip(loras, weights, strict=True):
        for layer in lora.layers:
            a, b = layer.get_factors()
            found.setdefault(layer.site.name, []).append((a, weight * layer.scale * b))
    return found


def _reduce_rank(a: Tensor, b: Tensor, rank: int | None) -> tuple[Factors, float, float]:
    """The product B A at most of this rank (None: at its own); the squared norms of what is kept and what is lost."""
    q_a, r_a = torch.linalg.qr(a.double().T)
    q_b, r_b = torch.linalg.qr(b.double())
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    # What rounding alone leaves of a direction, at the precision that the factors were trained in.
    held = int((s > s[0] * torch.finfo(a.dtype).eps * max(a.shape[1], b.shape[0])).sum())
    keep = max(1, held if rank is None else min(rank, held))
    root = s[:keep].sqrt()
    factors = (root[:, None] * (v[:keep] @ q_a.T)).to(a.dtype), (q_b @ u[:, :keep] * root).to(b.dtype)
    return factors, float(s[:keep].square().sum()), float(s[keep:held].square().sum())
