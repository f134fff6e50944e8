"""Evaluation metrics that cannot be summed over batches. Plain functions of tensors; there is nothing to read first.

Shape letters: N rows, C classes, M candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor


def compute_confusion_matrix(truth: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """How often class i (row) was predicted as class j (column); both arguments are [N] class indices."""
    cells = (truth * classes + predicted).bincount(minlength=classes * classes)  # [C * C]
    return cells.reshape(classes, classes).double()  # [C, C]


def compute_f1(correct: Tensor, true_counts: Tensor, predicted_counts: Tensor) -> tuple[float, float]:
    """(macro, micro) F1 = 2 correct / (true_counts + predicted_counts), each [C].

    Macro is the mean over classes that are true or predicted at least once; micro is F1 of the sums over classes.
    """
    numerator, denominator = 2 * correct.double(), (true_counts + predicted_counts).double()  # [C]
    seen = denominator > 0  # [C]
    if not bool(seen.any()):
        return 0.0, 0.0
    return float((numerator[seen] / denominator[seen]).mean()), float(numerator.sum() / denominator.sum())


def compute_mcc(matrix: Tensor) -> float:
    """Matthews correlation coefficient of a [C, C] confusion matrix, -1 to 1; 0 where it is undefined (Gorodkin 2004).
    """
    true_counts, predicted_counts, rows = matrix.sum(1), matrix.sum(0), matrix.sum()  # [C], [C], []
    numerator = matrix.diagonal().sum() * rows - true_counts @ predicted_counts
    denominator = (rows.square() - true_counts @ true_counts) * (rows.square() - predicted_counts @ predicted_counts)
    return float(numerator / denominator.sqrt()) if denominator > 0 else 0.0


def compute_pearson(x: Tensor, y: Tensor) -> float:
    """Linear correlation of two [N], -1 to 1; 0 where one of them is constant."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()  # [N]
    squares = (x @ x) * (y @ y)  # []
    return float(x @ y / squares.sqrt()) if squares > 0 else 0.0


def compute_spearman(x: Tensor, y: Tensor) -> float:
    """Pearson correlation of the ranks; equal values share the mean of their ranks."""
    return compute_pearson(_compute_ranks(x), _compute_ranks(y))


def _compute_ranks(x: Tensor) -> Tensor:
    _, index, sizes = x.unique(return_inverse=True, return_counts=True)
    return (sizes.cumsum(0) - (sizes - 1) / 2).double()[index]  # [N]


def compute_retrieval_metrics(similar: Tensor, relevant: Tensor, candidate: Tensor) -> dict[str, float]:
    """Mean reciprocal rank, and the share of queries with a relevant candidate among the first 1, 5 and 10.

    The rank is that of the best relevant candidate among the irrelevant ones: 1, plus one for each irrelevant candidate
    that is more similar, plus one half for each that is equally similar. Queries without a relevant candidate are
    omitted.

    Args:
        similar: [N, M] similarity of every query to every candidate.
        relevant: [N, M] bool.
        candidate: [N, M] bool, false where a candidate is the query itself.
    """
    answerable = (relevant & candidate).any(1)  # [N]
    similar, relevant, candidate = similar[answerable], relevant[answerable], candidate[answerable]
    if not similar.shape[0]:
        return {}
    best = similar.masked_fill(~(relevant & candidate), -torch.inf).amax(1, keepdim=True)  # [N, 1]
    irrelevant = candidate & ~relevant  # [N, M]
    rank = 1 + ((similar > best) & irrelevant).sum(1) + ((similar == best) & irrelevant).sum(1) / 2  # [N]
    recalls = {f"recall_at_{k}": float((rank <= k).double().mean()) for k in (1, 5, 10)}
    return {"mrr": float(rank.double().reciprocal().mean()), **recalls}


def compute_calibration(predicted: Tensor, bins: int = 10) -> dict[str, float]:
    """Calibration of the probabilities that were given to the true outcomes of N two-way choices.

    A choice is counted by the side with the larger probability. Confidence is therefore between 1/2 and 1, and its bins
    have equal width. For each bin b that is not empty: `calibration_predicted_b`, the mean confidence;
    `calibration_observed_b`, how often that side was right; `calibration_count_b`, the number of choices. And
    `calibration_error` = sum_b count_b |predicted_b - observed_b| / N (Guo et al. 2017, arXiv:1706.04599, eq. 5).

    Args:
        predicted: [N] probability given to the side that is right.
    """
    predicted = predicted.double()  # [N]
    confidence = torch.maximum(predicted, 1 - predicted)  # [N]
    correct = torch.where(predicted == 0.5, 0.5, (predicted > 0.5).double())  # [N]
    bin_index = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)  # [N]
    results: dict[str, float] = {}
    error = 0.0
    for b in bin_index.unique().tolist():
        expected, observed = confidence[bin_index == b], correct[bin_index == b]  # [n_b]
        results |= {f"calibration_predicted_{b}": float(expected.mean()),
                    f"calibration_observed_{b}": float(observed.mean()),
                    f"calibration_count_{b}": float(expected.numel())}
        error += abs(float(expected.sum() - observed.sum())) / predicted.numel()
    return {**results, "calibration_error": error}
