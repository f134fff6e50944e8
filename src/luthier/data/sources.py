"""Rows with their origin, out of files, folders and the hub. The first step of the data room: read this file first.

    path -> files -> rows (a mapping of columns, and `file:line`)

A row that cannot be read is a `Refusal` with its reason, and reading goes on. A file that cannot be read at all
(missing, empty, damaged, or not what its suffix says) is one `DataError`.

| suffix                       | rows                                                                       |
|------------------------------|----------------------------------------------------------------------------|
| `.json`                      | the elements of an array, or objects one after the other                   |
| `.jsonl` `.ndjson`           | one object a line                                                          |
| `.csv`                       | RFC 4180 with a header line; without one where `columns` gives numbers     |
| `.tsv`                       | the same with tabs; a quote means itself unless it encloses the whole cell |
| `.parquet`                   | its rows                                                                   |
| `.txt`                       | one document a line; blank lines are no documents                          |
| `.md`                        | the whole file is one document                                             |

`.gz`, `.bz2`, `.xz` and `.zst` behind any of the text suffixes are unpacked while reading.
"""

from __future__ import annotations

import bz2
import csv
import difflib
import gzip
import importlib.util
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

from luthier.core.errors import DataError
from luthier.core.examples import Origin


@dataclass(frozen=True)
class Row:
    """What one row of a file says, by column."""

    values: Mapping[str, Any]
    origin: Origin


@dataclass(frozen=True)
class Refusal:
    """A row that is not trained on. `reason` is one of few, to count by; `detail` is about this row alone."""

    origin: Origin
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


Rows = Iterator[Row | Refusal]

MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstandard",
         b"PK\x03\x04": "zip", b"PAR1": "Parquet", b"%PDF": "PDF",
         b"\xff\xfe": "UTF-16 text", b"\xfe\xff": "UTF-16 text", b"\x89PNG": "PNG", b"SQLite format 3": "SQLite"}
BESIDE_DATA = ("readme", "license", "licence", "dataset_info", "notice")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
NOT_UTF8 = "not UTF-8"
BROKEN_JSON = "broken JSON"


# ---------------------------------------------------------------- from a path to rows


def read(path: str, *, split: str = "train", subset: str | None = None, document: str = "auto", header: bool = True,
         streaming: bool = False) -> Iterator[tuple[str, Rows]]:
    """Each file that `path` names, and its rows: a file, a folder of them, or a data set's name on the hub."""
    place = Path(path).expanduser()
    if place.is_dir() and ((place / "state.json").exists() or (place / "dataset_dict.json").exists()):
        yield path, _saved(place, split)
    elif place.is_dir():
        for file in _inside(place):
            yield str(file), read_file(file, document=document, header=header)
    elif place.exists():
        yield str(path), read_file(place, document=document, header=header)
    elif HUB_NAME.fullmatch(path) and not _kind(place):
        yield path, _hub(path, split, subset, streaming)
    else:
        demand(path)


def demand(path: str) -> None:
    """A `DataError` where `path` names no file, no folder, and cannot be a data set's name on the hub."""
    place = Path(path).expanduser()
    if not place.exists() and not (HUB_NAME.fullmatch(path) and not _kind(place)):
        raise _missing(place)


def read_file(file: Path, *, document: str = "auto", header: bool = True) -> Rows:
    """The rows of one file, by its suffix."""
    kind = _kind(file)
    if kind not in READERS:
        raise DataError(f"{file} has a suffix that is not known as data: {file.suffix!r}",
                        f"known: {' '.join(READERS)}, each also with {' '.join(OPENERS)}")
    if file.stat().st_size == 0:
        raise DataError(f"{file} is empty", "give a file with rows in it")
    if kind == ".parquet":
        return _parquet(file)
    if document == "file" and kind in (".txt", ".md"):
        kind = ".md"
    elif document == "line" and kind == ".md":
        kind = ".txt"
    return _unpacked(file, kind, header)


def _kind(file: Path) -> str:
    """The suffix that says how rows are written: `.jsonl` of `a.jsonl.gz`; empty where it is not known."""
    suffix = file.suffix.lower()
    if suffix in OPENERS:
        suffix = Path(file.stem).suffix.lower()
    return ".jsonl" if suffix == ".ndjson" else suffix if suffix in READERS else ""


def _inside(folder: Path) -> list[Path]:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and _kind(file)
             and not any(part.startswith(".") for part in file.relative_to(folder).parts)
             and not file.name.lower().startswith(BESIDE_DATA)]
    if not files:
        raise DataError(f"the folder {folder} holds no data file", f"known suffixes: {' '.join(READERS)}")
    return files


def _missing(place: Path) -> DataError:
    folder = place.parent
    while not folder.is_dir():
        folder = folder.parent
    names = [entry.name for entry in folder.iterdir()]
    below = place.relative_to(folder).parts[0] if folder != Path(".") else place.parts[0]
    close = difflib.get_close_matches(below, names, n=1, cutoff=0.5)
    hint = f"did you mean {folder / close[0]}?" if close else "check the path; it starts from the current folder"
    return DataError(f"there is no file {place}", hint)


# ---------------------------------------------------------------- opening


def _zstd(file: Path) -> IO[bytes]:
    if importlib.util.find_spec("zstandard") is None:
        raise DataError(f"{file} is packed with zstandard, which needs the package 'zstandard'",
                        "pip install zstandard, or unpack the file first")
    import zstandard

    return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(file.open("rb"), closefd=True))


OPENERS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstd}


@contextmanager
def _opened(file: Path) -> Iterator[io.BufferedReader]:
    """The unpacked bytes of `file`. Whatever unpacking complains about becomes one `DataError`."""
    opener = OPENERS.get(file.suffix.lower())
    try:
        with (opener(file) if opener else file.open("rb")) as raw:
            yield io.BufferedReader(raw)
    except (gzip.BadGzipFile, lzma.LZMAError, EOFError, zlib.error, OSError) as fault:
        raise DataError(f"{file} cannot be read: {fault}",
                        "it is damaged, or not what its suffix says: get it anew, or mend the suffix") from fault


def _unpacked(file: Path, kind: str, header: bool) -> Rows:
    with _opened(file) as stream:
        head = stream.peek(16)[:16]
        found = next((name for magic, name in MAGIC.items() if head.startswith(magic)), None)
        if found:
            raise DataError(f"{file} is {found}, not {kind[1:]} as its suffix says",
                            "give it the right suffix, or convert it")
        if not head.strip() and not stream.peek().strip():
            raise DataError(f"{file} is empty", "give a file with rows in it")
        yield from READERS[kind](stream, str(file), header)


# ---------------------------------------------------------------- one reader for each way of writing rows


def _json_lines(stream: IO[bytes], name: str, header: bool) -> Rows:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        origin = Origin(name, number)
        text = _decoded(line)
        if text is None:
            yield Refusal(origin, NOT_UTF8)
            continue
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as fault:
            if number == 1 and text.strip() == "[":
                yield from _json(io.BytesIO(line + stream.read()), name, header)
                return
            yield Refusal(origin, BROKEN_JSON, str(fault))
            continue
        if number == 1 and isinstance(value, list) and all(isinstance(item, dict) for item in value):
            for item in value:
                yield _object(item, origin)
        else:
            yield _object(value, origin)


def _json(stream: IO[bytes], name: str, header: bool) -> Rows:
    """Elements of an array, or objects in a run. Behind a broken one, the next that is indented alike is read."""
    raw = stream.read()
    text = raw.decode("utf-8-sig", errors="surrogateescape")
    decoder, skip = json.JSONDecoder(), re.compile(r"[\s,]*")
    at = skip.match(text).end()  # type: ignore[union-attr]
    array = text.startswith("[", at)
    if not array and not text.startswith("{", at):
        raise DataError(f"{name} is not JSON: it begins with {text[at:at + 20]!r}",
                        "give an array of objects, or another suffix")
    at = skip.match(text, at + array).end()  # type: ignore[union-attr]
    line, counted = 1, 0
    while at < len(text) and not (array and text[at] == "]"):
        line, counted = line + text.count("\n", counted, at), at
        origin = Origin(name, line)
        try:
            value, end = decoder.raw_decode(text, at)
            yield _object(value, origin)
        except (ValueError, RecursionError) as fault:
            resumed = _next_alike(text, at)
            rest = "" if resumed else "; the rest of the file could not be read"
            yield Refusal(origin, BROKEN_JSON, f"{fault}{rest}")
            end = resumed or len(text)
        at = skip.match(text, end).end()  # type: ignore[union-attr]


def _next_alike(text: str, at: int) -> int | None:
    """Where the next line begins that opens an object with the same indent as the line of `at`."""
    indent = text[text.rfind("\n", 0, at) + 1:at]
    found = re.compile(rf"^{indent}(?=\{{)", re.MULTILINE).search(text, at + 1) if not indent.strip() else None
    return found.end() if found else None


def _csv(stream: IO[bytes], name: str, header: bool) -> Rows:
    yield from _table(stream, name, header, {"delimiter": ","})


def _tsv(stream: IO[bytes], name: str, header: bool) -> Rows:
    for row in _table(stream, name, header, {"delimiter": "\t", "quoting": csv.QUOTE_NONE}):
        yield row if isinstance(row, Refusal) else Row({k: _unquoted(v) for k, v in row.values.items()}, row.origin)


def _table(stream: IO[bytes], name: str, header: bool, dialect: Mapping[str, Any]) -> Rows:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    lines = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(lines, **dialect)
    names = next(reader) if header else []
    repeated = {column for column in names if names.count(column) > 1}
    if repeated:
        raise DataError(f"{name} has the column {repeated.pop()!r} twice", "give every column its own name")
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as fault:
            yield Refusal(Origin(name, line), "broken table row", str(fault))
            continue
        if not cells:
            continue
        names = names or [str(number) for number in range(len(cells))]
        if len(cells) != len(names):
            yield Refusal(Origin(name, line), "broken table row", f"{len(cells)} cells under {len(names)} columns")
        else:
            yield _object(dict(zip(names, cells, strict=True)), Origin(name, line))


def _unquoted(cell: str) -> str:
    inner = cell[1:-1].replace('""', "")
    return cell[1:-1].replace('""', '"') if len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner else cell


def _text_lines(stream: IO[bytes], name: str, header: bool) -> Rows:
    for number, line in enumerate(stream, 1):
        text = _decoded(line)
        if text is None:
            yield Refusal(Origin(name, number), NOT_UTF8)
        elif text.strip():
            yield Row({"text": text.rstrip("\r\n")}, Origin(name, number))


def _text_file(stream: IO[bytes], name: str, header: bool) -> Rows:
    text = _decoded(stream.read())
    yield Refusal(Origin(name, 1), NOT_UTF8) if text is None else Row({"text": text}, Origin(name, 1))


READERS: dict[str, Callable[[IO[bytes], str, bool], Rows]] = {
    ".json": _json, ".jsonl": _json_lines, ".csv": _csv, ".tsv": _tsv, ".txt": _text_lines, ".md": _text_file,
    ".parquet": lambda stream, name, header: iter(())}  # Parquet is read by name, not as a stream


def _object(value: Any, origin: Origin) -> Row | Refusal:
    if not isinstance(value, dict):
        return Refusal(origin, "not an object", f"a row is a mapping of columns, this is {type(value).__name__}")
    if _undecodable(value):
        return Refusal(origin, NOT_UTF8)
    return Row(value, origin)


def _undecodable(value: Any) -> bool:
    """Whether a string in it holds half of a surrogate pair: a byte that was not UTF-8, or a broken JSON escape."""
    if isinstance(value, str):
        return not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value)
    if isinstance(value, dict):
        return any(_undecodable(inner) for inner in chain(value.keys(), value.values()))
    return isinstance(value, list) and any(map(_undecodable, value))


def _decoded(raw: bytes) -> str | None:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


# ---------------------------------------------------------------- through `datasets`, which is slow to import


def _parquet(file: Path) -> Rows:
    with file.open("rb") as stream:
        if stream.read(4) != b"PAR1":
            raise DataError(f"{file} is not Parquet as its suffix says", "give it the right suffix, or convert it")
    import datasets

    try:
        rows = datasets.load_dataset("parquet", data_files=str(file), split="train", streaming=True)
        yield from _numbered(rows, str(file))
    except (OSError, ValueError) as fault:
        raise DataError(f"{file} cannot be read as Parquet: {fault}", "the file is damaged; get it anew") from fault


def _saved(folder: Path, split: str) -> Rows:
    import datasets

    found = datasets.load_from_disk(str(folder))
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise DataError(f"{folder} has no split {split!r}", f"it has: {', '.join(map(str, found))}")
        found = found[split]
    yield from _numbered(found, str(folder))


def _hub(name: str, split: str, subset: str | None, streaming: bool) -> Rows:
    import datasets

    try:
        rows = datasets.load_dataset(name, subset, split=split, streaming=streaming)
    except (OSError, ValueError) as fault:
        raise DataError(f"{name!r} is no file or folder here, and as a data set on the hub it cannot be had: {fault}",
                        "check the name, its `split` and `subset`, and the network; or give a file") from fault
    yield from _numbered(rows, f"{name}[{split}]")


def _numbered(rows: Any, name: str) -> Rows:
    for number, row in enumerate(rows, 1):
        yield _object(row, Origin(name, number))
