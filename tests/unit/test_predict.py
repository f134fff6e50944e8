"""`luthier predict`: new rows without labels, in order, by every kind of run. Read `assembly/prediction.py` first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import luthier
from luthier.api import predict as module
from luthier.assembly.run_io import open_run
from luthier.cli.main import main
from luthier.core.errors import RecipeError, RunError
from luthier.training.run_folder import Run
from tiny import save_tiny

TEXTS = [f"{'good' if i % 2 else 'bad'} text {i} " + "x" * (7 * (i % 5)) for i in range(11)]
TASKS: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]] = {  # base, objective, train rows, new rows
    "single": ("bert", {"name": "classify"}, [{"text": t, "label": t.split()[0]} for t in TEXTS], [{"text": t} for t in TEXTS]),
    "single of a decoder": ("llama", {"name": "classify"}, [{"text": t, "label": t.split()[0]} for t in TEXTS],
                            [{"text": t, "label": "never seen"} for t in TEXTS]),
    "multi": ("bert", {"name": "classify", "task": "multi"}, [{"text": t, "label": [["a"], ["a", "b"], []][i % 3]} for i, t in enumerate(TEXTS)],
              [{"text": t} for t in TEXTS]),
    "regression": ("bert", {"name": "classify", "task": "regression"}, [{"text": t, "label": i / 3} for i, t in enumerate(TEXTS)],
                   [{"text": t} for t in TEXTS]),
    "tokens": ("bert", {"name": "classify", "task": "tokens"}, [{"words": t.split(), "tags": ["O"] * (len(t.split()) - 1) + ["B"]} for t in TEXTS],
               [{"words": t.split()} for t in TEXTS]),
    "reward": ("llama", {"name": "reward"}, [{"prompt": "Q?", "chosen": t, "rejected": "no"} for t in TEXTS],
               [{"prompt": f"Q{i}?", "completion": t} for i, t in enumerate(TEXTS)]),
    "contrastive": ("bert", {"name": "contrastive", "loss": "infonce"}, [{"anchor": t, "positive": t + "!"} for t in TEXTS],
                    [{"text": t} for t in TEXTS]),
    "sft": ("llama", {"name": "sft"}, [{"prompt": f"Q{i}?", "completion": t} for i, t in enumerate(TEXTS)],
            [{"prompt": f"Q{i}?" * (1 + i % 3)} for i in range(11)])}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    home = tmp_path_factory.mktemp("predict")
    made = {}
    for name, (base, objective, rows, _) in TASKS.items():
        if not (home / base).exists():
            save_tiny(home / base, base, dtype=torch.float32)
        made[name] = luthier.train({"model": str(home / base), "data": write(home / "rows.jsonl", rows), "objective": objective,
                                    "training": {"max_steps": 2, "batch_size": 4}, "output_dir": str(home / name.replace(" ", "-"))},
                                   quiet=True)
    return made


@pytest.mark.parametrize("name", TASKS)
def test_every_row_gets_the_prediction_that_it_gets_alone(runs: dict[str, Run], name: str) -> None:
    new = TASKS[name][3]
    found = luthier.predict(runs[name], new, quiet=True, max_new_tokens=6)
    assert len(found) == len(new)
    alone = [luthier.predict(runs[name], [row], quiet=True, max_new_tokens=6)[0] for row in new[:4]]
    for one, other in zip(found, alone, strict=False):
        assert one.keys() == other.keys()
        for key, value in one.items():
            if key in ("value", "reward"):
                assert value == pytest.approx(other[key], abs=1e-5)
            elif key == "embedding":
                assert value == pytest.approx(other[key], abs=1e-5)
                assert np.linalg.norm(value) == pytest.approx(1, abs=1e-5)
            elif key == "probabilities":
                assert value == pytest.approx(other[key], abs=1e-5)
                assert sum(value.values()) == pytest.approx(1, abs=1e-5) or name == "multi"
            else:
                assert value == other[key]
    assert len({json.dumps(one) for one in found}) > 1 or name in ("tokens",), "the rows matter"


def test_classes_are_those_of_the_model(runs: dict[str, Run]) -> None:
    _, family, _ = open_run(runs["single"])
    found = luthier.predict(runs["single"], [{"text": "good"}], quiet=True)[0]
    assert found["label"] == max(found["probabilities"], key=found["probabilities"].get)
    ids = family.tokenizer("good")["input_ids"]
    with torch.no_grad():
        states = family.model(input_ids=torch.tensor([ids])).last_hidden_state
        scores = family.heads._compute_scores("item", states[:, 0])[0].softmax(-1)
    assert list(found["probabilities"].values()) == pytest.approx(scores.tolist(), abs=1e-5)


def test_rewards_are_those_that_order_the_pairs_in_evaluation(runs: dict[str, Run], tmp_path: Path) -> None:
    pairs = [{"prompt": f"Q{i}?", "chosen": text, "rejected": "no, " + text} for i, text in enumerate(TEXTS)]
    measured = luthier.evaluate(runs["reward"], data=write(tmp_path / "pairs.jsonl", pairs), quiet=True)
    chosen, rejected = (luthier.predict(runs["reward"], [{"prompt": row["prompt"], "completion": row[side]} for row in pairs], quiet=True)
                        for side in ("chosen", "rejected"))
    right = sum(a["reward"] > b["reward"] for a, b in zip(chosen, rejected, strict=True)) / len(pairs)
    assert measured["rewards/accuracies"] == pytest.approx(right)


def test_an_interrupted_call_continues_and_rows_that_cannot_be_read_keep_their_place(
        runs: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 3)
    data = tmp_path / "new.jsonl"
    data.write_text("".join(line + "\n" for line in [
        '{"text": "one"}', "{broken", '{"text": ""}', *(json.dumps({"text": text}) for text in TEXTS)]))
    whole = luthier.predict(runs["single"], str(data), out=tmp_path / "whole.jsonl", quiet=True)
    assert [i for i, line in enumerate(whole) if "error" in line] == [1, 2]
    assert "new.jsonl:2" in whole[1]["error"]
    calls = []

    def stop(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return describe(*given)

    describe = module._format
    with monkeypatch.context() as patch:
        patch.setattr(module, "_format", stop)
        patch.setattr(module, "CHUNK", 2)
        with pytest.raises(KeyboardInterrupt):
            luthier.predict(runs["single"], str(data), out=tmp_path / "part.jsonl", quiet=True)
    with (tmp_path / "part.jsonl").open("a") as file:
        file.write('{"label": "ha')  # a kill in the middle of a line
    again = luthier.predict(runs["single"], str(data), out=tmp_path / "part.jsonl", quiet=True)
    assert [line.get("label") for line in again] == [line.get("label") for line in whole]
    assert len((tmp_path / "part.jsonl").read_text().splitlines()) == len(whole)
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(RunError, match="holds other predictions or all of these"):
        luthier.predict(runs["single"], str(data), out=tmp_path / "whole.jsonl", quiet=True)


def test_embeddings_as_an_array(runs: dict[str, Run], tmp_path: Path) -> None:
    found = luthier.predict(runs["contrastive"], TASKS["contrastive"][3], out=tmp_path / "e.npy", quiet=True)
    array = np.load(tmp_path / "e.npy")
    assert array.shape == (11, 32)
    assert array[3].tolist() == pytest.approx(found[3]["embedding"], abs=1e-6)
    with pytest.raises(RunError, match=r"\.jsonl or \.npy"):
        luthier.predict(runs["contrastive"], TASKS["contrastive"][3], out=tmp_path / "e.csv", quiet=True)


def test_the_command(runs: dict[str, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "new.jsonl", [{"review": text} for text in TEXTS])
    assert main(["predict", str(runs["single"].path), "--data", data, "--quiet", "data.columns={text: review}"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 11
    assert main(["predict", str(runs["single"].path), "--data", data, "--quiet", "data.columns={text: review}", "--out",
                 str(tmp_path / "out.jsonl"), "--json", "--max-samples", "5"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 5


def test_what_has_no_prediction_is_refused_by_name(runs: dict[str, Run]) -> None:
    with pytest.raises(RecipeError, match="multiple_choice"):
        luthier.predict(runs["sft"], [{"prompt": "x"}], quiet=True, objective="multiple_choice")
