"""A base in few bits: methods beside it train by its true gradients, and its weights are never written to.

Read `families/quant.py` first. The oracle is the same model with each weight replaced by what its bits stand for.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lab import TOKENIZER, apart, attach, digest, documents, measured, stir

from luthier.core.errors import BaseError, NotMergeable, RecipeError
from luthier.data.pack import batch
from luthier.families import CausalLM
from luthier.families.quant import expander, quantize
from luthier.train import trainable_share
from tiny import tiny

pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")

BITS = pytest.mark.parametrize("bits", ["nf4", "int8"])
KIND = pytest.mark.parametrize("kind", ["llama", "qwen2"])
# nf4 rounds nothing but the weights. int8 rounds the inputs of every product to eight bits too, so its loss and
# gradients are noisy by some hundredths; one map's own are compared more closely below.
SAME = {"nf4": 1e-5, "int8": 0.15}


def few(kind: str, bits: Any, hidden: int = 32) -> CausalLM:
    model = tiny(kind, dtype=torch.float32, hidden_size=hidden, intermediate_size=64)
    quantize(model, bits)
    return CausalLM(model, TOKENIZER)


def widened(kind: str, family: CausalLM) -> CausalLM:
    """The same model with ordinary weights that hold what the bits stand for."""
    model = tiny(kind, dtype=torch.float32, intermediate_size=64)
    for site in family.anatomy.sites:
        model.get_submodule(site.name).weight.data.copy_(site.matrix())
    return CausalLM(model, TOKENIZER)


@BITS
@KIND
@pytest.mark.parametrize(("method", "settings"), [("lora", {}), ("lora", {"dora": True}), ("adapter", {}), ("bitfit", {})])
def test_loss_and_gradients_are_those_of_the_weights_that_the_bits_stand_for(
        kind: str, bits: str, method: str, settings: dict[str, Any]) -> None:
    family = few(kind, bits)
    wide = widened(kind, family)
    before = digest(family)
    found, wanted = (measured(f, attach(f, method, **settings), [batch(documents())]) for f in (family, wide))
    assert apart(found, wanted) < SAME[bits]
    assert digest(family) == before
    bare = CausalLM(tiny(kind, dtype=torch.float32, intermediate_size=64), TOKENIZER)
    if bits == "nf4":  # the control: without quantisation it is another model
        assert apart(found, measured(bare, attach(bare, method, **settings), [batch(documents())])) > 10 * SAME[bits]


@BITS
def test_the_bits_stand_for_nearly_the_weights(bits: str) -> None:
    family, whole = few("llama", bits, 64), tiny("llama", dtype=torch.float32, hidden_size=64, intermediate_size=64)
    for site in family.anatomy.sites:
        weight = whole.get_submodule(site.name).weight
        if weight.numel() < 4096:  # of so few maxima the second quantisation makes little
            continue
        off = (site.matrix() - weight).abs().mean() / weight.abs().mean()
        assert 0 < off < {"nf4": 0.12, "int8": 0.02}[bits]
        assert expander(whole.get_submodule(site.name)) is None
    stored = sum(t.numel() * t.element_size() for n, t in family.model.state_dict().items() if n.endswith("proj.weight"))
    ordinary = sum(site.inputs * site.outputs * 4 for site in family.anatomy.sites)
    assert stored <= ordinary / {"nf4": 8, "int8": 4}[bits]


@BITS
def test_one_map_forward_and_backward(bits: str) -> None:
    generator = torch.Generator().manual_seed(0)
    model = tiny("llama", dtype=torch.float32, hidden_size=64, intermediate_size=128)
    quantize(model, bits)
    module = model.model.layers[0].mlp.gate_proj
    matrix = expander(module)()
    x = torch.randn(1, 9, 64, generator=generator, requires_grad=True)
    slope = torch.randn(1, 9, 128, generator=generator)
    y = module(x)
    y.backward(slope)
    assert (y - x @ matrix.T).abs().max() < {"nf4": 1e-5, "int8": 0.03}[bits] * y.abs().max()
    assert (x.grad - slope @ matrix).abs().max() < {"nf4": 1e-5, "int8": 0.01}[bits] * x.grad.abs().max()
    assert (x.grad - slope.flip(1) @ matrix).abs().max() > 0.1 * x.grad.abs().max()


@BITS
def test_merging_into_few_bits_is_refused_and_leaves_everything_as_it_was(bits: str) -> None:
    family = few("llama", bits)
    before = digest(family)
    attached = attach(family, "lora")
    stir(attached)
    with pytest.raises(NotMergeable, match="few bits"):
        attached.merge()
    assert digest(family) == before


def test_what_trains_the_base_itself_is_refused() -> None:
    with pytest.raises((BaseError, RecipeError), match="few bits"):
        attach(few("llama", "nf4"), "full")


def test_float64_has_no_few_bits() -> None:
    with pytest.raises(BaseError, match="float64"):
        quantize(tiny("llama"), "nf4")


@BITS
def test_packed_weights_are_counted_as_the_weights_that_they_are(bits: str) -> None:
    family, whole = few("llama", bits), CausalLM(tiny("llama", dtype=torch.float32, hidden_size=32, intermediate_size=64), TOKENIZER)
    shares = [trainable_share(base, attach(base, "lora")) for base in (family, whole)]
    assert shares[0] == shares[1]
