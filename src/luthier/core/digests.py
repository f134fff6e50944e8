"""sha256 of files, computed once for each version of a file. Uses the standard library only.

A digest is taken over every byte: one flipped bit changes it. Digests of files of a megabyte or more are kept in the
cache, so that a model of many gigabytes is read once and not before every command. A cached digest is used only if the
file's absolute path, size, inode, modification time and change time are those at which it was computed. The change
time is set by the operating system at every write and cannot be set back. So a cached digest misses only a change
below the file system (a failing disk). The digest of a file that changed within the last seconds is not cached: a
second change could have the same time.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

SMALL = 1 << 20  # bytes; smaller files are always read
MIN_AGE = 3.0  # seconds; coarser than the clock of any file system in use


def get_cache_folder() -> Path:
    """The folder for what is computed once: `$LUTHIER_CACHE`, or `~/.cache/luthier`."""
    return Path(os.environ.get("LUTHIER_CACHE") or "~/.cache/luthier").expanduser()


def compute_file_sha256(path: Path) -> str:
    """sha256 of a file's content, as 64 hexadecimal digits."""
    stat = path.stat()
    if stat.st_size < SMALL:
        return _compute(path)
    place = path.resolve()
    version: list[str | int] = [str(place), stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
    kept = get_cache_folder() / "digests" / f"{hashlib.sha256(str(place).encode()).hexdigest()}.json"
    if (found := _read(kept, version)) is not None:
        return found
    began = time.time()
    found = _compute(path)
    after = path.stat()
    unchanged = version[1:] == [after.st_size, after.st_ino, after.st_mtime_ns, after.st_ctime_ns]
    if unchanged and began - after.st_ctime > MIN_AGE:
        _write(kept, {"version": version, "sha256": found})
    return found


def compute_files_sha256(files: Iterable[tuple[str, Path]]) -> str:
    """One sha256 over names and contents; the order of the files is part of it."""
    digest = hashlib.sha256()
    for name, path in files:
        digest.update(f"{compute_file_sha256(path)} {name}\n".encode())
    return digest.hexdigest()


def compute_path_sha256(path: Path) -> str:
    """sha256 of a file, or of the names and digests of a folder's files. Nothing is read from the cache."""
    if not path.is_dir():
        return _compute(path)
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(path)} {_compute(file)}\n".encode())
    return digest.hexdigest()


def compute_text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def compute_json_sha256(value: object) -> str:
    """sha256 of a JSON value, whatever the order of its keys."""
    return compute_text_sha256(json.dumps(value, sort_keys=True, ensure_ascii=False))


def _compute(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(kept: Path, version: list[str | int]) -> str | None:
    try:
        found = json.loads(kept.read_text(encoding="utf-8"))
        return str(found["sha256"]) if found["version"] == version else None
    except (OSError, ValueError, LookupError, TypeError):  # not kept, or damaged: it is computed again
        return None


def _write(kept: Path, content: dict[str, object]) -> None:
    """Caches a digest if possible: a cache that cannot be written only costs time."""
    temporary = kept.with_name(f".{kept.name}.{os.getpid()}")
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(json.dumps(content), encoding="utf-8")
            temporary.replace(kept)
        finally:
            temporary.unlink(missing_ok=True)
