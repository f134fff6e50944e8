"""`luthier inspect`: words of virtual tokens and sizes of LoRA's changes, each against what is known of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier import assembly
from luthier.api.inspect_run import inspect_run
from luthier.assembly.factory import attach_method, load_family
from luthier.assembly.run_io import save_tuned
from luthier.cli.main import main
from luthier.core.errors import RunError
from luthier.training.run_folder import Run
from tiny import save_tiny, tiny

TEXT = "abc"


def tuned(tmp_path: Path, method: dict[str, Any], kind: str = "llama", move: float = 0.0) -> tuple[Run, Any]:
    """A run folder as `train` leaves it, of a method that has moved by so much."""
    origin = save_tiny(tmp_path / "base", kind, dtype=torch.float32)
    made = assembly.build_recipe({"model": str(origin), "data": "-", "method": method, "output_dir": str(tmp_path / "run")})
    run = Run(tmp_path / "run")
    run.create(assembly.dump_recipe(made), {})
    family = load_family(made.model)
    attached = attach_method(family, made.method, made.seed)
    with torch.no_grad():
        for i, parameter in enumerate(attached.parameters().values()):
            parameter += move * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    save_tuned(run, made, family, attached)
    return run, attached


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("method", ["prompt", "ptuning", "prefix", "ptuning_v2"])
def test_virtual_tokens_start_as_their_words_and_end_elsewhere(method: str, kind: str, tmp_path: Path) -> None:
    settings = {"name": method, "num_virtual_tokens": 3, "prompt_tuning_init_text": TEXT, "prompt_tuning_init": "text"}
    run, _ = tuned(tmp_path, settings, kind, move=2.0)
    (reading,) = inspect_run(run, quiet=True)["readings"]
    assert reading["kind"] == "words"
    for letter, row in zip(TEXT, reading["rows"], strict=True):
        first, second = row["start"]["nearest"][:2]
        assert first["word"] == letter
        assert abs(first["distance"]) < 1e-5 < second["distance"]
        assert row["end"]["nearest"][0]["distance"] > 0.01
        assert 0.3 < row["start"]["size"] < 3
        assert len(row["end"]["nearest"]) == 5


def test_the_nearest_words_are_those_of_the_whole_table(tmp_path: Path) -> None:
    run, attached = tuned(tmp_path, {"name": "prompt", "num_virtual_tokens": 4}, move=0.3)
    table = tiny("llama", dtype=torch.float32).get_input_embeddings().weight
    virtual = attached.compute_virtual_tokens().detach()
    cosine = virtual @ table.T / virtual.norm(dim=1)[:, None] / table.norm(dim=1)
    (reading,) = inspect_run(run, quiet=True)["readings"]
    for i, row in enumerate(reading["rows"]):
        found = [near["distance"] for near in row["end"]["nearest"]]
        assert found == pytest.approx((1 - cosine[i].topk(5).values).tolist(), abs=1e-5)
        assert row["end"]["size"] == pytest.approx(float(virtual[i].norm() / table.norm(dim=1).mean()), rel=1e-5)


def test_an_adapter_without_a_recipe_has_no_start(tmp_path: Path) -> None:
    run, _ = tuned(tmp_path, {"name": "prompt", "num_virtual_tokens": 2})
    (run.path / "recipe.yaml").unlink()
    (reading,) = inspect_run(run, quiet=True)["readings"]
    assert [row["start"] for row in reading["rows"]] == [None, None]


@pytest.mark.parametrize("settings", [{}, {"init_lora_weights": "pissa"}, {"rank_pattern": {"q": 1}}])
def test_loras_changes_by_size_and_rank(settings: dict[str, Any], tmp_path: Path) -> None:
    run, attached = tuned(tmp_path, {"name": "lora", "rank": 3, **settings}, move=0.2)
    found = inspect_run(run, quiet=True)
    (reading,) = found["readings"]
    assert len(reading["rows"]) == len(attached.layers) == 14
    for layer, row in zip(attached.layers, reading["rows"], strict=True):
        a, b = layer.get_factors()
        change = (layer.scale * b @ a).detach()
        values = torch.linalg.svdvals(change)
        shares = values[values > 1e-6 * values[0]] / values.sum()
        assert row["name"] == layer.site.name
        assert row["size"] == pytest.approx(float(change.norm() / layer.site.weight.norm()), rel=1e-4)
        assert row["rank"] == pytest.approx(float((-shares * shares.log()).sum().exp()), rel=1e-3)
        assert row["of"] == (1 if "rank_pattern" in settings and layer.site.role == "q" else 3)
    assert Path(found["plot"]).read_bytes().startswith(b"\x89PNG")
    assert Path(found["plot"]).parent == run.path


def test_an_untrained_lora_has_size_and_rank_zero(tmp_path: Path) -> None:
    run, _ = tuned(tmp_path, {"name": "lora"})
    (reading,) = inspect_run(run, quiet=True)["readings"]
    assert all(row["size"] == row["rank"] == 0 for row in reading["rows"])


def test_the_command_prints_a_table_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = tuned(tmp_path, {"name": "prompt", "num_virtual_tokens": 3, "prompt_tuning_init_text": TEXT})
    capsys.readouterr()
    assert main(["inspect", str(run.path), "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert "every token of the vocabulary" in shown
    assert "'a' 0.00" in shown
    assert main(["inspect", str(run.path), "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["readings"][0]["rows"][2]["end"]["nearest"][0]["word"] == "c"


def test_a_method_that_says_nothing_is_refused(tmp_path: Path) -> None:
    run, _ = tuned(tmp_path, {"name": "bitfit"})
    with pytest.raises(RunError, match="bitfit"):
        inspect_run(run)
