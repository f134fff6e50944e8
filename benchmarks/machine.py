"""The machine: what it is, and how fast it multiplies matrices of this model's shapes. Read `workload.py` first.

    python -m benchmarks.machine smollm2      prints one JSON object; the base's folder and config are in it

Run in a process of its own, so that what starts the sides stays free of torch and small (see `sft.py`).
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.workload import Shape

ROWS = (1024, 2048)  # tokens of a small and of a large batch
PACKAGES = ("luthier", "torch", "transformers", "peft", "trl", "datasets", "accelerate", "unsloth", "unsloth_zoo")


def machine() -> dict[str, Any]:
    """Processor, cores, memory in GB, and the GPU if there is one."""
    import psutil
    import torch

    return {
        "cpu": _cpu(), "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1), "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions() -> dict[str, str]:
    """Of Python and of those of `PACKAGES` that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu() -> str:
    described = Path("/proc/cpuinfo")
    if not described.exists():
        return platform.processor()
    fields = dict(line.split(":", 1) for line in described.read_text().split("\n\n")[0].splitlines() if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    # Virtual processors often share one name, so the numbers that tell them apart stand beside it.
    return (f"{named.get('model name', platform.processor())} (family {named.get('cpu family', '?')}, "
            f"model {named.get('model', '?')})")


def rate(shape: Shape, repeats: int = 9) -> dict[str, Any]:
    """GFLOP/s of matrix products `[M, K] x [K, N]` at this model's shapes: float32, or bfloat16 on a GPU.

    `gflops` weighs each shape by its share of a layer's work; the median over `repeats` stands for each shape.
    """
    import torch

    gpu = torch.cuda.is_available()
    place: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16} if gpu else {"dtype": torch.float32}
    shapes: dict[str, float] = {}
    work = spent = 0.0
    for rows in ROWS:
        for (inputs, outputs), times in Counter(shape.maps).items():
            x, w = torch.randn(rows, inputs, **place), torch.randn(outputs, inputs, **place)
            seconds = statistics.median(_product(torch, x, w, gpu) for _ in range(repeats))
            operations = 2 * rows * inputs * outputs
            shapes[f"{rows}x{inputs}x{outputs}"] = round(operations / seconds / 1e9, 1)
            work, spent = work + times * operations, spent + times * seconds
    return {"gflops": round(work / spent / 1e9, 1), "dtype": str(place["dtype"]).removeprefix("torch."), "shapes": shapes}


def _product(torch: Any, x: Any, w: Any, gpu: bool, times: int = 5) -> float:
    """Seconds of one product; the first one warms up and is not counted."""
    torch.nn.functional.linear(x, w)
    if gpu:
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(times):
        torch.nn.functional.linear(x, w)
    if gpu:
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / times


def main() -> None:
    from luthier.models import ModelConfig, prepare_folder  # here: peers read `versions` without having Luthier

    found = prepare_folder(ModelConfig(name_or_path=sys.argv[1]))
    config = json.loads((found / "config.json").read_text(encoding="utf-8"))
    print(json.dumps({"folder": str(found), "config": config, "machine": machine(), "versions": versions(),
                      "rate": rate(Shape.read(config))}))


if __name__ == "__main__":
    main()
