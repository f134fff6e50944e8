"""AdaLoRA: a LoRA in the form of a singular value decomposition whose ranks are searched for during training.

Read `lora.py` and `merging.py` first, then `core/optimizer_hook.py`.

    y = W x + s B diag(e) A x          A: [R, in]   e: [R]   B: [out, R]   s = alpha / R

e starts at zero, so the model starts as the base. Row r of A, entry r of e and column r of B are a triplet. At each
optimizer step every entry w of the three gets a sensitivity I, its moving average and its uncertainty (eqs. 8-11):

    I = |w dL/dw|    mean <- b1 mean + (1 - b1) I    unc <- b2 unc + (1 - b2) |I - mean|    s(w) = mean * unc

A triplet's score is s(e_r) plus the mean of s over its row of A and over its column of B (eq. 7). Pruning keeps the
b(t) triplets with the highest scores over all linear layers and sets e of the others to zero (eq. 6). Their vectors
stay, so a triplet can return until the search ends. The budget b falls from R to `target_r` on average (eq. 12):

    R for t <= warmup_fraction n;  then a cubic decay;  `target_r` from t = n - final_fraction n on     (n: all steps)

so that the last steps train the triplets that remain. A penalty keeps A's rows and B's columns orthogonal; its gradient
is added once a step, to the sum over all micro-batches:

    gamma / (2 linear layers) * sum over linear layers of |A A^T - 1| + |B^T B - 1|

Zhang et al. 2023 (arXiv:2303.10512). Their code, which PEFT adopted, differs from the paper in two places. This file
follows the code there, since the paper's results and PEFT's files come from it:

* w in I is the weight after the update. With the weight before it, e would have no sensitivity at first.
* The penalty is a mean of norms, not a sum of squares (eq. 4), which grows with the number of linear layers.

It follows the paper in one place: the last pruning uses the sensitivities of its own step. Their code skips them, so a
run of few steps would prune without any.

Learning rate 5e-3: the update is a product of three small factors, and e starts at zero, so it grows with the cube of
the steps at first and needs ten times LoRA's rate. On the demo's rows 40 steps at 2e-3, 5e-3 and 1e-2 reduced the
perplexity from 94.8 to 8.54, 1.59 and 1.44.

Shape letters: R rank, r active triplets, `in` and `out` the features of a linear map, `...` any leading dimensions.
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
from luthier.core.protocols import TRAINING, ModelStructure, TargetLinear
from luthier.methods.adapter_format import PEFT_PREFIX
from luthier.methods.hooks import Hooks, check_state_shapes, refuse_quantized
from luthier.methods.lora import PEFT_FIELDS as LORA_FIELDS
from luthier.methods.lora import add_product, refuse_moved_base
from luthier.methods.merging import MergeableMethod
from luthier.methods.peft_settings import build_target_pattern, refuse_unread
from luthier.methods.targets import select_experts, select_targets

RANK_OFFSET = 1e-5  # PEFT scales by alpha / (R + 1e-5)
PEFT_STEPS = 1000  # length of the schedule in PEFT's config, which has steps in place of fractions
# Fields of PEFT's adapter_config.json that are read, or that do not affect what the saved weights compute.
PEFT_FIELDS = LORA_FIELDS - {"bias", "use_dora", "target_parameters"} | {
    "target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"}


class AdaLoraConfig(Config):
    """Settings of AdaLoRA."""

    default_learning_rate: ClassVar[float] = 5e-3

    name: Literal["adalora"] = "adalora"
    target_r: int = Field(8, ge=1, description="average rank of the linear layers at the end")
    init_r: int | None = Field(None, ge=1, description="rank R of every linear layer at the start; default: 1.5 times "
                                                     "`target_r`, as in the paper")
    alpha: float = Field(16.0, gt=0, description="the update is scaled by alpha / R")
    target_modules: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear", description="roles (q, k, v, o, gate, up, down), suffixes of module names, or expressions")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of A")
    warmup_fraction: float = Field(0.1, ge=0, lt=1, description="fraction of the steps before the first pruning")
    final_fraction: float = Field(0.5, ge=0, lt=1, description="fraction of the steps after the last pruning")
    prune_interval: float = Field(0.001, gt=0, lt=1, description="fraction of the steps between two prunings; at "
                                                                "least one step")
    beta1: float = Field(0.85, ge=0, lt=1, description="decay of the sensitivity's moving average")
    beta2: float = Field(0.85, ge=0, lt=1, description="decay of the uncertainty's moving average")
    orth_reg_weight: float = Field(0.5, ge=0, description="weight gamma of the orthogonality penalty")

    @model_validator(mode="after")
    def _check_ranks_and_fractions(self) -> Self:
        if self.initial_rank < self.target_r:
            raise ValueError(f"init_r {self.init_r} is below target_r {self.target_r}; ranks can only be removed")
        if self.warmup_fraction + self.final_fraction > 0.99:
            raise ValueError(f"warmup_fraction {self.warmup_fraction} and final_fraction {self.final_fraction} leave "
                             "no step for the search; their sum must be at most 0.99")
        return self

    @property
    def initial_rank(self) -> int:
        """R"""
        return self.init_r or -(-3 * self.target_r // 2)

    @classmethod
    def from_peft(cls, adapter: Mapping[str, Any]) -> AdaLoraConfig:
        """Settings from PEFT's adapter_config.json. Raises `RunError` for a setting that is not supported."""
        refuse_unread(adapter, PEFT_FIELDS)
        refuse_moved_base(adapter)
        selected = build_target_pattern(adapter)
        if selected is None:
            raise RunError("adapter_config.json has no target_modules, so the trained modules are unknown",
                           "save the adapter again with the PEFT version that made it")
        total = adapter["total_step"]
        return cls.parse({
            "target_r": min(adapter["target_r"], adapter["init_r"]), "init_r": adapter["init_r"],
            "alpha": adapter["lora_alpha"] if adapter["lora_alpha"] > 0 else adapter["init_r"],
            "dropout": adapter.get("lora_dropout") or 0.0,
            "target_modules": "all-linear" if adapter["target_modules"] == "all-linear" else [selected],
            "warmup_fraction": adapter["tinit"] / total, "final_fraction": adapter["tfinal"] / total,
            "prune_interval": min(adapter["deltaT"] / total, 0.99),
            "beta1": adapter["beta1"], "beta2": adapter["beta2"], "orth_reg_weight": adapter["orth_reg_weight"]})

    def compute_schedule(self, total: int) -> tuple[int, int, int]:
        """For `total` steps: the last step before the search, the last step of it, and the steps between prunings."""
        return (round(self.warmup_fraction * total), total - round(self.final_fraction * total),
                max(1, round(self.prune_interval * total)))

    def compute_budget(self, step: int, total: int, maps: int) -> int | None:
        """b(t): number of triplets over all `maps` kept after this step (from 1); None if no pruning is due."""
        first, last, every = self.compute_schedule(total)
        start, end = self.initial_rank * maps, self.target_r * maps
        if step == last:
            return end
        if not first < step < last or step % every:
            return None
        return int((start - end) * (1 - (step - first) / (last - first)) ** 3 + end)

    def attach(self, structure: ModelStructure, *, seed: int) -> AdaLora:
        if select_experts(structure.experts, self.target_modules):
            raise RecipeError("method.target_modules names experts, which adalora does not support",
                              "use the method lora, or omit the experts")
        generator = torch.Generator().manual_seed(seed)
        layers = [AdaLoraLayer(site, self, generator) for site in select_targets(structure.linears,
                                                                                 self.target_modules)]
        return AdaLora(self, layers, structure.task)


class FactorState:
    """One of A, e and B, with R along dimension `dim`, and the moving averages of its entries."""

    def __init__(self, name: str, start: Tensor, dim: int) -> None:
        self.name, self.dim, self.parameter = name, dim, nn.Parameter(start)
        self.mean, self.uncertainty = torch.zeros_like(start), torch.zeros_like(start)  # as the parameter

    def get_gradient(self) -> Tensor:
        """The parameter's gradient; zeros where it has none, as on a rank without tokens."""
        if self.parameter.grad is None:
            self.parameter.grad = torch.zeros_like(self.parameter)
        return self.parameter.grad

    def update_sensitivity(self, config: AdaLoraConfig, sound: Tensor) -> None:
        """Update the sensitivity's average and its uncertainty (eqs. 8-10); unchanged where not `sound`."""
        # `sound` is a tensor, and `where` is no branch: reading it would wait for the device.
        sensitivity = torch.where(sound, (self.parameter * self.get_gradient()).abs(), self.mean)
        self.mean.lerp_(sensitivity, 1 - config.beta1)  # first: eq. 10 takes the distance from the new mean
        self.uncertainty.lerp_(torch.where(sound, (sensitivity - self.mean).abs(), self.uncertainty), 1 - config.beta2)

    def compute_score(self) -> Tensor:
        """[R] the mean of s(w) over each triplet's entries."""
        return (self.mean * self.uncertainty).mean(1 - self.dim)


class AdaLoraLayer:
    """The update of one linear layer. `kept`: [R] the triplets that the last pruning kept."""

    def __init__(self, site: TargetLinear, config: AdaLoraConfig, generator: torch.Generator) -> None:
        self.site, self.p, self.rank, self.path = site, config.dropout, config.initial_rank, PEFT_PREFIX + site.name
        self.scale = config.alpha / (self.rank + RANK_OFFSET)
        # Trained in float32 or wider, whatever the base's dtype: bfloat16 rounds small updates to nothing.
        dtype, device = torch.promote_types(site.weight.dtype, torch.float32), site.weight.device
        a, b = (0.02 * torch.randn(shape, generator=generator) for shape in ((self.rank, site.in_features),
                                                                            (site.out_features, self.rank)))
        self.parts = tuple(FactorState(name, start.to(device, dtype), dim) for name, start, dim in (
            ("lora_A", a, 0), ("lora_E", torch.zeros(self.rank, 1), 0), ("lora_B", b, 1)))  # [R, in], [R, 1], [out, R]
        self.a, self.e, self.b = (part.parameter for part in self.parts)
        self.kept = torch.ones(self.rank, dtype=torch.bool, device=device)  # [R]

    def delta(self, x: Tensor, y: Tensor) -> Tensor:
        """y [..., out] plus the update of x [..., in]."""
        if self.p:
            x = F.dropout(x, self.p, self.site.module.training)
        low = F.linear(x, (self.a * self.e).to(x.dtype))  # [..., R]
        # Autocast does not cast the arguments of in-place operations, so they are cast here.
        return add_product(y, low.to(y.dtype), self.b.to(y.dtype), self.scale)  # [..., out]

    def get_active_mask(self) -> Tensor:
        """[R] triplets that are part of the update; between prunings a pruned one can become nonzero again."""
        return self.kept | (self.e.detach()[:, 0] != 0)

    def get_factors(self) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r] of a plain LoRA with the same update; r: the active triplets."""
        active = self.get_active_mask()  # [R]
        return (self.a * self.e)[active], self.b[:, active]  # [r, in], [out, r]

    def base_weight(self) -> Tensor:
        """The frozen W, [out, in]."""
        return self.site.base_weight()

    def compute_merged_weight(self) -> Tensor:
        """The merged weight, in the layout of the module's own."""
        # self.e [R, 1] scales the rows of A.
        weight = self.base_weight().to(self.a.dtype) + self.scale * (self.b @ (self.a * self.e))  # [out, in]
        return (weight.T if self.site.transposed else weight).to(self.site.weight.dtype)

    def add_penalty_gradient(self, weight: float) -> None:
        """Add the gradient of ``weight (|A A^T - 1| + |B^T B - 1|)``."""
        for part in (self.parts[0], self.parts[2]):
            rows = part.parameter if part.dim == 0 else part.parameter.T  # [R, in] or [R, out]
            deviation = rows @ rows.T - torch.eye(self.rank, dtype=rows.dtype, device=rows.device)  # [R, R]
            # [R, in] or [R, out] Clamped: at a deviation of zero the gradient is zero, not 0 / 0.
            gradient = 2 * weight / deviation.norm().clamp_min(torch.finfo(rows.dtype).tiny) * (deviation @ rows)
            part.get_gradient().add_(gradient if part.dim == 0 else gradient.T)

    def state(self) -> dict[str, Tensor]:
        """The active triplets, as in PEFT's file; for resuming also the pruned ones and the moving averages."""
        active = self.get_active_mask()
        state = {f"{TRAINING}{self.path}.kept": active}
        for part in self.parts:
            parameter, name = part.parameter.detach(), f"{self.path}.{part.name}"
            state[name], state[f"{TRAINING}{name}.cut"] = (
                parameter.index_select(part.dim, mask.nonzero()[:, 0]) for mask in (active, ~active))
            state |= {f"{TRAINING}{name}.mean": part.mean, f"{TRAINING}{name}.spread": part.uncertainty}
        return state

    def get_expected_shapes(self, state: Mapping[str, Tensor], is_resume: bool) -> dict[str, Tensor]:
        """Names and shapes of a state that can be loaded; its number of active triplets is read from `state`."""
        kept, e = state.get(f"{TRAINING}{self.path}.kept"), state.get(f"{self.path}.lora_E")
        rank = self.rank
        if kept is not None and kept.shape == self.kept.shape:
            rank = int(kept.sum())
        elif kept is None and e is not None and e.ndim == 2:
            rank = min(rank, e.shape[0])
        expected = {f"{TRAINING}{self.path}.kept": self.kept} if is_resume else {}
        for part in self.parts:
            name = f"{self.path}.{part.name}"
            expected[name] = _build_empty(part, rank)
            if is_resume:
                expected |= {f"{TRAINING}{name}.cut": _build_empty(part, self.rank - rank),
                             f"{TRAINING}{name}.mean": part.mean, f"{TRAINING}{name}.spread": part.uncertainty}
        return expected

    def load(self, state: Mapping[str, Tensor], is_resume: bool) -> None:
        """Load `state`. A saved adapter lacks the pruned triplets: its own come first, e of the others is zero."""
        rank, device = state[f"{self.path}.lora_E"].shape[0], self.kept.device
        self.kept = (state[f"{TRAINING}{self.path}.kept"].to(device, copy=True) if is_resume
                     else torch.arange(self.rank, device=device) < rank)
        if not is_resume:
            self.e.zero_()  # triplets that the file lacks contribute nothing
        for part in self.parts:
            name = f"{self.path}.{part.name}"
            for mask, saved in ((self.kept, name), (~self.kept, f"{TRAINING}{name}.cut")):
                if saved in state:
                    part.parameter.index_copy_(part.dim, mask.nonzero()[:, 0], state[saved].to(part.parameter))
            for average, saved in ((part.mean, f"{TRAINING}{name}.mean"),
                                   (part.uncertainty, f"{TRAINING}{name}.spread")):
                average.copy_(state[saved]) if is_resume else average.zero_()


def _build_empty(part: FactorState, rank: int) -> Tensor:
    """A meta tensor with the part's shape at another rank."""
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

    # ------------------------------------------------------------ the search for ranks

    @torch.no_grad()
    def pre_step(self) -> None:
        """Add the gradient of the orthogonality penalty."""
        if self.config.orth_reg_weight:
            for layer in self.layers:
                layer.add_penalty_gradient(self.config.orth_reg_weight / (2 * len(self.layers)))

    @torch.no_grad()
    def post_step(self, step: int, total: int, sound: Tensor) -> None:
        """Update sensitivities and prune if due; after the search keep e of the pruned triplets at zero."""
        _, last, _ = self.config.compute_schedule(total)
        if step <= last:
            for part in (part for layer in self.layers for part in layer.parts):
                part.update_sensitivity(self.config, sound)
        budget = self.config.compute_budget(step, total, len(self.layers))
        if budget is not None:
            self._prune(budget, sound)
        if budget is not None or step > last:
            for layer in self.layers:
                # [R, 1] The optimizer's step has moved pruned entries away from zero.
                layer.e.masked_fill_((~layer.kept & sound)[:, None], 0)

    def _prune(self, budget: int, sound: Tensor) -> None:
        """Keep the `budget` triplets with the highest scores. Ties are broken by position, so all ranks agree."""
        scores = torch.stack([torch.stack([part.compute_score() for part in layer.parts]).sum(0)
                              for layer in self.layers])  # [layers, R]
        order = scores.flatten().argsort(stable=True)  # [layers * R] lowest score first
        kept = torch.ones_like(order, dtype=torch.bool)  # [layers * R]
        kept[order[:len(order) - budget]] = False
        for layer, kept_of_layer in zip(self.layers, kept.view(scores.shape), strict=True):
            layer.kept = torch.where(sound, kept_of_layer, layer.kept)  # [R]

    # ------------------------------------------------------------ merging, saving

    def iter_merged(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        refuse_quantized(layer.site for layer in self.layers)
        for layer in self.layers:
            yield layer.site.module, "weight", layer.compute_merged_weight()

    def state(self) -> dict[str, Tensor]:
        """See `AdaLoraLayer.state`."""
        return {name: tensor for layer in self.layers for name, tensor in layer.state().items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        is_resume = any(name.startswith(TRAINING) for name in state)
        check_state_shapes({name: t for layer in self.layers
                            for name, t in layer.get_expected_shapes(state, is_resume).items()},
                           state)
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
