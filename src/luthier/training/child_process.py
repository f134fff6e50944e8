"""A training run in a child process, so that its memory is freed at the end. Read `run_folder.py` first."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from luthier.training.interrupts import end_with_parent

PARENT = "LUTHIER_PARENT_PID"  # the pid of the process that a child ends with


def end_with_parent_process() -> None:
    """In a process that `train_in_child_process` has started: end when the process that started it ends."""
    if parent := os.environ.pop(PARENT, ""):
        end_with_parent(int(parent))


def train_in_child_process(recipe: Mapping[str, Any], run: Path, allow_code: Sequence[str]) -> tuple[int, str]:
    """Train a resolved recipe into the folder `run`, or resume there. Returns the exit code and the last two lines.

    The recipe is written to `<run>.yaml`, and the output to `<run>.log`. The child ends when this process does,
    and may run the code that `allow_code` names.
    """
    written, log = run.with_name(f"{run.name}.yaml"), run.with_name(f"{run.name}.log")
    written.write_text(yaml.safe_dump({**recipe, "output_dir": str(run)}, sort_keys=False, allow_unicode=True),
                       encoding="utf-8")
    command = [sys.executable, "-m", "luthier", "train", str(written),
               *(["--resume"] if (run / "recipe.yaml").exists() else []),
               *(part for name in allow_code for part in ("--allow-code", name))]
    with log.open("w", encoding="utf-8") as stream:
        done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT,
                              env=os.environ | {PARENT: str(os.getpid())})
    return done.returncode, " ".join(log.read_text(encoding="utf-8").strip().splitlines()[-2:])
