"""What every side of a comparison shares: its clock, and the account it leaves. Read `../workload.py` first.

Imports nothing of Luthier and nothing of a peer, so that each side's process holds only what that side needs.
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.machine import versions
from benchmarks.workload import PROGRESS, Job

Account = dict[str, Any]


@dataclass
class Watch:
    """Clock, memory and documents of one side, from the start of its process to the end of its last step."""

    job: Job
    per_example: int = 1  # documents: a pair is two
    steps: list[Account] = field(default_factory=list)
    documents: list[Account] = field(default_factory=list)
    setup_seconds: float | None = None
    resident_bytes: int = 0
    _begun: tuple[float, float, float] = (0.0, 0.0, 0.0)
    _quiet: tuple[float, float] = (0.0, 0.0)

    def first(self) -> None:
        """Called before each step: the first call marks the end of the setup."""
        if self.setup_seconds is None:
            self.setup_seconds = time.time() - self.job.started
            self.resident_bytes = psutil.Process().memory_info().rss
            self._quiet = (time.perf_counter(), others())
            print(f"{PROGRESS}ready after {self.setup_seconds:.0f} s", flush=True)

    def begin(self) -> None:
        self.first()
        self._begun = now()

    def end(self) -> None:
        spent = [after - before for before, after in zip(self._begun, now(), strict=True)]
        self.steps.append(dict(zip(("seconds", "user_seconds", "system_seconds"), spent, strict=True)))
        print(f"{PROGRESS}step {len(self.steps)} of {self.job.steps}: {spent[0]:.1f} s", flush=True)

    def saw(self, ids: Sequence[int], trained: Iterable[int]) -> None:
        """A document as it reached the model: its tokens, and the places in it (0 its first) that are predicted."""
        places = list(trained)
        key = hashlib.sha256(json.dumps([list(ids), places]).encode()).hexdigest()[:16]
        self.documents.append({"key": key, "tokens": len(ids), "trained": len(places)})

    def account(self, losses: Sequence[float]) -> None:
        """Write what was measured, a step's own documents beside its times."""
        size, peak = self.job.setting.batch_size * self.per_example, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        disturbed = (others() - self._quiet[1]) / (time.perf_counter() - self._quiet[0])
        assert len(self.steps) == len(losses) == self.job.steps, (len(self.steps), len(losses), self.job.steps)
        for index, (step, loss) in enumerate(zip(self.steps, losses, strict=True)):
            seen = sorted(self.documents[index * size:(index + 1) * size], key=lambda document: document["key"])
            step |= {"loss": loss, "examples": len(seen), "tokens": sum(d["tokens"] for d in seen),
                     "trained": sum(d["trained"] for d in seen), "documents": seen}
        written = {
            "side": self.job.side, "steps": self.steps, "setup_seconds": self.setup_seconds,
            "total_seconds": time.time() - self.job.started,
            "peak_bytes": peak * (1 if sys.platform == "darwin" else 1024), "resident_bytes": self.resident_bytes,
            "cores_used_by_others": round(disturbed, 2),
            "gpu_peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            "threads": torch.get_num_threads(), "versions": versions(),
        }
        Path(self.job.account).write_text(json.dumps(written), encoding="utf-8")


def others() -> float:
    """CPU seconds that everybody else on this machine has used so far, and that a host has withheld from it."""
    times = psutil.cpu_times()._asdict()
    everybody = sum(times.get(name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))
    mine = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return float(everybody - sum(used.ru_utime + used.ru_stime for used in mine))


def now() -> tuple[float, float, float]:
    """Wall, user and system seconds; on a GPU, of work that is done and not only asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    used = resource.getrusage(resource.RUSAGE_SELF)
    return time.perf_counter(), used.ru_utime, used.ru_stime
