"""The public surface is frozen in surface.txt: public names, recipe settings, commands and their options.

Changing it is a deliberate act: `PYTHONPATH=src python -m tests.test_surface` writes it anew, and the diff is reviewed.
"""

from __future__ import annotations

import difflib
import inspect
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic_core import PydanticUndefined

import luthier
from luthier.assembly import Recipe
from luthier.cli.commands import COMMANDS
from luthier.core.config import Config

FILE = Path(__file__).with_name("surface.txt")
AGAIN = "PYTHONPATH=src python -m tests.test_surface"


def surface() -> list[str]:
    return sorted([*names(), *settings(Recipe), *commands()])


def names() -> Iterator[str]:
    """`name luthier.train(recipe, *, resume=False)`: parameters and defaults, without types."""
    for name in luthier.__all__:
        thing = getattr(luthier, name)
        if inspect.isfunction(thing):
            shown = inspect.signature(thing)
            plain = shown.replace(parameters=[p.replace(annotation=p.empty) for p in shown.parameters.values()],
                                  return_annotation=inspect.Signature.empty)
            yield f"name luthier.{name}{plain}"
        else:
            yield f"name luthier.{name}"


def settings(model: type[Config], path: str = "") -> Iterator[str]:
    """`recipe method[lora].rank: int = 8`; `[]` stands for each entry of a list, `[lora]` for a choice by name."""
    for name, field in model.model_fields.items():
        place = f"{path}.{name}".lstrip(".")
        default = field.get_default(call_default_factory=True) if not field.is_required() else PydanticUndefined
        inner = list(configs(field.annotation))
        shown = ("required" if default is PydanticUndefined else "of its own" if isinstance(default, Config) and len(inner) == 1
                 else default.name if isinstance(default, Config) else repr(default))
        yield f"recipe {place}: {spelt(field.annotation)} = {shown}"
        for config, listed in inner:
            chosen = f"[{config.model_fields['name'].default}]" if len(inner) > 1 else "[]" if listed else ""
            yield from settings(config, place + chosen)


def configs(annotation: Any, listed: bool = False) -> Iterator[tuple[type[Config], bool]]:
    """The config classes in a type, and whether each stands in a list."""
    if isinstance(annotation, type) and not get_args(annotation):
        if issubclass(annotation, Config):
            yield annotation, listed
        return
    for part in get_args(annotation):
        if get_origin(annotation) is not Annotated or part is get_args(annotation)[0]:
            yield from configs(part, listed or get_origin(annotation) in (list, tuple, dict))


def spelt(annotation: Any) -> str:
    """A type as short text that every version of Python writes alike."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return spelt(parts[0])
    if origin in (Union, types.UnionType):
        return " | ".join(map(spelt, parts))
    if origin is Literal:
        return " | ".join(map(repr, parts))
    if origin is not None:
        return f"{spelt(origin)}[{', '.join('...' if p is ... else spelt(p) for p in parts)}]"
    if annotation is type(None):
        return "None"
    return annotation.__name__ if isinstance(annotation, type) else re.sub(r"\w+\.", "", str(annotation))


def commands() -> Iterator[str]:
    """`command train --method`, with what a value must be and its default."""
    for name, command in COMMANDS.items():
        yield f"command {name}"
        for flags, described in command.arguments:
            told = {key: described[key] for key in ("nargs", "action", "type", "choices", "default") if key in described}
            shown = " ".join(f"{key}={value.__name__ if isinstance(value, type) else repr(value)}" for key, value in told.items())
            yield f"command {name} {'/'.join(flags)} {shown}".rstrip()


def difference(frozen: list[str], now: list[str]) -> str:
    return "\n".join(difflib.unified_diff(frozen, now, "tests/surface.txt", "now", lineterm="", n=0))


def test_the_surface_is_as_it_was_frozen() -> None:
    changed = difference(FILE.read_text(encoding="utf-8").splitlines(), surface())
    assert not changed, f"the public surface has changed; if that is meant: {AGAIN}\n{changed}"


def test_every_part_of_the_surface_is_seen() -> None:
    lines = surface()
    assert lines == sorted(set(lines))
    for part in ("name luthier.train(", "recipe model.name_or_path: str", "recipe method[lora].rank: int = 8", "recipe data.train",
                 "recipe training.batch_size: int = 8", "recipe seed: int = 0", "command train --resume"):
        assert any(line.startswith(part) for line in lines), part


def test_a_change_is_found() -> None:
    lines = surface()
    assert not difference(lines, lines)
    assert "-" + lines[3] in difference(lines, lines[:3] + lines[4:])
    assert "+recipe new: int = 1" in difference(lines, [*lines, "recipe new: int = 1"])


if __name__ == "__main__":
    FILE.write_text("\n".join(surface()) + "\n", encoding="utf-8")
    print(f"{FILE}: {len(surface())} lines")
