"""What every config class shares: frozen, unknown keys refused, all errors at once. Read `errors.py` first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from luthier.core.errors import RecipeError, nearest


class Config(BaseModel):
    """A small frozen bundle of settings that stands beside what it configures."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @classmethod
    def parse(cls, raw: Mapping[str, Any], where: str = "") -> Self:
        """`raw` as this config. Raises one `RecipeError` that names every fault, each with its place."""
        try:
            return cls.model_validate(dict(raw))
        except ValidationError as error:
            raise RecipeError("\n".join(faults(error, cls, where)),
                              "mend the settings named above; `luthier schema` prints every one there is") from None


def faults(error: ValidationError, model: type[BaseModel], where: str = "") -> list[str]:
    """One line for each fault: where it stands, what was given, what the rule is."""
    lines = []
    for fault in error.errors(include_url=False):
        place = ".".join([where, *map(str, fault["loc"])]).strip(".")
        if fault["type"] == "extra_forbidden":
            known = _fields(model, fault["loc"][:-1])
            lines.append(f"unknown setting {place!r}: {nearest(str(fault['loc'][-1]), known)}")
        elif fault["type"] == "missing":
            lines.append(f"{place}: this setting is required")
        else:
            message = fault["msg"].removeprefix("Value error, ")
            lines.append(f"{place}: {message} (got {fault['input']!r})")
    return lines


def _fields(model: type[BaseModel], path: tuple[str | int, ...]) -> list[str]:
    """The settings known at `path` below `model`, for the nearest-neighbour hint."""
    choices = [model]
    for key in path:
        named = [c for c in choices if len(choices) > 1 and c.model_fields["name"].default == key]  # a union's branch
        field = choices[0].model_fields.get(str(key))
        inner = [t for t in _types(field.annotation) if issubclass(t, BaseModel)] if field else []
        choices = named or inner or choices
    return list(choices[0].model_fields)


def _types(annotation: Any) -> list[type]:
    """The classes inside an annotation such as ``A | tuple[B, ...] | None``."""
    if isinstance(annotation, type):
        return [annotation]
    return [found for part in get_args(annotation) for found in _types(part)]
