"""The verbs from Python: rows and paths as values, the object that they return, and notebooks."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch

import luthier
from luthier.core.errors import DataError, LuthierError, RecipeError, RunError
from luthier.data.python_rows import write_rows
from tiny import save_tiny

ROWS = [{"prompt": f"{a} + {a} =", "completion": f" {2 * a}"} for a in range(8)]
FAST: dict[str, Any] = {"training.max_steps": 2, "training.save_steps": 1, "quiet": True,
                        "data.max_length": 64}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "llama", "llama", dtype=torch.float32)


def kept(run: luthier.Run, name: str = "train") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------- rows


FORMS = {"list": lambda rows: rows, "tuple": tuple, "dataset": datasets.Dataset.from_list, "pandas": pd.DataFrame}


@pytest.mark.parametrize("form", FORMS)
def test_rows_train_as_their_file_does(form: str, base: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    by_path = luthier.train(model=base, data=file, output_dir=tmp_path / "path", **FAST)
    run = luthier.train(model=base, data=FORMS[form](ROWS), output_dir=tmp_path / "rows", **FAST)
    assert kept(run) == ROWS
    assert [line["loss"] for line in run.metrics if "loss" in line] == \
        [line["loss"] for line in by_path.metrics if "loss" in line]
    assert Path(run.recipe["data"]["train"][0]["path"]) == run.path.absolute() / "data" / "train.jsonl"
    assert run.provenance["data_sha256"]


def test_every_part_takes_rows_and_sources_mix(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "more.jsonl"
    file.write_text(json.dumps(ROWS[0]) + "\n")
    data = {"train": [datasets.Dataset.from_list(ROWS[:3]), file, {"path": ROWS[3:5], "weight": 2.0}],
            "eval": pd.DataFrame(ROWS[5:6])}
    run = luthier.train({"model": base, "data": data}, **{"data.test": ROWS[6:]}, output_dir=tmp_path / "run", **FAST)
    assert [kept(run, name) for name in ("train", "train-2", "eval", "test")] == [ROWS[:3], ROWS[3:5], ROWS[5:6],
                                                                                  ROWS[6:]]
    assert [source["weight"] for source in run.recipe["data"]["train"]] == [1.0, 1.0, 2.0]
    assert run.results["examples"] == 2
    assert luthier.evaluate(run, quiet=True)["examples"] == 2
    assert luthier.evaluate(run, data=pd.DataFrame(ROWS[:3]), quiet=True)["examples"] == 3
    shutil.move(run.path, tmp_path / "moved")
    assert luthier.evaluate(tmp_path / "moved", quiet=True)["examples"] == 2


def test_splits_of_a_dataset_dict_are_the_parts(base: Path, tmp_path: Path) -> None:
    splits = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in
                                   (("train", ROWS[:5]), ("validation", ROWS[5:6]), ("test", ROWS[6:]))})
    run = luthier.train(model=base, data=splits, output_dir=tmp_path / "run", **FAST)
    assert [kept(run, name) for name in ("train", "eval", "test")] == [ROWS[:5], ROWS[5:6], ROWS[6:]]
    splits["unsupervised"] = splits["test"]
    with pytest.raises(DataError, match="'unsupervised' is neither"):
        luthier.train(model=base, data=splits, quiet=True)


def test_a_run_on_rows_goes_on(base: Path, tmp_path: Path) -> None:
    whole = luthier.train(model=base, data=ROWS, output_dir=tmp_path / "whole", **FAST)
    run = luthier.train(model=base, data=ROWS, output_dir=tmp_path / "run", **FAST)
    for name in ("results.json", "README.md", "adapter_model.safetensors"):
        (run.path / name).unlink()
    shutil.rmtree(run.path / "checkpoints" / "step-2")
    with pytest.raises(RunError, match="trained on other rows"):
        luthier.train(model=base, data=ROWS[:-1], output_dir=run.path, resume=True, **FAST)
    assert kept(run) == ROWS
    luthier.train(model=base, data=ROWS, output_dir=run.path, resume=True, **FAST)
    assert run.metrics[-1]["loss"] == whole.metrics[-1]["loss"]
    (run.path / "results.json").unlink()
    moved = Path(shutil.move(run.path, tmp_path / "moved"))
    luthier.train(moved / "recipe.yaml", resume=True, quiet=True)
    assert luthier.Run(moved).results["steps"] == 2
    (moved / "results.json").unlink()
    (moved / "data" / "train.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    with pytest.raises(LuthierError, match="have changed since the run began"):
        luthier.train(moved / "recipe.yaml", resume=True, quiet=True)


def test_a_bad_row_is_reported_by_its_number(base: Path, tmp_path: Path) -> None:
    run = luthier.train(model=base, data=[*ROWS, {"prompt": "a"}], output_dir=tmp_path / "run", **FAST)
    (refused,) = json.loads((run.path / "data_report.json").read_text())["parts"]["train"]["refused"]
    assert (Path(refused["file"]).name, refused["line"]) == ("train.jsonl", "9")


VALUES = [None, True, False, 0, -3, 2**70, 0.1, 1e300, "", "é\n\"", "1", [1, "1", None], {"a": {"b": [1.5]}}, [], {}]


def test_values_and_their_types_are_kept(tmp_path: Path) -> None:
    rows = [{"z": value, "a": number} for number, value in enumerate(VALUES)]
    write_rows(rows, tmp_path / "a.jsonl", "data")
    back = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert back == rows
    assert [type(row["z"]) for row in back] == [type(value) for value in VALUES]
    assert list(back[0]) == ["z", "a"]


def test_tables_lose_no_type(tmp_path: Path) -> None:
    frame = pd.DataFrame({"i": [1, 2], "f": [1.0, None], "s": ["a", None], "b": [True, False], "o": [[1, 2], {"k": 1}]})
    write_rows(frame, tmp_path / "a.jsonl", "data")
    assert [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()] == [
        {"i": 1, "f": 1.0, "s": "a", "b": True, "o": [1, 2]}, {"i": 2, "f": None, "s": None, "b": False, "o": {"k": 1}}]
    names = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    write_rows(datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, names), tmp_path / "b.jsonl", "data")
    assert [json.loads(line)["label"] for line in (tmp_path / "b.jsonl").read_text().splitlines()] == ["yes", "no"]


class Image: ...


@pytest.mark.parametrize(("value", "words"), [
    (b"raw", "row 2, column 'x': bytes"), (Image(), "row 2, column 'x': an image"), (float("nan"), "row 2.*nan"),
    (float("inf"), "row 2.*inf"), (pd.Timestamp("2026-01-01"), "row 2.*Timestamp"), ({1: 2}, "row 2.*the key 1"),
    (np.datetime64("2026-01-01"), "row 2.*datetime64"), ([{"y": b""}], "row 2.*bytes"), ({1, 2}, "row 2.*set")])
def test_what_json_cannot_hold_is_refused_by_row(value: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        write_rows([{"x": 1}, {"x": value}], tmp_path / "a.jsonl", "data.train")


@pytest.mark.parametrize("rows", [pd.DataFrame({"text": []}), datasets.Dataset.from_dict({"text": []})])
def test_no_rows_are_refused(rows: Any) -> None:
    with pytest.raises(DataError, match="data: there are no rows"):
        luthier.train(data=rows, quiet=True)


def test_features_take_rows(tmp_path: Path) -> None:
    bert = save_tiny(tmp_path / "bert", "bert", dtype=torch.float32)
    rows = [{"text": f"text {n}", "label": "ab"[n % 2]} for n in range(4)]
    for _ in range(2):  # the second reads the cache
        states, labels = luthier.extract_features(bert, rows, out=tmp_path / "f.safetensors", quiet=True)
    assert states.shape[0] == 4
    assert [str(label) for label in labels] == ["a", "b", "a", "b"]
    with pytest.raises(RunError, match="other rows"):
        luthier.extract_features(bert, rows[:-1], out=tmp_path / "f.safetensors", quiet=True)


# ---------------------------------------------------------------- the object, and the module


def test_a_run_generates_and_chats(base: Path, tmp_path: Path) -> None:
    run = luthier.train(model=base, data=ROWS, output_dir=tmp_path / "run", **FAST)
    assert type(run) is luthier.Run
    assert run.metrics[-1]["step"] == 2
    texts = run.generate([row["prompt"] for row in ROWS], max_new_tokens=4)
    assert len(texts) == len(ROWS)
    assert run.generate(ROWS[3]["prompt"], max_new_tokens=4) == texts[3]
    assert run.generate([], max_new_tokens=4) == []
    assert luthier.Run(str(run.path)).generate(ROWS[3]["prompt"], max_new_tokens=4) == texts[3]
    session = run.chat(max_new_tokens=4)
    said = "".join(session.say(ROWS[3]["prompt"]))
    assert said.strip() == texts[3].strip()
    assert [message.role for message in session.messages] == ["user", "assistant"]
    run.unload()
    assert run.generate(ROWS[3]["prompt"], max_new_tokens=4) == texts[3]
    with pytest.raises(RecipeError, match="temperature"):
        run.generate("a", temperature=-1)


def test_a_model_without_text_says_so(tmp_path: Path) -> None:
    bert = save_tiny(tmp_path / "bert", "bert", dtype=torch.float32)
    rows = [{"text": f"text {n}", "label": "ab"[n % 2]} for n in range(4)]
    run = luthier.train(model=bert, data=rows, objective="classify", output_dir=tmp_path / "run", **FAST)
    with pytest.raises(RecipeError, match="cannot generate text"):
        run.generate("a")
    with pytest.raises(RecipeError, match="cannot generate text"):
        run.chat()


def test_paths_are_taken_everywhere(base: Path, tmp_path: Path) -> None:
    first = luthier.train(model={"name_or_path": base}, data=ROWS, output_dir=tmp_path / "first", **FAST)
    second = luthier.train(init_from=first.path, data={"train": ROWS}, output_dir=tmp_path / "second", **FAST)
    assert second.recipe["init_from"] == str(first.path)
    assert luthier.evaluate(second.path, data=first.path / "data" / "train.jsonl", base_model=base,
                            quiet=True)["examples"] == 8
    out = luthier.export(second.path, "merged", tmp_path / "merged", base_model=base)
    assert (tmp_path / "merged" / "config.json").exists(), out


def test_a_comparison_takes_a_mapping(base: Path, tmp_path: Path) -> None:
    recipe = {"model": base, "data": {"train": ROWS, "test": ROWS[:2]}, "training": {"max_steps": 1}}
    folder = luthier.compare_methods(recipe, ["bitfit"], out=tmp_path / "compared", quiet=True)
    assert type(folder) is luthier.Run
    assert [row["method"] for row in json.loads((folder.path / "comparison.json").read_text())["methods"]] == ["bitfit"]
    assert kept(luthier.Run(folder.path / "bitfit")) == ROWS
    planned = luthier.plan(recipe, ["bitfit"], steps=2, out=tmp_path / "planned", quiet=True)
    assert "seconds" in json.loads((planned.path / "plan.json").read_text())["methods"][0]


def test_the_public_functions_are_listed() -> None:
    assert dir(luthier) == sorted(luthier.__all__)
    assert {"train", "evaluate", "compare_methods", "rlhf", "plan", "Run"} <= set(dir(luthier))
    assert all(hasattr(luthier, name) for name in dir(luthier))


# ---------------------------------------------------------------- notebooks


def test_verbs_run_inside_an_event_loop_and_a_thread(base: Path, tmp_path: Path,
                                                     capfd: pytest.CaptureFixture[str]) -> None:
    """As in a notebook: cells run in a loop, or are sent to a thread."""
    found: list[Any] = []

    async def cell(name: str) -> None:
        run = luthier.train(model=base, data=ROWS, output_dir=tmp_path / name, **{**FAST, "quiet": False})
        found.append(run.generate(ROWS[0]["prompt"], max_new_tokens=2))
        found.append("".join(run.chat(max_new_tokens=2).say("a")) is not None)
        found.append(luthier.evaluate(run, data=ROWS[:2], quiet=True)["examples"])

    asyncio.run(cell("loop"))
    thread = threading.Thread(target=lambda: asyncio.run(cell("thread")))
    thread.start()
    thread.join()
    assert len(found) == 6
    assert found[:3] == found[3:]
    assert len(capfd.readouterr().err.splitlines()) < 60


# ---------------------------------------------------------------- methods that train a part of the base


@pytest.mark.parametrize("method", ["ln_tuning", "freeze"])
def test_a_run_on_a_part_of_the_base_goes_on_and_is_a_start(method: str, base: Path, tmp_path: Path,
                                                                capsys: pytest.CaptureFixture[str]) -> None:
    given: dict[str, Any] = {"model": base, "data": {"train": ROWS[:6], "test": ROWS[6:]}, "method": method,
                             "optimizer.learning_rate": 0.02, **FAST}
    whole = luthier.train(**given, output_dir=tmp_path / "whole")
    names = {path.name for path in whole.path.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert not {"config.json", "model.safetensors"} & names
    assert {"adapter_config.json", "adapter_model.safetensors"} <= whole.results["digests"]["trained"].keys()
    run = luthier.Run(shutil.copytree(whole.path, tmp_path / "run"))
    for name in ("results.json", "adapter_model.safetensors"):
        (run.path / name).unlink()
    shutil.rmtree(run.path / "checkpoints" / "step-2")
    luthier.train(run.path / "recipe.yaml", resume=True, quiet=True)
    files = [one.path / "adapter_model.safetensors" for one in (whole, run)]
    assert files[0].read_bytes() == files[1].read_bytes()
    tuned, bare = (luthier.evaluate(run, base_model_only=only, quiet=True)["loss"] for only in (False, True))
    assert tuned == pytest.approx(whole.results["test"]["loss"], abs=1e-6)
    assert bare == pytest.approx(whole.results["test_before"]["loss"], abs=1e-6)
    later = luthier.train(init_from=run.path, data={"train": ROWS[:6], "test": ROWS[6:]}, output_dir=tmp_path / "later",
                          **FAST)
    assert later.results["test_before"]["loss"] == pytest.approx(tuned, abs=1e-6)
    with pytest.raises(LuthierError, match="nowhere"):
        luthier.evaluate(run, quiet=True, base_model=tmp_path / "nowhere")
    data = bytearray(files[1].read_bytes())
    data[-1] ^= 1
    files[1].write_bytes(data)
    luthier.evaluate(run)
    assert "adapter_model.safetensors has changed since the run ended" in capsys.readouterr().err
