"""The optimizer goes on from its saved moments, however its parameters lie in memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from luthier.training.optimizer import Optimizer, OptimizerConfig


def made(start: Tensor) -> Optimizer:
    return Optimizer({"w": nn.Parameter(start.clone())}, lambda name: 1.0, 0.1, OptimizerConfig(max_grad_norm=None), 10)


def stepped(optimizer: Optimizer, seed: int) -> None:
    w = optimizer.parameters["w"]
    (w * torch.randn(w.shape, generator=torch.Generator().manual_seed(seed))).sum().backward()
    optimizer.step(optimizer.clip_grad_norm())


@pytest.mark.parametrize("turned", [False, True])  # PiSSA's start lies in memory column by column
def test_saved_moments_are_those_of_their_own_entries(turned: bool) -> None:
    start = torch.randn(5, 3).T if turned else torch.randn(3, 5)
    whole = made(start)
    assert whole.parameters["w"].is_contiguous() is not turned
    stepped(whole, 1)
    weights, saved = whole.parameters["w"].detach().clone(), whole.state()
    again = made(weights)
    again.load({name: tensor.contiguous() for name, tensor in saved.items()})  # as a file holds them
    for optimizer in (whole, again):
        stepped(optimizer, 2)
    assert torch.equal(again.parameters["w"], whole.parameters["w"])
    fresh = made(weights)  # the control: the moments matter
    stepped(fresh, 2)
    assert not torch.equal(fresh.parameters["w"], whole.parameters["w"])
