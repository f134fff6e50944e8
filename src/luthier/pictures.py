"""Pictures of measures, and the way from a measure's numbers to what is drawn. Nothing simpler to read first.

`quality` of an objective gives plain numbers by name (`confusion_0_1`, `calibration_count_7`); these functions put them
together again, for a verb that wants to show them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Bin = tuple[float, float, float]  # mean confidence, share that was right, how many


def draw(numbers: Mapping[str, float], labels: Sequence[str], folder: Path) -> None:
    """Write `confusion.png` and `calibration.png` into a folder, as far as the numbers of a measure hold them."""
    if any(name.startswith("confusion_") for name in numbers):
        confusion_picture(confusion_of(numbers, len(labels)), labels, folder / "confusion.png")
    if bins := calibration_of(numbers):
        calibration_picture(bins, folder / "calibration.png")


def confusion_of(numbers: Mapping[str, float], classes: int) -> list[list[float]]:
    """[classes][classes] how often the class of the row was taken for that of the column."""
    return [[numbers.get(f"confusion_{i}_{j}", 0.0) for j in range(classes)] for i in range(classes)]


def calibration_of(numbers: Mapping[str, float]) -> list[Bin]:
    """The bins that are not empty, from the least to the most confident."""
    found = sorted(int(name.rpartition("_")[2]) for name in numbers if re.fullmatch(r"calibration_count_\d+", name))
    return [(numbers[f"calibration_predicted_{b}"], numbers[f"calibration_observed_{b}"],
             numbers[f"calibration_count_{b}"]) for b in found]


def confusion_picture(matrix: Sequence[Sequence[float]], labels: Sequence[str], path: Path) -> None:
    """A confusion matrix as a PNG: the shade is the share of a true class, the numbers are counts."""
    figure, axes = _figure(max(4.0, 0.6 * len(labels) + 2))
    shares = [[count / max(sum(row), 1) for count in row] for row in matrix]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(labels) <= 20:  # of more, the numbers would not be read
        for i, row in enumerate(matrix):
            for j, count in enumerate(row):
                dark = shares[i][j] > 0.5
                axes.text(j, i, f"{count:g}", ha="center", va="center", color="white" if dark else "black")
    axes.set(xlabel="found", ylabel="true", title="Confusion matrix")
    axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
    axes.set_yticks(range(len(labels)), labels)
    figure.savefig(path, dpi=120)


def calibration_picture(bins: Sequence[Bin], path: Path) -> None:
    """How often the side held more likely was right, by how likely it was held, as a PNG; the diagonal is honest."""
    figure, axes = _figure(4.5)
    most = max(count for *_, count in bins)
    axes.plot([0.5, 1], [0.5, 1], color="grey", linestyle="--", linewidth=1, label="honest")
    axes.scatter([p for p, _, _ in bins], [o for _, o, _ in bins], s=[20 + 180 * n / most for *_, n in bins],
                 label="observed (size: how many)")
    axes.set(xlabel="predicted", ylabel="observed", title="Calibration", xlim=(0.48, 1.02), ylim=(-0.02, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def bars(names: Sequence[str], columns: Mapping[str, Sequence[float]], path: Path) -> None:
    """One column of horizontal bars for each title, a bar for each name, as a PNG."""
    figure, axes = _figure(0.6 + 0.32 * max(len(names), 4), len(columns))
    for axis, (title, values) in zip(axes, columns.items(), strict=True):
        drawn = axis.barh(names, values, color="#b5541c")
        axis.bar_label(drawn, fmt="%.3g", padding=2)
        axis.set_title(title, fontsize=10)
        axis.margins(x=0.2)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=110)


def _figure(size: float, columns: int = 0) -> tuple[Any, Any]:
    """A figure that no window is opened for: square with one plot, or so high with several side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and needed once, at the end
    from matplotlib.figure import Figure
    figure = Figure(figsize=(3.75 * columns or size, size), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, sharey=True, squeeze=False)[0] if columns else figure.subplots()
