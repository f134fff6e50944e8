"""LoRA on experts: a change of low rank beside each expert's map. Read `lora.py` first.

    y_e = W_e x + s B_e A_e x          A_e: [R, in]   B_e: [out, R]   for each expert e of E

All experts of a map are one parameter of the base, so no hook sees their outputs; the family's door (`Experts.enter`)
hands the rows over, sorted by expert. Only the experts that some token was sent to are computed. The file is that of
PEFT's `target_parameters`, which keeps A as [E R, in] and B as [out, R E], and one map's change inside the other's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.core.errors import RecipeError
from luthier.core.expert_layers import Experts
from luthier.methods.hooks import Hooks

if TYPE_CHECKING:
    from luthier.methods.lora import LoraConfig


def is_target(target: str, experts: Experts) -> bool:
    """Whether a target means these experts: `experts` for all of them, or an ending such as `experts.down_proj`."""
    return target == "experts" or ("experts." in target and f".{experts.name}".endswith(f".{target}"))


def matches_pattern(pattern: str, experts: Experts) -> bool:
    """Whether a key of a pattern means these experts: as a target does, or as an expression for their whole path."""
    return is_target(pattern, experts) or re.fullmatch(pattern, experts.name) is not None


def select_experts(experts: Sequence[Experts], targets: str | Sequence[str]) -> list[Experts]:
    """Those that `targets` names; `all-linear` leaves them alone, for they are most of a model's weights."""
    return [] if targets == "all-linear" else [e for e in experts if any(is_target(target, e) for target in targets)]


def build_expert_layers(found: Sequence[Experts], config: LoraConfig, generator: torch.Generator) -> list[ExpertLayer]:
    """Raises `RecipeError` for the variants that have no form for experts."""
    unfit = [setting for setting, given in (
        ("use_dora", config.use_dora), ("dropout", config.dropout > 0), ("init_lora_weights: pissa", config.init_lora_weights == "pissa"),
        ("rank_pattern", any(matches_pattern(key, e) for key in config.rank_pattern for e in found)),
        ("alpha_pattern", any(matches_pattern(key, e) for key in config.alpha_pattern for e in found))) if given]
    if found and unfit:
        raise RecipeError(f"method.target_modules names experts, whose change has no {unfit[0]}",
                          f"leave {unfit[0]} out, or the experts")
    layers = []
    for i, site in enumerate(found):
        inside = sum(other.name.rpartition(".")[0] == site.name.rpartition(".")[0] for other in found[i + 1:])
        layers.append(ExpertLayer(site, config, generator, inside))
    return layers


class ExpertLayer:
    """The changes beside one map of all experts.

    Args:
        inside: how many other maps of the same experts are changed around this one, which PEFT's names tell.
    """

    magnitude = initial_factors = None

    def __init__(self, site: Experts, config: LoraConfig, generator: torch.Generator, inside: int) -> None:
        self.site, self.rank = site, config.rank
        self.scale = config.alpha / (self.rank ** 0.5 if config.use_rslora else self.rank)
        self.module = site.name.rpartition(".")[0]
        self.path = self.module + ".base_layer" * inside
        dtype = torch.promote_types(site.weight.dtype, torch.float32)
        shape = (site.count * self.rank, site.inputs)
        a = (torch.randn(shape, generator=generator) / self.rank if config.init_lora_weights == "gaussian"
             else (torch.rand(shape, generator=generator) * 2 - 1) / site.inputs ** 0.5)
        self.a = nn.Parameter(a.to(site.weight.device, dtype))
        self.b = nn.Parameter(torch.zeros(site.outputs, self.rank * site.count, device=site.weight.device, dtype=dtype))

    def enter(self, hooks: Hooks) -> None:
        self.site.enter(hooks.gate, self.delta)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A as [E, R, in] and B as [E, out, R]."""
        count = self.site.count
        return self.a.view(count, self.rank, -1), self.b.view(-1, self.rank, count).permute(2, 0, 1)

    def delta(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """What is added to each row's output: [N, out] of x [N, in], rows sorted by expert."""
        a, b = (half.to(x.dtype) for half in self.factors())
        return self.scale * torch.cat([F.linear(F.linear(part, a[e]), b[e])
                                       for e, part in enumerate(x.split(list(counts))) if len(part)])

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The weight that gives the same outputs alone."""
        a, b = self.factors()
        change = self.scale * (b @ a)
        weight = self.site.weight.to(a.dtype) + (change.transpose(1, 2) if self.site.transposed else change)
        return weight.to(self.site.weight.dtype)
