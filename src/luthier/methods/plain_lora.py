"""Converts a LoRA or an AdaLoRA to a plain LoRA of one rank and one alpha, for servers that need that form.

    s_i B_i A_i = (alpha / N) B' A'        A' = [A_i; 0]: [N, in]        B' = [s_i N / alpha B_i | 0]: [out, N]

alpha is chosen so that the linear layers with the most frequent scale keep their B bit for bit, if that alpha is an
integer; else it is N. On other linear layers the update is equal up to the rounding of one factor. Read `lora.py` and
`adalora.py` first.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from luthier.core.errors import RunError
from luthier.core.protocols import Tuner
from luthier.methods.adalora import AdaLora
from luthier.methods.adapter_format import PEFT_PREFIX
from luthier.methods.expert_lora import ExpertLayer
from luthier.methods.lora import Lora, LoraConfig


def check_plain(method: object) -> None:
    """Raises `RunError` for settings whose update a plain LoRA cannot represent."""
    if isinstance(method, LoraConfig) and method.use_dora:
        raise RunError("a DoRA rescales each row of the weight, which a plain LoRA cannot represent",
                       "export it with --to merged")


@torch.no_grad()
def fold_into_plain_lora(attached: Tuner, rank: int | None) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Settings and weights of a plain LoRA with the same update.

    Args:
        attached: a LoRA or an AdaLoRA.
        rank: N; None: the largest rank of all linear layers.

    Raises:
        RunError: for another method, and for a linear layer with a rank above N.
    """
    if not isinstance(attached, Lora | AdaLora):
        raise RunError("only a LoRA or an AdaLoRA can be converted to a plain LoRA of one rank",
                       "omit --lora-rank, or export with --to merged")
    check_plain(attached.config)
    if experts := [layer.site.name for layer in attached.layers if isinstance(layer, ExpertLayer)]:
        raise RunError(f"the LoRA changes experts ({experts[0]}), which PEFT saves under target_parameters; a plain "
                       "LoRA cannot represent them", "omit --lora-rank, or export with --to merged")
    # name -> A_i [R_i, in], B_i [out, R_i], s_i
    parts = {layer.site.name: (*layer.get_factors(), layer.scale) for layer in attached.layers}
    largest = max(1, *(a.shape[0] for a, _, _ in parts.values()), 1)
    if rank is not None and rank < largest:
        name = next(name for name, (a, _, _) in parts.items() if a.shape[0] == largest)
        raise RunError(f"--lora-rank {rank} is below the rank of {name}, {largest}",
                       f"use {largest} or more, or reduce the rank first: luthier merge-adapters RUN "
                       f"--combination-type svd --rank {rank} --out DIR")
    size = rank or largest
    scale = Counter(scale for _, _, scale in parts.values()).most_common(1)[0][0]
    alpha = scale * size if float(scale * size).is_integer() else float(size)
    state = {}
    for name, (a, b, own) in parts.items():
        # [N, in], [out, N] The rows and columns that are not filled stay zero.
        wide_a, wide_b = a.new_zeros(size, a.shape[1]), b.new_zeros(b.shape[0], size)
        wide_a[:a.shape[0]] = a
        # No multiplication where the scale fits already: B stays bit for bit.
        wide_b[:, :b.shape[1]] = b if own * size == alpha else b * (own * size / alpha)
        state[f"{PEFT_PREFIX}{name}.lora_A.weight"], state[f"{PEFT_PREFIX}{name}.lora_B.weight"] = wide_a, wide_b
    return LoraConfig(rank=size, alpha=alpha, target_modules=tuple(parts)), state
