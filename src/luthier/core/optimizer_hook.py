"""What a method does at each update of the weights, where it has a say in it. Read `protocols.py` (Attached) first.

A search for ranks looks at weights and gradients together, once a step: after the gradients of all micro-batches and
ranks are summed, so that it cannot depend on how a batch was cut, and decides alike on every rank.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class OptimizerHook(Protocol):
    """Called around the optimiser's update, once a step."""

    def pre_step(self) -> None:
        """The gradients of the whole step are summed, and not yet clipped: what the method minimises by itself (a
        penalty on its weights) adds its gradient here."""
        ...

    def post_step(self, step: int, total: int, sound: Tensor) -> None:
        """The weights are updated, and the gradients that did it still there.

        Args:
            step, total: this was step `step` (from 1) of `total`.
            sound: [] bool, on the device; where it is false a gradient was not finite, nothing was updated, and
                nothing may change here.
        """
        ...
