"""Rows with their origin, rejected rows, and decompression of files. Read `core/examples.py` first."""

from __future__ import annotations

import bz2
import gzip
import importlib.util
import io
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from luthier.core.errors import DataError
from luthier.core.examples import Origin


@dataclass(frozen=True)
class Row:
    """One row of a file: values by column."""

    values: Mapping[str, Any]
    origin: Origin


@dataclass(frozen=True)
class RejectedRow:
    """A row that is not used. `reason` is one of a few texts that are counted; `detail` concerns this row only."""

    origin: Origin
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


Rows = Iterator[Row | RejectedRow]


def _open_zstd(file: Path) -> IO[bytes]:
    if importlib.util.find_spec("zstandard") is None:
        raise DataError(f"{file} is packed with zstandard, which needs the package 'zstandard'",
                        "pip install zstandard, or unpack the file first")
    import zstandard

    return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(file.open("rb"), closefd=True))


OPENERS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zstd}


MAX_RATIO, ALWAYS_READ = 200, 1 << 30  # text shrinks to a tenth; a file of zeros to a thousandth


class _LimitedReader(io.RawIOBase):
    """The unpacked bytes of a file, as many as its packed size makes plausible. Raises `DataError` beyond that."""

    def __init__(self, raw: Any, file: Path) -> None:
        self._raw, self._file = raw, file
        self._left = self._limit = max(ALWAYS_READ, MAX_RATIO * file.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        part = self._raw.read(len(buffer))
        self._left -= len(part)
        if self._left < 0:
            raise DataError(f"{self._file} unpacks to more than {self._limit:,} bytes, {MAX_RATIO} times its size",
                            "unpack it first, if it is what it should be")
        buffer[:len(part)] = part
        return len(part)


@contextmanager
def open_file(file: Path) -> Iterator[io.BufferedReader]:
    """The decompressed bytes of `file`. Every decompression error becomes one `DataError`."""
    opener = OPENERS.get(file.suffix.lower())
    try:
        with (opener(file) if opener else file.open("rb")) as raw:
            yield io.BufferedReader(_LimitedReader(raw, file) if opener else raw)
    except (gzip.BadGzipFile, lzma.LZMAError, EOFError, zlib.error, OSError) as fault:
        raise DataError(f"{file} cannot be read: {fault}",
                        "the file is damaged or has the wrong suffix: download it again, or fix the suffix") from fault
