"""Virtual tokens in a manager: documents of one row, or rows of one batch, behind the virtual tokens of their own adapter are
the same documents run apart. Read `test_multi_adapter.py` first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from lab import SFT, apart, base, documents, logits, stir, trees
from test_multi_adapter import EXACT, run
from test_virtual import READS, reader
from torch import Tensor
from transformers import DynamicCache

from luthier import assembly
from luthier.assembly.factory import attach_method
from luthier.core.errors import BaseError, RunError
from luthier.core.protocols import SamplingParams
from luthier.core.types import Batch, Inputs, SegmentTree, TokenizedExample
from luthier.data.packing import build_batch
from luthier.methods.multi_adapter import AdapterManager
from luthier.models import CausalLM
from luthier.training.optimizer import Optimizer, OptimizerConfig
from luthier.training.step import step
from tiny import KINDS

pytestmark = pytest.mark.usefixtures("double")

FAR = 1e-3
MEMBERS: dict[str, Any] = {
    "low": "lora", "soft": {"name": "prompt", "num_virtual_tokens": 3}, "long": {"name": "ptuning", "num_virtual_tokens": 6, "encoder_hidden_size": 7},
    "deep": {"name": "prefix", "num_virtual_tokens": 4}, "deeper": {"name": "ptuning_v2", "num_virtual_tokens": 2},
    "both": [{"name": "prompt", "num_virtual_tokens": 2}, "lora"], "pair": [{"name": "prefix", "num_virtual_tokens": 5}, "bitfit"]}
NAMES = ("soft", "deep", None, "both", "pair", "soft", "long", "deeper", "low", "both", "deep", None)
LENGTHS = (23, 5, 9, 14, 2, 31, 7, 12, 6, 3, 11, 8)
LAYOUT = pytest.mark.parametrize("layout", ["packed", "padded"])


def filled(family: Any, members: Sequence[str] = tuple(MEMBERS)) -> AdapterManager:
    """Adapters of every kind on one base, all stirred and unlike one another."""
    manager = AdapterManager(family.structure)
    for i, name in enumerate(members):
        attached = attach_method(family, assembly.build_recipe({"data": "-", "method": MEMBERS[name]}).method, 3 + i)
        stir(attached, seed=7 + i)
        manager.add(name, attached)
    family.router = manager
    return manager


def begun(kind: str = "llama", layout: Any = None, **overrides: Any) -> tuple[CausalLM, AdapterManager]:
    family = base(kind, layout, **overrides)
    return family, filled(family)


def mixed(manager: AdapterManager, examples: Sequence[TokenizedExample], names: Sequence[str | None]) -> Batch:
    """One row, every example of it through the adapter named for it."""
    row = build_batch(list(examples))
    each = [name for example, name in zip(examples, names, strict=True) for _ in example.spans]
    return replace(row, inputs=manager.with_adapters(row.inputs, each))


def by_themselves(family: CausalLM, manager: AdapterManager, examples: Sequence[TokenizedExample],
                  names: Sequence[str | None]) -> dict[str, Tensor]:
    """Each adapter's examples in a row of their own, through `using` alone: no routing."""
    found: dict[str, Tensor] = {}
    for who in dict.fromkeys(names):
        with manager.use_adapter(who):
            part = run(family, manager, [build_batch([e for e, name in zip(examples, names, strict=True) if name == who])])
        found = {name: found[name] + t if found else t.clone() for name, t in part.items()}
    return found


def turned(names: Sequence[str | None]) -> list[str | None]:
    """The control: every example goes through its neighbour's adapter."""
    return [*names[1:], names[0]]


# ---------------------------------------------------------------- a row that mixes adapters


@LAYOUT
@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_row_is_its_documents_run_apart(kind: str, layout: str) -> None:
    family, manager = begun(kind, layout)
    examples = documents(LENGTHS)
    alone = by_themselves(family, manager, examples, NAMES)
    found = run(family, manager, [mixed(manager, examples, NAMES)])
    assert apart(found, alone) < EXACT
    assert all(float(t.abs().max()) > 0 for t in found.values())
    assert apart(run(family, manager, [mixed(manager, examples, turned(NAMES))]), alone) > FAR


@LAYOUT
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_trees_go_through_their_adapters_as_wholes(kind: str, layout: str) -> None:
    family, manager = begun(kind, layout)
    examples = [*trees(1), *documents((4, 9)), *trees(2)]
    names = ("soft", "deep", "both", None, "soft", "pair", "long", "soft")
    alone = by_themselves(family, manager, examples, names)
    assert apart(run(family, manager, [mixed(manager, examples, names)]), alone) < EXACT
    assert apart(run(family, manager, [mixed(manager, examples, turned(names))]), alone) > FAR


def test_an_adapters_virtual_tokens_are_one_root_and_computed_once() -> None:
    family, manager = begun(layout="packed")
    seen: list[SegmentTree] = []
    family.structure.layers[0].attention.register_forward_pre_hook(
        lambda _m, _a, given: seen.append(given["segment_tree"]), with_kwargs=True)
    row = mixed(manager, [*documents((5, 4, 6)), *trees()[:1], *documents((3, 7))],
                ("soft", None, "both", "soft", "deep", "soft"))
    with torch.no_grad():
        assert family.states(row.inputs).shape[0] == sum(row.inputs.segment_tree.lengths)
    (found,) = seen
    soft, both, deep = manager.resolve_indices(["soft", "both", "deep"])
    assert found.lengths == (3, 2, *row.inputs.segment_tree.lengths)
    assert found.parents == (-1, -1, 0, -1, 1, 0, 5, 5, 5, -1, 0)
    assert found.adapters == (soft, both, soft, -1, both, soft, soft, soft, soft, deep, soft)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_recomputed_blocks_go_through_the_same_adapters(kind: str) -> None:
    """The loss is taken back when every context of the forward pass is closed, and another adapter is chosen."""
    family, manager = begun(kind)
    examples = documents(LENGTHS)
    alone = by_themselves(family, manager, examples, NAMES)
    family.enable_gradient_checkpointing(0)
    family.train(True)
    manager.set_adapter("soft")
    passes: list[int] = []
    family.structure.layers[0].attention.register_forward_pre_hook(lambda *_: passes.append(1))
    assert apart(run(family, manager, [mixed(manager, examples, NAMES)]), alone) < EXACT
    assert len(passes) == 2
    assert apart(run(family, manager, [mixed(manager, examples, turned(NAMES))]), alone) > FAR


def test_adapters_of_every_kind_train_in_one_pass_each_on_its_own_documents() -> None:
    def trained(together: bool) -> dict[str, Tensor]:
        family, manager = begun()
        adam = Optimizer(manager.parameters(), manager.lr_multiplier, 1e-2, OptimizerConfig(max_grad_norm=None), 3)
        examples = documents(LENGTHS)
        for i in range(3):
            adam.set_learning_rate(i)
            cuts = (range(12),) if together else ((0, 2, 3, 7, 8), (1, 4, 5), (6, 9, 10, 11))
            step(family, SFT, [mixed(manager, [examples[j] for j in cut], [NAMES[j] for j in cut]) for cut in cuts], adam)
        return {name: p.detach().clone() for name, p in manager.parameters().items()}

    before = {name: p.detach().clone() for name, p in begun()[1].parameters().items()}
    found = trained(True)
    assert apart(found, trained(False)) < 1e-7
    assert all(not torch.equal(p, before[name]) for name, p in found.items())


# ---------------------------------------------------------------- batches and caches


@LAYOUT
def test_prompts_of_one_batch_are_answered_through_their_own_adapters(layout: str) -> None:
    """Rows leave the batch at different times, until some are left that stand behind fewer virtual tokens."""
    family, manager = begun(layout=layout)
    prompts = [list(range(3 + i, 9 + 2 * i)) for i in range(len(NAMES))]
    for temperature in (0.0, 1.5):
        sampling = SamplingParams(max_new_tokens=24, batch_size=12, temperature=temperature, seed=5,
                            stop=tuple(range(0, 256, 9)))
        together = {g.index: g.token_ids for g in family.generate(prompts, sampling, manager.resolve_indices(NAMES))}
        alone: dict[int, tuple[int, ...]] = {}
        for who in set(NAMES):
            with manager.use_adapter(who):
                alone |= {g.index: g.token_ids for g in family.generate(prompts, sampling) if NAMES[g.index] == who}
        assert together == alone
        assert len({len(tokens) for tokens in together.values()}) > 3
        swapped = {g.index: g.token_ids for g in family.generate(prompts, sampling, manager.resolve_indices(turned(NAMES)))}
        assert swapped != alone


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_holds_rows_behind_different_virtual_tokens(kind: str, told: bool) -> None:
    """Every logit of every call equals that of its row alone without a cache; half of the rows leave on the way."""
    family, manager = begun(kind)
    names = ("soft", "deep", None, "both", "long", "pair", "low", None)
    rows = [list(range(20 + 3 * i, 31 + 3 * i + i % 3)) for i in range(len(names))]
    start, width = 6, max(map(len, rows))
    alone = []
    for row, name in zip(rows, names, strict=True):
        with torch.no_grad(), manager.use_adapter(name):
            alone.append(family.model(input_ids=torch.tensor([row])).logits[0])
    gaps = [width - len(row) for row in rows] if told else [0] * len(rows)
    ids = torch.tensor([[0] * gap + row + [0] * (width - gap - len(row)) for gap, row in zip(gaps, rows, strict=True)])
    mask = torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps])
    numbers, stay, cache, found = manager.resolve_indices(names), torch.arange(len(rows)), DynamicCache(config=family.model.config), []
    for begin, end in ((0, start), (start, start + 1), (start + 1, width)):
        if begin == start + 1:  # the rows behind most virtual tokens leave, and then none is left that has any
            stay = torch.tensor([2, 6, 7])
            cache.batch_select_indices(stay)
        positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)[stay, begin:end]} if told else {}
        with torch.no_grad(), manager.route(0, [numbers[i] for i in stay]):
            said = family.model(input_ids=ids[stay, begin:end], attention_mask=mask[stay, :end], past_key_values=cache,
                                use_cache=True, **positions).logits
        found.append((begin, stay, said))
    for begin, stay, said in found:
        for i, line in zip(stay.tolist(), said, strict=True):
            first = max(begin - gaps[i], 0)
            wanted = alone[i][first:begin + line.shape[0] - gaps[i]]
            line = line[max(gaps[i] - begin, 0):][:len(wanted)]
            assert (line - wanted).abs().max() < EXACT, names[i]
    with torch.no_grad(), manager.route(0, manager.resolve_indices(turned(names))):
        other = family.model(input_ids=ids, attention_mask=mask).logits
    assert (other[0, gaps[0]:gaps[0] + 5] - alone[0][:5]).abs().max() > FAR


def test_an_answer_has_the_room_that_its_own_adapter_leaves() -> None:
    family, manager = begun()
    prompts, names = [[5] * 240] * 4, ("long", "soft", None, "deep")
    found = {g.index: g.token_ids for g in family.generate(prompts, SamplingParams(max_new_tokens=50), manager.resolve_indices(names))}
    assert [len(found[i]) for i in range(4)] == [10, 13, 16, 12]
    with pytest.raises(BaseError, match="context of 250"):
        next(family.generate([[5] * 251] * 2, SamplingParams(max_new_tokens=50), manager.resolve_indices(("soft", "long"))))
    row = mixed(manager, documents((251, 251)), ("soft", None))
    with torch.no_grad():
        family.states(row.inputs)
        with pytest.raises(BaseError, match="251 tokens and 6 virtual"):
            family.states(mixed(manager, documents((251, 9)), ("long", "soft")).inputs)


# ---------------------------------------------------------------- encoders


@READS
@LAYOUT
def test_an_encoders_mixed_row_is_its_texts_run_apart(kind: str, layout: str) -> None:
    family = reader(kind, layout)
    manager = filled(family)
    examples = [*documents((13, 4, 9, 2, 17, 6, 8)), *trees()]
    names = ("soft", "deep", None, "both", "long", "pair", "soft", "soft", "pair", None)

    def told(rows: Sequence[Batch]) -> dict[str, Tensor]:
        for parameter in manager.parameters().values():
            parameter.grad = None
        sums = torch.zeros((), dtype=torch.float64)
        for row in rows:
            states = family.states(row.inputs)
            kept = (states * torch.sin(row.inputs.tokens[:, None] + torch.arange(states.shape[1]))).sum()
            if kept.requires_grad:
                kept.backward()
            sums += kept.detach()
        return {"sum": sums, **{name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
                                for name, p in manager.parameters().items()}}

    alone: dict[str, Tensor] = {}
    for who in dict.fromkeys(names):
        with manager.use_adapter(who):
            part = told([build_batch([e for e, name in zip(examples, names, strict=True) if name == who])])
        alone = {name: alone[name] + t if alone else t for name, t in part.items()}
    assert apart(told([mixed(manager, examples, names)]), alone) < EXACT
    assert apart(told([mixed(manager, examples, turned(names))]), alone) > FAR


# ---------------------------------------------------------------- weights, and what cannot be


def test_a_stack_of_weights_holds_virtual_tokens_once_and_changes_by_their_weights() -> None:
    family, manager = begun()
    with manager.use_adapter({"low": 0.3, "soft": 1.0, "deep": 1.0, "long": 0.0}):
        found = logits(family)
    again = base("llama")
    attached: dict[str, Any] = {name: attach_method(again, assembly.build_recipe({"data": "-", "method": MEMBERS[name]}).method, 3 + i)
                                for i, name in enumerate(MEMBERS) if name in ("low", "soft", "deep")}
    for i, name in enumerate(MEMBERS):
        if name in attached:
            stir(attached[name], seed=7 + i)
    assert (logits(again) - found).abs().max() > FAR
    with torch.no_grad():
        for layer in attached["low"].layers:
            layer.b.mul_(0.3)
    assert (logits(again) - found).abs().max() < EXACT
    with manager.use_adapter({"low": 0.3, "soft": 0.5}), pytest.raises(RunError, match=r"weight of 0\.5"):
        logits(family)


def test_what_cannot_be_is_refused_with_a_reason() -> None:
    family, manager = begun(layout="packed")
    tokens, place = torch.arange(20, 41), torch.cat([torch.arange(9), torch.arange(9, 15), torch.arange(9, 15)])
    inputs = Inputs(tokens, place, SegmentTree((9, 6, 6), (-1, 0, 0)))
    for names in (("soft", "soft", "long"), (None, "deep", None), ("soft", None, "soft"), ("soft", "soft", "low")):
        with pytest.raises(RunError, match="than its parent"):
            family.states(manager.with_adapters(inputs, names))
    family.states(manager.with_adapters(inputs, (None, "low", None)))
    with manager.route(0, manager.resolve_indices(("soft", None))), torch.no_grad():
        cache = DynamicCache(config=family.model.config)
        with pytest.raises(RunError, match="a cache need a mask"):
            family.model(input_ids=tokens[None, :8].expand(2, -1), past_key_values=cache)
    with manager.route(1, [1, 1, -1, 2]), torch.no_grad(), pytest.raises(RunError, match="cannot have different adapters"):
        family.model(input_ids=tokens[None, :4])


def test_a_call_that_fails_leaves_the_routes_as_they_were() -> None:
    family, manager = begun(layout="packed")
    row = mixed(manager, documents((5, 6)), ("soft", "both"))

    def broken(*_: Any) -> None:
        raise KeyError("a fault in the middle")

    def setting() -> list[Any]:
        return [(gate.disabled_depth, gate.scale, gate.positions, gate.dim_size) for found in manager._gates.values() for gate in found]

    family.structure.layers[1].attention.register_forward_pre_hook(broken)
    with manager.route(1, manager.resolve_indices(["soft"] * 5 + ["both"] * 6)):
        wanted = setting()
        with pytest.raises(KeyError) as caught:  # kept: what its frames hold is not closed by being forgotten
            family._run(row.inputs)
        assert setting() == wanted
    assert caught.value.args
