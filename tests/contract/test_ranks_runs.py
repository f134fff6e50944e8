"""Whole runs on two ranks: they decide alike, resume to the bit, and ask every reward once. Read `test_ranks.py` first."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lab import SFT, attach, base, documents
from torch import multiprocessing, nn

from luthier.api.train import train
from luthier.core.errors import LuthierError, RunError
from luthier.data.packing import pack_examples
from luthier.distributed import process_group
from luthier.training import loop
from luthier.training import rng as states
from luthier.training.optimizer import Optimizer, OptimizerConfig
from luthier.training.step import step
from tiny import save_tiny

TRAIN = vars(import_module("luthier.api.train"))
LIMIT = 120  # seconds: ranks that wait for each other wait for ever
REWARD = """
import os, random
def noisy(prompts, completions, metadata):
    with open(os.path.join(os.path.dirname(__file__), "calls.txt"), "a") as file:
        file.writelines(f"{os.getpid()} {p!r} {a!r}\\n" for p, a in zip(prompts, completions))
    return [random.SystemRandom().random() for _ in completions]
"""


def work(rank: int, port: int, place: str, job: Callable[[Path], Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.save(job(Path(place)), f"{place}/{rank}.pt")
    dist.destroy_process_group()


def on_two(job: Callable[[Path], Any], place: Path) -> list[Any]:
    """What `job` returns on each of two ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.start_processes(work, (port, str(place), job), nprocs=2, join=False, start_method="fork")
    assert context is not None
    end = time.monotonic() + LIMIT
    while not context.join(timeout=1):
        if time.monotonic() > end:
            for process in context.processes:
                process.kill()
            pytest.fail("the ranks wait for each other")
    return [torch.load(place / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "base", "llama", dtype=torch.float32, num_hidden_layers=1)
    for name, count in (("train", 8), ("eval", 3)):
        (tmp_path / f"{name}.jsonl").write_text("".join(
            json.dumps({"prompt": f"{name} {i}", "completion": "yes" * (1 + i % 3)}) + "\n" for i in range(count)))
    (tmp_path / "noisy.py").write_text(REWARD)
    return tmp_path


def watched(recipe: dict[str, Any], **named: Any) -> dict[str, Any]:
    """A run, and what this rank's model, best evaluation and random state were at its end."""
    seen: dict[str, Any] = {}
    fit = loop.run_training_loop

    def kept(job: Any, saved: Any = None) -> Any:
        seen["begun"] = states.capture_rng_state("cpu")["cpu"]
        summary = fit(job, saved)
        seen.update(weights={n: t.clone() for n, t in job.attached.state().items()}, best=dict(summary.best),
                    stopped=summary.stopped, steps=summary.steps, state=states.capture_rng_state("cpu")["cpu"])
        return summary

    TRAIN["run_training_loop"] = kept
    try:
        train(recipe, quiet=True, **named)
    finally:
        TRAIN["run_training_loop"] = fit
    return seen


# ---------------------------------------------------------------- they decide alike


def grpo(place: Path) -> dict[str, Any]:
    return watched({"model": str(place / "base"), "method": {"name": "lora", "rank": 2},
                    "data": {"train": str(place / "train.jsonl"), "eval": str(place / "eval.jsonl"), "max_length": 64},
                    "objective": {"name": "grpo", "num_generations": 2, "max_new_tokens": 3, "beta": 0.1,
                                  "reward": {"function": f"{place}/noisy.py:noisy"}},
                    "training": {"max_steps": 6, "batch_size": 4, "eval_steps": 1, "early_stopping_patience": 4}, "optimizer": {"learning_rate": 0.01},
                    "evaluate": {"before_training": False}}, output_dir=str(place / "run"))


def test_a_reward_that_is_not_deterministic_is_asked_once_and_leaves_the_ranks_alike(home: Path) -> None:
    first, second = on_two(grpo, home)
    assert first["best"] == second["best"]
    assert (first["stopped"], first["steps"]) == (second["stopped"], second["steps"])
    assert all(torch.equal(t, second["weights"][n]) for n, t in first["weights"].items())
    lines = [json.loads(line) for line in (home / "run/metrics.jsonl").read_text().splitlines()]
    rounds, evaluations = (sum(name in line for line in lines) for name in ("reward", "eval_reward"))
    calls = (home / "calls.txt").read_text().splitlines()
    assert rounds == evaluations == first["steps"]
    evaluations += 1  # that of the finished run
    assert len(calls) == rounds * 4 * 2 + evaluations * 3  # every answer of a round and of an evaluation, once
    processes = [call.split()[0] for call in calls]
    assert {processes.count(p) for p in set(processes)} >= {rounds * 4 + evaluations * n for n in (1, 2)}  # shared


def judged_by_rank(place: Path) -> dict[str, list[Any]]:
    """Whether each evaluation is the best and the run is over, where every rank measures something else."""
    found: dict[str, list[Any]] = {}
    for name, agree in (("agreed", process_group.broadcast_object), ("alone", lambda value: value)):
        losses = iter([[3.0, 2.0, 2.5], [3.0, 3.5, 1.0]][process_group.get_rank()])
        job: Any = SimpleNamespace(family=SimpleNamespace(train=lambda mode: None), log=lambda *_: None, show_progress=lambda *_: None,
                                   rollouts=SimpleNamespace(evaluate=lambda losses=losses: {"loss": next(losses)}))
        summary = loop.TrainResult(0, 0.0, 0)
        before, loop.process_group = loop.process_group, SimpleNamespace(get_rank=process_group.get_rank, broadcast_object=agree)  # type: ignore[assignment]
        try:
            found[name] = [loop._evaluate(job, summary) for _ in range(3)] + [summary.best["eval_loss"]]
        finally:
            loop.process_group = before
    return found


def test_the_first_rank_says_which_evaluation_is_the_best(tmp_path: Path) -> None:
    first, second = on_two(judged_by_rank, tmp_path)
    assert first["agreed"] == second["agreed"] == [True, True, False, 2.0]
    assert second["alone"] == [True, False, True, 1.0] != first["alone"]  # the control: one would save, the other not


# ---------------------------------------------------------------- they resume to the bit


def dropped(place: Path) -> list[Any]:
    """A run of four steps with dropout; the same resumed from its second step, and so with the first rank's state."""
    recipe = {"model": str(place / "base"), "method": {"name": "lora", "rank": 2, "dropout": 0.5},
              "data": {"train": str(place / "train.jsonl"), "max_length": 64}, "optimizer": {"learning_rate": 0.01},
              "training": {"max_steps": 4, "batch_size": 4, "max_tokens_per_micro_batch": 20, "save_steps": 2, "save_total_limit": 9}}
    found = [watched(recipe, output_dir=str(place / "whole"))]
    restore = states.restore_rng_state
    for name in ("resumed", "wrong"):
        if process_group.get_rank() == 0:
            shutil.copytree(place / "whole", place / name)
            shutil.rmtree(place / name / "checkpoints/step-4")
            (place / name / "README.md").unlink()
        process_group.barrier()
        if name == "wrong":
            loop.rng.restore_rng_state = lambda state: restore(process_group.broadcast_object(state))  # type: ignore[assignment]
        found.append(watched(recipe, output_dir=str(place / name), resume=True))
    loop.rng.restore_rng_state = restore
    return found


def test_dropout_on_two_ranks_resumes_to_the_bit(home: Path) -> None:
    (whole, resumed, wrong), other = on_two(dropped, home)
    assert all(torch.equal(t, resumed["weights"][n]) for n, t in whole["weights"].items())
    assert (whole["state"], other[0]["state"]) == (resumed["state"], other[1]["state"])
    assert whole["begun"] != other[0]["begun"]  # each rank draws its own, from the first step on
    assert whole["state"] != other[0]["state"]
    assert not all(torch.equal(t, wrong["weights"][n]) for n, t in whole["weights"].items())  # the control


def test_another_number_of_processes_is_told_of() -> None:
    state = states.capture_rng_state("cpu")
    assert loop._restore_random(state) == []  # of an earlier version, by one process
    assert loop._restore_random([state]) == []
    assert "saved by 2 processes, and 1 continue" in loop._restore_random([state, state])[0]


# ---------------------------------------------------------------- one process or two


def sixteen(place: Path) -> dict[str, Any]:
    return trained("full", 30, torch.bfloat16)


def trained(method: str, max_tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    """The float32 copies of a base in sixteen bits after three steps, and the rounded model."""
    torch.set_num_threads(1)
    family = base("llama", dtype=dtype)
    attached = attach(family, method, stirred=False)
    adam = Optimizer(attached.parameters(), attached.lr_multiplier, 1e-3, OptimizerConfig(), 3)
    for i in range(3):
        adam.set_learning_rate(i)
        step(family, SFT, pack_examples(documents(seed=i), max_tokens), adam)
    return {"copies": {n: p.detach().clone() for n, p in adam.parameters.items()},
            "model": {n: p.detach().clone() for n, p in attached.parameters().items()}}


def test_two_processes_are_one_on_a_base_in_sixteen_bits(tmp_path: Path) -> None:
    first, second = on_two(sixteen, tmp_path)
    alone = trained("full", 30, torch.bfloat16)
    for name, copy in alone["copies"].items():
        assert torch.equal(first["copies"][name], second["copies"][name])
        assert torch.equal(first["model"][name], first["copies"][name].to(torch.bfloat16))
        # Adam divides by the gradient's own size, so rounding may move a weight by a share of three rates.
        assert (first["copies"][name] - copy).abs().mean() < 1e-5


# ---------------------------------------------------------------- collective calls


def collected(place: Path) -> dict[str, Any]:
    """Gradients summed in buckets and one by one, and what the other collectives give."""
    generator = torch.Generator().manual_seed(process_group.get_rank())
    shapes = [(3,), (40, 5), (1,)] * 60 + [(700, 9), (2, 2)]
    made: dict[str, Any] = {}
    gradients = [torch.randn(shape, generator=generator) for shape in shapes]
    gradients[5] = torch.randn((5, 40), generator=generator).T  # lies transposed in memory
    reduce, calls = dist.all_reduce, [0]

    def counted(*given: Any, **named: Any) -> Any:
        calls[0] += 1
        return reduce(*given, **named)

    dist.all_reduce = counted
    for name, bucket in (("buckets", 5000), ("single", 1)):
        parameters = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
        for i, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
            if i != 7 or process_group.get_rank() == 0:  # a rank without a micro-batch has no gradient
                parameter.grad = gradient.clone()
        calls[0], began = 0, time.perf_counter()
        for _ in range(20):
            process_group.all_reduce_gradients(parameters, bucket)
        made[name] = ([p.grad for p in parameters], calls[0] / 20, (time.perf_counter() - began) / 20)
    dist.all_reduce = reduce
    made["named"] = process_group.all_reduce_named({"a": (1.0, 2.0)} if process_group.get_rank() == 0 else {"b": (4.0,), "a": (0.5, 0.25)})
    made["shards"] = process_group.map_shards(lambda items, start: (start, list(items)), range(5)), \
        process_group.map_shards(lambda items, start: (start, list(items)), range(1))
    try:
        process_group.map_shards(_refusing, range(4))
    except LuthierError as error:
        made["error"] = (error.what, error.remedy)
    return made


def _refusing(items: Sequence[int], start: int) -> int:
    if start:
        raise RunError("no reward", "mend it")
    return 0


def test_collective_calls_are_few_and_right(tmp_path: Path) -> None:
    first, second = on_two(collected, tmp_path)
    for found in (first, second):
        (buckets, calls, seconds), (single, each, alone) = found["buckets"], found["single"]
        assert (calls, each) == (4, 182)  # 12,244 small numbers in buckets of 5,000, and one gradient above that
        assert all(torch.equal(a, b) for a, b in zip(buckets, single, strict=True))
        assert found["named"] == {"a": [1.5, 2.25], "b": [4.0]}
        assert found["shards"] == ([(0, [0, 1]), (2, [2, 3, 4])], [(0, [0])])
        assert found["error"] == ("no reward", "mend it")  # on both, so that none waits for the other
        print(f"{calls} calls {seconds * 1e3:.2f} ms, {each} calls {alone * 1e3:.2f} ms")
    assert all(torch.equal(a, b) for a, b in zip(first["buckets"][0], second["buckets"][0], strict=True))
