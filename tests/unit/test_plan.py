"""`luthier plan`: what it says is what its trials measured, extended to the whole run; what cannot fit is not begun."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.api.plan import plan
from luthier.assembly import build_recipe
from luthier.assembly.factory import load_family
from luthier.assembly.method_variants import build_variant, estimate_weight_gb
from luthier.core.errors import RecipeError
from luthier.planning.advice import build_advice
from tiny import save_tiny

ROWS = 40
MODULE = import_module("luthier.api.plan")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2] / "src"))
    save_tiny(tmp_path / "base", "llama", dtype=torch.float32)
    (tmp_path / "rows.jsonl").write_text("".join(
        json.dumps({"prompt": f"Say {n:02}.", "completion": f"{n:02}" * 3}) + "\n" for n in range(ROWS)))
    return tmp_path


def test_a_trial_is_extended_to_the_whole_run(home: Path) -> None:
    folder = plan(None, ["lora", "bitfit+lora"], quiet=True, **{"model.name_or_path": "base", "data": "rows.jsonl",
                                                                "training.num_train_epochs": 3.0})
    told = json.loads((folder.path / "plan.json").read_text())
    lora, both = told["methods"]
    assert told["data"]["kept"] == ROWS
    for row in (lora, both):
        assert row["steps"] == 3 * ROWS / 8
        assert row["tokens"] == pytest.approx(3 * told["data"]["tokens"]), "rows of one length: no estimate is needed"
        assert row["seconds"] == pytest.approx(row["tokens"] / row["tokens_per_second"], rel=1e-3)
        assert row["fits"]
        assert row["peak_memory_gb"] > 0.1
    assert both["trainable"] > lora["trainable"]
    assert told["advice"][0].startswith("Choose lora")
    assert f"{lora['peak_memory_gb']:.2f}" in (folder.path / "plan.md").read_text()
    assert (folder.path / "plan.png").stat().st_size > 1000
    assert not list(folder.path.glob("lora*")), "trials leave nothing behind"


def test_rows_that_are_held_out_are_not_steps(home: Path) -> None:
    settings = {"model.name_or_path": "base", "data": "rows.jsonl", "training.num_train_epochs": 3.0, "data.eval": 0.4}
    told = json.loads((plan(None, ["lora"], quiet=True, **settings).path / "plan.json").read_text())
    assert told["methods"][0]["steps"] == 3 * 0.6 * ROWS / 8


def test_what_cannot_fit_is_not_begun_and_what_is_refused_says_why(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []

    def refuse(raw: dict[str, Any], run: Path, allow_code: Any) -> tuple[int, str]:
        begun.append(run.name)
        return 2, "error: no place | for it"

    made = build_recipe(None, {"model.name_or_path": "base", "data": "rows.jsonl"})
    room = 2 * estimate_weight_gb(made.model, whole=False)
    monkeypatch.setattr(MODULE, "available_memory_gb", lambda device: room)
    monkeypatch.setattr(MODULE, "train_in_child_process", refuse)
    folder = plan(made, ["full", "lora"], quiet=True)
    full, lora = json.loads((folder.path / "plan.json").read_text())["methods"]
    assert begun == ["lora"]
    assert full["fits"] is False
    assert "the weights alone" in full["why"]
    assert lora["why"] == "no place | for it"
    assert "no place / for it" in (folder.path / "plan.md").read_text(), "a bar would break the table"
    assert "No tried method fits" in (folder.path / "plan.md").read_text()


def test_weights_are_counted_without_loading_them(home: Path) -> None:
    made = build_recipe(None, {"model.name_or_path": "base", "data": "rows.jsonl"})
    held = {id(p): p.numel() for p in load_family(made.model).structure.model.parameters()}
    assert estimate_weight_gb(made.model, whole=False) == pytest.approx(4 * sum(held.values()) / 1e9)
    assert estimate_weight_gb(made.model, whole=True) == pytest.approx(16 * sum(held.values()) / 1e9)


def row(method: str, memory: float, seconds: float, *, fits: bool = True, tokens: int = 1000) -> dict[str, Any]:
    return {"method": method, "fits": fits, "seconds": seconds, "peak_memory_gb": memory, "file_bytes": 1e6,
            "tokens": tokens, "tokens_per_second": 1.0, "steps": 1, "trainable_fraction": 0.1}


@pytest.mark.parametrize(("rows", "objective", "chosen"), [
    ([row("full", 4, 90), row("lora", 1, 60)], "sft", "lora"),
    ([row("full", 4, 90, fits=False), row("lora", 3, 60, fits=False), row("qlora", 1, 80)], "sft", "qlora"),
    ([row("full", 4, 90, tokens=20_000_000), row("lora", 1, 60, tokens=20_000_000)], "pretrain", "full"),
    ([row("full", 4, 90, tokens=20_000_000), row("lora", 1, 60, tokens=20_000_000)], "sft", "lora"),
    ([row("full", 4, 90), row("lora", 1, 60)], "pretrain", "lora"),
    ([row("prompt", 2, 9), row("bitfit", 1, 10)], "sft", "bitfit"),
])
def test_the_choice_follows_from_what_was_measured(rows: list[dict[str, Any]], objective: str, chosen: str) -> None:
    said = build_advice({"methods": rows, "room_gb": 5.0}, objective)
    assert said[0].startswith(f"Choose {chosen}:")
    for one in rows:
        assert one["fits"] or any(line.startswith(f"{one['method']} does not fit") for line in said)


def test_ways_are_spelt(home: Path) -> None:
    made = build_recipe(None, {"model.name_or_path": "base", "data": "rows.jsonl", "optimizer.learning_rate": 0.5})
    assert build_variant(made, "qlora") == build_variant(made, "lora@nf4")
    assert build_variant(made, "qlora")["model"]["quantize"] == "nf4"
    assert build_variant(made, "bitfit+lora")["method"] == ["bitfit", "lora"]
    assert build_variant(made, "lora")["optimizer"]["learning_rate"] is None, "each way has its own rate"
    with pytest.raises(RecipeError, match="'lorra'"):
        build_variant(made, "lorra")
    with pytest.raises(RecipeError, match="'nf5'"):
        build_variant(made, "lora@nf5")
    with pytest.raises(RecipeError, match="measures no time"):
        plan(made, ["lora"], steps=1, quiet=True)
