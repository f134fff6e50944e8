"""The verb `merge_adapters`: several LoRA runs of one base as one run. Read `methods/lora_merging.py` first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from luthier.assembly import adapter_merging
from luthier.core.consent import accepts_consent
from luthier.core.errors import RecipeError
from luthier.reporting.progress import print_line
from luthier.training.run_folder import Run


@accepts_consent
def merge_adapters(runs: Sequence[Run | Path | str], out: Path | str, *, weights: Sequence[float] = (),
                   combination_type: Literal["linear", "cat", "svd"] = "linear", rank: int | None = None,
                   base_model: Path | str | None = None, allow_code: Sequence[str] = ()) -> dict[str, float]:
    """Write one run whose weight update is the weighted sum of the updates of several runs.

    Args:
        runs: LoRA runs of one base.
        out: the new run folder.
        allow_code: files, modules, URLs or base models whose code the run may use (`core/consent.py`).
        weights: one for each run; default: 1 for each.
        combination_type: `linear`, exact, at the smallest rank that represents the sum; `cat`, exact, the ranks add
        up; `svd`,
            the best approximation with `rank`.
        rank: for `svd`; default: the largest rank of the runs.
        base_model: where the base of the runs is now, if it was moved.

    Returns:
        `rank`, and `relative_error`: the distance from the exact sum, relative to its norm.

    Raises:
        RecipeError: runs that cannot be summed, or settings that do not fit together.
    """
    if not runs:
        raise RecipeError("no run was given to merge", "luthier merge-adapters RUN_A RUN_B --out DIR")
    folders = [run if isinstance(run, Run) else Run(run) for run in runs]
    return adapter_merging.merge_adapters(folders, Run(out), tuple(weights) or (1.0,) * len(folders), combination_type,
                                          rank,
                                          base_model, print_line)
