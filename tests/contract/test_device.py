"""What a step asks of a GPU, as far as a machine without one can tell. Read `lab.py` first.

Torch's device `meta` stands for the GPU: its tensors know shape and type and hold no numbers. Whatever would make the
host wait for a number, an `.item()`, a `nonzero`, a comparison, cannot be answered by them and raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from lab import SFT, attach, base, documents, judged, trees
from torch import Tensor, nn

from luthier.core.types import Loss, LossInputs, Outputs, SegmentTree, TokenizedExample, to_device
from luthier.data.packing import pack_examples
from luthier.models.attention import packed
from luthier.models.task_heads import Pooling, pool_states
from luthier.objectives.cross_entropy import SftConfig
from luthier.training.optimizer import Optimizer, OptimizerConfig
from luthier.training.step import StepResult, async_read, step


def stepped(objective: SftConfig, examples: Sequence[TokenizedExample], recomputed: bool = False) -> StepResult:
    """A step of LoRA on a device that holds no numbers."""
    family = base("llama", layout="packed")
    attached = attach(family, "lora")
    family.train(True)
    if recomputed:
        family.enable_gradient_checkpointing(0)
    family.model.to("meta")
    for layer in attached.layers:
        layer.a, layer.b = (nn.Parameter(half.detach().to("meta")) for half in (layer.a, layer.b))
    optimizer = Optimizer(attached.parameters(), attached.lr_multiplier, 1e-3, OptimizerConfig(), 10)
    optimizer.device = torch.device("cuda")  # the branch that a GPU takes; its kernel is not here
    optimizer.adam.step = lambda: None
    return step(family, objective, pack_examples(examples, 60), optimizer)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("examples", [documents(), trees()], ids=["flat", "trees"])
def test_a_step_never_waits_for_a_number(examples: Sequence[TokenizedExample], recomputed: bool) -> None:
    found = stepped(SFT, examples, recomputed)
    assert (found.device.type, found.names) == ("meta", ("nll", "token_accuracy", "bits_per_byte"))


@pytest.mark.parametrize("wait", [lambda x: x.item(), lambda x: bool(x > 0), lambda x: x.nonzero()])
def test_a_step_that_waits_is_found(wait: Any) -> None:
    class Waits(SftConfig):
        def __call__(self, outputs: Outputs, target: LossInputs) -> Loss:
            loss = super().__call__(outputs, target)
            wait(loss.total)
            return loss

    with pytest.raises((RuntimeError, NotImplementedError)):
        stepped(Waits(), documents())


@pytest.mark.parametrize("how", ["last", "first", "mean"])
@pytest.mark.parametrize("examples", [documents(), trees()], ids=["flat", "trees"])
def test_pooling_never_waits(examples: Sequence[TokenizedExample], how: Pooling) -> None:
    (batch,) = pack_examples(judged(examples), None)
    row = torch.randn(batch.inputs.tokens.shape[0], 4)
    wanted = pool_states(row, batch.inputs.segment_tree, batch.target.labeled_segments, how)
    found = pool_states(row.to("meta"), batch.inputs.segment_tree, batch.target.labeled_segments.to("meta"), how)
    assert (found.device.type, found.shape) == ("meta", wanted.shape)


def test_saved_moments_go_to_their_parameter() -> None:
    """The count of steps too: the fused kernel adds to it on its own device."""
    here = nn.Parameter(torch.randn(3))
    saving = Optimizer({"w": here}, lambda name: 1.0, 0.1, OptimizerConfig(), 10)
    here.sum().backward()
    saving.step(saving.clip_grad_norm())
    there = nn.Parameter(torch.empty(3, device="meta"))
    resumed = Optimizer({"w": there}, lambda name: 1.0, 0.1, OptimizerConfig(), 10)
    resumed.load(saving.state())
    assert set(saving.state()) == {"w.step", "w.exp_avg", "w.exp_avg_sq"}
    assert {moment.device.type for moment in resumed.state().values()} == {"meta"}


def test_attention_under_autocast_meets_one_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotated by float32 angles, queries and keys are wider than values; no kernel of a GPU takes the three together."""
    met: list[tuple[torch.dtype, ...]] = []
    given: list[tuple[torch.dtype, ...]] = []
    family = base("llama", layout="packed", dtype=torch.float32)
    narrowed, own = packed._cast_to_autocast, packed._attend_per_segment

    def noted(*tensors: Tensor) -> tuple[Tensor, ...]:
        given.append(tuple(t.dtype for t in tensors))
        return narrowed(*tensors)

    def attended(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
        met.append((query.dtype, key.dtype, value.dtype))
        return own(query, key, value, *rest)

    monkeypatch.setattr(packed, "_cast_to_autocast", noted)
    monkeypatch.setattr(packed, "_attend_per_segment", attended)
    (batch,) = pack_examples(documents(), None)
    with torch.autocast("cpu", torch.bfloat16):
        family.forward(batch.inputs, batch.target, SFT.required_outputs)
    assert set(met) == {(torch.bfloat16,) * 3}
    assert set(given) == {(torch.float32, torch.float32, torch.bfloat16)}  # the trap is there
    met.clear()
    family.forward(batch.inputs, batch.target, SFT.required_outputs)
    assert set(met) == {(torch.float32,) * 3}


def test_a_mask_that_generation_made_can_be_kept_for_a_backward_pass() -> None:
    packed.causal_mask.cache_clear()
    with torch.inference_mode():
        assert not packed.causal_mask(3, 5, None, torch.device("cpu")).is_inference()
    packed.causal_mask.cache_clear()


# ---------------------------------------------------------------- to the device and back


def test_to_a_gpu_through_pinned_memory_and_back_only_when_done(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[Any, ...]] = []
    there = torch.zeros(2)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: said.append(("pinned",)) or self)
    monkeypatch.setattr(Tensor, "to", lambda self, *given, **named: said.append((*given, named)) or there)
    assert to_device(torch.zeros(2), "cuda") is there
    assert said == [("pinned",), ("cuda", {"non_blocking": True})]
    said.clear()
    for device in ("cpu", "mps"):
        to_device(torch.zeros(2), device)
    assert said == [("cpu", {}), ("mps", {})]


def test_numbers_are_those_of_when_they_set_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tensors and two numbers of a step, read after the next step has gone over the tensors."""
    said: list[str] = []

    class Event:
        def record(self) -> None:
            said.append("record")

        def synchronize(self) -> None:
            said.append("synchronize")

    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **named: empty(*size, **named))
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda self: True))
    loss, count = torch.tensor(2.5, requires_grad=True), torch.tensor(3)
    read = async_read([loss, 7.0, count, 0.5], torch.device("cuda"))
    with torch.no_grad():
        loss.zero_()
    assert said == ["record"]
    assert read() == [2.5, 7.0, 3.0, 0.5]
    assert said == ["record", "synchronize"]


def test_flash_attention_is_asked_of_those_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call's places are what the installed torch names: (query, key, value, bounds, bounds, longest, longest)."""
    import inspect

    from torch.nn.attention.varlen import varlen_attn
    named = inspect.signature(varlen_attn).parameters
    assert list(named)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"scale", "window_size"} <= set(named)
    said: list[dict[str, Any]] = []

    def varlen(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, _: Tensor, longest: int, __: int, **named: Any) -> Tensor:
        said.append({"bounds": bounds.tolist(), "longest": longest, **named})
        return query

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    monkeypatch.setattr(packed, "_has_flash", lambda device: True)
    query = torch.randn(1, 4, 9, 16, dtype=torch.bfloat16)
    key = query[:, :2]
    out = packed._attend_one_kernel(query, key, key, SegmentTree((5, 4), (-1, -1)), 0.25, 3, True)
    assert torch.equal(out, query)
    assert said == [{"bounds": [0, 5, 9], "longest": 5, "scale": 0.25, "window_size": (2, 0)}]
