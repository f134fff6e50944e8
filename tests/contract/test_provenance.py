"""What decides a run's result is kept with it: changes are told or refused, the saved recipe holds every value, and no local
path leaves the machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import luthier
from luthier import assembly
from luthier.api.train import train
from luthier.assembly.factory import load_family, resolve_micro_batch_tokens
from luthier.assembly.recipe import Recipe
from luthier.assembly.run_io import name_base
from luthier.assembly.settings import LEFT_OUT, RESOLVED, UNSET, fill_left_out, make_public, map_paths, resolve_settings
from luthier.cli.main import main
from luthier.core import digests
from luthier.core.config import Config
from luthier.core.errors import RunError
from luthier.methods import METHODS
from tiny import CHATML, save_tiny

SETTINGS: dict[str, Any] = {"training.max_steps": 4, "training.batch_size": 4, "training.save_steps": 2, "evaluate.before_training": False}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases and rows, a run, and one that starts from it."""
    folder = tmp_path_factory.mktemp("provenance")
    save_tiny(folder / "base", "llama", dtype=torch.float32, num_hidden_layers=2)
    save_tiny(folder / "reader", "bert", dtype=torch.float32)
    save_tiny(folder / "merging", "llama", dtype=torch.float32, num_hidden_layers=2, vocab_size=512)
    merging_tokenizer().save_pretrained(folder / "merging")
    (folder / "rows.jsonl").write_text("".join(json.dumps(
        {"prompt": f"{i}?", "completion": f"yes {i % 3}"}) + "\n" for i in range(8)))
    (folder / "labels.jsonl").write_text("".join(json.dumps({"text": f"{i}", "label": "ab"[i % 2]}) + "\n" for i in range(8)))
    tuned(folder, folder / "run")
    tuned(folder, folder / "next", init_from=str(folder / "run"), model=None, method=None)
    return folder


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """As llama.cpp knows them: byte-level BPE with merges."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend.train_from_iterator(["yes yes user assistant"] * 3, trainers.BpeTrainer(
        vocab_size=300, min_frequency=1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=words, show_progress=False))
    found = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    found.chat_template = CHATML
    return found


def tuned(home: Path, out: Path, **settings: Any) -> luthier.Run:
    named = {"model": str(home / "base"), "method": {"name": "lora", "rank": 2}, "data": {
        "train": str(home / "rows.jsonl"), "test": str(home / "rows.jsonl")}, "quiet": True} | SETTINGS | settings
    return train(output_dir=str(out), **{key: value for key, value in named.items() if value is not None})


def unfinished(run: Path, out: Path) -> Path:
    """A copy of a run as it was after its first checkpoint."""
    folder = shutil.copytree(run, out)
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md", "results.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "checkpoints/step-4")
    return folder


def edit(run: Path, **settings: Any) -> None:
    raw = yaml.safe_load((run / "recipe.yaml").read_text())
    for key, value in settings.items():
        section, _, name = key.partition("__")
        raw[section][name] = value
    (run / "recipe.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))


# ---------------------------------------------------------------- nothing local leaves the machine


def local_paths(folder: Path, secret: Path) -> list[str]:
    """The files in which a path of this machine stands."""
    files = [folder] if folder.is_file() else [file for file in sorted(folder.rglob("*")) if file.is_file()]
    assert files
    words = [str(secret), str(secret.resolve()), str(Path.home() / ".cache"), str(Path.cwd())]
    return [f"{file.name}: {word}" for file in files for word in words if word.encode() in file.read_bytes()]


STRUCTURE = {"model.surgery": {"drop_layers": [0]}}
HEADED = {"objective": "classify", "data": None}
EXPORTS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora merged": ("merged", {}), "lora bundle": ("bundle", {}), "lora adapter": ("adapter", {}), "lora gguf": ("gguf", {"model": "merging"}),
    "lora gguf-adapter": ("gguf-adapter", {"model": "merging"}), "full merged": ("merged", {"method": "full"}), "full gguf": ("gguf", {"method": "full", "model": "merging"}),
    "prompt adapter": ("adapter", {"method": "prompt"}), "prefix adapter": ("adapter", {"method": "prefix"}), "own adapter": ("adapter", {"method": "adapter"}),
    "list adapter": ("adapter", {"method": ["lora", "bitfit"]}), "head adapter": ("adapter", HEADED), "head merged": ("merged", HEADED),
    "head full": ("merged", HEADED | {"method": "full"}), "changed base adapter": ("adapter", STRUCTURE), "changed base merged": ("merged", STRUCTURE),
    "encoder merged": ("merged", HEADED | {"model": "reader"}), "encoder adapter": ("adapter", HEADED | {"model": "reader"}),
    "started adapter": ("adapter", {"init_from": "run", "model": None, "method": None})}


@pytest.mark.parametrize("name", EXPORTS)
def test_no_export_holds_a_local_path(name: str, home: Path, tmp_path: Path) -> None:
    form, settings = EXPORTS[name]
    if settings.get("data", "") is None:
        settings = settings | {"data": {"train": str(home / "labels.jsonl"), "test": str(home / "labels.jsonl")}}
    settings = {key: str(home / value) if key in ("model", "init_from") and value else value for key, value in settings.items()}
    run = tuned(home, home / name, **settings)
    written = luthier.export(run, form, tmp_path / ("model.gguf" if form.startswith("gguf") else "out"))  # type: ignore[arg-type]
    assert local_paths(written, home.parent) == []
    if (written / "adapter_config.json").is_file():
        named = json.loads((written / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert "/" not in named
        assert named.startswith(Path(settings.get("model") or home / "base").name)


def test_control_the_search_finds_paths(home: Path) -> None:
    assert {line.partition(":")[0] for line in local_paths(home / "run", home.parent)} >= {"recipe.yaml", "adapter_config.json"}


def test_an_embedded_base_is_named_by_its_id(home: Path) -> None:
    made = assembly.build_recipe({"model": "smollm2", "data": str(home / "rows.jsonl")})
    assert name_base(made.model, public=True) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert make_public(made).model.name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_a_snapshot_of_the_hub_is_named_by_its_id(home: Path, tmp_path: Path) -> None:
    place = tmp_path / "hub/models--some-owner--a-model/snapshots" / ("0a" * 20)
    shutil.copytree(home / "base", place)
    found = assembly.identify_base(assembly.ModelConfig(name_or_path=str(place)))
    assert (found.upstream, found.revision) == ("some-owner/a-model", "0a" * 20)
    assert name_base(assembly.ModelConfig(name_or_path=str(place)), public=True) == "some-owner/a-model"


def test_every_path_of_a_recipe_is_known(home: Path, tmp_path: Path) -> None:
    """Whatever can be a path, set to one that exists, is mapped."""
    for name in ("a.jsonl", "e.jsonl", "t.jsonl", "s.txt", "judge.py"):
        (tmp_path / name).write_text("")
    (tmp_path / "r").mkdir()
    made = assembly.build_recipe({
        "model": str(home / "base"), "output_dir": str(tmp_path / "r"), "objective": {"name": "grpo", "reward": [
            {"model": str(tmp_path / "r")}, {"function": f"{tmp_path}/judge.py:f"}, "numeric_match"]},
        "data": {"train": str(tmp_path / "a.jsonl"), "eval": str(tmp_path / "e.jsonl"), "test": str(tmp_path / "t.jsonl"),
                 "augment": [{"name": "synonyms", "file": str(tmp_path / "s.txt")}, {"name": "deletion"}]}})
    assert str(tmp_path) in json.dumps(assembly.dump_recipe(made))
    assert str(tmp_path.parent.parent) not in json.dumps(assembly.dump_recipe(make_public(made)))
    assert assembly.dump_recipe(map_paths(made, lambda path: path)) == assembly.dump_recipe(made)


# ---------------------------------------------------------------- changes are told


def spoil(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "weights": (lambda run: spoil(run / "adapter_model.safetensors"), "adapter_model.safetensors has changed since the run ended"),
    "config": (lambda run: edit_json(run / "adapter_config.json", lora_alpha=99), "adapter_config.json has changed since the run ended"),
    "recipe": (lambda run: edit(run, optimizer__learning_rate=1.0), "recipe.yaml has changed since the run ended"),
    "metrics": (lambda run: (run / "metrics.jsonl").write_text(""), "metrics.jsonl has changed since the run ended"),
    "lost metrics": (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl has changed since the run ended"),
    "nothing": (lambda run: None, ""),
    "more metrics": (lambda run: (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() + '{"step": 9}\n'), ""),
}


def edit_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("words", [("evaluate",), ("merge",), ("export", "--to", "adapter"), ("inspect",), ("train", "--resume")], ids=" ".join)
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_a_finished_run_is_told(name: str, words: tuple[str, ...], home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(home / "run", tmp_path / "run")
    change, told = CHANGES[name]
    change(run)
    if name == "metrics" and words[0] == "inspect":
        pytest.importorskip("matplotlib")
    assert main([words[0], *(["--resume"] if "--resume" in words else []), str(run), *[w for w in words[1:] if w != "--resume"]]) == 0
    found = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert [told in line for line in found] == ([True] if told else [])


def test_the_digests_are_of_everything_that_was_trained(home: Path) -> None:
    kept = luthier.Run(home / "run").results["digests"]
    assert set(kept["trained"]) == {"adapter_model.safetensors", "adapter_config.json"}
    assert kept["trained"]["adapter_model.safetensors"] == digests.compute_file_sha256(home / "run/adapter_model.safetensors")
    assert kept["metrics"]["bytes"] == (home / "run/metrics.jsonl").stat().st_size


# ---------------------------------------------------------------- a resumed run is refused where the change decides


def other_start(run: Path) -> None:
    spoil(run.parent / "first/adapter_model.safetensors")


RESUMED: dict[str, tuple[Callable[[Path], None], str, str]] = {  # change, refusal, warning
    "nothing": (lambda run: None, "", ""),
    "learning rate": (lambda run: edit(run, optimizer__learning_rate=0.5), "optimizer.learning_rate: 0.0", ""),
    "schedule": (lambda run: edit(run, optimizer__warmup_ratio=0.5), "optimizer.warmup_ratio: ", ""),
    "what decides nothing": (lambda run: edit(run, training__save_total_limit=7), "", "recipe.yaml has changed since the checkpoint"),
    "metrics": (lambda run: (run / "metrics.jsonl").write_text(""), "", "metrics.jsonl has changed since the checkpoint"),
    "the run to start from": (other_start, "its weights have changed since this run started", ""),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_refuses_what_decides_its_result(name: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = shutil.copytree(home / "run", tmp_path / "first")
    whole = tuned(home, tmp_path / "whole", init_from=str(first), model=None, method=None)
    run = unfinished(whole.path, tmp_path / "run")
    change, refusal, warning = RESUMED[name]
    change(run)
    capsys.readouterr()
    code = main(["train", "--resume", str(run)])
    words = capsys.readouterr().err
    if refusal:
        assert code == 2
        assert refusal in words
        return
    assert code == 0, words
    assert [line for line in words.splitlines() if line.startswith("warning: ") and warning not in line] == []
    assert ("warning: " in words) == bool(warning)
    assert (run / "adapter_model.safetensors").read_bytes() == (whole.path / "adapter_model.safetensors").read_bytes()


# ---------------------------------------------------------------- the saved recipe holds every value


def left_out(model: type[Config], section: str = "") -> Iterator[str]:
    """`section.setting` of every setting that a recipe may leave out without a value of its own."""
    for name, field in model.model_fields.items():
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        if not field.is_required() and default in UNSET:
            yield f"{section}.{name}".lstrip(".")
        for config in configs(field.annotation):
            yield from left_out(config, section or name)


def configs(annotation: Any) -> Iterator[type[Config]]:
    if isinstance(annotation, type) and not get_args(annotation):
        if issubclass(annotation, Config):
            yield annotation
        return
    for inner in get_args(annotation):
        yield from configs(inner)


def test_every_setting_that_can_be_left_out_is_resolved_or_means_something() -> None:
    resolved = {f"{section}.{name}".lstrip(".") for section, names in RESOLVED.items() for name in names}
    assert set(left_out(Recipe)) == resolved | LEFT_OUT.keys()
    assert not resolved & LEFT_OUT.keys()


SPELT: dict[str, Any] = {**{name: name for name in METHODS if name != "peft"}, "peft": {"name": "peft", "config": {"peft_type": "LOHA", "r": 4}},
                         "mlp": {"name": "prefix", "prefix_projection": True}, "list": ["lora", "adapter"]}


@pytest.mark.parametrize("method", SPELT)
def test_the_saved_recipe_leaves_nothing_to_a_default(method: str, home: Path) -> None:
    made = assembly.build_recipe({"model": str(home / "base"), "method": SPELT[method], "data": str(home / "rows.jsonl")})
    base = load_family(made.model)
    saved = resolve_settings(made, base, assembly.identify_base(made.model), 0.1, home / "none")
    for section, names in RESOLVED.items():
        parts = saved.method.parts if section == "method" and method == "list" else [dict(saved)[section]] if section else [saved]
        for part in parts:
            unset = {name for name in names if dict(part).get(name, "no such setting") in UNSET}
            assert unset <= ({"revision", "pooling"} | ({"encoder_hidden_size"} if method == "prefix" else set())), (section, unset)  # no hub, no state of a whole text; no MLP
    assert assembly.build_recipe(yaml.safe_load(yaml.safe_dump(assembly.dump_recipe(saved)))) == saved
    assert assembly.diff_recipes(saved, fill_left_out(made, saved).model_copy(update={"data": saved.data})) == []


@pytest.fixture
def other_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version, in which every default that decides a result is another one."""
    monkeypatch.setattr(METHODS["lora"], "default_learning_rate", 0.3)
    monkeypatch.setattr(import_module("luthier.data.config"), "LENGTH", 27)
    monkeypatch.setattr(import_module("luthier.assembly.factory"), "resolve_micro_batch_tokens", lambda made, base: made.training.max_tokens_per_micro_batch or 11)


def test_training_from_the_saved_recipe_gives_the_same_run(home: Path, tmp_path: Path, other_defaults: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    again = train(home / "run/recipe.yaml", output_dir=str(tmp_path / "again"), quiet=True)
    assert (again.path / "adapter_model.safetensors").read_bytes() == (home / "run/adapter_model.safetensors").read_bytes()
    control = tuned(home, tmp_path / "control")
    assert (control.path / "adapter_model.safetensors").read_bytes() != (home / "run/adapter_model.safetensors").read_bytes()


def test_a_run_goes_on_with_its_own_values(home: Path, tmp_path: Path, other_defaults: None) -> None:
    """Both by its folder and by the recipe that it was started with, which leaves them out."""
    for name, more in (("folder", None), ("recipe", True)):
        run = unfinished(home / "run", tmp_path / name)
        if more:
            tuned(home, run, resume=True)
        else:
            assert main(["train", "--resume", str(run), "--quiet"]) == 0
        assert (run / "adapter_model.safetensors").read_bytes() == (home / "run/adapter_model.safetensors").read_bytes()
    run = unfinished(home / "run", tmp_path / "other")
    with pytest.raises(RunError, match=r"optimizer\.learning_rate: 0\.\d+, now 0\.5"):
        tuned(home, run, resume=True, **{"optimizer.learning_rate": 0.5})


def test_a_machine_of_another_size_evaluates_in_its_own_portions(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int | None] = []
    plain = resolve_micro_batch_tokens
    monkeypatch.setattr("luthier.api.evaluate.resolve_micro_batch_tokens", lambda made, base: asked.append(made.training.max_tokens_per_micro_batch) or plain(made, base))
    luthier.evaluate(home / "run", quiet=True)
    assert asked == [None]
    assert luthier.Run(home / "run").recipe["training"]["max_tokens_per_micro_batch"] == 320
    luthier.evaluate(home / "run", quiet=True, **{"training.max_tokens_per_micro_batch": 50})
    assert asked[1:] == [50]
