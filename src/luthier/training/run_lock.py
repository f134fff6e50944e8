"""One writer for each run folder. Read `core/locks.py` and `run_folder.py` first."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain, count
from pathlib import Path

from luthier.core.errors import RunError
from luthier.core.locks import LOCK_FILE, Locked, hold_lock, sweep_staging
from luthier.training.checkpoint import remove_leftovers
from luthier.training.run_folder import Run

LEFTOVER = re.compile(r"\..+\.(\d+|writing)")  # temporary files of `Run.write` and of metrics.jsonl


@contextmanager
def lock_run(run: Run) -> Iterator[None]:
    """Be the only process that writes to the run folder, which is created where it is missing.

    Files that a killed writer left behind are deleted first. A folder in which nothing was written is removed again.

    Raises:
        RunError: another process writes there, or the folder cannot be written; nothing was changed then.
    """
    with ExitStack() as stack:
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            stack.callback(_remove_if_empty, run.path)
            stack.enter_context(hold_lock(run.path / LOCK_FILE))
            _sweep(run)
        except Locked as error:
            owner = f"process {error.owner}" if error.owner else "another process"
            raise RunError(f"the run folder {str(run.path)!r} is in use: {owner} is writing it",
                           f"wait until it has ended, or stop it (kill {error.owner or 'PID'}) and continue with "
                           "--resume; or name another folder (output_dir=NAME)") from None
        except OSError as error:
            raise RunError(f"the run folder {str(run.path)!r} cannot be written: {error.strerror}",
                           "free some space, or name a folder that can be written (output_dir=NAME)") from error
        yield


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # it is not empty
        folder.rmdir()


def create_numbered_folder(stem: Path) -> Path:
    """A new folder: `stem`, or `stem-2`, `stem-3`, ... where it exists. Two processes never get the same one."""
    names: Iterable[Path] = chain([stem], (stem.with_name(f"{stem.name}-{i}") for i in count(2)))
    for path in names:
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            continue
        except OSError as error:
            raise RunError(f"the run folder {str(path)!r} cannot be created: {error.strerror}",
                           "name a folder that can be written (output_dir=NAME)") from error
    raise AssertionError("an endless list of names has ended")


def _sweep(run: Run) -> None:
    """Delete what a killed writer left in the folder and among its checkpoints."""
    for path in run.path.glob(".*"):
        if LEFTOVER.fullmatch(path.name) and path.is_file():
            path.unlink()
    sweep_staging(run.path)
    if run.checkpoints.is_dir():
        remove_leftovers(run.checkpoints)
