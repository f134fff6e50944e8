"""Which spellings of a label are one value. Imports `errors.py` only.

One rule holds for labels, tags, choices, verdicts, ranks, scores and weights, whatever kind of file they come from:

    1, 1.0, "1", "1.0", true, "true"     are the value 1
    0, 0.0, "0", "0.0", false, "false"   are the value 0
    0.5, "0.5", "0.50", "5e-1"           are the value 0.5
    "007", "1_000", "v1", "one"          are text: a numeral has no leading zero and no separators

A value is never a position: whether the value 1 is the name of a class is decided by comparing it with the names.
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
DECIMALS = 10  # different numbers that are not whole: more are a scale rather than classes


def parse_number(value: Any) -> int | float | None:
    """The number that a value or its text stands for; an int where it is whole and 64 bits hold it.

    NaN, infinities and larger integers are returned as they are: the caller refuses them. None: it is not a number.

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
    """What two labels of the same value have in common.

    Example:
        >>> {get_label_key(value) for value in (1, 1.0, "1", " 1.0", True, "True")}
        {'1'}
    """
    number = parse_number(value)
    return str(value).strip() if number is None else repr(number)


def get_label_name(value: Any) -> str:
    """The name that a label has by itself: as `label_key`, but true and false keep their words.

    Example:
        >>> [get_label_name(value) for value in (1.0, "1.0", True, "True", "good")]
        ['1', '1', 'true', 'true', 'good']
    """
    word = str(value).strip().lower() if isinstance(value, (str, bool)) else ""
    return word if word in TRUTH else get_label_key(value)


def collect_label_names(values: Iterable[Any]) -> dict[str, str]:
    """Key -> name of every different value: the name that all its spellings share, or else its key."""
    found: dict[str, str] = {}
    for value in values:
        key, name = get_label_key(value), get_label_name(value)
        found[key] = name if found.get(key, name) == name else key
    return found


def sort_labels(names: Iterable[str]) -> tuple[str, ...]:
    """By value where all are numbers, else by their letters."""
    listed = list(names)
    numbers = [parse_number(name) for name in listed]
    if any(number is None for number in numbers):
        return tuple(sorted(listed))
    return tuple(sorted(listed, key=lambda name: parse_number(name) or 0))


def is_continuous(names: Sequence[str], rows: float = math.inf) -> bool:
    """Whether these names of classes look like measurements of so many rows: more than `DECIMALS` different numbers
    with decimals, or at least three and no class with a second row."""
    numbers = [parse_number(name) for name in names]
    decimals = sum(isinstance(number, float) and math.isfinite(number) for number in numbers)
    return decimals > DECIMALS or (decimals > 2 and rows <= len(names))
