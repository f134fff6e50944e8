"""Learning rates, weight decay and clipping by value: against the schedulers of PyTorch and Transformers, against
torch's own AdamW, and against numbers computed by hand. Each test has a control that fails where the rule is broken."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR
from transformers import get_scheduler
from transformers.optimization import get_wsd_schedule

from luthier.training.optimizer import Optimizer, OptimizerConfig, compute_lr_factor

TOTAL = 20


def factors(total: int = TOTAL, **settings: Any) -> list[float]:
    return [compute_lr_factor(OptimizerConfig(**settings), step, total) for step in range(total)]


def rates(scheduler: Callable[[torch.optim.Optimizer], Any], total: int = TOTAL) -> list[float]:
    """The learning rate of each step under a scheduler of PyTorch, for a peak of 1."""
    adam = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = scheduler(adam)
    found = []
    for _ in range(total):
        found.append(float(adam.param_groups[0]["lr"]))
        adam.step()
        schedule.step()
    return found


# ---------------------------------------------------------------- the schedule


@pytest.mark.parametrize(("ours", "name", "extra"), [
    ({"lr_scheduler_type": "linear"}, "linear", {}),
    ({"lr_scheduler_type": "cosine"}, "cosine", {}),
    ({"lr_scheduler_type": "constant"}, "constant_with_warmup", {}),
    ({"lr_scheduler_type": "cosine", "min_lr_ratio": 0.1}, "cosine_with_min_lr", {"min_lr_rate": 0.1}),
], ids=str)
@pytest.mark.parametrize("warm", [0, 5])
def test_after_the_warm_up_the_rates_are_those_of_transformers(ours: dict[str, Any], name: str, extra: dict[str, Any], warm: int) -> None:
    wanted = rates(lambda adam: get_scheduler(name, adam, warm, TOTAL, scheduler_specific_kwargs=extra or None))
    found = factors(warmup_steps=warm, **ours)
    assert found[warm:] == pytest.approx(wanted[warm:], abs=1e-12)
    assert len({round(rate, 6) for rate in found[warm:]}) == (1 if ours["lr_scheduler_type"] == "constant" else TOTAL - warm)


@pytest.mark.parametrize("floor", [0.0, 0.25])
def test_wsd_is_that_of_transformers_with_a_linear_decay_over_the_last_fifth(floor: float) -> None:
    wanted = rates(lambda adam: get_wsd_schedule(adam, num_warmup_steps=0, num_decay_steps=TOTAL // 5, num_training_steps=TOTAL,
                                                 decay_type="linear", min_lr_ratio=floor))
    found = factors(lr_scheduler_type="wsd", warmup_ratio=0.0, min_lr_ratio=floor)
    assert found == pytest.approx(wanted, abs=1e-12)
    assert found[15:17] == [1.0, 1.0]  # full at step 16, where the decay begins, and lower from step 17 on
    assert found[17] < 1


@pytest.mark.parametrize("warm", [1, 4])
def test_the_warm_up_is_torchs_linear_one(warm: int) -> None:
    """From 1 / (w + 1) in equal parts to 1 at step w, so that no step is lost at a rate of 0."""
    wanted = rates(lambda adam: LinearLR(adam, start_factor=1 / (warm + 1), end_factor=1.0, total_iters=warm))
    assert factors(lr_scheduler_type="constant", warmup_steps=warm) == pytest.approx(wanted, abs=1e-12)


BY_HAND: list[tuple[dict[str, Any], dict[int, float]]] = [
    ({"lr_scheduler_type": "linear", "warmup_steps": 4}, {0: 0.2, 3: 0.8, 4: 1.0, 5: 15 / 16, 12: 0.5, 19: 1 / 16}),
    ({"lr_scheduler_type": "linear", "warmup_ratio": 0.2}, {0: 0.2, 3: 0.8, 4: 1.0, 12: 0.5}),  # a share of all steps
    ({"lr_scheduler_type": "linear", "warmup_ratio": 0.0, "min_lr_ratio": 0.2}, {0: 1.0, 10: 0.6, 19: 0.24}),
    ({"lr_scheduler_type": "cosine", "warmup_steps": 4}, {4: 1.0, 8: (1 + math.sqrt(0.5)) / 2, 12: 0.5, 16: (1 - math.sqrt(0.5)) / 2}),
    ({"lr_scheduler_type": "cosine", "warmup_ratio": 0.0, "min_lr_ratio": 0.5}, {0: 1.0, 10: 0.75, 19: 0.75 + math.cos(math.pi * 0.95) / 4}),
    ({"lr_scheduler_type": "constant", "warmup_steps": 4, "min_lr_ratio": 0.5}, {0: 0.2, 3: 0.8, 4: 1.0, 19: 1.0}),
    ({"lr_scheduler_type": "wsd", "warmup_ratio": 0.0}, {0: 1.0, 16: 1.0, 18: 0.5, 19: 0.25}),
    ({"lr_scheduler_type": "wsd", "warmup_steps": 10, "min_lr_ratio": 0.5}, {9: 10 / 11, 10: 1.0, 18: 1.0, 19: 0.75}),
]


@pytest.mark.parametrize(("settings", "wanted"), BY_HAND, ids=str)
def test_rates_by_hand(settings: dict[str, Any], wanted: dict[int, float]) -> None:
    found = factors(**settings)
    assert {step: found[step] for step in wanted} == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_beyond_the_last_step_the_rate_stays_at_its_floor(schedule: Any) -> None:
    assert compute_lr_factor(OptimizerConfig(lr_scheduler_type=schedule, min_lr_ratio=0.3), TOTAL, TOTAL) == pytest.approx(0.3)
    assert compute_lr_factor(OptimizerConfig(lr_scheduler_type=schedule, min_lr_ratio=0.3), TOTAL + 7, TOTAL) == pytest.approx(0.3)


def test_each_group_has_the_rate_of_its_step_times_its_own_factor() -> None:
    ours = Optimizer({"a": nn.Parameter(torch.ones(2, 2)), "b": nn.Parameter(torch.ones(2, 2))},
                     lambda name: 16.0 if name == "b" else 1.0, 0.5, OptimizerConfig(lr_scheduler_type="linear", warmup_ratio=0.0), 4)
    for step, wanted in enumerate((0.5, 0.375, 0.25, 0.125)):
        assert ours.set_learning_rate(step) == pytest.approx(wanted)
        assert [group["lr"] for group in ours.adam.param_groups] == pytest.approx([wanted, 16 * wanted])


# ---------------------------------------------------------------- the update


def start() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
            for name, shape in (("matrix", (3, 4)), ("vector", (4,)), ("stack", (2, 3, 2)), ("scalar", ()))}


def push(parameters: dict[str, nn.Parameter], seed: int, size: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        parameter.grad = size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def test_only_matrices_decay_and_by_rate_times_weight_decay() -> None:
    parameters = start()
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    ours = Optimizer(parameters, lambda name: 2.0 if name == "stack" else 1.0, 0.1,
                     OptimizerConfig(weight_decay=0.5, lr_scheduler_type="constant", warmup_ratio=0.0, max_grad_norm=None), 10)
    ours.set_learning_rate(0)
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    ours.step(ours.clip_grad_norm())
    kept = {"matrix": 1 - 0.1 * 0.5, "vector": 1.0, "stack": 1 - 2 * 0.1 * 0.5, "scalar": 1.0}
    for name, share in kept.items():
        torch.testing.assert_close(parameters[name].detach(), share * before[name], rtol=1e-12, atol=0)


def test_without_weight_decay_nothing_decays() -> None:
    parameters = start()
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    ours = Optimizer(parameters, lambda name: 1.0, 0.1, OptimizerConfig(), 10)
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    ours.step(ours.clip_grad_norm())
    assert all(torch.equal(parameter, before[name]) for name, parameter in parameters.items())


def adamw(parameters: dict[str, Tensor], steps: int, rates: list[float], adam_beta1: float, adam_beta2: float,
          adam_epsilon: float, decay: float) -> dict[str, Tensor]:
    """Loshchilov and Hutter 2019 (arXiv:1711.05101), algorithm 2, written out."""
    found = {name: value.detach().clone() for name, value in parameters.items()}
    first, second = ({name: torch.zeros_like(value) for name, value in found.items()} for _ in range(2))
    for t in range(1, steps + 1):
        pushed = {name: nn.Parameter(value) for name, value in found.items()}
        push(pushed, t)
        for name, value in found.items():
            gradient = pushed[name].grad
            assert gradient is not None
            first[name] = adam_beta1 * first[name] + (1 - adam_beta1) * gradient
            second[name] = adam_beta2 * second[name] + (1 - adam_beta2) * gradient ** 2
            own = decay if value.ndim > 1 else 0.0
            moved = (first[name] / (1 - adam_beta1 ** t)) / ((second[name] / (1 - adam_beta2 ** t)).sqrt() + adam_epsilon)
            found[name] = value - rates[t - 1] * own * value - rates[t - 1] * moved
    return found


def test_the_update_is_adamws_formula() -> None:
    settings = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-3}
    parameters = start()
    ours = Optimizer(parameters, lambda name: 1.0, 0.1, OptimizerConfig(weight_decay=0.3, warmup_steps=2, max_grad_norm=None, **settings), 5)
    wanted = adamw(start(), 5, [0.1 * compute_lr_factor(ours.config, step, 5) for step in range(5)], decay=0.3, **settings)
    other = adamw(start(), 5, [0.1 * compute_lr_factor(ours.config, step, 5) for step in range(5)], decay=0.0, **settings)
    for t in range(5):
        ours.set_learning_rate(t)
        push(parameters, t + 1)
        ours.step(ours.clip_grad_norm())
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.detach(), wanted[name], rtol=1e-9, atol=1e-12)
    assert (parameters["matrix"] - other["matrix"]).abs().max() > 1e-3  # the control


def length(parameters: dict[str, nn.Parameter]) -> float:
    return math.sqrt(sum(float(p.grad.square().sum()) for p in parameters.values() if p.grad is not None))


@pytest.mark.parametrize("limit", [0.5, 2.0])
def test_a_gradient_that_is_too_long_is_shortened_as_a_whole(limit: float) -> None:
    parameters = start()
    ours = Optimizer(parameters, lambda name: 1.0, 0.1, OptimizerConfig(max_grad_norm=limit), 10)
    push(parameters, 1)
    before = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    long = length(parameters)
    assert long > 2 * limit
    assert float(ours.clip_grad_norm()) == pytest.approx(long)  # what is reported is the length before
    assert length(parameters) == pytest.approx(limit, rel=1e-5)
    for name, parameter in parameters.items():  # one factor for all
        torch.testing.assert_close(parameter.grad, before[name] * (limit / long), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("limit", "size"), [(1.0, 0.01), (None, 100.0)])
def test_a_short_gradient_and_one_without_a_limit_stay_as_they_are(limit: float | None, size: float) -> None:
    parameters = start()
    ours = Optimizer(parameters, lambda name: 1.0, 0.1, OptimizerConfig(max_grad_norm=limit), 10)
    push(parameters, 1, size)
    before = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    assert float(ours.clip_grad_norm()) == pytest.approx(length(parameters))
    assert all(torch.equal(p.grad, before[name]) for name, p in parameters.items() if p.grad is not None)


def test_the_default_clips_to_a_length_of_one() -> None:
    assert OptimizerConfig().max_grad_norm == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_updates_nothing_and_is_gone(bad: float) -> None:
    parameters = start()
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    told: list[bool] = []
    update = SimpleNamespace(pre_step=lambda: None, post_step=lambda step, total, fine: told.append(bool(fine)))
    ours = Optimizer(parameters, lambda name: 1.0, 0.1, OptimizerConfig(weight_decay=0.5), 10, (update,))
    push(parameters, 1)
    assert parameters["vector"].grad is not None
    parameters["vector"].grad[2] = bad
    ours.step(ours.clip_grad_norm())
    assert all(torch.equal(parameter, before[name]) for name, parameter in parameters.items())
    assert all(parameter.grad is None for parameter in parameters.values())
    assert not ours.state()
    push(parameters, 2)
    ours.step(ours.clip_grad_norm())
    assert all(not torch.equal(parameter, before[name]) for name, parameter in parameters.items())
    assert told == [False, True]


def test_a_methods_update_is_told_the_number_of_the_step_that_was_made() -> None:
    told: list[tuple[int, int]] = []
    update = SimpleNamespace(pre_step=lambda: None, post_step=lambda step, total, fine: told.append((step, total)))
    parameters = start()
    ours = Optimizer(parameters, lambda name: 1.0, 0.1, OptimizerConfig(), 3, (update,))
    for step in range(3):
        ours.set_learning_rate(step)
        push(parameters, step)
        ours.run_pre_step_hook()
        ours.step(ours.clip_grad_norm())
    assert told == [(1, 3), (2, 3), (3, 3)]
