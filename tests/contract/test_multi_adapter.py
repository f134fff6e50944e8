"""The manager: a batch that mixes adapters is the same rows run apart, in loss, logits and every gradient."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from lab import SFT, apart, base, documents, logits, measured, stir
from torch import Tensor

from luthier import assembly
from luthier.assembly.factory import attach_method
from luthier.core.errors import RecipeError, RunError
from luthier.core.protocols import SamplingParams
from luthier.core.types import Batch
from luthier.data.packing import build_batch
from luthier.methods import METHODS
from luthier.methods.composite import CompositeMethod
from luthier.methods.multi_adapter import AdapterManager
from luthier.models import CausalLM
from luthier.training.optimizer import Optimizer, OptimizerConfig
from luthier.training.step import step

NAMES = ("a", "b", None, "a", None, "b", "a", "b")  # of the lab's eight documents
EXACT = 1e-9
UNROUTED = {  # why -> methods; the others route
    "base's own weights or modules": {"full", "freeze", "ln_tuning", "peft"},
}


def banked(kind: str = "llama", layout: Any = None, method: str = "lora", **overrides: Any) -> tuple[CausalLM, AdapterManager]:
    """Two stirred adapters, unlike one another, on one base."""
    family = base(kind, layout, **overrides)
    manager = AdapterManager(family.structure)
    for i, name in enumerate(("a", "b")):
        attached = attach_method(family, METHODS[method](), 3 + i)
        stir(attached, seed=7 + i)
        manager.add(name, attached)
    family.router = manager
    return family, manager


def mixed(manager: AdapterManager, names: Sequence[str | None] = NAMES, only: Sequence[int] | None = None) -> Batch:
    """The lab's documents in one row, each with its adapter; or only some of them."""
    chosen = range(len(names)) if only is None else only
    rows = documents()
    row = build_batch([rows[i] for i in chosen])
    return replace(row, inputs=manager.with_adapters(row.inputs, [names[i] for i in chosen]))


def run(family: CausalLM, manager: AdapterManager, rows: Sequence[Batch]) -> dict[str, Tensor]:
    """Summed loss and every adapter's gradient; zero where an adapter had no row."""
    for parameter in manager.parameters().values():
        parameter.grad = None
    loss = torch.zeros((), dtype=torch.float64)
    for row in rows:
        total = SFT(family.forward(row.inputs, row.target, SFT.required_outputs), row.target).total
        if total.requires_grad:
            total.backward()
        loss += total.detach()
    return {"loss": loss, **{name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
                             for name, p in manager.parameters().items()}}


def by_themselves(family: CausalLM, manager: AdapterManager) -> dict[str, Tensor]:
    """Each adapter's rows in a row of their own, through `using` alone: no routing."""
    found: dict[str, Tensor] = {}
    for who in ("a", "b", None):
        row = build_batch([d for d, name in zip(documents(), NAMES, strict=True) if name == who])
        with manager.use_adapter(who):
            part = run(family, manager, [row])
        found = {name: found[name] + t if found else t.clone() for name, t in part.items()}
    return found


# ---------------------------------------------------------------- routing


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma3", "mixtral"])
def test_a_mixed_row_is_its_rows_run_apart(kind: str, layout: str) -> None:
    family, manager = banked(kind, layout)
    together, alone = run(family, manager, [mixed(manager)]), by_themselves(family, manager)
    assert apart(together, alone) < EXACT
    assert all(float(t.abs().max()) > 0 for t in together.values())
    swapped = run(family, manager, [mixed(manager, [{"a": "b", "b": "a", None: None}[n] for n in NAMES])])
    assert apart(swapped, alone) > 1e-3


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_routes_or_says_why_not(method: str) -> None:
    reason = next((why for why, names in UNROUTED.items() if method in names), None)
    with pytest.raises(RunError, match=reason) if reason else nullcontext():
        family, manager = banked(method=method)
        assert apart(run(family, manager, [mixed(manager)]), by_themselves(family, manager)) < EXACT


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("recompute", [False, True])
def test_the_backward_pass_goes_through_the_same_adapters(recompute: bool) -> None:
    """The loss is taken back when every context of the forward pass is closed, and another adapter is chosen."""
    family, manager = banked()
    wanted = by_themselves(family, manager)
    if recompute:
        family.enable_gradient_checkpointing(0)
    family.train(True)
    manager.set_adapter("b")
    passes = []
    handle = family.structure.layers[0].attention.register_forward_pre_hook(lambda *_: passes.append(1))
    found = run(family, manager, [mixed(manager)])
    handle.remove()
    assert len(passes) == 1 + recompute
    assert apart(found, wanted) < EXACT
    row = build_batch(documents())
    with manager.use_adapter({"a": 0.7, "b": 0.3}):
        stacked = run(family, manager, [row])
    for parameter in manager.parameters().values():
        parameter.grad = None
    with manager.use_adapter({"a": 0.7, "b": 0.3}):
        total = SFT(family.forward(row.inputs, row.target, SFT.required_outputs), row.target).total
    with manager.disabled(), manager.use_adapter("a"):
        total.backward()
    late = {name: p.grad for name, p in manager.parameters().items() if p.grad is not None}
    assert apart({"loss": total.detach(), **late}, stacked) < EXACT


@pytest.mark.usefixtures("double")
def test_a_child_may_go_through_another_adapter_than_its_prompt() -> None:
    """Answers of two adapters to one prompt that the base reads: each is that adapter's answer to the base's cache."""
    from luthier.core.types import Inputs, SegmentTree
    family, manager = banked(layout="packed")
    tokens, place = torch.arange(20, 41), torch.cat([torch.arange(9), torch.arange(9, 15), torch.arange(9, 15)])
    tokens[15:] = tokens[9:15]
    states = family.states(manager.with_adapters(Inputs(tokens, place, SegmentTree((9, 6, 6), (-1, 0, 0))), [None, "a", "b"]))
    for part, who in ((slice(9, 15), "a"), (slice(15, 21), "b")):
        model: Any = family.model
        with torch.no_grad(), manager.use_adapter(None):
            cache = model(input_ids=tokens[None, :9], use_cache=True).past_key_values
        with torch.no_grad(), manager.use_adapter(who):
            alone = model.base_model(input_ids=tokens[None, part], past_key_values=cache).last_hidden_state[0]
        assert (states[part] - alone).abs().max() < EXACT
    assert (states[9:15] - states[15:]).abs().max() > 1e-3
    padded, other = banked(layout="padded")
    with pytest.raises(RunError, match="different adapter than its parent"):
        padded.states(other.with_adapters(Inputs(tokens, place, SegmentTree((9, 6, 6), (-1, 0, 0))), [None, "a", "b"]))


@pytest.mark.usefixtures("double")
def test_two_adapters_train_in_one_pass_each_on_its_own_rows() -> None:
    def trained(together: bool) -> dict[str, Tensor]:
        family, manager = banked()
        adam = Optimizer(manager.parameters(), manager.lr_multiplier, 1e-2, OptimizerConfig(max_grad_norm=None), 3)
        for i in range(3):
            adam.set_learning_rate(i)
            # A row without any adapter has no gradient to give, so it comes along with the others.
            rows = [mixed(manager)] if together else [mixed(manager, only=only) for only in ((0, 2, 3), (1, 4), (5, 6, 7))]
            step(family, SFT, rows, adam)
        return {name: p.detach().clone() for name, p in manager.parameters().items()}

    before = {name: p.detach().clone() for name, p in banked()[1].parameters().items()}
    found = trained(True)
    assert apart(found, trained(False)) < 1e-7
    assert all(not torch.equal(p, before[name]) for name, p in found.items())


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_prompts_of_one_batch_are_answered_through_their_own_adapters(layout: str) -> None:
    """Rows leave the batch at different times, so the routes move with those that stay."""
    family, manager = banked(layout=layout)
    prompts = [list(range(3 + i, 9 + 2 * i)) for i in range(9)]
    names = ("a", "b", None) * 3
    sampling = SamplingParams(max_new_tokens=24, batch_size=9, temperature=1.5, seed=5, stop=tuple(range(0, 256, 9)))
    together = {g.index: g.token_ids for g in family.generate(prompts, sampling, manager.resolve_indices(names))}
    alone: dict[int, tuple[int, ...]] = {}
    for who in ("a", "b", None):
        with manager.use_adapter(who):
            alone |= {g.index: g.token_ids for g in family.generate(prompts, sampling) if names[g.index] == who}
    assert together == alone
    assert len({len(tokens) for tokens in together.values()}) > 3
    swapped = {g.index: g.token_ids for g in family.generate(prompts, sampling, manager.resolve_indices(names[1:] + names[:1]))}
    assert swapped != alone


def test_a_suspended_answer_leaves_the_setting_alone() -> None:
    family, manager = banked()
    manager.set_adapter("a")
    wanted = logits(family)
    answers = family.generate([[1, 2, 3], [4, 5]], SamplingParams(max_new_tokens=3), manager.resolve_indices(["b", None]))
    next(answers)
    assert torch.equal(logits(family), wanted)


# ---------------------------------------------------------------- choosing


def test_the_chosen_adapter_alone_acts() -> None:
    family, manager = banked()
    bare = logits(base("llama"))
    assert torch.equal(logits(family), bare)  # silent until chosen
    alone = {}
    for i, name in enumerate(("a", "b")):
        single = base("llama")
        stir(attach_method(single, METHODS["lora"](), 3 + i), seed=7 + i)
        alone[name] = logits(single)
    with manager.use_adapter("a"):
        assert torch.equal(logits(family), alone["a"])
        with manager.use_adapter("b"):
            assert torch.equal(logits(family), alone["b"])
            with manager.use_adapter(None):
                assert torch.equal(logits(family), bare)
        assert torch.equal(logits(family), alone["a"])
        with manager.disabled(), manager.use_adapter("b"):
            assert torch.equal(logits(family), bare)
    with pytest.raises(KeyError), manager.use_adapter("b"):
        raise KeyError
    assert torch.equal(logits(family), bare)
    manager.set_adapter("b")
    assert torch.equal(logits(family), alone["b"])
    with manager.adapters["b"].disabled():
        assert torch.equal(logits(family), bare)


@pytest.mark.usefixtures("double")
def test_a_weighted_stack_is_the_sum_of_the_weighted_changes() -> None:
    family, manager = banked()
    with manager.use_adapter({"a": 0.7, "b": -0.3}):
        found = logits(family)
    merged = base("llama")
    weights = dict(merged.model.named_modules())
    for name, share in (("a", 0.7), ("b", -0.3)):
        member: Any = manager.adapters[name]
        for layer in member.layers:
            module: Any = weights[layer.site.name]
            with torch.no_grad():
                module.weight += share * layer.scale * (layer.b @ layer.a)
    assert (found - logits(merged)).abs().max() < EXACT
    with manager.use_adapter({"a": 0.7, "b": 0.3}):
        assert (found - logits(family)).abs().max() > 1e-3


def test_switching_moves_no_weight_and_takes_no_time() -> None:
    family, manager = banked()
    kept = {name: p.data_ptr() for name, p in [*manager.parameters().items(), *family.model.named_parameters()]}
    taken = []
    for i in range(200):
        began = time.perf_counter()
        with manager.use_adapter(("a", "b", None, {"a": 0.5, "b": 0.5})[i % 4]):
            taken.append(time.perf_counter() - began)
    assert sorted(taken)[100] < 1e-3
    assert kept == {name: p.data_ptr() for name, p in [*manager.parameters().items(), *family.model.named_parameters()]}


def test_a_frozen_adapter_stays_as_it_is_beside_the_one_that_trains() -> None:
    family, manager = banked()
    reference = manager.freeze("b")
    before = {name: t.clone() for name, t in reference.state().items()}
    assert all(name.startswith("a/") for name in manager.parameters())
    manager.set_adapter("a")
    adam = Optimizer(manager.parameters(), manager.lr_multiplier, 1e-2, OptimizerConfig(), 3)
    adam.set_learning_rate(0)
    step(family, SFT, [build_batch(documents())], adam)
    assert all(torch.equal(t, before[name]) for name, t in reference.state().items())
    with manager.use_adapter("b"):
        row = build_batch(documents())
        assert not SFT(family.forward(row.inputs, row.target, SFT.required_outputs), row.target).total.requires_grad


def test_a_list_of_methods_is_one_member() -> None:
    family = base("llama")
    manager = AdapterManager(family.structure)
    parts = assembly.build_recipe({"data": "-", "method": ["lora", "bitfit"]}).method
    attached = attach_method(family, parts, 3)
    assert isinstance(attached, CompositeMethod)
    stir(attached)
    wanted = logits(family)
    manager.add("both", attached)
    assert torch.equal(logits(family), logits(base("llama")))
    with manager.use_adapter("both"):
        assert torch.equal(logits(family), wanted)


# ---------------------------------------------------------------- refusals


def test_what_cannot_be_is_refused_with_a_reason() -> None:
    family, manager = banked()
    with pytest.raises(RecipeError, match="did you mean 'a'"), manager.use_adapter("aa"):
        pass
    with pytest.raises(RecipeError, match="another name"):
        manager.add("a", attach_method(family, METHODS["lora"](), 3))
    with pytest.raises(RunError, match="base's own weights or modules"):
        manager.add("full", attach_method(family, METHODS["full"](), 3))
    row = mixed(manager)
    family.router = None
    with pytest.raises(RunError, match="no router"):
        family.forward(row.inputs, row.target, SFT.required_outputs)


def test_a_part_that_sees_tokens_in_another_order_is_refused() -> None:
    family, manager = banked()
    module: Any = family.structure.linears[0].module
    with manager.route(1, [0, 1, -1]), pytest.raises(RunError, match="cannot find the 3 tokens"):
        module(torch.zeros(3, 32, dtype=torch.float64))
    with manager.route(1, [0, 1, -1]), nullcontext():
        module(torch.zeros(1, 3, 32, dtype=torch.float64))


@pytest.mark.usefixtures("double")
def test_measured_of_one_adapter_is_that_of_it_alone() -> None:
    family, manager = banked()
    single = base("llama")
    attached = attach_method(single, METHODS["lora"](), 3)
    stir(attached, seed=7)
    with manager.use_adapter("a"):
        found = measured(family, manager.adapters["a"], [build_batch(documents())])
    assert apart(found, measured(single, attached, [build_batch(documents())])) < EXACT
