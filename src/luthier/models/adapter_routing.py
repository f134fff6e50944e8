"""Segments and rows through adapters of their own: what a family asks of its router. Read `core/protocols.py` (Router)
first.

A packed row is told apart by its tokens, a padded batch by its rows. What is recomputed in the backward pass finds the
setting of its forward pass again.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from luthier.core.errors import RunError
from luthier.core.protocols import Router
from luthier.core.types import SegmentTree


def route_segments(router: Router | None, forest: SegmentTree, packed: bool) -> AbstractContextManager[None]:
    """While open, every segment goes through the adapter that the forest names for it; nothing changes where it names
    none. Raises `RunError` without a router, or where a padded row would need two adapters."""
    chosen = forest.adapters
    if not chosen:
        return nullcontext()
    assert len(chosen) == len(forest.lengths), (len(chosen), len(forest.lengths))
    if packed:
        return route_indices(router, 1, [a for a, n in zip(chosen, forest.lengths, strict=True) for _ in range(n)])
    parents = set(forest.parents)
    rows = [{chosen[a] for a in forest.find_path(i)} for i in range(len(chosen)) if i not in parents]
    if any(len(row) > 1 for row in rows):
        raise RunError("a segment goes through another adapter than the one that it continues, and this base computes "
                       "every document as one padded row", "send whole documents through one adapter")
    return route_indices(router, 0, [min(row) for row in rows])


def route_indices(router: Router | None, dim: int, places: Sequence[int]) -> AbstractContextManager[None]:
    """See `Router.routed`; `places` empty: everything stays as it is."""
    if not places:
        return nullcontext()
    if router is None:
        raise RunError("a batch names adapters for its rows, and the base has no manager to find them in",
                       "set family.router to the manager that they were added to")
    return router.route(dim, places)


def snapshot_routing(router: Router | None) -> AbstractContextManager[None]:
    """The context of a block's recomputation, when every context of now may be closed."""
    return nullcontext() if router is None else router.snapshot()
