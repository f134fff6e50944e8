"""Bottleneck adapters: a small MLP after, or parallel to, sublayers of every layer. Read `full.py` and `hooks.py`
first.

    f(x) = s * (U a(D x + d) + u)          D: [r, H]  d: [r]  U: [H, r]  u: [H]       r = H / reduction_factor

    houlsby    h <- h + f(h), h the attention's and then the MLP's output, before it joins the residual stream
    pfeiffer   the same after the MLP alone
    parallel   h <- h + f(x), h the MLP's output and x its input, s = 4

U and u start at zero, so the model starts as the base. The activation `a` makes the adapter nonlinear, so it cannot be
merged, and it costs two small matrix products in every forward pass.

Papers: Houlsby et al. 2019 (arXiv:1902.00751) section 2.1, figure 2; Pfeiffer et al. 2021 (2005.00247), with the
adapter after the MLP; He et al. 2022 (2110.04366) table 1 and section 4.6, parallel and scaled. In layers with a norm
after the sublayer, the norm follows the adapter.

Learning rate 5e-4: as in LoRA, the second factor starts at zero, so the product changes slowly at first.

Shape letters: H hidden size, r width of the bottleneck, `...` any leading dimensions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NoReturn

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from luthier.core.config import Config
from luthier.core.errors import NotMergeable, RecipeError
from luthier.core.protocols import ModelStructure, TransformerLayer
from luthier.methods.adapter_format import PEFT_PREFIX, build_native_config
from luthier.methods.hooks import Hooks, load_into

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu,
                                                      "tanh": torch.tanh}


class AdapterConfig(Config):
    """Settings of bottleneck adapters."""

    default_learning_rate: ClassVar[float] = 5e-4

    name: Literal["adapter"] = "adapter"
    placement: Literal["houlsby", "pfeiffer", "parallel"] = Field(
        "pfeiffer", description="houlsby: after attention and after MLP; pfeiffer: after the MLP; "
                                "parallel: parallel to the MLP")
    reduction_factor: float = Field(16.0, ge=1, description="hidden size of the model / width of the bottleneck")
    reduction_pattern: dict[str, float] = Field({}, description="exceptions: whole dotted parts of an adapter's "
                                                "name (layers.3.mlp), or expressions -> factor")
    activation: Literal["gelu", "relu", "silu", "tanh"] = Field("gelu", description="activation between the two "
                                                                                    "linear layers")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the bottleneck")
    scale: float | None = Field(None, gt=0, description="factor s; default: 4 for parallel, else 1")

    @property
    def factor(self) -> float:
        """s"""
        return self.scale or (4.0 if self.placement == "parallel" else 1.0)

    def attach(self, structure: ModelStructure, *, seed: int) -> Adapter:
        names = [place for block in structure.layers for place in self.get_places(block)]
        for pattern in self.reduction_pattern:
            if not any(_matches_place(name, pattern) for name in names):
                raise RecipeError(f"method.reduction_pattern: {pattern!r} matches no adapter",
                                  f"adapters are named {names[0]} and so on")
        return Adapter(self, structure, seed)

    def get_places(self, block: TransformerLayer) -> list[str]:
        """The names of a layer's adapters."""
        return [f"{block.name}.{part}" for part in (("attention", "mlp") if self.placement == "houlsby" else ("mlp",))]

    def compute_width(self, place: str, hidden: int) -> int:
        """r."""
        factors = [factor for pattern, factor in self.reduction_pattern.items() if _matches_place(place, pattern)]
        return max(1, round(hidden / (factors[0] if factors else self.reduction_factor)))


def _matches_place(place: str, pattern: str) -> bool:
    return f".{pattern}." in f".{place}." or re.fullmatch(pattern, place) is not None


class Bottleneck:
    """The adapter f of one sublayer."""

    def __init__(self, config: AdapterConfig, place: str, block: TransformerLayer, hidden: int,
                 generator: torch.Generator) -> None:
        self.p, self.act, self.block = config.dropout, ACTIVATIONS[config.activation], block.module
        self.scale = config.factor
        self._input: Tensor | None = None
        like = next(p for p in block.module.parameters() if p.is_floating_point())
        # Trained in float32 or wider, whatever the base's dtype: bfloat16 rounds small updates to nothing.
        dtype, width = torch.promote_types(like.dtype, torch.float32), config.compute_width(place, hidden)
        # Kaiming uniform with a = sqrt 5, as nn.Linear is initialized.
        down = (torch.rand(width, hidden, generator=generator) * 2 - 1) / hidden ** 0.5
        # [r, H], [r], [H, r], [H] in this order, which `__call__` unpacks.
        initial = {"down.weight": down, "down.bias": torch.zeros(width), "up.weight": torch.zeros(hidden, width),
                   "up.bias": torch.zeros(hidden)}
        self.parameters = {name: nn.Parameter(start.to(like.device, dtype)) for name, start in initial.items()}

    def __call__(self, x: Tensor) -> Tensor:
        """f(x), [..., H], for x [..., H]."""
        down, d, up, u = (p.to(x.dtype) for p in self.parameters.values())  # [r, H], [r], [H, r], [H]
        inner = self.act(F.linear(x, down, d))  # [..., r]
        if self.p:
            inner = F.dropout(inner, self.p, self.block.training)
        return self.scale * F.linear(inner, up, u)  # [..., H]

    def add_to_output(self, _x: Tensor, h: Tensor) -> Tensor:
        return h + self(h)  # not in place: D's gradient needs the original h

    def add_from_input(self, x: Tensor, h: Tensor) -> Tensor:
        return h + self(x)

    def store_input(self, x: Tensor) -> Tensor:
        """Store the MLP's input for `add_from_stored_input`."""
        self._input = x  # [..., H]
        return x

    def add_from_stored_input(self, _x: Tensor, h: Tensor) -> Tensor:
        """h + f(the stored input)."""
        x, self._input = self._input, None  # released: the tensor would live until the next pass
        assert x is not None, "no MLP input was stored before the MLP output"
        return h + self(x)


class Adapter:
    """Bottleneck adapters on a model."""

    optimizer_hooks = ()

    def __init__(self, config: AdapterConfig, structure: ModelStructure, seed: int) -> None:
        self.config, self.task, self.hooks = config, structure.task, Hooks()
        self.gates = (self.hooks.gate,)
        self.bottlenecks: dict[str, Bottleneck] = {}
        generator = torch.Generator().manual_seed(seed)
        for block in structure.layers:
            for place in config.get_places(block):
                bottleneck = Bottleneck(config, place, block, structure.sizes["hidden"], generator)
                self.bottlenecks[place] = bottleneck
                self._register(bottleneck, block, place)

    def _register(self, bottleneck: Bottleneck, block: TransformerLayer, place: str) -> None:
        if self.config.placement != "parallel":
            module = block.attention_out if place.endswith(".attention") else block.mlp_out
            self.hooks.modify_output(module, bottleneck.add_to_output)
        elif block.mlp_in is block.mlp_out:
            self.hooks.modify_output(block.mlp_out, bottleneck.add_from_input)
        else:
            self.hooks.modify_input(block.mlp_in, bottleneck.store_input)
            self.hooks.modify_output(block.mlp_out, bottleneck.add_from_stored_input)

    def parameters(self) -> dict[str, nn.Parameter]:
        return {f"{PEFT_PREFIX}{place}.adapter.{name}": parameter for place, bottleneck in self.bottlenecks.items()
                for name, parameter in bottleneck.parameters.items()}

    def lr_multiplier(self, name: str) -> float:
        return 1.0

    def disabled(self) -> Any:
        return self.hooks.disabled()

    def merge(self) -> NoReturn:
        raise NotMergeable("a bottleneck adapter has an activation function and cannot be merged into linear weights",
                           "use the adapter as it is, or train with lora, bitfit or ia3, which can be merged")

    unmerge = merge

    def state(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.parameters().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        load_into(self.parameters(), state)

    def get_peft_config(self) -> dict[str, Any] | None:
        return build_native_config(self.config, self.task)
