"""Luthier's side, by its public call. Read `watch.py` first.

    python -m benchmarks.peers.luthier_sft JOB.json

`recipe` and `steps` are the only functions that know how Luthier spells things. A step's times are those that the
run itself keeps in `metrics.jsonl`. What reached the model is noted at the family's `forward`, which every batch passes
and which changes nothing.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

import luthier
from benchmarks.peers.watch import Account, Watch
from benchmarks.workload import PROGRESS, Job
from luthier.core.types import Inputs, LossInputs
from luthier.models.families.causal import CausalLM


def recipe(job: Job) -> dict[str, Any]:
    """The setting in Luthier's words; whatever is not named is Luthier's default."""
    s = job.setting
    return {
        "model": {"name_or_path": job.folder, "dtype": s.dtype},
        "method": {"name": "lora", "rank": s.rank, "alpha": s.alpha, "dropout": 0.0, "target_modules": "all-linear"},
        "objective": "sft",
        "data": {"train": job.rows, "max_length": s.max_length, "shuffle": False},
        "training": {"max_steps": job.steps, "batch_size": s.batch_size,
                     "precision": "bf16" if s.dtype == "bfloat16" else "float32"},
        "optimizer": {"learning_rate": s.learning_rate, "lr_scheduler_type": "constant", "warmup_ratio": 0.0, "adam_beta1": s.betas[0],
                      "adam_beta2": s.betas[1], "adam_epsilon": s.epsilon, "weight_decay": s.weight_decay, "max_grad_norm": s.max_grad_norm},
        "seed": s.seed,
        "output_dir": str(Path(job.work) / "run"),
    }


def steps(metrics: list[dict[str, float]], begun: list[float]) -> tuple[list[Account], list[float]]:
    """The times of each step, and its loss, out of a run's metrics.

    On a GPU Luthier reads a step's numbers while the next one runs, so its times overlap. There a step lasts from its
    first forward pass to the next step's, and the last one as long as the run says, which then waits for the device.
    """
    lines = [line for line in metrics if "step_seconds" in line]
    times: list[Account] = [{"seconds": line["step_seconds"], "user_seconds": line["user_seconds"],
                             "system_seconds": line.get("system_seconds")} for line in lines]
    if torch.cuda.is_available():
        for step, this, after in zip(times, begun, begun[1:], strict=False):
            step["seconds"] = after - this
    return times, [line["loss"] for line in lines]


def note(watch: Watch, begun: list[float]) -> None:
    """From now on tell the watch of every document that a family is given, and keep the time at which a step begins."""
    forward = CausalLM.forward
    size = watch.job.setting.batch_size

    def noting(self: CausalLM, inputs: Inputs, target: LossInputs, needs: frozenset[str]) -> Any:
        watch.first()
        if len(watch.documents) % size == 0:
            begun.append(time.perf_counter())
            print(f"{PROGRESS}step {len(begun)} of {watch.job.steps}", flush=True)
        segment_tree, at = inputs.segment_tree, target.state_index.tolist()
        assert segment_tree.is_flat, "instruction tuning packs whole documents"
        for start, length in zip(segment_tree.starts, segment_tree.lengths, strict=True):
            ids = inputs.tokens[start:start + length].tolist()
            # `at` names the state that predicts: the token after it is the one predicted.
            watch.saw(ids, (place - start + 1 for place in at if start <= place < start + length))
        return forward(self, inputs, target, needs)

    CausalLM.forward = noting  # type: ignore[method-assign]


def main() -> None:
    job = Job.read(sys.argv[1])
    watch = Watch(job)
    begun: list[float] = []
    note(watch, begun)
    run = luthier.train(recipe(job), quiet=True)
    watch.steps, losses = steps(run.metrics, begun)
    watch.account(losses)


if __name__ == "__main__":
    main()
