"""The model that an objective compares with, where it costs something. Read `initialization.py` first.

What it is says `starts.beside`. An adapter is switched off for it, at no cost but a second forward pass. A method that
changes the base's own weights has three ways:

    a copy          of what trains, exchanged for that pass (`method.keep_base`)
    beforehand      every row's log-probabilities, computed once before anything trains and kept with the row
                    (`objective.precompute_reference`): no copy and no second pass, under any method
    none            where the objective has no reference
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from luthier import data as rows
from luthier.assembly.factory import resolve_max_tokens
from luthier.assembly.recipe import Recipe, needs_reference, precomputes_reference
from luthier.core.errors import RunError
from luthier.core.protocols import Attached, Family
from luthier.core.types import Encoded
from luthier.data import Datasets
from luthier.methods.composite import Several
from luthier.methods.full import Full
from luthier.training.optimizer import needs_master
from luthier.training.step import Reference, reference_logps

GROUP = 512  # examples that are packed together


def price(made: Recipe, attached: Attached) -> str:
    """A sentence on the copy of the base's weights that the reference costs; empty where there is none."""
    parts = attached.parts if isinstance(attached, Several) else (attached,)
    copies = [part.copied for part in parts if isinstance(part, Full)]
    count, size = (sum(sizes) for sizes in zip(*copies, strict=True)) if copies else (0, 0)
    if not count or not needs_reference(made.objective) or precomputes_reference(made):
        return ""
    without = ("; objective.precompute_reference: true would do without"
               if "precompute_reference" in type(made.objective).model_fields else "")
    return (f"{made.method.name} keeps a copy of the {count:,} weights that it trains ({size / 1e9:.3g} GB), with "
            f"which {made.objective.name} compares the model{without}")


def master_price(attached: Attached) -> str:
    """A sentence on the float32 copies that the optimizer keeps of what trains; empty where there are none."""
    copied = [p for p in attached.parameters().values() if needs_master(p)]
    if not copied:
        return ""
    count, dtypes = sum(p.numel() for p in copied), sorted({str(p.dtype).removeprefix("torch.") for p in copied})
    return (f"the {count:,} weights that train are kept in {' and '.join(dtypes)}, so the optimizer updates float32 "
            f"copies of them ({4 * count / 1e9:.3g} GB) and rounds them into the model after each step; model.dtype: "
            "float32 with training.precision: bf16 takes 2 bytes a weight less")


def asked(made: Recipe, base: Family, found: Datasets, reference: Reference,
          tick: Callable[[int], None] = lambda done: None) -> Datasets:
    """The rows with what the reference says of them, where the recipe wants it beforehand; else as they are. To be
    called before anything has trained.

    Args:
        tick: told how many rows are done.
    """
    if not precomputes_reference(made):
        return found
    done = 0
    told = []
    for part in (found.train, found.eval, found.test):
        # In the precision of what it is compared with: held-out rows are measured without autocast.
        precision = autocast(made, base) if part is found.train else nullcontext()
        with precision:
            told.append(_known(made, base, part, reference, partial(_sum, tick, done)))
        done += len(part)
    return replace(found, train=told[0], eval=told[1], test=told[2])


@contextmanager
def untrained(reference: Reference) -> Iterator[None]:
    """The model that the training starts from. A full run without a copy of its base cannot be switched to it, and
    before its first step need not be."""
    with ExitStack() as stack:
        with suppress(RunError):
            stack.enter_context(reference())
        yield


def _sum(tick: Callable[[int], None], before: int, done: int) -> None:
    tick(before + done)


def _known(made: Recipe, base: Family, encoded: Sequence[Encoded], reference: Reference,
           tick: Callable[[int], None]) -> list[Encoded]:
    """Each example with the column `reference_logps`: one number for each of its predictions, in their order."""
    found, done = list(encoded), 0
    for start in range(0, len(found), GROUP):
        for row in rows.first_fit(found[start:start + GROUP], resolve_max_tokens(made, base)):
            places = [start + i for i in row]
            there = rows.batch([found[i] for i in places]).to(base.device)
            logps = reference_logps(base, there, partial(untrained, reference)).cpu()
            sizes = [sum(len(piece.predicted) for piece in found[i].pieces) for i in places]
            for i, own in zip(places, logps.split(sizes), strict=True):
                found[i] = replace(found[i], known={"reference_logps": own.clone()})
            done += len(places)
            tick(done)
    return found


def autocast(made: Recipe, base: Family) -> AbstractContextManager[Any]:
    """Mixed precision, where the recipe trains in it."""
    if made.training.precision == "bf16":
        return torch.autocast(base.device.type, torch.bfloat16)
    return nullcontext()
