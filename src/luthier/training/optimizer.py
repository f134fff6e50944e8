"""AdamW and its learning-rate schedule. Read `core/config.py` first.

The schedule's factor at step k of n, after a linear warm-up of w steps, with u = (k - w) / (n - w):

    constant 1        linear 1 - u (1 - f)        cosine f + (1 - f) (1 + cos pi u) / 2
    wsd      1 until the last fifth, then linear to f         (f: `floor`)

A 16-bit parameter cannot represent the small updates of training. bfloat16 has 8 bits of precision, so an update below
1/256 of the weight is lost; 16-bit moments do not decay (bfloat16) or underflow (float16). So the optimizer keeps a
float32 master copy of every such parameter, with float32 gradients and moments. After each update it writes the rounded
copy back into the model (Micikevicius et al. 2018, arXiv:1710.03740, section 3.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from luthier.core.config import Config
from luthier.core.errors import RunError
from luthier.core.optimizer_hook import OptimizerHook

Schedule = Literal["linear", "cosine", "constant", "wsd"]
MASTER = "master"  # of a parameter's entries in a checkpoint, the one that holds its float32 copy


class OptimizerConfig(Config):
    """AdamW and its schedule."""

    learning_rate: float | None = Field(None, gt=0, description="peak rate; left out: the method's default "
                                        "times the objective's factor")
    schedule: Schedule = Field("linear", description="how the rate falls after the warm-up")
    warmup: float = Field(0.03, ge=0, description="below 1: share of all steps; from 1 up: number of steps")
    floor: float = Field(0.0, ge=0, le=1, description="share of the peak rate at the end")
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay of matrices; vectors are never decayed")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    epsilon: float = Field(1e-8, gt=0)
    clip: float | None = Field(1.0, gt=0, description="longest gradient over all that trains; null: no clipping")


def compute_lr_factor(config: OptimizerConfig, step: int, total: int) -> float:
    """Share of the peak rate for the step with this index (from 0) of `total`."""
    warm = round(config.warmup * total) if config.warmup < 1 else int(config.warmup)
    if step < warm:
        return (step + 1) / (warm + 1)
    done = min(1.0, (step - warm) / max(1, total - warm))
    fall = 1.0 - config.floor
    match config.schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - fall * done
        case "cosine":
            return config.floor + fall * (1 + math.cos(math.pi * done)) / 2
        case "wsd":
            return 1.0 - fall * max(0.0, done - 0.8) / 0.2


def needs_master(parameter: Tensor) -> bool:
    """Whether the optimizer keeps a float32 copy of this parameter."""
    return parameter.dtype in (torch.bfloat16, torch.float16)


def _accumulate(master: nn.Parameter, parameter: Tensor) -> None:
    """Move the gradient of one micro-batch to the master copy, so that gradients are summed in float32."""
    assert parameter.grad is not None
    if master.grad is None:
        master.grad = parameter.grad.to(master.dtype)
    else:
        master.grad.add_(parameter.grad)
    parameter.grad = None


class Optimizer:
    """AdamW over named parameters, in groups with their own learning-rate multiplier.

    The attribute `parameters` holds what is updated: the model's parameters, or the float32 master copies of those in
    16 bits.

    Args:
        parameters: what trains, by name.
        rate: the learning-rate multiplier of a parameter, by its name.
        peak: peak learning rate.
        update: hook of the method around each step.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], rate: Callable[[str], float], peak: float,
                 config: OptimizerConfig, total_steps: int, update: OptimizerHook | None = None) -> None:
        assert parameters, "a method that trains nothing"
        self.config, self.total, self.peak, self.names = config, total_steps, peak, list(parameters)
        self._update, self._step = update, 0
        self.parameters = {name: nn.Parameter(parameter.detach().to(torch.float32)) if needs_master(parameter)
                           else parameter for name, parameter in parameters.items()}
        self._copied = {name: parameter for name, parameter in parameters.items() if needs_master(parameter)}
        self._handles = [parameter.register_post_accumulate_grad_hook(partial(_accumulate, self.parameters[name]))
                         for name, parameter in self._copied.items()]
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.parameters.items():
            decay = config.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((rate(name), decay), []).append(parameter)
        self.device = next(iter(parameters.values())).device
        self.adam = torch.optim.AdamW(
            [{"params": list(ps), "weight_decay": decay, "factor": times} for (times, decay), ps in groups.items()],
            lr=peak, betas=(config.beta1, config.beta2), eps=config.epsilon, fused=self.device.type in ("cuda", "cpu"))

    def set_learning_rate(self, step: int) -> float:
        """Set the learning rate for the step with this index. Returns it, without multipliers."""
        self._step = step
        rate = self.peak * compute_lr_factor(self.config, step, self.total)
        for group in self.adam.param_groups:
            group["lr"] = rate * group["factor"]
        return rate

    def run_pre_step_hook(self) -> None:
        """Run the method's hook once the gradient is complete: a method may add the gradient of its own penalty."""
        if self._update:
            self._update.before()

    def clip_grad_norm(self) -> Tensor:
        """Clip the gradient to the norm `config.clip`. Returns its norm before, a scalar on the device."""
        limit = math.inf if self.config.clip is None else self.config.clip
        return nn.utils.clip_grad_norm_(self.parameters.values(), limit)

    def step(self, norm: Tensor) -> None:
        """Update, unless `norm` is not finite. On a GPU the fused kernel checks it, without synchronization."""
        if self.device.type == "cuda":
            self.adam.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
            self.adam.grad_scale = None  # type: ignore[attr-defined]
            self.adam.step()
        elif bool(norm.isfinite()):
            self.adam.step()
        self._write_back()
        if self._update:
            self._update.after(self._step + 1, self.total, norm.isfinite())
        self.adam.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _write_back(self) -> None:
        """Copy the master copies, rounded, into the model."""
        for name, parameter in self._copied.items():
            parameter.copy_(self.parameters[name])

    def close(self) -> None:
        """Remove the gradient hooks from the model, so that the master copies can be freed."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def state(self) -> dict[str, Tensor]:
        """The moments, as ``<parameter>.<moment>``, and the master copies, as ``<parameter>.master``."""
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
            raise RunError(f"the checkpoint has optimizer state of a parameter that does not train: {min(unknown)!r}",
                           "resume with the recipe that the run was started with")
        if missing := [name for name in self._copied if MASTER not in moments.get(name, {})]:
            raise RunError(f"the checkpoint has no float32 copy of {missing[0]!r}, which is kept in "
                           f"{str(self._copied[missing[0]].dtype).removeprefix('torch.')}: an earlier version wrote it",
                           "start a new run")
        for name, found in moments.items():
            parameter = self.parameters[name]
            if MASTER in found:
                with torch.no_grad():
                    parameter.copy_(found.pop(MASTER))
            # The fused kernel needs moments in the memory layout of the parameter, and the step count on its device.
            # `Adam.load_state_dict` would do both, but is not used here.
            self.adam.state[parameter] = {
                k: v.to(parameter.device, copy=True) if k == "step" else
                torch.empty_like(parameter, dtype=v.dtype).copy_(v) for k, v in found.items()}
