"""`luthier compare`: ordinary runs beside one another, a table that says what their results say, going on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from luthier.api.compare import compare_methods
from luthier.api.evaluate import evaluate
from luthier.core.errors import LuthierError, RecipeError
from luthier.training.run_folder import Run
from tiny import save_tiny


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2] / "src"))
    save_tiny(tmp_path / "base", "llama", dtype=torch.float32)
    rows = [{"prompt": f"Say {word}.", "completion": word * 2} for word in ("one", "two", "six", "ten")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": f"Some words, {n} of them."}) for n in range(4)))
    (tmp_path / "task.yaml").write_text("model: base\ndata: {train: rows.jsonl, test: rows.jsonl}\n"
                                        "training: {max_steps: 2, batch_size: 4}\noptimizer: {learning_rate: 0.5}\n")
    return "task.yaml"


def test_methods_beside_one_another(recipe: str) -> None:
    folder = compare_methods(recipe, ["lora", "bitfit+lora"], retention_data="text.jsonl", quiet=True)
    told = json.loads((folder.path / "comparison.json").read_text())
    assert [row["method"] for row in told["methods"]] == ["lora", "bitfit+lora"]
    for row in told["methods"]:
        run = Run(folder.path / row["method"])
        assert row["after"] == run.results["after"] == run.results["test"]["perplexity"]
        assert row["file_bytes"] == (run.path / "adapter_model.safetensors").stat().st_size
        assert 0 < row["rate"] < 0.5, "every method has its own default rate, not the recipe's"
        assert row["general"] > 1
    lora, both = told["methods"]
    assert both["trainable_fraction"] > lora["trainable_fraction"]
    assert told["base"] == pytest.approx(Run(folder.path / "lora").results["before"])
    assert told["general_before"] > 1
    table = (folder.path / "comparison.md").read_text()
    assert f"{lora['after']:.3g}" in table
    assert (folder.path / "comparison.png").stat().st_size > 1000

    kept = (folder.path / "lora" / "README.md").stat().st_mtime_ns
    again = json.loads((compare_methods(recipe, ["lora"], quiet=True).path / "comparison.json").read_text())
    assert (folder.path / "lora" / "README.md").stat().st_mtime_ns == kept, "what has ended is not trained again"
    assert again["methods"][0]["after"] == lora["after"]


def test_of_questions_with_choices_it_is_how_many_are_right(recipe: str) -> None:
    """Whatever the recipe says of its own rows (here the names of their columns) is nothing to other rows."""
    asked = [{"context": f"What is {word}?", "choices": [word, word * 2, "no"], "answer": n % 3}
             for n, word in enumerate(("one", "two", "six", "ten"))]
    Path("asked.jsonl").write_text("\n".join(map(json.dumps, asked)))
    folder = compare_methods(recipe, ["lora"], retention_data="asked.jsonl", quiet=True,
                             **{"data.columns": {"prompt": "prompt", "completion": "completion", "answer": "odd"},
                                "data.max_samples": 3, "evaluate.max_samples": 2})
    told = json.loads((folder.path / "comparison.json").read_text())
    assert told["general"] == "accuracy"
    wanted = evaluate("base", data="asked.jsonl", objective="multiple_choice", quiet=True)
    assert wanted["examples"] == 4
    assert told["general_before"] == wanted["accuracy"]
    assert told["methods"][0]["general"] == evaluate(
        folder.path / "lora", data="asked.jsonl", objective="multiple_choice", max_samples=9, quiet=True, **{"data.columns": {}, "data.max_samples": 9})["accuracy"]
    assert "other text, accuracy" in (folder.path / "comparison.md").read_text()


def test_other_text_for_an_objective_that_models_no_words_is_told_before_any_work(recipe: str) -> None:
    with pytest.raises(RecipeError, match="trains no language model"):
        compare_methods(recipe, ["lora"], retention_data="text.jsonl", quiet=True, objective="classify")
    Path("odd.jsonl").write_text('{"odd": 1}\n')
    with pytest.raises(LuthierError, match="odd"):
        compare_methods(recipe, ["lora"], retention_data="odd.jsonl", quiet=True)
    assert not list(Path("runs").glob("compare-*/lora"))


def test_an_unknown_method_is_told_before_any_work(recipe: str) -> None:
    with pytest.raises(RecipeError, match="'lorra'"):
        compare_methods(recipe, ["lora", "lorra"], quiet=True)
    assert not list(Path("runs").glob("compare-*/lora")), "nothing was trained"
