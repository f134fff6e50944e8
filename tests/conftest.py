"""Being here puts this folder on Python's path, so that every test can import `tiny`.

One fixture: double precision without a leak.

Transformers' norms, rotary angles and softmaxes compute in float32 whatever the model's dtype. Their rounding would hide
differences below 1e-7; here they compute in float64, so that two ways to one number agree to 1e-9 or differ by a fault.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch

from tiny import ENCODERS, KINDS, VISIONS, tiny

os.environ["LUTHIER_TRACEBACK"] = "1"  # an error that no code has foreseen fails its test with a traceback


class _Wide:
    """torch, but its float32 is float64."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (*KINDS, *ENCODERS, *VISIONS):
        home = sys.modules[type(tiny(kind)).__module__]
        monkeypatch.setattr(home, "torch", _Wide())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
