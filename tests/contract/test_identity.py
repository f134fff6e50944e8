"""A run is used with the base that it was trained on and with no other, wherever that base is, whatever verb opens it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml

import luthier
from luthier import assembly
from luthier.api.train import train
from luthier.assembly.run_io import open_run
from luthier.cli.main import main
from luthier.core.errors import BaseError, RecipeError
from tiny import save_tiny

PROVENANCE = import_module("luthier.assembly.provenance")


@dataclass
class Home:
    """A base, rows, and a finished run of a LoRA on it."""

    path: Path

    @property
    def base(self) -> Path:
        return self.path / "base"

    @property
    def run(self) -> Path:
        return self.path / "run"

    @property
    def rows(self) -> str:
        return str(self.path / "rows.jsonl")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    made = Home(tmp_path_factory.mktemp("identity"))
    save_tiny(made.base, "llama", dtype=torch.float32, num_hidden_layers=1)
    (made.path / "rows.jsonl").write_text("".join(json.dumps(
        {"prompt": f"{i}?", "completion": f"yes {i % 3}"}) + "\n" for i in range(8)))
    (made.path / "labels.jsonl").write_text("".join(json.dumps({"text": f"{i}", "label": "ab"[i % 2]}) + "\n" for i in range(4)))
    train(**recipe(made), output_dir=str(made.run), quiet=True)
    return made


def recipe(home: Home) -> dict[str, object]:
    return {"model": str(home.base), "method": {"name": "lora", "rank": 2},
            "data": {"train": home.rows, "test": home.rows},
            "training": {"max_steps": 4, "batch_size": 4, "save_steps": 2}, "evaluate": {"before_training": False}}


# ---------------------------------------------------------------- the table: verbs x what happened to the base


def resumable(home: Home, out: Path) -> Path:
    """A copy of the run as it was before its end."""
    folder = shutil.copytree(home.run, out / "resumed")
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md", "results.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "checkpoints/step-4")
    return folder


VERBS: dict[str, Callable[[Home, Path], list[str]]] = {
    "evaluate": lambda home, out: ["evaluate", str(home.run)],
    "chat": lambda home, out: ["chat", str(home.run), "--message", "1?", "--max-new-tokens", "2"],
    "serve": lambda home, out: ["serve", str(home.run), "--port", "0"],
    "merge": lambda home, out: ["merge", str(home.run), "--out", str(out / "merged")],
    "adapter": lambda home, out: ["export", str(home.run), "--to", "adapter", "--out", str(out / "adapter")],
    "whole": lambda home, out: ["export", str(home.run), "--to", "bundle", "--out", str(out / "whole")],
    "inspect": lambda home, out: ["inspect", str(home.run)],
    "features": lambda home, out: ["features", str(home.run), "--data", str(home.path / "labels.jsonl"), "--out", str(out / "f.safetensors")],
    "merge-adapters": lambda home, out: ["merge-adapters", str(home.run), str(home.run), "--out", str(out / "both")],
    "paraphrase": lambda home, out: ["paraphrase", home.rows, "--column", "prompt", "--model", str(home.run), "--max-samples", "1",
                                     "--max-new-tokens", "2", "--out", str(out / "said.jsonl")],
    "resume": lambda home, out: ["train", "--resume", str(resumable(home, out))],
    "init_from": lambda home, out: ["train", f"init_from={home.run}", "--data", home.rows, "training.max_steps=1", "--output-dir", str(out / "next")],
}


def flip_a_bit(home: Home) -> None:
    """In the middle of the weights, far from every sample of the older digest's kind."""
    file = home.base / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def other_weights(home: Home) -> None:
    save_tiny(home.base, "llama", seed=1, dtype=torch.float32, num_hidden_layers=1)


def other_config(home: Home) -> None:
    file = home.base / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"rms_norm_eps": config["rms_norm_eps"] * 2}))


def move(home: Home) -> None:
    home.base.rename(home.path / "moved")


def move_beside_another(home: Home) -> None:
    move(home)
    other_weights(home)


def same(home: Home) -> None:
    """Nothing happens, but that another version of Transformers writes the config again."""
    file = home.base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"transformers_version": "9", "_name_or_path": "x"}, indent=7))


# What happens to the base; whether it is named; what is refused, or None.
BASES: dict[str, tuple[Callable[[Home], None], bool, str | None]] = {
    "same": (same, False, None),
    "other weights of the same shape": (other_weights, False, r"its weights should have the sha256 [0-9a-f]{16}, and [0-9a-f]{16} was found"),
    "one flipped bit": (flip_a_bit, False, r"its weights should have the sha256 [0-9a-f]{16}, and [0-9a-f]{16} was found"),
    "other config": (other_config, False, r"its config should have the sha256 [0-9a-f]{16}, and [0-9a-f]{16} was found"),
    "moved and named": (move, True, None),
    "moved and not named": (move, False, "file or folder not found"),
    "moved, another in its place": (move_beside_another, False, "its weights should have the sha256"),
    "moved, another in its place, named": (move_beside_another, True, None),
}


@contextmanager
def changed(home: Home, change: Callable[[Home], None]) -> Iterator[None]:
    kept = home.path / "kept"
    shutil.copytree(home.base, kept)
    try:
        change(home)
        yield
    finally:
        for folder in (home.base, home.path / "moved"):
            shutil.rmtree(folder, ignore_errors=True)
        kept.rename(home.base)


def call(home: Home, verb: str, tmp_path: Path, *more: str) -> int:
    (home.run / "layers.png").unlink(missing_ok=True)
    return main([*VERBS[verb](home, tmp_path), *more])


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    uvicorn = pytest.importorskip("uvicorn")
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets=None: None)


@pytest.mark.parametrize("happened", BASES)
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_takes_the_base_of_the_run_and_no_other(
        verb: str, happened: str, home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, is_named, refusal = BASES[happened]
    with changed(home, change):
        code = call(home, verb, tmp_path, *(["--base-model", str(home.path / "moved")] if is_named else []))
    words = capsys.readouterr().err
    assert "Traceback" not in words
    if refusal is None:
        assert code == 0, words
        assert "warning" not in words
    else:
        assert code == 2, words
        assert re.search(refusal, words), words
        assert "--base-model PATH" in words
        assert not list(tmp_path.glob("merged/*")), "something was written"


@pytest.mark.parametrize("verb", VERBS)
def test_a_base_that_is_named_must_be_the_same(verb: str, home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = save_tiny(tmp_path / "other", "llama", seed=1, dtype=torch.float32, num_hidden_layers=1)
    assert call(home, verb, tmp_path, "--base-model", str(other)) == 2
    assert re.search("its weights should have the sha256 [0-9a-f]{16}, and [0-9a-f]{16} was found", capsys.readouterr().err)


@pytest.mark.parametrize("verb", VERBS)
def test_control_without_the_comparison_every_verb_takes_other_weights(
        verb: str, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So each row of the table above depends on the comparison of digests, and on nothing else."""
    for name in ("luthier.assembly.provenance",):
        monkeypatch.setattr(import_module(name), "compare_digests", lambda kept, found: "")
    with changed(home, flip_a_bit):
        assert call(home, verb, tmp_path) == 0


def test_a_moved_base_gives_the_same_numbers(home: Home) -> None:
    before = luthier.evaluate(home.run, quiet=True)
    with changed(home, move):
        assert luthier.evaluate(home.run, quiet=True, base_model=str(home.path / "moved")) == before


# ---------------------------------------------------------------- runs of other origin


def test_a_run_of_an_older_version_opens_with_a_note(home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = shutil.copytree(home.run, tmp_path / "old")
    raw = yaml.safe_load((old / "recipe.yaml").read_text())
    raw["provenance"] = {"versions": raw["provenance"]["versions"]}
    (old / "recipe.yaml").write_text(yaml.safe_dump(raw))
    (old / "results.json").write_text("{}")
    assert main(["evaluate", str(old), "--json"]) == 2
    assert "is not recorded in its provenance" in capsys.readouterr().err, "a file that is named is no consent to read it"
    assert main(["evaluate", str(old), "--data", home.rows, "--json"]) == 0
    out, words = capsys.readouterr()
    assert "has no digests of its base" in words
    assert json.loads(out) == luthier.evaluate(home.run, data=home.rows, quiet=True)


def test_a_folder_of_peft_opens_without_a_digest(home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(home.base), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "peft")
    assert main(["evaluate", str(tmp_path / "peft"), "--data", home.rows]) == 0
    assert "note" not in capsys.readouterr().err
    with changed(home, move):
        assert main(["evaluate", str(tmp_path / "peft"), "--data", home.rows]) == 2
        assert "--base-model PATH" in capsys.readouterr().err
        assert main(["evaluate", str(tmp_path / "peft"), "--data", home.rows, "--base-model", str(home.path / "moved")]) == 0


def test_an_exported_adapter_keeps_the_digest(home: Home, tmp_path: Path) -> None:
    adapter = luthier.export(home.run, "adapter", tmp_path / "adapter")
    assert luthier.evaluate(adapter, data=home.rows, base_model=str(home.base), quiet=True)["perplexity"] \
        == luthier.evaluate(home.run, data=home.rows, quiet=True)["perplexity"]
    with changed(home, flip_a_bit), pytest.raises(BaseError, match="another base"):
        luthier.evaluate(adapter, data=home.rows, base_model=str(home.base), quiet=True)


def test_a_bank_takes_runs_of_the_base_that_it_is_given(home: Home) -> None:
    luthier.load_adapters(str(home.base), {"a": home.run})
    with changed(home, flip_a_bit), pytest.raises(RecipeError, match="its weights should have the sha256"):
        luthier.load_adapters(str(home.base), {"a": home.run})


def test_a_base_model_without_a_run_is_refused(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["train", "--data", home.rows, "--base-model", str(home.base)], ["chat", str(home.base) + "/x.gguf", "--base-model", "y"]):
        assert main(words) == 2
    with pytest.raises(luthier.LuthierError, match="is itself a base model"):
        open_run(luthier.Run("smollm2"), base_model="x")


def test_another_tokenizer_is_told(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    def other_template(home: Home) -> None:
        file = home.base / "chat_template.jinja"
        file.write_text(file.read_text() + " ")
    with changed(home, other_template):
        assert main(["evaluate", str(home.run)]) == 0
    assert "tokenizer or chat template of the base" in capsys.readouterr().err


def test_the_base_is_kept_in_recipe_checkpoint_and_results(home: Home) -> None:
    identity = assembly.identify_base(assembly.ModelConfig(name_or_path=str(home.base))).to_json()
    assert set(identity["sha256"]) == {"weights", "config", "tokenizer"}
    assert identity["path"] == str(home.base)
    run = luthier.Run(home.run)
    state = json.loads((home.run / "checkpoints/step-4/state.json").read_text())["state"]
    assert run.provenance["base"] == identity == run.results["base"] == state["record"]["base"]


@pytest.mark.parametrize(("alias", "upstream"), [("smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"), ("minilm", "sentence-transformers/all-MiniLM-L6-v2")])
def test_embedded_bases_have_a_digest_and_an_upstream(alias: str, upstream: str) -> None:
    found = assembly.identify_base(assembly.ModelConfig(name_or_path=alias))
    assert found.upstream == upstream
    assert found.path.is_absolute()
    assert all(len(digest) == 64 for digest in found.digests.values())


def test_a_relative_base_is_found_from_another_folder(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home.path)
    run = train(model="base", data="rows.jsonl", output_dir=str(tmp_path / "run"), quiet=True, **{"training.max_steps": 1, "data.test": "rows.jsonl"})
    here = luthier.evaluate(run, quiet=True)
    (tmp_path / "elsewhere/base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert luthier.evaluate(run, quiet=True) == here
    again = yaml.safe_load((run.path / "recipe.yaml").read_text())
    assert (again["model"]["name_or_path"], again["data"]["train"][0]["path"], again["output_dir"]) == (str(home.base), home.rows, str(tmp_path / "run"))
