"""Memory: peaks are this process's own, and a settled allocator is faulted in once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from luthier.training import memory

SCRIPT = """
import json, random, resource, sys, torch
from luthier.training.memory import measure_peak_gb, configure_malloc
torch.set_num_threads(1)
settled = sys.argv[1] == "yes" and configure_malloc()
lengths = random.Random(3)

def step():
    n = lengths.choice([300, 700, 1000])
    kept = [torch.ones(n, width) for width in (576, 1536, 1536, 576) * 4]  # 0.7 to 6 MB each
    logits = torch.ones(min(n, 256), 49152)  # 50 MB
    while kept:
        torch.ones_like(kept.pop())

for _ in range(5):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 20
print(json.dumps([settled, faults, measure_peak_gb("cpu")]))
"""


def run(settle: str) -> tuple[bool, float, float]:
    done = subprocess.run([sys.executable, "-c", SCRIPT, settle], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_a_settled_allocator_faults_less_and_takes_no_more() -> None:
    settled, faults, peak = run("yes")
    if not settled:
        pytest.skip("not glibc")
    _, before, peak_before = run("no")
    assert faults < before / 5, (faults, before)
    assert peak < peak_before * 1.25, (peak, peak_before)


def test_elsewhere_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert memory.configure_malloc() is False
    monkeypatch.undo()
    monkeypatch.setattr(memory.os, "confstr_names", {})
    assert memory.configure_malloc() is False


@pytest.mark.skipif(sys.platform != "linux", reason="the peak across exec is Linux's")
def test_the_peak_is_this_process_s_own() -> None:
    held = torch.ones(150_000_000)  # 0.6 GB
    assert memory.measure_peak_gb("cpu") > 0.6
    child = "import sys, types; sys.modules['torch'] = t = types.ModuleType('torch'); t.device = lambda d: t; t.type = 'cpu'\n" \
            "from luthier.training.memory import measure_peak_gb; print(measure_peak_gb('cpu'))"
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.1
    assert held[0] == 1


@pytest.mark.skipif(sys.platform != "linux", reason="groups of processes are Linux's")
def test_files_that_were_read_count_as_free(tmp_path: Path) -> None:
    whole = memory.available_memory_gb("cpu", tmp_path)  # no group: the machine's
    assert whole > 0.05
    for name, held in (("max", 50_000_000), ("current", 45_000_000)):
        (tmp_path / f"memory.{name}").write_text(f"{held}\n")
    (tmp_path / "memory.stat").write_text("anon 5000000\ninactive_anon 1000\ninactive_file 30000000\n")
    assert memory.available_memory_gb("cpu", tmp_path) == 0.035
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_memory_gb("cpu", tmp_path) == pytest.approx(whole, rel=0.2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_peak_of_a_device() -> None:
    torch.cuda.reset_peak_memory_stats()
    held = torch.ones(250_000_000, device="cuda")
    assert memory.measure_peak_gb("cuda") == pytest.approx(1.0, rel=0.05)
    assert held[0] == 1
