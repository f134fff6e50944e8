"""A row and its virtual tokens fit into the base's context, or that is said before anything trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier import assembly
from luthier.assembly.factory import check_loaded_model, load_datasets, load_family
from luthier.assembly.recipe import Recipe
from luthier.core.errors import RecipeError
from luthier.methods import METHODS
from tiny import save_tiny

CONTEXT = {"llama": 256, "bert": 128}
SIMPLEST = {"llama": "pretrain", "bert": "classify"}


def recipe(home: Path, kind: str, method: Any, **data: Any) -> Recipe:
    save_tiny(home / kind, kind)
    (home / "rows.jsonl").write_text("".join(json.dumps({"text": letter * 900, "label": letter}) + "\n" for letter in "ab"))
    return assembly.build_recipe({"model": str(home / kind), "method": method, "objective": SIMPLEST[kind],
                         "data": {"train": str(home / "rows.jsonl"), **data}})


@pytest.mark.parametrize("kind", CONTEXT)
@pytest.mark.parametrize("method", ["prompt", "ptuning", "prefix", "ptuning_v2"])
def test_a_row_that_would_leave_them_no_room_is_refused_before_training(kind: str, method: str, tmp_path: Path) -> None:
    named = {"name": method, "num_virtual_tokens": 9}
    most = CONTEXT[kind] - 9
    for given in (named, ["lora", named] if kind == "llama" else named):
        made = recipe(tmp_path, kind, given, max_length=most + 1)
        base = load_family(made.model)
        with pytest.raises(RecipeError, match=rf"max_length {most + 1} and 9 virtual tokens .* {CONTEXT[kind]} tokens"):
            check_loaded_model(made, base)
        check_loaded_model(recipe(tmp_path, kind, given, max_length=most), base)
    with pytest.raises(RecipeError, match="no space for text"):
        check_loaded_model(recipe(tmp_path, kind, {"name": method, "num_virtual_tokens": CONTEXT[kind] - 1}), base)
    with pytest.raises(RecipeError, match=f"max_length {CONTEXT[kind] + 1} is longer"):
        check_loaded_model(recipe(tmp_path, kind, "lora", max_length=CONTEXT[kind] + 1), base)


@pytest.mark.parametrize("kind", CONTEXT)
@pytest.mark.parametrize(("method", "tokens"), [("prompt", 9), ("lora", 0)])
def test_rows_are_cut_to_what_they_leave(kind: str, method: str, tokens: int, tmp_path: Path) -> None:
    made = recipe(tmp_path, kind, {"name": method, "num_virtual_tokens": tokens} if tokens else method)
    base = load_family(made.model)
    check_loaded_model(made, base)
    longest = max(len(span.ids) for e in load_datasets(made, base).train for span in e.spans)
    assert longest == CONTEXT[kind] - tokens


def test_every_method_of_virtual_tokens_is_counted() -> None:
    assert {name for name, made in METHODS.items() if "num_virtual_tokens" in made.model_fields} == {
        "prompt", "ptuning", "prefix", "ptuning_v2"}
