"""Readers of JSON, JSON Lines, tables and plain text. Read `rows.py` first."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Mapping
from itertools import chain
from typing import IO, Any

from luthier.core.errors import DataError
from luthier.core.examples import Origin
from luthier.data.rows import RejectedRow, Row, Rows

NOT_UTF8 = "not UTF-8"
BROKEN_JSON = "broken JSON"


def _read_json_lines(stream: IO[bytes], name: str, header: bool) -> Rows:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        origin = Origin(name, number)
        text = _decode_text(line)
        if text is None:
            yield RejectedRow(origin, NOT_UTF8)
            continue
        try:
            value = json.loads(text, object_pairs_hook=_reject_duplicate_keys)
        except (ValueError, RecursionError) as fault:
            if number == 1 and text.strip() == "[":
                yield from _read_json(io.BytesIO(line + stream.read()), name, header)
                return
            yield RejectedRow(origin, BROKEN_JSON, str(fault))
            continue
        if number == 1 and isinstance(value, list) and all(isinstance(item, dict) for item in value):
            for item in value:
                yield build_row(item, origin)
        else:
            yield build_row(value, origin)


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. A duplicate key is an error, because the second value would replace the first."""
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice in an object")
    return made


def _read_json(stream: IO[bytes], name: str, header: bool) -> Rows:
    """Elements of consecutive arrays, or consecutive objects. After an invalid one, reading continues at the next
    object with the same indentation. What follows an array, and an array without an end, is reported."""
    raw = stream.read()
    text = raw.decode("utf-8-sig", errors="surrogateescape")
    decoder, skip = json.JSONDecoder(object_pairs_hook=_reject_duplicate_keys), re.compile(r"[\s,]*")
    at = skip.match(text).end()  # type: ignore[union-attr]
    array = text.startswith("[", at)
    if not array and not text.startswith("{", at):
        raise DataError(f"{name} is not JSON: it begins with {text[at:at + 20]!r}",
                        "give an array of objects, or another suffix")
    at = skip.match(text, at + array).end()  # type: ignore[union-attr]
    line, counted = 1, 0
    while at < len(text):
        line, counted = line + text.count("\n", counted, at), at
        origin = Origin(name, line)
        if array and text[at] == "]":
            at = skip.match(text, at + 1).end()  # type: ignore[union-attr]
            if at == len(text):
                return
            if text[at] != "[":
                yield RejectedRow(origin, BROKEN_JSON, f"after the end of the array stands {text[at:at + 20]!r}")
                return
            at = skip.match(text, at + 1).end()  # type: ignore[union-attr]
            continue
        try:
            value, end = decoder.raw_decode(text, at)
            yield build_row(value, origin)
        except (ValueError, RecursionError) as fault:
            resumed = _find_next_object(text, at)
            rest = "" if resumed else "; the rest of the file could not be read"
            yield RejectedRow(origin, BROKEN_JSON, f"{fault}{rest}")
            if resumed is None:
                return
            end = resumed
        at = skip.match(text, end).end()  # type: ignore[union-attr]
    if array:
        yield RejectedRow(Origin(name, line), BROKEN_JSON, "the array has no end: the file may have been cut off")


def _find_next_object(text: str, at: int) -> int | None:
    """The start of the next line that opens an object with the same indentation as the line of `at`."""
    indent = text[text.rfind("\n", 0, at) + 1:at]
    found = re.compile(rf"^{indent}(?=\{{)", re.MULTILINE).search(text, at + 1) if not indent.strip() else None
    return found.end() if found else None


def _read_csv(stream: IO[bytes], name: str, header: bool) -> Rows:
    # strict: otherwise the rest of the file after an unclosed quote would become one cell.
    yield from _read_table(stream, name, header, {"delimiter": ",", "strict": True})


def _read_tsv(stream: IO[bytes], name: str, header: bool) -> Rows:
    for row in _read_table(stream, name, header, {"delimiter": "\t", "quoting": csv.QUOTE_NONE}):
        yield row if isinstance(row, RejectedRow) else Row({k: _remove_quotes(v) for k, v in row.values.items()},
                                                           row.origin)


def _read_table(stream: IO[bytes], name: str, header: bool, dialect: Mapping[str, Any]) -> Rows:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    lines = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(lines, **dialect)
    try:
        names = next((cells for cells in reader if cells), []) if header else []
    except csv.Error as fault:
        raise DataError(f"{name}:1: the header line cannot be read ({fault})",
                        "close its quotes, or give a file with a line of column names") from fault
    other = next((mark for mark in ";\t|," if len(names) == 1 and mark in names[0] and mark != dialect["delimiter"]),
                 None)
    if other:
        raise DataError(f"{name}:1: the header line {names[0][:60]!r} is one column; its names seem to be separated by "
                        f"{other!r}", "write the table with commas (.csv) or tabs (.tsv)")
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
            upto = f", lines {line} to {reader.line_num}" if reader.line_num > line else ""
            yield RejectedRow(Origin(name, line), "broken table row", f"{fault}{upto}")
            continue
        if not cells:
            continue
        names = names or [str(number) for number in range(len(cells))]
        if len(cells) != len(names):
            yield RejectedRow(Origin(name, line), "broken table row", f"{len(cells)} cells under {len(names)} columns")
        else:
            yield build_row(dict(zip(names, cells, strict=True)), Origin(name, line))


def _remove_quotes(cell: str) -> str:
    inner = cell[1:-1].replace('""', "")
    return cell[1:-1].replace('""', '"') if len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner else cell


def _read_text_lines(stream: IO[bytes], name: str, header: bool) -> Rows:
    for number, line in enumerate(stream, 1):
        text = _decode_text(line)
        if text is None:
            yield RejectedRow(Origin(name, number), NOT_UTF8)
        elif text.strip():
            yield Row({"text": text.rstrip("\r\n")}, Origin(name, number))


def _read_text_file(stream: IO[bytes], name: str, header: bool) -> Rows:
    text = _decode_text(stream.read())
    yield RejectedRow(Origin(name, 1), NOT_UTF8) if text is None else Row({"text": text}, Origin(name, 1))


READERS: dict[str, Callable[[IO[bytes], str, bool], Rows]] = {
    ".json": _read_json, ".jsonl": _read_json_lines, ".csv": _read_csv, ".tsv": _read_tsv, ".txt": _read_text_lines,
    ".md": _read_text_file,
    ".parquet": lambda stream, name, header: iter(())}  # Parquet is read by name, not as a stream


def build_row(value: Any, origin: Origin) -> Row | RejectedRow:
    if not isinstance(value, dict):
        return RejectedRow(origin, "not an object", f"a row must be a mapping of columns, not {type(value).__name__}")
    if _has_surrogate(value):
        return RejectedRow(origin, NOT_UTF8)
    return Row(value, origin)


def _has_surrogate(value: Any) -> bool:
    """Whether it contains a string with half of a surrogate pair: a byte that was not UTF-8, or an invalid JSON
    escape."""
    if isinstance(value, str):
        return not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value)
    if isinstance(value, dict):
        return any(_has_surrogate(inner) for inner in chain(value.keys(), value.values()))
    return isinstance(value, list) and any(map(_has_surrogate, value))


def _decode_text(raw: bytes) -> str | None:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
