"""Code that a model wrote, run in a process of its own: without a network, within limits, and gone afterwards.

What holds it: a new session that is killed as a whole; the kernel's limits (`setrlimit`) on processor time, memory,
the size of files, the number of open ones and of processes; an empty folder that is removed; an empty environment.
Where the kernel allows it, user, network and process namespaces of its own: then there is no network at all, and every
process that it began dies with the first. Python itself refuses sockets, new processes and writing elsewhere too
(`sandbox_guard.py`); where there are no namespaces that is all there is against these three. `isolation()` says which
one holds here.

It is a fence against accidents, not a prison: run a model that you do not trust on a machine with nothing to lose.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

GUARD = Path(__file__).with_name("sandbox_guard.py")


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Args:
        seconds: of the clock; processor time is limited to as much.
        memory_mb: of address space.
        file_mb: of any one file it writes.
        files: open at once.
        processes: at once, threads too (outside a namespace: of all that its user runs).
        output: characters kept of what it prints.
    """

    seconds: float = 5.0
    memory_mb: int = 512
    file_mb: int = 8
    files: int = 32
    processes: int = 16
    output: int = 10_000


@dataclass(frozen=True)
class ProgramResult:
    """How a program ended. `code` is that of its process, negative for a signal; `timed_out` where it was killed."""

    code: int
    output: str
    timed_out: bool


def passes_test(program: str, test: str, limits: Limits) -> bool:
    """Whether the program followed by the test runs to its end without an error."""
    done = secrets.token_hex()  # printed at the end, so that a program which exits in the middle does not pass
    found = run_program(f"{program}\n\n{test}\n\nprint({done!r})\n", limits)
    return found.code == 0 and not found.timed_out and found.output.rstrip().endswith(done)


def run_program(program: str, limits: Limits) -> ProgramResult:
    """Run a Python program in a process of its own; see the module for what holds it."""
    with tempfile.TemporaryDirectory(prefix="luthier-sandbox-") as folder, tempfile.TemporaryFile() as output:
        Path(folder, "answer.py").write_text(program, encoding="utf-8", errors="replace")
        command = [*_build_namespace_command(), sys.executable, "-I", "-S", "-B", str(GUARD),
                   json.dumps(_build_rlimits(limits)), "answer.py"]
        process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=output,
                                   stderr=subprocess.STDOUT, env={"PYTHONIOENCODING": "utf-8"}, start_new_session=True)
        timed_out = False
        try:
            process.wait(limits.seconds)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            _kill_session(process)
        output.seek(0, os.SEEK_END)
        output.seek(max(0, output.tell() - limits.output))
        return ProgramResult(process.returncode, output.read().decode("utf-8", "replace"), timed_out)


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    """The whole session, also what the program left behind when it ended."""
    with suppress(ProcessLookupError):  # nothing of it is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _build_rlimits(limits: Limits) -> dict[str, int]:
    """The limits by the kernel's names."""
    mega = 1 << 20
    return {"CPU": int(limits.seconds) + 1, "AS": limits.memory_mb * mega, "FSIZE": limits.file_mb * mega,
            "NOFILE": limits.files, "NPROC": limits.processes, "CORE": 0}


def describe_isolation() -> str:
    """What holds a program here, in words."""
    if _build_namespace_command():
        return "limits, and namespaces of its own: no network, no process outlives it"
    return "limits, and Python's own refusal of sockets and processes: this kernel gives no namespaces to its users"


@cache
def _build_namespace_command() -> tuple[str, ...]:
    """The command that gives a program its own user, network and process namespaces; empty where that is refused."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return ()
    command = (unshare, "--user", "--map-current-user", "--net", "--pid", "--fork", "--kill-child")
    try:
        tried = subprocess.run([*command, sys.executable, "-I", "-S", "-c", ""], capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return command if tried.returncode == 0 else ()
