"""Reads and checks values of a row: text, numbers, weights, labels, JSON in strings. Read `rows.py` first.

An invalid value raises `InvalidRowError`, which `data/formats/registry.py` converts to a rejected row with file and
line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from luthier.core.labels import get_label_key, get_label_name, is_oversized, parse_number

Values = Mapping[str, Any]
Label = str | float | tuple[str, ...]
EXACT = 2 ** 53  # floats represent all integers up to this
SHOWN = 60  # characters of a value that a message shows


class InvalidRowError(ValueError):
    """A row cannot be used: `reason` is counted, `detail` concerns this row only."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason, self.detail = reason, detail
        super().__init__(reason, detail)


def read_string(values: Values, column: str, default: str | None = None) -> str:
    value = values.get(column)
    if value is None and default is not None:
        return default
    if value is None:
        raise InvalidRowError(f"no {column}")
    if not isinstance(value, str):
        raise InvalidRowError(f"{column} is not text", f"it is {type(value).__name__}")
    return value


def read_nonempty_string(values: Values, column: str) -> str:
    """A string that is not empty."""
    found = read_string(values, column)
    if not found.strip():
        raise InvalidRowError(f"empty {column}")
    return found


def read_number(value: Any, column: str) -> float:
    """A finite number, also as text in a table cell; see `core/labels.py`."""
    found = parse_number(value)
    if found is None:
        raise InvalidRowError(f"{column} is not a number", _shorten(value))
    check_finite(found, column)
    return float(found)


def check_finite(found: float, column: str) -> None:
    """Raises `InvalidRowError` for NaN, an infinity, or an integer beyond 64 bits."""
    if is_oversized(found):
        raise InvalidRowError(f"{column} is an integer beyond 64 bits", _shorten(found))
    if not math.isfinite(found):
        raise InvalidRowError(f"{column} is not a finite number", _shorten(found))


def _shorten(value: Any) -> str:
    """A value for a message, shortened to fit a line."""
    if isinstance(value, int) and is_oversized(value):
        return f"{value.bit_length()} bits"  # Python refuses to print integers of thousands of digits
    said = repr(value)
    return said if len(said) <= SHOWN else f"{said[:SHOWN]}..."


def read_weight(value: Any) -> float | None:
    if value is None:
        return None
    found = parse_number(value)
    if found is None and isinstance(value, str):
        raise InvalidRowError("weight is not a number", _shorten(value))
    if found is None or is_oversized(found) or not 0 <= found < math.inf:
        raise InvalidRowError("weight is not a finite number from 0 up", _shorten(value))
    return float(found)


def read_row_weight(values: Values) -> float:
    found = read_weight(values.get("weight"))
    return 1.0 if found is None else found


def parse_json(value: Any, what: str) -> Any:
    """Parses a JSON string; a value that is not a string is returned unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as fault:
        raise InvalidRowError(f"{what} is not JSON", str(fault)) from None


def read_list(values: Values, column: str) -> list[Any]:
    """A list, also as JSON in a table cell."""
    found = parse_json(values[column], column)
    if not isinstance(found, (list, tuple)):
        raise InvalidRowError(f"{column} is not a list", f"it is {type(found).__name__}")
    if not found:
        raise InvalidRowError(f"{column} is empty")
    return list(found)


def read_tools(values: Values) -> tuple[Mapping[str, Any], ...]:
    raw = values.get("tools")
    found = parse_json(raw, "tools") if raw else []
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise InvalidRowError("tools is not a list of objects")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in found)


# ---------------------------------------------------------------- labels


def read_label(value: Any, column: str = "label") -> Label:
    """A name, a number, or a list of names (in a table cell as JSON). The objective decides whether a number is a
    class or a value."""
    if isinstance(value, str) and value.strip().startswith("[") and value.strip().endswith("]"):
        value = _parse_list_text(value)
    if isinstance(value, (list, tuple)):
        return tuple(format_class_name(_read_single_label(inner, column)) for inner in value)
    return _read_single_label(value, column)


def _parse_list_text(value: str) -> Any:
    """The list if the text is a JSON list, otherwise the text."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _read_single_label(value: Any, column: str) -> str | float:
    """One label. Text is unchanged, true and false become text, and integers beyond the precision of a float become
    text."""
    found = parse_number(value)
    if isinstance(value, str) and not value.strip():
        raise InvalidRowError(f"empty {column}")
    if found is None and not isinstance(value, str):
        raise InvalidRowError(f"{column} is neither a name, a number nor a list of names",
                              "a list within a list" if isinstance(value, (list, tuple))
                              else f"it is {type(value).__name__}")
    if found is not None:
        check_finite(found, column)
    if isinstance(value, str):
        return value.strip()
    assert found is not None, "other types are rejected above"
    return get_label_name(value) if isinstance(value, bool) or abs(found) > EXACT else float(found)


def format_class_name(value: Label) -> str:
    """The name of a class as it is written in the row; `core/labels.py` decides which names are equal."""
    assert not isinstance(value, tuple), "`read_label` rejects nested lists"
    return value if isinstance(value, str) else get_label_key(value)


VERDICTS = {"1": True, "good": True, "desirable": True, "0": False, "bad": False, "undesirable": False}


def read_verdict(value: Any) -> bool:
    """Whether a label means desirable; true and false are 1 and 0."""
    said = get_label_key(value).lower()
    if said not in VERDICTS:
        raise InvalidRowError("label is not desirable or undesirable",
                              f"{_shorten(value)}; known: {', '.join(VERDICTS)}, true, false")
    return VERDICTS[said]
