"""Values of a row, checked: text, numbers, weights, labels, JSON inside strings. Read `rows.py` first.

Whatever is not as it should be is an `UnfitError`, which `formats.py` turns into a refusal with file and line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

Values = Mapping[str, Any]
Label = str | float | tuple[str, ...]


class UnfitError(ValueError):
    """A row cannot become an example: a reason to count by, and what is particular to the row."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason, self.detail = reason, detail
        super().__init__(reason, detail)


def text(values: Values, column: str, default: str | None = None) -> str:
    value = values.get(column)
    if value is None and default is not None:
        return default
    if value is None:
        raise UnfitError(f"no {column}")
    if not isinstance(value, str):
        raise UnfitError(f"{column} is not text", f"it is {type(value).__name__}")
    return value


def words(values: Values, column: str) -> str:
    """Text that says something."""
    found = text(values, column)
    if not found.strip():
        raise UnfitError(f"empty {column}")
    return found


def number(value: Any, column: str) -> float:
    """A finite number, or one in words as tables hold it."""
    try:
        found = float(value) if isinstance(value, (int, float, str)) else math.nan
    except ValueError:
        raise UnfitError(f"{column} is not a number", repr(value)) from None
    if not math.isfinite(found):
        raise UnfitError(f"{column} is not a finite number", repr(value))
    return found


def weight(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise UnfitError("weight is not a number", repr(value)) from None
    if not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise UnfitError("weight is not a finite number from 0 up", repr(value))
    return float(value)


def row_weight(values: Values) -> float:
    found = weight(values.get("weight"))
    return 1.0 if found is None else found


def parsed(value: Any, what: str) -> Any:
    """JSON inside a string, or the value itself where it is already structured."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as fault:
        raise UnfitError(f"{what} is not JSON", str(fault)) from None


def listed(values: Values, column: str) -> list[Any]:
    """A list, or one as JSON in a table's cell."""
    found = parsed(values[column], column)
    if not isinstance(found, (list, tuple)):
        raise UnfitError(f"{column} is not a list", f"it is {type(found).__name__}")
    if not found:
        raise UnfitError(f"{column} is empty")
    return list(found)


def tools(values: Values) -> tuple[Mapping[str, Any], ...]:
    raw = values.get("tools")
    found = parsed(raw, "tools") if raw else []
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise UnfitError("tools is not a list of objects")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in found)


# ---------------------------------------------------------------- labels


def label(value: Any) -> Label:
    """A name, a number, or a list of names; whether a number is a class or a measure is for the objective to say."""
    if isinstance(value, (list, tuple)):
        return tuple(name(label(inner)) for inner in value)
    if isinstance(value, str):
        if not value.strip():
            raise UnfitError("empty label")
        return value.strip()
    if not isinstance(value, (int, float)):
        raise UnfitError("label is neither a name, a number nor a list of names", f"it is {type(value).__name__}")
    return number(float(value), "label")


def name(value: Label) -> str:
    """A class's name: 1, 1.0 and "1" are the same."""
    if isinstance(value, float):
        return str(int(value)) if value == int(value) else repr(value)
    if isinstance(value, tuple):
        raise UnfitError("a label within a label")
    return value


VERDICTS = {"1": True, "true": True, "good": True, "desirable": True,
            "0": False, "false": False, "bad": False, "undesirable": False}


def verdict(value: Any) -> bool:
    """Good or bad."""
    said = str(int(value)) if isinstance(value, (bool, int, float)) and value in (0, 1) else str(value).strip().lower()
    if said not in VERDICTS:
        raise UnfitError("label is neither good nor bad", f"{value!r}; known: {', '.join(VERDICTS)}")
    return VERDICTS[said]
