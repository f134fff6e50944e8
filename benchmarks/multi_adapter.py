"""What routing costs: switching adapters, and a row that mixes them beside the same documents run apart.

    python -m benchmarks.multi_adapter      writes benchmarks/results/<date>-multi_adapter.json

On the embedded base with five adapters of four kinds. Processor seconds are the process's own, the least of some runs:
neighbors of the machine do not count in them.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine, versions
from luthier import assembly
from luthier.assembly.factory import attach_method, load_family
from luthier.core.types import Inputs, SegmentTree

MEMBERS: dict[str, Any] = {"low": "lora", "low_too": "lora", "soft": "prompt", "deep": "prefix", "both": ["prompt", "lora"]}
EACH, LENGTH, RUNS = 2, 64, 3  # documents of each adapter, their tokens, and how often a row is run


def main() -> None:
    family = load_family(assembly.ModelConfig(name_or_path="smollm2"))
    manager = assembly.AdapterManager(family.structure)
    for i, (name, method) in enumerate(MEMBERS.items()):
        manager.add(name, attach_method(family, assembly.build_recipe({"data": "-", "method": method}).method, i))
    family.router = manager
    names = [name for name in MEMBERS for _ in range(EACH)]
    tokens = torch.randint(1000, 40_000, (LENGTH * len(names),), generator=torch.Generator().manual_seed(0))

    def row(count: int) -> Inputs:
        return Inputs(tokens[:LENGTH * count], torch.arange(LENGTH).repeat(count), SegmentTree((LENGTH,) * count, (-1,) * count))

    def apart() -> None:
        for name in MEMBERS:
            with manager.use_adapter(name):
                family.states(row(EACH))

    def one(name: str | None) -> None:
        with manager.use_adapter(name):
            family.states(row(len(names)))

    mixed = manager.with_adapters(row(len(names)), names)
    places = [place for place in mixed.segment_tree.adapters for _ in range(LENGTH)]
    with torch.no_grad():
        seconds = {"mixed": _processor(lambda: family.states(mixed)), "apart": _processor(apart),
                   "one_lora": _processor(lambda: one("low")), "bare": _processor(lambda: one(None))}
    found = {"machine": machine(), "versions": versions(), "base": "smollm2", "members": MEMBERS,
             "documents": len(names), "tokens": len(tokens),
             "switch_microseconds": _microseconds(lambda i: manager.use_adapter(list(MEMBERS)[i % len(MEMBERS)])),
             "stack_microseconds": _microseconds(lambda i: manager.use_adapter({"low": 0.7, "low_too": 0.3})),
             "route_microseconds": _microseconds(lambda i: manager.route(1, places), 300),
             "forward_processor_seconds": seconds}
    file = Path(__file__).with_name("results") / f"{date.today()}-multi_adapter.json"
    file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(file.read_text(encoding="utf-8"))


def _microseconds(setting: Callable[[int], AbstractContextManager[None]], times: int = 3000) -> float:
    """To open and to close a setting: the median."""
    taken = []
    for i in range(times):
        began = time.perf_counter()
        with setting(i):
            pass
        taken.append(time.perf_counter() - began)
    return round(statistics.median(taken) * 1e6, 1)


def _processor(work: Callable[[], Any]) -> float:
    taken = []
    for _ in range(RUNS):
        began = time.process_time()
        work()
        taken.append(time.process_time() - began)
    return round(min(taken), 3)


if __name__ == "__main__":
    main()
