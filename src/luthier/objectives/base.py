"""What most objectives have in common, as defaults. Read `core/protocols.py` (Objective) first, then
`cross_entropy.py`.

Shape letters: A items, G groups, K items of the largest group, N comparisons.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor

from luthier.core.config import Config
from luthier.core.errors import DataError
from luthier.core.protocols import Head
from luthier.core.types import Outputs, Target

Metrics = Mapping[str, tuple[Tensor, Tensor | float]]

PRECOMPUTE = ("ask the reference once about every row, before anything trains, instead of in every step: saves its "
              "forward passes, and a method that changes the base's own weights needs no copy of them")


class ObjectiveConfig(Config):
    """Settings of an objective, which is itself a pure function of outputs and target."""

    example_types: ClassVar[frozenset[str]]
    required_outputs: ClassVar[frozenset[str]]
    needs_full_batch: ClassVar[bool] = False
    has_eval_metrics: ClassVar[bool] = False
    supports_soft_labels: ClassVar[bool] = False
    is_online: ClassVar[bool] = False  # whether it learns from the model's own answers
    uses_masking: ClassVar[bool] = False  # whether of a base that reads texts whole it hides what is to be predicted
    learning_rate_factor: ClassVar[float] = 1.0  # times the method's default rate: the default where none is given

    @property
    def heads(self) -> tuple[Head, ...]:
        return ()

    @property
    def classes(self) -> tuple[str, ...] | None:
        return None

    def with_labels(self, labels: tuple[str, ...], counts: Mapping[str, float] | None = None) -> Self:
        return self

    def compute_eval_metrics(self, outputs: Outputs, target: Target) -> dict[str, float]:
        return {}


def count_correct_pairs(better: Tensor, worse: Tensor) -> Tensor:
    """1 where the better one has the larger score, 0 where the smaller, one half where both are equal."""
    return ((better > worse).float() + (better >= worse).float()) / 2


def wide(values: Tensor) -> Tensor:
    """The same in float32 where it came in sixteen bits."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def sums(**values: Tensor) -> Metrics:
    """Each name's sum and how many numbers were added; truth values count as 0 and 1."""
    return {name: (value.detach().to(torch.promote_types(value.dtype, torch.float32)).sum(), float(value.numel()))
            for name, value in values.items()}


def item_weights(target: Target) -> Tensor:
    """[A] how much each item's loss counts; 1 where nobody said."""
    counted = target.item_weights
    return counted if counted.shape[0] else torch.ones(target.items.shape[0], device=counted.device)


def group_weights(target: Target, table: Tensor) -> Tensor:
    """[G] how much each group's loss counts. `table`: [G, K], see `grouped`."""
    return item_weights(target)[table[:, 0]]


def grouped(target: Target) -> Tensor:
    """[G, K] the items of each group by their indices, in their order; -1 where a group has fewer than K."""
    order = target.groups.argsort(stable=True)
    _, owner, sizes = target.groups[order].unique_consecutive(return_inverse=True, return_counts=True)
    place = torch.arange(order.shape[0], device=order.device) - (sizes.cumsum(0) - sizes)[owner]
    table = order.new_full((sizes.shape[0], int(sizes.max())), -1)
    table[owner, place] = order
    return table


def gathered(values: Tensor, table: Tensor, fill: float) -> Tensor:
    """[A] values as [G, K], `fill` where the table has no item."""
    return torch.where(table < 0, fill, values[table.clamp(min=0)])


def ranked(target: Target) -> tuple[Tensor, Tensor]:
    """The groups, and which of their items are better than which: [G, K] indices and [G, K, K] flags, true at (g, i, j)
    where the rank of i is below that of j. Raises `DataError` where a group compares nothing."""
    table = grouped(target)
    ranks = gathered(target.labels, table, torch.inf)
    better = (ranks[:, :, None] < ranks[:, None, :]) & (table >= 0)[:, None, :]
    if not bool(better.any((1, 2)).all()):
        raise DataError("an example has no two answers of which one is better: preferences compare at least two",
                        "leave out rows with a single answer, or whose answers all have the same rank")
    return table, better
