"""The sandbox of code rewards: no program passes a test that it does not earn, and none reaches anything outside.

Read `rl/sandbox/__init__.py` first. Every attack runs as this user and, where this is root, as another user too.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from sandbox_attacks import ESCAPES, FAKES

from luthier.core.errors import RunError
from luthier.rl.sandbox import Limits, Verdict, describe_isolation, find_walls, processes, run_test, wire

WALLS, REASON = find_walls()
LIMITS = Limits(seconds=4.0)
USERS = ["this user", *(["nobody"] if os.geteuid() == 0 else [])]
NOBODY = 65534
CALL = """
outside = {outside!r}
try:
    result = attack(outside)
except MemoryError: result = 'held'
except (OSError, RuntimeError, ImportError, LookupError, ValueError): result = 'held'
except Exception as error:
    result = 'held' if 'sqlite' in str(error) or 'OperationalError' in str(error) or 'unable to open' in str(error) else f'{{type(error)}} {{error}}'
else: result = 'escaped'
assert result == 'held', result
"""

pytestmark = pytest.mark.skipif(WALLS == "none", reason=f"this machine has no walls: {REASON}")


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the escapes try to reach; it is there, and everybody may read and write it."""
    home = tmp_path_factory.mktemp("outside")
    for folder in (home, *home.parents[:3]):
        if folder.owner() == Path.home().owner():
            folder.chmod(0o777)
    (home / "secret").write_text("the secret")
    (home / "secret").chmod(0o666)
    listening = socket.create_server(("127.0.0.1", 0))
    abstract = socket.socket(socket.AF_UNIX)
    abstract.bind("\0luthier-attack")
    abstract.listen()
    os.environ["LUTHIER_SECRET"] = "secret"
    yield {"secret": str(home / "secret"), "folder": str(home), "port": listening.getsockname()[1], "pid": os.getpid(),
           "site": sysconfig.get_path("purelib")}
    del os.environ["LUTHIER_SECRET"]
    abstract.close()
    listening.settimeout(0.1)
    with pytest.raises(TimeoutError):  # nobody has connected
        listening.accept()
    listening.close()
    assert (home / "secret").read_text() == "the secret"
    assert [path.name for path in home.iterdir()] == ["secret"]
    assert not Path("/tmp/luthier-mark").exists()


def run_as(user: str, pairs: list[tuple[str, str]], walls: str | None = None) -> list[Verdict]:
    """The verdicts of (program, test) pairs, two at a time."""
    if user == "this user":
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda pair: run_test(*pair, LIMITS, walls), pairs))  # type: ignore[arg-type]
    code = (f"import os, sys, json; os.setgid({NOBODY}); os.setuid({NOBODY}); os.environ['TMPDIR'] = '/tmp'\n"
            f"sys.executable = {find_python_for_nobody()!r}\n"
            "from concurrent.futures import ThreadPoolExecutor\n"
            "from luthier_sandbox import processes\n"
            "limits = processes.Limits(seconds=4.0)\n"
            "with ThreadPoolExecutor(2) as pool:\n"
            "    found = list(pool.map(lambda pair: processes.run_test(*pair, limits), json.load(sys.stdin)))\n"
            "print(json.dumps([[v.passed, v.reason] for v in found]))\n")
    return [Verdict(*found) for found in json.loads(run_python_as_nobody(code, json.dumps(pairs)))]


def run_python_as_nobody(code: str, given: str) -> str:
    """Another user cannot read this one's Python, so the interpreter is started first and then changes its user."""
    start = ("import importlib.machinery, importlib.util, sys, types, os\n"
             f"sys.path[:0] = {sys.path!r}\n"
             "import luthier.rl.sandbox.processes as found\n"
             "package = types.ModuleType('luthier_sandbox'); package.processes = found\n"
             "sys.modules['luthier_sandbox'] = package; sys.modules['luthier_sandbox.processes'] = found\n"
             "import concurrent.futures.thread, tempfile, json, select, subprocess\n")
    done = subprocess.run([sys.executable, "-c", start + code], input=given, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def find_python_for_nobody() -> str:
    """A Python that another user can start; this one may lie in a folder that only root may enter. Empty: there is none."""
    for program in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        with suppress(OSError):
            if subprocess.run([program, "-I", "-S", "-c", "import ctypes"], user=NOBODY, group=NOBODY, extra_groups=[],
                              stderr=subprocess.DEVNULL, cwd="/").returncode == 0:
                return program
    return ""


def skip_unless_possible(user: str) -> None:
    if user == "nobody" and not find_python_for_nobody():
        pytest.skip("another user can start no Python here")


# ---------------------------------------------------------------- good programs pass


GOOD = {
    "a function": ("def f(x): return 2 * x", "assert f(2) == 4\nassert f(x=3) == 6\nassert isinstance(f(2), int)"),
    "a check function": ("def f(x): return 2 * x", "def check(candidate):\n    assert candidate(2) == 4\ncheck(f)"),
    "every plain type": ("def f(x): return x", "for v in (None, True, 3, -2**200, 1.5, float('inf'), 2j, 'ä\\n', b'x', [1, [2]], (1,), "
                         "{'a': {1: 2}}, {1, 2}, frozenset({3})):\n    assert f(v) == v\n    assert type(f(v)) is type(v)"),
    "a class": ("class S:\n    def __init__(self): self.x = []\n    def push(self, v): self.x.append(v)\n"
                "    def pop(self): return self.x.pop()\n    def __len__(self): return len(self.x)",
                "s = S()\ns.push(3)\ns.push((1, 'a'))\nassert len(s) == 2\nassert s.pop() == (1, 'a')\nassert s.x == [3]"),
    "an exception": ("def f(x):\n    if x < 0: raise ValueError('negative')\n    return x",
                     "try: f(-1)\nexcept ValueError as error: assert str(error) == 'negative'\nelse: assert False"),
    "an exception of its own": ("class Mine(Exception): pass\ndef f(): raise Mine('x')",
                                "try: f()\nexcept Exception as error: assert 'Mine' in str(error)\nelse: assert False"),
    "work in place": ("def f(l): l.sort()", "l = [3, 1]\nf(l)\nassert l == [1, 3]"),
    "a constant": ("LIMIT = [1, 2]", "assert LIMIT == [1, 2]"),
    "a generator": ("def f(n): yield from range(n)", "assert list(f(3)) == [0, 1, 2]"),
    "modules": ("import math, re, collections, itertools, functools, heapq, random, json, datetime, decimal, fractions\n"
                "def f(): return [math.pi > 3, re.findall('a', 'banana'), sorted(collections.Counter('aab').items())]",
                "assert f() == [True, ['a', 'a', 'a'], [('a', 2), ('b', 1)]]"),
    "files and threads": ("import threading\ndef f():\n    r = []\n    t = threading.Thread(target=lambda: r.append(1))\n    t.start()\n    t.join()\n"
                          "    with open('x', 'w') as file: file.write('y')\n    return r + [open('x').read()]",
                          "assert f() == [1, 'y']"),
    "a test with modules of its own": ("def f(x): return x / 3", "import math\nassert math.isclose(f(1), 1 / 3)"),
    "an object passed back": ("class N:\n    def __init__(self, v): self.v = v\ndef value(n): return n.v",
                              "assert value(N(4)) == 4"),
}


@pytest.mark.parametrize("walls", [WALLS, "landlock", "none"])
@pytest.mark.parametrize("name", GOOD)
def test_good_programs_pass(name: str, walls: processes.Walls) -> None:
    assert run_test(*GOOD[name], LIMITS, walls) == Verdict(True)


def test_a_wrong_program_fails_with_the_reason() -> None:
    assert run_test("def f(x): return 5", "assert f(2) == 4", LIMITS).reason.startswith("AssertionError")
    assert "NameError" in run_test("def g(x): return 4", "assert f(2) == 4", LIMITS).reason


# ---------------------------------------------------------------- attacks


@pytest.mark.parametrize("user", USERS)
def test_no_fake_passes(user: str) -> None:
    skip_unless_possible(user)
    assert len(FAKES) + len(ESCAPES) >= 60
    began = time.monotonic()
    found = run_as(user, [(program, "assert f(2) == 4") for program in FAKES.values()])
    assert [name for name, verdict in zip(FAKES, found, strict=True) if verdict.passed] == []
    assert time.monotonic() - began < 5 * len(FAKES)


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("walls", sorted({WALLS, "landlock"}))
def test_no_attack_escapes(outside: dict[str, Any], user: str, walls: str) -> None:
    """Each attack ran, and was held: an attack that does not run at all fails here."""
    skip_unless_possible(user)
    if walls == "landlock" and user == "nobody":
        pytest.skip("tried as this user")
    without = LANDLOCK_ALONE if walls == "landlock" and WALLS != "landlock" else ()
    names = [name for name in ESCAPES if name not in without]
    test = CALL.format(outside=outside)
    found = run_as(user, [(ESCAPES[name], test) for name in names], walls if user == "this user" else None)
    held = [name for name, verdict in zip(names, found, strict=True) if not verdict.passed
            and not any(word in verdict.reason for word in ("MemoryError", "ended", "raised ImportError"))]
    assert held == [], {name: verdict.reason for name, verdict in zip(names, found, strict=True) if name in held}


# Without namespaces there is no small file system, and a limit on processes would count all of the user's.
LANDLOCK_ALONE = ("fills the disk", "makes endless files", "starts endless threads", "reads it through ..")


@pytest.mark.parametrize("name", ["reads a secret file", "reads it by dir_fd", "reads it by ctypes", "lists the user's folder",
                                  "reads passwords", "connects by TCP", "connects by an abstract socket", "forks",
                                  "signals the caller", "runs a program by os.system", "makes a fifo", "makes a socket pair"])
def test_without_walls_the_attacks_succeed(name: str, tmp_path: Path) -> None:
    """The attacks above are real: without walls they reach what they try to reach."""
    (tmp_path / "secret").write_text("the secret")
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind("\0luthier-control")
        abstract.listen()
        outside = {"secret": str(tmp_path / "secret"), "folder": str(tmp_path), "port": listening.getsockname()[1],
                   "pid": os.getpid()}
        verdict = run_test(ESCAPES[name].replace("luthier-attack", "luthier-control"), CALL.format(outside=outside), LIMITS,
                           "none")
    assert verdict.reason == "AssertionError: escaped"


def test_nothing_stays_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    word = f"luthier{os.getpid()}"
    program = f"import threading, time\n'{word}'\nthreading.Thread(target=time.sleep, args=(60,)).start()\ntime.sleep(60)"
    verdict = run_test(program, "pass", Limits(seconds=0.5))
    assert "timed out" in verdict.reason
    assert not list(tmp_path.iterdir())
    deadline = time.monotonic() + 5
    while (left := list_processes(str(tmp_path))) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def list_processes(word: str) -> list[str]:
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in place.read_bytes() and place.parent.name != str(os.getpid()):
                found.append(place.parent.name)
        except OSError:  # it ended in the meantime
            continue
    return found


def test_a_program_ends_with_its_caller(tmp_path: Path) -> None:
    code = ("import tempfile\n"
            f"tempfile.tempdir = {str(tmp_path)!r}\n"
            "from luthier.rl.sandbox import Limits, run_test\n"
            "print('started', flush=True)\n"
            "run_test('import time\\ntime.sleep(600)', 'pass', Limits(seconds=300))")
    caller = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=os.environ | {
        "PYTHONPATH": str(Path(processes.__file__).parents[3])})
    deadline = time.monotonic() + 60
    while len(list_processes(str(tmp_path))) < 4 and time.monotonic() < deadline:  # caller, and the two children's
        time.sleep(0.05)
    caller.kill()
    caller.wait()
    deadline = time.monotonic() + 20
    while (left := list_processes("luthier-sandbox-")) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left, "the judge ends when its pipe is closed, and the answer with the judge"


# ---------------------------------------------------------------- plain values, and machines without walls


@pytest.mark.parametrize("message", [[], ["int"], ["int", 3], ["int", "x"], ["dict", [1]], ["dict", [["list"], 1]], ["set", ["list"]],
                                     ["object", 1], ["bytes", "zz"], ["what", 1], 3, 2.5, {"a": 1}, [["list"]], ["float", "x"],
                                     ["complex", 1], ["str", "ff"]])
def test_messages_that_are_not_well_formed_are_refused(message: Any) -> None:
    with pytest.raises(wire.NotPlain):
        wire.decode(message)


def test_without_walls_it_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "find_walls", lambda: ("none", "user namespaces are off"))
    with pytest.raises(RunError, match="user namespaces are off") as refused:
        run_test("def f(x): return 4", "assert f(2) == 4", LIMITS)
    assert "sandbox: process" in refused.value.remedy
    assert "sandbox: process" in describe_isolation()
    assert run_test("def f(x): return 4", "assert f(2) == 4", LIMITS, "none").passed


def test_describe_isolation_names_what_holds() -> None:
    assert "no network" in describe_isolation()
