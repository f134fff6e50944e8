"""`step_seconds` on a device that computes while the host goes on: simulated here by a clock, in place of a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from luthier.training import loop
from luthier.training.optimizer import OptimizerConfig
from luthier.training.step import StepResult

STEP, TOKENS, STEPS = 0.03, 300, 12  # seconds on the device, tokens of a step


class Device:
    """Takes work from a queue, one after another; `launch` returns at once what waits for the work to be done."""

    def __init__(self) -> None:
        self.free = 0.0

    def launch(self, seconds: float) -> Callable[[], None]:
        self.free = end = max(self.free, time.perf_counter()) + seconds
        return lambda: time.sleep(max(0.0, end - time.perf_counter()))


def times(monkeypatch: pytest.MonkeyPatch, folder: Path, kind: str, save_steps: int | None = None, host: float = 0.0) -> tuple[list[dict[str, float]], float]:
    """The lines of a run whose every step takes `STEP` on the device, and `host` seconds before it is queued; the wall
    time of the whole run."""
    device, lines = Device(), []

    def step(*_: Any) -> StepResult:
        time.sleep(host)
        wait = device.launch(STEP)
        if kind == "cpu":
            wait()
        return StepResult(1.0, (), lambda: [wait() or 1.0, 1.0], torch.device(kind), TOKENS, 1, 1, ())

    class Endless:
        steps_per_epoch = STEPS

        def __next__(self) -> list[Any]:
            return [SimpleNamespace(inputs=SimpleNamespace(tokens=torch.zeros(TOKENS)))]

        def state(self) -> dict[str, Any]:
            return {}

    def log(_: int, metrics: Mapping[str, float]) -> None:
        lines.append(dict(metrics))

    monkeypatch.setattr(loop, "step", step)
    monkeypatch.setattr(loop, "measure_peak_gb", lambda _: 0.0)
    monkeypatch.setattr(loop, "trim_heap", lambda _: None)
    weight = nn.Parameter(torch.zeros(2))
    attached: Any = SimpleNamespace(parameters=lambda: {"w": weight}, lr_multiplier=lambda _: 1.0, optimizer_hooks=(), state=lambda: {"w": weight.detach()})
    family: Any = SimpleNamespace(device=torch.device(kind), train=lambda _: None)
    objective: Any = None
    job = loop.TrainJob(family, attached, objective, Endless(), [], loop.TrainingConfig(max_steps=STEPS, save_steps=save_steps),  # type: ignore[arg-type]
                        OptimizerConfig(), 0.1, folder, log)
    began = time.perf_counter()
    loop.run_training_loop(job)
    return lines, time.perf_counter() - began


@pytest.mark.parametrize("save_steps", [None, 3])
@pytest.mark.parametrize("host", [0.0, 0.01])
@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_the_times_of_the_steps_add_up_to_the_time_of_the_run(
        monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, save_steps: int | None, host: float) -> None:
    lines, wall = times(monkeypatch, tmp_path, kind, save_steps, host)
    seconds = [line["step_seconds"] for line in lines]
    assert len(seconds) == STEPS
    assert sum(seconds) + 0.01 >= STEPS * STEP
    assert sum(seconds) <= wall + 0.001
    each = STEP + host if kind == "cpu" else STEP
    assert sorted(seconds)[STEPS // 2] == pytest.approx(each, rel=0.3)  # the control of twice the time would be 2.0
    assert sorted(line["tokens_per_second"] for line in lines)[STEPS // 2] == pytest.approx(TOKENS / each, rel=0.3)


def test_the_simulation_does_overlap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The control: counted from each step's own beginning, the times add up to about twice the run's."""
    monkeypatch.setattr(loop._StepClock, "pick_later", lambda self, other: self)
    lines, wall = times(monkeypatch, tmp_path, "cuda")
    assert sum(line["step_seconds"] for line in lines) > 1.5 * wall
