"""Random states: the same numbers follow after a round trip through JSON."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from luthier.training.rng import capture_rng_state, restore_rng_state, seed_everything

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else []), *(["mps"] if torch.mps.is_available() else [])]


def draw(device: str) -> list[object]:
    """Odd counts, so that a normal that waits for its twin is part of the state."""
    return [random.random(), random.gauss(0, 1), np.random.rand(3).tolist(), np.random.randn(3).tolist(),
            torch.rand(3).tolist(), torch.randn(17).tolist(), torch.randperm(9).tolist(),
            torch.rand(5, device=device).tolist(), torch.randn(5, device=device).tolist()]


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_numbers_follow(device: str) -> None:
    seed_everything(11)
    draw(device)
    state = capture_rng_state(device)
    text = json.dumps(state)
    expected = [draw(device), draw(device)]
    assert expected[0] != expected[1]
    assert restore_rng_state(json.loads(text)) == []
    assert capture_rng_state(device) == state
    assert [draw(device), draw(device)] == expected


@pytest.mark.parametrize("device", DEVICES)
def test_one_seed_for_all(device: str) -> None:
    seed_everything(2**40 + 3)
    first = draw(device)
    seed_everything(4)
    other = draw(device)
    seed_everything(2**40 + 3)
    assert draw(device) == first
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_a_state_without_its_device_is_told() -> None:
    state = capture_rng_state("cpu")
    told = restore_rng_state({**state, "cuda": [state["cpu"]] * (torch.cuda.device_count() + 1)}) if not torch.cuda.is_available() else ["CUDA"]
    assert len(told) == 1
    assert "CUDA" in told[0]
