"""Every kind of file gives the same rows with their lines; what is broken is refused by the row, or named as a whole."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest

from luthier.core.errors import DataError
from luthier.data.rows import RejectedRow, Row
from luthier.data.sources import read_source

ROWS = [{"text": "one"}, {"text": "two, \"quoted\""}, {"text": "dreißig 三十 🙂"}]


def every(path: str, **options: object) -> list[Row | RejectedRow]:
    return [row for _, rows in read_source(path, **options) for row in rows]


def said(found: list[Row | RejectedRow]) -> list[tuple[object, int]]:
    return [(row.reason if isinstance(row, RejectedRow) else row.values, row.origin.line) for row in found]


JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
WRITTEN = {
    "a.jsonl": (JSONL, [1, 2, 3]),
    "a.ndjson": (JSONL.replace("\n", "\r\n\r\n"), [1, 3, 5]),
    "bom.jsonl": ("\ufeff" + JSONL, [1, 2, 3]),
    "a.json": (json.dumps(ROWS, indent=2, ensure_ascii=False), [2, 5, 8]),
    "dense.json": (json.dumps(ROWS), [1, 1, 1]),
    "lines.json": (JSONL, [1, 2, 3]),
    "pretty.json": ("\n".join(json.dumps(row, indent=1) for row in ROWS), [1, 4, 7]),
    "array.jsonl": (json.dumps(ROWS, indent=2), [2, 5, 8]),
    "one_line_array.jsonl": (json.dumps(ROWS), [1, 1, 1]),
    "a.csv": ('text\none\n"two, ""quoted"""\ndreißig 三十 🙂\n', [2, 3, 4]),
    "a.tsv": ('text\none\n"two, ""quoted"""\ndreißig 三十 🙂\n', [2, 3, 4]),
    "raw.tsv": ('text\none\ntwo, "quoted"\ndreißig 三十 🙂', [2, 3, 4]),
    "a.txt": ('one\n\ntwo, "quoted"\n  \ndreißig 三十 🙂', [1, 3, 5]),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_every_way_of_writing_gives_the_same_rows_and_their_lines(name, write) -> None:
    content, lines = WRITTEN[name]
    assert said(every(write(name, content))) == list(zip(ROWS, lines, strict=True))


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
def test_packed_files_are_unpacked(suffix, pack, write) -> None:
    assert said(every(write("a.jsonl" + suffix, pack(JSONL.encode())))) == list(zip(ROWS, (1, 2, 3), strict=True))


def test_zstandard_is_read_or_its_package_is_named(write) -> None:
    zstandard = pytest.importorskip("zstandard", reason="the optional package is not installed")
    assert len(every(write("a.jsonl.zst", zstandard.compress(JSONL.encode())))) == 3


def test_parquet_and_saved_datasets(tmp_path) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(str(tmp_path / "a.parquet"))
    assert said(every(str(tmp_path / "a.parquet"))) == list(zip(ROWS, (1, 2, 3), strict=True))
    table.save_to_disk(str(tmp_path / "saved"))
    assert [values for values, _ in said(every(str(tmp_path / "saved")))] == ROWS
    datasets.DatasetDict({"test": table}).save_to_disk(str(tmp_path / "splits"))
    assert [values for values, _ in said(every(str(tmp_path / "splits"), split="test"))] == ROWS
    with pytest.raises(DataError, match="it has: test"):
        every(str(tmp_path / "splits"))


def test_documents_are_lines_or_files(write) -> None:
    markdown = write("a.md", "# Title\n\nwords\n")
    plain = write("a.txt", "one\ntwo\n")
    assert said(every(markdown)) == [({"text": "# Title\n\nwords\n"}, 1)]
    assert said(every(markdown, document="line")) == [({"text": "# Title"}, 1), ({"text": "words"}, 3)]
    assert said(every(plain, document="file")) == [({"text": "one\ntwo\n"}, 1)]


def test_a_folder_is_read_in_order_without_what_stands_beside_data(write, tmp_path) -> None:
    for name in ("b.txt", "a.txt", "deep/c.txt.gz", "README.md", ".hidden/d.txt", "picture.png"):
        content = name.encode()
        write(name, gzip.compress(content) if name.endswith("gz") else content)
    assert [values["text"] for values, _ in said(every(str(tmp_path)))] == ["a.txt", "b.txt", "deep/c.txt.gz"]


def test_a_table_without_header_numbers_its_columns(write) -> None:
    assert said(every(write("a.tsv", "fine\t1\nbad\t0\n"), header=False)) == [
        ({"0": "fine", "1": "1"}, 1), ({"0": "bad", "1": "0"}, 2)]


def test_a_cell_may_hold_line_breaks_and_the_next_row_knows_its_line(write) -> None:
    assert said(every(write("a.csv", 'text,x\n"one\ntwo",1\nthree,2\n'))) == [
        ({"text": "one\ntwo", "x": "1"}, 2), ({"text": "three", "x": "2"}, 4)]


BROKEN = {
    "json.jsonl": ('{"text": "a"}\n{"text": \n{"text": "b"}\n', [1, 3], {2: "broken JSON"}),
    "kind.jsonl": ('{"text": "a"}\n[1]\n"x"\n7\n{"text": "b"}\n', [1, 5], {2: "not an object", 3: "not an object", 4: "not an object"}),
    "bytes.jsonl": (b'{"text": "a"}\n{"text": "\xff\xfe"}\n{"text": "b"}\n', [1, 3], {2: "not UTF-8"}),
    "half.jsonl": ('{"text": "a"}\n{"text": [{"deep": "\\ud83d"}]}\n{"text": "b"}\n', [1, 3], {2: "not UTF-8"}),
    "deep.jsonl": ('{"text": "a"}\n' + "[" * 100000 + '\n{"text": "b"}\n', [1, 3], {2: "broken JSON"}),
    "array.json": ('[\n  {"text": "a"},\n  {"text": \n  },\n  {"text": "b"}\n]', [2, 5], {3: "broken JSON"}),
    "bytes.json": (b'[\n{"text": "a"},\n{"text": "\xff"},\n{"text": "b"}]', [2, 4], {3: "not UTF-8"}),
    "cut.json": ('[\n{"text": "a"},\n{"text": "b"},\n{"te', [2, 3], {4: "broken JSON"}),
    "cells.csv": ("text,x\na,1\nb\nc,1,2\nb,2\n", [2, 5], {3: "broken table row", 4: "broken table row"}),
    "bytes.csv": (b"text\na\n\xff\nb\n", [2, 4], {3: "not UTF-8"}),
    "bytes.txt": (b"a\n\xff\nb\n", [1, 3], {2: "not UTF-8"}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_row_is_refused_and_reading_goes_on(name, write) -> None:
    content, kept, refused = BROKEN[name]
    found = every(write(name, content))
    assert [row.values["text"] for row in found if isinstance(row, Row)] == ["a", "b"]
    assert [row.origin.line for row in found if isinstance(row, Row)] == kept
    assert {row.origin.line: row.reason for row in found if isinstance(row, RejectedRow)} == refused


def test_where_reading_cannot_go_on_the_refusal_says_so(write) -> None:
    *_, last = every(write("cut.json", BROKEN["cut.json"][0]))
    assert "the rest of the file could not be read" in last.detail
    assert "the rest" not in every(write("array.json", BROKEN["array.json"][0]))[1].detail


HOPELESS = {
    "empty.jsonl": (b"", "is empty"),
    "blank.txt": (b"\n  \n", "is empty"),
    "empty.jsonl.gz": (gzip.compress(b""), "is empty"),
    "zip.jsonl": (b"PK\x03\x04rest", "has the content of zip, but the suffix .jsonl"),
    "gzip.csv": (gzip.compress(b"text\na\n"), "has the content of gzip, but the suffix .csv"),
    "plain.jsonl.gz": (b'{"text": "a"}\n', "cannot be read"),
    "cut.jsonl.gz": (gzip.compress(JSONL.encode() * 50)[:-20], "cannot be read"),
    "plain.jsonl.xz": (b'{"text": "a"}\n', "cannot be read"),
    "words.json": (b"Dear diary", "is not JSON: it begins with 'Dear diary'"),
    "wide.txt": ("words".encode("utf-16"), "UTF-16"),
    "words.parquet": (b"Dear diary", "is not a Parquet file"),
    "picture.bmp": (b"BM", "unknown suffix"),
    "twice.csv": (b"a,a\n1,2\n", "column 'a' twice"),
}


@pytest.mark.parametrize("name", HOPELESS)
def test_a_hopeless_file_is_one_clear_error(name, write) -> None:
    content, words = HOPELESS[name]
    with pytest.raises(DataError, match=words):
        every(write(name, content))


def test_a_missing_file_names_its_nearest_neighbour(write, tmp_path) -> None:
    there = write("data/train.jsonl", JSONL)
    with pytest.raises(DataError, match=r"did you mean .*train\.jsonl"):
        every(there.replace("train", "trian"))
    with pytest.raises(DataError, match=r"did you mean .*data"):
        every(str(tmp_path / "dta" / "train.jsonl"))
    with pytest.raises(DataError, match="check the path"):
        every(str(tmp_path / "zzzzzzzz.csv"))


def test_a_folder_without_data_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no data file"):
        every(str(tmp_path))


def test_a_relative_path_is_found_and_missed(monkeypatch, tmp_path, write) -> None:
    write("train.jsonl", JSONL)
    monkeypatch.chdir(tmp_path)
    assert len(every("train.jsonl")) == 3
    with pytest.raises(DataError, match=r"did you mean train\.jsonl"):
        every("tran.jsonl")


@pytest.mark.parametrize(("text", "kept", "refused"), [
    ('[{"text": "a"}][{"text": "b"}]', ["a", "b"], 0), ('[{"text": "a"}]\n\n[{"text": "b"}, {"text": "c"}]\n', ["a", "b", "c"], 0),
    ('[][{"text": "b"}]', ["b"], 0), ('[{"text": "a"}] {"text": "b"}', ["a"], 1), ('[{"text": "a"}] and more', ["a"], 1),
    ('[{"text": "a"}, {"text": "b"}', ["a", "b"], 1), ('[{"text": "a"},', ["a"], 1), ('[{"text": "a"}, {"te', ["a"], 1),
    ('[{"text": "a"}]]', ["a"], 1), ('{"text": "a"}{"text": "b"}', ["a", "b"], 0), ('[{"text": "a"},]', ["a"], 0)])
def test_no_row_behind_the_first_document_is_lost(tmp_path: Path, text: str, kept: list[str], refused: int) -> None:
    (tmp_path / "rows.json").write_text(text)
    found = [row for _, rows in read_source(str(tmp_path / "rows.json")) for row in rows]
    assert [row.values["text"] for row in found if isinstance(row, Row)] == kept
    assert len([row for row in found if isinstance(row, RejectedRow)]) == refused


def test_a_packed_file_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.data.rows.ALWAYS_READ", 10_000)
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(b'{"text": "' + b"a" * 10**7 + b'"}\n'))
    (tmp_path / "plain.jsonl.gz").write_bytes(gzip.compress(b"".join(b'{"text": "row %d"}\n' % i for i in range(3000))))
    with pytest.raises(DataError, match="unpacks to more than"):
        [row for _, rows in read_source(str(tmp_path / "bomb.jsonl.gz")) for row in rows]
    assert len([row for _, rows in read_source(str(tmp_path / "plain.jsonl.gz")) for row in rows]) == 3000
