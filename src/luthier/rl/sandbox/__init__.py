"""Runs code that a model wrote, and the tests for it, behind the kernel's walls.

Read in this order: `wire.py` (plain values), `answer.py` and `judge.py` (the two processes), `seccomp.py` and
`walls.py` (what keeps them in), `processes.py` (starts them).
"""

from luthier.rl.sandbox.processes import Limits, Verdict, Walls, describe_isolation, find_walls, require_walls, run_test

__all__ = ["Limits", "Verdict", "Walls", "describe_isolation", "find_walls", "require_walls", "run_test"]
