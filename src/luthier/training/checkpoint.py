"""Atomic checkpoints: a folder of tensors, state and a manifest. Read `core/errors.py` first.

    step-N/
      <part>.safetensors    one for each part: method, optimizer, ...
      state.json            everything that is not a tensor: cursor, schedule, random states
      manifest.json         size and sha256 of every other file

A folder is written under a hidden name, flushed to the disk, and then renamed. So a process that is killed leaves
either no `step-N` or a complete one. The manifest detects later damage. Hidden names:

    .writing-step-N-<pid>   incomplete
    .replaced-step-N        complete: the step's former checkpoint, until the new one has its name
    .dropped-step-N         to be deleted, perhaps half deleted

One process writes a run (`run_lock.py`). A `.writing` folder whose process has ended is deleted by the next save or
resume.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from luthier.core.errors import RunError
from luthier.training.os_errors import REMEDIES, parse_os_error

STATE, MANIFEST, SUFFIX = "state.json", "manifest.json", ".safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: `tensors[part][name]` on the CPU, bit for bit as saved, and the `state`."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]
    path: Path


# ---------------------------------------------------------------- writing


def save_checkpoint(folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any],
                    keep: int, protect: int | None = None) -> Path:
    """Write `folder/step-N/`, then delete all but the last `keep` checkpoints, never that of the step `protect`.

    Args:
        tensors: part -> name -> tensor, of any dtype, shape and device.
        state: a JSON value. Tuples come back as lists, and keys as strings.
        keep: how many checkpoints stay, this one included. Later steps are neither counted nor deleted.

    Raises `RunError` where the disk is full or not writable; earlier checkpoints are then unchanged.
    """
    assert keep >= 1, keep
    place, temporary = folder / f"step-{step}", folder / f".writing-step-{step}-{os.getpid()}"
    needed = sum(t.nbytes for part in tensors.values() for t in part.values())
    with _translate_os_errors(place, needed):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder)
            temporary.mkdir()
            _write_checkpoint(temporary, step, tensors, state)
            if place.exists():
                place.rename(folder / f".replaced-{place.name}")
            temporary.rename(place)
            _sync_path(folder)
        finally:  # already renamed on success; on failure the first error is raised, not one of the cleanup
            shutil.rmtree(temporary, ignore_errors=True)
        remove_leftovers(folder)
        older = sorted(s for s in _list_steps(folder) if s < step)
        for old in older[:max(0, len(older) - (keep - 1))]:
            if old != protect:
                _delete_checkpoint(folder / f"step-{old}")
    return place


def _write_checkpoint(folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]],
                      state: Mapping[str, Any]) -> None:
    for part, named in tensors.items():
        _write_tensors(folder / f"{part}{SUFFIX}", named)
    (folder / STATE).write_text(json.dumps({"step": step, "state": state}), encoding="utf-8")
    files = {path.name: {"size": path.stat().st_size, "sha256": _compute_sha256(path)}
             for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(files, indent=1), encoding="utf-8")
    for path in folder.iterdir():
        _sync_path(path)
    _sync_path(folder)


def _write_tensors(path: Path, named: Mapping[str, Tensor]) -> None:
    """One safetensors file. Views of one storage are copied, because the format has no shared storage."""
    seen: set[int] = set()
    plain = {}
    for name, tensor in named.items():
        whole = tensor.detach().contiguous()
        pointer = whole.untyped_storage().data_ptr()
        plain[name] = whole.clone() if pointer in seen else whole
        seen.add(pointer)
    try:
        save_file(plain, path)
    except SafetensorError as error:
        if number := parse_os_error(error):
            raise OSError(number, os.strerror(number), str(path)) from error
        raise
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes files that their owner alone can read


def _sync_path(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _translate_os_errors(place: Path, needed: int) -> Iterator[None]:
    """Translate errors of the file system to a `RunError` with the bytes needed and free."""
    try:
        yield
    except OSError as error:
        there = next(path for path in (place, *place.parents) if path.is_dir())
        free = shutil.disk_usage(there).free
        raise RunError(
            f"cannot save {place.name} in {place.parent}: {error.strerror} ({error.filename or place.parent}); "
            f"its tensors need {needed:,} bytes, and {free:,} are free",
            REMEDIES.get(error.errno or 0, "check that disk or folder, then resume")) from error


# ---------------------------------------------------------------- tidying


def _list_steps(folder: Path) -> list[int]:
    return [int(found[1]) for path in folder.iterdir() if (found := re.fullmatch(r"step-(\d+)", path.name))]


def _delete_checkpoint(path: Path) -> None:
    """Delete a checkpoint, renamed first, so that a half-deleted `step-N` never exists."""
    hidden = path.with_name(".dropped-" + path.name.removeprefix(".replaced-"))
    path.rename(hidden)
    shutil.rmtree(hidden)


def remove_leftovers(folder: Path) -> None:
    """Finish the renames and deletions of a writer that was killed."""
    for path in sorted(folder.glob(".*-step-*")):
        if path.name.startswith(".dropped-"):
            shutil.rmtree(path)
        elif path.name.startswith(".replaced-"):
            place = path.with_name(path.name.removeprefix(".replaced-"))
            if place.exists():
                _delete_checkpoint(path)
            else:
                path.rename(place)
        elif path.name.startswith(".writing-") and not _is_process_alive(int(path.name.rpartition("-")[2])):
            shutil.rmtree(path)


def _is_process_alive(pid: int) -> bool:
    """Whether another process has that id. A folder with our own id is of an earlier process with the same id."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs, as another user
        return True
    return True


# ---------------------------------------------------------------- reading


def load_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in the folder `path`, checked against its manifest. Raises `RunError` where a file is damaged."""
    if reason := _find_damage(path):
        raise RunError(f"the checkpoint {path} is damaged: {reason}", "resume from an older checkpoint, or start again")
    return _read_manifest(path)


def find_latest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest complete checkpoint in `folder`, or None; and a sentence on each damaged one that was skipped."""
    skipped = []
    found = None
    for path in _list_candidates(folder):
        reason = _find_damage(path)
        if not reason:
            found = _read_manifest(path)
            break
        skipped.append((path, reason))
    instead = f"step-{found.step} is used instead" if found else "no older checkpoint is complete"
    return found, [f"the checkpoint {path} is damaged: {reason}; {instead}" for path, reason in skipped]


def _list_candidates(folder: Path) -> list[Path]:
    """Checkpoints, newest first. A replaced one counts where its writer was killed before the new one had its name."""
    if not folder.is_dir():
        return []
    steps = {step: folder / f"step-{step}" for step in _list_steps(folder)}
    for path in folder.glob(".replaced-step-*"):
        steps.setdefault(int(path.name.rpartition("-")[2]), path)
    return [steps[step] for step in sorted(steps, reverse=True)]


def _read_manifest(path: Path) -> Checkpoint:
    names = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    tensors = {name.removesuffix(SUFFIX): load_file(path / name) for name in names if name.endswith(SUFFIX)}
    saved = json.loads((path / STATE).read_text(encoding="utf-8"))
    return Checkpoint(saved["step"], tensors, saved["state"], path)


def _find_damage(path: Path) -> str | None:
    """What is wrong with the checkpoint, or None."""
    name = MANIFEST
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = {name: (entry["size"], entry["sha256"]) for name, entry in manifest.items()}
        if STATE not in files:
            return f"{MANIFEST} does not name {STATE}"
        for name, (size, sha256) in files.items():
            found = (path / name).stat().st_size
            if found != size:
                return f"{name} has {found:,} bytes instead of {size:,}"
            if _compute_sha256(path / name) != sha256:
                return f"{name} has changed since it was written (its sha256 is another)"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:  # such as a bad sector
        return f"{name} cannot be read ({error.strerror})"
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        return f"{name} is not what was written ({error})"
    return None


def _compute_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
