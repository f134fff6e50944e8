"""(IA)^3: trained scales of the keys, the values and the inner features of the MLP.

Read `full.py`, `hooks.py` and `merging.py` first.

    k <- l_k * k      v <- l_v * v      y = W_down (l_ff * x)          l: one scale per feature, starts at 1

Of the methods that change every layer it has the fewest parameters. Scaling a linear layer's outputs or inputs is
scaling its weight's rows or columns (and its bias), so it merges exactly.

Liu et al. 2022 (arXiv:2205.05638), section 3.3. Where q, k and v are one fused projection, `target_modules: paper`
scales only its k and v parts; a linear layer named in `target_modules` is scaled whole, as in PEFT.

Learning rate 2e-2: a scale is about one in size and must change by tenths to matter. The paper's 3e-3 is for a thousand
steps; on the demo's rows 40 steps at 3e-3 and 2e-2 reduced the perplexity from 94 to 4.19 and 1.43.

Shape letters: `in` and `out` the features of a linear map, `features` the scaled ones of the two.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from luthier.core.config import Config
from luthier.core.errors import RecipeError, RunError
from luthier.core.protocols import ModelStructure, TargetLinear
from luthier.methods.adapter_format import PEFT_PREFIX
from luthier.methods.hooks import Hooks, check_state_shapes, refuse_quantized
from luthier.methods.merging import MergeableMethod, get_own_parameter
from luthier.methods.peft_settings import MERGE, ORIGIN, build_target_pattern, refuse_unread
from luthier.methods.targets import matches_target, select_targets

# Fields of PEFT's adapter_config.json that are read, or that do not affect what the saved weights compute.
PEFT_FIELDS = ORIGIN | {"target_modules", "exclude_modules", "feedforward_modules", "fan_in_fan_out",
                        "init_ia3_weights"}


class Ia3Config(Config):
    """Settings of (IA)^3."""

    default_learning_rate: ClassVar[float] = 2e-2

    name: Literal["ia3"] = "ia3"
    target_modules: Literal["paper"] | tuple[str, ...] = Field(
        "paper", description="linear layers whose outputs are scaled: paper (k and v), or roles, suffixes, expressions")
    feedforward_modules: tuple[str, ...] = Field(
        ("down",), description="linear layers whose inputs are scaled: roles, suffixes, expressions")

    @classmethod
    def from_peft(cls, adapter: Mapping[str, Any]) -> Ia3Config:
        """Settings from PEFT's adapter_config.json. Raises `RunError` for a setting that is not supported."""
        refuse_unread(adapter, PEFT_FIELDS)
        selected, inner = build_target_pattern(adapter), adapter.get("feedforward_modules") or []
        if selected is None or adapter["target_modules"] == "all-linear":
            raise RunError(f"the adapter was made with target_modules={adapter.get('target_modules')!r}, which is "
                           "not supported", MERGE)
        # PEFT compares suffixes of names, not only whole dotted parts.
        ends = f"(?:{inner})" if isinstance(inner, str) else rf"(?:.*(?:{'|'.join(map(re.escape, sorted(inner)))}))"
        targets = adapter["target_modules"]
        outer = [] if isinstance(targets, list) and set(targets) <= {*inner} else [f"(?!{ends}$){selected}"]
        if not inner:
            return cls.parse({"target_modules": [selected], "feedforward_modules": []})
        return cls.parse({"target_modules": outer, "feedforward_modules": [f"(?={ends}$){selected}"]})

    def attach(self, structure: ModelStructure, *, seed: int) -> Ia3:
        if self.target_modules == "paper":
            outer = [site for site in structure.linears if site.role in ("k", "v", "qkv")]
            # Where experts share one tensor, the MLP has no separate layer to scale.
            inner = [site for site in structure.linears
                     if any(matches_target(site, pattern) for pattern in self.feedforward_modules)]
            if not outer:
                raise RecipeError("method.target_modules: this model has no key and value projections, neither "
                                  "separate "
                                  "nor fused",
                                  "name the linear layers to scale: target_modules: [suffix]")
        else:
            inner = select_targets(structure.linears, self.feedforward_modules)
            outer = [site for site in select_targets(structure.linears, self.target_modules) if site not in inner]
        # The queries come first in a fused map.
        skip = structure.sizes["heads"] * structure.sizes["head_dim"]
        layers = [Ia3Layer(site, inputs=False,
                           skip=skip if site.role == "qkv" and self.target_modules == "paper" else 0)
                  for site in outer]
        return Ia3(layers + [Ia3Layer(site, inputs=True) for site in inner], structure.task)


class Ia3Layer:
    """The scale of one linear layer's inputs, or of its outputs except the first `skip`."""

    def __init__(self, site: TargetLinear, inputs: bool, skip: int = 0) -> None:
        self.site, self.inputs, self.skip = site, inputs, skip
        # Trained in float32 or wider, whatever the base's dtype: bfloat16 rounds small updates to nothing.
        dtype = torch.promote_types(site.weight.dtype, torch.float32)
        size = site.in_features if inputs else site.out_features - skip
        self.l = nn.Parameter(torch.ones(size, dtype=dtype, device=site.weight.device))  # [features - skip]

    def scale_features(self, x: Tensor) -> Tensor:
        """x * l, [..., features], computed as x + x (l - 1): bfloat16 would round an l near one to one."""
        delta = (self.l - 1).to(x.dtype)  # [features - skip]
        if self.skip:
            delta = torch.cat([delta.new_zeros(self.skip), delta])  # [features]
        return torch.addcmul(x, x, delta)  # [..., features]

    def scale_output(self, _x: Tensor, y: Tensor) -> Tensor:
        return self.scale_features(y)

    def expand_scale(self) -> Tensor:
        """The scale of every feature, [features]; ones for the skipped ones."""
        scale = self.l.detach()
        return torch.cat([scale.new_ones(self.skip), scale]) if self.skip else scale

    def to_peft_shape(self) -> Tensor:
        """The scale in PEFT's shape, [1, in] or [out, 1]."""
        return self.expand_scale()[None] if self.inputs else self.expand_scale()[:, None]


class Ia3(MergeableMethod):
    """(IA)^3 on a model."""

    def __init__(self, layers: list[Ia3Layer], task: str) -> None:
        super().__init__()
        self.layers, self.task, self.hooks = layers, task, Hooks()
        self.gates = (self.hooks.gate,)
        for layer in layers:
            if layer.inputs:
                self.hooks.modify_input(layer.site.module, layer.scale_features)
            else:
                self.hooks.modify_output(layer.site.module, layer.scale_output)

    def _map_layers(self) -> dict[str, Ia3Layer]:
        return {f"{PEFT_PREFIX}{layer.site.name}.ia3_l": layer for layer in self.layers}

    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: layer.l for name, layer in self._map_layers().items()}

    def lr_multiplier(self, name: str) -> float:
        return 1.0

    def iter_merged(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        """Weights with their rows or columns scaled, and the biases of scaled outputs."""
        refuse_quantized(layer.site for layer in self.layers)
        for layer in self.layers:
            site, scale = layer.site, layer.expand_scale()
            rows = layer.inputs == site.transposed  # whether the scale belongs to the rows of the stored weight
            # [out, in], or [in, out] if transposed.
            weight = site.weight.to(scale.dtype) * (scale[:, None] if rows else scale[None])
            yield site.module, "weight", weight.to(site.weight.dtype)
            if not layer.inputs and (bias := get_own_parameter(site.module, "bias")) is not None:
                yield site.module, "bias", (bias.to(scale.dtype) * scale).to(bias.dtype)

    def state(self) -> dict[str, Tensor]:
        """Named and shaped as in PEFT's file; the unscaled part of a fused projection is saved as ones."""
        return {name: layer.to_peft_shape() for name, layer in self._map_layers().items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        check_state_shapes(self.state(), state)
        for name, layer in self._map_layers().items():
            if not bool((state[name].flatten()[:layer.skip] == 1).all()):
                raise RunError(f"the saved scales of {layer.site.name!r} also scale its queries, unlike the paper's",
                               "name the linear layer in method.target_modules to scale it whole")
        for name, layer in self._map_layers().items():
            layer.l.copy_(state[name].flatten()[layer.skip:])

    def get_peft_config(self) -> dict[str, Any] | None:
        return {
            "peft_type": "IA3", "task_type": self.task, "target_modules": sorted({la.site.name for la in self.layers}),
            "feedforward_modules": sorted({layer.site.name for layer in self.layers if layer.inputs}),
            "fan_in_fan_out": any(layer.site.transposed for layer in self.layers), "init_ia3_weights": True,
            "inference_mode": True,
        }
