"""When the loop gives the heap's holes back: before a row that is longer than any before, and after every rollout."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from luthier.training import loop


@pytest.mark.parametrize(("rollouts", "released"), [(None, [320, 409]), (object(), [320, 300, 409, 409])])
def test_holes_are_given_back_before_longer_rows(rollouts, released, monkeypatch: pytest.MonkeyPatch) -> None:
    job = SimpleNamespace(rollouts=rollouts, family=SimpleNamespace(device=torch.device("cpu")))
    found: list[int] = []
    longest = 0
    for rows in ((100, 320), (300,), (409, 12), (409,)):
        monkeypatch.setattr(loop, "trim_heap", lambda device, rows=rows: found.append(max(rows)))
        batches = [SimpleNamespace(inputs=SimpleNamespace(tokens=torch.zeros(n))) for n in rows]
        longest = loop._trim_heap(job, batches, longest)
    assert found == released
    assert longest == 409
