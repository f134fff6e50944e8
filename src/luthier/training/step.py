"""One optimizer step. Read `core/protocols.py` first; `loop.py` calls this.

Only the step divides. It takes the count over all micro-batches and ranks before the first forward pass, and each
backward pass is of total / count. So the result does not depend on how a batch was split.

Shape letter: P predictions of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from luthier.core.errors import NotFinite
from luthier.core.examples import Origin
from luthier.core.protocols import Family, Objective
from luthier.core.types import Batch, LossInputs, Outputs
from luthier.distributed import process_group
from luthier.training.grad_cache import Metrics, backward
from luthier.training.optimizer import Optimizer

Sums = dict[str, tuple[Tensor | float, Tensor | float]]
Reference = Callable[[], AbstractContextManager[None]]


def async_read(values: Sequence[Tensor | float], device: torch.device) -> Callable[[], list[float]]:
    """A function that returns the values as numbers. On a GPU the copy is queued now, after the work that computes
    them. Reading waits only for that work, and the next step can be queued before reading."""
    if device.type != "cuda":
        return lambda: [float(value) for value in values]
    on_device = [value.detach() for value in values if isinstance(value, Tensor) and value.is_cuda]
    stacked = torch.stack([value.to(torch.float64) for value in on_device])  # [values on the device]
    on_host = torch.empty(stacked.shape, dtype=stacked.dtype, pin_memory=True)  # only pinned memory is copied to async
    on_host.copy_(stacked, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def read() -> list[float]:
        done.synchronize()
        numbers = iter(on_host.tolist())
        return [next(numbers) if isinstance(value, Tensor) and value.is_cuda else float(value) for value in values]

    return read


@dataclass(frozen=True)
class StepResult:
    """The metrics of one step, perhaps still on the device.

    `read()` blocks until the step has finished and returns [sum_0, count_0, sum_1, count_1, ..., loss, grad_norm],
    ordered as `names`.
    """

    count: float
    names: tuple[str, ...]
    read: Callable[[], list[float]]
    device: torch.device
    tokens: int
    examples: int
    micro_batches: int
    origins: tuple[Origin, ...]

    def read_metrics(self) -> dict[str, float]:
        """The metrics as numbers. Raises `NotFinite`, with the batch, where the loss or the gradient is not finite."""
        *read, loss, norm = self.read()
        own = dict(zip(self.names, zip(read[0::2], read[1::2], strict=True), strict=True))
        summed = process_group.all_reduce_named({**own, "": (loss,)})
        (loss,) = summed.pop("")
        if not (math.isfinite(loss) and math.isfinite(norm)):
            shown = ", ".join(map(str, self.origins[:8])) + (" ..." if len(self.origins) > 8 else "")
            raise NotFinite(f"loss {loss} with gradient norm {norm} on the batch of {shown}; "
                            "the weights were not updated with it",
                            "lower optimizer.learning_rate, or check these rows with `luthier data check`")
        means = {name: total / n for name, (total, n) in summed.items() if n}
        return {"loss": loss, **means, "grad_norm": norm}


def step(family: Family, objective: Objective, batches: list[Batch], optimizer: Optimizer,
         autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
         reference: Reference | None = None) -> StepResult:
    """Forward and backward through every micro-batch, then one update.

    Args:
        batches: the micro-batches of one optimizer step, of all ranks; this rank computes its share of them.
        optimizer: its learning rate is already set.
        autocast: makes a context for mixed precision, entered for each forward pass.
        reference: makes the context in which the model is the reference model, for objectives that need one.
    """
    device = family.device
    # Every world-size-th micro-batch, counted from this rank's number.
    mine = [batch.to(device) for batch in batches[process_group.get_rank()::process_group.get_world_size()]]
    count = sum(objective.count(batch.target) for batch in batches)  # over all ranks: each of them has all batches
    assert count > 0, "an encoded example always has a weight above 0"
    # [] In float64: a sum over many micro-batches would round in float32. MPS has no float64.
    loss = torch.zeros((), dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
    sums: Sums = {}
    # With in-batch negatives the micro-batches are parts of one sum; otherwise each is a sum of its own.
    for part in [mine] if objective.needs_full_batch else [[batch] for batch in mine]:
        part_loss, metrics = backward(partial(forward_objective, family, objective, reference=reference), objective,
                                      part, count, device, autocast)
        loss += part_loss
        _add_metrics(sums, metrics)
    # Before clipping: the norm is that of the whole batch.
    process_group.all_reduce_gradients(optimizer.parameters.values())
    optimizer.run_pre_step_hook()  # after the sum over ranks: a method's own gradient counts once
    norm = optimizer.clip_grad_norm()  # [] length before clipping
    optimizer.step(norm)
    read = async_read([*(x for pair in sums.values() for x in pair), loss, norm], device)
    return StepResult(count, tuple(sums), read, device, sum(b.inputs.tokens.shape[0] for b in batches),
                      sum(b.target.num_examples for b in batches), len(batches),
                      tuple(o for b in batches for o in b.origins))


def forward_objective(family: Family, objective: Objective, batch: Batch,
                      reference: Reference | None = None) -> Outputs:
    """The outputs that the objective requires of one micro-batch.

    `reference_logps` are the precomputed ones of the batch; where it has none, those of a second forward pass.
    """
    if "reference_logps" not in objective.required_outputs:
        return family.forward(batch.inputs, batch.target, objective.required_outputs)
    logps = batch.target.precomputed.get("reference_logps")
    if logps is None:
        assert reference is not None, "an objective with a reference is given one"
        logps = compute_reference_logps(family, batch, reference)
    return replace(family.forward(batch.inputs, batch.target, objective.required_outputs - {"reference_logps"}),
                   reference_logps=logps)


def compute_reference_logps(family: Family, batch: Batch, reference: Reference) -> Tensor:
    """[P] log-probabilities of the reference model, without dropout and without a gradient."""
    training = family.training
    family.train(False)  # a reference without dropout
    with torch.no_grad(), reference():
        logps = family.forward(batch.inputs, batch.target, frozenset({"token_logps"})).token_logps
    family.train(training)
    assert logps is not None
    return logps  # [P]


def _add_metrics(sums: Sums, metrics: Metrics) -> None:
    for name, (total, n) in metrics.items():
        old = sums.get(name, (0.0, 0.0))
        sums[name] = (old[0] + total, old[1] + n)  # on the device: reading would wait for it


@torch.no_grad()
def evaluate_batches(family: Family, objective: Objective, batches: list[Batch],
                     reference: Reference | None = None) -> dict[str, float]:
    """The objective's metrics over held-out batches, each sum divided once at the end; and its evaluation metrics."""
    sums: Sums = {}
    kept: list[tuple[Outputs, LossInputs]] = []
    whole = objective.needs_full_batch or objective.has_eval_metrics
    for batch in (b.to(family.device) for b in batches):
        outputs = forward_objective(family, objective, batch, reference)
        if whole:
            kept.append((outputs, batch.target))
        if not objective.needs_full_batch:
            part = objective(outputs, batch.target)
            _add_metrics(sums, {**part.metrics, "loss": (part.total, part.count)})
    found: dict[str, float] = {}
    if kept:
        outputs, target = Outputs.concatenate([o for o, _ in kept]), LossInputs.concatenate([t for _, t in kept])
        if objective.needs_full_batch:
            part = objective(outputs, target)
            _add_metrics(sums, {**part.metrics, "loss": (part.total, part.count)})
        found = objective.compute_eval_metrics(outputs, target)
    return {name: float(total) / float(n) for name, (total, n) in sums.items() if float(n)} | found
