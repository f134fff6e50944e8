"""Rows that are given in Python are written to a file of JSON lines, which everything else reads by its path.

    [{"prompt": "2+2", "completion": "4"}, ...] | datasets.Dataset | pandas.DataFrame -> train.jsonl

Row n is line n, so reports name a row by its number. Values keep their order and their types; what JSON cannot hold
exactly (bytes, images, dates, NaN) is refused by row and column. Read `data/readers.py` first.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from luthier.core.errors import DataError
from luthier.data.config import Source
from luthier.data.sources import decode_class_names, has_class_names

REMEDY = "convert the column to text or numbers, or write the rows to a file and give its path"


def is_rows(value: Any) -> bool:
    """Whether a value of `data` holds rows, not paths of them.

    A mapping with a `path` and no key that a source does not have is a source.

    >>> is_rows([{"text": "a"}]), is_rows(["a.jsonl"]), is_rows([{"path": "a.jsonl", "weight": 2}]), is_rows([])
    (True, False, False, False)
    """
    if isinstance(value, list | tuple):
        return bool(value) and all(isinstance(item, Mapping) for item in value) and not all(map(is_source, value))
    return _is_table(value)


def is_source(value: Any) -> bool:
    """Whether a mapping has the keys of a source of rows."""
    return isinstance(value, Mapping) and "path" in value and value.keys() <= Source.model_fields.keys()


def is_dataset_dict(value: Any) -> bool:
    """Whether this is a `datasets.DatasetDict`, which maps splits to rows."""
    return isinstance(value, _get_classes("datasets", "DatasetDict", "IterableDatasetDict"))


def _is_table(value: Any) -> bool:
    return isinstance(value, _get_classes("datasets", "Dataset", "IterableDataset") + _get_classes("pandas",
                                                                                                 "DataFrame"))


def _get_classes(package: str, *names: str) -> tuple[type, ...]:
    """Classes of a package, if it is imported; if it is not, no value can be of them."""
    module = sys.modules.get(package)
    return () if module is None else tuple(vars(module)[name] for name in names if name in vars(module))


def write_rows(rows: Any, file: Path, title: str) -> None:
    """Write rows to a file of JSON lines.

    Args:
        title: the setting that holds the rows, such as `data.train`, for errors.

    Raises:
        DataError: there is no row, or JSON cannot hold a value.
    """
    count = 0
    with file.open("w", encoding="utf-8") as stream:
        for count, row in enumerate(_iterate(rows, title), 1):
            for column in row:
                if not isinstance(column, str):
                    raise DataError(f"{title}, row {count}: the column {column!r} is not named by text",
                                    "name every column")
            plain = {column: _to_plain(value, f"{title}, row {count}, column {column!r}")
                     for column, value in row.items()}
            stream.write(json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n")
    if not count:
        raise DataError(f"{title}: there are no rows in it", "give at least one row")


def _iterate(rows: Any, title: str) -> Iterator[Mapping[Any, Any]]:
    is_frame = isinstance(rows, _get_classes("pandas", "DataFrame"))
    if is_frame:
        if not rows.columns.is_unique:
            raise DataError(f"{title} has the column {rows.columns[rows.columns.duplicated()][0]!r} twice",
                            "give every column its own name")
        missing = rows.isna().to_numpy()
        for number, row in enumerate(rows.itertuples(index=False, name=None)):
            yield {column: None if absent else value for column, value, absent in zip(rows.columns, row,
                                                                                      missing[number], strict=True)}
        return
    if not isinstance(rows, list | tuple):
        named = {column: feature for column, feature in (rows.features or {}).items() if has_class_names(feature)}
        for row in rows:
            yield {**row, **{column: decode_class_names(row[column], feature) for column, feature in named.items()}}
        return
    yield from rows


def _to_plain(value: Any, place: str) -> Any:
    """The same value as JSON holds it: numbers of NumPy become Python's, tuples and arrays become lists."""
    if value is None or type(value) in (str, bool, int):
        return value
    if type(value) is float:
        if not math.isfinite(value):
            raise DataError(f"{place}: {value} is not a number that JSON holds", "drop the row, or use None")
        return value
    if isinstance(value, Mapping):
        if bad := next((key for key in value if not isinstance(key, str)), None):
            raise DataError(f"{place}: the key {bad!r} is not text", REMEDY)
        return {key: _to_plain(inner, place) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(inner, place) for inner in value]
    import numpy as np
    if isinstance(value, np.generic | np.ndarray) and value.dtype.kind in "biufUO":
        plain = value.tolist()
        if not isinstance(plain, np.generic | np.ndarray):
            return _to_plain(plain, place)
    if isinstance(value, str):  # a subclass, such as an enumeration of text
        return str.__str__(value)
    what = "an image" if any(kind.__name__ == "Image" for kind in type(value).__mro__) else type(value).__name__
    remedy = "save the images in a folder, one subfolder for each class, and give the folder" \
        if what == "an image" or isinstance(value, bytes) else REMEDY
    raise DataError(f"{place}: {what} cannot be kept as JSON", remedy)


def list_splits(dataset: Mapping[Any, Any]) -> dict[str, Any]:
    """The parts of a recipe's `data` that the splits of a `DatasetDict` are: train, eval (validation) and test."""
    names = {"train": "train", "validation": "eval", "valid": "eval", "dev": "eval", "eval": "eval", "test": "test"}
    if unknown := [str(name) for name in dataset if str(name) not in names]:
        raise DataError(f"data: the split {unknown[0]!r} is neither train, validation nor test",
                        "name the splits yourself: data={'train': dataset['...'], 'test': dataset['...']}")
    parts: dict[str, Any] = {}
    for name, rows in dataset.items():
        if names[str(name)] in parts:
            raise DataError(f"data: the splits {', '.join(map(str, dataset))} hold validation rows twice",
                            "name the splits yourself: data={'train': ..., 'eval': ...}")
        parts[names[str(name)]] = rows
    return parts
