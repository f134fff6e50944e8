"""Peak and available memory, and malloc settings that keep freed memory for the next step. Read nothing else first."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from pathlib import Path

import torch

GB = 1e9  # not 2**30

# glibc's mallopt parameters, from malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
# Measured with forward-and-backward-like patterns of blocks from 0.3 to 100 MB (glibc 2.36, faults a step, peak MB):
#                                          lengths vary      and logits too
#     glibc defaults                       14,211   650      168,454  1,152
#     blocks to 32 MiB kept, no trim        3,527   665      140,702  1,157
#     blocks to  1 GiB kept, no trim          529   694        4,868  1,518
#     the same, grown by 16 MiB at a time     458   671        2,348  1,124
#     the same, grown by 64 MiB at a time     532   658        4,456  1,548
# The system's share of a step's time fell from 203 ms to 4 ms of 320. Blocks above 1 GiB still go back when freed.
KEPT, KEPT_BEFORE = 1 << 30, 1 << 25  # older glibc refuses more than 32 MiB
GROWTH = 16 << 20
NEVER = -1


def measure_peak_gb(device: torch.device | str) -> float:
    """Peak memory so far, in GB of 10**9 bytes: of tensors on a CUDA device, else of the process in RAM."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GB
    if sys.platform == "linux":
        # Not getrusage: across exec it keeps the peak of the parent process.
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / GB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GB


def available_memory_gb(device: torch.device | str, group: Path = Path("/sys/fs/cgroup")) -> float:
    """Available memory in GB of 10**9 bytes: of a CUDA device, else of this machine or this process's control group.

    The file cache that is not in use counts as available: the system frees it when memory is needed.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / GB
    if not Path("/proc/meminfo").exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GB
    found = Path("/proc/meminfo").read_text(encoding="ascii").partition("MemAvailable:")[2]
    free = int(found.split()[0]) * 1024
    limit = (group / "memory.max").read_text(encoding="ascii").strip() if (group / "memory.max").exists() else "max"
    if limit != "max":
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
        read = next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
        free = min(free, int(limit) - int((group / "memory.current").read_text(encoding="ascii")) + read)
    return free / GB


def configure_malloc() -> bool:
    """Let glibc keep freed memory. Returns whether it now does; on musl, macOS and Windows nothing happens.

    A step on the CPU frees its activations, and the next one allocates as much again. glibc returns large blocks to the
    kernel, which must clear every page when it is touched again: that costs more than the arithmetic on it.
    Call it before the model is loaded: blocks that were allocated earlier are not affected.

    The same by environment variable::

        GLIBC_TUNABLES=glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=18446744073709551615:\\
        glibc.malloc.top_pad=16777216
    """
    if sys.platform != "linux" or "CS_GNU_LIBC_VERSION" not in os.confstr_names:
        return False
    mallopt = ctypes.CDLL(None).mallopt
    kept = mallopt(M_MMAP_THRESHOLD, KEPT) or mallopt(M_MMAP_THRESHOLD, KEPT_BEFORE)
    return bool(kept and mallopt(M_TRIM_THRESHOLD, NEVER) and mallopt(M_TOP_PAD, GROWTH))


def trim_heap(device: torch.device | str) -> None:
    """Return free heap memory between live blocks to the kernel. Call it when little is live, before a row longer than
    all before it.

    Blocks of a longer row do not fit into the gaps that shorter rows left. Without trimming, a run grows to more than
    any of its rows needs. The kernel must clear returned pages when they are touched again. Trimmed after every row,
    three steps of pairs took 1.5 million page faults and 4.4 s of system time (53 s of user time). Trimmed before
    longer rows only, they took 0.13 million and 0.3 s, and the peak was 1.54 GB instead of 1.51 GB.
    """
    if torch.device(device).type == "cpu" and sys.platform == "linux" and "CS_GNU_LIBC_VERSION" in os.confstr_names:
        ctypes.CDLL(None).malloc_trim(0)
