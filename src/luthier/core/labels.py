"""Reads values of labels: which texts and numbers are equal. Imports only `errors.py`.

The same rules apply to labels, tags, choices, ranks, scores and weights in every file type:

    1, 1.0, "1", "1.0", true, "true"     are the value 1
    0, 0.0, "0", "0.0", false, "false"   are the value 0
    0.5, "0.5", "0.50", "5e-1"           are the value 0.5
    "007", "1_000", "v1", "one"          are text: numbers have no leading zero and no separators

A label is never an index: it is compared with the names of the classes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any

NUMERAL = re.compile(r"[+-]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
INTEGER = re.compile(r"[+-]?[0-9]+")
NOT_FINITE = re.compile(r"[+-]?(?:nan|inf|infinity)", re.IGNORECASE)
TRUTH = {"true": 1, "false": 0}
LOWEST, HIGHEST = -2 ** 63, 2 ** 64 - 1  # integers that 64 bits hold, with or without a sign
DECIMALS = 10  # different decimal numbers; more are probably values, not classes


def parse_number(value: Any) -> int | float | None:
    """The number of a value or its text; an int if it is whole and fits in 64 bits.

    NaN, infinities and larger integers are returned unchanged, and callers reject them. None: it is not a number.

    Example:
        >>> [parse_number(value) for value in (True, "1.0", " 2.50", "1e999", "007", "one")]
        [1, 1, 2.5, inf, None, None]
    """
    if isinstance(value, str):
        found = _parse_text(value.strip())
    elif isinstance(value, bool):
        found = int(value)
    elif isinstance(value, Decimal):
        found = int(value) if value.is_finite() and _can_hold(value) and value == value.to_integral_value() \
            else float(value)
    else:
        found = value if isinstance(value, (int, float)) else None
    whole = isinstance(found, float) and found.is_integer() and _can_hold(found)
    return int(found) if whole and found is not None else found


def _parse_text(text: str) -> int | float | None:
    if text.lower() in TRUTH:
        return TRUTH[text.lower()]
    if NOT_FINITE.fullmatch(text):
        return float(text)
    if not NUMERAL.fullmatch(text):
        return None
    # Python refuses to read integers of thousands of digits; none of them fits into 64 bits.
    return int(text[:100]) if INTEGER.fullmatch(text) else float(text)


def _can_hold(number: float | Decimal) -> bool:
    return LOWEST <= number <= HIGHEST


def is_oversized(number: float) -> bool:
    """Whether it is an integer that 64 bits do not hold."""
    return isinstance(number, int) and not _can_hold(number)


def get_label_key(value: Any) -> str:
    """A key that is equal for labels with the same value.

    Example:
        >>> {get_label_key(value) for value in (1, 1.0, "1", " 1.0", True, "True")}
        {'1'}
    """
    number = parse_number(value)
    return str(value).strip() if number is None else repr(number)


def get_label_name(value: Any) -> str:
    """The name of a label: as `get_label_key`, but true and false stay text.

    Example:
        >>> [get_label_name(value) for value in (1.0, "1.0", True, "True", "good")]
        ['1', '1', 'true', 'true', 'good']
    """
    word = str(value).strip().lower() if isinstance(value, (str, bool)) else ""
    return word if word in TRUTH else get_label_key(value)


def collect_label_names(values: Iterable[Any]) -> dict[str, str]:
    """Key -> name of every different value: the common name of all its texts, otherwise its key."""
    found: dict[str, str] = {}
    for value in values:
        key, name = get_label_key(value), get_label_name(value)
        found[key] = name if found.get(key, name) == name else key
    return found


def sort_labels(names: Iterable[str]) -> tuple[str, ...]:
    """Sorted by value if all are numbers, otherwise alphabetically."""
    listed = list(names)
    numbers = [parse_number(name) for name in listed]
    if any(number is None for number in numbers):
        return tuple(sorted(listed))
    return tuple(sorted(listed, key=lambda name: parse_number(name) or 0))


def is_continuous(names: Sequence[str], rows: float = math.inf) -> bool:
    """Whether these class names look like values of a regression: more than `DECIMALS` different decimal numbers, or
    at least three and none occurs twice."""
    numbers = [parse_number(name) for name in names]
    decimals = sum(isinstance(number, float) and math.isfinite(number) for number in numbers)
    return decimals > DECIMALS or (decimals > 2 and rows <= len(names))
