"""Every command from its words to its exit code, on a tiny random model."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import luthier
from luthier import assembly
from luthier.assembly.factory import encode_chat_prompt
from luthier.cli import console
from luthier.cli.commands import COMMANDS
from luthier.cli.main import main, parse
from luthier.serving.detokenizer import stream_text
from tiny import save_tiny

ROOT = Path(__file__).parents[2]
Output = tuple[int, str, str]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, rows to train and to test on, and two finished runs."""
    folder = tmp_path_factory.mktemp("home")
    save_tiny(folder / "base", "llama", dtype=torch.float32)
    for name, count in (("train", 12), ("test", 4)):
        (folder / f"{name}.jsonl").write_text("".join(
            json.dumps({"messages": [{"role": "user", "content": f"{name} {i}?"}, {"role": "assistant", "content": f"yes {i % 3}"}]})
            + "\n" for i in range(count)))
    (folder / "recipe.yaml").write_text(yaml.safe_dump({
        "model": str(folder / "base"), "method": {"name": "lora", "rank": 2},
        "data": {"train": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl"), "max_length": 128},
        "training": {"max_steps": 3, "batch_size": 4}, "optimizer": {"learning_rate": 0.01},
        "evaluate": {"metrics": ["exact_match"], "max_new_tokens": 4}}))
    assert main(["train", str(folder / "recipe.yaml"), "--output-dir", str(folder / "lora"), "--quiet"]) == 0
    assert main(["train", str(folder / "recipe.yaml"), "--method", "full", "--output-dir", str(folder / "full"), "--quiet"]) == 0
    return folder


@pytest.fixture
def run(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Output]:
    """`main` in the home folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(home)
    capsys.readouterr()

    def call(*words: str) -> Output:
        code = main(words)
        return code, *capsys.readouterr()

    return call


# ---------------------------------------------------------------- train


def test_train_leaves_a_run_and_says_what_is_next(run: Callable[..., Output], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code, out, _ = run("train", "recipe.yaml", "--output-dir", str(folder), "training.max_steps=2", "method.rank=3", "--quiet")
    assert code == 0
    for expected in (str(folder), "exact_match", "perplexity", "2 steps", f"luthier chat {folder} --compare", "luthier export"):
        assert expected in out
    recorded = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert (recorded["method"]["rank"], recorded["training"]["max_steps"]) == (3, 2)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics if "loss" in m] == [1, 2]


def test_train_from_options_alone_prints_json_alone(run: Callable[..., Output], tmp_path: Path) -> None:
    code, out, _ = run("train", "--model", "base", "--data", "train.jsonl", "--method", "full", "--objective", "sft", "--json",
                       "--output-dir", str(tmp_path / "a"), "training.max_steps=1", "data.max_length=64", "--quiet")
    assert code == 0
    assert json.loads(out)["run"] == str(tmp_path / "a")
    assert yaml.safe_load((tmp_path / "a/recipe.yaml").read_text())["method"]["name"] == "full"


@pytest.mark.parametrize("words", [("--resume", "RUN"), ("RUN", "--resume"), ("--resume", "--output-dir", "RUN")])
def test_a_run_goes_on_by_its_folder(run: Callable[..., Output], tmp_path: Path, words: tuple[str, ...]) -> None:
    folder = str(tmp_path / "run")
    assert run("train", "recipe.yaml", f"output_dir={folder}", "training.save_steps=1", "--quiet")[0] == 0
    weights = (Path(folder) / "adapter_model.safetensors").read_bytes()
    for lost in ("adapter_config.json", "adapter_model.safetensors", "results.json"):
        (Path(folder) / lost).unlink()
    (Path(folder) / "checkpoints/step-3/state.json").write_text("damaged")
    code, out, err = run("train", *(folder if word == "RUN" else word for word in words))
    assert code == 0
    assert "step-2 is used instead" in err
    assert "3 steps" in out
    assert (Path(folder) / "adapter_model.safetensors").read_bytes() == weights


def test_a_run_is_never_written_over(run: Callable[..., Output], home: Path) -> None:
    before = (home / "lora/metrics.jsonl").read_bytes()
    code, _, err = run("train", "recipe.yaml", "--output-dir", "lora")
    assert (code, (home / "lora/metrics.jsonl").read_bytes()) == (2, before)
    assert "already holds a run" in err
    assert "Traceback" not in err


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(("words", "expected"), [
    (["tarin"], ["unknown command 'tarin'", "did you mean 'train'"]),
    (["train", "recipe.yaml", "method.rnak=4"], ["unknown setting 'method.rnak'", "did you mean 'rank'"]),
    (["train", "recipe.yaml", "trainin.steps=4"], ["did you mean 'training'"]),
    (["train", "recipe.yaml", "method=lroa"], ["lroa", "'lora'"]),
    (["train", "recipe.yaml", "data.max_lenght=4", "training.max_steps=0"], ["did you mean 'max_length'", "training.max_steps"]),
    (["train", "recipe.yaml", "evaluate.metrics=exat"], ["did you mean 'exact_match'"]),
    (["train", "recipe.yaml", "training.report_to=[wanbd]"], ["did you mean 'wandb'"]),
    (["train", "recipe.yaml", "seed=[1"], ["is not YAML"]),
    (["train", "nothing.yaml"], ["recipe 'nothing.yaml' not found"]),
    (["train", "recipe.yaml", "--reume"], ["no option '--reume'", "did you mean '--resume'"]),
    (["train", "recipe.yaml", "other.yaml"], ["takes one recipe"]),
    (["train", "--resume"], ["needs a run folder"]),
    (["train", "--model", "base"], ["data", "required"]),
    (["train", "--model", "base", "--data", "nothing.jsonl", "data.max_length=64"], ["nothing.jsonl"]),
    (["train", "--model", "smolm2", "--data", "train.jsonl"], ["did you mean 'smollm2'"]),
    (["evaluate", "lor"], ["run folder 'lor' not found", "lora"]),
    (["evaluate"], ["takes one run"]),
    (["evaluate", "full", "--base-model-only"], ["full model"]),
    (["chat", "full", "--compare"], ["full model"]),
    (["chat", "lora", "--message", "x", "--temperature", "-1"], ["temperature"]),
    (["chat", "lora", "--message", "x", "--temperature", "nan"], ["temperature nan"]),
    (["data", "chekc", "train.jsonl"], ["did you mean 'check'"]),
    (["data", "check", "nothing.jsonl", "--model", "base"], ["nothing.jsonl"]),
    (["data", "check", "train.jsonl", "max_lenght=4"], ["did you mean 'max_length'"]),
    (["export", "full", "--to", "adapter"], ["full model"]),
    (["export", "lora", "--to", "gguff"], ["invalid choice"]),
    (["export", "lora", "--out", "base"], ["already exists and is not empty"]),
    (["demo", "recipe.yaml"], ["settings"]),
])
def test_errors_are_one_message_with_a_remedy(run: Callable[..., Output], words: list[str], expected: list[str]) -> None:
    code, out, err = run(*words)
    assert (code, out) == (2, ""), err
    assert "Traceback" not in err
    assert "error: " in err
    assert "\n  -> " in err
    for part in expected:
        assert part in err


def test_errors_are_json_too(run: Callable[..., Output]) -> None:
    code, out, err = run("evaluate", "nowhere", "--json")
    error = json.loads(out)["error"]
    assert (code, error["kind"], error["exit_code"]) == (2, "RunError", 2)
    assert "not found" in error["what"] in err


def test_a_full_disk_is_one_message(run: Callable[..., Output], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")

    monkeypatch.setattr(console, "print_sections", full)
    code, out, err = run("doctor")
    assert (code, out) == (2, "")
    assert err.startswith("error: the disk is full: somewhere")


def test_other_errors_of_the_system_are_not_hidden(run: Callable[..., Output], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(console, "print_sections", broken)
    with pytest.raises(OSError, match="input/output"):
        run("doctor")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_checkpoint_and_its_code(run: Callable[..., Output], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                   number: signal.Signals, code: int) -> None:
    from luthier.reporting.progress import Progress
    monkeypatch.setattr(Progress, "update", lambda self, step, **_: os.kill(os.getpid(), number) if step == 2 else None)
    folder = str(tmp_path / "run")
    words = ("train", "recipe.yaml", "--output-dir", folder, "evaluate.metrics=[]", "data.test=null", "--quiet")
    got, out, err = run(*words)
    assert (got, out) == (code, "")
    assert f"luthier train --resume {folder}" in err
    assert "is not finished" in run("chat", folder, "--message", "x")[2]
    monkeypatch.undo()
    assert run("train", "--resume", folder, "--quiet")[0] == 0
    steps = [m["step"] for m in luthier.Run(folder).metrics if "loss" in m]
    assert steps == [1, 2, 3]


def test_a_reader_that_goes_away_is_no_error() -> None:
    script = "import sys; from luthier.cli.main import main; sys.exit(main(['schema']))"
    done = subprocess.run(["bash", "-c", f'"{sys.executable}" -c "{script}" | true; echo ${{PIPESTATUS[0]}}'], text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT / "src")})
    assert (done.stdout.strip(), done.stderr) == ("141", "")


# ---------------------------------------------------------------- the other verbs


def test_evaluate(run: Callable[..., Output]) -> None:
    tuned = json.loads(run("evaluate", "lora", "--json", "--quiet")[1])
    assert tuned["examples"] == 4
    assert {"perplexity", "nll", "exact_match", "token_accuracy"} <= tuned.keys()
    base = json.loads(run("evaluate", "lora", "--base-model-only", "--max-samples", "2", "--metric", "contains", "--json")[1])
    assert base["examples"] == 2
    assert base.keys() >= {"contains"} > {"exact_match"} & base.keys()
    other = json.loads(run("evaluate", "lora", "--data", "train.jsonl", "--max-new-tokens", "1", "--json", "data.max_samples=5")[1])
    assert other["examples"] == 5
    bare = json.loads(run("evaluate", "base", "--data", "test.jsonl", "data.max_length=128", "--json")[1])
    whole = json.loads(run("evaluate", "lora", "--base-model-only", "--json")[1])
    assert bare["perplexity"] == whole["perplexity"] != tuned["perplexity"]
    assert "perplexity" in run("evaluate", "full")[1]


def test_chat(run: Callable[..., Output], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run("chat", "lora", "--message", "hello", "--max-new-tokens", "6")
    assert code == 0
    assert out.strip()
    assert run("chat", "base", "--message", "hello", "--max-new-tokens", "6")[0] == 0
    code, out, _ = run("chat", "lora", "--compare", "--message", "hello", "--max-new-tokens", "6")
    assert code == 0
    assert "base" in out
    assert "tuned" in out


def test_chat_remembers_until_reset(run: Callable[..., Output], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    ask = encode_chat_prompt

    def noted(base: Any, messages: Any, system: Any) -> list[int]:
        asked.append([m.role for m in messages])
        return ask(base, messages, system)

    monkeypatch.setattr("luthier.api.chat.encode_chat_prompt", noted)
    lines = iter(["one", "two", "x" * 300, "", "/reset", "three", "/exit", "never"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    code, _, err = run("chat", "lora", "--max-new-tokens", "2")
    assert code == 0
    assert [len(roles) for roles in asked] == [1, 3, 5, 1]
    assert err.count("error: ") == 1  # 300 letters are more than the tiny context holds


def test_letters_come_whole() -> None:
    tokens = "añ→".encode()
    assert list(stream_text(iter(tokens), lambda ids, **_: bytes(ids).decode(errors="replace"))) == ["a", "ñ", "→"]
    assert "".join(stream_text(iter(tokens[:-1]), lambda ids, **_: bytes(ids).decode(errors="replace"))) == "añ\ufffd"


def test_data_check(run: Callable[..., Output], tmp_path: Path) -> None:
    words = ("data", "check", "train.jsonl", "--model", "base", "--eval", "test.jsonl", "--out", str(tmp_path), "--quiet")
    code, out, _ = run(*words)
    assert code == 0
    assert "train: 12 of 12 rows kept" in out
    assert "⟦yes 0<|im_end|>⟧" in out
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads(run(*words, "--json", "max_length=33", "data.truncation=refuse")[1])  # as a recipe has it, or short
    assert report["parts"]["train"]["reasons"] == {"longer than max_length": 2}
    out = run(*words, "max_length=33", "truncation=refuse")[1]
    assert "  train.jsonl:11: longer than max_length (" in out
    assert report == {**json.loads((tmp_path / "data_report.json").read_text()), "files": report["files"]}


def test_data_check_cuts_where_training_would(run: Callable[..., Output], tmp_path: Path) -> None:
    """Without a max_length, at the base's context, here 256."""
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "q", "completion": "a" * 400}) + "\n")
    out = run("data", "check", str(tmp_path / "long.jsonl"), "--model", "base", "--out", str(tmp_path), "--quiet")[1]
    assert "train: 1 of 1 rows kept, 1 truncated, first: " in out
    assert "256 to 256" in out


def test_exported_models_say_what_the_run_says(run: Callable[..., Output], tmp_path: Path) -> None:
    for name in ("lora", "full"):
        folder = tmp_path / name
        command = ["merge", name] if name == "lora" else ["export", name, "--to", "merged"]  # two names for one thing
        code, out, _ = run(*command, "--out", str(folder), "--json")
        assert (code, json.loads(out)) == (0, {"folder": str(folder), "dtype": "float32"})
        run_of = json.loads(run("evaluate", name, "--json")[1])
        alone = json.loads(run("evaluate", str(folder), "--data", "test.jsonl", "data.max_length=128", "--json")[1])
        assert alone["perplexity"] == pytest.approx(run_of["perplexity"], rel=1e-5)
        AutoModelForCausalLM.from_pretrained(folder)
    assert run("export", "lora", "--to", "merged", "--out", str(tmp_path / "lora"))[0] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "lora"]


def test_exported_adapters_are_the_run(run: Callable[..., Output], home: Path) -> None:
    assert run("export", "lora", "--to", "adapter")[0] == 0
    written, own = home / "lora/adapter", home / "lora"
    assert (written / "adapter_model.safetensors").read_bytes() == (own / "adapter_model.safetensors").read_bytes()
    ours, theirs = (json.loads((folder / "adapter_config.json").read_text()) for folder in (own, written))
    assert ours.pop("base_model_name_or_path") == str(home / "base")
    assert theirs.pop("base_model_name_or_path") == "base"
    assert theirs == ours
    assert json.loads(run("evaluate", "lora/adapter", "--data", "test.jsonl", "data.max_length=128", "--json")[1])["perplexity"] == \
        json.loads(run("evaluate", "lora", "--json")[1])["perplexity"]


def test_doctor(run: Callable[..., Output]) -> None:
    code, out, _ = run("doctor", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["versions"]["torch"] == torch.__version__
    assert {"cpu", "memory", "accelerator", "disk", "bases", "extras", "cache", "hub", "allocator"} <= found.keys()
    assert "torch" in run("doctor")[1]


def test_doctor_knows_every_extra_for_users() -> None:
    from luthier.api.doctor import EXTRAS
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {extra: tuple(package.partition(">")[0] for package in packages) for extra, packages in extras.items()}
    assert {extra: packages for extra, packages in named.items() if extra not in ("test", "dev")} == EXTRAS


def test_schema_names_every_setting(run: Callable[..., Output]) -> None:
    code, out, _ = run("schema")
    assert code == 0
    assert {"model", "method", "data", "training"} <= json.loads(out)["properties"].keys()


def test_the_demo_reads_its_one_recipe_from_anywhere(run: Callable[..., Output], tmp_path: Path) -> None:
    assert (ROOT / "recipes/demo.yaml").resolve() == ROOT / "src/luthier/demo/recipe.yaml"
    recipe = yaml.safe_load((ROOT / "recipes/demo.yaml").read_text())
    assert all((ROOT / recipe["data"][part]).exists() for part in ("train", "test"))
    code, out, err = run("demo", "--output-dir", str(tmp_path / "demo"), "model=base", "training.max_steps=1", "evaluate.max_samples=2",
                         "data.max_length=256", "evaluate.max_new_tokens=2", "--json", "--quiet")
    assert code == 0, err
    assert json.loads(out)["metric"] == "json_equal"


def test_help_is_quick_and_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)
    loaded = "import sys, luthier.cli; sys.exit(any(n in sys.modules for n in ('torch', 'transformers', 'pydantic')))"
    assert subprocess.run([sys.executable, "-c", loaded], env={**os.environ, "PYTHONPATH": str(ROOT / "src")}).returncode == 0


def test_a_public_name_is_the_function() -> None:
    script = ("from luthier.api.train import Interrupted; import luthier; from luthier import train; "
              "assert all(f.__name__ == n for n, f in (('train', train), ('train', luthier.train), "
              "('evaluate', luthier.evaluate), ('export', luthier.export))), luthier.train")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT / "src")})
    assert done.returncode == 0, done.stderr


def test_null_and_an_empty_mapping_unset_what_a_recipe_set() -> None:
    recipe = {"data": {"train": "x", "max_samples": 3, "columns": {"prompt": "q"}}, "optimizer": {"max_grad_norm": 2.0}}
    given = parse(["train", "data.max_samples=null", "data.columns={}", "optimizer.max_grad_norm=null", "data.eval=0.5"]).settings
    made = assembly.build_recipe(recipe, given)
    assert (made.data.max_samples, made.data.columns, made.optimizer.max_grad_norm, made.data.eval) == (None, {}, None, 0.5)
    assert assembly.build_recipe(recipe, {"data.max_samples": None}).data.max_samples == 3, "from Python None is what was left out"
    assert assembly.build_recipe(recipe, parse(["train", "data=x", "data.max_samples=null"]).settings).data.max_samples is None
