"""Whatever a user gives wrongly ends in one message with the value, the rule and the remedy, and exit code 2.

Through the command line, from words to exit code. What a command does with good words is in unit/test_cli.py; each way
that a row can be bad has its case in unit/data.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from luthier.assembly import initialization, run_io
from luthier.cli.main import main
from luthier.training import checkpoint, loop, run_folder, trackers
from luthier.training.run_folder import Run
from tiny import save_tiny

Output = tuple[int, str, str]
Call = Callable[..., Output]


def row(i: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"question {i}?", "completion": f"answer {i % 3}", **more}


def jsonl(rows: list[Any]) -> str:
    return "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("bad") / "base", "llama", dtype=torch.float32, num_hidden_layers=1)


@pytest.fixture
def call(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """`main` in a folder with good rows and a good recipe: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(jsonl([row(i) for i in range(8)]))
    Path("recipe.yaml").write_text(yaml.safe_dump({
        "model": str(base), "method": {"name": "lora", "rank": 2}, "data": {"train": "rows.jsonl", "max_length": 128},
        "training": {"max_steps": 4, "batch_size": 4, "save_steps": 1}, "optimizer": {"learning_rate": 0.01}}))

    def called(*words: str) -> Output:
        code = main(words)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err
    return called


@pytest.fixture
def train(call: Call) -> Call:
    return lambda *words: call("train", "recipe.yaml", "--output-dir", "run", *words)


def refused(output: Output, *words: str) -> str:
    """One message, its remedy, and nothing on stdout; every one of `words` is in it."""
    code, out, err = output
    assert (code, out) == (2, ""), err
    assert err.count("error: ") == 1
    message = err[err.index("error: "):]
    assert "\n  -> " in message, message
    for word in words:
        assert word in message, message
    return message


# ---------------------------------------------------------------- data


FILES: dict[str, tuple[str, str | bytes, tuple[str, ...]]] = {  # what is wrong: file, content, words of the message
    "empty": ("a.jsonl", "", ("a.jsonl is empty", "give a file with rows")),
    "blank": ("a.jsonl", " \n\n", ("a.jsonl is empty",)),
    "all rows broken": ("a.jsonl", "{broken\n{broken too\n", ("none of the 2 train rows", "a.jsonl:1: broken JSON", "a.jsonl:2", "fix the rows")),
    "not UTF-8": ("a.jsonl", jsonl([row(1)]).replace("question", "Frage nach Käse").encode("latin-1"), ("a.jsonl:1: not UTF-8",)),
    "UTF-16": ("a.jsonl", jsonl([row(1)]).encode("utf-16"), ("UTF-16", "convert it")),
    "no text": ("a.jsonl", jsonl([{"prompt": 3, "completion": ["x"]}]), ("none of the 1 train rows", "a.jsonl:1")),
    "not objects": ("a.jsonl", "3\n[1, 2]\n", ("a.jsonl:1: not an object", "not int", "a.jsonl:2")),
    "a missing column": ("a.jsonl", jsonl([{"question": "q", "answer": "a"}]), ("'question', 'answer' match no known format", "`columns: {prompt: question")),
    "a missing column in a table": ("a.csv", "question,answer\nq,a\n", ("a.csv:2", "'question', 'answer'", "columns:")),
    "pairs": ("a.jsonl", jsonl([{"prompt": "q", "chosen": "a", "rejected": "b"}]), ("(PreferenceExample)", "choose an objective that reads them: ")),
    "no assistant": ("a.jsonl", jsonl([{"messages": [{"role": "user", "content": "q"}]}]), ("a.jsonl:1: no assistant turn",)),
    "no weight": ("a.jsonl", jsonl([row(1, weight=0)]), ("a.jsonl:1: nothing to train on",)),
    "all cut off": ("a.jsonl", jsonl([{"prompt": "q" * 300, "completion": "a"}]), ("a.jsonl:1: nothing to train on", "max_length=128")),
    "an unknown suffix": ("a.xls", "x", ("'.xls'", "known: .json .jsonl")),
    "a header and no row": ("a.csv", "prompt,completion\n", ("a.csv: the file has no rows", "below the header line")),
    "an empty array": ("a.json", "[]", ("a.json: the file has no rows",)),
    "an array of scalars": ("a.json", '[1, "x"]', ("a.json:1: not an object", "not int")),
    "semicolons": ("a.csv", "prompt;completion\nq;a\n", ("a.csv:1: the header line 'prompt;completion' is one column", "separated by ';'", "with commas")),
    "commas in a .tsv": ("a.tsv", "prompt,completion\nq,a\n", ("is one column", "separated by ','")),
    "a header that never closes": ("a.csv", '"prompt,completion\nq,a\n', ("a.csv:1: the header line cannot be read", "close its quotes")),
    "rows within an object": ("a.json", json.dumps({"data": [row(1)]}), ("the columns 'data'", "the rows seem to be inside the column 'data'")),
    "columns in capitals": ("a.jsonl", jsonl([{"Prompt": "q", " Completion": "a"}]), ("`columns: {prompt: 'Prompt', completion: ' Completion'}`",)),
    "old Mac line ends": ("a.jsonl", jsonl([row(1), row(2)]).replace("\n", "\r"), ("a.jsonl:1: broken JSON (Extra data",)),
    "torn Parquet": ("a.parquet", b"PAR1 and no more", ("a.parquet cannot be read as Parquet", "download it again")),
    "an empty archive": ("a.jsonl.gz", b"\x1f\x8b\x08", ("a.jsonl.gz cannot be read",)),
}


@pytest.mark.parametrize("wrong", FILES)
def test_a_file_that_cannot_be_trained_on(train: Call, wrong: str) -> None:
    name, content, words = FILES[wrong]
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    refused(train("--data", name), *words)
    assert not Path("run").exists()  # the run folder's name is free for the next try


ROWS: dict[str, tuple[list[Any], int, int, tuple[str, ...]]] = {  # rows, kept, line of the bad one, words about it
    "broken JSON": ([row(1), '{"prompt": "cut of', row(2)], 2, 2, ("broken JSON",)),
    "another type": ([row(1), row(2), {"prompt": 7, "completion": "a"}], 2, 3, ("prompt is not text", "it is int")),
    "another format": ([row(1), {"messages": [{"role": "user", "content": "q"}]}], 1, 2, ("no prompt", "format of the file is completion")),
    "a stranger first": ([{"q": 1}, row(1), row(2)], 2, 1, ("columns of no known format",)),
    "an empty answer": ([row(1), {"prompt": "q", "completion": " "}], 1, 2, ("empty completion",)),
    "a key twice": ([row(1), '{"prompt": "a", "prompt": "b", "completion": "c"}'], 1, 2, ("broken JSON", "the key 'prompt' occurs twice")),
    "NaN for an answer": (['{"prompt": "a", "completion": NaN}', row(1)], 1, 1, ("completion is not text",)),
    "a weight of NaN": (['{"prompt": "a", "completion": "b", "weight": NaN}', row(1)], 1, 1, ("weight is not a finite number from 0 up",)),
    "null for a row": (["null", row(1)], 1, 1, ("not an object",)),
    "a weight in words": ([row(1), row(2, weight="much")], 1, 2, ("weight is not a number",)),
}


@pytest.mark.parametrize("wrong", ROWS)
def test_a_bad_row_among_good_ones_is_counted_and_named(train: Call, wrong: str) -> None:
    rows, kept, line, words = ROWS[wrong]
    Path("a.jsonl").write_text(jsonl(rows))
    code, _, err = train("--data", "a.jsonl", "training.max_steps=1", "--json")
    assert code == 0
    assert f"train: {kept} of {len(rows)} rows kept" in err
    assert f"train: 1 rejected: {words[0]}, first: a.jsonl:{line}\n" in err
    part = json.loads(Path("run/data_report.json").read_text())["parts"]["train"]
    assert (part["read"], part["kept"]) == (len(rows), kept)
    (found,) = part["refused"]
    assert (found["file"], found["line"]) == ("a.jsonl", str(line))
    for word in words:
        assert word in f"{found['reason']} {found['detail']}"


def test_rows_that_are_too_long(train: Call) -> None:
    Path("a.jsonl").write_text(jsonl([row(1), {"prompt": "q", "completion": "a" * 300}]))
    code, _, err = train("--data", "a.jsonl", "training.max_steps=1")
    assert code == 0
    assert "train: 2 of 2 rows kept, 1 truncated" in err
    shutil.rmtree("run")
    code, _, err = train("--data", "a.jsonl", "training.max_steps=1", "data.truncation=refuse")
    assert code == 0
    assert "train: 1 rejected: longer than max_length, first: a.jsonl:2" in err
    shutil.rmtree("run")
    Path("b.jsonl").write_text(jsonl([{"prompt": "q", "completion": "a" * 300}]))
    refused(train("--data", "b.jsonl", "data.truncation=refuse"), "none of the 1 train rows", "b.jsonl:1: longer than max_length", "at most 128")
    refused(train("data.max_length=300"), "data.max_length 300 is longer than the base's context, 256", "set data.max_length to 256 or less")


def test_a_quote_that_never_closes_swallows_no_row_in_silence(train: Call) -> None:
    """Read leniently, the last cell would take in the rest of the file, and be trained on."""
    Path("a.csv").write_text('prompt,completion\nq0,a0\nq1,"a1\nq2,a2\nq3,a3\n')
    code, _, err = train("--data", "a.csv", "training.max_steps=1")
    assert code == 0
    assert "train: 1 of 2 rows kept" in err
    (found,) = json.loads(Path("run/data_report.json").read_text())["parts"]["train"]["refused"]
    assert (found["line"], found["reason"]) == ("3", "broken table row")
    assert "lines 3 to 5" in found["detail"]


def test_windows_line_ends_and_a_byte_order_mark_are_no_fault(train: Call) -> None:
    for name, content in (("a.jsonl", jsonl([row(1), row(2)])), ("a.csv", "prompt,completion\nq,a\nq,b\n")):
        Path(name).write_bytes(b"\xef\xbb\xbf" + content.replace("\n", "\r\n").encode())
        shutil.rmtree("run", ignore_errors=True)
        code, _, err = train("--data", name, "training.max_steps=1")
        assert code == 0
        assert "train: 2 of 2 rows kept" in err


def test_no_row_to_evaluate_on_and_none_in_a_stream(train: Call) -> None:
    Path("none.csv").write_text("prompt,completion\n")
    refused(train("data.eval=none.csv"), "none.csv: the file has no rows")
    refused(train("data.train=none.csv", "data.streaming=true"), "none.csv: the file has no rows")


def test_rows_of_a_stream_do_not_disappear_in_silence(train: Call) -> None:
    """They are counted as they are trained on, over a resume too, and told at the end."""
    rows = [row(1), "{broken", row(2), {"prompt": "q", "completion": "a" * 300}, {"prompt": "q", "completion": ""}]
    Path("a.jsonl").write_text(jsonl(rows))
    words = ("data.train=a.jsonl", "data.streaming=true", "training.max_steps=3", "training.batch_size=1", "training.save_steps=1")
    code, _, err = train(*words)
    assert code == 0
    told = ("train: 3 of 5 rows kept, 1 truncated, first: a.jsonl:4\n", "train: 1 rejected: broken JSON, first: a.jsonl:2\n",
            "train: 1 rejected: empty completion, first: a.jsonl:5\n")
    assert all(line in err for line in told)
    part = json.loads(Path("run/data_report.json").read_text())["parts"]["train"]
    assert (part["read"], part["kept"], part["truncated_rows"]) == (5, 3, ["a.jsonl:4"])
    shutil.rmtree("run/checkpoints/step-3")
    Path("run/README.md").unlink()
    code, _, err = train("--resume", *words)
    assert code == 0
    assert all(line in err for line in told)
    assert json.loads(Path("run/data_report.json").read_text())["parts"]["train"] == part


def test_a_right_answer_that_no_metric_can_read_is_told_before_any_work(train: Call) -> None:
    Path("t.jsonl").write_text(jsonl([row(1, completion='{"a": 1}'), row(2)]))
    refused(train("data.test=t.jsonl", "evaluate.metrics=json_equal", "evaluate.before_training=false"),
            "t.jsonl:2: the reference 'answer 2' is not JSON (metric json_equal)", "fix the row")
    assert not Path("run").exists()


def test_a_hub_that_cannot_be_reached_is_one_message(train: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    import logging

    import datasets

    def unreachable(*_: Any, **__: Any) -> None:
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s")
        raise ConnectionError("Couldn't reach 'owner/rows' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    message = refused(train("--data", "owner/rows"), "'owner/rows' is not a file or folder", "Couldn't reach", "the network connection, or give a file")
    assert "Retrying" not in message


def test_the_remedy_for_columns_is_one(train: Call) -> None:
    Path("a.jsonl").write_text(jsonl([{"question": f"q{i}", "answer": "a"} for i in range(4)]))
    assert train("--data", "a.jsonl", "data.columns={prompt: question, completion: answer}", "training.max_steps=1")[0] == 0
    refused(train("--output-dir", "b", "--data", "a.jsonl", "data.columns={prompt: qestion, completion: answer}"), "'qestion'", "did you mean 'question'")


def test_a_missing_file_is_found_before_the_base_is_loaded(train: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.api.train.load_family", never)
    refused(train("--data", "row.jsonl"), "file row.jsonl not found", "did you mean rows.jsonl?")
    refused(train("data.test=tets.jsonl"), "file tets.jsonl not found")
    refused(train("data.eval=deep/down/eval.jsonl"), "deep/down/eval.jsonl")
    assert not Path("run").exists()


def never(*_: Any, **__: Any) -> None:
    raise AssertionError("this work was not to begin")


# ---------------------------------------------------------------- bases


def test_a_base_without_weights(train: Call, base: Path) -> None:
    shutil.copytree(base, "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    refused(train("model=bare"), "'bare'", "neither model.safetensors nor model.safetensors.index.json", "safetensors weights")
    shutil.copytree(base, "torn")
    weights = Path("torn/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused(train("model=torn"), "model.safetensors is missing or damaged", "again")
    assert not Path("run").exists()


def test_a_base_of_pickles_or_of_numbers_that_are_none(train: Call, base: Path) -> None:
    from safetensors.torch import load_file, save_file
    shutil.copytree(base, "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    Path("pickled/pytorch_model.bin").write_bytes(b"")
    refused(train("model=pickled"), "only pickle weights (pytorch_model.bin), and pickle is never loaded", "safetensors")
    shutil.copytree(base, "lost")
    weights = load_file("lost/model.safetensors")
    save_file({name: tensor * float("nan") for name, tensor in weights.items()}, "lost/model.safetensors", {"format": "pt"})
    refused(train("model=lost"), "base 'lost': its output is not a number", "the weights are damaged")
    assert not Path("run").exists()


# ---------------------------------------------------------------- recipes


def test_all_faults_of_a_recipe_come_at_once(train: Call) -> None:
    message = refused(train("trianing.steps=1", "method.rank=many", "data.max_lenght=3", "optimizer.learning_rate=-1",
                            "training.batch_size=0", "evaluate.metrics=[exat]", "seed=[1]"),
                      "did you mean 'training'?", "did you mean 'max_length'?", "did you mean 'exact_match'?", "`luthier schema`")
    for key, given in (("method.rank", "'many'"), ("optimizer.learning_rate", "-1"), ("training.batch_size", "0"), ("seed", "[1]")):
        (line,) = [line for line in message.splitlines() if key in line]
        assert f"(got {given})" in line


@pytest.mark.parametrize(("words", "expected"), [
    (("method=lroa",), ("lroa", "'lora'")),
    (("objective=stf",), ("stf", "'sft'")),
    (("optimizer.lr_scheduler_type=cosin",), ("optimizer.lr_scheduler_type", "'cosine'", "'cosin'")),
    (("data.truncation=split it",), ("data.truncation", "'truncate'")),
    (("data.columns={promt: a}",), ("promt", "did you mean 'prompt'")),
    (("data.eval=1.5",), ("data.eval", "between 0 and 1")),
    (("training.max_steps=some",), ("training.max_steps", "'some'")),
    (("training=4",), ("training", "(got 4)")),
    (("optimizer.learning_rate=.nan",), ("optimizer.learning_rate", "nan")),
    (("model.device=cud",), ("cud",)),
    (("method.target_modules=[w]",), ("w",)),
    (("seed=99999999999999999999",), ("seed: ", "less than")),
    (("data.max_samples=0",), ("data.max_samples", "(got 0)")),
    (("data.max_length=1",), ("data.max_length", "(got 1)")),
    (("optimizer={lr: 1}",), ("'optimizer.lr'", "use optimizer.learning_rate")),
    (("learning_rate=1", "steps=2", "rank=3"), ("'learning_rate': did you mean optimizer.learning_rate?", "'steps': use training.max_steps", "did you mean method.rank?")),
    (("method=lroa",), ("method: unknown name 'lroa': did you mean 'lora'?", "known: full, ")),
    (("method.lora.rnak=2",), ("'method.rnak'", "did you mean 'rank'?")),
    (("method=[bitfit, {name: lora, rank: x}]",), ("error: method.parts.1.lora.rank: ", "(got 'x')\n  ->")),  # and no more
    (("data.format=mesages",), ("data.format: Input should be 'auto'; or: ", "(got 'mesages'); did you mean 'messages'?\n  ->")),
    (("data.train={weight: 0}",), ("error: data.train.0.weight: Input should be greater than 0 (got 0)\n  ->",)),
    (("data.eval={pth: x}",), ("error: data.eval.path: this setting is required\nunknown setting 'data.eval.pth'",)),
    (("data.columns=prompt",), ("data.columns: Input should be a mapping, {key: value} (got 'prompt')",)),
    (("method.target_modules=3",), ("method.target_modules: Input should be 'all-linear'; or: Input should be a list (got 3)",)),
])
def test_a_setting_that_cannot_be(train: Call, words: tuple[str, ...], expected: tuple[str, ...]) -> None:
    refused(train(*words), *expected)
    assert not Path("run").exists()


def test_a_recipe_that_is_none(call: Call) -> None:
    Path("list.yaml").write_text("- method: lora\n")
    refused(call("train", "list.yaml"), "holds a list", "method: lora")
    Path("torn.yaml").write_text("method: {name: lora\n")
    refused(call("train", "torn.yaml"), "torn.yaml", "cannot be read")
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00")
    refused(call("train", "binary.yaml"), "binary.yaml")
    Path("empty.yaml").write_text("")
    refused(call("train", "empty.yaml"), "'empty.yaml' is empty")
    Path("tabs.yaml").write_text("model: x\nmethod:\n\tname: lora\n")
    refused(call("train", "tabs.yaml"), "line 3", "fix the YAML")
    Path("twice.yaml").write_text("data: rows.jsonl\nmethod: lora\nmethod: full\n")
    refused(call("train", "twice.yaml"), "the key 'method' occurs twice", "line 3")
    refused(call("train", "rows.jsonl"), "rows.jsonl", "--data")
    refused(call("train", "."), "'.' is a folder", "--resume RUN")
    refused(call("train", "none.yaml"), "recipe 'none.yaml' not found", "recipes here: ", "recipe.yaml")
    refused(call("train", "--resume", "none"), "'none' is not a run folder (it has no recipe.yaml)")
    assert not Path("runs").exists()


# ---------------------------------------------------------------- run folders and extras


def test_a_run_folder_in_use_is_not_touched(train: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train("--quiet")[0] == 0
    before = contents(Path("run"))
    monkeypatch.setattr("luthier.api.train.load_family", never)
    refused(train(), "'run' already holds a run", "--resume", "output_dir=NAME")
    refused(train("training.report_to=[wandb]"), "'run' already holds a run")  # before any tracker is opened
    assert contents(Path("run")) == before


def test_a_file_in_the_place_of_the_run_folder(train: Call) -> None:
    Path("run").write_text("mine")
    refused(train(), "'run'", "output_dir=NAME")
    assert Path("run").read_text() == "mine"


def test_a_missing_extra_is_told_before_any_work(train: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.api.train.load_family", never)
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    refused(train("training.report_to=[wandb]"), "'wandb', which is not installed", "pip install 'luthier[wandb]'")
    assert not Path("run").exists()


def test_no_tracker_is_opened_for_a_run_that_cannot_begin(train: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service would keep an empty run for every typo."""
    monkeypatch.setattr(trackers, "_check_package", lambda package: None)
    monkeypatch.setitem(trackers.TRACKERS, "wandb", never)
    Path("a.jsonl").write_text("{broken\n")
    refused(train("training.report_to=[wandb]", "--data", "a.jsonl"), "a.jsonl:1")
    assert not Path("run").exists()


def test_evaluate_without_test_rows(train: Call, call: Call) -> None:
    assert train("--quiet")[0] == 0
    refused(call("evaluate", "run"), "'run' was trained without test or validation rows", "luthier evaluate RUN --data FILE")
    refused(call("evaluate", "run", "--data", "rows.jsonl", "--metric", "exat"), "unknown metric 'exat'", "did you mean 'exact_match'?")
    refused(call("evaluate", "run", "--data", "row.jsonl"), "did you mean rows.jsonl?")
    Path("run/adapter_model.safetensors").unlink()
    refused(call("evaluate", "run", "--data", "rows.jsonl"), "no adapter_model.safetensors", "--resume")


def contents(folder: Path) -> Mapping[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---------------------------------------------------------------- a broken loss


def test_a_rate_that_breaks_the_loss(train: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch is named, and the weights stay as the last good step left them."""
    kept: list[dict[str, torch.Tensor]] = []
    attach, step = initialization.attach_method, loop.step
    attached: list[Any] = []
    monkeypatch.setattr(initialization, "attach_method", lambda *given: attached.append(attach(*given)) or attached[-1])

    def noted(*given: Any) -> Any:
        kept.append({name: tensor.clone() for name, tensor in attached[0].state().items()})
        return step(*given)

    monkeypatch.setattr(loop, "step", noted)
    refused(train("optimizer.learning_rate=1e30", "optimizer.max_grad_norm=null"), "loss nan", "rows.jsonl:", "the weights were not updated",
            "optimizer.learning_rate")
    after = attached[0].state()
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert all(torch.equal(after[name], tensor) for name, tensor in kept[-1].items())
    assert not any(torch.equal(kept[0][name], tensor) for name, tensor in kept[-1].items() if "lora_B" in name)
    assert len(Run("run").metrics) == len(kept)  # the line of what trains, and one for each good step
    assert all(m["loss"] < float("inf") for m in Run("run").metrics if "loss" in m)


# ---------------------------------------------------------------- no space on the disk


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")


def refuse_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, when: Callable[..., bool]) -> None:
    own = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *given, **named: full() if when(*given) else own(*given, **named))


class Narrow:
    """A file on a disk that has room for half of step 3's line."""

    def __init__(self, file: Any) -> None:
        self.file, self.left = file, 10**9
        self.close = file.close

    def write(self, line: bytes) -> int:
        if line.startswith(b'{"step": 3'):
            self.left = len(line) // 2
        if not self.left:
            full()
        written = self.file.write(line[:self.left])
        self.left -= written
        return written


@pytest.mark.parametrize("place", ["checkpoint", "metrics", "results", "adapter", "picture", "card"])
def test_a_full_disk_is_one_message_and_the_run_goes_on_later(train: Call, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    from safetensors import SafetensorError
    assert train("--output-dir", "whole", "--quiet")[0] == 0
    with monkeypatch.context() as patch:
        if place == "checkpoint":
            refuse_at(patch, checkpoint, "_write_checkpoint", lambda folder, step, *_: step == 3)
        elif place == "metrics":
            own = trackers.Path.open
            patch.setattr(trackers.Path, "open", lambda path, *given, **named: Narrow(own(path, *given, **named)) if path.name == "metrics.jsonl" else own(path, *given, **named))
        elif place == "results":
            refuse_at(patch, run_folder.Path, "write_text", lambda path, text: "results" in path.name and "train_seconds" in text)
        elif place == "adapter":
            def broken(*_: Any, **__: Any) -> None:
                raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
            patch.setattr(run_io, "save_file", broken)
        elif place == "picture":
            patch.setattr("matplotlib.figure.Figure.savefig", picture_fails())
        else:
            refuse_at(patch, run_folder.Path, "write_text", lambda path, text: "README" in path.name)
        message = refused(train("--quiet"), os.strerror(errno.ENOSPC), "free disk space", "resume")
        assert "run" in message
    last = 2 if place in ("checkpoint", "metrics") else 4
    saved, damaged = checkpoint.find_latest(Path("run/checkpoints"))
    assert (saved.step, damaged) == (last, [])
    assert not list(Path("run").rglob(".*"))
    code, *words = train("--resume", "--quiet")
    assert code == 0, words
    assert Path("run/adapter_model.safetensors").read_bytes() == Path("whole/adapter_model.safetensors").read_bytes()
    assert [m["step"] for m in Run("run").metrics] == [m["step"] for m in Run("whole").metrics]


def picture_fails() -> Callable[..., None]:
    """The second picture, that of the loss, finds the disk full."""
    from matplotlib.figure import Figure
    own, left = Figure.savefig, [1]

    def savefig(self: Any, *given: Any, **named: Any) -> None:
        if not left[0]:
            full()
        left[0] -= 1
        own(self, *given, **named)
    return savefig


def test_a_full_disk_at_the_very_beginning(train: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        refuse_at(patch, run_folder.Path, "write_text", lambda path, text: "recipe" in path.name)
        refused(train("--quiet"), "run/recipe.yaml", os.strerror(errno.ENOSPC))
    assert train("--quiet")[0] == 0
