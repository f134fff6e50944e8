"""Invariants of every objective on random outputs: pure, sums, counts known in advance, independent of the order of rows.

Read `cases.py` first.
"""

from __future__ import annotations

import pytest
import torch

from cases import cases
from luthier.core.types import LossInputs, Outputs
from luthier.objectives import OBJECTIVES, SHORT_FORMS

CASES = cases()
CASE = pytest.mark.parametrize("name", CASES)
FULL_BATCH = sorted(name for name, case in CASES.items() if case.objective.needs_full_batch)
SPLITTABLE = sorted(CASES.keys() - set(FULL_BATCH))


def compute_gradients(case, loss) -> dict[str, torch.Tensor]:
    """The gradient of the loss on each output that has one."""
    leaves = case.leaves()
    found = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True, allow_unused=True)
    return {name: torch.zeros_like(t) if g is None else g for (name, t), g in zip(leaves.items(), found, strict=True)}


def test_every_objective_has_a_case() -> None:
    assert {name.partition("-")[0] for name in CASES} == {*OBJECTIVES, *SHORT_FORMS}, "give the new objective a case in tests/cases.py"


@CASE
def test_count_is_known_before_the_forward_pass(name: str) -> None:
    case = CASES[name]
    loss = case.loss()
    assert case.objective.count(case.target) == pytest.approx(float(loss.count), rel=1e-6)
    assert float(loss.count) > 1


@CASE
def test_objective_is_pure(name: str) -> None:
    case = CASES[name]
    kept = {n: t.clone() for n, t in {**vars(case.target), **case.outputs.tensors()}.items() if isinstance(t, torch.Tensor)}
    first, second = case.loss(), case.loss()
    assert torch.equal(first.total, second.total)
    assert first.total.requires_grad
    assert first.total.shape == first.count.shape == ()
    assert first.total.isfinite()
    assert not first.count.requires_grad
    assert not any(isinstance(x, torch.Tensor) and x.requires_grad for pair in first.metrics.values() for x in pair)
    assert all(torch.equal(kept[n], t) for n, t in {**vars(case.target), **case.outputs.tensors()}.items() if n in kept)


@CASE
def test_objective_reads_only_required_outputs(name: str) -> None:
    case = CASES[name]
    required = Outputs(**{field: vars(case.outputs)[field] for field in case.objective.required_outputs}, scalars=case.outputs.scalars)
    assert torch.equal(case.objective(required, case.target).total, case.loss().total)
    assert {head.name for head in case.objective.heads if head.kind == "scalar"} == set(case.outputs.scalars)


@CASE
def test_order_of_examples_does_not_matter(name: str) -> None:
    case = CASES[name]
    wanted, generator = case.loss(), torch.Generator().manual_seed(1)
    for _ in range(3):
        examples = torch.randperm(case.target.num_examples, generator=generator).tolist()
        other = case.select(examples, generator)
        found = other.loss()
        torch.testing.assert_close(found.total, wanted.total, rtol=1e-12, atol=1e-12)
        for leaf, gradient in compute_gradients(case, wanted.total).items():
            torch.testing.assert_close(compute_gradients(case, found.total)[leaf], gradient, rtol=1e-10, atol=1e-12)
        assert {n: float(a) / float(b) for n, (a, b) in found.metrics.items()} == pytest.approx(
            {n: float(a) / float(b) for n, (a, b) in wanted.metrics.items()}, rel=1e-5)
        assert case.objective.compute_eval_metrics(other.outputs, other.target) == pytest.approx(
            case.objective.compute_eval_metrics(case.outputs, case.target), rel=1e-6)


@pytest.mark.parametrize("name", SPLITTABLE)
def test_micro_batches_add_up_to_the_batch(name: str) -> None:
    case = CASES[name]
    whole = case.loss()
    parts = [case.select(examples).loss() for examples in ([1], [0, *range(2, case.target.num_examples)])]
    torch.testing.assert_close(sum(p.total for p in parts), whole.total, rtol=1e-12, atol=1e-12)
    assert sum(float(p.count) for p in parts) == pytest.approx(float(whole.count), rel=1e-6)
    for leaf, gradient in compute_gradients(case, whole.total).items():
        found = sum(compute_gradients(case, p.total)[leaf] for p in parts)
        torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-12)
    for metric in whole.metrics.keys() - {"bits_per_byte"}:  # bytes are not cut here
        for i in range(2):
            assert sum(float(p.metrics[metric][i]) for p in parts) == pytest.approx(float(whole.metrics[metric][i]), rel=1e-5)


@pytest.mark.parametrize("name", [name for name in FULL_BATCH if not name.startswith("contrastive-triplet")])
def test_full_batch_objectives_cannot_be_split(name: str) -> None:
    """The control for the declaration: parts of such a batch do not add up to it, though their counts do."""
    case = CASES[name]
    parts = [case.select(examples).loss() for examples in ([0], range(1, case.target.num_examples))]
    assert abs(float(sum(p.total for p in parts)) - float(case.loss().total)) > 1e-3
    assert sum(float(p.count) for p in parts) == float(case.loss().count)


@CASE
def test_gradient_equals_finite_differences(name: str) -> None:
    """Central differences in a random direction, over all outputs at once."""
    case = CASES[name]
    leaves = case.leaves()
    generator = torch.Generator().manual_seed(2)
    way = {n: torch.randn(t.shape, generator=generator, dtype=t.dtype) for n, t in leaves.items()}

    def total(step: float) -> float:
        moved = {n: t.detach() + step * way[n] for n, t in leaves.items()}
        scalars = {n: moved.get(n, t) for n, t in case.outputs.scalars.items()}
        fields = {n: moved.get(n, t) for n, t in case.outputs.tensors().items()}
        return float(case.objective(Outputs(**fields, scalars=scalars), case.target).total)

    rise = (total(1e-5) - total(-1e-5)) / 2e-5
    found = sum(float((g * way[n]).sum()) for n, g in compute_gradients(case, case.loss().total).items())
    if name.startswith("kto"):  # z0 has no gradient, but moves with the outputs; held where it is by moving only what is judged
        judged = case.target.labels[case.target.item_of] >= 0
        way["token_logps"] *= (judged & (case.target.item_of >= 0)).double()
        rise = (total(1e-5) - total(-1e-5)) / 2e-5
        found = float((compute_gradients(case, case.loss().total)["token_logps"] * way["token_logps"]).sum())
    assert found == pytest.approx(rise, rel=1e-5, abs=1e-8)


@CASE
def test_one_example_and_16_bit_inputs_stay_finite(name: str) -> None:
    case = CASES[name].select([0])
    loss = case.loss()
    assert loss.total.isfinite()
    assert all(g.isfinite().all() for g in compute_gradients(case, loss.total).values())
    half = Outputs(**{n: t.detach().bfloat16() if t.is_floating_point() else t for n, t in case.outputs.tensors().items()},
                   scalars={n: t.detach().float() for n, t in case.outputs.scalars.items()})
    if "token_logps" not in case.objective.required_outputs:  # which are never below 32 bits
        assert case.objective(half, case.target).total.dtype == torch.float32


def test_empty_targets_join() -> None:
    case = CASES["contrastive"]
    a, b = case.select([0, 1]), case.select([2, 3])
    joined = LossInputs.concatenate([a.target, b.target])
    total = case.objective(Outputs.concatenate([a.outputs, b.outputs]), joined).total
    torch.testing.assert_close(total, case.loss().total, rtol=1e-12, atol=0)
