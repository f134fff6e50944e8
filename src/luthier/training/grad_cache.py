"""The backward pass of one micro-batch, or of a whole batch with in-batch negatives. Read `step.py` first.

In-batch negatives couple all rows of a batch. Such a batch is computed in parts by gradient caching (Gao et al. 2021,
arXiv:2101.06983):

1. compute the outputs of all parts without a graph;
2. the loss over all outputs gives the gradient of each output;
3. compute each part again with a graph, and backpropagate its output gradients.

The result equals that of the whole batch at once, for the memory of one part and a second forward pass. With several
ranks, every rank computes the loss over all outputs and backpropagates through its own parts.

Shape letters, as in `core/types.py`: the outputs of a part are [P, ...] or [A, ...], and are joined along this
dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor

from luthier.core.protocols import Objective
from luthier.core.types import Batch, LossInputs, Outputs
from luthier.distributed import process_group
from luthier.training import rng

Forward = Callable[[Batch], Outputs]
Metrics = Mapping[str, tuple[Tensor, Tensor | float]]


def backward(forward: Forward, objective: Objective, mine: list[Batch], count: float, device: torch.device,
             autocast: Callable[[], AbstractContextManager[None]]) -> tuple[Tensor, Metrics]:
    """Loss and metrics; the gradients are accumulated on the parameters.

    This is a separate function so that no local variable keeps a graph alive while the next micro-batch runs: both
    would be in memory at once.

    Args:
        forward: a batch's outputs, with a graph where gradients are enabled.
        mine: one micro-batch; with in-batch negatives, this rank's parts of the whole batch. On the device.
        count: what the loss is divided by.
    """
    if not objective.needs_full_batch or (len(mine) == 1 and process_group.get_world_size() == 1):
        with autocast():
            part = objective(forward(mine[0]), mine[0].target)
        (part.total / count).backward()
        return part.total.detach() / count, part.metrics
    states, outputs = [], []
    for batch in mine:
        states.append(rng.capture_rng_state(device))  # dropout must repeat in the second pass
        with torch.no_grad(), autocast():
            outputs.append(forward(batch))  # values only, no graph
    leaves = [_detach_outputs(output) for output in outputs]  # of these the loss takes its gradient
    mine_now = [(output.tensors(), batch.target) for output, batch in zip(outputs, mine, strict=True)]
    others = process_group.all_gather_others(mine_now, device)  # constants here: their own rank has their graph
    if not mine:
        return torch.zeros((), device=device), {}  # a rank without a part
    every = [*zip(leaves, [batch.target for batch in mine], strict=True),
             *((Outputs(**tensors), target) for tensors, target in others)]  # type: ignore[arg-type]
    part = objective(Outputs.concatenate([o for o, _ in every]), LossInputs.concatenate([t for _, t in every]))
    (part.total / count).backward()  # gradients of the outputs; trained scalars get theirs here
    after = rng.capture_rng_state(device)
    for batch, state, leaf in zip(mine, states, leaves, strict=True):
        rng.restore_rng_state(state)  # the same dropout as in the first pass
        with autocast():
            again = forward(batch).tensors()
        pairs = [(again[name], t.grad) for name, t in leaf.tensors().items() if t.grad is not None]
        torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])
    rng.restore_rng_state(after)  # the passes count as one in the sequence of random numbers
    if process_group.get_rank() != 0:  # the sums are over the whole batch, so one rank alone reports them
        return torch.zeros_like(part.total.detach()), {}
    return part.total.detach() / count, part.metrics


def _detach_outputs(output: Outputs) -> Outputs:
    tensors = {name: t.detach().requires_grad_(t.is_floating_point()) for name, t in output.tensors().items()}
    # Every rank computes the whole loss, and gradients are summed over ranks: only rank 0 differentiates scalars.
    scalars = output.scalars if process_group.get_rank() == 0 else {name: t.detach() for name,
                                                                    t in output.scalars.items()}
    return replace(output, **tensors, scalars=scalars)
