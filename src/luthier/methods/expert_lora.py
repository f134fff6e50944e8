"""LoRA on experts: a change of low rank beside each expert's map. Read `lora.py` first.

    y_e = W_e x + s B_e A_e x          A_e: [R, in]   B_e: [out, R]   for each expert e of E

All experts of a map are one parameter of the base, so no hook sees their outputs; the family's door (`Experts.enter`)
hands the rows over, sorted by expert. Only the experts that some token was sent to are computed. The file is that of
PEFT's `target_parameters`, which keeps A as [E R, in] and B as [out, R E], and one map's change inside the other's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.core.expert_layers import Experts
from luthier.methods.hooks import Hooks


class ExpertLayer:
    """The changes beside one map of all experts.

    Args:
        inside: how many other maps of the same experts are changed around this one, which PEFT's names tell.
    """

    magnitude = initial_factors = None

    def __init__(self, site: Experts, rank: int, scale: float, gaussian: bool, generator: torch.Generator,
                 inside: int) -> None:
        self.site, self.rank, self.scale = site, rank, scale
        self.module = site.name.rpartition(".")[0]
        self.path = self.module + ".base_layer" * inside
        dtype = torch.promote_types(site.weight.dtype, torch.float32)
        shape = (site.count * self.rank, site.inputs)
        a = (torch.randn(shape, generator=generator) / self.rank if gaussian
             else (torch.rand(shape, generator=generator) * 2 - 1) / site.inputs ** 0.5)
        self.a = nn.Parameter(a.to(site.weight.device, dtype))
        self.b = nn.Parameter(torch.zeros(site.outputs, self.rank * site.count, device=site.weight.device, dtype=dtype))

    def register_hooks(self, hooks: Hooks) -> None:
        self.site.enter(hooks.gate, self.delta)

    def get_factors(self) -> tuple[Tensor, Tensor]:
        """A as [E, R, in] and B as [E, out, R]."""
        count = self.site.count
        return self.a.view(count, self.rank, -1), self.b.view(-1, self.rank, count).permute(2, 0, 1)

    def delta(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """What is added to each row's output: [N, out] of x [N, in], rows sorted by expert."""
        a, b = (half.to(x.dtype) for half in self.get_factors())
        return self.scale * torch.cat([F.linear(F.linear(part, a[e]), b[e])
                                       for e, part in enumerate(x.split(list(counts))) if len(part)])

    @torch.no_grad()
    def compute_merged_weight(self) -> Tensor:
        """The weight that gives the same outputs alone."""
        a, b = self.get_factors()
        change = self.scale * (b @ a)
        weight = self.site.weight.to(a.dtype) + (change.transpose(1, 2) if self.site.transposed else change)
        return weight.to(self.site.weight.dtype)
