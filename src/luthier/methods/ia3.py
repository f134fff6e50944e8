"""(IA)^3: learned scales on the keys, the values and the inside of the MLP.

Read `full.py`, `hooks.py` and `merging.py` first.

    k <- l_k * k      v <- l_v * v      y = W_down (l_ff * x)          l: one number a feature, starts at 1

The fewest parameters of the methods that change every block. A scale of a linear map's outputs or inputs is a scale of
its weight's rows or columns (and of its bias), so it merges exactly.

Liu et al. 2022 (arXiv:2205.05638), section 3.3. Where q, k and v are one map, the paper's choice scales its k and v
parts; a map that is named in `targets` is scaled whole, as PEFT does.

Learning rate 2e-2: a scale is about one in size, and must move by tenths to matter. The paper's 3e-3 is for a thousand
steps; on the demo's rows 40 steps at 3e-3 and 2e-2 brought the perplexity from 94 to 4.19 and 1.43.
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
from luthier.core.protocols import Anatomy, Site
from luthier.methods.adapter_format import PEFT_PREFIX
from luthier.methods.hooks import Hooks, check_state_shapes, refuse_quantized
from luthier.methods.merging import MergeableMethod, get_own_parameter
from luthier.methods.peft_settings import MERGE, ORIGIN, build_target_pattern, refuse_unread
from luthier.methods.targets import matches_target, select_targets

# Fields of PEFT's adapter_config.json that are read, or that change nothing in what the saved weights compute.
PEFT_FIELDS = ORIGIN | {"target_modules", "exclude_modules", "feedforward_modules", "fan_in_fan_out", "init_ia3_weights"}


class Ia3Config(Config):
    """Settings of (IA)^3."""

    default_learning_rate: ClassVar[float] = 2e-2

    name: Literal["ia3"] = "ia3"
    target_modules: Literal["paper"] | tuple[str, ...] = Field(
        "paper", description="maps whose outputs are scaled: k and v as in the paper, or roles, endings, expressions")
    feedforward_modules: tuple[str, ...] = Field(("down",), description="linear maps whose inputs are scaled instead, likewise")

    @classmethod
    def from_peft(cls, adapter: Mapping[str, Any]) -> Ia3Config:
        """The settings that PEFT's adapter_config.json describes. Raises `RunError` for what is not read here."""
        refuse_unread(adapter, PEFT_FIELDS)
        selected, inner = build_target_pattern(adapter), adapter.get("feedforward_modules") or []
        if selected is None or adapter["target_modules"] == "all-linear":
            raise RunError(f"the adapter was made with target_modules={adapter.get('target_modules')!r}, which is not "
                           "read here", MERGE)
        # PEFT compares the ends of names, whole parts or not.
        ends = f"(?:{inner})" if isinstance(inner, str) else rf"(?:.*(?:{'|'.join(map(re.escape, sorted(inner)))}))"
        targets = adapter["target_modules"]
        outer = [] if isinstance(targets, list) and set(targets) <= {*inner} else [f"(?!{ends}$){selected}"]
        if not inner:
            return cls.parse({"target_modules": [selected], "feedforward_modules": []})
        return cls.parse({"target_modules": outer, "feedforward_modules": [f"(?={ends}$){selected}"]})

    def attach(self, anatomy: Anatomy, *, seed: int) -> Ia3:
        if self.target_modules == "paper":
            outer = [site for site in anatomy.sites if site.role in ("k", "v", "qkv")]
            # Where experts share one tensor, the MLP has no map of its own to scale.
            inner = [site for site in anatomy.sites if any(matches_target(site, pattern) for pattern in self.feedforward_modules)]
            if not outer:
                raise RecipeError("method.target_modules: no keys and values were found in this model, as maps of their own "
                                  "or one after another in one map", "name the maps to scale: targets: [ending]")
        else:
            inner = select_targets(anatomy.sites, self.feedforward_modules)
            outer = [site for site in select_targets(anatomy.sites, self.target_modules) if site not in inner]
        skip = anatomy.sizes["heads"] * anatomy.sizes["head_dim"]
        layers = [Ia3Layer(site, inputs=False, skip=skip if site.role == "qkv" and self.target_modules == "paper" else 0)
                  for site in outer]
        return Ia3(layers + [Ia3Layer(site, inputs=True) for site in inner], anatomy.task)


class Ia3Layer:
    """The scale of one linear map's outputs, all but the first `skip`, or of its inputs."""

    def __init__(self, site: Site, inputs: bool, skip: int = 0) -> None:
        self.site, self.inputs, self.skip = site, inputs, skip
        # Trained in float32 (or wider) whatever the base is kept in: small updates vanish in sixteen bits.
        dtype = torch.promote_types(site.weight.dtype, torch.float32)
        size = site.inputs if inputs else site.outputs - skip
        self.l = nn.Parameter(torch.ones(size, dtype=dtype, device=site.weight.device))

    def scale_features(self, x: Tensor) -> Tensor:
        """x [..., features] scaled, as x + x (l - 1): near one, sixteen bits would round l itself away."""
        change = (self.l - 1).to(x.dtype)
        if self.skip:
            change = torch.cat([change.new_zeros(self.skip), change])
        return torch.addcmul(x, x, change)

    def scale_output(self, _x: Tensor, y: Tensor) -> Tensor:
        return self.scale_features(y)

    def expand_scale(self) -> Tensor:
        """The scale of every feature, [features]."""
        found = self.l.detach()
        return torch.cat([found.new_ones(self.skip), found]) if self.skip else found

    def to_peft_shape(self) -> Tensor:
        """As PEFT keeps it: [1, in] or [out, 1]."""
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
            rows = layer.inputs == site.transposed
            weight = site.weight.to(scale.dtype) * (scale[:, None] if rows else scale[None])
            yield site.module, "weight", weight.to(site.weight.dtype)
            if not layer.inputs and (bias := get_own_parameter(site.module, "bias")) is not None:
                yield site.module, "bias", (bias.to(scale.dtype) * scale).to(bias.dtype)

    def state(self) -> dict[str, Tensor]:
        """PEFT's names and shapes; the part of a fused map that is not scaled as ones."""
        return {name: layer.to_peft_shape() for name, layer in self._map_layers().items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        check_state_shapes(self.state(), state)
        for name, layer in self._map_layers().items():
            if not bool((state[name].flatten()[:layer.skip] == 1).all()):
                raise RunError(f"the saved scales of {layer.site.name!r} change its queries too, as the paper's do not",
                               "name the map to have it scaled whole: method.target_modules")
        for name, layer in self._map_layers().items():
            layer.l.copy_(state[name].flatten()[layer.skip:])

    def get_peft_config(self) -> dict[str, Any] | None:
        return {
            "peft_type": "IA3", "task_type": self.task, "target_modules": sorted({la.site.name for la in self.layers}),
            "feedforward_modules": sorted({layer.site.name for layer in self.layers if layer.inputs}),
            "fan_in_fan_out": any(layer.site.transposed for layer in self.layers), "init_ia3_weights": True,
            "inference_mode": True,
        }
