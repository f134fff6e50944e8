"""BitFit: only biases are trained. Read `full.py`, `hooks.py` and `merging.py` first.

    y = W x + c + b          c: the module's own bias, if any          b: [out], trained, starts at 0

b is added to the module's output, so the base's weights never change and have no gradients. Where a module has a bias,
training b is equivalent to training c, since their gradients are equal. Where it has none, as in most current decoders,
b is a new bias. RMS norms get none, because they have no bias into which it could be merged.

Ben Zaken et al. 2022 (arXiv:2106.10199): section 3 and table 2; `bias_scope: paper` is their smaller set, the biases of
the query and of the MLP's first linear layer.

Learning rate 1e-3: a bias changes every token directly, and there are few of them. The paper searched 1e-4 to 1e-3 for
encoders; biases that start at zero need the upper end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from luthier.core.config import Config
from luthier.core.errors import RecipeError
from luthier.core.protocols import ModelStructure, TargetLinear
from luthier.methods.adapter_format import PEFT_PREFIX, build_native_config
from luthier.methods.hooks import Hooks, load_into
from luthier.methods.ln_tuning import find_norms
from luthier.methods.merging import MergeableMethod, get_own_parameter
from luthier.methods.targets import select_targets


class BitfitConfig(Config):
    """Settings of BitFit."""

    default_learning_rate: ClassVar[float] = 1e-3

    name: Literal["bitfit"] = "bitfit"
    bias_scope: Literal["all", "paper", "norms"] | tuple[str, ...] = Field(
        "all", description="all: linear layers of all transformer layers, and norms that have a bias; paper: the "
                           "query projection and the "
                           "MLP's first linear layer; norms; or roles (q, k, v, o, gate, up, down), suffixes, "
                           "expressions")

    def attach(self, structure: ModelStructure, *, seed: int) -> Bitfit:
        return Bitfit(self, find_bias_targets(structure, self.bias_scope), structure.task)


@dataclass(frozen=True)
class BiasTarget:
    """A module, and the range of its outputs, `start` to `end`, that gets a bias."""

    name: str
    module: nn.Module
    start: int
    end: int
    outputs: int
    norm: bool = False


def find_bias_targets(structure: ModelStructure, bias_scope: str | tuple[str, ...]) -> list[BiasTarget]:
    """The modules that `bias_scope` selects. Raises `RecipeError` if there are none."""
    biased = [BiasTarget(name, module, 0, bias.shape[0], bias.shape[0], norm=True)
              for name, module in find_norms(structure).items()
              if (bias := get_own_parameter(module, "bias")) is not None]
    if bias_scope == "norms" and not biased:
        raise RecipeError("method.bias_scope: the norms of this model have no biases",
                          "use all (biases of the linear layers), or the method ln_tuning (weights of the norms)")
    if bias_scope == "paper":
        maps = [_find_query_slice(structure, site) for site in structure.linears if site.role in ("q", "qkv", "up")]
        if not any(site.role in ("q", "qkv") for site in structure.linears):
            raise RecipeError("method.bias_scope: this model has no query projection, neither separate nor fused",
                              "use all, or name the linear layers by suffixes")
        return maps
    maps = [] if bias_scope == "norms" else [
        BiasTarget(site.name, site.module, 0, site.out_features, site.out_features)
        for site in select_targets(structure.linears, "all-linear" if bias_scope == "all" else bias_scope)]
    return maps + (biased if bias_scope in ("all", "norms") else [])


def _find_query_slice(structure: ModelStructure, site: TargetLinear) -> BiasTarget:
    """The query part of a linear layer: the first outputs of a fused one."""
    end = structure.sizes["heads"] * structure.sizes["head_dim"] if site.role == "qkv" else site.out_features
    return BiasTarget(site.name, site.module, 0, end, site.out_features)


class Bitfit(MergeableMethod):
    """BitFit on a model."""

    def __init__(self, config: BitfitConfig, found: list[BiasTarget], task: str) -> None:
        super().__init__()
        self.config, self.places, self.task, self.hooks = config, found, task, Hooks()
        self.gates = (self.hooks.gate,)
        self._biases = {}
        for place in found:
            like = next(p for p in place.module.parameters())
            # Trained in float32 or wider, whatever the base's dtype: bfloat16 rounds small updates to nothing.
            dtype = torch.promote_types(like.dtype, torch.float32)
            # [end - start]
            bias = nn.Parameter(torch.zeros(place.end - place.start, dtype=dtype, device=like.device))
            self._biases[f"{PEFT_PREFIX}{place.name}.bitfit"] = bias
            self.hooks.modify_output(place.module, _build_bias_hook(place, bias))

    def parameters(self) -> dict[str, nn.Parameter]:
        return self._biases

    def lr_multiplier(self, name: str) -> float:
        return 1.0

    def iter_merged(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        """Every module's merged bias; a new one where the module had none."""
        for place, change in zip(self.places, self._biases.values(), strict=True):
            old, weight = get_own_parameter(place.module, "bias"), get_own_parameter(place.module, "weight")
            like = old if old is not None else weight
            assert like is not None
            whole = change.new_zeros(place.outputs) if old is None else old.to(change.dtype).clone()
            whole[place.start:place.end] += change  # [end - start] of [out]
            # A quantized weight's dtype, an integer type, cannot hold a bias.
            yield place.module, "bias", whole.to(like.dtype if like.is_floating_point() else change.dtype)

    def state(self) -> dict[str, Tensor]:
        return {name: bias.detach() for name, bias in self._biases.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        load_into(self._biases, state)

    def get_peft_config(self) -> dict[str, Any] | None:
        return build_native_config(self.config, self.task)


def _build_bias_hook(place: BiasTarget, bias: nn.Parameter) -> Any:
    """The hook of one module: y [..., out] -> y with the bias added."""
    def add_bias(_x: Tensor, y: Tensor) -> Tensor:
        # A linear layer's gradient does not need its output, so it can be updated in place. A norm's output cannot:
        # activation recomputation may rebuild it in the same storage from the norm's input.
        return y + bias.to(y.dtype) if place.norm else y.add_(bias.to(y.dtype))

    def add_partial_bias(_x: Tensor, y: Tensor) -> Tensor:
        y[..., place.start:place.end] += bias.to(y.dtype)  # [..., end - start]
        return y

    return add_bias if place.end - place.start == place.outputs else add_partial_bias
