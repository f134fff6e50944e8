"""A run with heads as a whole model: exported, it opens with the same heads and says the same of the same rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import luthier
from luthier.api.export import export
from tiny import save_tiny


@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_exported_classifier_says_what_the_run_says(tmp_path: Path, method: str) -> None:
    base = save_tiny(tmp_path / "base", "llama", dtype=torch.float32)
    rows = [{"text": f"{word} thing", "label": label} for word, label in
            (("good", "up"), ("bad", "down"), ("fine", "up"), ("poor", "down"), ("odd", "down"))]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = luthier.train(model=str(base), data={"train": str(tmp_path / "rows.jsonl"), "test": str(tmp_path / "rows.jsonl")},
                        method=method, objective="classify", training={"max_steps": 3, "batch_size": 5},
                        output_dir=str(tmp_path / "run"), quiet=True)
    assert (run.path / "confusion.png").exists()
    told = luthier.evaluate(run, quiet=True)
    whole = luthier.evaluate(export(run, "merged"), data=str(tmp_path / "rows.jsonl"), quiet=True)  # it names no path
    numbers = {name: value for name, value in told.items() if isinstance(value, float)}
    assert {name: whole[name] for name in numbers} == pytest.approx(numbers, rel=1e-4)
    assert whole["rows"]["kept"] == told["rows"]["kept"] == 5
    assert told["loss"] == pytest.approx(run.results["test"]["loss"], rel=1e-6)
    assert run.results["metric"] == "accuracy"
    assert run.results["test_before"]["loss"] != told["loss"]
