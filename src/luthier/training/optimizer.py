"""AdamW with a learning rate schedule and float32 master weights. Independent of the other files of this package.

The schedule's factor at step k of n, after a linear warm-up of w steps, with u = (k - w) / (n - w):

    constant 1        linear 1 - u (1 - f)        cosine f + (1 - f) (1 + cos pi u) / 2
    wsd      1 until the last fifth, then linear to f         (f: `min_lr_ratio`)

A parameter in sixteen bits cannot hold the small updates of training: bfloat16 has 8 bits of precision, so an update
below 1/256 of the weight is lost, and moments in sixteen bits do not decay (bfloat16) or underflow (float16). So the
optimizer keeps a float32 master copy of every such parameter, with float32 gradients and moments, and writes the
rounded copy back into the model after each update (Micikevicius et al. 2018, arXiv:1710.03740, section 3.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from luthier.core.config import Config
from luthier.core.errors import RunError
from luthier.core.optimizer_hook import OptimizerHook

Schedule = Literal["linear", "cosine", "constant", "wsd"]
MASTER = "master"  # suffix of a parameter's float32 copy in a checkpoint


class OptimizerConfig(Config):
    """AdamW and its schedule."""

    learning_rate: float | None = Field(None, gt=0, description="peak learning rate; default: the method's default "
                                                                "times the objective's factor")
    lr_scheduler_type: Schedule = Field("linear", description="shape of the learning rate after the warm-up")
    warmup_ratio: float | None = Field(0.03, ge=0, le=1, description="warm-up as a fraction of all steps; null if "
                                                                     "warmup_steps is set")
    warmup_steps: int | None = Field(None, ge=0, description="warm-up as a number of steps, instead of warmup_ratio")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="final learning rate as a fraction of the peak")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay of matrices; vectors are not decayed")
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float | None = Field(1.0, gt=0, description="maximum norm of the gradient of all trained "
                                                               "parameters; null: no clipping")

    @model_validator(mode="before")
    @classmethod
    def _drop_default_ratio(cls, given: Any) -> Any:
        """If only `warmup_steps` is set, the default of `warmup_ratio` does not apply."""
        if isinstance(given, dict) and given.get("warmup_steps") is not None:
            return {"warmup_ratio": None, **given}
        return given

    @model_validator(mode="after")
    def _check_warmup(self) -> Self:
        if self.warmup_ratio is not None and self.warmup_steps is not None:
            raise ValueError("warmup_ratio and warmup_steps are both set; set one of them to null")
        if self.warmup_ratio is None and self.warmup_steps is None:
            raise ValueError("warmup_ratio and warmup_steps are both null; set one of them (0: no warm-up)")
        return self

    def count_warmup_steps(self, total: int) -> int:
        """The number of warm-up steps in a run of `total` steps."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        assert self.warmup_ratio is not None
        return round(self.warmup_ratio * total)


def compute_lr_factor(config: OptimizerConfig, step: int, total: int) -> float:
    """The learning rate as a fraction of the peak, for the step with this index (from 0) of `total`."""
    warm = config.count_warmup_steps(total)
    if step < warm:
        return (step + 1) / (warm + 1)  # above 0: a first step with rate 0 would be wasted
    done = min(1.0, (step - warm) / max(1, total - warm))  # u
    fall = 1.0 - config.min_lr_ratio  # 1 - f
    match config.lr_scheduler_type:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - fall * done
        case "cosine":
            return config.min_lr_ratio + fall * (1 + math.cos(math.pi * done)) / 2
        case "wsd":
            return 1.0 - fall * max(0.0, done - 0.8) / 0.2


def needs_master(parameter: Tensor) -> bool:
    """Whether the optimizer keeps a float32 copy of this parameter."""
    return parameter.dtype in (torch.bfloat16, torch.float16)


def _accumulate(master: nn.Parameter, parameter: Tensor) -> None:
    """Add the gradient of one micro-batch to that of the master copy, so that gradients are summed in float32."""
    assert parameter.grad is not None
    if master.grad is None:
        master.grad = parameter.grad.to(master.dtype)  # float32
    else:
        master.grad.add_(parameter.grad)
    parameter.grad = None  # frees the 16-bit gradient as soon as it is added


class Optimizer:
    """AdamW over named parameters, each with its own factor on the learning rate.

    `parameters` are the tensors that it updates: the model's own if they have at least float32, otherwise float32
    master copies.

    Args:
        parameters: the trained parameters by name.
        rate: returns the factor on the learning rate for a name.
        peak: peak learning rate.
        optimizer_hooks: called before and after each update.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], rate: Callable[[str], float], peak: float,
                 config: OptimizerConfig, total_steps: int, optimizer_hooks: Sequence[OptimizerHook] = ()) -> None:
        assert parameters, "no trainable parameters"
        self.config, self.total, self.peak, self.names = config, total_steps, peak, list(parameters)
        self._optimizer_hooks, self._step = optimizer_hooks, 0
        self.parameters = {name: nn.Parameter(parameter.detach().to(torch.float32)) if needs_master(parameter)
                           else parameter for name, parameter in parameters.items()}
        self._copied = {name: parameter for name, parameter in parameters.items() if needs_master(parameter)}
        # A hook runs as soon as a gradient is complete, so few 16-bit gradients exist at once.
        self._handles = [parameter.register_post_accumulate_grad_hook(partial(_accumulate, self.parameters[name]))
                         for name, parameter in self._copied.items()]
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.parameters.items():
            decay = config.weight_decay if parameter.ndim > 1 else 0.0  # vectors are norm weights and biases
            groups.setdefault((rate(name), decay), []).append(parameter)
        self.device = next(iter(parameters.values())).device
        self.adam = torch.optim.AdamW(
            [{"params": list(ps), "weight_decay": decay, "factor": times} for (times, decay), ps in groups.items()],
            lr=peak, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon,
            fused=self.device.type in ("cuda", "cpu"))

    def set_learning_rate(self, step: int) -> float:
        """Set the learning rate for the step with this index; returns that of a parameter with factor 1."""
        self._step = step
        rate = self.peak * compute_lr_factor(self.config, step, self.total)
        for group in self.adam.param_groups:
            group["lr"] = rate * group["factor"]
        return rate

    def run_pre_step_hook(self) -> None:
        """Call the hooks after the gradient of the whole step is computed; a method may add its own gradient."""
        for hook in self._optimizer_hooks:
            hook.pre_step()

    def clip_grad_norm(self) -> Tensor:
        """Clip the gradient to `config.max_grad_norm`; returns its norm before clipping, a scalar on the device."""
        limit = math.inf if self.config.max_grad_norm is None else self.config.max_grad_norm
        return nn.utils.clip_grad_norm_(self.parameters.values(), limit)  # [] on the device

    def step(self, norm: Tensor) -> None:
        """Update, unless `norm` is not finite. On a GPU the kernel checks `norm`, so the host does not wait."""
        if self.device.type == "cuda":
            # [] The fused kernel leaves everything unchanged where it is 1.
            self.adam.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
            # The gradients are not scaled, so the kernel must not divide them.
            self.adam.grad_scale = None  # type: ignore[attr-defined]
            self.adam.step()
        elif bool(norm.isfinite()):
            self.adam.step()
        self._write_back()  # before the hooks: they read the updated model
        for hook in self._optimizer_hooks:
            hook.post_step(self._step + 1, self.total, norm.isfinite())
        self.adam.zero_grad(set_to_none=True)  # None, not zeros: the memory is free during the next forward pass

    @torch.no_grad()
    def _write_back(self) -> None:
        """Write the rounded master copies into the model."""
        for name, parameter in self._copied.items():
            parameter.copy_(self.parameters[name])

    def close(self) -> None:
        """Detach from the model: remove the gradient hooks, so that the memory of the master copies can be freed."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def state(self) -> dict[str, Tensor]:
        """Every moment as ``<parameter>.<moment>``, and every master copy as ``<parameter>.master``."""
        found = {f"{name}.{MASTER}": self.parameters[name].detach() for name in self._copied}
        for name, parameter in self.parameters.items():
            for key, value in self.adam.state.get(parameter, {}).items():
                found[f"{name}.{key}"] = value
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        moments: dict[str, dict[str, Any]] = {}
        for key, value in state.items():
            name, moment = key.rsplit(".", 1)
            moments.setdefault(name, {})[moment] = value
        if unknown := moments.keys() - self.parameters.keys():
            raise RunError(f"the optimizer state in the checkpoint has a parameter that is not trained here: "
                           f"{min(unknown)!r}",
                           "resume with the recipe that the run was started with")
        if missing := [name for name in self._copied if MASTER not in moments.get(name, {})]:
            raise RunError(f"the checkpoint has no float32 copy of {missing[0]!r}, which is kept in "
                           f"{str(self._copied[missing[0]].dtype).removeprefix('torch.')}: an earlier version wrote it",
                           "train again from the beginning, with another output_dir")
        for name, found in moments.items():
            parameter = self.parameters[name]
            if MASTER in found:
                with torch.no_grad():
                    parameter.copy_(found.pop(MASTER))
            # Memory layout and device of the parameter: the fused kernel reads both in memory order, and the step
            # count must be on
            # the same device.
            self.adam.state[parameter] = {
                k: v.to(parameter.device, copy=True) if k == "step" else
                torch.empty_like(parameter, dtype=v.dtype).copy_(v) for k, v in found.items()}
