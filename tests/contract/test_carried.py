"""`export --to whole`: one folder that Transformers by itself loads with the adapter in it; what it cannot carry is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import luthier
from luthier import assembly
from luthier.api.export import export
from luthier.assembly.factory import load_family
from luthier.assembly.run_io import open_run
from luthier.core.errors import BaseError, RunError
from tiny import save_tiny

CARRIED: dict[str, Any] = {
    "lora": "lora", "rslora": {"name": "lora", "use_rslora": True, "rank_pattern": {"down": 4}}, "pissa": {"name": "lora", "init_lora_weights": "pissa"},
    "experts": {"name": "lora", "target_modules": ["q", "experts"]}, "ia3": "ia3", "loha": {"name": "peft", "config": {"r": 4}}}
TOKENS = torch.arange(1, 13)[None]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("carried")
    save_tiny(folder / "base", "llama", dtype=torch.float32)
    save_tiny(folder / "mixture", "mixtral", dtype=torch.float32)
    rows = [{"text": f"{word} thing", "label": label, "prompt": word, "completion": label} for word, label in
            (("good", "up"), ("bad", "down"), ("fine", "up"), ("poor", "down"))]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def tuned(home: Path, out: Path, method: Any, **settings: Any) -> luthier.Run:
    return luthier.train(data=str(home / "rows.jsonl"), method=method, output_dir=str(out), quiet=True, **{
        "model.name_or_path": str(home / "base"), "training.max_steps": 4, "training.batch_size": 4,
        "optimizer.learning_rate": 3e-2, "evaluate.before_training": False, **settings})


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=TOKENS).logits


@pytest.mark.parametrize("name", CARRIED)
def test_transformers_loads_base_and_adapter_in_one_call(name: str, home: Path, tmp_path: Path) -> None:
    run = tuned(home, tmp_path / "run", CARRIED[name], **{"model.name_or_path": str(home / ("mixture" if name == "experts" else "base"))})
    whole = export(run, "bundle", tmp_path / "whole")
    _, family, attached = open_run(run)
    family.train(False)
    told = logits(family.model)
    found = AutoModelForCausalLM.from_pretrained(whole)
    torch.testing.assert_close(logits(found), told, rtol=1e-4, atol=1e-5)
    found.disable_adapters()
    assert attached is not None
    with attached.disabled():
        bare = logits(family.model)
    torch.testing.assert_close(logits(found), bare, rtol=1e-4, atol=1e-5)
    assert float((bare - told).abs().max()) > 1e-2, "the adapter says nothing, so nothing was tried"


def test_such_a_folder_is_a_run_but_no_base(home: Path, tmp_path: Path) -> None:
    whole = export(tuned(home, tmp_path / "run", "lora"), "bundle", tmp_path / "whole")
    assert luthier.evaluate(whole, data=str(home / "rows.jsonl"), base_model=str(home / "base"), quiet=True)["perplexity"] > 1
    with pytest.raises(BaseError, match="contains an adapter"):
        load_family(assembly.ModelConfig(name_or_path=str(whole)))


@pytest.mark.parametrize(("method", "settings", "words"), [
    ("bitfit", {}, "neither Transformers nor PEFT supports bitfit"), (["lora", "ia3"], {}, "nor PEFT supports lora\\+ia3"),
    ({"name": "lora", "use_dora": True}, {}, "does not read magnitudes of DoRA"), ("adalora", {}, "does not read ranks of AdaLoRA"), ("prompt", {}, "does not support virtual tokens \\(prompt\\)"), ("full", {}, "it is a full model without an adapter"),
    ("lora", {"objective": "classify"}, "no 'score', the head of objective 'classify'")])
def test_what_cannot_be_carried_is_refused(method: Any, settings: dict[str, Any], words: str, home: Path, tmp_path: Path) -> None:
    run = tuned(home, tmp_path / "run", method, **settings)
    with pytest.raises(RunError, match=words):
        export(run, "bundle", tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
