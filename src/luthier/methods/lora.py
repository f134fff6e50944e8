"""LoRA and its variants: a low-rank update of each frozen linear layer. Read `full.py` and `hooks.py` first.

    y = W x + s B A x          A: [R, in]   B: [out, R]   s = alpha / R   (rsLoRA: alpha / sqrt R)

B is initialized to zero, so the model starts as the base. Variants, each a few lines below:

    DoRA    y = m / |W + s B A| * (W x + s B A x); |.| is each output row's norm, without a gradient; m starts as |W|
    PiSSA   A and B start as the largest singular directions A0, B0 of W, and y = W x + s (B A - B0 A0) x. The model
            still starts as the base, and the base's weights are not changed
    LoRA+   B is trained with a multiple of A's learning rate
    rsLoRA  keeps the size of the update when the rank grows

Papers: LoRA, Hu et al. 2021 (arXiv:2106.09685) eq. 3; rsLoRA, Kalajdzievski 2023 (2312.03732) section 3; DoRA, Liu et
al. 2024 (2402.09353) eqs. 5, 11; PiSSA, Meng et al. 2024 (2404.02948) eqs. 2-4; LoRA+, Hayou et al. 2024 (2402.12354).

Learning rate 5e-4: B starts at zero, so the product B A changes slowly, and LoRA needs 10 to 30 times full
fine-tuning's rate, whatever its rank. On the demo's rows 40 steps at 2e-4, 5e-4 and 1e-3 reduced the perplexity from 94
to 4.95, 1.66 and 1.47. Small models (below a billion parameters) work with 1e-3 and more, large ones often with 2e-4.

Shape letters: R rank (of PiSSA's joined factors 2 R), `in` and `out` the features of a linear map, `...` any leading
dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from luthier.core.config import Config
from luthier.core.errors import RecipeError, RunError
from luthier.core.expert_layers import ExpertLinears
from luthier.core.protocols import ModelStructure, TargetLinear
from luthier.methods.adapter_format import PEFT_PREFIX
from luthier.methods.expert_lora import ExpertLayer
from luthier.methods.hooks import Hooks, check_state_shapes, load_into, refuse_quantized
from luthier.methods.peft_settings import (
    MERGE,
    ORIGIN,
    SELECTION,
    build_key_pattern,
    build_target_pattern,
    format_unsupported,
    refuse_unread,
    shorten_names,
)
from luthier.methods.targets import is_target, matches_pattern, matches_target, select_experts, select_targets

# Fields of PEFT's adapter_config.json that are read, or that do not affect what the saved weights compute.
PEFT_FIELDS = ORIGIN | SELECTION | {
    "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern",
    "bias", "fan_in_fan_out", "init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "megatron_core", "qalora_group_size", "target_parameters",
}
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
GENERATIVE_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")  # tasks whose models are saved and loaded with the same class
PEFT_DEFAULT = 8  # of r and lora_alpha, which other tools may omit from the file


class LoraConfig(Config):
    """Settings of LoRA, rsLoRA, DoRA, LoRA+ and PiSSA."""

    default_learning_rate: ClassVar[float] = 5e-4

    name: Literal["lora"] = "lora"
    rank: int = Field(8, ge=1, description="rank R of the update; a larger rank has more parameters")
    alpha: float = Field(16.0, gt=0, description="the update is scaled by alpha / rank")
    target_modules: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear", description="roles (q, k, v, o, gate, up, down, experts), suffixes of module names, or regular "
                                  "expressions")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of A")
    use_rslora: bool = Field(False, description="rsLoRA: scale by alpha / sqrt(rank) instead")
    use_dora: bool = Field(False, description="DoRA: train each output row's magnitude separately from its direction")
    init_lora_weights: Literal["default", "gaussian", "pissa"] = Field(
        "default", description="initialization of A (B is zero), or PiSSA")
    loraplus_lr_ratio: float = Field(1.0, gt=0, description="LoRA+: factor on B's learning rate; the paper uses 16")
    rank_pattern: dict[str, int] = Field({}, description="exceptions from `rank`: role, suffix or expression -> rank")
    alpha_pattern: dict[str, float] = Field({}, description="exceptions from `alpha`, with the same keys")

    @classmethod
    def from_peft(cls, adapter: Mapping[str, Any]) -> LoraConfig:
        """Settings from PEFT's adapter_config.json. Raises `RunError` for a setting that is not supported."""
        refuse_unread(adapter, PEFT_FIELDS)
        if adapter.get("bias", "none") != "none":
            raise format_unsupported("bias", adapter["bias"])
        refuse_moved_base(adapter)
        targets = adapter.get("target_modules")
        selected = "all-linear" if targets == "all-linear" else build_target_pattern(adapter)
        parameters = list(adapter.get("target_parameters") or ())
        if selected is None and not parameters:
            raise RunError("adapter_config.json has no target_modules, so the trained modules are unknown",
                           "save the adapter again with the PEFT version that made it")
        return cls.parse({
            "rank": adapter.get("r", PEFT_DEFAULT), "alpha": adapter.get("lora_alpha", PEFT_DEFAULT),
            "dropout": adapter.get("lora_dropout") or 0.0,
            "target_modules": selected if selected == "all-linear" and not parameters else
            [*([] if selected is None else [selected]), *parameters],
            "use_rslora": adapter.get("use_rslora") or False, "use_dora": adapter.get("use_dora") or False,
            "rank_pattern": {build_key_pattern(key): r for key, r in (adapter.get("rank_pattern") or {}).items()},
            "alpha_pattern": {build_key_pattern(key): a for key, a in (adapter.get("alpha_pattern") or {}).items()}})

    def attach(self, structure: ModelStructure, *, seed: int) -> Lora:
        experts = select_experts(structure.experts, self.target_modules)
        linear_targets = [target for target in self.target_modules if not any(is_target(target, e) for e in experts)]
        sites = select_targets(
            structure.linears, self.target_modules if self.target_modules == "all-linear" else tuple(linear_targets))
        generator = torch.Generator().manual_seed(seed)
        layers = [LoraLayer(site, self, generator) for site in sites]
        # Models of other tasks get heads, and the linear layers of a head may have the same names.
        module_names = [name for name,
                        _ in structure.model.named_modules()] if structure.task in GENERATIVE_TASKS else None
        return Lora(self, [*layers, *self._build_expert_layers(experts, generator)], structure.task, module_names)

    def compute_scale(self, rank: int, alpha: float) -> float:
        """s."""
        return alpha / (rank ** 0.5 if self.use_rslora else rank)

    def _build_expert_layers(self, experts: Sequence[ExpertLinears], generator: torch.Generator) -> list[ExpertLayer]:
        """Raises `RecipeError` for the variants that have no form for experts."""
        unsupported = [setting for setting, is_used in (
            ("use_dora", self.use_dora), ("dropout", self.dropout > 0),
            ("init_lora_weights: pissa", self.init_lora_weights == "pissa"),
            ("rank_pattern", any(matches_pattern(key, e) for key in self.rank_pattern for e in experts)),
            ("alpha_pattern", any(matches_pattern(key, e) for key in self.alpha_pattern for e in experts))) if is_used]
        if experts and unsupported:
            raise RecipeError(f"method.target_modules names experts, which do not support {unsupported[0]}",
                              f"omit {unsupported[0]}, or the experts")
        modules = [e.name.rpartition(".")[0] for e in experts]
        # PEFT nests one wrapper for each parameter of a module; the last one is the outermost.
        return [ExpertLayer(e, self.rank, self.compute_scale(self.rank, self.alpha),
                            self.init_lora_weights == "gaussian", generator, modules[i + 1:].count(modules[i]))
                for i, e in enumerate(experts)]


def refuse_moved_base(adapter: Mapping[str, Any]) -> None:
    """Raises `RunError` for an initialization that changes the base: A and B fit only the changed base."""
    if str(adapter.get("init_lora_weights")).startswith(BASE_CHANGING_INITS):
        raise RunError(f"the adapter was made with init_lora_weights={adapter['init_lora_weights']!r}, which is not "
                       "read here: its weights fit a base that PEFT changed at the start",
                       "let PEFT convert it to a plain LoRA (save_pretrained with "
                       "path_initial_model_for_weight_conversion), or " + MERGE)


class LoraLayer:
    """The update of one linear layer."""

    def __init__(self, site: TargetLinear, config: LoraConfig, generator: torch.Generator) -> None:
        self.site, self.p, self.path = site, config.dropout, site.name
        self.rank = next((r for k, r in config.rank_pattern.items() if matches_target(site, k)), config.rank)
        alpha = next((a for k, a in config.alpha_pattern.items() if matches_target(site, k)), config.alpha)
        self.scale = config.compute_scale(self.rank, alpha)
        weight = site.weight
        # Trained in float32 or wider, whatever the base's dtype: bfloat16 rounds small updates to nothing.
        dtype = torch.promote_types(weight.dtype, torch.float32)
        a, b = (factor.to(weight.device, dtype) for factor in self._init_factors(config.init_lora_weights, generator))
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)  # [R, in], [out, R]
        is_pissa = config.init_lora_weights == "pissa"
        self.initial_factors = (self.a.detach().clone(), self.b.detach().clone()) if is_pissa else None  # A0, B0
        # [out] |W| of each output row
        self.initial_norm = self._compute_squared_norms().sqrt() if config.use_dora else None
        # [out] m
        self.magnitude = nn.Parameter(self.initial_norm.clone()) if self.initial_norm is not None else None

    def _init_factors(self, init: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        shape = (self.rank, self.site.in_features)  # [R, in]
        if init == "pissa":
            u, s, v = torch.linalg.svd(self.base_weight().float(), full_matrices=False)  # [out, r], [r], [r, in]
            root = (s[:self.rank] / self.scale).sqrt()  # [R]
            return root[:, None] * v[:self.rank], u[:, :self.rank] * root  # A0 [R, in], B0 [out, R]
        if init == "gaussian":
            a = torch.randn(shape, generator=generator) / self.rank
        else:  # Kaiming uniform with a = sqrt 5, as in the paper's code
            a = (torch.rand(shape, generator=generator) * 2 - 1) / self.site.in_features ** 0.5
        return a, torch.zeros(self.site.out_features, self.rank)  # B = 0: the model starts as the base

    def register_hooks(self, hooks: Hooks) -> None:
        hooks.modify_output(self.site.module, self.delta)

    def base_weight(self) -> Tensor:
        """The frozen W, [out, in]."""
        return self.site.base_weight()

    def delta(self, x: Tensor, y: Tensor) -> Tensor:
        """y [..., out] plus the update of x [..., in]."""
        if self.p:
            x = F.dropout(x, self.p, self.site.module.training)  # [..., in]
        a, b = self.get_factors()  # [R, in], [out, R]
        low = F.linear(x, a.to(x.dtype))  # [..., R]
        # Autocast does not cast the arguments of in-place operations, so they are cast here.
        updated = add_product(y, low.to(y.dtype), b.to(y.dtype), self.scale)  # [..., out]
        if self.magnitude is None or self.initial_norm is None:
            return updated
        # The bias is not part of the weight's norm.
        bias: Any = self.site.module.bias
        ratio = (self.magnitude / self.compute_weight_norm()).to(y.dtype)  # [out]
        return updated * ratio if bias is None else (updated - bias) * ratio + bias

    def get_factors(self) -> tuple[Tensor, Tensor]:
        """A [R, in] and B [out, R] whose product is the update. PiSSA subtracts B0 A0, so its factors have rank 2 R."""
        if self.initial_factors is None:
            return self.a, self.b
        return torch.cat([self.a, self.initial_factors[0]]), torch.cat([self.b, -self.initial_factors[1]], dim=1)

    @torch.no_grad()
    def compute_weight_norm(self) -> Tensor:
        """|W + s B A| of each output row, [out]."""
        assert self.initial_norm is not None
        a, b = self.get_factors()  # [R, in], [out, R]
        # |W + s B A|^2 = |W|^2 + 2 s <W, B A> + s^2 |B A|^2, without forming the [out, in] product B A.
        cross = (self.base_weight().to(a.dtype) @ a.T * b).sum(1)  # [out]
        own = (b @ (a @ a.T) * b).sum(1)  # [out]
        # Clamped: rounding can make the square of a norm near zero negative.
        return (self.initial_norm ** 2 + 2 * self.scale * cross + self.scale ** 2 * own).clamp_min(0).sqrt()

    def _compute_squared_norms(self) -> Tensor:
        weight = self.base_weight()  # [out, in]
        # [out] In float32: a sum of squares in 16 bits would lose most of its digits.
        return weight.to(torch.promote_types(weight.dtype, torch.float32)).square().sum(1)

    @torch.no_grad()
    def compute_merged_weight(self) -> Tensor:
        """The merged weight, in the layout of the module's own."""
        a, b = self.get_factors()  # [R, in], [out, R]
        weight = self.base_weight().to(a.dtype) + self.scale * (b @ a)  # [out, in]
        if self.magnitude is not None:
            weight = weight * (self.magnitude / self.compute_weight_norm())[:, None]  # [out, in]
        # GPT-2's Conv1D stores [in, out].
        return (weight.T if self.site.transposed else weight).to(self.site.weight.dtype)


def add_product(y: Tensor, low: Tensor, b: Tensor, scale: float) -> Tensor:
    """y + scale * low b^T in one matrix product.

    A packed row is updated in place: a linear layer's gradient does not need its output, and a copy would cost as much
    as a norm.

    Args:
        y: [..., out]
        low: [..., R]
        b: [out, R]
    """
    # A contiguous [R, out] makes the backward pass of `low` twice as fast as the transposed [out, R].
    b = b.T.contiguous()  # [R, out]
    if y.ndim == 3 and y.shape[0] == 1:  # a packed row, [1, T, out]
        return y.baddbmm_(low, b[None], alpha=scale)  # [1, T, out]
    return y.flatten(0, -2).addmm(low.flatten(0, -2), b, alpha=scale).view(y.shape)


class Lora:
    """LoRA on a model.

    Args:
        module_names: paths of all modules of the model, used to shorten the saved `target_modules`; None: whole paths
            are saved.
    """

    optimizer_hooks = ()

    def __init__(self, config: LoraConfig, layers: Sequence[LoraLayer | ExpertLayer], task: str = "CAUSAL_LM",
                 module_names: Sequence[str] | None = None) -> None:
        self.config, self.layers, self.task, self.hooks = config, layers, task, Hooks()
        paths = [layer.site.name for layer in layers if isinstance(layer, LoraLayer)]
        self._targets = sorted(set(paths)) if module_names is None else shorten_names(paths, module_names)
        self.gates = (self.hooks.gate,)
        self._originals: list[Tensor] = []
        for layer in layers:
            layer.register_hooks(self.hooks)

    def parameters(self) -> dict[str, nn.Parameter]:
        parameters = {}
        for layer in self.layers:
            path = PEFT_PREFIX + layer.path
            parameters[f"{path}.lora_A.weight"] = layer.a
            parameters[f"{path}.lora_B.weight"] = layer.b
            if layer.magnitude is not None:
                parameters[f"{path}.lora_magnitude_vector"] = layer.magnitude
        return parameters

    def lr_multiplier(self, name: str) -> float:
        return self.config.loraplus_lr_ratio if name.endswith("lora_B.weight") else 1.0

    @contextmanager
    def disabled(self) -> Iterator[None]:
        if self._originals:
            self.unmerge()
            try:
                with self.disabled():
                    yield
            finally:
                self.merge()
        else:
            with self.hooks.disabled():
                yield

    @torch.no_grad()
    def merge(self) -> None:
        assert not self._originals, "merged already"
        refuse_quantized(layer.site for layer in self.layers if isinstance(layer, LoraLayer))
        for layer in self.layers:
            self._originals.append(layer.site.weight.detach().clone())  # a copy: subtracting the update would round
            layer.site.weight.copy_(layer.compute_merged_weight())
        self.hooks.gate.disabled_depth += 1

    @torch.no_grad()
    def unmerge(self) -> None:
        assert self._originals, "not merged"
        for layer, weight in zip(self.layers, self._originals, strict=True):
            layer.site.weight.copy_(weight)
        self._originals.clear()
        self.hooks.gate.disabled_depth -= 1

    def state(self) -> dict[str, Tensor]:
        """Named and shaped as in PEFT's file. A PiSSA update is saved as a LoRA of twice the rank on the same base."""
        state = {name: parameter.detach() for name, parameter in self.parameters().items()}
        for layer in self.layers:
            if layer.initial_factors is not None:
                a, b = layer.get_factors()  # [2 R, in], [out, 2 R]
                path = PEFT_PREFIX + layer.path
                state[f"{path}.lora_A.weight"], state[f"{path}.lora_B.weight"] = a.detach(), b.detach()
        return state

    def load(self, state: Mapping[str, Tensor]) -> None:
        check_state_shapes(self.state(), state)
        state = dict(state)
        for layer in self.layers:
            if layer.initial_factors is not None:
                path = PEFT_PREFIX + layer.path
                a, b = state[f"{path}.lora_A.weight"], state[f"{path}.lora_B.weight"]
                # The file has [A; A0] and [B | -B0], as `get_factors` returns them.
                layer.initial_factors = (a[layer.rank:].to(layer.a), -b[:, layer.rank:].to(layer.b))
                state[f"{path}.lora_A.weight"], state[f"{path}.lora_B.weight"] = a[:layer.rank], b[:, :layer.rank]
        load_into(self.parameters(), state)

    def get_peft_config(self) -> dict[str, Any] | None:
        rank_factor = 2 if self.config.init_lora_weights == "pissa" else 1
        alpha_factor = rank_factor ** 0.5 if self.config.use_rslora else rank_factor  # keeps s at twice the rank
        linear = [layer for layer in self.layers if isinstance(layer, LoraLayer)]
        experts = sorted(layer.site.name for layer in self.layers if isinstance(layer, ExpertLayer))
        return {
            "peft_type": "LORA", "task_type": self.task, "r": self.config.rank * rank_factor,
            "lora_alpha": self.config.alpha * alpha_factor, "lora_dropout": self.config.dropout,
            "target_modules": self._targets,
            **({"target_parameters": experts} if experts else {}),
            "use_rslora": self.config.use_rslora, "use_dora": self.config.use_dora, "bias": "none",
            "fan_in_fan_out": any(layer.site.transposed for layer in linear),
            "rank_pattern": {la.site.name: la.rank * rank_factor for la in self.layers if la.rank != self.config.rank},
            "alpha_pattern": self._build_alpha_pattern(alpha_factor), "init_lora_weights": True, "inference_mode": True,
        }

    def _build_alpha_pattern(self, alpha_factor: float) -> dict[str, float]:
        pattern = {}
        for layer in self.layers:
            alpha = layer.scale * (layer.rank ** 0.5 if self.config.use_rslora else layer.rank)
            if alpha != self.config.alpha:
                pattern[layer.site.name] = alpha * alpha_factor
        return pattern
