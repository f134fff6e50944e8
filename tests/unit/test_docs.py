"""The pages say what is true: links lead somewhere, commands and recipes parse, every setting and metric is explained."""

from __future__ import annotations

import inspect
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from cases import cases
from luthier import assembly
from luthier.api.rlhf import plan_stages
from luthier.assembly.factory import count_trainable
from luthier.assembly.recipe import Recipe
from luthier.cli.main import parse
from luthier.evaluation.answer_metrics import METRICS
from luthier.methods import METHODS
from luthier.objectives import OBJECTIVES
from luthier.training import loop
from luthier.training.step import StepResult
from test_surface import settings as surface

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)")
FIGURE = re.compile(r"<!-- FIGURE:(\w+) -->(.*?)<!-- /FIGURE -->")
COMMAND = re.compile(r"^(?:\S*/)?luthier (?!COMMAND)(.+)$")


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(text(page)) if kind == language]


def commands(words: str) -> list[list[str]]:
    """Every `luthier ...` line of the shell blocks and between backticks, as words."""
    lines = [line for kind, body in FENCE.findall(words) if kind == "bash" for line in body.splitlines()]
    lines += re.findall(r"`(luthier [a-z][^`]*)`", FENCE.sub("", words))
    return [shlex.split(found[1], comments=True) for line in lines if (found := COMMAND.match(line.strip()))]


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def broken(page: Path) -> list[str]:
    """Links of a page that lead nowhere, and names of code that the file they point at does not define."""
    faults = []
    for shown, target in LINK.findall(FENCE.sub("", text(page))):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            faults.append(f"{target}: no such file")
        elif anchor and anchor not in [slug(h) for h in re.findall(r"^#+ (.+)$", text(file), re.MULTILINE)]:
            faults.append(f"{target}: no such heading")
        elif file.suffix == ".py" and (name := re.fullmatch(r"`([\w.]+)`", shown)) and not file.match(f"*{name[1]}*"):
            faults += [f"{target}: defines no {part}" for part in name[1].split(".")
                       if file.stem != part and not re.search(rf"^\s*(class|def) {part}\b", text(file), re.MULTILINE)]
    return faults


def line_names() -> set[str]:
    """What metrics.jsonl holds; a class or a bin in a name is left out."""
    reported = {re.sub(r"(_\d+)+$", "", name) if name.startswith(("confusion", "calibration")) else name
                for case in cases().values()
                for name in [*case.loss().metrics, *case.objective.compute_eval_metrics(case.outputs, case.target)]}
    written = "".join(inspect.getsource(function) for function in (loop._log_step, StepResult.read_metrics))
    return reported | set(re.findall(r'"(\w+)"(?=:|\])', written))


# ---------------------------------------------------------------- every page


@PAGE
def test_links_lead_somewhere(page: Path) -> None:
    assert not broken(page)


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("def here(): ...\n")
    page = tmp_path / "page.md"
    page.write_text("# One\n[a](none.md) [b](#two) [c](#one) [`gone`](code.py) [`here`](code.py) [`code`](code.py)\n")
    assert [fault.partition(":")[0] for fault in broken(page)] == ["none.md", "#two", "code.py"]


@PAGE
def test_commands_parse(page: Path) -> None:
    for words in commands(text(page)):
        if "--help" in words:
            continue
        options = vars(parse(words))
        laid: dict[str, Any] = options.get("settings", {})
        if options["command"] == "rlhf":
            assert plan_stages(ROOT / options["positionals"][0], laid)
            continue
        prefix = "data." if options["command"] == "data" else ""
        named = {"method": options.get("method"), "objective": options.get("objective")}
        assert assembly.build_recipe({"data": "rows.jsonl"}, named | {prefix + key: value for key, value in laid.items()})


def test_a_command_is_found_wherever_it_stands() -> None:
    found = commands("Say `luthier chat RUN`.\n```bash\n.venv/bin/luthier doctor  # a word\nmake demo\n```\n")
    assert found == [["doctor"], ["chat", "RUN"]]
    assert len(commands(text(ROOT / "README.md"))) > 8


@PAGE
def test_recipes_and_python_are_valid(page: Path) -> None:
    for body in blocks(page, "yaml"):
        assert assembly.build_recipe(yaml.safe_load(body))
    for body in blocks(page, "python"):
        compile(body, page.name, "exec")


@PAGE
def test_figures_are_well_formed(page: Path) -> None:
    assert len(FIGURE.findall(text(page))) == text(page).count("FIGURE:")


# ---------------------------------------------------------------- what must be told


def test_the_recipe_page_is_fresh_and_whole() -> None:
    page = ROOT / "docs/recipe.md"
    again = "PYTHONPATH=src python docs/recipe.py"
    assert text(page) == runpy.run_path(str(ROOT / "docs/recipe.py"))["page"](), f"settings have changed: {again}"
    for line in surface(Recipe):
        name = line.partition(":")[0].removeprefix("recipe ").rpartition(".")[2].partition("[")[0]
        if "[composite]" not in line:  # a list of methods, which is written as a list
            assert f"| `{name}` |" in text(page), line


def test_every_method_and_objective_has_its_page() -> None:
    besides = {"methods": {"multi_adapter", "composite"}, "objectives": set()}  # pages on how several of them go together
    for kind, known in (("methods", METHODS), ("objectives", OBJECTIVES)):
        assert sorted({*known, *besides[kind]}) == sorted(page.stem for page in (ROOT / "docs" / kind).glob("*.md"))
        for name in known:
            assert f"docs/{kind}/{name}.md" in text(ROOT / "README.md")


def test_every_page_is_listed() -> None:
    index = text(ROOT / "docs/index.md")
    for page in (ROOT / "docs").rglob("*.md"):
        assert page.name == "index.md" or f"({page.relative_to(ROOT / 'docs').as_posix()})" in index, page


def test_every_metric_has_its_entry() -> None:
    glossary = re.findall(r"^### ([\w/]+)$", text(ROOT / "docs/metrics.md"), re.MULTILINE)
    share = re.findall(r'"(\w+_fraction)"', inspect.getsource(count_trainable))
    wanted = line_names() | set(METRICS) | set(share) | {"perplexity"}
    assert {"nll", "grad_norm", "tokens_per_second"} <= wanted
    assert not wanted - set(glossary)


def test_the_two_readmes_are_alike() -> None:
    english, chinese = (text(ROOT / name) for name in ("README.md", "README.zh-CN.md"))
    assert FENCE.findall(english) == FENCE.findall(chinese)
    assert dict(FIGURE.findall(english)) == dict(FIGURE.findall(chinese))
    assert english.count("\n## ") == chinese.count("\n## ")
    links = [sorted(target for _, target in LINK.findall(words) if "README" not in target) for words in (english, chinese)]
    assert links[0] == links[1]
