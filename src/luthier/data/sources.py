"""Reads rows with their origin from files, folders and the hub. The first step of the package: read this file first.

    path -> files -> rows (a mapping of columns, and `file:line`)

A row that cannot be read becomes a `RejectedRow` with a reason, and reading continues. A file that cannot be read at
all (missing, empty, damaged, or in another format than its suffix) raises `DataError`.

| suffix                       | rows                                                                       |
|------------------------------|----------------------------------------------------------------------------|
| `.json`                      | the elements of an array, or consecutive objects         |
| `.jsonl` `.ndjson`           | one object per line                                                        |
| `.csv`                       | RFC 4180 with a header line, or without one if `columns` has numbers       |
| `.tsv`                       | the same with tabs; quotes are literal unless they enclose the whole cell  |
| `.parquet`                   | its rows                                                                   |
| `.txt`                       | one document per line; blank lines are skipped                             |
| `.md`                        | the whole file is one document                                             |
| a folder of images         | images; the subfolder is the class                                       |
| `*images-idx3-ubyte`         | images in MNIST's format, with labels from the file in the same folder   |

Text files compressed as `.gz`, `.bz2`, `.xz` or `.zst` are decompressed while reading.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from luthier.core.errors import DataError
from luthier.core.examples import Origin
from luthier.data.images import IDX, list_images, read_idx, read_image_rows
from luthier.data.readers import READERS, build_row
from luthier.data.rows import OPENERS, Rows, open_file
from luthier.data.splits import ALL, DEFAULTS, KEYWORDS, TEST, TRAIN, choose_files, resolve_split

MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstandard",
         b"PK\x03\x04": "zip", b"PAR1": "Parquet", b"%PDF": "PDF",
         b"\xff\xfe": "UTF-16 text", b"\xfe\xff": "UTF-16 text", b"\x89PNG": "PNG", b"SQLite format 3": "SQLite"}
NOT_DATA = ("readme", "license", "license", "dataset_info", "notice")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


# ---------------------------------------------------------------- from a path to rows


def read_source(path: str, *, split: str | None = None, subset: str | None = None, part: str = "train",
                document: str = "auto",
                header: bool = True, streaming: bool = False) -> Iterator[tuple[str, Rows]]:
    """Each file of `path` (a file, a folder, or a hub id of a data set) with its rows.

    Args:
        split: None: the split that `part` of a recipe (train, eval, test) reads, if there are several.
        subset: None: the only one, or the default one.
    """
    place = Path(path).expanduser()
    if place.is_dir() and ((place / "state.json").exists() or (place / "dataset_dict.json").exists()):
        _check_no_subset(path, subset)
        yield path, _read_saved_dataset(place, split, part)
    elif place.is_dir() and not _list_data_files(place) and (images := list_images(place)):
        _check_no_subset(path, subset)
        yield path, read_image_rows(_group_images(place, images, split, part))
    elif place.is_dir() and not _list_data_files(place) and _list_idx_files(place, ""):
        _check_no_subset(path, subset)
        for file in _list_idx_files(place, split or DEFAULTS[part]):
            yield str(file), read_idx(file)
    elif place.is_dir():
        for file in choose_files(place, _list_files(place), split, subset, part):
            yield str(file), read_file(file, document=document, header=header)
    elif place.exists():
        _check_no_subset(path, subset, split)
        yield str(path), read_idx(place) if IDX.search(place.name) else read_file(place, document=document,
                                                                                  header=header)
    elif HUB_NAME.fullmatch(path) and not _get_suffix(place):
        yield path, _read_hub_dataset(path, split or DEFAULTS[part], subset, streaming)
    else:
        check_source(path)


def _check_no_subset(path: str, subset: str | None, split: str | None = None) -> None:
    """Raises `DataError` for a subset of a path without subsets, or for a split of a single file."""
    if subset is not None:
        raise DataError(f"{path} has no subset {subset!r}: it has no subsets", "omit subset")
    if split not in (None, TRAIN, ALL):
        raise DataError(f"{path} is one file, which has no split {split!r}", "omit split to read all its rows")


def _group_images(folder: Path, images: Sequence[Path], split: str | None, part: str) -> list[tuple[Path, Path]]:
    """The images of a split, each with the folder whose subfolders are classes. Direct subfolders of `folder` are
    splits if all of them have names of splits."""
    above = {file: file.relative_to(folder).parts[0] for file in images if file.parent != folder}
    splits = {name: KEYWORDS[name.lower()] for name in above.values() if name.lower() in KEYWORDS}
    held = any(found != TRAIN for found in splits.values())
    strange = next((file for file in images if above.get(file) not in splits), None)
    if split == ALL or not splits or (strange and not held):
        if split not in (None, TRAIN, ALL):
            raise DataError(f"{folder} has no split {split!r}", "omit split: its subfolders are classes")
        return [(folder / above[file] if above.get(file) in splits and not strange else folder, file)
                for file in images]
    if strange:
        raise DataError(f"{folder} has the splits {', '.join(sorted(splits))}, and {strange.relative_to(folder)}, "
                        "whose folder is not a split", "give the folder of one split, or set split to all if the "
                                                       "folders are classes")
    wanted = resolve_split(split, part, splits, str(folder))
    return [(folder / name, file) for file, name in above.items() if splits[name] == splits[wanted]]


def check_source(path: str) -> None:
    """Raises `DataError` if `path` is not a file, a folder or a valid hub id."""
    place = Path(path).expanduser()
    if not place.exists() and not (HUB_NAME.fullmatch(path) and not _get_suffix(place)):
        raise _build_missing_error(place)


def read_file(file: Path, *, document: str = "auto", header: bool = True) -> Rows:
    """The rows of one file, read by its suffix."""
    kind = _get_suffix(file)
    if kind not in READERS:
        raise DataError(f"{file} has an unknown suffix: {file.suffix!r}",
                        f"known: {' '.join(READERS)}, each also with {' '.join(OPENERS)}")
    if file.stat().st_size == 0:
        raise DataError(f"{file} is empty", "give a file with rows in it")
    if kind == ".parquet":
        return _read_parquet(file)
    if document == "file" and kind in (".txt", ".md"):
        kind = ".md"
    elif document == "line" and kind == ".md":
        kind = ".txt"
    return _read_unpacked(file, kind, header)


def _get_suffix(file: Path) -> str:
    """The suffix that decides the format: `.jsonl` of `a.jsonl.gz`; empty if it is unknown."""
    suffix = file.suffix.lower()
    if suffix in OPENERS:
        suffix = Path(file.stem).suffix.lower()
    return ".jsonl" if suffix == ".ndjson" else suffix if suffix in READERS else ""


def _list_files(folder: Path) -> list[Path]:
    files = _list_data_files(folder)
    if not files:
        raise DataError(f"the folder {folder} has no data file", f"known suffixes: {' '.join(READERS)}; or images")
    return files


def _list_data_files(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.rglob("*")) if file.is_file() and _get_suffix(file)
            and not any(part.startswith(".") for part in file.relative_to(folder).parts)
            and not file.name.lower().startswith(NOT_DATA)]


def _list_idx_files(folder: Path, split: str) -> list[Path]:
    """IDX files of images of one split, or of all. MNIST's name for the test split is t10k."""
    there = [file for file in sorted(folder.iterdir()) if IDX.search(file.name)]
    named = [file for file in there if file.name.startswith((split, "t10k") if split == TEST else split)]
    if there and not named:
        raise DataError(f"{folder} has no split {split!r}",
                        f"it has: {', '.join(file.name for file in there)}; set split to one of them")
    return named


def _build_missing_error(place: Path) -> DataError:
    folder = place.parent
    while not folder.is_dir():
        folder = folder.parent
    names = [entry.name for entry in folder.iterdir()]
    below = place.relative_to(folder).parts[0] if folder != Path(".") else place.parts[0]
    close = difflib.get_close_matches(below, names, n=1, cutoff=0.5)
    hint = f"did you mean {folder / close[0]}?" if close else "check the path, which is relative to the current folder"
    return DataError(f"file {place} not found", hint)


def _read_unpacked(file: Path, kind: str, header: bool) -> Rows:
    with open_file(file) as stream:
        head = stream.peek(16)[:16]
        found = next((name for magic, name in MAGIC.items() if head.startswith(magic)), None)
        if found:
            raise DataError(f"{file} has the content of {found}, but the suffix .{kind[1:]}",
                            "give it the right suffix, or convert it")
        if not head.strip() and not stream.peek().strip():
            raise DataError(f"{file} is empty", "give a file with rows in it")
        yield from READERS[kind](stream, str(file), header)


# ---------------------------------------------------------------- through `datasets`, which is slow to import


def _read_parquet(file: Path) -> Rows:
    with file.open("rb") as stream:
        if stream.read(4) != b"PAR1":
            raise DataError(f"{file} has the suffix .parquet but is not a Parquet file", "give it the right suffix, "
                                                                                         "or convert it")
    import datasets

    try:
        with _silence_libraries():
            rows = datasets.load_dataset("parquet", data_files=str(file), split="train", streaming=True)
        yield from _number_rows(rows, str(file))
    except (OSError, ValueError) as fault:
        raise DataError(f"{file} cannot be read as Parquet: {fault}",
                        "the file is damaged; download it again") from fault


@contextmanager
def _silence_libraries() -> Iterator[None]:
    """Silences log lines of libraries that fail, because the resulting error reports the failure."""
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _read_saved_dataset(folder: Path, split: str | None, part: str) -> Rows:
    import datasets

    found = datasets.load_from_disk(str(folder))
    if isinstance(found, datasets.DatasetDict):
        found = found[resolve_split(split, part, list(map(str, found)), str(folder))]
    elif split not in (None, TRAIN, ALL, str(found.split)):
        raise DataError(f"{folder} is one saved split, {found.split}, not {split!r}", "omit split")
    yield from _number_rows(found, str(folder))


def _read_hub_dataset(name: str, split: str, subset: str | None, streaming: bool) -> Rows:
    import datasets

    try:
        with _silence_libraries():
            rows = datasets.load_dataset(name, subset, split=split, streaming=streaming)
    except (OSError, ValueError) as fault:
        raise DataError(f"{name!r} is not a file or folder, and it cannot be loaded as a data set from the hub: "
                        f"{fault}",
                        "check the name, `split`, `subset` and the network connection, or give a file") from fault
    yield from _number_rows(rows, f"{name}[{split}]")


def _number_rows(rows: Any, name: str) -> Rows:
    named = {column: feature for column, feature in (rows.features or {}).items() if has_class_names(feature)}
    for number, row in enumerate(rows, 1):
        values = {column: _remove_padding(value) for column, value in row.items()}
        yield build_row(values | {column: decode_class_names(row[column], feature) for column,
                                  feature in named.items()},
                        Origin(name, number))


def _remove_padding(value: Any) -> Any:
    """A value without the nulls that a table adds to a struct for fields of other rows: `{"city": "Oslo", "x": null}`
    becomes `{"city": "Oslo"}`."""
    if isinstance(value, dict):
        return {key: _remove_padding(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list) and value and isinstance(value[0], (dict, list)):
        return [_remove_padding(inner) for inner in value]
    return value


def has_class_names(feature: Any) -> bool:
    """Whether the data set declares class names for a column."""
    import datasets

    while isinstance(feature, (datasets.List, datasets.LargeList)):
        feature = feature.feature
    return isinstance(feature, datasets.ClassLabel)


def decode_class_names(value: Any, feature: Any) -> Any:
    """The declared names of class indices. An index without a name, such as -1 of unlabeled rows, becomes None."""
    if isinstance(value, list):
        return [decode_class_names(inner, feature.feature) for inner in value]
    if not isinstance(value, int):
        return value
    return feature.names[value] if 0 <= value < len(feature.names) else None
