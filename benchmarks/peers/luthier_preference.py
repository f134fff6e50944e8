"""Luthier's side of preferences, by its public call. Read `luthier_sft.py` first.

    python -m benchmarks.peers.luthier_preference JOB.json
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

import luthier
from benchmarks.peers.luthier_sft import recipe, steps
from benchmarks.peers.watch import Watch
from benchmarks.workload import PROGRESS, Job
from luthier.core.types import Inputs, LossInputs
from luthier.models.families.causal import CausalLM


def note(watch: Watch, begun: list[float]) -> None:
    """Tell the watch of every answer behind its prompt, as it stands in the segment_tree: a path from a root to a leaf."""
    forward = CausalLM.forward
    size = watch.job.setting.batch_size * 2
    reward = watch.job.setting.objective == "reward"

    def noting(self: CausalLM, inputs: Inputs, target: LossInputs, needs: frozenset[str]) -> Any:
        if not torch.is_grad_enabled():  # the reference
            return forward(self, inputs, target, needs)
        watch.first()
        if len(watch.documents) % size == 0:
            begun.append(time.perf_counter())
            print(f"{PROGRESS}step {len(begun)} of {watch.job.steps}", flush=True)
        ids, segment_tree, starts = inputs.tokens.tolist(), inputs.segment_tree, inputs.segment_tree.starts
        segment_of = torch.repeat_interleave(torch.arange(len(starts)), torch.tensor(segment_tree.lengths)).tolist()
        for item in target.labeled_segments.tolist():
            path = segment_tree.find_path(item)
            words = [token for s in path for token in ids[starts[s]:starts[s] + segment_tree.lengths[s]]]
            before = len(words) - segment_tree.lengths[item]
            own = [p for p, of in zip(target.state_index.tolist(), target.item_of.tolist(), strict=True)
                   if target.labeled_segments[of] == item]
            # A prediction made inside the item is of the token after it; one made at its parent's end is of its first.
            places = [before + p - starts[item] + 1 if segment_of[p] == item else before for p in own]
            watch.saw(words, () if reward else places)
        return forward(self, inputs, target, needs)

    CausalLM.forward = noting  # type: ignore[method-assign]


def main() -> None:
    job = Job.read(sys.argv[1])
    watch = Watch(job, per_example=2)
    begun: list[float] = []
    note(watch, begun)
    run = luthier.train(recipe(job) | {"objective": job.setting.objective}, quiet=True)
    watch.steps, losses = steps(run.metrics, begun)
    watch.account(losses)


if __name__ == "__main__":
    main()
