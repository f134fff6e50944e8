"""The laws between the rooms (docs of the design, section 3): who may import whom, and the budgets.

Imports are read from the source, lazy ones too. A module that stands directly under `luthier` and is not named in
`ROOMS` is a verb.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "luthier"

# Room -> the rooms that it may import, besides itself.
ROOMS: dict[str, set[str]] = {
    "core": set(),
    "scoring": {"core"},
    "pictures": set(),
    "measure": {"core", "scoring"},
    "data": {"core"},
    "families": {"core"},
    "methods": {"core"},
    "objectives": {"core"},
    "runtime": {"core"},
    "rollout": {"core", "data", "measure", "scoring"},
    "build": {"core", "data", "families", "methods", "objectives", "runtime", "rollout", "measure", "scoring"},
    "desk": {"build", "core"},
    "card": {"build", "core", "runtime"},
    "verb": {"build", "runtime", "core", "measure", "scoring", "pictures", "desk", "card"},
    "cli": {"verb", "core", "root"},
    "root": {"build", "runtime", "core", "verb"},  # luthier/__init__.py: the public names
}
HOMES = {"__init__": "root", "__main__": "cli", "screen": "cli", "commands": "cli"}  # files whose room is not their name
COMPARES = {"compare": {"train", "evaluate"}, "rlhf": {"train"}}  # the verbs that call verbs

# Package -> the only rooms that may import it; a room of torch's own has its own line.
PACKAGES: dict[str, set[str]] = {
    "datasets": {"data"}, "transformers": {"families"}, "gguf": {"families"}, "huggingface_hub": {"families"},
    "tokenizers": {"families"}, "peft": set(), "trl": set(),
}
LONE = {"methods/peft.py": {"peft"}}  # files that alone may import a package, beside those rooms
CLOSED = {"core": {"torch", "pydantic"}}  # rooms that may import no other package
FORBIDDEN = {"objectives": {"torch.distributed", "torch.optim"}, "data": {"torch.nn", "torch.optim", "torch.distributed"},
             "methods": {"torch.distributed", "torch.optim"}}
ARCHITECTURES = ("llama", "gpt2", "qwen", "mistral", "mixtral", "gemma", "phi3", "bloom", "bert", "t5", "opt_")

FILE_LINES, FUNCTION_LINES, CONFIG_FIELDS = 400, 60, 16


# ---------------------------------------------------------------- reading


def modules(root: Path) -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(root.rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def room_of(name: str) -> str:
    """The room of the first part of a path below `luthier`."""
    return HOMES.get(name, name if name in ROOMS else "verb")


def imported(tree: ast.Module, root: Path, path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a module imports; `from luthier import x` is x where x is a module."""
    package = ("luthier", *path.relative_to(root).with_suffix("").parts[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            near = package[:len(package) - node.level + 1] if node.level else ()
            home = ".".join([*near, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = root.joinpath(*home.split(".")[1:], alias.name)
                is_module = home.split(".")[0] != "luthier" or inner.with_suffix(".py").exists() or inner.is_dir()
                yield node.lineno, f"{home}.{alias.name}" if is_module else home
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from ((node.lineno, word.value) for word in node.args[:1]
                        if isinstance(word, ast.Constant) and isinstance(word.value, str))


# ---------------------------------------------------------------- the rules, each giving sentences on what breaks it


def edges(root: Path) -> Iterator[str]:
    for path, tree in modules(root):
        own = path.relative_to(root).with_suffix("").parts[0]
        room = room_of(own)
        for line, name in imported(tree, root, path):
            place = f"{path.relative_to(root)}:{line}"
            first, *rest = name.split(".")
            if first == "luthier":
                other = room_of(rest[0] if rest else "__init__")
                if room == other == "verb":
                    if rest[0] != own and rest[0] not in COMPARES.get(own, ()):
                        yield f"{place} {own} -> {rest[0]}: a verb calls no verb (`compare` alone calls train and evaluate)"
                elif other != room and other not in ROOMS[room]:
                    yield f"{place} {room} -> {other}: {room} may import {', '.join(sorted(ROOMS[room])) or 'nothing of luthier'}"
            elif room not in PACKAGES.get(first, {room}) and first not in LONE.get(path.relative_to(root).as_posix(), ()):
                yield f"{place} {room} -> {first}: {first} is for {', '.join(PACKAGES[first]) or 'tests alone'}"
            elif room in CLOSED and first not in CLOSED[room] | sys.stdlib_module_names:
                yield f"{place} {room} -> {first}: {room} imports {', '.join(sorted(CLOSED[room]))} and the standard library only"
            elif found := next((p for p in FORBIDDEN.get(room, ()) if name == p or name.startswith(p + ".")), None):
                yield f"{place} {room} -> {found}: {room} may not know it"


def asked_attributes(root: Path) -> Iterator[str]:
    for path, tree in modules(root):
        if room_of(path.relative_to(root).with_suffix("").parts[0]) == "families":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("hasattr", "getattr"):
                yield f"{path.relative_to(root)}:{node.lineno} {node.func.id}: only families/ may ask what an object has"


def architectures(root: Path) -> Iterator[str]:
    """Methods and objectives find their places by role, never by an architecture's name."""
    for path, tree in modules(root):
        if path.relative_to(root).parts[0] not in ("methods", "objectives"):
            continue
        told = {id(node.body[0].value) for node in ast.walk(tree)
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and isinstance(node.body[0], ast.Expr)}
        for node in ast.walk(tree):
            word = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else \
                node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told else ""
            if found := next((a for a in ARCHITECTURES if a in word.lower()), None):
                yield f"{path.relative_to(root)}:{node.lineno} {word!r}: no architecture ({found}) is named here; use the Anatomy"


def budgets(root: Path) -> Iterator[str]:
    for path, tree in modules(root):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > FILE_LINES:
            yield f"{path.relative_to(root)}: {lines} lines, and a file has at most {FILE_LINES}: split it by meaning"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > FUNCTION_LINES:
                    yield f"{path.relative_to(root)}:{node.lineno} {node.name}: {length} lines, and a function has at most {FUNCTION_LINES}"
            if isinstance(node, ast.ClassDef) and any(ast.unparse(b).endswith("Config") for b in node.bases):
                count = sum(isinstance(n, ast.AnnAssign) and "ClassVar" not in ast.unparse(n.annotation) for n in node.body)
                if count > CONFIG_FIELDS:
                    yield f"{path.relative_to(root)}:{node.lineno} {node.name}: {count} settings, and a config has about a dozen"


RULES = {rule.__name__: rule for rule in (edges, asked_attributes, architectures, budgets)}


@pytest.mark.parametrize("rule", RULES)
def test_the_house_keeps(rule: str) -> None:
    broken = list(RULES[rule](SOURCE))
    assert not broken, "\n" + "\n".join(broken)


def test_there_is_a_house() -> None:
    seen = {room_of(path.relative_to(SOURCE).with_suffix("").parts[0]) for path, _ in modules(SOURCE)}
    assert seen >= {"core", "data", "families", "methods", "objectives", "runtime", "build", "verb", "root"}
    assert sum(len(list(imported(tree, SOURCE, path))) for path, tree in modules(SOURCE)) > 200


# ---------------------------------------------------------------- and a broken house is found

PLANTED = [
    ("edges", "core/a.py", "from luthier.data import x", "core -> data"),
    ("edges", "core/a.py", "import numpy", "core -> numpy"),
    ("edges", "data/a.py", "def f():\n    from luthier.families import load", "data -> families"),
    ("edges", "data/a.py", "from torch import nn", "data -> torch.nn"),
    ("edges", "data/a.py", "import transformers", "data -> transformers"),
    ("edges", "families/a.py", "import datasets", "families -> datasets"),
    ("edges", "methods/a.py", "from ..objectives import tokens", "methods -> objectives"),
    ("edges", "methods/a.py", "import peft", "methods -> peft"),
    ("edges", "objectives/a.py", "import torch.distributed as dist", "objectives -> torch.distributed"),
    ("edges", "objectives/a.py", "from torch import distributed", "objectives -> torch.distributed"),
    ("edges", "runtime/a.py", "import luthier.methods.lora", "runtime -> methods"),
    ("edges", "runtime/a.py", "if TYPE_CHECKING:\n    from luthier.build import Recipe", "runtime -> build"),
    ("edges", "runtime/a.py", "from luthier import train", "runtime -> verb"),
    ("edges", "runtime/a.py", "from luthier import Recipe", "runtime -> root"),
    ("edges", "rollout/a.py", "from luthier.runtime import step", "rollout -> runtime"),
    ("edges", "measure.py", "from luthier.data import load", "measure -> data"),
    ("edges", "scoring.py", "from luthier import measure", "scoring -> measure"),
    ("edges", "build.py", "from luthier.train import train", "build -> verb"),
    ("edges", "train.py", "from luthier.data import length_picture", "verb -> data"),
    ("edges", "train.py", "from luthier.evaluate import evaluate", "train -> evaluate"),
    ("edges", "train.py", "from luthier import cli", "verb -> cli"),
    ("edges", "cli.py", "from luthier import build", "cli -> build"),
    ("edges", "screen.py", "import_module('luthier.runtime.run')", "cli -> runtime"),
    ("asked_attributes", "methods/a.py", "x = getattr(y, 'z', None)", "getattr"),
    ("asked_attributes", "train.py", "if hasattr(y, 'z'): pass", "hasattr"),
    ("architectures", "methods/a.py", "if name == 'llama': pass", "llama"),
    ("architectures", "objectives/a.py", "x = model.gpt2_block", "gpt2"),
    ("budgets", "core/a.py", "\n" * 401, "401 lines"),
    ("budgets", "core/a.py", "def f():\n" + "    x = 1\n" * 60, "61 lines"),
    ("budgets", "data/a.py", "class A(Config):\n" + "".join(f"    x{i}: int = 0\n" for i in range(17)), "17 settings"),
]
ALLOWED = [
    ("methods/peft.py", "def f():\n    from peft import get_peft_model"),
    ("compare.py", "from luthier.train import train"), ("cli.py", "from luthier import __version__, screen"),
    ("core/a.py", "from torch import nn\nimport json\nfrom luthier.core.b import c"), ("families/a.py", "getattr(a, 'b')"),
    ("methods/a.py", '"""As in llama."""\nx: "int" = 1  # gpt2'), ("measure.py", "from luthier.scoring import SCORERS"),
    ("rollout/a.py", "from luthier.data.pack import batch"), ("build.py", "from luthier import data as rows"),
    ("core/a.py", "def f():\n" + "    x = 1\n" * 59), ("verb.py", "from luthier import build"),
]


def plant(root: Path, path: str, source: str) -> Path:
    """A house with every room, where the file at `path` holds `source`."""
    for room in ("core", "data", "families", "methods", "objectives", "runtime", "rollout"):
        (root / room).mkdir(parents=True)
    for name in ("__init__", "measure", "scoring", "build", "train", "evaluate", "cli", "screen", *HOMES):
        (root / f"{name}.py").write_text("")
    (root / path).write_text(source)
    return root


@pytest.mark.parametrize(("rule", "path", "source", "words"), PLANTED)
def test_a_planted_fault_is_found(rule: str, path: str, source: str, words: str, tmp_path: Path) -> None:
    found = list(RULES[rule](plant(tmp_path / "luthier", path, source)))
    assert len(found) == 1, found
    assert words in found[0]
    assert found[0].startswith(path)


@pytest.mark.parametrize(("path", "source"), ALLOWED)
def test_what_is_allowed_passes(path: str, source: str, tmp_path: Path) -> None:
    root = plant(tmp_path / "luthier", path, source)
    assert not [line for rule in RULES.values() for line in rule(root)]
