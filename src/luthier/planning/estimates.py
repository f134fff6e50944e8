"""Extends what a few trial steps measured to a whole run. There is no simpler file to read first."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

SPARE = 1.1  # a run's longest rows may need more memory than those of its first steps


def estimate_total_steps(epochs: float, steps_per_epoch: int, held_out: float) -> int:
    """Optimizer steps of a whole run.

    Args:
        epochs: of the run.
        steps_per_epoch: of the trial, which holds no rows out.
        held_out: share of the rows that the run keeps for evaluation.

    >>> estimate_total_steps(3.0, 5, 0.4)
    9
    """
    return max(1, math.ceil(round(epochs * steps_per_epoch * (1 - held_out), 6)))


def summarize_trial(lines: Sequence[Mapping[str, float]], results: Mapping[str, Any], available_gb: float,
                    max_steps: int | None, epochs: float, held_out: float) -> dict[str, Any]:
    """A row of the plan: time, tokens and memory of the whole run, from the trial's steps.

    Args:
        lines: of metrics.jsonl.
        results: of results.json.
        available_gb: free memory.
        max_steps: of the run; None: `epochs` decide.
    """
    timed = lines[2:]  # line 0 has the parameter counts; line 1 is the first step, which warms up
    length = statistics.median(line["tokens"] for line in timed)
    per_token = statistics.median(line["step_seconds"] / line["tokens"] for line in timed)
    steps_per_epoch = round(timed[0]["step"] / timed[0]["epoch"])
    total = max_steps or estimate_total_steps(epochs, steps_per_epoch, held_out)
    return {"fits": results["peak_memory_gb"] * SPARE <= available_gb, "steps": total, "tokens": round(total * length),
            "seconds": total * per_token * length, "tokens_per_second": 1 / per_token,
            **{name: results[name] for name in ("peak_memory_gb", "trainable", "trainable_fraction", "file_bytes")}}
