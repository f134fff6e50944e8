"""Mixed precision: under bfloat16 autocast every method trains by nearly the gradient that it has in float32.

Read `lab.py` first. What a step keeps, recomputes or writes in place must not meet a number of another width.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from lab import SFT, attach, base, documents
from torch import Tensor

from luthier.core.protocols import Tuner
from luthier.core.types import Batch
from luthier.data.packing import pack_examples
from luthier.models import CausalLM

WAYS: list[tuple[str, dict[str, Any]]] = [
    ("full", {}), ("lora", {}), ("lora", {"use_dora": True}), ("bitfit", {}), ("ia3", {}), ("ln_tuning", {}),
    ("adapter", {"placement": "houlsby"}), ("adapter", {"placement": "parallel"}),
    ("prompt", {"num_virtual_tokens": 3}), ("ptuning", {"num_virtual_tokens": 3}), ("prefix", {"num_virtual_tokens": 3}), ("prefix", {"num_virtual_tokens": 3, "prefix_projection": True})]


def gradient(family: CausalLM, attached: Tuner, batches: Iterable[Batch], mixed: bool) -> Tensor:
    """Of everything that trains, one after another."""
    for parameter in attached.parameters().values():
        parameter.grad = None
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext():
            total = SFT(family.forward(batch.inputs, batch.target, SFT.required_outputs), batch.target).total
        total.backward()
    return torch.cat([p.grad.flatten() for p in attached.parameters().values() if p.grad is not None])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize(("name", "settings"), WAYS, ids=lambda v: v if isinstance(v, str) else " ".join(map(str, v.values())))
def test_mixed_precision_has_nearly_the_gradient(name: str, settings: dict[str, Any], kind: str) -> None:
    family = base(kind, dtype=torch.float32)
    attached, batches = attach(family, name, **settings), pack_examples(documents(), 60)
    family.train(True)
    exact, mixed = (gradient(family, attached, batches, flag) for flag in (False, True))
    assert mixed.dtype == torch.float32
    assert torch.cosine_similarity(mixed, exact, dim=0) > 0.98
    assert not torch.equal(mixed, exact)  # the control: it was mixed
    family.enable_gradient_checkpointing(0)
    assert torch.equal(gradient(family, attached, batches, True), mixed)
