"""Continued pretraining as a recipe: embeddings at a rate of their own, general text replayed by weight. Read `lab.py` first."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import SFT, base, documents
from safetensors.torch import load_file
from torch import Tensor

from luthier import assembly
from luthier.api.train import train
from luthier.assembly.factory import attach_method, load_datasets, load_family
from luthier.assembly.rl_setup import init_rl_policy
from luthier.core.errors import RecipeError
from luthier.data.packing import build_batch
from luthier.methods import METHODS
from luthier.training.optimizer import Optimizer, OptimizerConfig
from luthier.training.step import step
from tiny import save_tiny

RATE = 1e-3


def moved(kind: str, method: str, steps: int = 1, **settings: Any) -> tuple[dict[str, Tensor], set[str]]:
    """By how much each parameter moved, and the names of the embeddings'."""
    family = base(kind)
    attached = attach_method(family, METHODS[method](**settings), 3)
    before = {name: p.detach().clone() for name, p in attached.parameters().items()}
    optimizer = Optimizer(attached.parameters(), attached.lr_multiplier, RATE, OptimizerConfig(lr_scheduler_type="constant", warmup_ratio=0), steps)
    for number in range(steps):
        optimizer.set_learning_rate(number)
        step(family, SFT, [build_batch(documents())], optimizer)
    mine = {id(p) for p in family.structure.embedding.parameters()}
    return ({name: p.detach() - before[name] for name, p in attached.parameters().items()},
            {name for name, p in attached.parameters().items() if id(p) in mine})


@pytest.mark.parametrize(("method", "settings"), [("full", {}), ("freeze", {"num_trainable_layers": 1, "embeddings": True, "head": True})])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_embeddings_move_at_a_rate_of_their_own(kind: str, method: str, settings: dict[str, Any]) -> None:
    """The first step of Adam moves all that has a gradient by the rate, whatever the gradient."""
    plain, names = moved(kind, method, **settings)
    slow, _ = moved(kind, method, embedding_lr_multiplier=0.1, **settings)
    assert len(names) == 1
    for name, change in slow.items():
        wanted = plain[name] * (0.1 if name in names else 1.0)
        assert torch.allclose(change, wanted, rtol=1e-9, atol=1e-15), name
        assert float(change.abs().max()) == pytest.approx(RATE * (0.1 if name in names else 1.0), rel=1e-2)
    head = [name for name in slow if "lm_head" in name]
    assert bool(head) == (kind == "llama")  # a head of its own keeps the full rate; a tied one is the embedding


def test_a_rate_of_embeddings_that_do_not_train_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"embedding_lr_multiplier 0.5: the embeddings are not trained"):
        moved("llama", "freeze", num_trainable_layers=1, embedding_lr_multiplier=0.5)


def test_general_text_is_replayed_by_its_weight(tmp_path: Path) -> None:
    """A field's documents twice an epoch, half of the general ones; long ones cut without loss; the run goes on to the bit."""
    save_tiny(tmp_path / "base", "llama", dtype=torch.float32, num_hidden_layers=1)
    (tmp_path / "field.jsonl").write_text("".join(json.dumps({"text": f"field {i} " * 9}) + "\n" for i in range(3)))
    (tmp_path / "general.jsonl").write_text("".join(json.dumps({"text": f"general {i}"}) + "\n" for i in range(8)))
    raw: dict[str, Any] = {
        "model": str(tmp_path / "base"), "method": {"name": "full", "embedding_lr_multiplier": 0.1}, "objective": "pretrain",
        "data": {"train": [{"path": str(tmp_path / "field.jsonl"), "weight": 2},
                           {"path": str(tmp_path / "general.jsonl"), "weight": 0.5}],
                 "max_length": 48, "truncation": "split"},
        "training": {"num_train_epochs": 2, "batch_size": 4, "save_steps": 2, "save_total_limit": 9}, "optimizer": {"learning_rate": 1e-3}}
    made = assembly.build_recipe(raw)
    family = load_family(made.model)
    found = load_datasets(made, family)
    feed = assembly.build_training_source(made, family, found, *init_rl_policy(made, family))
    epochs = []
    for _ in range(2):
        seen = [origin for _ in range(feed.steps_per_epoch) for b in next(feed) for origin in b.origins]
        counted = Counter(Path(origin.file).name for origin in seen)
        assert counted == {"field.jsonl": 2 * 3 * 2, "general.jsonl": 4}  # each field's document is cut in two
        epochs.append({str(origin) for origin in seen if "general" in origin.file})
    assert epochs[0] != epochs[1]  # another half
    predicted = sum(len(p.predicted) for one in found.train for p in one.spans if "field" in one.origin.file)
    assert predicted == sum(len(f"field {i} " * 9) for i in range(3))  # all but the first token, and the end mark
    run = train(raw, output_dir=str(tmp_path / "run"), quiet=True)
    killed = tmp_path / "killed"
    shutil.copytree(run.path, killed)
    (killed / "README.md").unlink()
    for folder in (killed / "checkpoints").glob("step-*"):
        if int(folder.name[5:]) > 4:
            shutil.rmtree(folder)
    again = train(raw, output_dir=str(killed), resume=True, quiet=True)
    one, other = (load_file(path / "model.safetensors") for path in (run.path, again.path))
    assert all(torch.equal(one[name], other[name]) for name in one)
