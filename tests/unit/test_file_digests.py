"""sha256 of files: one flipped bit changes it, whatever was kept and whatever the file's times say."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from luthier.core import digests
from luthier.core.digests import SMALL, compute_file_sha256, compute_files_sha256

SIZE = SMALL + 4096


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is large enough to be kept, and a cache of its own."""
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "MIN_AGE", -60.0)  # as if the file were older
    made = tmp_path / "weights"
    made.write_bytes(os.urandom(SIZE))
    return made


def flip(file: Path, place: int) -> None:
    """One bit, with all times that a user can set put back."""
    times = file.stat()
    with file.open("r+b") as handle:
        handle.seek(place)
        byte = handle.read(1)
        handle.seek(place)
        handle.write(bytes([byte[0] ^ 1]))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file.stat().st_mtime_ns == times.st_mtime_ns


def never(path: Path) -> str:
    raise AssertionError("it is computed again")


@pytest.mark.parametrize("place", [0, 9, SIZE // 2, SIZE - 1])
def test_a_flipped_bit_is_noticed_though_the_digest_was_kept(file: Path, place: int) -> None:
    before = compute_file_sha256(file)
    assert before == hashlib.sha256(file.read_bytes()).hexdigest()
    flip(file, place)
    assert compute_file_sha256(file) == hashlib.sha256(file.read_bytes()).hexdigest() != before


def test_a_kept_digest_is_not_computed_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = compute_file_sha256(file)
    monkeypatch.setattr(digests, "_compute", never)
    assert compute_file_sha256(file) == before
    flip(file, 7)
    with pytest.raises(AssertionError, match="again"):
        compute_file_sha256(file)


def test_a_file_that_has_just_changed_is_not_kept(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "MIN_AGE", 3.0)
    compute_file_sha256(file)
    monkeypatch.setattr(digests, "_compute", never)
    with pytest.raises(AssertionError, match="again"):
        compute_file_sha256(file)


@pytest.mark.parametrize("content", ["", "{", "[]", json.dumps({"version": [], "sha256": "0" * 64})])
def test_a_damaged_cache_is_left_aside(file: Path, tmp_path: Path, content: str) -> None:
    before = compute_file_sha256(file)
    kept, = (tmp_path / "cache/digests").glob("*.json")
    kept.write_text(content)
    assert compute_file_sha256(file) == before


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").write_text("a file, no folder")
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "closed"))
    assert compute_file_sha256(file) == hashlib.sha256(file.read_bytes()).hexdigest()


def test_names_count_too(file: Path) -> None:
    assert compute_files_sha256([("a", file)]) != compute_files_sha256([("b", file)])
