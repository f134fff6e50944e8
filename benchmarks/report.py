"""From what the sides measured to figures, ratios, a table and a chart. Pure up to `table`. Read `workload.py` first."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.workload import Setting, Shape, flops

Account = Mapping[str, Any]
Figures = dict[str, Any]

RATIOS = {"tokens_per_second": "tokens_per_second", "peak_memory": "peak_memory_bytes",
          "step_memory": "step_memory_bytes", "user_cpu": "user_seconds", "setup": "setup_seconds"}
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}
UNCOUNTED = "system_seconds"  # a side may keep no such count


class NotComparable(SystemExit):
    """The sides did not do the same work, so no ratio between them means anything."""


# ---------------------------------------------------------------- figures of one side


def figures(account: Account, setting: Setting, shape: Shape, gflops: float) -> Figures:
    """What one run of one side comes to; the warm-up steps are left out of every time and count."""
    timed = account["steps"][setting.warmup:]
    total = {name: sum(step[name] for step in timed)
             for name in ("seconds", "user_seconds", "examples", "tokens", "trained")}
    work = sum(flops(shape, [(d["tokens"], d["trained"]) for d in step["documents"]]) for step in timed) / 1e9
    seconds, gpu = total["seconds"], account["gpu_peak_bytes"]
    system = [step[UNCOUNTED] for step in timed]
    return {
        **total, UNCOUNTED: None if None in system else sum(system),
        "tokens_per_second": total["tokens"] / seconds, "examples_per_second": total["examples"] / seconds,
        "tokens_per_user_second": total["tokens"] / total["user_seconds"] if total["user_seconds"] else None,
        "gflops": work / seconds, "share_of_machine": work / seconds / gflops,
        "peak_memory_bytes": gpu or account["peak_bytes"],
        "step_memory_bytes": gpu or account["peak_bytes"] - account["resident_bytes"],
        "cores_used_by_others": account["cores_used_by_others"],
        "setup_seconds": account["setup_seconds"], "process_seconds": account["total_seconds"],
    }


def summary(accounts: Sequence[Account], runs: Sequence[Figures]) -> Figures:
    """Medians over the repeats, with every repeat and the loss curve of the first beside them."""
    middle = {name: None if any(run[name] is None for run in runs) else statistics.median(run[name] for run in runs)
              for name in runs[0]}
    losses = [step["loss"] for step in accounts[0]["steps"]]
    counts = [{name: step[name] for name in ("examples", "tokens", "trained")} for step in accounts[0]["steps"]]
    return {**middle, "first_loss": losses[0], "losses": losses, "steps": counts, "repeats": list(runs),
            "versions": accounts[0]["versions"], "threads": accounts[0]["threads"]}


# ---------------------------------------------------------------- between sides


def same_work(ours: Account, theirs: Account, setting: Setting) -> float:
    """The relative difference of the first losses. Refuses sides that were not given the same documents."""
    for number, (mine, other) in enumerate(zip(ours["steps"], theirs["steps"], strict=True), 1):
        if [d["key"] for d in mine["documents"]] != [d["key"] for d in other["documents"]]:
            counts = [{k: step[k] for k in ("examples", "tokens", "trained")} for step in (mine, other)]
            raise NotComparable(f"step {number}: {ours['side']} and {theirs['side']} did not train on the same tokens "
                                f"and positions ({counts[0]} against {counts[1]})")
    first, second = ours["steps"][0]["loss"], theirs["steps"][0]["loss"]
    difference: float = abs(first - second) / abs(second)
    if not difference <= TOLERANCE[setting.dtype]:
        raise NotComparable(f"first loss of {ours['side']} {first:.6f}, of {theirs['side']} {second:.6f}: they differ "
                            f"by {difference:.1e}, and {TOLERANCE[setting.dtype]:.0e} is allowed")
    return difference


def ratios(ours: Figures, theirs: Figures) -> dict[str, Any]:
    """Luthier over the peer: each repeat against the one run beside it, and the median of those."""
    found: dict[str, Any] = {}
    for name, key in RATIOS.items():
        pairs = [mine[key] / other[key] for mine, other in zip(ours["repeats"], theirs["repeats"], strict=True)
                 if other[key] and mine[key] is not None]
        found[name] = {"median": statistics.median(pairs) if pairs else None, "pairs": pairs}
    return found


def results(accounts: Mapping[str, Sequence[Account]], setting: Setting, config: Mapping[str, Any],
            rate: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that one comparison found. `ratio` is against the first peer as it comes, with its own defaults;
    `ratios` has each peer (the same with other settings may be faster, or smaller) and each pair of runs."""
    shape = Shape.read(config)
    sides = {side: summary(runs, [figures(run, setting, shape, rate["gflops"]) for run in runs])
             for side, runs in accounts.items()}
    peers = [side for side in sides if side != "luthier"]
    between = {peer: ratios(sides["luthier"], sides[peer]) for peer in peers}
    plain = min((peer for peer in peers if peer.split("-")[0] == peers[0].split("-")[0]), key=len)
    return {
        **sides,
        "ratio": {name: between[plain][name]["median"] for name in RATIOS} | {"against": plain},
        "ratios": between,
        "first_loss_difference": {peer: max(same_work(ours, theirs, setting) for ours, theirs
                                            in zip(accounts["luthier"], accounts[peer], strict=True)) for peer in peers},
        "rate": dict(rate), "setting": asdict(setting),
    }


# ---------------------------------------------------------------- for readers

LINES = (
    ("real tokens/s", "tokens_per_second", 1.0, ".1f"), ("examples/s", "examples_per_second", 1.0, ".3f"),
    ("real tokens per user-CPU second", "tokens_per_user_second", 1.0, ".1f"),
    ("wall seconds", "seconds", 1.0, ".1f"), ("user CPU seconds", "user_seconds", 1.0, ".1f"),
    ("system CPU seconds", "system_seconds", 1.0, ".1f"), ("peak memory, GB", "peak_memory_bytes", 1e9, ".2f"),
    ("  above what was resident before step 1", "step_memory_bytes", 1e9, ".2f"),
    ("setup seconds", "setup_seconds", 1.0, ".1f"), ("useful GFLOP/s", "gflops", 1.0, ".1f"),
    ("  share of the machine's rate, %", "share_of_machine", 0.01, ".0f"), ("first loss", "first_loss", 1.0, ".6f"),
    ("cores that others used meanwhile", "cores_used_by_others", 1.0, ".2f"),
)


def table(found: Mapping[str, Any]) -> Any:
    """A rich table of the sides, one column each, with the ratios below."""
    from rich.table import Table

    sides = ["luthier", *found["ratios"]]
    s, rate = found["setting"], found["rate"]
    shown = Table(title=f"SFT, LoRA r={s['rank']}, {s['base']}, {s['dtype']}, batch {s['batch_size']}, data {s['data']}: "
                        f"{found['luthier']['tokens']:.0f} tokens in {s['steps']} steps; machine {rate['gflops']:.0f} GFLOP/s")
    shown.add_column("median")
    for side in sides:
        shown.add_column(side, justify="right")
    for title, key, unit, form in LINES:
        shown.add_row(title, *(_shown(found[side][key], unit, form) for side in sides))
    shown.add_section()
    for name in RATIOS:
        cells = (found["ratios"][side][name] for side in sides[1:])
        shown.add_row(f"luthier / peer: {name}", "", *(_spread(cell) for cell in cells))
    return shown


def _shown(value: float | None, unit: float, form: str) -> str:
    return "-" if value is None else format(value / unit, form)


def _spread(cell: Mapping[str, Any]) -> str:
    pairs = cell["pairs"]
    if len(pairs) < 2:
        return _shown(cell["median"], 1.0, ".2f")
    return f"{cell['median']:.2f} ({min(pairs):.2f}-{max(pairs):.2f})"


def chart(found: Mapping[str, Any], path: Path) -> None:
    """Speed, memory, user CPU time and loss of every side as one picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sides = ["luthier", *found["ratios"]]
    figure, axes = pyplot.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
    colors = ["#b5541c", *("#7d8795", "#aeb6c0", "#5b6f8a", "#93a7c1")[:len(sides) - 1]]
    bars = (("real tokens/s (more is better)", "tokens_per_second", 1.0), ("peak memory, GB (less is better)", "peak_memory_bytes", 1e9),
            ("user CPU seconds (less is better)", "user_seconds", 1.0))
    for axis, (title, key, unit) in zip(axes, bars, strict=False):
        drawn = axis.bar(sides, [found[side][key] / unit for side in sides], color=colors)
        axis.bar_label(drawn, fmt="%.3g", padding=2)
        axis.set_title(title, fontsize=10)
        axis.margins(y=0.15)
        axis.tick_params(axis="x", labelsize=8)
    for side, color in zip(sides, colors, strict=True):
        axes[-1].plot(range(1, len(found[side]["losses"]) + 1), found[side]["losses"], label=side, color=color)
    axes[-1].set_title("loss of each step", fontsize=10)
    axes[-1].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
