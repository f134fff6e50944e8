"""What a method does around each optimizer step. Read `protocols.py` (Tuner) first.

AdaLoRA's rank search reads weights and gradients once a step, after the gradients of all micro-batches and ranks are
summed. Its decisions therefore do not depend on how a batch was split, and are equal on every rank.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class OptimizerHook(Protocol):
    """Called once before and once after each optimizer step."""

    def pre_step(self) -> None:
        """Add the gradient of the method's own penalty. The gradients of the whole step are summed, but not clipped."""
        ...

    def post_step(self, step: int, total: int, sound: Tensor) -> None:
        """Read the updated weights and the gradients of the step, which are still set.

        Args:
            step, total: number of this step (from 1), and the number of steps of the run.
            sound: [] bool, on the device; False where a gradient was not finite. No weight was updated then, and the
                hook must not change anything.
        """
        ...
