"""The page on the manager: every example on it runs, one after another, on two small runs of other methods."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_docs import ROOT, blocks

import luthier
from luthier.core.protocols import SamplingParams
from tiny import save_tiny

PAGE = ROOT / "docs/methods/multi_adapter.md"


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs on a small base, two of them named as on the page; the working folder is theirs."""
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "smollm2", "llama", dtype=torch.float32)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i}?", "completion": str(2 * i)}) + "\n" for i in range(4)))
    methods: dict[str, Any] = {"law": ["lora", "bitfit"], "medicine": "lora", "soft": ["prompt", "ia3"]}
    for seed, (name, method) in enumerate(methods.items()):
        luthier.train(data={"train": str(rows), "system": f"You know {name}."}, method=method, output_dir=f"runs/{name}",
                      quiet=True, seed=seed, **{
                          "model.name_or_path": str(tmp_path / "smollm2"), "training.max_steps": 2, "training.batch_size": 4,
                          "optimizer.learning_rate": 3e-2, "evaluate.before_training": False})
    return tmp_path


def test_every_example_of_the_page_runs(runs: Path) -> None:
    told: dict[str, Any] = {}
    examples = blocks(PAGE, "python")
    assert len(examples) == 6
    for body in examples:
        exec(compile(body.replace('"smollm2"', repr(str(runs / "smollm2"))), PAGE.name, "exec"), told)
    assert told["states"].shape[0] == sum(map(len, told["texts"]))
    assert list(told["tuned"].manager.adapters) == ["law", "medicine"]
    low, high = (told["manager"].adapters[f"rank {rank}"].state() for rank in (2, 8))
    for trained in (low, high):
        assert all(float(t.abs().max()) > 0 for name, t in trained.items() if "lora_B" in name), "it was no step"


def test_answers_inside_using_are_those_of_what_is_chosen(runs: Path) -> None:
    """Its system prompt with it; outside, and where a prompt names an adapter, nothing changes."""
    tuned = luthier.load_adapters(str(runs / "smollm2"), {name: f"runs/{name}" for name in ("law", "medicine", "soft")})
    short = SamplingParams(max_new_tokens=12)
    prompts = ["Who may sue?", "Hello"]
    told = {name: tuned.answer(prompts, name, short) for name in ("law", "medicine", "soft")}
    bare = tuned.answer(prompts, sampling=short)
    assert bare == tuned.answer(prompts, [None, None], short)
    assert len({tuple(found) for found in (*told.values(), bare)}) == 4
    mixed = tuned.answer(prompts[:1] * 4, ["law", "soft", None, "medicine"], short)
    assert mixed == [told["law"][0], told["soft"][0], bare[0], told["medicine"][0]]
    for name, wanted in told.items():
        with tuned.use_adapter(name):
            assert tuned.answer(prompts, sampling=short) == wanted
            assert tuned.answer(prompts, [None, None], short) == bare
            with tuned.use_adapter(None):
                assert tuned.answer(prompts, sampling=short) == bare
            assert tuned.answer(prompts, sampling=short) == wanted
    with tuned.use_adapter({"law": 1.0, "medicine": 1.0}):
        assert tuned.answer(prompts, sampling=short) not in (bare, *told.values())
