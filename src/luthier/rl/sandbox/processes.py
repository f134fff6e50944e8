"""Starts the process of an answer and that of its test, and reads the verdict. Read `judge.py` first."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from luthier.core.errors import RunError

Walls = Literal["namespaces", "landlock", "none"]
REFUSED = 97  # see `child.py`
MAX_VERDICT = 10_000  # bytes
# A package of its own, so that the child imports nothing of luthier: it must start in milliseconds.
BOOTSTRAP = ("import sys, types; package = types.ModuleType('sandboxed'); package.__path__ = [sys.argv.pop()]; "
             "sys.modules['sandboxed'] = package; from sandboxed.child import main; main()")


@dataclass(frozen=True)
class Limits:
    """Limits of a program.

    Args:
        seconds: of wall-clock time, and of CPU time.
        memory_mb: of address space.
        file_mb: of all files that it writes.
        files: open at once.
        threads: at once.
    """

    seconds: float = 5.0
    memory_mb: int = 512
    file_mb: int = 8
    files: int = 32
    threads: int = 16


@dataclass(frozen=True)
class Verdict:
    """Whether a test passed, and why not."""

    passed: bool
    reason: str = ""


def run_test(program: str, test: str, limits: Limits, walls: Walls | None = None) -> Verdict:
    """Run a test against a program; each in a process of its own, behind the same walls.

    Args:
        test: Python code that uses the program's names; it passes if it runs to its end. Values that pass between the
            two are plain, see `wire.py`.
        walls: None: the strongest that this machine has (`find_walls`).

    Raises:
        RunError: the kernel has no walls, and `walls` does not say `none`.
    """
    walls = require_walls() if walls is None else walls
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="luthier-sandbox-"))
        ours, theirs = socket.socketpair()
        read, write = os.pipe()
        for handle in (ours.fileno(), theirs.fileno()):
            os.set_inheritable(handle, True)
        answer = _start("answer", program, limits, walls, folder, {"channel": ours.fileno()}, (ours.fileno(),))
        stack.callback(_kill, answer)
        judge = _start("judge", test, limits, walls, folder, {"channel": theirs.fileno(), "verdict": write},
                       (theirs.fileno(), write))
        stack.callback(_kill, judge)
        ours.close()
        theirs.close()
        os.close(write)
        stack.callback(os.close, read)
        return _read_verdict(read, limits.seconds)


def _start(role: str, source: str, limits: Limits, walls: Walls, folder: str, more: dict[str, int],
           handles: tuple[int, ...]) -> subprocess.Popen[bytes]:
    root, work = Path(folder, f"{role}-root"), Path(folder, f"{role}-work")
    for place in (root, work):
        place.mkdir(mode=0o700)
    mega = 1 << 20
    config: dict[str, Any] = {
        "role": role, "parent": os.getpid(), "walls": walls, "root": str(root), "work": str(work),
        "work_bytes": limits.file_mb * mega,
        "limits": {"CPU": int(limits.seconds) + 1, "AS": limits.memory_mb * mega, "FSIZE": limits.file_mb * mega,
                   "NOFILE": limits.files, "NPROC": limits.threads, "CORE": 0}, **more}
    if walls != "namespaces":
        del config["limits"]["NPROC"]  # it would count all processes of the user
    process = subprocess.Popen([sys.executable, "-I", "-S", "-B", "-c", BOOTSTRAP, json.dumps(config),
                                str(Path(__file__).parent)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL if role != "probe" else subprocess.PIPE, pass_fds=handles,
                               env={}, start_new_session=True, cwd=folder)
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it ended at once: the verdict says so
        process.stdin.write(source.encode("utf-8", "replace"))
        process.stdin.close()
    process.stdin = None  # or `communicate` would flush it
    return process


def _read_verdict(read: int, seconds: float) -> Verdict:
    """What the judge writes. Only its process has the other end of the pipe."""
    deadline, content = time.monotonic() + seconds, b""
    while True:
        ready, _, _ = select.select([read], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return Verdict(False, f"timed out after {seconds:g} s")
        part = os.read(read, MAX_VERDICT)
        content += part
        if not part or len(content) > MAX_VERDICT:
            break
    try:
        found = json.loads(content)
        return Verdict(found["passed"] is True, str(found["reason"]))
    except (ValueError, LookupError, TypeError):
        return Verdict(False, "the test's process ended without a verdict")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and its session. Inside a namespace everything ends with the first process."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# ---------------------------------------------------------------- what this machine has


@cache
def find_walls() -> tuple[Walls, str]:
    """The strongest walls of this machine, and why not stronger ones."""
    reasons: list[str] = []
    stronger: tuple[Walls, ...] = ("namespaces", "landlock")
    for walls in stronger:
        reason = _probe(walls)
        if not reason:
            return walls, "; ".join(reasons)
        reasons.append(reason)
    return "none", "; ".join(reasons)


def _probe(walls: Walls) -> str:
    """Why these walls cannot be had; empty where they can."""
    if sys.platform != "linux":
        return f"{sys.platform} has none"
    with tempfile.TemporaryDirectory(prefix="luthier-sandbox-") as folder:
        process = _start("probe", "", Limits(), walls, folder, {}, ())
        try:
            _, output = process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            return f"{walls}: no answer"
        finally:
            _kill(process)
    return "" if process.returncode == 0 else output.decode("utf-8", "replace").strip()[-200:] or f"{walls}: refused"


def require_walls() -> Walls:
    """The strongest walls of this machine. Raises `RunError` where it has none."""
    walls, reason = find_walls()
    if walls == "none":
        raise RunError("the reward `code_tests` runs programs that a model wrote, and this machine cannot wall them "
                       f"off ({reason})",
                       "use a Linux kernel with user namespaces or Landlock; or set sandbox: process, which limits "
                       "time and memory only: such a program can read and change your files")
    return walls


def describe_isolation() -> str:
    """The isolation of a program on this machine, as a sentence."""
    walls, reason = find_walls()
    return {"namespaces": "namespaces, Landlock, seccomp, limits: no network, no files of the user, no other process",
            "landlock": f"Landlock, seccomp and limits: no network, no files of the user ({reason})",
            "none": f"none; code_tests needs sandbox: process ({reason})"}[walls]
