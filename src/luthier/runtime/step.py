"""One optimiser step, whole, on one screen. Read `core/protocols.py` first; `loop.py` calls this.

Only the step divides. The count is taken over all micro-batches (and ranks) before the first forward pass, and each
backward pass is of total / count; so the result does not depend on how a batch was cut.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from luthier.core.errors import NotFinite
from luthier.core.protocols import Family, Objective
from luthier.core.types import Batch, Origin
from luthier.runtime import ranks
from luthier.runtime.memory import release
from luthier.runtime.optim import Optimizer


@dataclass(frozen=True)
class Stepped:
    """What one step measured. The sums are still on the device: reading one waits for the step to end."""

    count: float
    loss: Tensor
    norm: Tensor
    sums: dict[str, tuple[Tensor, Tensor | float]]
    tokens: int
    examples: int
    micro_batches: int
    origins: tuple[Origin, ...]

    def numbers(self) -> dict[str, float]:
        """The metrics as plain numbers. Raises `NotFinite`, naming the batch, where the loss or gradient is not."""
        names = ranks.union(self.sums)
        mine = [float(x) for name in names for x in self.sums.get(name, (0.0, 0.0))]
        *flat, loss = ranks.total([*mine, float(self.loss)], self.loss.device)
        norm = float(self.norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            shown = ", ".join(map(str, self.origins[:8])) + (" ..." if len(self.origins) > 8 else "")
            raise NotFinite(f"loss {loss} with gradient length {norm} on the batch of {shown}; "
                            "the weights were not updated with it",
                            "lower optimizer.learning_rate, or look at these rows with `luthier data check`")
        means = {name: total / n for name, total, n in zip(names, flat[0::2], flat[1::2], strict=True) if n}
        return {"loss": loss, **means, "grad_norm": norm}


def step(family: Family, objective: Objective, batches: list[Batch], optimizer: Optimizer,
         autocast: AbstractContextManager[None] | None = None) -> Stepped:
    """Forward and backward through every micro-batch, then one update.

    Args:
        batches: the micro-batches of one optimiser step; this rank takes its share of them.
        optimizer: its rate is already set.
        autocast: a context for mixed precision, entered anew for each forward pass.
    """
    device = family.device
    mine = batches[ranks.rank()::ranks.world()]
    count = sum(objective.count(batch.target) for batch in batches)
    assert count > 0, "an encoded example always has a weight above 0"
    loss = torch.zeros((), dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
    sums: dict[str, tuple[Tensor, Tensor | float]] = {}
    for batch in (b.to(device) for b in mine):
        part_loss, metrics = _backward(family, objective, batch, count, autocast or nullcontext())
        release(device)
        loss += part_loss
        for name, (total, n) in metrics.items():
            old = sums.get(name, (0.0, 0.0))
            sums[name] = (old[0] + total, old[1] + n)
    ranks.sum_gradients(optimizer.parameters.values())
    norm = optimizer.clip()
    optimizer.step(norm)
    return Stepped(count, loss, norm, sums, sum(b.inputs.tokens.shape[0] for b in batches),
                   sum(b.target.examples for b in batches), len(batches), tuple(o for b in batches for o in b.origins))


def _backward(family: Family, objective: Objective, batch: Batch, count: float,
              autocast: AbstractContextManager[None]) -> tuple[Tensor, Mapping[str, tuple[Tensor, Tensor | float]]]:
    """Forward and backward of one micro-batch. A function of its own, so that nothing of its graph outlives it: what
    is still named while the next one runs is memory that both hold at once."""
    with autocast:
        outputs = family.forward(batch.inputs, batch.target, objective.needs)
        part = objective(outputs, batch.target)
    (part.total / count).backward()
    return part.total.detach() / count, part.metrics


@torch.no_grad()
def measure(family: Family, objective: Objective, batches: list[Batch]) -> dict[str, float]:
    """The objective's metrics over held-out batches: each sum divided once, at the end."""
    sums: dict[str, tuple[Tensor, Tensor | float]] = {}
    for batch in (b.to(family.device) for b in batches):
        part = objective(family.forward(batch.inputs, batch.target, objective.needs), batch.target)
        for name, (total, n) in {**part.metrics, "loss": (part.total, part.count)}.items():
            old = sums.get(name, (0.0, 0.0))
            sums[name] = (old[0] + total, old[1] + n)
    return {name: float(total) / float(n) for name, (total, n) in sums.items() if float(n)}
