"""The sandbox holds: programs that misbehave are stopped, and nothing of them stays."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from luthier.rl import sandbox
from luthier.rl.sandbox import Limits, describe_isolation, passes_test, run_program

QUICK = Limits(seconds=1.0)


def test_a_program_runs_in_an_empty_folder_with_an_empty_environment() -> None:
    found = run_program("import os, math\nopen('a', 'w').write('x')\nprint(sorted(os.listdir()), len(os.environ), math.pi > 3)", QUICK)
    assert (found.code, found.timed_out) == (0, False)
    assert found.output.splitlines()[0].startswith("['a', 'answer.py']")


def test_its_folder_is_gone_afterwards() -> None:
    found = run_program("import os; print(os.getcwd())", QUICK)
    folder = Path(found.output.strip())
    assert folder.is_absolute()
    assert not folder.exists()


@pytest.mark.parametrize(("program", "word"), [
    ("x = 'a' * 10**10", "MemoryError"),
    ("open('big', 'wb').write(bytes(20 << 20))", "File too large"),
    ("kept = [open(f'f{i}', 'w') for i in range(100)]", "Too many open files"),
    ("import socket; socket.create_connection(('127.0.0.1', 9), 1)", "PermissionError"),
    ("import subprocess; subprocess.run(['true'])", "PermissionError"),
    ("import os\nwhile True: os.fork()", "PermissionError"),
    ("import ctypes; ctypes.CDLL(None)", "PermissionError"),
    ("open('../outside', 'w')", "PermissionError"),
    ("import os; os.remove('/etc/hostname')", "PermissionError"),
    ("raise ValueError('mine')", "ValueError: mine"),
])
def test_what_it_may_not_do_fails(program: str, word: str) -> None:
    found = run_program(program, QUICK)
    assert found.code != 0
    assert word in found.output, found.output


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)",
                                     "import signal, time\nsignal.signal(15, signal.SIG_IGN)\ntime.sleep(60)"])
def test_what_does_not_end_is_ended(program: str) -> None:
    began = time.monotonic()
    found = run_program(program, Limits(seconds=0.3))
    assert found.timed_out
    assert time.monotonic() - began < 3


def test_what_it_prints_is_cut() -> None:
    found = run_program("print('x' * 10**6)", Limits(seconds=1, output=100))
    assert len(found.output) == 100


UNGUARDED = """
import json, resource, sys
for kind, most in json.loads(sys.argv[1]).items():
    resource.setrlimit(vars(resource)[f'RLIMIT_{kind}'], (most, most))
exec(open(sys.argv[2]).read())
"""


def marked(word: str) -> list[str]:
    """Processes of this machine with `word` in their command line."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in place.read_bytes():
                found.append(place.parent.name)
        except OSError:  # it ended while we looked
            continue
    return found


@pytest.mark.skipif("no network" not in describe_isolation(), reason="this kernel gives no namespaces to its users")
def test_without_pythons_own_guard_the_kernel_still_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / f"bare-{os.getpid()}.py"
    script.write_text(UNGUARDED)
    monkeypatch.setattr(sandbox, "GUARD", script)
    bomb = "import os, time\ntry:\n    while True: os.fork()\nexcept OSError: pass\ntime.sleep(60)"
    assert run_program(bomb, Limits(seconds=0.5)).timed_out
    late = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(60)"
    assert run_program(late, QUICK).code == 0  # it ended, but what it left behind is in a session of its own
    deadline = time.monotonic() + 10  # the kernel ends a namespace when it gets to it; left alone, it would sleep for 60 s
    while marked(script.name) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not marked(script.name)
    net = "import socket\ntry: socket.create_connection(('127.0.0.1', 9), 1)\nexcept OSError as error: print(error)"
    assert "unreachable" in run_program(net, QUICK).output


def test_tests_pass_only_at_their_end() -> None:
    program = "def double(x): return 2 * x"
    assert passes_test(program, "assert double(2) == 4", QUICK)
    assert not passes_test(program, "assert double(2) == 5", QUICK)
    assert not passes_test(program + "\nimport sys; sys.exit(0)", "assert double(2) == 5", QUICK)
    assert not passes_test(program + "\nimport os; print('done'); os._exit(0)", "assert double(2) == 5", QUICK)
    assert not passes_test("def double(x:", "assert True", QUICK)
