"""Merges several LoRAs into one. Read `lora.py` first.

Each updates a linear layer W by s_i B_i A_i (A_i: [R_i, in], B_i: [out, R_i]). With weights w_i the merged update is

    D = sum_i w_i s_i B_i A_i = [w_1 s_1 B_1 | w_2 s_2 B_2 | ...] [A_1 ; A_2 ; ...]

    cat      these factors: exact, and the ranks add up
    linear   the same update at its smallest exact rank: exact up to rounding
    svd      the closest update of a given rank (Eckart and Young 1936): D's largest singular directions

D itself is never formed: with B = Q_b R_b and A^T = Q_a R_a its singular values are those of R_b R_a^T, a small matrix.
`linear` is exact. PEFT's `linear` adds the factors instead of the products, and thus also B_i A_j for i != j.

Shape letters: R the sum of all ranks, r the rank of the result, `in` and `out` the features of a linear map.
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

CombinationType = Literal["linear", "cat", "svd"]
Factors = tuple[Tensor, Tensor]  # A [R, in], B [out, R]


@dataclass(frozen=True)
class MergedLora:
    """The merged LoRA.

    Args:
        config: its settings; the scale of every linear layer is 1.
        state: its weights, for `Lora.load`.
        error: |D - merged update| / |D|, Frobenius norms over all linear layers together; 0 where it is exact.
    """

    config: LoraConfig
    state: dict[str, Tensor]
    error: float


@torch.no_grad()
def merge_loras(loras: Sequence[Lora], weights: Sequence[float], combination_type: CombinationType = "linear",
                rank: int | None = None) -> MergedLora:
    """Merge LoRAs of one base. A linear layer that only some of them update gets the weighted sum of those.

    Args:
        weights: one for each LoRA, of any sign.
        rank: rank of the result, for `svd`; None: the largest rank of the inputs.

    Raises:
        RecipeError: for contradicting settings, and for DoRA, whose update is not additive.
    """
    if combination_type not in get_args(CombinationType):
        raise RecipeError(f"unknown combination type {combination_type!r}",
                          f"use one of: {', '.join(get_args(CombinationType))}")
    if len(weights) != len(loras):
        raise RecipeError(f"{len(loras)} adapters and {len(weights)} weights", "give one weight for each adapter")
    if rank is not None and (combination_type != "svd" or rank < 1):
        raise RecipeError(f"rank {rank} with combination type {combination_type}: only svd takes a rank, of 1 or "
                          "more", "omit the rank, or use svd")
    if any(lora.config.use_dora for lora in loras):
        raise RecipeError("a DoRA rescales the whole weight, so DoRA adapters cannot be added",
                          "merge plain LoRAs, or export one with --to merged and train on the result")
    max_rank = rank or max(layer.rank for lora in loras for layer in lora.layers)
    state, ranks = {}, {}
    kept = lost = 0.0
    for name, parts in _collect_factors(loras, weights).items():
        # [sum R, in], [out, sum R]
        stacked = torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts], dim=1)
        (a, b), inside, outside = (stacked, 1.0, 0.0) if combination_type == "cat" else _reduce_rank(
            *stacked, max_rank if combination_type == "svd" else None)
        kept, lost = kept + inside, lost + outside
        ranks[name] = a.shape[0]
        path = PEFT_PREFIX + name
        # A safetensors file holds contiguous tensors only.
        state[f"{path}.lora_A.weight"], state[f"{path}.lora_B.weight"] = a.contiguous(), b.contiguous()
    largest = max(ranks.values())
    exceptions = {name: r for name, r in ranks.items() if r != largest}
    config = LoraConfig(rank=largest, alpha=largest, target_modules=tuple(ranks), rank_pattern=exceptions,
                        alpha_pattern={name: float(r) for name, r in exceptions.items()})
    # Squares of Frobenius norms add up over the maps.
    return MergedLora(config, state, (lost / (kept + lost)) ** 0.5 if lost else 0.0)


def _collect_factors(loras: Sequence[Lora], weights: Sequence[float]) -> dict[str, list[Factors]]:
    """Path of each linear layer -> the factors of all its updates; weight and scale are multiplied into B."""
    factors: dict[str, list[Factors]] = {}
    for lora, weight in zip(loras, weights, strict=True):
        for layer in lora.layers:
            a, b = layer.get_factors()
            factors.setdefault(layer.site.name, []).append((a, weight * layer.scale * b))
    return factors


def _reduce_rank(a: Tensor, b: Tensor, rank: int | None) -> tuple[Factors, float, float]:
    """Factors of B A at this rank at most (None: its numerical rank), and the squared norms kept and lost."""
    # In float64: the rounding of QR and SVD must stay below the precision of the factors.
    q_a, r_a = torch.linalg.qr(a.double().T)  # [in, R], [R, R]
    q_b, r_b = torch.linalg.qr(b.double())  # [out, R], [R, R]
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)  # [R, R], [R], [R, R]
    # Singular values below this threshold are rounding errors at the precision of the trained factors.
    numerical_rank = int((s > s[0] * torch.finfo(a.dtype).eps * max(a.shape[1], b.shape[0])).sum())
    keep = max(1, numerical_rank if rank is None else min(rank, numerical_rank))  # r; no adapter has rank 0
    root = s[:keep].sqrt()  # [r]
    # [r, in], [out, r]
    factors = (root[:, None] * (v[:keep] @ q_a.T)).to(a.dtype), (q_b @ u[:, :keep] * root).to(b.dtype)
    return factors, float(s[:keep].square().sum()), float(s[keep:numerical_rank].square().sum())
