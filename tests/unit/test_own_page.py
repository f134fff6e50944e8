"""Python of the pages: one's own objective trains as written, in a process of its own; a classifier's answers are those that
`evaluate` counts. (Rewards and commands run in `contract/test_pages.py`.)"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_docs import ROOT, blocks

import luthier
from luthier.core.types import LossInputs, Outputs
from luthier.objectives import OBJECTIVES
from tiny import save_tiny

OBJECTIVE = blocks(ROOT / "docs/own.md", "python")[1]


def test_the_objective_of_the_page_trains(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "llama", dtype=torch.float32)
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps({"prompt": f"{i}?", "completion": str(i)}) + "\n" for i in range(8)))
    (tmp_path / "focal.py").write_text(OBJECTIVE.replace('"smollm2"', repr(str(base))) + '\nprint(run.recipe["objective"])\n')
    done = subprocess.run([sys.executable, "focal.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "{'name': 'focal', 'gamma': 1.0}"


def test_the_objective_of_the_page_is_its_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.train", lambda **settings: None)
    told: dict = {}
    monkeypatch.setitem(OBJECTIVES, "focal", None)  # taken out again
    exec(compile(OBJECTIVE, "own.md", "exec", dont_inherit=True), told)  # without this file's postponed annotations
    chances, weights = torch.tensor([0.9, 0.2], dtype=torch.float64), torch.tensor([1.0, 3.0], dtype=torch.float64)
    target = LossInputs(state_index=torch.tensor([0, 1]), token_ids=torch.tensor([5, 6]), weights=weights, num_examples=1, num_bytes=2)
    loss = told["FocalConfig"](gamma=2.0)(Outputs(token_logps=chances.log()), target)
    wanted = sum(w * (1 - p) ** 2 * -p.log() for w, p in zip(weights, chances, strict=True))
    torch.testing.assert_close(loss.total, wanted)
    assert float(loss.count) == 4.0


def test_a_classifiers_answers_are_those_that_evaluate_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "minilm", "bert", dtype=torch.float32)
    truth = [["down", "up"][i % 2] for i in range(9)]
    (tmp_path / "unseen.csv").write_text("text,label\n" + "".join(f"{chr(97 + i % 2) * 9} {i},{label}\n" for i, label in enumerate(truth)))
    run = luthier.train(data="unseen.csv", objective="classify", output_dir="runs/lora-minilm", quiet=True, **{
        "model.name_or_path": str(tmp_path / "minilm"), "training.max_steps": 20, "training.batch_size": 9,
        "optimizer.learning_rate": 1e-2, "evaluate.before_training": False})
    capsys.readouterr()
    exec(compile(blocks(ROOT / "docs/objectives/classify.md", "python")[0], "classify.md", "exec"), {})
    said = json.loads(capsys.readouterr().out.replace("'", '"'))
    measured = luthier.evaluate(run, data="unseen.csv", quiet=True)
    assert sum(a == b for a, b in zip(said, truth, strict=True)) / 9 == pytest.approx(measured["accuracy"])
    assert said.count("up") == sum(measured.get(f"confusion_{i}_1", 0) for i in (0, 1))
    assert 0 < said.count("up") < 9, "one class for all, so nothing was tried"
