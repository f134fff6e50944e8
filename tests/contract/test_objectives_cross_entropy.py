"""Token losses against torch's own cross-entropy, and the invariants of an objective: pure, sums and counts."""

from __future__ import annotations

import doctest
import importlib
import math
import pkgutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from luthier import objectives
from luthier.core.types import LossInputs, Outputs
from luthier.objectives import OBJECTIVES

TOKENS = ("sft", "pretrain")
NAME = pytest.mark.parametrize("name", TOKENS)  # those of all others: test_objectives_invariants.py


def case(dtype: torch.dtype = torch.float64, predictions: int = 40) -> tuple[torch.Tensor, LossInputs]:
    """Logits [P, V] and a target with float weights."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(predictions, 11, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(True)
    tokens = torch.randint(11, (predictions,), generator=generator)
    tokens[::4] = logits.argmax(-1)[::4]
    weights = torch.rand(predictions, generator=generator) + 0.1
    return logits, LossInputs(torch.arange(predictions), tokens, weights, predictions // 10, 99)


def outputs(logits: torch.Tensor, target: LossInputs) -> Outputs:
    logps = logits.log_softmax(-1).gather(1, target.token_ids[:, None])[:, 0]
    return Outputs(token_logps=logps, token_hits=logits.argmax(-1) == target.token_ids)


@pytest.mark.parametrize("name", TOKENS)
def test_loss_and_gradient_equal_torch_cross_entropy(name: str) -> None:
    objective, (logits, target) = OBJECTIVES[name](), case()
    loss = objective(outputs(logits, target), target)
    each = F.cross_entropy(logits, target.token_ids, reduction="none")
    wanted = (target.weights.double() * each).sum()
    torch.testing.assert_close(loss.total, wanted, rtol=1e-12, atol=0)
    found, = torch.autograd.grad(loss.total, logits, retain_graph=True)
    expected, = torch.autograd.grad(wanted, logits, retain_graph=True)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    mean, = torch.autograd.grad(F.cross_entropy(logits, target.token_ids), logits)
    assert (found - mean * len(each)).abs().max() > 1e-2  # the control: without weights
    assert float(loss.count) == pytest.approx(float(target.weights.sum()), rel=1e-6)
    total, n = loss.metrics["nll"]
    assert float(total) / float(n) == pytest.approx(float(wanted) / float(target.weights.sum()), rel=1e-6)
    hits, n = loss.metrics["token_accuracy"]
    assert (int(hits), n) == (int((logits.argmax(-1) == target.token_ids).sum()), 40.0)
    bits, n = loss.metrics["bits_per_byte"]
    assert float(bits) / float(n) == pytest.approx(float(each.sum()) / math.log(2) / 99, rel=1e-12)


@NAME
def test_count_is_known_before_the_forward_pass(name: str) -> None:
    objective, (logits, target) = OBJECTIVES[name](), case()
    assert objective.count(target) == pytest.approx(float(objective(outputs(logits, target), target).count), rel=1e-6)


@NAME
def test_micro_batches_add_up_to_the_batch(name: str) -> None:
    objective, (logits, target) = OBJECTIVES[name](), case()
    assert not objective.needs_full_batch, "a coupled objective is never split"
    whole = objective(outputs(logits, target), target)
    parts = []
    for rows in (slice(0, 10), slice(10, 40)):
        part = replace(target, state_index=target.state_index[rows], token_ids=target.token_ids[rows], weights=target.weights[rows],
                       num_bytes=9 if rows.start == 0 else 90)
        parts.append(objective(outputs(logits[rows], part), part))
    assert float(sum(p.total for p in parts)) == pytest.approx(float(whole.total), rel=1e-9)
    assert float(sum(p.count for p in parts)) == pytest.approx(float(whole.count), rel=1e-6)
    for metric, pair in whole.metrics.items():
        for i in range(2):
            assert float(sum(float(p.metrics[metric][i]) for p in parts)) == pytest.approx(float(pair[i]), rel=1e-6)


@NAME
def test_objective_is_pure_and_metrics_have_no_gradient(name: str) -> None:
    objective, (logits, target) = OBJECTIVES[name](), case()
    before = target.weights.clone()
    first, second = (objective(outputs(logits, target), target) for _ in range(2))
    assert torch.equal(first.total, second.total)
    assert torch.equal(target.weights, before)
    assert first.total.requires_grad
    assert first.total.shape == ()
    assert not any(isinstance(x, torch.Tensor) and x.requires_grad for pair in first.metrics.values() for x in pair)


@NAME
def test_objective_reads_only_required_outputs(name: str) -> None:
    objective, (logits, target) = OBJECTIVES[name](), case()
    whole = outputs(logits, target)
    required = Outputs(**{field: vars(whole)[field] for field in objective.required_outputs})
    assert torch.equal(objective(required, target).total, objective(whole, target).total)
    assert all(field in vars(whole) for field in objective.required_outputs)


@pytest.mark.parametrize("package", ["objectives", "evaluation"])
def test_docstring_examples(package: str) -> None:
    module = importlib.import_module(f"luthier.{package}")
    inner = [f"{module.__name__}.{m.name}" for m in pkgutil.iter_modules(vars(module).get("__path__", []))]
    results = [doctest.testmod(importlib.import_module(name)) for name in [module.__name__, *inner]]
    assert sum(r.failed for r in results) == 0
    assert sum(r.attempted for r in results) > 3
    assert objectives.__doc__
