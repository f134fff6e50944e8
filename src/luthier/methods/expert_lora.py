"""LoRA on the experts of a mixture: a low-rank update of each expert's linear layer. Read `lora.py` first.

    y_e = W_e x + s B_e A_e x          A_e: [R, in]   B_e: [out, R]   for each expert e of E

The base stores all experts of a linear layer as one parameter, so no hook sees their outputs. The model calls the
registered
function with the rows sorted by expert. Only experts that received a token are computed. The saved format is that of
PEFT's `target_parameters`: A is [E R, in], B is [out, R E], and PEFT nests the wrappers of one module's parameters.

Shape letters: E experts, R rank, N rows: each token once for every expert that it is sent to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.core.expert_layers import ExpertLinears
from luthier.methods.hooks import Hooks


class ExpertLayer:
    """The updates of one linear layer of all experts.

    Args:
        gaussian: initialize A with normal instead of uniform numbers.
        nesting: how many of PEFT's wrappers of the same module are outside this one; part of the saved names.
    """

    magnitude = initial_factors = None

    def __init__(self, site: ExpertLinears, rank: int, scale: float, gaussian: bool, generator: torch.Generator,
                 nesting: int) -> None:
        self.site, self.rank, self.scale = site, rank, scale
        self.module = site.name.rpartition(".")[0]
        self.path = self.module + ".base_layer" * nesting
        dtype = torch.promote_types(site.weight.dtype, torch.float32)
        shape = (site.num_experts * self.rank, site.in_features)  # [E R, in]
        a = (torch.randn(shape, generator=generator) / self.rank if gaussian
             else (torch.rand(shape, generator=generator) * 2 - 1) / site.in_features ** 0.5)
        self.a = nn.Parameter(a.to(site.weight.device, dtype))
        self.b = nn.Parameter(torch.zeros(site.out_features, self.rank * site.num_experts, device=site.weight.device,
                                          dtype=dtype))  # [out, R E]

    def register_hooks(self, hooks: Hooks) -> None:
        self.site.add_change(hooks.gate, self.delta)

    def get_factors(self) -> tuple[Tensor, Tensor]:
        """A as [E, R, in] and B as [E, out, R]."""
        count = self.site.num_experts
        # B's columns are [R, E], the expert last, as in PEFT's file.
        return self.a.view(count, self.rank, -1), self.b.view(-1, self.rank, count).permute(2, 0, 1)

    def delta(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """The change of each row's output, [N, out], from x [N, in] sorted by expert; `counts` [E] rows of each."""
        a, b = (factor.to(x.dtype) for factor in self.get_factors())  # [E, R, in], [E, out, R]
        return self.scale * torch.cat([F.linear(F.linear(part, a[e]), b[e])
                                       for e, part in enumerate(x.split(list(counts))) if len(part)])  # [N, out]

    @torch.no_grad()
    def compute_merged_weight(self) -> Tensor:
        """W + s B A of every expert, in the layout of the base's parameter."""
        a, b = self.get_factors()  # [E, R, in], [E, out, R]
        delta = self.scale * (b @ a)  # [E, out, in]
        # [E, out, in], or [E, in, out] if transposed
        weight = self.site.weight.to(a.dtype) + (delta.transpose(1, 2) if self.site.transposed else delta)
        return weight.to(self.site.weight.dtype)
