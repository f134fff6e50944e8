"""The examples in all docstrings are true: every module with one is found and run."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import luthier

SOURCE = Path(luthier.__file__).parent
MODULES = sorted(".".join(("luthier", *path.relative_to(SOURCE).with_suffix("").parts))
                 for path in SOURCE.rglob("*.py") if ">>> " in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_are_true(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name))
    assert found.failed == 0
    assert found.attempted > 0


def test_the_list_is_whole() -> None:
    assert {"luthier.serving.detokenizer", "luthier.planning.estimates", "luthier.assembly.multi_adapter_loading", "luthier.evaluation.answer_metrics", "luthier.objectives.cross_entropy"} <= set(MODULES)


def test_a_wrong_example_would_fail() -> None:
    example = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, None)
    assert doctest.DocTestRunner(verbose=False).run(example, out=lambda _: None).failed == 1
