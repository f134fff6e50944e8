"""Base class of all objectives, with defaults, and the helpers that several objectives share.

Read `core/protocols.py` (Objective) first, then `cross_entropy.py`.

Shape letters: A items, G groups (examples with several items), K items of the largest group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor

from luthier.core.config import Config
from luthier.core.errors import DataError
from luthier.core.protocols import Head
from luthier.core.types import LossInputs, Outputs

Metrics = Mapping[str, tuple[Tensor, Tensor | float]]

PRECOMPUTE_HELP = (
    "compute the reference log-probabilities of every row once, before training, instead of in every step: this saves "
    "the reference's forward passes, and a method that changes the base's own weights needs no copy of them")


class ObjectiveConfig(Config):
    """Settings of an objective. Called with outputs and target it returns a `Loss`; it is a pure function of them.

    Class attributes:
        example_types: names of the example types that the objective can learn from.
        required_outputs: the fields of `Outputs` that the loss reads.
        needs_full_batch: whether the rows of a batch interact in the loss, as in-batch negatives do.
        has_eval_metrics: whether `compute_eval_metrics` returns anything.
        supports_soft_labels: whether a label may be a mixture of classes.
        is_online: whether the objective trains on completions that the model itself generates.
        uses_masking: whether encoders and sequence-to-sequence models predict masked tokens.
        learning_rate_factor: factor on the method's default learning rate, used where the recipe gives no rate.
    """

    example_types: ClassVar[frozenset[str]]
    required_outputs: ClassVar[frozenset[str]]
    needs_full_batch: ClassVar[bool] = False
    has_eval_metrics: ClassVar[bool] = False
    supports_soft_labels: ClassVar[bool] = False
    is_online: ClassVar[bool] = False
    uses_masking: ClassVar[bool] = False
    learning_rate_factor: ClassVar[float] = 1.0

    @property
    def variant(self) -> str:
        """The name of the loss: the objective's own, or the `loss_type` where it has several."""
        return str(type(self).model_fields["name"].default)

    @property
    def heads(self) -> tuple[Head, ...]:
        """The heads that the model must have for this objective."""
        return ()

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The class names by index; empty: taken from the training rows; None: labels are not classes."""
        return None

    def with_labels(self, labels: tuple[str, ...], counts: Mapping[str, float] | None = None) -> Self:
        """A copy for the labels of the training rows; `counts` is the number of rows of each label."""
        return self

    def compute_eval_metrics(self, outputs: Outputs, target: LossInputs) -> dict[str, float]:
        """Metrics over all held-out rows at once that cannot be summed over batches."""
        return {}


# ---------------------------------------------------------------- metrics


def count_correct_pairs(better: Tensor, worse: Tensor) -> Tensor:
    """1 where the better one has the larger score, 0 where it has the smaller one, 0.5 where both are equal."""
    return ((better > worse).float() + (better >= worse).float()) / 2


def sum_and_count(values: Mapping[str, Tensor]) -> Metrics:
    """Each metric as (sum, count) over all elements. Booleans count as 0 and 1."""
    return {name: (value.detach().to(torch.promote_types(value.dtype, torch.float32)).sum(), float(value.numel()))
            for name, value in values.items()}


def upcast_to_float32(values: Tensor) -> Tensor:
    """float16 and bfloat16 become float32; wider types stay."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


# ---------------------------------------------------------------- weights and groups


def get_item_weights(target: LossInputs) -> Tensor:
    """The loss weight of each item, 1 where the batch has none. Returns [A]."""
    weights = target.item_weights
    return weights if weights.shape[0] else torch.ones(target.labeled_segments.shape[0], device=weights.device)  # [A]


def get_group_weights(target: LossInputs, table: Tensor) -> Tensor:
    """The loss weight of each group. Returns [G].

    Args:
        table: [G, K] from `build_group_table`. All items of a group have the same weight, so the first is read.
    """
    return get_item_weights(target)[table[:, 0]]  # [G]


def build_group_table(target: LossInputs) -> Tensor:
    """The item indices of each group in their order, padded with -1. Returns [G, K]."""
    order = target.groups.argsort(stable=True)  # [A] items sorted by group
    _, group, sizes = target.groups[order].unique_consecutive(return_inverse=True, return_counts=True)  # [A], [G]
    column = torch.arange(order.shape[0], device=order.device) - (sizes.cumsum(0) - sizes)[group]  # [A]
    table = order.new_full((sizes.shape[0], int(sizes.max())), -1)  # [G, K]
    table[group, column] = order
    return table


def gather_by_group(values: Tensor, table: Tensor, fill: float) -> Tensor:
    """Values of items, [A], arranged as `table` is; `fill` where the table is padded. Returns [G, K]."""
    return torch.where(table < 0, fill, values[table.clamp(min=0)])  # [G, K]


def compare_ranks(target: LossInputs) -> tuple[Tensor, Tensor]:
    """Which items of a group are better than which: lower ranks are better.

    Returns:
        table: [G, K] from `build_group_table`.
        better: [G, K, K] bool, true at (g, i, j) where item i of group g has a lower rank than item j.

    Raises:
        DataError: if no item of a group is better than another.
    """
    table = build_group_table(target)  # [G, K]
    ranks = gather_by_group(target.labels, table, torch.inf)  # [G, K]
    # Padding has the rank inf, so it is never the better one; it must not be the worse one either.
    better = (ranks[:, :, None] < ranks[:, None, :]) & (table >= 0)[:, None, :]  # [G, K, K]
    if not bool(better.any((1, 2)).all()):
        raise DataError("an example has no two answers with different ranks; preferences need at least two",
                        "remove rows with a single answer and rows whose answers all have the same rank")
    return table, better
