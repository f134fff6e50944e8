"""What `evaluate` says of a run whose objective has a reference: what `train` measured, or that there is none left.

Without its reference a policy is compared with itself: every margin 0, and a loss of log 2, which looks like a result.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.api.evaluate import evaluate
from luthier.api.train import train
from luthier.core.errors import RecipeError
from tiny import save_tiny


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    home = tmp_path_factory.mktemp("reference")
    save_tiny(home / "base", "llama", dtype=torch.float32, num_hidden_layers=1)
    rows = [{"prompt": f"p{i}?", "chosen": "yes" * (1 + i), "rejected": f"no {i}"} for i in range(3)]
    (home / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = str(home / "pairs.jsonl")
    return {"model": str(home / "base"), "objective": "dpo", "data": {"train": pairs, "eval": pairs},
            "training": {"max_steps": 3, "batch_size": 3}, "optimizer": {"learning_rate": 0.01}, "evaluate": {"before_training": False}}


def test_an_adapter_is_compared_with_its_base(recipe: dict[str, Any], tmp_path: Path) -> None:
    run = train({**recipe, "method": "lora"}, output_dir=str(tmp_path / "lora"), quiet=True)
    found, told = evaluate(run, quiet=True), run.results["validation"]
    assert found["rewards/margins"] != 0
    assert {name: found[name] for name in told} == pytest.approx(told)


def test_a_whole_model_has_nothing_left_to_be_compared_with(recipe: dict[str, Any], tmp_path: Path) -> None:
    full = {**recipe, "method": "full"}
    run = train(full, output_dir=str(tmp_path / "full"), quiet=True)
    assert run.results["validation"]["rewards/margins"] != 0
    with pytest.raises(RecipeError, match="holds a full model, which has overwritten it") as refused:
        evaluate(run, quiet=True)
    assert "objective=orpo" in str(refused.value)
    assert evaluate(run, quiet=True, objective="orpo")["rewards/margins"] != 0  # the remedy
