"""Recommends a method from the measured trials of a plan, and prints the plan as a table. Read `estimates.py` first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LARGE = 10_000_000  # tokens of a run from which full fine-tuning is recommended for continued pretraining


def build_advice(report: Mapping[str, Any], objective: str) -> list[str]:
    """Returns sentences of advice, the recommended method first, each with its reason from the figures of this plan.

    Args:
        report: the plan with its measured `methods`, as in plan.json.
        objective: name of the objective.
    """
    measured = {row["method"]: row for row in report["methods"] if "seconds" in row}
    fits = {name: row for name, row in measured.items() if row["fits"]}
    if not fits:
        return [f"No tried method fits in {report['room_gb']:.1f} GB. Try in this order: model.quantize=nf4, "
                "model.dtype=bfloat16, "
                "a smaller training.max_tokens_per_micro_batch, a smaller base."]
    tokens = max(row["tokens"] for row in fits.values())
    if objective == "pretrain" and "full" in fits and tokens >= LARGE:
        chosen, why = "full", (f"{tokens:,} tokens of plain text are more than few parameters can learn "
                               "(Biderman et al. 2024, arXiv:2405.09673), and full fine-tuning fits")
    else:
        chosen = next((name for name in ("lora", "qlora", "lora@nf4") if name in fits),
                      min(fits, key=lambda name: fits[name]["peak_memory_gb"]))
        why = ("it comes closest to full fine-tuning in most comparisons, can be merged into the base and costs "
               f"{_compare_cost(fits, 'lora', 'full')}" if chosen == "lora"
               else "of the methods that fit it needs the least memory")
    advice = [f"Choose {chosen}: {why}."]
    for name, row in measured.items():
        if not row["fits"]:
            advice.append(f"{name} does not fit: {row['peak_memory_gb']:.1f} GB in its first steps, "
                        f"{report['room_gb']:.1f} GB free.")
    for what, key, unit, digits in (("Fastest", "seconds", 60, "{:.1f} minutes"),
                                    ("Least memory", "peak_memory_gb", 1, "{:.2f} GB"),
                                    ("Smallest file", "file_bytes", 1e6, "{:.2f} MB")):
        least = min(fits, key=lambda name: fits[name][key])
        advice.append(f"{what}: {least}, {digits.format(fits[least][key] / unit)}.")
    advice.append("Quality is not predicted: luthier compare measures it.")
    return advice


def _compare_cost(rows: Mapping[str, Mapping[str, Any]], one: str, other: str) -> str:
    if other not in rows:
        return f"{rows[one]['peak_memory_gb']:.1f} GB"
    share = {key: rows[one][key] / rows[other][key] for key in ("seconds", "peak_memory_gb", "file_bytes")}
    return (f"{share['seconds']:.2f} of its time, {share['peak_memory_gb']:.2f} of its memory and "
            f"{share['file_bytes']:.3f} of its disk")


def format_table(report: Mapping[str, Any]) -> str:
    """The plan as Markdown: the data, the methods, the advice."""
    data = report["data"]
    lines = [f"Base {report['model']}, {report['room_gb']:.1f} GB free."]
    if data:
        lines.append(f"{data['kept']} rows, {data['tokens']:,} tokens, {data['truncated']} truncated.")
    titles = ("method", "fits", "trainable", "minutes", "tokens/s", "peak GB", "file MB")
    lines += ["", f"| {' | '.join(titles)} |", "|" + " --- |" * len(titles)]
    for row in report["methods"]:
        if "why" in row:
            lines.append(f"| {row['method']} | no: {row['why'].replace('|', '/')} |" + " |" * (len(titles) - 2))
            continue
        cells = (row["method"], "yes" if row["fits"] else "no", f"{row['trainable_fraction']:.3%}",
                 f"{row['seconds'] / 60:.1f}", f"{row['tokens_per_second']:.0f}", f"{row['peak_memory_gb']:.2f}",
                 f"{row['file_bytes'] / 1e6:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"* {sentence}" for sentence in report["advice"])]) + "\n"
