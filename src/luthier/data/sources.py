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
| a folder of images         | images; the subfolder is the class                                       |
| `*images-idx3-ubyte`         | images as MNIST keeps them, with their labels from the file beside it    |

`.gz`, `.bz2`, `.xz` and `.zst` behind any of the text suffixes are unpacked while reading.
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
    """Each file that `path` names, and its rows: a file, a folder of them, or a data set's name on the hub.

    Args:
        split: None: the one that `part` of a recipe (train, eval, test) reads, where there are several.
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
    """A `DataError` where a subset, or of one file a split, is named that is not there."""
    if subset is not None:
        raise DataError(f"{path} has no subset {subset!r}: it has no subsets", "leave out subset")
    if split not in (None, TRAIN, ALL):
        raise DataError(f"{path} is one file, which has no split {split!r}", "leave out split: all its rows are read")


def _group_images(folder: Path, images: Sequence[Path], split: str | None, part: str) -> list[tuple[Path, Path]]:
    """Of each image of a split the folder whose subfolders are its classes, and the image. The folders right below
    `folder` are splits where all of them are called so."""
    above = {file: file.relative_to(folder).parts[0] for file in images if file.parent != folder}
    splits = {name: KEYWORDS[name.lower()] for name in above.values() if name.lower() in KEYWORDS}
    held = any(found != TRAIN for found in splits.values())
    strange = next((file for file in images if above.get(file) not in splits), None)
    if split == ALL or not splits or (strange and not held):
        if split not in (None, TRAIN, ALL):
            raise DataError(f"{folder} has no split {split!r}", "leave out split: its folders are classes")
        return [(folder / above[file] if above.get(file) in splits and not strange else folder, file)
                for file in images]
    if strange:
        raise DataError(f"{folder} has the splits {', '.join(sorted(splits))}, and {strange.relative_to(folder)}, "
                        "whose folder is none", "name the folder of one split, or set split to all where they are "
                        "classes")
    wanted = resolve_split(split, part, splits, str(folder))
    return [(folder / name, file) for file, name in above.items() if splits[name] == splits[wanted]]


def check_source(path: str) -> None:
    """A `DataError` where `path` names no file, no folder, and cannot be a data set's name on the hub."""
    place = Path(path).expanduser()
    if not place.exists() and not (HUB_NAME.fullmatch(path) and not _get_suffix(place)):
        raise _build_missing_error(place)


def read_file(file: Path, *, document: str = "auto", header: bool = True) -> Rows:
    """The rows of one file, by its suffix."""
    kind = _get_suffix(file)
    if kind not in READERS:
        raise DataError(f"{file} has a suffix that is not known as data: {file.suffix!r}",
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
    """The suffix that says how rows are written: `.jsonl` of `a.jsonl.gz`; empty where it is not known."""
    suffix = file.suffix.lower()
    if suffix in OPENERS:
        suffix = Path(file.stem).suffix.lower()
    return ".jsonl" if suffix == ".ndjson" else suffix if suffix in READERS else ""


def _list_files(folder: Path) -> list[Path]:
    files = _list_data_files(folder)
    if not files:
        raise DataError(f"the folder {folder} holds no data file", f"known suffixes: {' '.join(READERS)}; or images")
    return files


def _list_data_files(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.rglob("*")) if file.is_file() and _get_suffix(file)
            and not any(part.startswith(".") for part in file.relative_to(folder).parts)
            and not file.name.lower().startswith(NOT_DATA)]


def _list_idx_files(folder: Path, split: str) -> list[Path]:
    """IDX files of images of a split, or of any: MNIST's own name for the test split is t10k."""
    there = [file for file in sorted(folder.iterdir()) if IDX.search(file.name)]
    named = [file for file in there if file.name.startswith((split, "t10k") if split == TEST else split)]
    if there and not named:
        raise DataError(f"{folder} has no split {split!r}",
                        f"it has: {', '.join(file.name for file in there)}; name one with split")
    return named


def _build_missing_error(place: Path) -> DataError:
    folder = place.parent
    while not folder.is_dir():
        folder = folder.parent
    names = [entry.name for entry in folder.iterdir()]
    below = place.relative_to(folder).parts[0] if folder != Path(".") else place.parts[0]
    close = difflib.get_close_matches(below, names, n=1, cutoff=0.5)
    hint = f"did you mean {folder / close[0]}?" if close else "check the path; it starts from the current folder"
    return DataError(f"there is no file {place}", hint)


def _read_unpacked(file: Path, kind: str, header: bool) -> Rows:
    with open_file(file) as stream:
        head = stream.peek(16)[:16]
        found = next((name for magic, name in MAGIC.items() if head.startswith(magic)), None)
        if found:
            raise DataError(f"{file} is {found}, not {kind[1:]} as its suffix says",
                            "give it the right suffix, or convert it")
        if not head.strip() and not stream.peek().strip():
            raise DataError(f"{file} is empty", "give a file with rows in it")
        yield from READERS[kind](stream, str(file), header)


# ---------------------------------------------------------------- through `datasets`, which is slow to import


def _read_parquet(file: Path) -> Rows:
    with file.open("rb") as stream:
        if stream.read(4) != b"PAR1":
            raise DataError(f"{file} is not Parquet as its suffix says", "give it the right suffix, or convert it")
    import datasets

    try:
        with _silence_libraries():
            rows = datasets.load_dataset("parquet", data_files=str(file), split="train", streaming=True)
        yield from _number_rows(rows, str(file))
    except (OSError, ValueError) as fault:
        raise DataError(f"{file} cannot be read as Parquet: {fault}", "the file is damaged; get it anew") from fault


@contextmanager
def _silence_libraries() -> Iterator[None]:
    """What the libraries say while they fail is told once, by the error that comes of it."""
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
        raise DataError(f"{folder} is one saved split, {found.split}, and not {split!r}", "leave out split")
    yield from _number_rows(found, str(folder))


def _read_hub_dataset(name: str, split: str, subset: str | None, streaming: bool) -> Rows:
    import datasets

    try:
        with _silence_libraries():
            rows = datasets.load_dataset(name, subset, split=split, streaming=streaming)
    except (OSError, ValueError) as fault:
        raise DataError(f"{name!r} is no file or folder here, and as a data set on the hub it cannot be had: {fault}",
                        "check the name, its `split` and `subset`, and the network; or give a file") from fault
    yield from _number_rows(rows, f"{name}[{split}]")


def _number_rows(rows: Any, name: str) -> Rows:
    named = {column: feature for column, feature in (rows.features or {}).items() if has_class_names(feature)}
    for number, row in enumerate(rows, 1):
        values = {column: _remove_padding(value) for column, value in row.items()}
        yield build_row(values | {column: decode_class_names(row[column], feature) for column,
                                  feature in named.items()},
                        Origin(name, number))


def _remove_padding(value: Any) -> Any:
    """A value without the nulls that a table puts into a struct for the fields that other rows have and this one has
    not: `{"city": "Oslo", "x": null}` is `{"city": "Oslo"}`, as it would stand in a line of JSON."""
    if isinstance(value, dict):
        return {key: _remove_padding(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list) and value and isinstance(value[0], (dict, list)):
        return [_remove_padding(inner) for inner in value]
    return value


def has_class_names(feature: Any) -> bool:
    """Whether the data set itself declares the names of the numbers in a column."""
    import datasets

    while isinstance(feature, (datasets.List, datasets.LargeList)):
        feature = feature.feature
    return isinstance(feature, datasets.ClassLabel)


def decode_class_names(value: Any, feature: Any) -> Any:
    """The declared names of class numbers. A number that has none, such as the -1 of rows without a label, is none."""
    if isinstance(value, list):
        return [decode_class_names(inner, feature.feature) for inner in value]
    if not isinstance(value, int):
        return value
    return feature.names[value] if 0 <= value < len(feature.names) else None
