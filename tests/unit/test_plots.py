"""Numbers by name are put together as they were, and pictures of other numbers are other pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest
import torch

from cases import cases
from luthier.objectives import metrics
from luthier.reporting.plots import (
    collect_calibration,
    collect_confusion,
    plot_calibration,
    plot_confusion,
    plot_training,
)


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


LINES: list[dict[str, Any]] = [{"step": 0, "trainable": 3}, *({"step": n, "loss": 4.0 - n, "learning_rate": n / 1e4} for n in (1, 2, 3))]
REWARDS = [{"step": n, "loss": 0.1, "reward": n / 10, "kl": n / 100, "learning_rate": 1e-4} for n in (1, 2)]


def axes_of(monkeypatch: pytest.MonkeyPatch, path: Path, *given: Any) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Label of the axis -> name of the curve -> its points, of the figure that is saved."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}

    def save(figure: matplotlib.figure.Figure, _path: Path, **_: Any) -> None:
        for axes in figure.axes:
            found[axes.get_ylabel()] = {str(line.get_label()): [(float(x), float(y)) for x, y in line.get_xydata()]
                                        for line in axes.get_lines()}
        assert figure.axes[-1].get_xlabel() == "step"

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", save)
    assert plot_training(*given, path)
    return found


def test_a_run_begins_at_step_0_where_it_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = [*LINES, {"step": 2, "eval_loss": 2.5, "eval_accuracy": 0.5}]
    held = {"validation_before": {"loss": 5.0}, "validation": {"loss": 2.4}, "steps": 3}
    assert axes_of(monkeypatch, tmp_path / "a.png", lines, held, "sft") == {
        "loss (nats per token)": {"training": [(1, 3), (2, 2), (3, 1)], "validation": [(0, 5), (2, 2.5)]},
        "accuracy": {"validation": [(2, 0.5)]}, "learning rate": {"training": [(1, 1e-4), (2, 2e-4), (3, 3e-4)]}}
    tested = {"test_before": {"loss": 5.0}, "test": {"loss": 1.5}, "steps": 3}
    found = axes_of(monkeypatch, tmp_path / "a.png", lines, tested, "classify")
    assert found["loss (per example)"]["test, before and after"] == [(0, 5), (3, 1.5)]
    assert found["loss (per example)"]["validation"] == [(2, 2.5)]


def test_a_policy_is_shown_by_its_reward(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = axes_of(monkeypatch, tmp_path / "a.png", REWARDS, {"test_before": {"reward": -1.0}}, "grpo")
    assert list(found) == ["mean reward", "KL (nats per answer)", "learning rate"]
    assert found["mean reward"] == {"training": [(1, 0.1), (2, 0.2)], "test, before and after": [(0, -1)]}


@pytest.mark.parametrize("lines", [[], LINES[:1], [{"step": 1, "loss": float("nan"), "learning_rate": 1.0}]])
def test_a_run_without_metrics_has_no_plot(lines: list[dict[str, Any]], tmp_path: Path) -> None:
    assert not plot_training(lines, {}, "sft", tmp_path / "loss.png")
    assert not list(tmp_path.iterdir())
