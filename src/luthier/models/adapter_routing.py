"""Routes segments and rows through different adapters. Read `core/protocols.py` (Router) first.

In a packed row each token is routed, in a padded batch each row. Layers that are recomputed in the backward pass use
the routing of their forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from luthier.core.errors import RunError
from luthier.core.protocols import Router
from luthier.core.types import SegmentTree


def route_segments(router: Router | None, segment_tree: SegmentTree, packed: bool) -> AbstractContextManager[None]:
    """A context in which every segment uses its own adapter (`segment_tree.adapters`); without any, nothing changes.
    Raises `RunError` without a router, or if a padded row would need two adapters."""
    chosen = segment_tree.adapters
    if not chosen:
        return nullcontext()
    assert len(chosen) == len(segment_tree.lengths), (len(chosen), len(segment_tree.lengths))
    if packed:
        return route_indices(router, 1, [a for a, n in zip(chosen, segment_tree.lengths, strict=True)
                                         for _ in range(n)])
    parents = set(segment_tree.parents)
    rows = [{chosen[a] for a in segment_tree.find_path(i)} for i in range(len(chosen)) if i not in parents]
    if any(len(row) > 1 for row in rows):
        raise RunError("a segment has a different adapter than its parent, and this base computes every document as "
                       "one padded row", "use one adapter for each document")
    return route_indices(router, 0, [min(row) for row in rows])


def route_indices(router: Router | None, dim: int, places: Sequence[int]) -> AbstractContextManager[None]:
    """See `Router`; with empty `places` nothing changes."""
    if not places:
        return nullcontext()
    if router is None:
        raise RunError("a batch has adapters, but the family has no router",
                       "set family.router to the object that holds the adapters")
    return router.route(dim, places)


def snapshot_routing(router: Router | None) -> AbstractContextManager[None]:
    """The context for recomputing a layer later, when the contexts of its forward pass may be closed."""
    return nullcontext() if router is None else router.snapshot()
