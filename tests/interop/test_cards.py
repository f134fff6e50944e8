"""The card of every kind of run and export: its front matter, its figures, and its code, which is run in its folder."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import luthier
from luthier.api.export import export
from luthier.core.errors import LuthierError
from tiny import save_tiny

LABELED = [{"text": f"{word} thing", "label": label} for word, label in
            (("good", "up"), ("bad", "down"), ("fine", "up"), ("poor", "down"), ("odd", "down"))]
TALKS = [{"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i}"}]} for i in range(5)]
PAIRS = [{"anchor": f"number {i}", "positive": f"the number {i}"} for i in range(5)]
RANKED = [{"prompt": f"say {i}", "chosen": "yes, of course", "rejected": "no"} for i in range(5)]
DOCUMENTS = [{"text": f"a document of some length, number {i}"} for i in range(5)]
TAGGED = [{"tokens": ["Ada", "wrote"], "ner_tags": ["B-PER", "O"]} for _ in range(5)]
IMAGES = [{"pixels": [[[i * 40 + j] * 3 for j in range(8)] for _ in range(8)], "label": "ab"[i % 2]} for i in range(5)]

CASES: dict[str, tuple[str, Any, list[dict[str, Any]], str]] = {  # base, objective, rows, pipeline tag
    "chat": ("llama", "sft", TALKS, "text-generation"),
    "document": ("gpt2", "pretrain", DOCUMENTS, "text-generation"),
    "classes": ("bert", "classify", LABELED, "text-classification"),
    "classes-decoder": ("llama", "classify", LABELED, "text-classification"),
    "tags": ("bert", {"name": "classify", "task": "tokens"}, TAGGED, "token-classification"),
    "reward": ("llama", "reward", RANKED, "text-classification"),
    "vectors": ("bert", "contrastive", PAIRS, "sentence-similarity"),
    "vectors-decoder": ("llama", "contrastive", PAIRS, "sentence-similarity"),
    "images": ("vit", "classify", IMAGES, "image-classification"),
}


def train(path: Path, case: str, method: Any = "lora") -> luthier.Run:
    kind, objective, rows, _ = CASES[case]
    base = save_tiny(path / "private" / "base", kind, dtype=torch.float32)
    (base / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: owner/upstream\n---\n")
    (path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return luthier.train(model=str(base), data={"train": str(path / "rows.jsonl"), "test": str(path / "rows.jsonl")},
                         method=method, objective=objective, training={"max_steps": 1, "batch_size": 5},
                         output_dir=str(path / "run"), quiet=True)


def parts(folder: Path) -> tuple[dict[str, Any], str, str]:
    """Front matter, code, and the whole card."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    _, front, rest = text.split("---\n", 2)
    code = re.search(r"```python\n(.*?)```", rest, re.DOTALL)
    assert code is not None
    return yaml.safe_load(front), code[1], text


@pytest.mark.parametrize("form", ["run", "merged", "adapter", "full"])
@pytest.mark.parametrize("case", CASES)
def test_the_code_of_the_card_loads_what_stands_beside_it(case: str, form: str, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tmp_path, case, "full" if form == "full" else "lora")
    folder = run.path if form in ("run", "full") else export(run, form)
    front, code, text = parts(folder)
    assert front["pipeline_tag"] == CASES[case][3]
    assert front["license"] == "apache-2.0"
    assert front["base_model"] == "owner/upstream"
    assert "private" not in text
    assert str(tmp_path) not in text
    assert not re.search(r"\d\.\d{7}", text), "figures are rounded"
    assert "Measured on 5 held-out rows" in text
    monkeypatch.chdir(folder)
    if form == "adapter":  # it names its base by the bare name of its folder, which whoever gets it puts there
        (folder / "base").symlink_to(tmp_path / "private" / "base")
    space: dict[str, Any] = {}
    exec(code, space)
    assert capsys.readouterr().out.strip()
    classes = [str(label) for label in front.get("labels", ())] or None
    if case.startswith(("classes", "tags", "images")):
        names = list(space["model"].config.id2label.values())
        assert names == {"tags": ["B-PER", "O"], "images": ["a", "b"]}.get(case, ["down", "up"]), classes


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_what_peft_would_compute_otherwise_is_said_and_refused(method: str, tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(tmp_path, "classes", {"name": method, "num_virtual_tokens": 2})
    front, code, text = parts(run.path)
    assert front["library_name"] == "luthier"
    assert "Load this folder with Luthier" in text
    monkeypatch.chdir(run.path)
    exec(code, {})
    with pytest.raises(LuthierError, match="virtual tokens"):
        export(run, "adapter")


def test_a_head_that_no_class_holds_is_said(tmp_path: Path) -> None:
    """BERT's class takes the first token; a run that takes the mean is opened by this package alone."""
    base = save_tiny(tmp_path / "base", "bert", dtype=torch.float32)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, LABELED)))
    run = luthier.train(model={"name_or_path": str(base), "pooling": "mean"}, data={"train": str(tmp_path / "rows.jsonl"), "test":
                        str(tmp_path / "rows.jsonl")}, objective="classify", method="full", output_dir=str(tmp_path / "run"),
                        training={"max_steps": 1}, quiet=True)
    text = (run.path / "README.md").read_text()
    assert "does not pool by mean" in text
    assert "library_name: luthier" in text
    assert luthier.evaluate(run, quiet=True)["loss"] == pytest.approx(run.results["test"]["loss"], rel=1e-5)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_a_merged_model_keeps_the_dtype_of_its_base(stored: torch.dtype, method: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM
    base = save_tiny(tmp_path / "base", "llama", dtype=stored)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, TALKS)))
    run = luthier.train(model=str(base), data=str(tmp_path / "rows.jsonl"), method=method, output_dir=str(tmp_path / "run"),
                        training={"max_steps": 3}, optimizer={"learning_rate": 0.01}, quiet=True)
    wide = export(run, "merged", tmp_path / "wide", dtype="float32")
    kept = export(run, "merged", tmp_path / "kept")
    ids = torch.arange(40, 60)[None]
    exact, found = (AutoModelForCausalLM.from_pretrained(folder, dtype="auto") for folder in (wide, kept))
    assert exact.dtype == torch.float32
    assert found.dtype == stored
    rounded = {name: tensor.to(stored).float() for name, tensor in exact.state_dict().items()}
    assert all(torch.equal(rounded[name], tensor.float()) for name, tensor in found.state_dict().items()), "rounded once"
    with torch.no_grad():
        apart = float((found.float()(ids).logits - exact(ids).logits).abs().max())
        scale = float(exact(ids).logits.abs().max())
    assert apart <= 4 * torch.finfo(stored).eps * scale
    assert stored == torch.float32 or apart > 0, "the control: something was rounded"


def test_a_dtype_that_a_form_cannot_hold_is_refused(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "llama", dtype=torch.float32)
    for form, dtype in (("merged", "q8_0"), ("gguf", "bfloat16"), ("adapter", "float32")):
        with pytest.raises(LuthierError, match=r"dtype|does not write"):
            export(str(base), form, tmp_path / "out.gguf", dtype)  # type: ignore[arg-type]
