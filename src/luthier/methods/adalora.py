"""AdaLoRA: a LoRA in the form of a singular value decomposition, whose ranks are sought while it trains.

Read `lora.py` and `merging.py` first, then `core/optimizer_hook.py`.

    y = W x + s B diag(e) A x          A: [R, in]   e: [R]   B: [out, R]   s = alpha / R

e starts at zero, so the model starts as the base. Row r of A, entry r of e and column r of B are a triplet. At each
update every entry w of the three gets a sensitivity, smoothed over the steps, and how much that wavers (eqs. 8-11):

    I = |w dL/dw|     mean <- b1 mean + (1 - b1) I     spread <- b2 spread + (1 - b2) |I - mean|     s(w) = mean spread

A triplet's score is s(e_r) plus the mean of s over its row of A and over its column of B (eq. 7). A pruning keeps the
b(t) triplets of the highest scores over all maps together and sets the others' e to zero (eq. 6); their vectors stay,
so that they can come back until the search ends. The budget b falls from R to `target_r` on average (eq. 12):

    all of R while t <= warmup_fraction n,  then down by the cube of what is left of the way,  `target_r` from t = n - final_fraction n on

so that the last steps train what was kept. What keeps A's rows and B's columns apart is a penalty, whose gradient is
added once a step, to the sum over all micro-batches:

    gamma / (2 maps) * sum over maps of |A A^T - 1| + |B^T B - 1|

Zhang et al. 2023 (arXiv:2303.10512). Their code, which PEFT took over, departs from the paper in two places, where this
follows the code, because the paper's numbers are its and so are PEFT's files: w in I is the weight after the update (e,
which starts at zero, would have no sensitivity at first), and the penalty is a mean of norms where eq. 4 has a sum of
squares (which grows with the number of maps until clipping leaves nothing to the loss). In one place it follows the
paper: the last pruning hears of its own step too, which theirs skips; a run of few steps has heard of none before.

Learning rate 5e-3: the change is a product of three factors that start small, e at zero, so at first it grows with the
cube of the steps, and wants ten times LoRA's rate. On the demo's rows 40 steps at 2e-3, 5e-3 and 1e-2 brought the
perplexity from 94.8 to 8.54, 1.59 and 1.44.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from luthier.core.config import Config
from luthier.core.errors import RecipeError, RunError
from luthier.core.protocols import TRAINING, Anatomy, Site
from luthier.methods.adapter_format import PEFT_PREFIX
from luthier.methods.hooks import Hooks, check_state_shapes, refuse_quantized
from luthier.methods.lora import PEFT_FIELDS as LORA_FIELDS
from luthier.methods.lora import add_product, refuse_moved_base
from luthier.methods.merging import MergeableMethod
from luthier.methods.peft_settings import build_target_pattern, refuse_unread
from luthier.methods.targets import select_experts, select_targets

RANK_OFFSET = 1e-5  # PEFT divides alpha by the rank and this
PEFT_STEPS = 1000  # of which the shares of the schedule are written in PEFT's config, which wants whole steps
# Fields of PEFT's adapter_config.json that are read, or that change nothing in what the saved weights compute.
PEFT_FIELDS = LORA_FIELDS - {"bias", "use_dora", "target_parameters"} | {
    "target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"}


class AdaLoraConfig(Config):
    """Settings of AdaLoRA."""

    default_learning_rate: ClassVar[float] = 5e-3

    name: Literal["adalora"] = "adalora"
    target_r: int = Field(8, ge=1, description="ranks that are left at the end, on average over the maps")
    init_r: int | None = Field(None, ge=1, description="rank R of every map at the start; left out: one and a half "
                                                           "times `target_r`, as in the paper")
    alpha: float = Field(16.0, gt=0, description="the change is scaled by alpha / R")
    target_modules: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear", description="roles (q, k, v, o, gate, up, down), endings of names, regular expressions")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of A")
    warmup_fraction: float = Field(0.1, ge=0, lt=1, description="share of all steps before the first pruning")
    final_fraction: float = Field(0.5, ge=0, lt=1, description="share of all steps after the last one, at fixed ranks")
    prune_interval: float = Field(0.001, gt=0, lt=1, description="share of all steps from one pruning to the next, of one step "
                                                        "at least")
    beta1: float = Field(0.85, ge=0, lt=1, description="decay of the sensitivity's running mean")
    beta2: float = Field(0.85, ge=0, lt=1, description="decay of its spread's")
    orth_reg_weight: float = Field(0.5, ge=0, description="weight gamma of the penalty that keeps directions apart")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.initial_rank < self.target_r:
            raise ValueError(f"init_r {self.init_r} is below target_r {self.target_r}, and ranks are only taken away")
        if self.warmup_fraction + self.final_fraction > 0.99:
            raise ValueError(f"warmup_fraction {self.warmup_fraction} and final_fraction {self.final_fraction} leave no step for the search: together they "
                             "are 0.99 at most")
        return self

    @property
    def initial_rank(self) -> int:
        """R"""
        return self.init_r or -(-3 * self.target_r // 2)

    @classmethod
    def from_peft(cls, adapter: Mapping[str, Any]) -> AdaLoraConfig:
        """The settings that PEFT's adapter_config.json describes. Raises `RunError` for what is not read here."""
        refuse_unread(adapter, PEFT_FIELDS)
        refuse_moved_base(adapter)
        selected = build_target_pattern(adapter)
        if selected is None:
            raise RunError("adapter_config.json names no target_modules, so nobody knows what was trained",
                           "save the adapter again with the PEFT that made it")
        total = adapter["total_step"]
        return cls.parse({
            "target_r": min(adapter["target_r"], adapter["init_r"]), "init_r": adapter["init_r"],
            "alpha": adapter["lora_alpha"] if adapter["lora_alpha"] > 0 else adapter["init_r"],
            "dropout": adapter.get("lora_dropout") or 0.0,
            "target_modules": "all-linear" if adapter["target_modules"] == "all-linear" else [selected],
            "warmup_fraction": adapter["tinit"] / total, "final_fraction": adapter["tfinal"] / total,
            "prune_interval": min(adapter["deltaT"] / total, 0.99), "beta1": adapter["beta1"], "beta2": adapter["beta2"],
            "orth_reg_weight": adapter["orth_reg_weight"]})

    def compute_schedule(self, total: int) -> tuple[int, int, int]:
        """Of a run of `total` steps: the last one before the search, its last, and the steps between prunings."""
        return round(self.warmup_fraction * total), total - round(self.final_fraction * total), max(1, round(self.prune_interval * total))

    def compute_budget(self, step: int, total: int, maps: int) -> int | None:
        """b(t): how many triplets of all `maps` a pruning after this step (from 1) keeps; None where none is due."""
        first, last, every = self.compute_schedule(total)
        start, end = self.initial_rank * maps, self.target_r * maps
        if step == last:
            return end
        if not first < step < last or step % every:
            return None
        return int((start - end) * (1 - (step - first) / (last - first)) ** 3 + end)

    def attach(self, anatomy: Anatomy, *, seed: int) -> AdaLora:
        if select_experts(anatomy.experts, self.target_modules):
            raise RecipeError("method.target_modules names experts, whose changes are of one rank for all",
                              "use the method lora for them, or leave the experts out")
        generator = torch.Generator().manual_seed(seed)
        layers = [AdaLoraLayer(site, self, generator) for site in select_targets(anatomy.sites, self.target_modules)]
        return AdaLora(self, layers, anatomy.task)


class FactorState:
    """One of A, e and B: [R, ...] along `dim`, and what is remembered of each of its entries."""

    def __init__(self, name: str, start: Tensor, dim: int) -> None:
        self.name, self.dim, self.parameter = name, dim, nn.Parameter(start)
        self.mean, self.uncertainty = torch.zeros_like(start), torch.zeros_like(start)

    def get_gradient(self) -> Tensor:
        """The parameter's, made of zeros where nothing reached it: a rank among several has such zeros."""
        if self.parameter.grad is None:
            self.parameter.grad = torch.zeros_like(self.parameter)
        return self.parameter.grad

    def update_sensitivity(self, config: AdaLoraConfig, sound: Tensor) -> None:
        """Sensitivity, its running mean and its spread: eqs. 8-10."""
        now = torch.where(sound, (self.parameter * self.get_gradient()).abs(), self.mean)
        self.mean.lerp_(now, 1 - config.beta1)
        self.uncertainty.lerp_(torch.where(sound, (now - self.mean).abs(), self.uncertainty), 1 - config.beta2)

    def compute_score(self) -> Tensor:
        """[R] the mean of s(w) over each triplet's entries."""
        return (self.mean * self.uncertainty).mean(1 - self.dim)


class AdaLoraLayer:
    """The change beside one linear map. `kept`: [R] what the last pruning left."""

    def __init__(self, site: Site, config: AdaLoraConfig, generator: torch.Generator) -> None:
        self.site, self.p, self.rank, self.path = site, config.dropout, config.initial_rank, PEFT_PREFIX + site.name
        self.scale = config.alpha / (self.rank + RANK_OFFSET)
        # Trained in float32 (or wider) whatever the base is kept in: small updates vanish in sixteen bits.
        dtype, device = torch.promote_types(site.weight.dtype, torch.float32), site.weight.device
        a, b = (0.02 * torch.randn(shape, generator=generator) for shape in ((self.rank, site.inputs),
                                                                            (site.outputs, self.rank)))
        self.parts = tuple(FactorState(name, start.to(device, dtype), dim) for name, start, dim in (
            ("lora_A", a, 0), ("lora_E", torch.zeros(self.rank, 1), 0), ("lora_B", b, 1)))
        self.a, self.e, self.b = (part.parameter for part in self.parts)
        self.kept = torch.ones(self.rank, dtype=torch.bool, device=device)

    def delta(self, x: Tensor, y: Tensor) -> Tensor:
        """y [..., out] with the change added, from x [..., in]."""
        if self.p:
            x = F.dropout(x, self.p, self.site.module.training)
        low = F.linear(x, (self.a * self.e).to(x.dtype))
        # Mixed precision turns products to sixteen bits by itself, but nothing that is written where it stands.
        return add_product(y, low.to(y.dtype), self.b.to(y.dtype), self.scale)

    def get_active_mask(self) -> Tensor:
        """[R] the triplets that are part of the change, or may become so: between prunings those that fell can rise."""
        return self.kept | (self.e.detach()[:, 0] != 0)

    def get_factors(self) -> tuple[Tensor, Tensor]:
        """The A and B of a plain LoRA with the same change, of the ranks that are left."""
        left = self.get_active_mask()
        return (self.a * self.e)[left], self.b[:, left]

    def base_weight(self) -> Tensor:
        """The frozen W, [out, in]."""
        return self.site.base_weight()

    def compute_merged_weight(self) -> Tensor:
        """The weight, as the module keeps it, that gives the same outputs alone."""
        weight = self.base_weight().to(self.a.dtype) + self.scale * (self.b @ (self.a * self.e))
        return (weight.T if self.site.transposed else weight).to(self.site.weight.dtype)

    def add_penalty_gradient(self, weight: float) -> None:
        """Add the gradient of ``weight (|A A^T - 1| + |B^T B - 1|)``."""
        for part in (self.parts[0], self.parts[2]):
            rows = part.parameter if part.dim == 0 else part.parameter.T
            apart = rows @ rows.T - torch.eye(self.rank, dtype=rows.dtype, device=rows.device)
            slope = 2 * weight / apart.norm().clamp_min(torch.finfo(rows.dtype).tiny) * (apart @ rows)
            part.get_gradient().add_(slope if part.dim == 0 else slope.T)

    def state(self) -> dict[str, Tensor]:
        """As PEFT's file has it, what is left of each part; what was cut, and the search's memory, to go on with."""
        left = self.get_active_mask()
        found = {f"{TRAINING}{self.path}.kept": left}
        for part in self.parts:
            whole, name = part.parameter.detach(), f"{self.path}.{part.name}"
            found[name], found[f"{TRAINING}{name}.cut"] = (
                whole.index_select(part.dim, which.nonzero()[:, 0]) for which in (left, ~left))
            found |= {f"{TRAINING}{name}.mean": part.mean, f"{TRAINING}{name}.spread": part.uncertainty}
        return found

    def get_expected_shapes(self, state: Mapping[str, Tensor], is_resume: bool) -> dict[str, Tensor]:
        """Names and shapes of a state that fits, whatever ranks are left in it."""
        kept, e = state.get(f"{TRAINING}{self.path}.kept"), state.get(f"{self.path}.lora_E")
        rank = self.rank
        if kept is not None and kept.shape == self.kept.shape:
            rank = int(kept.sum())
        elif kept is None and e is not None and e.ndim == 2:
            rank = min(rank, e.shape[0])
        found = {f"{TRAINING}{self.path}.kept": self.kept} if is_resume else {}
        for part in self.parts:
            name = f"{self.path}.{part.name}"
            found[name] = _build_empty(part, rank)
            if is_resume:
                found |= {f"{TRAINING}{name}.cut": _build_empty(part, self.rank - rank), f"{TRAINING}{name}.mean": part.mean,
                          f"{TRAINING}{name}.spread": part.uncertainty}
        return found

    def load(self, state: Mapping[str, Tensor], is_resume: bool) -> None:
        """Take `state` back. A saved adapter has not what was cut: its ranks come first, and the others are at zero."""
        rank, device = state[f"{self.path}.lora_E"].shape[0], self.kept.device
        self.kept = (state[f"{TRAINING}{self.path}.kept"].to(device, copy=True) if is_resume
                     else torch.arange(self.rank, device=device) < rank)
        if not is_resume:
            self.e.zero_()
        for part in self.parts:
            name = f"{self.path}.{part.name}"
            for which, saved in ((self.kept, name), (~self.kept, f"{TRAINING}{name}.cut")):
                if saved in state:
                    part.parameter.index_copy_(part.dim, which.nonzero()[:, 0], state[saved].to(part.parameter))
            for memory, saved in ((part.mean, f"{TRAINING}{name}.mean"), (part.uncertainty, f"{TRAINING}{name}.spread")):
                memory.copy_(state[saved]) if is_resume else memory.zero_()


def _build_empty(part: FactorState, rank: int) -> Tensor:
    """The part's shape at another rank, without numbers."""
    shape = list(part.parameter.shape)
    shape[part.dim] = rank
    return torch.empty(shape, device="meta")


class AdaLora(MergeableMethod):
    """AdaLoRA on a model."""

    def __init__(self, config: AdaLoraConfig, layers: list[AdaLoraLayer], task: str = "CAUSAL_LM") -> None:
        super().__init__()
        self.config, self.layers, self.task, self.hooks = config, layers, task, Hooks()
        self.gates = (self.hooks.gate,)
        self.optimizer_hooks = (self,)
        for layer in layers:
            self.hooks.modify_output(layer.site.module, layer.delta)

    def parameters(self) -> dict[str, nn.Parameter]:
        return {f"{layer.path}.{part.name}": part.parameter for layer in self.layers for part in layer.parts}

    def lr_multiplier(self, name: str) -> float:
        return 1.0

    # ------------------------------------------------------------ the search

    @torch.no_grad()
    def pre_step(self) -> None:
        """Add the penalty's gradient."""
        if self.config.orth_reg_weight:
            for layer in self.layers:
                layer.add_penalty_gradient(self.config.orth_reg_weight / (2 * len(self.layers)))

    @torch.no_grad()
    def post_step(self, step: int, total: int, sound: Tensor) -> None:
        """Measure, prune where it is due, and once the search has ended keep what was pruned at zero."""
        _, last, _ = self.config.compute_schedule(total)
        if step <= last:
            for part in (part for layer in self.layers for part in layer.parts):
                part.update_sensitivity(self.config, sound)
        budget = self.config.compute_budget(step, total, len(self.layers))
        if budget is not None:
            self._prune(budget, sound)
        if budget is not None or step > last:
            for layer in self.layers:
                layer.e.masked_fill_((~layer.kept & sound)[:, None], 0)

    def _prune(self, budget: int, sound: Tensor) -> None:
        """The `budget` triplets of the highest scores. Where two are equal the earlier one goes: every rank says the
        same."""
        scores = torch.stack([torch.stack([part.compute_score() for part in layer.parts]).sum(0) for layer in self.layers])
        order = scores.flatten().argsort(stable=True)
        kept = torch.ones_like(order, dtype=torch.bool)
        kept[order[:len(order) - budget]] = False
        for layer, mine in zip(self.layers, kept.view(scores.shape), strict=True):
            layer.kept = torch.where(sound, mine, layer.kept)

    # ------------------------------------------------------------ merging, saving

    def iter_merged(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        refuse_quantized(layer.site for layer in self.layers)
        for layer in self.layers:
            yield layer.site.module, "weight", layer.compute_merged_weight()

    def state(self) -> dict[str, Tensor]:
        """PEFT's names, and its shapes for the ranks that are left; see `Layer.state`."""
        return {name: tensor for layer in self.layers for name, tensor in layer.state().items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        is_resume = any(name.startswith(TRAINING) for name in state)
        check_state_shapes({name: t for layer in self.layers for name, t in layer.get_expected_shapes(state, is_resume).items()}, state)
        for layer in self.layers:
            layer.load(state, is_resume)

    def get_peft_config(self) -> dict[str, Any] | None:
        config = self.config
        first, last, every = config.compute_schedule(PEFT_STEPS)
        return {
            "peft_type": "ADALORA", "task_type": self.task, "target_r": config.target_r, "init_r": config.initial_rank,
            "tinit": first, "tfinal": PEFT_STEPS - last, "deltaT": every, "total_step": PEFT_STEPS,
            "beta1": config.beta1, "beta2": config.beta2, "orth_reg_weight": config.orth_reg_weight,
            "lora_alpha": config.alpha, "lora_dropout": config.dropout, "bias": "none", "init_lora_weights": True,
            "target_modules": sorted(layer.site.name for layer in self.layers),
            "fan_in_fan_out": any(layer.site.transposed for layer in self.layers),
            "rank_pattern": {f"{layer.site.name}.lora_E": layer.get_active_mask().tolist() for layer in self.layers},
            "inference_mode": True,
        }
