"""The rules between the packages: who may import whom, and the budgets.

Imports are read from the source, lazy ones too.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "luthier"

# Package -> the packages that it may import, besides itself.
MAY_IMPORT: dict[str, set[str]] = {
    "core": set(),
    "data": {"core"},
    "models": {"core"},
    "methods": {"core"},
    "objectives": {"core"},
    "distributed": {"core"},
    "training": {"core", "distributed"},
    "evaluation": {"core", "data"},
    "rl": {"core", "data", "evaluation"},  # a reward may be a metric of answers
    "planning": {"core"},
    "reporting": {"core"},
    "exporters": {"core"},
    "assembly": {"core", "data", "models", "methods", "objectives", "distributed", "training", "evaluation", "rl",
                 "planning", "reporting", "exporters"},
    "serving": {"core", "assembly"},
    "api": {"core", "assembly", "distributed", "training", "evaluation", "planning", "reporting", "exporters", "serving"},
    "cli": {"core", "api", "root"},
    "root": {"core", "assembly", "training", "api", "cli"},  # luthier/__init__.py has the public names, __main__.py the command line
}
CALLS_VERBS = {"compare": {"train", "evaluate"}, "rlhf": {"train"}, "run": {"chat"}}  # files of api/ that call others of it
NO_VERB = {"run"}  # files of api/ that every verb may import: the object that verbs return

# Third-party package -> the only packages that may import it; one of torch's own modules has a row of its own.
IMPORTED_BY: dict[str, set[str]] = {
    "datasets": {"data"}, "transformers": {"models"}, "gguf": {"models"}, "huggingface_hub": {"models"},
    "tokenizers": {"models"}, "matplotlib": {"reporting"}, "torch.distributed": {"distributed"}, "peft": set(),
    "trl": set(),
}
ALSO_IMPORTED_BY = {"methods/peft.py": {"peft"}}  # single files that may import a package as well
ONLY = {"core": {"torch", "pydantic"}}  # packages that may import nothing else of third parties
FORBIDDEN = {"objectives": {"torch.optim"}, "data": {"torch.nn", "torch.optim"}, "methods": {"torch.optim"}}
ARCHITECTURES = ("llama", "gpt2", "qwen", "mistral", "mixtral", "gemma", "phi3", "bloom", "bert", "t5", "opt_")

FILE_LINES, FUNCTION_LINES, CONFIG_FIELDS = 400, 60, 16


# ---------------------------------------------------------------- reading


def modules(root: Path) -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(root.rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def package_of(name: str) -> str:
    """The package of the first part of a path below `luthier`; a file that lies there itself is of the root."""
    return name if name in MAY_IMPORT else "root"


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
        parts = path.relative_to(root).with_suffix("").parts
        package, file = package_of(parts[0]), path.relative_to(root).as_posix()
        for line, name in imported(tree, root, path):
            place = f"{file}:{line}"
            first, *rest = name.split(".")
            if first == "luthier":
                other = package_of(rest[0] if rest else "__init__")
                if package == other == "api":
                    called = rest[1] if len(rest) > 1 else "__init__"
                    if called != parts[1] and called not in NO_VERB and called not in CALLS_VERBS.get(parts[1], ()):
                        yield f"{place} {parts[1]} -> {called}: a verb calls no verb (`compare` and `rlhf` alone call others)"
                elif other != package and other not in MAY_IMPORT[package]:
                    allowed = ", ".join(sorted(MAY_IMPORT[package])) or "nothing of luthier"
                    yield f"{place} {package} -> {other}: {package} may import {allowed}"
                continue
            rule = next((key for key in IMPORTED_BY if name == key or name.startswith(key + ".")), None)
            if rule and package not in IMPORTED_BY[rule] and rule not in ALSO_IMPORTED_BY.get(file, ()):
                yield f"{place} {package} -> {rule}: {rule} is for {', '.join(IMPORTED_BY[rule]) or 'tests alone'}"
            elif package in ONLY and first not in ONLY[package] | sys.stdlib_module_names:
                yield f"{place} {package} -> {first}: {package} imports {', '.join(sorted(ONLY[package]))} and the standard library only"
            elif found := next((p for p in FORBIDDEN.get(package, ()) if name == p or name.startswith(p + ".")), None):
                yield f"{place} {package} -> {found}: {package} must not know it"


def dynamic_attributes(root: Path) -> Iterator[str]:
    for path, tree in modules(root):
        if package_of(path.relative_to(root).with_suffix("").parts[0]) == "models" or path.name == "answer.py":
            continue  # the sandboxed process reads attributes for the judge
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("hasattr", "getattr"):
                yield f"{path.relative_to(root)}:{node.lineno} {node.func.id}: only models/ may ask what an object has"


def architectures(root: Path) -> Iterator[str]:
    """Methods and objectives find their places by role, never by an architecture's name."""
    for path, tree in modules(root):
        if path.relative_to(root).parts[0] not in ("methods", "objectives"):
            continue
        docstrings = {id(node.body[0].value) for node in ast.walk(tree)
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and isinstance(node.body[0], ast.Expr)}
        for node in ast.walk(tree):
            name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else \
                node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings else ""
            if found := next((a for a in ARCHITECTURES if a in name.lower()), None):
                yield f"{path.relative_to(root)}:{node.lineno} {name!r}: no architecture ({found}) is named here; use the model structure"


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


RULES = {rule.__name__: rule for rule in (edges, dynamic_attributes, architectures, budgets)}


@pytest.mark.parametrize("rule", RULES)
def test_no_rule_is_broken(rule: str) -> None:
    broken = list(RULES[rule](SOURCE))
    assert not broken, "\n" + "\n".join(broken)


def test_every_package_is_read() -> None:
    seen = {package_of(path.relative_to(SOURCE).with_suffix("").parts[0]) for path, _ in modules(SOURCE)}
    assert seen >= {"core", "data", "models", "methods", "objectives", "training", "assembly", "api", "cli", "root"}
    assert sum(len(list(imported(tree, SOURCE, path))) for path, tree in modules(SOURCE)) > 200


# ---------------------------------------------------------------- and a broken rule is found

PLANTED = [
    ("edges", "core/a.py", "from luthier.data import x", "core -> data"),
    ("edges", "core/a.py", "import numpy", "core -> numpy"),
    ("edges", "core/a.py", "import torch.distributed", "core -> torch.distributed"),
    ("edges", "data/a.py", "def f():\n    from luthier.models import loading", "data -> models"),
    ("edges", "data/a.py", "from torch import nn", "data -> torch.nn"),
    ("edges", "data/a.py", "import transformers", "data -> transformers"),
    ("edges", "data/a.py", "import matplotlib.pyplot as plt", "data -> matplotlib"),
    ("edges", "models/a.py", "import datasets", "models -> datasets"),
    ("edges", "models/families/a.py", "import datasets", "models -> datasets"),
    ("edges", "methods/a.py", "from ..objectives import cross_entropy", "methods -> objectives"),
    ("edges", "methods/a.py", "import peft", "methods -> peft"),
    ("edges", "objectives/a.py", "import torch.distributed as dist", "objectives -> torch.distributed"),
    ("edges", "objectives/a.py", "from torch import distributed", "objectives -> torch.distributed"),
    ("edges", "training/a.py", "import torch.distributed as dist", "training -> torch.distributed"),
    ("edges", "training/a.py", "import luthier.methods.lora", "training -> methods"),
    ("edges", "training/a.py", "if TYPE_CHECKING:\n    from luthier.assembly import Recipe", "training -> assembly"),
    ("edges", "training/a.py", "from luthier.api import train", "training -> api"),
    ("edges", "training/a.py", "from luthier import Recipe", "training -> root"),
    ("edges", "rl/a.py", "from luthier.training import step", "rl -> training"),
    ("edges", "evaluation/a.py", "from luthier.rl import rewards", "evaluation -> rl"),
    ("edges", "planning/a.py", "from luthier.training import memory", "planning -> training"),
    ("edges", "assembly/a.py", "from luthier.api.train import train", "assembly -> api"),
    ("edges", "assembly/a.py", "from luthier.serving import engine", "assembly -> serving"),
    ("edges", "reporting/a.py", "from luthier.training.run_folder import Run", "reporting -> training"),
    ("edges", "reporting/a.py", "from luthier.assembly.recipe import Recipe", "reporting -> assembly"),
    ("edges", "exporters/a.py", "from luthier.assembly.run_io import open_run", "exporters -> assembly"),
    ("edges", "serving/a.py", "from luthier.training import loop", "serving -> training"),
    ("edges", "serving/a.py", "from luthier.api import train", "serving -> api"),
    ("edges", "api/train.py", "from luthier.data import load", "api -> data"),
    ("edges", "api/train.py", "from luthier.api.evaluate import evaluate", "train -> evaluate"),
    ("edges", "api/train.py", "from luthier.api import evaluate", "train -> evaluate"),
    ("edges", "api/run.py", "from luthier.api.evaluate import evaluate", "run -> evaluate"),
    ("edges", "api/train.py", "from luthier.cli import main", "api -> cli"),
    ("edges", "cli/a.py", "from luthier import assembly", "cli -> assembly"),
    ("edges", "cli/console.py", "import_module('luthier.training.loop')", "cli -> training"),
    ("dynamic_attributes", "methods/a.py", "x = getattr(y, 'z', None)", "getattr"),
    ("dynamic_attributes", "api/train.py", "if hasattr(y, 'z'): pass", "hasattr"),
    ("architectures", "methods/a.py", "if name == 'llama': pass", "llama"),
    ("architectures", "objectives/a.py", "x = model.gpt2_block", "gpt2"),
    ("budgets", "core/a.py", "\n" * 401, "401 lines"),
    ("budgets", "core/a.py", "def f():\n" + "    x = 1\n" * 60, "61 lines"),
    ("budgets", "data/a.py", "class A(Config):\n" + "".join(f"    x{i}: int = 0\n" for i in range(17)), "17 settings"),
]
ALLOWED = [
    ("methods/peft.py", "def f():\n    from peft import get_peft_model"),
    ("api/compare.py", "from luthier.api.train import train"), ("api/train.py", "from luthier.api.run import Run"),
    ("cli/a.py", "from luthier import __version__"),
    ("cli/a.py", "from luthier.api.train import train"), ("distributed/a.py", "import torch.distributed"),
    ("core/a.py", "from torch import nn\nimport json\nfrom luthier.core.b import c"), ("models/a.py", "getattr(a, 'b')"),
    ("methods/a.py", '"""As in llama."""\nx: "int" = 1  # gpt2'), ("reporting/a.py", "from matplotlib.figure import Figure"),
    ("evaluation/a.py", "from luthier.evaluation.b import METRICS"), ("rl/a.py", "from luthier.data.packing import batch"),
    ("assembly/a.py", "from luthier import data"), ("core/a.py", "def f():\n" + "    x = 1\n" * 59),
    ("api/a.py", "from luthier import assembly"),
]


def plant(root: Path, path: str, source: str) -> Path:
    """A project with every package, where the file at `path` holds `source`."""
    for package in MAY_IMPORT:
        if package != "root":
            (root / package).mkdir(parents=True)
    for file in ("__init__.py", "__main__.py", "api/train.py", "api/evaluate.py", "api/run.py", "cli/main.py", "cli/console.py"):
        (root / file).write_text("")
    (root / path).parent.mkdir(exist_ok=True)
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
