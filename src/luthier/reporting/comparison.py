"""The table of a comparison of methods, as Markdown. There is no simpler file to read first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def format_table(comparison: Mapping[str, Any]) -> str:
    """The comparison as a Markdown table."""
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
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + measured


def _format_number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
