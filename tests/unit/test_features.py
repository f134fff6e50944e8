"""States of a frozen base, kept with their labels: each row's own, computed once, good for a probe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import luthier
from luthier import assembly
from luthier.api.features import fit_linear_probe
from luthier.api.train import train
from luthier.assembly.run_io import open_run
from luthier.cli.main import main
from luthier.core.errors import RecipeError, RunError
from tiny import save_tiny

WORDS = ("good", "bad", "a good thing", "what a bad, bad day it was", "fine and good", "bad luck", "good", "not bad at all")
LABELS = ["yes" if "good" in words else "no" for words in WORDS]


def written(path: Path, words: tuple[str, ...] = WORDS, **more: Any) -> str:
    path.write_text("".join(json.dumps({"text": text, "label": "yes" if "good" in text else "no"} | more) + "\n"
                            for text in words))
    return str(path)


@pytest.mark.parametrize(("kind", "pooling"), [("llama", "last"), ("bert", "first"), ("bert", "mean")])
def test_states_are_those_of_transformers(kind: str, pooling: str, tmp_path: Path) -> None:
    """Rows in their order, whatever batches they were computed in."""
    path = save_tiny(tmp_path / "base", kind)
    settings: dict[str, Any] = {"model.dtype": "float64", "model.pooling": pooling, "training.max_tokens_per_micro_batch": 20}
    found, labels = luthier.extract_features(path, written(tmp_path / "rows.jsonl"), quiet=True, **settings)
    model = (AutoModelForCausalLM if kind == "llama" else AutoModel).from_pretrained(path, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    wanted = []
    for words in WORDS:
        with torch.no_grad():
            stack = model.model if kind == "llama" else model
            states = stack(**tokenizer(words, return_tensors="pt")).last_hidden_state[0]
        wanted.append({"last": states[-1], "first": states[0], "mean": states.mean(0)}[pooling])
    assert labels == LABELS
    assert found.dtype == np.float32
    assert np.allclose(found, torch.stack(wanted).numpy(), atol=1e-5)
    assert not np.allclose(found[0], found[1], atol=1e-2)


def test_pictures_have_states(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "base", "vit")
    (path / "preprocessor_config.json").write_text(json.dumps(
        {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}, "do_normalize": True,
         "do_rescale": True, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}))
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    (tmp_path / "rows.jsonl").write_text("".join(
        json.dumps({"pixels": picture.tolist(), "label": label}) + "\n"
        for picture, label in zip(pixels, (1, 0, 1), strict=True)))
    found, labels = luthier.extract_features(path, str(tmp_path / "rows.jsonl"), quiet=True)
    scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        wanted = AutoModel.from_pretrained(path, dtype=torch.float32).eval()(scaled).last_hidden_state[:, 0]
    assert np.allclose(found, wanted.numpy(), atol=1e-4)
    assert labels == [1.0, 0.0, 1.0]


def test_a_file_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, rows, out = save_tiny(tmp_path / "base", "bert"), written(tmp_path / "rows.jsonl"), tmp_path / "f.safetensors"
    found, labels = luthier.extract_features(path, rows, out=out, quiet=True)
    with monkeypatch.context() as closed:
        closed.setattr("luthier.api.features.load_family", None)  # nothing is loaded again
        again = luthier.extract_features(path, rows, out=out, quiet=True)
    assert np.array_equal(found, again[0])
    assert labels == again[1] == LABELS
    assert json.loads(out.with_suffix(".json").read_text())["labels"] == LABELS
    for other in ({"model.pooling": "mean"}, {"data.max_length": 3}):
        with pytest.raises(RunError, match="another base, other rows or other settings"):
            luthier.extract_features(path, rows, out=out, quiet=True, **other)
    written(tmp_path / "rows.jsonl", WORDS[1:])
    with pytest.raises(RunError, match="other rows"):
        luthier.extract_features(path, rows, out=out, quiet=True)
    save_tiny(tmp_path / "base", "bert", seed=1)
    written(tmp_path / "rows.jsonl")
    with pytest.raises(RunError, match="another base"):
        luthier.extract_features(path, rows, out=out, quiet=True)
    with pytest.raises(RunError, match="suffix"):
        luthier.extract_features(path, rows, out=tmp_path / "f.npy", quiet=True)


def test_a_run_gives_the_states_that_it_trained(tmp_path: Path) -> None:
    path, rows = save_tiny(tmp_path / "base", "bert"), written(tmp_path / "rows.jsonl")
    run = train({"model": str(path), "data": rows, "objective": "classify", "method": "lora", "output_dir": str(tmp_path / "run"),
                 "training": {"max_steps": 3}, "optimizer": {"learning_rate": 0.05}}, quiet=True)
    tuned, labels = luthier.extract_features(run, rows, quiet=True)
    assert labels == LABELS
    assert not np.allclose(tuned, luthier.extract_features(path, rows, quiet=True)[0], atol=1e-3)
    _, family, attached = open_run(run)
    assert attached is not None
    with torch.no_grad():
        row = assembly.rows.read_datasets(assembly.load_recipe(run).data, family.tokenizer, seed=0).train[2]
        batch = assembly.rows.build_eval_batches([row], None)[0]
        pooled = family.forward(batch.inputs, batch.target, frozenset({"pooled"})).pooled
    assert pooled is not None
    assert np.allclose(tuned[2], pooled[0].numpy(), atol=1e-4)
    with pytest.raises(RecipeError, match="cannot be changed"):
        luthier.extract_features(run, rows, quiet=True, **{"model.pooling": "mean"})


def test_a_probe_separates_what_is_separable() -> None:
    chance = np.random.default_rng(0)
    truth = ["a" if i % 3 else "b" for i in range(120)]
    states = chance.normal(size=(120, 5))
    states[:, 2] += [4.0 if name == "a" else -4.0 for name in truth]
    found = fit_linear_probe(states[:80], truth[:80], states[80:], truth[80:])
    assert found["accuracy"] == 1.0
    assert found["majority"] == pytest.approx(truth[80:].count("a") / 40)
    shuffled = chance.permutation(states[80:])
    assert fit_linear_probe(states[:80], truth[:80], shuffled, truth[80:])["accuracy"] < 0.9
    with pytest.raises(RecipeError, match="two classes"):
        fit_linear_probe(states[:2], ["a", "a"], states, truth)
    with pytest.raises(RecipeError, match="one class per row"):
        fit_linear_probe(states[:2], [("a", "b"), ("a",)], states, truth)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, rows = save_tiny(tmp_path / "base", "bert"), written(tmp_path / "rows.jsonl")
    out = tmp_path / "kept" / "f.safetensors"
    words = ["features", str(path), "--data", rows, "--quiet", "--json"]
    assert main([*words, "--out", str(out), "--probe", "--test", rows]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["rows"], shown["size"], shown["accuracy"]) == (8, 32, shown["train_accuracy"])
    assert out.exists()
    assert out.with_name("f-test.safetensors").exists()
    assert main(words) == 2
    assert main([*words, "--probe"]) == 2
