"""Plots of a run: training, lengths, confusion, calibration, comparisons. There is no simpler file to read first.

Metrics are plain numbers by name (`confusion_0_1`, `calibration_count_7`); `collect_confusion` and
`collect_calibration` select those of one plot.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Bin = tuple[float, float, float]  # mean confidence, fraction correct, count


def plot_metrics(numbers: Mapping[str, float], labels: Sequence[str], folder: Path) -> None:
    """Write `confusion.png` and `calibration.png` into a folder, where the metrics hold their values."""
    if any(name.startswith("confusion_") for name in numbers):
        plot_confusion(collect_confusion(numbers, len(labels)), labels, folder / "confusion.png")
    if bins := collect_calibration(numbers):
        plot_calibration(bins, folder / "calibration.png")


def collect_confusion(numbers: Mapping[str, float], classes: int) -> list[list[float]]:
    """[classes][classes] how often the class of the row was predicted as the class of the column."""
    return [[numbers.get(f"confusion_{i}_{j}", 0.0) for j in range(classes)] for i in range(classes)]


def collect_calibration(numbers: Mapping[str, float]) -> list[Bin]:
    """The bins that are not empty, from the least to the most confident."""
    found = sorted(int(name.rpartition("_")[2]) for name in numbers if re.fullmatch(r"calibration_count_\d+", name))
    return [(numbers[f"calibration_predicted_{b}"], numbers[f"calibration_observed_{b}"],
             numbers[f"calibration_count_{b}"]) for b in found]


def plot_confusion(matrix: Sequence[Sequence[float]], labels: Sequence[str], path: Path) -> None:
    """A confusion matrix as a PNG: the shade is the fraction of the true class, the numbers are counts."""
    side = max(4.0, 0.6 * len(labels) + 2)
    figure, axes = _create_figure((side, side))
    shares = [[count / max(sum(row), 1) for count in row] for row in matrix]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(labels) <= 20:  # of more, the numbers would not be read
        for i, row in enumerate(matrix):
            for j, count in enumerate(row):
                dark = shares[i][j] > 0.5
                axes.text(j, i, f"{count:g}", ha="center", va="center", color="white" if dark else "black")
    axes.set(xlabel="predicted class", ylabel="true class", title="Confusion matrix")
    axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
    axes.set_yticks(range(len(labels)), labels)
    figure.savefig(path, dpi=120)


def plot_calibration(bins: Sequence[Bin], path: Path) -> None:
    """Accuracy of predictions by their confidence, as a PNG; the diagonal is perfect calibration."""
    figure, axes = _create_figure((4.5, 4.5))
    most = max(count for *_, count in bins)
    axes.plot([0.5, 1], [0.5, 1], color="gray", linestyle="--", linewidth=1, label="perfect calibration")
    axes.scatter([p for p, _, _ in bins], [o for _, o, _ in bins], s=[20 + 180 * n / most for *_, n in bins],
                 label="observed (area: number of examples)")
    axes.set(xlabel="predicted probability", ylabel="observed frequency", title="Calibration",
             xlim=(0.48, 1.02), ylim=(-0.02, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def plot_bars(names: Sequence[str], columns: Mapping[str, Sequence[float]], path: Path) -> None:
    """One column of horizontal bars for each title, a bar for each name, as a PNG."""
    size = (3.75 * len(columns), 0.6 + 0.32 * max(len(names), 4))
    figure, axes = _create_figure(size, columns=len(columns), share_y=True)
    for axis, (title, values) in zip(axes, columns.items(), strict=True):
        drawn = axis.barh(names, values, color="#b5541c")
        axis.bar_label(drawn, fmt="%.3g", padding=2)
        axis.set_title(title, fontsize=10)
        axis.margins(x=0.2)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=110)


# The unit of an objective's loss; each other objective's is per example.
LOSS_UNITS = {**dict.fromkeys(("sft", "pretrain"), "nats per token"), **dict.fromkeys(("ppo", "grpo"), ""),
              **dict.fromkeys(("dpo", "orpo", "simpo", "reward"), "per pair"), "multiple_choice": "nats per question",
              "classify": "per example"}
# Metric -> the name of its axis. The first of a group that a run has is shown, below the loss.
QUALITIES = ({"accuracy": "accuracy", "rewards/accuracies": "pair accuracy", "token_accuracy": "token accuracy"},
             {"kl": "KL (nats per answer)"})
RATES = {"learning_rate": "learning rate"}


def plot_training(metrics: Sequence[Mapping[str, Any]], results: Mapping[str, Any], objective: str,
                  path: Path) -> bool:
    """The curves of a run as a PNG: its loss (or reward), its accuracy (or KL), and its learning rate.

    Each panel has the training curve, the validation curve, and what was measured before training as a point at step
    0: on validation rows it begins the validation curve, on test rows it is a series of its own with two points.

    Args:
        metrics: the lines of metrics.jsonl.
        results: results.json.

    Returns:
        Whether there was anything to plot; otherwise no file is written.
    """
    unit = LOSS_UNITS.get(objective, "per example")
    main = {"reward": "mean reward"} if objective in ("ppo", "grpo") else {"loss": f"loss ({unit})"}
    panels = []
    for group in (main, *QUALITIES, RATES):
        shown = ((label, _collect_curves(metrics, results, name)) for name, label in group.items())
        panels += [panel for panel in shown if panel[1]][:1]
    if not any(label not in RATES.values() for label, _ in panels):
        return False
    figure, plots = _create_figure((7, 1.2 + 2.4 * len(panels)), rows=len(panels))
    for axes, (label, curves) in zip(plots, panels, strict=True):
        for curve, points in curves.items():
            name, style = CURVES[curve]
            axes.plot(*zip(*points, strict=True), label=name, **style)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if label not in RATES.values():
            axes.legend()
    plots[0].set_title(f"Training with objective {objective}")
    plots[-1].set_xlabel("step")
    figure.savefig(path, dpi=120)
    return True


CURVES: dict[str, tuple[str, dict[str, Any]]] = {
    "train": ("training", {"color": "tab:blue", "linewidth": 1.2, "marker": ".", "markersize": 3}),
    "eval": ("validation", {"color": "tab:orange", "linewidth": 1.8, "marker": "o", "markersize": 4}),
    "test": ("test, before and after", {"color": "tab:green", "linestyle": ":", "marker": "s", "markersize": 5})}


def _collect_curves(metrics: Sequence[Mapping[str, Any]], results: Mapping[str, Any],
                    name: str) -> dict[str, list[tuple[float, float]]]:
    """The points of a metric by curve (a key of `CURVES`), without empty curves and numbers that are not finite."""
    curves: dict[str, list[tuple[float, Any]]] = {
        "train": [(line["step"], line.get(name)) for line in metrics],
        "eval": [(0, _read_result(results, "validation_before", name)),
                 *((line["step"], line.get(f"eval_{name}")) for line in metrics)],
        "test": [(0, _read_result(results, "test_before", name)),
                 (results.get("steps", 0), _read_result(results, "test", name))]}
    kept = {curve: [(step, value) for step, value in points if isinstance(value, int | float) and math.isfinite(value)]
            for curve, points in curves.items()}
    return {curve: points for curve, points in kept.items() if points}


def _read_result(results: Mapping[str, Any], part: str, name: str) -> Any:
    measured = results.get(part)
    return measured.get(name) if isinstance(measured, Mapping) else None


def plot_lengths(parts: Mapping[str, Any], path: str | Path) -> None:
    """The token lengths of every part of a data report as a PNG of histograms; none where no part has an example."""
    parts = {name: part for name, part in parts.items() if part.encoded}
    if not parts:
        return
    figure, axes = _create_figure((7, 2.6 * len(parts)), rows=len(parts))
    for axis, (name, part) in zip(axes, parts.items(), strict=True):
        axis.stairs(part.histogram["counts"], part.histogram["edges"], fill=True)
        axis.set(title=f"{name}: {part.encoded} examples, {part.tokens} tokens",
                 xlabel="tokens in an example", ylabel="examples")
        axis.axvline(part.lengths["median"], color="black", linewidth=1)
    figure.savefig(path, dpi=120)


def plot_rlhf(metrics: Sequence[Mapping[str, float]], rewards: Mapping[str, float], prompts: int, path: Path) -> None:
    """Reward and KL of every PPO step, and the mean reward of each policy on held-out prompts, as a PNG."""
    figure, (left, right) = _create_figure((10, 4), columns=2)
    for axes, name in ((left, "reward"), (left.twinx(), "kl")):
        points = [(m["step"], m[name]) for m in metrics if name in m]
        color = "tab:blue" if name == "reward" else "tab:orange"
        if points:
            axes.plot(*zip(*points, strict=True), color=color)
        axes.set_ylabel("mean reward" if name == "reward" else "KL (nats per answer)", color=color)
    left.set(xlabel="step", title="PPO")
    right.bar(list(rewards), list(rewards.values()))
    right.set(title=f"mean reward on {prompts} prompts", ylabel="mean reward")
    figure.savefig(path, dpi=120)


def plot_weight_changes(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Relative norm and effective rank of every weight's update, as two heat maps: a column for each layer, a row for
    each role."""
    roles = list(dict.fromkeys(row["role"] for row in rows))
    blocks = sorted({row["block"] for row in rows})
    figure, plots = _create_figure((max(6.0, 0.28 * len(blocks) + 2), 0.8 * len(roles) + 2.4), rows=2)
    titles = {"size": "norm of the change, relative to the weight's", "rank": "effective rank of the change"}
    for axes, (name, title) in zip(plots, titles.items(), strict=True):
        grid = [[float("nan")] * len(blocks) for _ in roles]
        for row in rows:
            grid[roles.index(row["role"])][blocks.index(row["block"])] = row[name]
        shown = axes.imshow(grid, aspect="auto", vmin=0)
        axes.set(title=title, xlabel="layer", yticks=range(len(roles)), yticklabels=roles)
        figure.colorbar(shown, ax=axes)
    figure.savefig(path, dpi=120)


def _create_figure(size: tuple[float, float], *, rows: int = 0, columns: int = 0,
                   share_y: bool = False) -> tuple[Any, Any]:
    """A figure without a window, with one plot, or with a list of `rows` or of `columns` plots.

    Args:
        size: width and height in inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and needed once, at the end
    from matplotlib.figure import Figure
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    if not rows and not columns:
        return figure, figure.subplots()
    return figure, list(figure.subplots(rows or 1, columns or 1, sharey=share_y, squeeze=False).flat)
