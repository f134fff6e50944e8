"""Locks on files, and temporary folders that no killed process leaves behind. Reads nothing else first.

A lock is `flock` on a file that holds the pid of its owner. The kernel releases it when the owner ends, however it
ends, so there are no stale locks.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK_FILE = ".lock"
STAGING_PREFIX = ".making-"
YOUNG_SECONDS = 60.0  # a folder of this age may belong to a process that has not locked it yet


class Locked(Exception):
    """Another process holds the lock; `owner` is its pid, or an empty text where it has not written it yet."""

    def __init__(self, file: Path, owner: str) -> None:
        self.file, self.owner = file, owner
        super().__init__(f"{file} is locked by process {owner or 'unknown'}")


@contextmanager
def hold_lock(file: Path) -> Iterator[None]:
    """Hold the lock `file`, and remove the file at the end. Raises `Locked` at once where another process holds it."""
    handle = _acquire(file)
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield
    finally:
        file.unlink(missing_ok=True)  # while the lock is held: see `_acquire`
        os.close(handle)


def _acquire(file: Path) -> int:
    """A file descriptor that holds the lock. The former owner may have removed the file after it was opened here; that
    lock protects nothing, so the file is opened again."""
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(handle, 20, 0).decode("ascii", "replace")
            os.close(handle)
            raise Locked(file, owner) from None
        except BaseException:
            os.close(handle)
            raise
        with suppress(FileNotFoundError):
            if os.stat(file).st_ino == os.fstat(handle).st_ino:
                return handle
        os.close(handle)


@contextmanager
def staging_folder(parent: Path) -> Iterator[Path]:
    """A new hidden folder in `parent`, deleted at the end. Those that killed processes left there are deleted first."""
    parent.mkdir(parents=True, exist_ok=True)
    sweep_staging(parent)
    folder = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=parent))
    try:
        with hold_lock(folder / LOCK_FILE):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep_staging(parent: Path) -> None:
    """Delete the staging folders in `parent` whose processes have ended."""
    for folder in parent.glob(f"{STAGING_PREFIX}*"):
        # Another process may sweep the same folder, and a folder of another user cannot be deleted.
        with suppress(Locked, OSError):
            if not (folder / LOCK_FILE).exists() and time.time() - folder.stat().st_mtime < YOUNG_SECONDS:
                continue
            with hold_lock(folder / LOCK_FILE):
                shutil.rmtree(folder, ignore_errors=True)
