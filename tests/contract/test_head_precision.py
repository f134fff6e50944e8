"""What ends a forward pass (log-probabilities, pooling, heads) loses nothing to the base's dtype. Read `lab.py` first.

Everything runs on a CPU, whose autocast casts as that of a GPU does; nothing here was run on a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lab import SFT, attach, base, documents, trees
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from luthier.api.evaluate import evaluate
from luthier.api.train import train
from luthier.core.protocols import Head
from luthier.core.types import SegmentTree
from luthier.data.packing import pack_examples
from luthier.methods import METHODS
from luthier.models.attention import packed as attention
from luthier.models.ops import fused_logprobs
from luthier.models.ops.fused_logprobs import compute_logprobs
from luthier.models.task_heads import TaskHeads, pool_states
from tiny import save_tiny, tiny, tiny_tokenizer

PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.addmm_.default, torch.ops.aten.bmm.default}


class Products(TorchDispatchMode):
    """The dtypes of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in PRODUCTS:
            self.dtypes += [x.dtype for x in args if isinstance(x, Tensor)]
        return function(*args, **(kwargs or {}))


# ---------------------------------------------------------------- the head under autocast


@pytest.mark.parametrize(("method", "settings"), [
    ("full", {}), ("freeze", {"head": True}), ("freeze", {"embeddings": True}), ("lora", {}), ("bitfit", {}), ("prefix", {"num_virtual_tokens": 2})], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_every_product_of_the_backward_pass_runs_in_the_dtype_of_autocast(
        method: str, settings: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = base(kind, dtype=torch.float32)
    attach(family, method, **settings)
    family.train(True)

    def products() -> set[torch.dtype]:
        batch, = pack_examples(documents(), 400)
        with torch.autocast("cpu", torch.bfloat16):
            total = SFT(family.forward(batch.inputs, batch.target, SFT.required_outputs), batch.target).total
        with Products() as found:
            total.backward()
        return set(found.dtypes)

    assert products() == {torch.bfloat16}
    if method == "full":  # the control: without the forward pass's autocast
        again = fused_logprobs._recompute_gradients
        monkeypatch.setattr(fused_logprobs, "_recompute_gradients", lambda *given: _without_autocast(again, given))
        assert torch.float32 in products()


def _without_autocast(function: Callable[..., Any], given: tuple[Any, ...]) -> Any:
    with torch.autocast("cpu", enabled=False):
        return function(*given[:-1], None)


def reference(weight: Tensor, states: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    return (states.double() @ weight.double().T / temperature).log_softmax(-1).gather(1, tokens[:, None])[:, 0]


def case(dtype: torch.dtype, positions: int = 64, vocabulary: int = 50, width: int = 32) -> tuple[nn.Linear, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(width, vocabulary, bias=False, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(vocabulary, width, generator=generator))
    return linear, torch.randn(positions, width, generator=generator).to(dtype).requires_grad_(True), \
        torch.randint(vocabulary, (positions,), generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("trains", [True, False], ids=["head trains", "head frozen"])
def test_log_probabilities_at_a_temperature_are_those_of_the_definition(temperature: float, trains: bool) -> None:
    linear, states, tokens = case(torch.float64)
    linear.requires_grad_(trains)
    found, _, _ = compute_logprobs(linear, states, tokens, temperature=temperature)
    wanted = reference(linear.weight, states, tokens, temperature)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    push = torch.linspace(-1, 1, len(tokens), dtype=torch.float64)
    leaves = [states, linear.weight] if trains else [states]
    for ours, theirs in zip(torch.autograd.grad(found, leaves, push), torch.autograd.grad(wanted, leaves, push), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 50.0])
def test_the_temperature_divides_logits_in_float32(softcap: float | None) -> None:
    """Divided in bfloat16, the states would lose what the logits still hold; the control is that."""
    linear, states, tokens = case(torch.bfloat16)
    with torch.no_grad():
        logits = (states @ linear.weight.T).float()
        capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        wanted = (capped / 0.7).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        found, _, _ = compute_logprobs(linear, states, tokens, softcap, temperature=0.7)
        control, _, _ = compute_logprobs(linear, states / 0.7, tokens, softcap)
    assert (found - wanted).abs().max() < 1e-5
    if softcap is None:
        assert (control - wanted).abs().max() > 1e-2


def test_the_gradient_of_the_head_is_summed_over_chunks_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_logprobs, "CHUNK_LOGITS", 1)  # sixteen positions at once
    linear, states, tokens = case(torch.bfloat16, positions=8192)
    linear64, states64 = linear.weight.detach().double().requires_grad_(True), states.detach().double()
    reference(linear64, states64, tokens, 1.0).sum().backward()
    assert linear64.grad is not None

    def error() -> float:
        found, = torch.autograd.grad(compute_logprobs(linear, states, tokens)[0].sum(), linear.weight)
        return float((found.double() - linear64.grad).norm() / linear64.grad.norm())  # type: ignore[operator]

    assert error() < 0.01
    zeros = torch.zeros_like
    monkeypatch.setattr(fused_logprobs.torch, "zeros_like", lambda x, dtype=None: zeros(x))  # the control: summed in bfloat16
    assert error() > 0.02


# ---------------------------------------------------------------- pooling and heads


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_mean_of_a_text_is_summed_in_float32(dtype: torch.dtype, autocast: bool) -> None:
    lengths, parents = (40, 300, 7, 120, 60), (-1, 0, -1, 1, 0)
    row = torch.randn(sum(lengths), 16, generator=torch.Generator().manual_seed(0)).add(3).to(dtype)
    segment_tree, parts = SegmentTree(lengths, parents), row.double().split(lengths)
    items = torch.tensor([3, 0, 2, 4, 3])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = pool_states(row, segment_tree, items, "mean")
        flat = pool_states(row, SegmentTree(lengths, (-1,) * 5), items, "mean")
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    for i, item in enumerate(items.tolist()):
        path = torch.cat([parts[a] for a in segment_tree.find_path(item)])
        torch.testing.assert_close(found[i].double(), path.mean(0), rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(flat[i].double(), parts[item].mean(0), rtol=2e-6, atol=2e-6)
    if dtype == torch.bfloat16:  # the control: summed in the row's dtype
        control = torch.zeros(16, dtype=dtype).expand(1, 16).index_add(0, torch.zeros(300, dtype=torch.long), row[40:340])[0] / 300
        assert (control.double() - parts[1].mean(0)).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["item", "token"])
def test_heads_are_computed_in_float32_under_autocast(kind: Any) -> None:
    heads = TaskHeads([Head("score", kind, 3)], 32, torch.device("cpu"), 0, "CAUSAL_LM")
    states = torch.randn(20, 32, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        found, control = heads._compute_scores(kind, states), heads.modules["score"](states)
    wanted = states @ heads.modules["score"].weight.T
    assert found.dtype == torch.float32
    assert (found - wanted).abs().max() < 1e-6
    assert (control.float() - wanted).abs().max() > 1e-4
    found.sum().backward()
    assert heads.modules["score"].weight.grad is not None


# ---------------------------------------------------------------- what is measured


@pytest.fixture
def home(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "base", "llama", dtype=torch.float32)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": word * 9}) + "\n" for word in ("one ", "aöü ", "three ")))
    return tmp_path


def test_held_out_rows_are_measured_without_autocast_as_evaluate_does(home: Path) -> None:
    rows = str(home / "rows.jsonl")
    run = train(model=str(home / "base"), data={"train": rows, "eval": rows, "test": rows}, objective="pretrain",
                training={"max_steps": 3, "precision": "bf16"}, output_dir=str(home / "run"), quiet=True)
    assert run.results["best"]["eval_nll"] == run.results["test"]["nll"]
    assert evaluate(run, quiet=True)["nll"] == pytest.approx(run.results["test"]["nll"], rel=1e-6)
    assert [line["eval_nll"] for line in run.metrics if "eval_nll" in line][-1] == run.results["test"]["nll"]


def test_bits_per_byte_has_the_nats_of_all_that_is_predicted_and_the_bytes_of_the_text(home: Path) -> None:
    rows = str(home / "rows.jsonl")
    run = train(model=str(home / "base"), data={"train": rows, "test": rows}, objective="pretrain", training={"max_steps": 1},
                output_dir=str(home / "run"), quiet=True)
    model, tokenizer, nats, size = tiny("llama", dtype=torch.float32), tiny_tokenizer(), 0.0, 0
    for line in (home / "rows.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            nats += float(F.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="sum"))
        size += len(text.encode()) - 1  # the first byte is read, not predicted; the end mark is predicted, and no byte
    found = run.results["test_before"]["bits_per_byte"]
    assert found == pytest.approx(nats / size / 0.6931471805599453, rel=1e-4)


def test_the_unit_of_a_prompt_is_the_size_of_the_words_that_it_starts_from() -> None:
    family = base("llama")
    for settings in ({"num_virtual_tokens": 4}, {"num_virtual_tokens": 4, "prompt_tuning_init_text": "ab"}):
        attached = METHODS["prompt"](**settings).attach(family.structure, seed=3)
        start = next(iter(attached.parameters().values())).detach()
        assert attached.lr_multiplier("prompt_embeddings") == pytest.approx(float(start.square().mean().sqrt()))


# ---------------------------------------------------------------- packing


def test_what_is_no_refusal_of_the_model_is_not_taken_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise TypeError("varlen_attn() got an unexpected keyword argument 'window_size'")

    monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.NAME, broken)
    with pytest.raises(TypeError, match="window_size"):
        base("llama")


def test_padding_in_place_of_packing_is_said(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = str(home / "rows.jsonl")
    given: dict[str, Any] = {"model": str(home / "base"), "data": rows, "objective": "pretrain", "training": {"max_steps": 1}}
    train(**given, output_dir=str(home / "packed"))
    assert "padded row" not in capsys.readouterr().err
    real = attention.packed_attention
    monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.NAME,
                        lambda module, q, k, v, mask, segment_tree=None, **options: real(module, q, k, v, None, **options))
    train(**given, output_dir=str(home / "padded"))
    assert capsys.readouterr().err.count("cannot compute several documents in one row") == 1


def test_an_older_variable_length_attention_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its signature, on a CPU: flex attention takes its place."""
    def old(query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int,
            is_causal: bool = False, return_aux: Any = None) -> None:
        pytest.fail("called")

    assert attention._get_varlen_attention() is not None  # of the installed torch
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", old)
    assert attention._get_varlen_attention() is None
    monkeypatch.setattr(attention, "_has_flash", lambda device: True)
    monkeypatch.setattr(attention, "_compile_flex", lambda flex: flex)
    query = torch.randn(1, 4, 12, 16).bfloat16()
    row = SegmentTree((7, 5), (-1, -1))
    found = attention._attend_one_kernel(query, query, query, row, 0.25, None, True)
    wanted = attention._attend_per_segment(query, query, query, row, 0.25, 0.0, None, None, True)
    torch.testing.assert_close(found.float(), wanted.float(), rtol=2e-2, atol=2e-2)


def test_trees_too_are_pooled_as_they_are_alone() -> None:
    family = base("llama", dtype=torch.bfloat16)
    batch, = pack_examples(trees(), 1000)
    with torch.no_grad():
        states = family.states(batch.inputs)
    assert states.dtype == torch.bfloat16
    assert pool_states(states, batch.inputs.segment_tree, torch.arange(4), "mean").dtype == torch.float32
