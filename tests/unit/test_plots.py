"""Numbers by name are put together as they were, and pictures of other numbers are other pictures."""

from __future__ import annotations

from pathlib import Path

import torch

from cases import cases
from luthier.objectives import metrics
from luthier.reporting.plots import collect_calibration, collect_confusion, plot_calibration, plot_confusion


def test_a_confusion_matrix(tmp_path: Path) -> None:
    case = cases()["classify"]
    truth, found = case.target.labels.long(), case.outputs.scores.argmax(-1)
    matrix = collect_confusion(case.objective.compute_eval_metrics(case.outputs, case.target), 3)
    assert matrix == [[float(((truth == i) & (found == j)).sum()) for j in range(3)] for i in range(3)]
    assert sum(map(sum, matrix)) == 9
    plot_confusion(matrix, "abc", tmp_path / "one.png")
    plot_confusion(matrix[::-1], "abc", tmp_path / "other.png")
    one, other = ((tmp_path / f"{name}.png").read_bytes() for name in ("one", "other"))
    assert one.startswith(b"\x89PNG")
    assert one != other


def test_a_calibration(tmp_path: Path) -> None:
    chances = torch.linspace(0.1, 0.95, 20)
    bins = collect_calibration(metrics.compute_calibration(chances, bins=20))
    assert bins == sorted(bins)
    assert sum(n for *_, n in bins) == 20
    assert all(0.5 <= predicted <= 1 for predicted, _, _ in bins)
    plot_calibration(bins, tmp_path / "one.png")
    plot_calibration(bins[:3], tmp_path / "other.png")
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "other.png").read_bytes()
