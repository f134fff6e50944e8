"""Translates Pydantic's validation errors into lines that name the setting as a recipe writes it.

Read `errors.py` first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from luthier.core.errors import suggest_nearest

QUOTED = re.compile(r"'([^']+)'")
LABEL = re.compile(r"(str|int|float|bool|none)$|(literal|tuple|list|dict|lax-or-strict|function-\w+)\[")  # of a branch
PLAIN = {kind: f"Input should be {what}" for kind, what in {  # YAML's terms instead of Python's
    "tuple_type": "a list", "dict_type": "a mapping, {key: value}", "model_type": "a mapping, {key: value}",
    "mapping_type": "a mapping, {key: value}", "model_attributes_type": "a mapping, {key: value}"}.items()}


def translate_errors(error: ValidationError, model: type[BaseModel], where: str = "") -> list[str]:
    """One line for each invalid setting: the rule, and the given value. Settings are named as in a recipe: Pydantic's
    names for the branches of a union are removed, and the rules of the branches are joined into one line."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    unions: set[str] = set()
    for fault in error.errors(include_url=False):
        keys, branch = _format_location(model, fault["loc"])
        place = ".".join([where, *map(str, keys)]).strip(".")
        found.setdefault(place, []).append(dict(fault))
        if branch:
            unions.add(place)
    # For a union, the branch with the deepest fault is the intended one; faults of the other branches are omitted. A
    # list that is too short is omitted too if one of its entries is invalid.
    unions |= {place for place, faults in found.items() if faults[0]["type"] == "too_short"}
    meant = [place for place in found if not (place in unions and any(p.startswith(f"{place}.") for p in found))]
    return [_describe_error(place, found[place], model) for place in meant]


def _describe_error(place: str, faults: Sequence[Mapping[str, Any]], model: type[BaseModel]) -> str:
    first = faults[0]
    if first["type"] == "extra_forbidden":
        key = str(first["loc"][-1])
        inside = _list_union_members(model, key) if len(first["loc"]) == 1 else []
        hint = f"did you mean {inside[0]}.{key}?" if inside else suggest_nearest(key,
                                                                                 _list_fields(model, first["loc"][:-1]))
        return f"unknown setting {place!r}: {hint}"
    if first["type"] == "missing":
        return f"{place}: this setting is required"
    if first["type"] == "union_tag_invalid":
        known = [name for name in QUOTED.findall(first["ctx"]["expected_tags"]) if name != "composite"]
        hint = suggest_nearest(str(first["ctx"]["tag"]), known)
        every = f"; known: {', '.join(known)}" if hint.startswith("did") else ""
        return f"{place}: unknown name {first['ctx']['tag']!r}: {hint}{every}"
    rules = [PLAIN.get(fault["type"]) or fault["msg"].removeprefix("Value error, ") for fault in faults]
    words = [word for fault in faults if fault["type"] == "literal_error" for word in QUOTED.findall(fault["msg"])]
    hint = suggest_nearest(str(first["input"]), words) if words else ""
    return (f"{place}: {'; or: '.join(dict.fromkeys(rules))} (got {first['input']!r})"
            + (f"; {hint}" if hint.startswith("did you mean") else ""))


def _format_location(model: type[BaseModel], loc: Sequence[str | int]) -> tuple[list[str | int], bool]:
    """`loc` as a recipe has it, and whether it ends at a union's branch."""
    shown: list[str | int] = []
    choices: list[type[BaseModel]] = [model]
    branch = False
    for at, key in enumerate(loc):
        named = [c for c in choices if _pick_branch(c, key, choices)]
        fields = [c.model_fields[key] for c in choices if key in c.model_fields] if isinstance(key, str) else []
        branch = bool(named) or (not fields and isinstance(key, str) and bool(LABEL.match(key)) and at > 0)
        if named:
            choices = named
        elif fields:
            choices = [t for t in _describe_types(fields[0].annotation) if issubclass(t, BaseModel)]
        if not branch or (named and isinstance(shown[-1], int)):
            shown.append(key)
    return shown, branch


def _pick_branch(choice: type[BaseModel], key: str | int, choices: Sequence[type[BaseModel]]) -> bool:
    """Whether Pydantic uses this name for this class of a union: its field `name` if that is unique, otherwise the
    class name."""
    named = choice.model_fields.get("name")
    return (len(choices) > 1 and named is not None and named.default == key) or choice.__name__ == key


def _list_fields(model: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    """The settings known at `path` below `model`, for the nearest-neighbour hint."""
    choices = [model]
    for key in path:
        named = [c for c in choices if _pick_branch(c, key, choices)]
        field = choices[0].model_fields.get(str(key))
        inner = [t for t in _describe_types(field.annotation) if issubclass(t, BaseModel)] if field else []
        choices = named or inner or choices
    return list(choices[0].model_fields)


def _list_union_members(model: type[BaseModel], key: str) -> list[str]:
    """The parts of a recipe that have a setting of this name."""
    return [name for name, field in model.model_fields.items() for part in _describe_types(field.annotation)
            if issubclass(part, BaseModel) and key in part.model_fields]


def _describe_types(annotation: Any) -> list[type]:
    """The classes inside an annotation such as ``A | tuple[B, ...] | None``."""
    if isinstance(annotation, type):
        return [annotation]
    return [found for part in get_args(annotation) for found in _describe_types(part)]
