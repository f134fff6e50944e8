"""What trains is kept in float32 whatever the base is kept in, and no base trains in float16. Read `lab.py` first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import SFT, attach, base, documents
from torch import Tensor, nn

from luthier.api.evaluate import evaluate
from luthier.api.export import export
from luthier.api.train import train
from luthier.assembly.method_variants import estimate_weight_gb
from luthier.core.errors import RecipeError, RunError
from luthier.data.packing import pack_examples
from luthier.models import ModelConfig
from luthier.training import checkpoint
from luthier.training.optimizer import Optimizer, OptimizerConfig
from luthier.training.step import step
from tiny import save_tiny

INSIDE: list[tuple[str, dict[str, Any], float]] = [  # methods that train the base's own weights, with a learning rate
    ("full", {}, 2e-5), ("full", {"keep_base": True}, 2e-5), ("freeze", {"num_trainable_layers": 1}, 5e-4), ("freeze", {"head": True}, 5e-4),
    ("freeze", {"embeddings": True}, 5e-4), ("ln_tuning", {}, 1e-3)]
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("lora", {}), ("lora", {"use_dora": True}), ("bitfit", {}), ("ia3", {}), ("adalora", {}), ("adapter", {}),
    ("prompt", {"num_virtual_tokens": 3}), ("ptuning", {"num_virtual_tokens": 3}), ("ptuning_v2", {"num_virtual_tokens": 3}), ("prefix", {"num_virtual_tokens": 3})]
STEPS = 30


def trained(name: str, settings: dict[str, Any], rate: float, dtype: torch.dtype, steps: int = STEPS,
            kind: str = "llama") -> tuple[Optimizer, dict[str, Tensor], dict[str, Tensor]]:
    """The optimizer, and what trains in the model before and after."""
    family = base(kind, dtype=dtype)
    attached = attach(family, name, stirred=False, **settings)
    adam = Optimizer(attached.parameters(), attached.lr_multiplier, rate, OptimizerConfig(), steps, attached.optimizer_hooks)
    before = {n: p.detach().clone() for n, p in attached.parameters().items()}
    for i in range(steps):
        adam.set_learning_rate(i)
        step(family, SFT, pack_examples(documents(seed=i), 30), adam)
    return adam, before, {n: p.detach().clone() for n, p in attached.parameters().items()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    """The share of numbers that are not what they were."""
    return sum(int((after[n].float() != t.float()).sum()) for n, t in before.items()) / sum(t.numel() for t in before.values())


@pytest.mark.parametrize(("name", "settings", "rate"), INSIDE, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_as_many_weights_move_as_in_float32(name: str, settings: dict[str, Any], rate: float, dtype: torch.dtype) -> None:
    _, before, after = trained(name, settings, rate, torch.float32)
    adam, start, rounded = trained(name, settings, rate, dtype)
    copies = {n: p.detach() for n, p in adam.parameters.items()}
    assert all(p.dtype == torch.float32 for p in adam.parameters.values())
    assert moved(start, copies) >= moved(before, after) - 0.02
    norms = {n: t for n, t in start.items() if "norm" in n}
    assert not norms or moved(norms, copies) == 1
    assert all(torch.equal(rounded[n], copies[n].to(dtype)) for n in copies)  # the model that runs is the rounded copy
    assert all(t.dtype == torch.float32 for n, t in adam.state().items() if not n.endswith(".step"))
    largest = max(float((copies[n] - t.float()).abs().max()) for n, t in start.items())
    assert largest <= rate * STEPS * 1.05  # Adam moves a weight by about the rate; in float16 it was 500 times that
    if name == "ln_tuning":  # its rate is large enough for the rounded weights too
        assert moved(start, rounded) > 0.5


def test_small_updates_add_up() -> None:
    """A thousand updates of a tenth of the spacing of bfloat16 numbers around 1; the control is AdamW on the weight itself."""
    weight, control = (nn.Parameter(torch.ones(4, dtype=torch.bfloat16)) for _ in range(2))
    adam = Optimizer({"w": weight}, lambda _: 1.0, 5e-4, OptimizerConfig(lr_scheduler_type="constant", warmup_ratio=0, max_grad_norm=None), 1000)
    plain = torch.optim.AdamW([control], lr=5e-4, weight_decay=0)
    for i in range(1000):
        adam.set_learning_rate(i)
        weight.sum().backward()
        adam.step(adam.clip_grad_norm())
        control.grad = torch.ones_like(control)
        plain.step()
    assert weight.tolist() == pytest.approx([0.5] * 4, abs=0.004)
    assert control.tolist() == [1.0] * 4
    assert weight.grad is None
    adam.close()
    weight.sum().backward()
    assert weight.grad is not None  # let go of


def reference(steps: int, max_tokens: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mixed precision with master copies, written out: copies and the rounded model after full fine-tuning."""
    family = base("llama", dtype=torch.bfloat16)
    named = {n: p.requires_grad_(True) for n, p in family.model.named_parameters()}
    masters = {n: p.detach().float().requires_grad_(True) for n, p in named.items()}
    adam = torch.optim.AdamW([{"params": [m for m in masters.values() if m.ndim > 1]},
                              {"params": [m for m in masters.values() if m.ndim == 1]}], weight_decay=0.0, fused=True)
    for i in range(steps):
        for group in adam.param_groups:
            group["lr"] = 1e-3
        batches = pack_examples(documents(seed=i), max_tokens)
        count = sum(float(b.target.weights.double().sum()) for b in batches)
        for master in masters.values():
            master.grad = torch.zeros_like(master)
        for batch in batches:
            total = SFT(family.forward(batch.inputs, batch.target, SFT.required_outputs), batch.target).total
            for master, slope in zip(masters.values(), torch.autograd.grad(total / count, list(named.values())), strict=True):
                master.grad += slope.float()
        norm = torch.stack([m.grad.norm() for m in masters.values()]).norm()
        for master in masters.values():
            master.grad *= min(1.0, 1.0 / (float(norm) + 1e-6))
        adam.step()
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(masters[name])
    return masters, named


@pytest.mark.parametrize("max_tokens", [20, 400])
def test_it_is_mixed_precision_written_out(max_tokens: int) -> None:
    masters, named = reference(4, max_tokens)
    family = base("llama", dtype=torch.bfloat16)
    attached = attach(family, "full", stirred=False)
    adam = Optimizer(attached.parameters(), attached.lr_multiplier, 1e-3, OptimizerConfig(lr_scheduler_type="constant", warmup_ratio=0), 4)
    for i in range(4):
        adam.set_learning_rate(i)
        assert step(family, SFT, pack_examples(documents(seed=i), max_tokens), adam).micro_batches == (1 if max_tokens == 400 else 5)
    for name, master in masters.items():
        torch.testing.assert_close(adam.parameters[name].detach(), master.detach(), rtol=1e-6, atol=2e-6)
    same = [float((p == named[n]).float().mean()) for n, p in attached.parameters().items()]
    assert min(same) > 0.97


def test_it_resumes_to_the_bit(tmp_path: Path) -> None:
    def fresh() -> tuple[Any, Any, Optimizer]:
        family = base("llama", dtype=torch.bfloat16)
        attached = attach(family, "full", stirred=False)
        return family, attached, Optimizer(attached.parameters(), attached.lr_multiplier, 2e-5, OptimizerConfig(), 8)

    def run(family: Any, adam: Optimizer, steps: range) -> None:
        for i in steps:
            adam.set_learning_rate(i)
            step(family, SFT, pack_examples(documents(seed=i), 40), adam)

    family, attached, adam = fresh()
    run(family, adam, range(4))
    saved = checkpoint.load_checkpoint(checkpoint.save_checkpoint(tmp_path, 4, {"method": attached.state(), "optimizer": adam.state()}, {}, 1)).tensors
    run(family, adam, range(4, 8))
    second, other, again = fresh()
    other.load(saved["method"])
    again.load(saved["optimizer"])
    run(second, again, range(4, 8))
    assert all(torch.equal(t, again.state()[n]) for n, t in adam.state().items())
    assert all(torch.equal(t, other.state()[n]) for n, t in attached.state().items())
    _, _, control = fresh()
    with pytest.raises(RunError, match="no float32 copy of"):
        control.load({n: t for n, t in saved["optimizer"].items() if not n.endswith(".master")})


@pytest.mark.parametrize(("name", "settings"), OTHERS, ids=str)
def test_weights_that_a_method_adds_are_float32_too(name: str, settings: dict[str, Any]) -> None:
    adam, before, after = trained(name, settings, 1e-3, torch.bfloat16, steps=2)
    assert all(p.dtype == torch.float32 for p in adam.parameters.values())
    assert all(t.dtype == torch.float32 for t in after.values())  # no copy is needed
    assert moved(before, after) > 0


# ---------------------------------------------------------------- whole runs


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("".join(
        json.dumps({"prompt": f"Say {w}.", "completion": w * 3}) + "\n" for w in ("one", "two", "three", "four", "five", "six")))
    return tmp_path


def test_a_run_on_a_bfloat16_base_says_the_memory_and_is_saved_in_the_dtype_of_its_base(
        rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny(rows / "base", "llama", dtype=torch.bfloat16)
    run = train(model={"name_or_path": str(rows / "base"), "dtype": "auto"}, data={"train": str(rows / "rows.jsonl"), "test": str(rows / "rows.jsonl")},
                method="full", training={"max_steps": 3}, optimizer={"learning_rate": 1e-3}, output_dir=str(rows / "run"))
    assert "float32 copies of them" in capsys.readouterr().err
    assert json.loads((run.path / "config.json").read_text())["dtype"] == "bfloat16"
    found = evaluate(run, quiet=True, **{"model.dtype": "auto"})
    assert found["nll"] == pytest.approx(run.results["test"]["nll"], rel=1e-6)  # what is saved is what was measured


@pytest.mark.parametrize("how", ["float16", "auto"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_float16_base_is_refused_for_training_and_nothing_else(rows: Path, how: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(rows / "base", "llama", dtype=torch.float16 if how == "auto" else torch.float32)
    given: dict[str, Any] = {"data": str(rows / "rows.jsonl"), "method": method, "training": {"max_steps": 1}}
    with monkeypatch.context() as patch:
        patch.setattr("luthier.api.train.load_family", lambda *_: pytest.fail("loaded before it was refused"))
        with pytest.raises(RecipeError, match="float16") as error:
            train(model={"name_or_path": str(rows / "base"), "dtype": how}, output_dir=str(rows / "refused"), quiet=True, **given)
    assert "bfloat16 or float32" in error.value.remedy
    run = train(model={"name_or_path": str(rows / "base"), "dtype": "float32"}, output_dir=str(rows / "run"), quiet=True, **given)  # the remedy works
    assert evaluate(run, data=str(rows / "rows.jsonl"), quiet=True, **{"model.dtype": "float16"})["nll"] > 0
    if method == "lora":
        assert (export(run, "merged", rows / "merged") / "config.json").exists()


def test_a_float16_base_whose_config_does_not_say_so_is_refused_once_it_is_loaded(rows: Path) -> None:
    save_tiny(rows / "base", "llama", dtype=torch.float16)
    config = json.loads((rows / "base/config.json").read_text())
    (rows / "base/config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")}))
    with pytest.raises(RecipeError, match="float16"):
        train(model={"name_or_path": str(rows / "base"), "dtype": "auto"}, data=str(rows / "rows.jsonl"), output_dir=str(rows / "run"), quiet=True)


def test_the_plan_counts_the_copies(rows: Path) -> None:
    save_tiny(rows / "base", "llama", dtype=torch.bfloat16)
    frozen, whole = ({d: estimate_weight_gb(ModelConfig(name_or_path=str(rows / "base"), dtype=d), whole=w) for d in ("float32", "bfloat16")}
                     for w in (False, True))
    assert whole["bfloat16"] / frozen["bfloat16"] == pytest.approx(9)  # 18 bytes a weight instead of 2
    assert whole["float32"] / frozen["float32"] == pytest.approx(4)
