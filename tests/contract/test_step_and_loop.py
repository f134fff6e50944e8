"""What one step and the loop around it do, by value: one division, dropout off where a model is measured, the rate of
every step, the best evaluation, time. Tiny models; each test has a control that fails where the rule is broken."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import SFT, apart, attach, base, documents, measured, stir, trees

from luthier.core.protocols import Tuner
from luthier.core.types import Batch
from luthier.data.batch_source import InMemoryBatchSource
from luthier.data.packing import build_batch, pack_examples
from luthier.models import CausalLM
from luthier.training import checkpoint
from luthier.training.loop import OnlineTrainJob, TrainingConfig, TrainJob, run_training_loop
from luthier.training.optimizer import Optimizer, OptimizerConfig, compute_lr_factor
from luthier.training.step import compute_reference_logps, evaluate_batches, forward_objective, step

PLAIN = {"max_grad_norm": None, "warmup_ratio": 0.0, "lr_scheduler_type": "constant"}
STILL = 1e-30  # a learning rate at which nothing moves


def optimizer(attached: Tuner, rate: float = 0.1, **settings: Any) -> Optimizer:
    return Optimizer(attached.parameters(), attached.lr_multiplier, rate, OptimizerConfig(**{**PLAIN, **settings}), 10)


def rows() -> list[Batch]:
    """Several micro-batches, whose weights and lengths are far from equal."""
    found = pack_examples([*documents(), *trees()], 24)
    counts = [SFT.count(each.target) for each in found]
    assert len(found) > 3
    assert max(counts) > 2 * min(counts)
    return found


# ---------------------------------------------------------------- one step


def test_a_step_has_the_gradient_of_the_whole_batch_divided_once() -> None:
    family = base("llama")
    attached = attach(family, "lora")
    wanted = measured(family, attached, [build_batch([*documents(), *trees()])])
    wanted = {name: tensor.clone() for name, tensor in wanted.items()}
    for parameter in attached.parameters().values():
        parameter.grad = None
    adam = optimizer(attached)
    found: dict[str, torch.Tensor] = {}
    adam.run_pre_step_hook = lambda: found.update({n: p.grad.clone() for n, p in attached.parameters().items()})  # type: ignore[method-assign, union-attr]
    stepped = step(family, SFT, rows(), adam)
    numbers = stepped.read_metrics()
    loss = wanted.pop("loss")
    assert apart(found, wanted) < 1e-6
    assert numbers["loss"] == pytest.approx(float(loss), rel=1e-6)
    assert numbers["nll"] == pytest.approx(float(loss), rel=1e-6)
    assert numbers["grad_norm"] == pytest.approx(float(torch.stack([g.square().sum() for g in wanted.values()]).sum().sqrt()), rel=1e-5)
    assert stepped.tokens == sum(e.num_tokens for e in [*documents(), *trees()])
    assert stepped.examples == len([*documents(), *trees()])
    assert all(parameter.grad is None for parameter in attached.parameters().values())  # nothing is left for the next step


def test_two_steps_do_not_add_up_their_gradients() -> None:
    lengths = []
    for steps in (1, 2):
        family = base("llama")
        attached = attach(family, "lora")
        adam = optimizer(attached, STILL)
        for _ in range(steps):
            stepped = step(family, SFT, rows(), adam)
        lengths.append(stepped.read_metrics()["grad_norm"])
    assert lengths[1] == pytest.approx(lengths[0], rel=1e-9)


def test_a_step_updates_with_the_clipped_gradient() -> None:
    """Adam forgets a gradient's length but for epsilon: with a large one the update is proportional to it."""
    moved = []
    for limit in (None, 0.01):
        family = base("llama")
        attached = attach(family, "lora")
        before = {name: p.detach().clone() for name, p in attached.parameters().items()}
        step(family, SFT, rows(), optimizer(attached, 1.0, max_grad_norm=limit, adam_epsilon=1e4))
        moved.append(sum(float((p - before[n]).square().sum()) for n, p in attached.parameters().items()) ** 0.5)
    family = base("llama")
    norm = step(family, SFT, rows(), optimizer(attach(family, "lora"), STILL)).read_metrics()["grad_norm"]
    assert norm > 0.1
    assert moved[1] / moved[0] == pytest.approx(0.01 / norm, rel=1e-3)


def test_measured_numbers_are_sums_divided_once() -> None:
    family = base("llama")
    attach(family, "lora")
    whole, parts = evaluate_batches(family, SFT, [build_batch([*documents(), *trees()])]), rows()
    found = evaluate_batches(family, SFT, parts)
    assert found == pytest.approx(whole, rel=1e-6)
    with torch.no_grad():
        losses = [SFT(forward_objective(family, SFT, part), part.target) for part in parts]
    wanted = sum(float(loss.total) for loss in losses) / sum(float(loss.count) for loss in losses)
    assert found["loss"] == pytest.approx(wanted, rel=1e-6)
    means = sum(float(loss.total / loss.count) for loss in losses) / len(losses)
    assert abs(means / wanted - 1) > 1e-3  # the control: a mean of means is another number


def shaky(kind: str = "gpt2") -> CausalLM:
    return base(kind, resid_pdrop=0.5, embd_pdrop=0.5) if kind == "gpt2" else base(kind, attention_dropout=0.5)


@pytest.mark.parametrize("training", [True, False])
def test_the_reference_is_asked_without_dropout_and_the_mode_comes_back(training: bool) -> None:
    family, row = shaky(), build_batch(documents())
    family.train(False)
    wanted = family.forward(row.inputs, row.target, frozenset({"token_logps"})).token_logps
    family.train(training)
    found = compute_reference_logps(family, row, nullcontext)
    assert torch.equal(found, wanted.detach())
    assert not found.requires_grad
    assert family.training is training
    family.train(True)
    assert not torch.allclose(family.forward(row.inputs, row.target, frozenset({"token_logps"})).token_logps, wanted)


def test_what_trains_is_computed_with_dropout_beside_the_reference() -> None:
    from luthier.objectives import OBJECTIVES
    family, row = shaky(), build_batch(documents())
    family.train(True)
    dpo = OBJECTIVES["dpo"]()
    torch.manual_seed(0)
    outputs = forward_objective(family, dpo, row, nullcontext)
    assert (outputs.token_logps - outputs.reference_logps).abs().max() > 1e-3
    assert outputs.token_logps.requires_grad


def test_a_known_reference_is_not_asked_again() -> None:
    from dataclasses import replace

    from luthier.objectives import OBJECTIVES
    family, row = base("llama"), build_batch(documents())
    told = torch.arange(row.target.state_index.shape[0]).double()
    known = replace(row, target=replace(row.target, precomputed={"reference_logps": told}))
    assert torch.equal(forward_objective(family, OBJECTIVES["dpo"](), known).reference_logps, told)


# ---------------------------------------------------------------- the loop


class Clock:
    """Seconds that pass only where a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


class Feed:
    """A loader that says when it is asked."""

    def __init__(self, told: Callable[[], None] = lambda: None, size: int = 4) -> None:
        self.loader, self.told = InMemoryBatchSource(documents(), size, 40), told
        self.steps_per_epoch = self.loader.steps_per_epoch
        self.state, self.load = self.loader.state, self.loader.load

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        self.told()
        return next(self.loader)


def job(folder: Path, family: CausalLM, attached: Tuner, lines: list[tuple[int, Mapping[str, float]]], rate: float = 0.01,
        feed: Any = None, held: Any = None, optimizer: Mapping[str, Any] | None = None, **training: Any) -> TrainJob:
    return TrainJob(family, attached, SFT, feed or Feed(), [] if held is None else held, TrainingConfig(**training),
                    OptimizerConfig(**(optimizer or {})), rate, folder, lambda number, metrics: lines.append((number, metrics)))


def test_every_step_has_the_rate_of_its_number(tmp_path: Path) -> None:
    settings = {"lr_scheduler_type": "linear", "warmup_steps": 2, "min_lr_ratio": 0.1}
    family = base("llama", dtype=torch.float32)
    lines: list[tuple[int, Mapping[str, float]]] = []
    run_training_loop(job(tmp_path, family, attach(family, "lora"), lines, 0.01, optimizer=settings, max_steps=6))
    config = OptimizerConfig(**settings)
    assert [number for number, _ in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["learning_rate"] for _, line in lines] == pytest.approx([0.01 * compute_lr_factor(config, i, 6) for i in range(6)])
    assert [line["epoch"] for _, line in lines] == pytest.approx([i / 2 for i in range(1, 7)])  # 8 examples by 4


def test_a_step_is_made_with_the_rate_that_it_reports(tmp_path: Path) -> None:
    """With a warm-up of 10 of 10 steps, the first step moves by a tenth and more of what a constant rate moves."""
    moved = []
    for settings in ({"warmup_ratio": 0.0, "lr_scheduler_type": "constant"}, {"warmup_steps": 9}):
        family = base("llama", dtype=torch.float64)
        attached = attach(family, "lora")
        before = {name: p.detach().clone() for name, p in attached.parameters().items()}
        feed = Feed()
        made = job(tmp_path / str(len(moved)), family, attached, [], 0.01, feed=feed, optimizer=settings, max_steps=10)
        made.get_stop_signal = lambda: "enough"
        run_training_loop(made)
        moved.append(max(float((p - before[n]).abs().max()) for n, p in attached.parameters().items()))
    assert moved[1] / moved[0] == pytest.approx(0.1, rel=1e-3)


def test_the_loop_evaluates_without_dropout_and_trains_with_it(tmp_path: Path) -> None:
    held = pack_examples(documents(seed=5), 40)
    family = shaky()
    attached = attach(family, "lora", dropout=0.5)
    family.train(False)
    wanted = evaluate_batches(family, SFT, held)
    lines: list[tuple[int, Mapping[str, float]]] = []
    modes: list[bool] = []
    run_training_loop(job(tmp_path, family, attached, lines, STILL, feed=Feed(lambda: modes.append(family.training)), held=held, max_steps=4,
                          eval_steps=1))
    assert modes == [True] * 4
    assert not family.training
    found = [line for _, line in lines if "eval_loss" in line]
    assert len(found) == 4
    for line in found:
        assert line["eval_loss"] == pytest.approx(wanted["loss"], rel=1e-9)
        assert line["eval_perplexity"] == pytest.approx(torch.tensor(wanted["nll"]).exp().item(), rel=1e-6)
    family.train(True)
    assert abs(evaluate_batches(family, SFT, held)["loss"] / wanted["loss"] - 1) > 1e-3  # the control: dropout changes it


def test_evaluations_come_when_they_should_and_at_the_end(tmp_path: Path) -> None:
    for every, wanted in ((2, [2, 4, 5]), (None, [2, 4, 5]), (3, [3, 5])):  # left out: once an epoch of two steps
        family = base("llama", dtype=torch.float32)
        lines: list[tuple[int, Mapping[str, float]]] = []
        run_training_loop(job(tmp_path / str(every), family, attach(family, "lora"), lines, STILL, held=rows(), max_steps=5, eval_steps=every))
        assert [number for number, line in lines if "eval_loss" in line] == wanted


class Scripted(Feed):
    """Evaluations as a test wants them, in place of a measurement."""

    early_stop_kl = None

    def __init__(self, losses: list[float], seen: Any) -> None:
        super().__init__(seen)
        self.losses = iter(losses)

    def take_metrics(self) -> dict[str, float]:
        return {}

    def end_rollout(self) -> None:
        raise AssertionError("no KL is measured")

    def evaluate(self, prompts: Any = None) -> dict[str, float]:
        return {"loss": next(self.losses)}


def scripted(folder: Path, losses: list[float], **training: Any) -> tuple[Any, list[dict[str, torch.Tensor]], Tuner]:
    """A run with these evaluations; the weights after each step, and what it ended with."""
    family = base("llama", dtype=torch.float32)
    attached = attach(family, "lora")
    weights: list[dict[str, torch.Tensor]] = []
    feed = Scripted(losses, lambda: weights.append({name: t.clone() for name, t in attached.state().items()}))
    made = job(folder, family, attached, [], 0.01, feed=feed, held=rows(), max_steps=len(losses), eval_steps=1, **training)
    summary = run_training_loop(OnlineTrainJob(**vars(made)))
    return summary, weights, attached


@pytest.mark.parametrize("load_best", [True, False])
def test_it_ends_with_the_weights_of_the_lowest_evaluation(tmp_path: Path, load_best: bool) -> None:
    summary, before, attached = scripted(tmp_path, [3.0, 1.0, 2.0, 1.0, 4.0], load_best_model_at_end=load_best)
    assert summary.best["step"] == 2  # the first of two that are equal
    assert summary.best["eval_loss"] == 1.0
    after_two = before[2]  # as the third step found them
    same = all(torch.equal(t, after_two[name]) for name, t in attached.state().items())
    assert same is load_best


def test_it_gives_up_after_as_many_evaluations_without_a_better_one(tmp_path: Path) -> None:
    summary, before, _ = scripted(tmp_path, [5.0, 4.0, 4.5, 3.0, 3.5, 3.2, 9.0, 1.0], early_stopping_patience=2)
    assert summary.steps == len(before) == 6  # one bad evaluation at step 3 is forgotten by step 4
    assert "2" in summary.stopped


def test_a_checkpoint_is_of_the_step_that_it_is_named_after(tmp_path: Path) -> None:
    family = base("llama", dtype=torch.float32)
    attached = attach(family, "lora")
    weights: list[dict[str, torch.Tensor]] = []
    feed = Feed(lambda: weights.append({name: t.clone() for name, t in attached.state().items()}))
    run_training_loop(job(tmp_path, family, attached, [], 0.01, feed=feed, max_steps=5, save_steps=2, save_total_limit=9))
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-2", "step-4", "step-5"]
    saved = checkpoint.load_checkpoint(tmp_path / "step-2")
    assert all(torch.equal(saved.tensors["method"][name], t) for name, t in weights[2].items())
    assert saved.state["summary"]["steps"] == 2
    assert saved.state["feed"] == {**Feed().state(), "epoch": 0, "row": 8}


def test_a_resumed_run_is_the_whole_one_step_by_step(tmp_path: Path) -> None:
    outcomes = []
    for resumed in (False, True):
        family = base("llama", dtype=torch.float32)
        attached = attach(family, "lora", dropout=0.3)
        torch.manual_seed(3)
        lines: list[tuple[int, Mapping[str, float]]] = []
        saved = None
        if resumed:
            stir(attached, seed=9)
            saved = checkpoint.load_checkpoint(tmp_path / "whole" / "step-2")
        held = pack_examples(documents(seed=5), 40)
        summary = run_training_loop(job(tmp_path / ("resumed" if resumed else "whole"), family, attached, lines, 0.05, held=held,
                                        optimizer={"lr_scheduler_type": "cosine", "warmup_steps": 2}, max_steps=6, save_steps=2, save_total_limit=9, eval_steps=6), saved)
        told = {number: line["loss"] for number, line in lines if "loss" in line}
        outcomes.append((summary.steps, summary.tokens, summary.best, told, {n: t.clone() for n, t in attached.state().items()}))
    whole, again = outcomes
    assert list(again[3]) == [3, 4, 5, 6]
    assert again[:3] == whole[:3]
    assert again[3] == {number: whole[3][number] for number in (3, 4, 5, 6)}
    assert all(torch.equal(t, whole[4][name]) for name, t in again[4].items())


def test_seconds_are_those_that_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    def passes() -> None:
        clock.now += 2.0
    family = base("llama", dtype=torch.float32)
    lines: list[tuple[int, Mapping[str, float]]] = []
    summary = run_training_loop(job(tmp_path, family, attach(family, "lora"), lines, feed=Feed(passes), max_steps=5))
    assert summary.seconds == pytest.approx(10.0)
    assert [line["step_seconds"] for _, line in lines] == pytest.approx([2.0] * 5)
    for _, line in lines:
        assert line["tokens_per_second"] == pytest.approx(line["tokens"] / 2)
    assert summary.tokens == sum(int(line["tokens"]) for _, line in lines)
    again: list[tuple[int, Mapping[str, float]]] = []
    family = base("llama", dtype=torch.float32)
    went_on = run_training_loop(job(tmp_path, family, attach(family, "lora"), again, feed=Feed(passes), max_steps=5),
                                checkpoint.load_checkpoint(tmp_path / "step-5"))
    assert went_on.seconds == pytest.approx(10.0)
    assert not again


def test_a_fraction_of_an_epoch_is_rounded_up_to_steps() -> None:
    from luthier.training.loop import count_total_steps
    assert [count_total_steps(TrainingConfig(num_train_epochs=epochs), 10) for epochs in (1.0, 0.5, 0.51, 2.0, 0.01)] == [10, 5, 6, 20, 1]
    assert count_total_steps(TrainingConfig(num_train_epochs=3.0, max_steps=7), 10) == 7


