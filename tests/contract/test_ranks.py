"""Two processes give the weights that one gives. Read `distributed/process_group.py` first."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lab import SFT, attach, base, documents
from safetensors.torch import load_file
from torch import multiprocessing

import luthier
from luthier.core.errors import NotFinite
from luthier.data.packing import pack_examples
from luthier.training.optimizer import Optimizer, OptimizerConfig
from luthier.training.step import step
from tiny import save_tiny

CASES = [("full", 20), ("lora", None), ("adalora", 20)]  # several micro-batches a step; one, so that a rank has none


def trained(method: str, max_tokens: int | None, alone: bool = False) -> dict[str, Any]:
    """Weights and metrics after three steps; `alone` breaks the law: every rank keeps to its own gradients."""
    torch.set_num_threads(1)
    family = base("llama")
    attached = attach(family, method)
    adam = Optimizer(attached.parameters(), attached.lr_multiplier, 1e-2, OptimizerConfig(), 3, attached.optimizer_hooks)
    for i in range(3):
        adam.set_learning_rate(i)
        rows = pack_examples(documents(seed=i), max_tokens)
        stepped = step(family, SFT, rows[:1] if alone else rows, adam)
    return {"numbers": stepped.read_metrics(), "weights": {n: t.double().clone() for n, t in attached.state().items() if t.numel()},
            "micro_batches": stepped.micro_batches}


def broken() -> str:
    """What every rank says when one of them alone has a loss that is not finite."""
    family = base("llama")
    attached = attach(family, "lora")
    adam = Optimizer(attached.parameters(), attached.lr_multiplier, 1e-2, OptimizerConfig(), 3)
    before = {n: t.clone() for n, t in attached.state().items()}

    class Infinite:
        required_outputs, count, needs_full_batch = SFT.required_outputs, SFT.count, False

        def __call__(self, outputs: Any, target: Any) -> Any:
            loss = SFT(outputs, target)
            return type(loss)(loss.total * (math.inf if dist.get_rank() == 1 else 1), loss.count, loss.metrics)

    stepped = step(family, Infinite(), pack_examples(documents(), 20), adam)
    with pytest.raises(NotFinite, match="lab:0"):
        stepped.read_metrics()
    assert all(torch.equal(t, before[n]) for n, t in attached.state().items())
    return "refused"


def work(rank: int, port: int, place: str) -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = [trained(*case) for case in CASES]
    torch.save([*found, broken()], f"{place}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_are_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A fork inherits what is imported, so it starts at once; nothing here has threads or a GPU that it could not inherit.
    multiprocessing.start_processes(work, (port, str(tmp_path)), nprocs=2, start_method="fork")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for i, case in enumerate(CASES):
        alone = trained(*case)
        assert (alone["micro_batches"] > 2) == (case[1] is not None)
        for rank in ranks:
            found = rank[i]
            assert found["numbers"] == pytest.approx(alone["numbers"], rel=1e-9)
            assert list(found["numbers"]) == list(alone["numbers"])
            for name, weight in alone["weights"].items():
                assert (found["weights"][name] - weight).abs().max() < 1e-12
        assert all(torch.equal(t, ranks[1][i]["weights"][n]) for n, t in ranks[0][i]["weights"].items())
    assert [rank[-1] for rank in ranks] == ["refused", "refused"]
    part = trained(*CASES[0], alone=True)["weights"]  # what a rank that heard of no other would have
    assert max(float((part[n] - t).abs().max()) for n, t in ranks[0][0]["weights"].items()) > 1e-3


def test_torchrun_leaves_the_run_of_one_process(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base", "llama")
    rows = [{"prompt": f"Say {word}.", "completion": word * 3} for word in ("one", "two", "three", "four", "five", "six")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = ["--model", "base", "--data", "rows.jsonl", "model.dtype=float64", "data.eval=rows.jsonl", "data.max_length=256",
                "training.max_steps=4", "training.batch_size=4", "training.max_tokens_per_micro_batch=40", "training.eval_steps=2",
                "training.save_steps=1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(luthier.__file__).parents[1])}
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, launcher in (("alone", []), ("both", several)):
        done = subprocess.run([sys.executable, *launcher, "-m", "luthier", "train", *settings, f"output_dir={name}"], cwd=tmp_path,
                              env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    alone, both = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("alone", "both"))
    assert alone.keys() == both.keys()
    assert all(torch.allclose(both[n], alone[n], rtol=1e-5, atol=1e-7) for n in alone)
    lines = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
             for name in ("alone", "both")]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    assert {p.name for p in (tmp_path / "alone").iterdir()} == {p.name for p in (tmp_path / "both").iterdir()}
