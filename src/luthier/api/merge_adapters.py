"""The verb `combine`: several LoRA runs of one base into one. Read `api/export.py` first; maths:
`methods/lora_merging.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from luthier.assembly import adapter_merging
from luthier.core.errors import RecipeError
from luthier.reporting.progress import print_line
from luthier.training.run_folder import Run


def merge_adapters(runs: Sequence[Run | Path | str], out: Path | str, *, weights: Sequence[float] = (),
                   how: Literal["sum", "concatenation", "svd"] = "sum", rank: int | None = None,
                   base_model: str | None = None) -> dict[str, float]:
    """Write one run whose change is the weighted sum of several runs' changes.

    Args:
        runs: LoRA runs of one base.
        out: the run folder to make.
        weights: one for each run; left out: 1 for each.
        how: `sum`, exact, at the smallest rank that holds it; `concatenation`, exact, the ranks add up; `svd`, the
            closest change of `rank`.
        rank: for `svd`; left out: the largest of the runs'.
        base_model: where the base of the runs is now, if it was moved.

    Returns:
        `rank`, and `relative_error`: how far the change is from the exact sum, as a share of its size.

    Raises:
        RecipeError: for runs that have no sum, or settings that mean nothing together.
    """
    if not runs:
        raise RecipeError("there is no run to combine", "luthier combine RUN_A RUN_B --out DIR")
    folders = [run if isinstance(run, Run) else Run(run) for run in runs]
    return adapter_merging.merge_adapters(folders, Run(out), tuple(weights) or (1.0,) * len(folders), how, rank,
                                          base_model, print_line)
