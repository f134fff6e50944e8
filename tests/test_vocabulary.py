"""Names are the field's own: no file, function, class, argument, recipe field, command or metric has a banned part.

A name is split into its parts (`reward_model` and `RewardModel` are `reward`, `model`), and a part is banned as a whole:
`bitfit`, `4bit` and `bits_per_byte` are fine, `bit` is not. Whoever needs a banned word for what the field calls so adds
the whole name to `STANDARD`, with where it is standard.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from test_surface import surface

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "luthier"

BANNED = frozenset(re.findall(r"\w+", """
    asked told said says heard hear judged spelt spoken
    rolls rolled desk errand door doors room rooms house houses dice mend mended picture pictures twin twins kin
    bit piece pieces segment_tree anatomy lean slim shut worded settle settled unsettled beside apart beforehand
    drawn fitted folded laid chopped torn worth likeness hide hidden_part standing untrained_model
    asks tells wants stands lies begun gone made
"""))
STANDARD = {
    "hidden": "hidden size and hidden states are Transformers' terms; `hide` is not",
}


def parts(name: str) -> list[str]:
    """
    >>> parts("RewardModel"), parts("bits_per_byte"), parts("_load4bit")
    (['reward', 'model'], ['bits', 'per', 'byte'], ['load4bit'])
    """
    return [part.lower() for part in re.findall(r"[A-Z]+(?![a-z])\d*|[A-Z]?[a-z0-9]+", name)]


def defined(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, name) of every class, function and argument, and of every name that a module or a class body sets."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        if isinstance(node, ast.Module | ast.ClassDef):
            for statement in node.body:
                targets = statement.targets if isinstance(statement, ast.Assign) else \
                    [statement.target] if isinstance(statement, ast.AnnAssign) else []
                yield from ((target.lineno, target.id) for target in targets if isinstance(target, ast.Name))


def names_of_source(root: Path) -> Iterator[tuple[str, str]]:
    """(place, name) of all that the source defines, file names among them."""
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root).as_posix()
        yield from ((place, part) for part in path.relative_to(root).with_suffix("").parts)
        for line, name in defined(ast.parse(path.read_text(encoding="utf-8"))):
            yield f"{place}:{line}", name


def names_of_surface(lines: list[str]) -> Iterator[tuple[str, str]]:
    """(line of the surface, name) of every public name, command, option, recipe field and value of one."""
    for line in lines:
        yield from ((line, name) for name in re.findall(r"[A-Za-z_]\w*", line))


def banned(names: Iterator[tuple[str, str]]) -> list[str]:
    return sorted({f"{place}: {name!r} has the banned word {part!r}" for place, name in names if name not in STANDARD
                   for part in parts(name) if part in BANNED})


def test_no_name_of_the_source_is_banned() -> None:
    found = banned(names_of_source(SOURCE))
    assert not found, f"{len(found)} names\n" + "\n".join(found)


def test_no_public_name_is_banned() -> None:
    found = banned(names_of_surface(surface()))
    assert not found, f"{len(found)} names\n" + "\n".join(found)


@pytest.mark.parametrize("source", ["def asked(x): ...", "class Desk: ...", "def f(*, pictures): ...", "ROOMS = 3",
                                    "class A:\n    bit: int = 0", "async def _be_told(): ..."])
def test_a_banned_name_is_found(source: str, tmp_path: Path) -> None:
    (tmp_path / "file.py").write_text(source)
    assert len(banned(names_of_source(tmp_path))) == 1


def test_a_banned_file_name_is_found(tmp_path: Path) -> None:
    (tmp_path / "rooms.py").write_text("")
    assert banned(names_of_source(tmp_path)) == ["rooms.py: 'rooms' has the banned word 'rooms'"]


@pytest.mark.parametrize("source", ["def bitfit(load_in_4bit, bits_per_byte): ...", "class Bookkeeping: ...",
                                    "MUSHROOMS = 1", "def f(doorway): ..."])
def test_a_word_inside_a_longer_one_is_fine(source: str, tmp_path: Path) -> None:
    (tmp_path / "file.py").write_text(source)
    assert not banned(names_of_source(tmp_path))
