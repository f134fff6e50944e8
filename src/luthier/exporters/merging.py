"""Merges a method into the base weights and checks that the outputs stay the same. Read `core/protocols.py` first."""

from __future__ import annotations

import math

import torch

from luthier.core.errors import RunError
from luthier.core.protocols import Family, Tuner
from luthier.core.types import Inputs, LossInputs, SegmentTree

PROBE = 16  # tokens of the check that merging changed nothing
# Largest allowed change of a log-probability of the probe (or of a component of a state). In 16-bit formats the merged
# weights themselves are rounded.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3, torch.bfloat16: 0.5, torch.float16: 0.1}


def merge_into_base(base: Family, tuner: Tuner) -> None:
    """Merge the method into the base weights. Raises `RunError` where outputs then differ by more than rounding."""
    base.train(False)
    before = _compute_probe_outputs(base)
    tuner.merge()
    change = float((_compute_probe_outputs(base) - before).abs().max())
    allowed = TOLERANCE[base.structure.embedding.weight.dtype]  # type: ignore[index]
    if not change <= allowed:
        raise RunError(f"merging changed an output by {change:.2g}; rounding explains at most {allowed}",
                       "train and export with model.dtype: float32, or use the adapter as it is")


@torch.no_grad()
def _compute_probe_outputs(base: Family) -> torch.Tensor:
    """[T] log-probabilities of fixed tokens; [T, H] states for a model without a language-model head."""
    sizes = base.structure.sizes
    if "channels" in sizes:
        place, segment_tree = torch.arange(2), SegmentTree((1, 1), (-1, -1))  # [2]: one segment per image
        shape = (2, sizes["channels"], sizes["height"], sizes["width"])
        inputs = Inputs(place, place * 0, segment_tree, torch.linspace(-1, 1, math.prod(shape)).view(shape))
        target = LossInputs(place, place, torch.ones(2), 2)
    else:
        half = PROBE // 2  # a source segment and its target segment
        place = torch.arange(PROBE)  # [T]
        tokens = (place + 1) * 7 % sizes["vocabulary"]
        first = 0 if base.structure.head is not None else -1  # a model without a head gets two independent segments
        inputs = Inputs(tokens, place, SegmentTree((half, PROBE - half), (-1, first)))
        target = LossInputs(place[half - 1:-1], tokens[half:], torch.ones(PROBE - half), 1)
    need = "states" if base.structure.task == "FEATURE_EXTRACTION" or base.structure.head is None else "token_logps"
    outputs = base.forward(inputs.to(base.device), target.to(base.device), frozenset({need}))
    return outputs.tensors()[need]
