"""Runs inside the sandbox: sets the limits, installs an audit hook, and runs the program.

    python -I -S -B sandbox_guard.py '{"CPU": 5, ...}' PROGRAM

Started by `sandbox.py`, never imported. Read `sandbox.py` first.
"""

import json
import os
import resource
import sys

REFUSED = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.kill", "pty.", "ctypes.")
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
           "os.chown", "shutil.")
HERE = os.path.realpath(".") + os.sep


def outside(path: object, real=os.path.realpath, text=os.fsdecode, here=HERE, end=os.sep) -> bool:  # type: ignore[no-untyped-def]
    return isinstance(path, str | bytes) and not (real(text(path)) + end).startswith(here)


def guard(event: str, args: tuple, outside=outside, refused=REFUSED, changes=CHANGES) -> None:  # type: ignore[no-untyped-def]
    """An audit hook. It cannot be removed, and what it uses are defaults, which the program cannot reach by name."""
    written = event == "open" and (args[2] or 0) & 0o3 and outside(args[0])
    if written or event.startswith(refused) or (event.startswith(changes) and any(map(outside, args))):
        raise PermissionError(f"{event} {args[0] if written else ''}: not in the sandbox")


def main() -> None:
    with open(sys.argv[2], encoding="utf-8") as file:
        program = compile(file.read(), "answer", "exec")
    for kind, most in json.loads(sys.argv[1]).items():  # a hard limit cannot be raised again
        resource.setrlimit(vars(resource)[f"RLIMIT_{kind}"], (most, most))
    sys.addaudithook(guard)
    exec(program, {"__name__": "__main__"})


if __name__ == "__main__":
    main()
