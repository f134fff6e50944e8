"""`luthier.loop`: its four verbs do what `luthier.train` does, and its page runs as written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_docs import ROOT, blocks

import luthier
from luthier import loop
from luthier.core.errors import DataError, RecipeError
from tiny import save_tiny

TEXTS = [{"prompt": f"{i} and {i}?", "completion": f"that is {2 * i}"} for i in range(6)]
PAIRS = [{"prompt": f"{i}?", "chosen": f"it is {i}", "rejected": f"no {i}"} for i in range(6)]
LABELS = [{"text": f"{'ab'[i % 2] * 5} {i}", "label": "ab"[i % 2]} for i in range(6)]
CASES: dict[str, tuple[list[dict[str, Any]], Any, Any]] = {
    "sft": (TEXTS, "sft", "lora"), "full": (TEXTS, "sft", "full"), "dpo": (PAIRS, "dpo", "lora"),
    "classify": (LABELS, "classify", "bitfit"), "adalora": (TEXTS, "sft", "adalora"), "prompt": (TEXTS, "sft", "prompt"),
}
RATE = 1e-2
SMOOTH = {"adam_epsilon": 1e-3}  # a smaller one makes a full step out of the rounding of a gradient that is zero; 1e-7: one division in float32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("base") / "base", "llama", dtype=torch.float64))


def weights(tuner: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in tuner.parameters().items()}


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of any weight, relative to the largest weight of its tensor."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max() / other[name].abs().max().clamp_min(1e-3)) for name in one)


def open_session(model: str, objective: Any, method: Any) -> loop.Session:
    return loop.start(model={"name_or_path": model, "dtype": "float64"}, objective=objective, method=method, seed=3, optimizer=SMOOTH)


@pytest.mark.parametrize("name", CASES)
def test_the_division_into_calls_does_not_matter(name: str, model: str) -> None:
    rows, objective, method = CASES[name]
    trained = []
    for parts in ([rows], [rows[:4], rows[4:]], [[row] for row in rows]):
        if name == "classify" and len(parts) > 1:
            objective = {"name": "classify", "labels": ["a", "b"]}
        session = open_session(model, objective, method)
        for _ in range(3):
            for part in parts:
                session.forward_backward(part)
            session.optimizer_step(RATE)
        trained.append(weights(session.tuner))
    assert max(difference(trained[0], other) for other in trained[1:]) < 1e-7
    session = open_session(model, objective, method)
    session.forward_backward(rows)
    before = weights(session.tuner)
    session.optimizer_step(RATE)
    assert difference(before, weights(session.tuner)) > 1e-4, "the control: a step changes the weights"


def test_it_trains_what_train_trains(model: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
    run = luthier.train(model={"name_or_path": model, "dtype": "float64"}, data={"train": str(tmp_path / "rows.jsonl"), "shuffle": False},
                        method="lora", output_dir=str(tmp_path / "train"), training={"max_steps": 3, "batch_size": 6}, seed=3, quiet=True,
                        optimizer={**SMOOTH, "learning_rate": RATE, "lr_scheduler_type": "constant", "warmup_ratio": 0.0})
    session = open_session(model, "sft", "lora")
    losses = []
    for _ in range(3):
        losses.append(session.forward_backward(TEXTS)["loss"])
        session.optimizer_step(RATE)
    saved = session.save(tmp_path / "loop")
    assert losses == pytest.approx([line["loss"] for line in run.metrics if "loss" in line], rel=1e-7)
    from safetensors.torch import load_file
    one, other = (load_file(folder.path / "adapter_model.safetensors") for folder in (run, saved))
    assert difference(one, other) < 1e-6
    found = [luthier.evaluate(folder, data=str(tmp_path / "rows.jsonl"), quiet=True)["nll"] for folder in (run, saved)]
    assert found[0] == pytest.approx(found[1], rel=1e-7)


def test_bad_calls_are_refused_by_name(model: str) -> None:
    with pytest.raises(RecipeError, match="grpo"):
        open_session(model, {"name": "grpo", "reward": "exact_match"}, "lora")
    session = open_session(model, "sft", "lora")
    with pytest.raises(RecipeError, match="without a gradient"):
        session.optimizer_step()
    with pytest.raises(DataError, match="row 2: empty completion"):
        session.forward_backward([TEXTS[0], {"prompt": "a", "completion": ""}])
    with pytest.raises(RecipeError, match="call forward_backward first"):
        session.save("nowhere")


def test_the_page_runs(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = blocks(ROOT / "docs/loop.md", "python")
    names: dict[str, Any] = {}
    exec(compile(code.replace('"smollm2"', repr(model)), "loop.md", "exec"), names)
    start = loop.start(model=model, method={"name": "lora", "rank": 8}, objective="sft", seed=0)
    assert names["metrics"]["loss"] < 0.9 * start.forward_backward(names["rows"])["loss"]
    assert (tmp_path / "runs/mine/adapter_model.safetensors").exists()
    assert len(names["session"].sample([[{"role": "user", "content": "Who may sue?"}]])) == 1
