"""Measures of held-out rows that no sum over batches gives. Plain functions of tensors; nothing simpler to read first.

Shape letters: N rows, C classes, M candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor


def confusion(truth: Tensor, found: Tensor, classes: int) -> Tensor:
    """[C, C] how often class i (row) was taken for class j (column); both [N] class numbers."""
    cells = (truth * classes + found).bincount(minlength=classes * classes)
    return cells.reshape(classes, classes).double()


def accuracy(matrix: Tensor) -> float:
    """The share on the diagonal of a confusion matrix."""
    return float(matrix.diagonal().sum() / matrix.sum())


def f1(hits: Tensor, truths: Tensor, finds: Tensor) -> tuple[float, float]:
    """(macro, micro) F1 = 2 hits / (truths + finds), each [C].

    Macro: the mean over classes that are there or were found; micro: of the sums over classes.
    """
    over, under = 2 * hits.double(), (truths + finds).double()
    seen = under > 0
    if not bool(seen.any()):
        return 0.0, 0.0
    return float((over[seen] / under[seen]).mean()), float(over.sum() / under.sum())


def mcc(matrix: Tensor) -> float:
    """Matthews' correlation of a [C, C] confusion matrix, in -1 to 1; 0 where it says nothing (Gorodkin 2004)."""
    truths, finds, rows = matrix.sum(1), matrix.sum(0), matrix.sum()
    over = matrix.diagonal().sum() * rows - truths @ finds
    under = (rows.square() - truths @ truths) * (rows.square() - finds @ finds)
    return float(over / under.sqrt()) if under > 0 else 0.0


def pearson(x: Tensor, y: Tensor) -> float:
    """Linear correlation of two [N], in -1 to 1; 0 where one of them is constant."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    under = (x @ x) * (y @ y)
    return float(x @ y / under.sqrt()) if under > 0 else 0.0


def spearman(x: Tensor, y: Tensor) -> float:
    """Pearson's correlation of the ranks; equal numbers share the mean of their ranks."""
    return pearson(_ranks(x), _ranks(y))


def _ranks(x: Tensor) -> Tensor:
    _, place, sizes = x.unique(return_inverse=True, return_counts=True)
    return (sizes.cumsum(0) - (sizes - 1) / 2).double()[place]


def retrieval(similar: Tensor, relevant: Tensor, candidate: Tensor) -> dict[str, float]:
    """Mean reciprocal rank, and the share of queries with something relevant among the first 1, 5 and 10.

    The rank is that of the best relevant candidate among the irrelevant ones: 1, and one more for each that is more
    similar; of those equally similar half count. Queries without a relevant candidate are left out.

    Args:
        similar: [N, M] of every query to every candidate.
        relevant: [N, M] flags.
        candidate: [N, M] flags, false where something stands for the query itself.
    """
    asked = (relevant & candidate).any(1)
    similar, relevant, candidate = similar[asked], relevant[asked], candidate[asked]
    if not similar.shape[0]:
        return {}
    best = similar.masked_fill(~(relevant & candidate), -torch.inf).amax(1, keepdim=True)
    wrong = candidate & ~relevant
    rank = 1 + ((similar > best) & wrong).sum(1) + ((similar == best) & wrong).sum(1) / 2
    recalls = {f"recall_at_{k}": float((rank <= k).double().mean()) for k in (1, 5, 10)}
    return {"mrr": float(rank.double().reciprocal().mean()), **recalls}


def calibration(predicted: Tensor, bins: int = 10) -> dict[str, float]:
    """How far the probabilities that were given to the true outcomes of N two-way choices can be believed.

    A choice is counted by the side that was held more likely, so confidence lies between 1/2 and 1 and its bins have
    equal width. Of each bin b that is not empty: `calibration_predicted_b`, the mean confidence;
    `calibration_observed_b`, how often that side was right; `calibration_count_b`. And `calibration_error` = sum_b
    count_b |predicted_b - observed_b| / N (Guo et al. 2017, arXiv:1706.04599, eq. 5).

    Args:
        predicted: [N] probability given to the side that is right.
    """
    predicted = predicted.double()
    confidence = torch.maximum(predicted, 1 - predicted)
    right = torch.where(predicted == 0.5, 0.5, (predicted > 0.5).double())
    home = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    found: dict[str, float] = {}
    error = 0.0
    for b in home.unique().tolist():
        held, seen = confidence[home == b], right[home == b]
        found |= {f"calibration_predicted_{b}": float(held.mean()), f"calibration_observed_{b}": float(seen.mean()),
                  f"calibration_count_{b}": float(held.numel())}
        error += abs(float(held.sum() - seen.sum())) / predicted.numel()
    return {**found, "calibration_error": error}
