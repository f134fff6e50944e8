"""The verb `doctor`: hardware, versions and optional packages of this machine. No simpler file to read first."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from luthier import assembly
from luthier.core.errors import BaseError
from luthier.training.memory import configure_malloc

PACKAGES = ("luthier", "torch", "transformers", "safetensors", "datasets", "pydantic")
EXTRAS = {  # extra -> its packages; a test compares it with pyproject.toml
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
    "mlflow": ("mlflow",),
    "peft": ("peft",),
    "vision": ("pillow",),
    "quant": ("bitsandbytes",),
    "features": ("scikit-learn",),
    "serve": ("starlette", "uvicorn"),
    "llama": ("llama-cpp-python",),
    "bench": ("trl", "peft"),
}
ALLOCATOR = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "LD_PRELOAD", "PYTORCH_ALLOC_CONF",
             "PYTORCH_CUDA_ALLOC_CONF")


def doctor() -> dict[str, Any]:
    """Versions, processor, memory, accelerators, disk, bases, extras, caches: section -> name -> value."""
    return {
        "versions": {"python": platform.python_version(), **{name: assembly.get_version(name) for name in PACKAGES}},
        "cpu": _describe_cpu(),
        "memory": _describe_memory(),
        "accelerator": _describe_accelerator(),
        "disk": {"free_gb": round(shutil.disk_usage(Path.cwd()).free / 1e9, 1), "here": str(Path.cwd())},
        "sandbox": {"code_tests": assembly.describe_isolation()},
        "bases": {alias: _find_embedded_model(alias) for alias in assembly.ALIASES},
        "extras": {extra: _find_extra(extra, packages) for extra, packages in EXTRAS.items()},
        "cache": {"folder": str(assembly.get_cache_folder()), "gb": _measure_size_gb(assembly.get_cache_folder())},
        "hub": {"offline": os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"),
                "token": bool(os.environ.get("HF_TOKEN")), "home": os.environ.get("HF_HOME", "~/.cache/huggingface")},
        "allocator": {"c_library": " ".join(platform.libc_ver()).strip() or sys.platform,
                      "keeps_freed_memory": configure_malloc(),
                      **{name: os.environ[name] for name in ALLOCATOR if name in os.environ}},
    }


def _describe_cpu() -> dict[str, Any]:
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return {"model": _read_cpu_model(), "cores": os.cpu_count(), "usable": usable,
            "torch_threads": torch.get_num_threads(),
            "vector": torch.backends.cpu.get_cpu_capability()}


def _read_cpu_model() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _describe_memory() -> dict[str, float]:
    """Gigabytes of 10**9 bytes; `available` includes reclaimable caches."""
    file = Path("/proc/meminfo")
    if file.exists():
        kib = {name: int(rest.split()[0]) for name, _, rest in
               (line.partition(":") for line in file.read_text(encoding="ascii").splitlines())}
        return {"total_gb": round(kib["MemTotal"] * 1024 / 1e9, 1),
                "available_gb": round(kib["MemAvailable"] * 1024 / 1e9, 1)}
    return {"total_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)}


def _describe_accelerator() -> dict[str, Any]:
    accelerators: dict[str, Any] = {"mps": torch.backends.mps.is_available(), "cuda": torch.cuda.is_available()}
    for index in range(torch.cuda.device_count() if accelerators["cuda"] else 0):
        free, total = torch.cuda.mem_get_info(index)
        with torch.cuda.device(index):
            bf16 = torch.cuda.is_bf16_supported()
        accelerators[f"gpu{index}"] = {"name": torch.cuda.get_device_name(index), "total_gb": round(total / 1e9, 1),
                                "free_gb": round(free / 1e9, 1), "bf16": bf16}
    return accelerators


def _find_embedded_model(alias: str) -> str:
    try:
        return f"installed: {assembly.resolve_name(alias)}"
    except BaseError as error:
        return f"missing: {error.remedy}"


def _find_extra(extra: str, packages: tuple[str, ...]) -> str:
    try:
        return "installed: " + ", ".join(f"{package} {metadata.version(package)}" for package in packages)
    except metadata.PackageNotFoundError:
        return f"missing: pip install 'luthier[{extra}]'"


def _measure_size_gb(folder: Path) -> float:
    return round(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e9, 2)
