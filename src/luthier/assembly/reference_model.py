"""The reference model of an objective, where it costs memory or time. Read `initialization.py` first.

An adapter is disabled for the reference: no memory, and a second forward pass. A method that changes the base weights
has two ways:

    a copy          of what trains, swapped in for that pass (`method.keep_base`)
    precomputed     every row's log-probabilities, computed once before the training and kept with the row
                    (`objective.precompute_reference`): no copy and no second pass, under any method

Either way an objective reads them from `Outputs.reference_logps`; `training/step.py` puts them there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from luthier import data as rows
from luthier.assembly.factory import resolve_micro_batch_tokens
from luthier.assembly.recipe import Recipe, needs_reference, precomputes_reference
from luthier.core.errors import RunError
from luthier.core.protocols import Family, Tuner
from luthier.core.types import TokenizedExample
from luthier.data import Datasets
from luthier.methods.composite import CompositeMethod
from luthier.methods.full import Full
from luthier.training.optimizer import needs_master
from luthier.training.step import Reference, compute_reference_logps

GROUP = 512  # examples that are packed together


def describe_reference_cost(recipe: Recipe, attached: Tuner) -> str:
    """A sentence on the copy of the base's weights for the reference; empty if there is none."""
    parts = attached.parts if isinstance(attached, CompositeMethod) else (attached,)
    copies = [part.base_copy_size for part in parts if isinstance(part, Full)]
    count, size = (sum(sizes) for sizes in zip(*copies, strict=True)) if copies else (0, 0)
    if not count or not needs_reference(recipe.objective) or precomputes_reference(recipe):
        return ""
    without = ("; objective.precompute_reference: true avoids the copy"
               if "precompute_reference" in type(recipe.objective).model_fields else "")
    return (f"{recipe.method.name} keeps a copy of the {count:,} weights that it trains ({size / 1e9:.3g} GB) as the "
            f"reference of {recipe.objective.name}{without}")


def describe_master_copy_cost(attached: Tuner) -> str:
    """A sentence on the optimizer's float32 copies of trained weights; empty if there are none."""
    copied = [p for p in attached.parameters().values() if needs_master(p)]
    if not copied:
        return ""
    count, dtypes = sum(p.numel() for p in copied), sorted({str(p.dtype).removeprefix("torch.") for p in copied})
    return (f"the {count:,} trained weights are in {' and '.join(dtypes)}, so the optimizer updates float32 "
            f"copies of them ({4 * count / 1e9:.3g} GB) and rounds them into the model after each step; model.dtype: "
            "float32 with training.precision: bf16 needs 2 bytes less per weight")


def precompute_reference(recipe: Recipe, base: Family, found: Datasets, reference: Reference,
                         tick: Callable[[int], None] = lambda done: None) -> Datasets:
    """The rows with the reference's log-probabilities, where the recipe precomputes them; else unchanged. Call it
    before the training.

    Args:
        tick: called with the number of rows done.
    """
    if not precomputes_reference(recipe):
        return found
    done = 0
    parts = []
    for part in (found.train, found.eval, found.test):
        # In the precision of the policy's own pass: held-out rows are evaluated without autocast.
        precision = build_autocast(recipe, base) if part is found.train else nullcontext()
        with precision:
            parts.append(_add_reference_logps(recipe, base, part, reference, partial(_report_progress, tick, done)))
        done += len(part)
    return replace(found, train=parts[0], eval=parts[1], test=parts[2])


@contextmanager
def initial_model(reference: Reference) -> Iterator[None]:
    """The model that the training starts from, before its first step.

    A full run without a copy of its base cannot switch to the base. Before the first step it still is the base.
    """
    with ExitStack() as stack:
        with suppress(RunError):
            stack.enter_context(reference())
        yield


def _report_progress(tick: Callable[[int], None], before: int, done: int) -> None:
    tick(before + done)


def _add_reference_logps(recipe: Recipe, base: Family, encoded: Sequence[TokenizedExample], reference: Reference,
                         tick: Callable[[int], None]) -> list[TokenizedExample]:
    """Each example with `reference_logps`: one number for each of its predictions, in their order."""
    examples, done = list(encoded), 0
    for start in range(0, len(examples), GROUP):
        for row in rows.assign_rows(examples[start:start + GROUP], resolve_micro_batch_tokens(recipe, base)):
            indices = [start + i for i in row]
            batch = rows.build_batch([examples[i] for i in indices]).to(base.device)
            logps = compute_reference_logps(base, batch, partial(initial_model, reference)).cpu()  # [P]
            sizes = [sum(len(span.predicted) for span in examples[i].spans) for i in indices]
            for i, own in zip(indices, logps.split(sizes), strict=True):
                examples[i] = replace(examples[i], precomputed={"reference_logps": own.clone()})
            done += len(indices)
            tick(done)
    return examples


def build_autocast(recipe: Recipe, base: Family) -> AbstractContextManager[Any]:
    """The autocast context of the recipe's precision."""
    if recipe.training.precision == "bf16":
        return torch.autocast(base.device.type, torch.bfloat16)
    return nullcontext()
