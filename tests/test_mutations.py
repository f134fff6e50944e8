"""Every break of `mutations.py` applies to the code as it is: its text occurs once, what stands there instead is other
code that compiles, and its tests exist. That each is noticed is what `make mutations` shows."""

from __future__ import annotations

import ast
from collections import Counter

import pytest

from mutations import BREAKS, ROOT, SOURCE, Break, broken

AREAS = {"objectives": 30, "training/optimizer.py": 15, "training/step.py": 8, "training/loop.py": 12, "data/packing.py": 6,
         "models/decoding.py": 9, "models/sampling.py": 9, "rl": 12, "models/attention/packed.py": 6,
         "data/chat.py": 6, "data/conversation.py": 6}


def problem(one: Break) -> str:
    """Why the break cannot be tried; empty where it can."""
    try:
        changed = broken(one)
    except (ValueError, OSError) as error:
        return str(error)
    try:
        tree = ast.parse(changed)
    except SyntaxError as error:
        return f"it does not compile: {error}"
    if ast.dump(tree) == ast.dump(ast.parse((SOURCE / one.file).read_text(encoding="utf-8"))):
        return "it changes nothing"
    return next((f"there is no test {test}" for test in one.tests if not exists(test)), "" if one.tests else "it names no test")


def exists(test: str) -> bool:
    file, _, name = test.partition("::")
    if not name or not (ROOT / file).is_file():
        return False
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return any(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name.partition("[")[0] for node in tree.body)


@pytest.mark.parametrize("one", BREAKS, ids=lambda one: one.name)
def test_every_break_applies_and_its_tests_exist(one: Break) -> None:
    assert problem(one) == ""


def test_names_are_different_and_every_area_has_its_breaks() -> None:
    assert max(Counter(one.name for one in BREAKS).values()) == 1
    assert max(Counter((one.file, one.text, one.replacement) for one in BREAKS).values()) == 1
    assert len(BREAKS) >= 75
    for area, least in AREAS.items():
        assert sum(one.file.startswith(area) for one in BREAKS) >= least, area


@pytest.mark.parametrize(("change", "why"), [
    ({"text": "no such text"}, "occurs 0 times"), ({"text": "return"}, "and must once"), ({"replacement": "return ("}, "compile"),
    ({"replacement": "return  (step+1) / (warm + 1)"}, "changes nothing"), ({"file": "training/none.py"}, "none.py"),
    ({"tests": ()}, "no test"), ({"tests": ("tests/test_mutations.py::test_none",)}, "there is no test"),
    ({"tests": ("tests/none.py::test_none",)}, "there is no test")], ids=str)
def test_a_break_that_cannot_be_tried_is_found(change: dict[str, object], why: str) -> None:
    sound = next(one for one in BREAKS if one.name == "schedule-warm-up-one-early")
    assert problem(sound) == ""
    assert why in problem(sound._replace(**change))


