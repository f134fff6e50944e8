"""Runs code that a model wrote in a child process, without a network and within limits. Reads nothing else first.

The isolation:

* a new session that is killed as a whole, an empty folder that is deleted, an empty environment;
* kernel limits (`setrlimit`) on CPU time, memory, file size, open files and processes;
* user, network and process namespaces where the kernel allows them: no network, and all processes end with the first;
* an audit hook in Python that refuses sockets, new processes and writes outside the folder (`sandbox_guard.py`).
  Without namespaces this hook alone guards against these three. `describe_isolation()` returns what applies here.

This protects against accidents, not against attacks. Run an untrusted model on a machine that holds nothing of value.
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
    """Limits of a program.

    Args:
        seconds: of wall-clock time, and of CPU time.
        memory_mb: of address space.
        file_mb: of each file that it writes.
        files: open at once.
        processes: at once, with threads; without a namespace, of all processes of the user.
        output: bytes of its output that are kept, from the end.
    """

    seconds: float = 5.0
    memory_mb: int = 512
    file_mb: int = 8
    files: int = 32
    processes: int = 16
    output: int = 10_000


@dataclass(frozen=True)
class ProgramResult:
    """How a program ended. `code` is the exit code, negative for a signal; `timed_out` where it was killed."""

    code: int
    output: str
    timed_out: bool


def passes_test(program: str, test: str, limits: Limits) -> bool:
    """Whether the program, followed by the test, runs to its end without an error."""
    marker = secrets.token_hex()  # printed at the end, so that a program that exits early does not pass
    result = run_program(f"{program}\n\n{test}\n\nprint({marker!r})\n", limits)
    return result.code == 0 and not result.timed_out and result.output.rstrip().endswith(marker)


def run_program(program: str, limits: Limits) -> ProgramResult:
    """Run a Python program in a child process, with the isolation that the module describes."""
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
    """Kill the whole session, with processes that the program left running."""
    with suppress(ProcessLookupError):  # no process is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _build_rlimits(limits: Limits) -> dict[str, int]:
    """The limits by the names of `setrlimit`."""
    mega = 1 << 20
    return {"CPU": int(limits.seconds) + 1, "AS": limits.memory_mb * mega, "FSIZE": limits.file_mb * mega,
            "NOFILE": limits.files, "NPROC": limits.processes, "CORE": 0}


def describe_isolation() -> str:
    """The isolation of a program on this machine, as a sentence."""
    if _build_namespace_command():
        return "kernel limits and namespaces: no network, and no process outlives the program"
    return "kernel limits and Python's audit hook against sockets and processes: this kernel allows users no namespaces"


@cache
def _build_namespace_command() -> tuple[str, ...]:
    """The command that runs a program in its own user, network and process namespaces; empty where refused."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return ()
    command = (unshare, "--user", "--map-current-user", "--net", "--pid", "--fork", "--kill-child")
    try:
        tried = subprocess.run([*command, sys.executable, "-I", "-S", "-c", ""], capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return command if tried.returncode == 0 else ()
