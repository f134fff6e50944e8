"""The table of a comparison of methods, as Markdown. There is no simpler file to read first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def format_table(comparison: Mapping[str, Any]) -> str:
    """The comparison in Markdown: a summary, then the table."""
    general, rows = comparison.get("general_before"), comparison["methods"]
    aside = f"other text, {comparison.get('general')}"
    first = next((row for row in rows if row["perplexity_before"] is not None), None)
    has_perplexity = first is not None and comparison["metric"] != "perplexity"
    titles = ["method", str(comparison["metric"]), *(["perplexity"] if has_perplexity else []),
              *([aside] if general is not None else []), "trains", "seconds", "peak GB", "file MB", "rate"]
    cells = []
    if comparison["base"] is not None:
        cells.append({"method": "base", comparison["metric"]: f"{comparison['base']:.3g}",
                      "perplexity": _format_number(first and first["perplexity_before"]),
                      aside: _format_number(general)})
    for row in rows:
        cells.append({"method": row["method"], comparison["metric"]: f"{row['after']:.3g}",
                      "perplexity": _format_number(row["perplexity"]), aside: _format_number(row["general"]),
                      "trains": f"{row['trainable_fraction']:.3%}", "seconds": f"{row['train_seconds']:.0f}",
                      "peak GB": f"{row['peak_memory_gb']:.2f}", "file MB": f"{row['file_bytes'] / 1e6:.2f}",
                      "rate": f"{row['rate']:.1g}"})
    lines = [titles, ["---"] * len(titles), *([cell.get(title, "") for title in titles] for cell in cells)]
    measured = f"\nMeasured on {rows[0]['examples']} {rows[0]['measured_on']} rows.\n"
    return _summarize(comparison) + "".join(f"| {' | '.join(line)} |\n" for line in lines) + measured


def _summarize(comparison: Mapping[str, Any]) -> str:
    """The range of the metric, and the methods with the fewest seconds, the least memory and the smallest file."""
    rows, metric = comparison["methods"], comparison["metric"]
    low, high = (pick(rows, key=lambda row: row["after"]) for pick in (min, max))
    if low["after"] == high["after"]:
        first = f"{metric} is {low['after']:.3g} with every method."
    else:
        first = f"{metric}: from {low['after']:.3g} ({low['method']}) to {high['after']:.3g} ({high['method']})."
    least = [f"{what} {min(rows, key=lambda row, name=name: row[name])['method']}"  # type: ignore[misc]
             for name, what in (("train_seconds", "fastest"), ("peak_memory_gb", "least memory"),
                                ("file_bytes", "smallest file"))]
    return f"{first} {', '.join(least).capitalize()}.\n\n"


def _format_number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
