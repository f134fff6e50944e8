"""A base in is quantized and cannot be trained: methods beside it train by its true gradients, and its weights are never written to.

Read `models/quantization.py` first. The oracle is the same model with each weight replaced by what its bits stand for.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import TOKENIZER, apart, attach, digest, documents, logits, measured, stir

from luthier.assembly.factory import count_trainable
from luthier.core.errors import BaseError, NotMergeable, RecipeError
from luthier.data.packing import build_batch
from luthier.models import CausalLM, ModelConfig, quantization
from luthier.models.loading import load_model
from luthier.models.quantization import get_dequantizer, quantize
from tiny import save_tiny, tiny

pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")

BITS = pytest.mark.parametrize("bits", ["nf4", "int8"])
KIND = pytest.mark.parametrize("kind", ["llama", "qwen2"])
SAME = 1e-5  # nothing but the weights is rounded


def few(kind: str, bits: Any, hidden: int = 32) -> CausalLM:
    model = tiny(kind, dtype=torch.float32, hidden_size=hidden, intermediate_size=64)
    quantize(model, bits)
    return CausalLM(model, TOKENIZER)


def widened(kind: str, family: CausalLM) -> CausalLM:
    """The same model with ordinary weights that hold what the bits stand for."""
    model = tiny(kind, dtype=torch.float32, intermediate_size=64)
    for site in family.structure.linears:
        model.get_submodule(site.name).weight.data.copy_(site.base_weight())
    return CausalLM(model, TOKENIZER)


@BITS
@KIND
@pytest.mark.parametrize(("method", "settings"), [("lora", {}), ("lora", {"use_dora": True}), ("adapter", {}), ("bitfit", {})])
def test_loss_and_gradients_are_those_of_the_weights_that_the_bits_stand_for(
        kind: str, bits: str, method: str, settings: dict[str, Any]) -> None:
    family = few(kind, bits)
    wide = widened(kind, family)
    before = digest(family)
    found, wanted = (measured(f, attach(f, method, **settings), [build_batch(documents())]) for f in (family, wide))
    assert apart(found, wanted) < SAME
    assert digest(family) == before
    bare = CausalLM(tiny(kind, dtype=torch.float32, intermediate_size=64), TOKENIZER)
    # The control: without quantisation it is another model.
    assert apart(found, measured(bare, attach(bare, method, **settings), [build_batch(documents())])) > 100 * SAME


@BITS
def test_the_bits_stand_for_nearly_the_weights(bits: str) -> None:
    family, whole = few("llama", bits, 64), tiny("llama", dtype=torch.float32, hidden_size=64, intermediate_size=64)
    for site in family.structure.linears:
        weight = whole.get_submodule(site.name).weight
        if weight.numel() < 4096:  # of so few maxima the second quantisation makes little
            continue
        off = (site.base_weight() - weight).abs().mean() / weight.abs().mean()
        assert 0 < off < {"nf4": 0.12, "int8": 0.02}[bits]
        assert get_dequantizer(whole.get_submodule(site.name)) is None
    stored = sum(t.numel() * t.element_size() for n, t in family.model.state_dict().items() if n.endswith("proj.weight"))
    ordinary = sum(site.in_features * site.out_features * 4 for site in family.structure.linears)
    assert stored <= ordinary / {"nf4": 8, "int8": 4}[bits]


@BITS
def test_one_map_forward_and_backward(bits: str) -> None:
    generator = torch.Generator().manual_seed(0)
    model = tiny("llama", dtype=torch.float32, hidden_size=64, intermediate_size=128)
    quantize(model, bits)
    module = model.model.layers[0].mlp.gate_proj
    matrix = get_dequantizer(module)()
    x = torch.randn(1, 9, 64, generator=generator, requires_grad=True)
    slope = torch.randn(1, 9, 128, generator=generator)
    y = module(x)
    y.backward(slope)
    assert (y - x @ matrix.T).abs().max() < 1e-5 * y.abs().max()
    assert (x.grad - slope @ matrix).abs().max() < 1e-5 * x.grad.abs().max()
    assert torch.equal(module.eval()(x), y)  # what is measured is what was trained
    assert (x.grad - slope.flip(1) @ matrix).abs().max() > 0.1 * x.grad.abs().max()


@pytest.mark.parametrize("shape", [(96, 64), (7, 384), (5, 96), (640, 128)])
def test_four_bits_are_expanded_as_the_library_does(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    linear = torch.nn.Linear(shape[1], shape[0], bias=False)
    module = quantization._quantize_linear(linear, "nf4", torch.float32, "cpu")
    whole = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    for at_once in (1, 300, 1 << 18):  # a row at a time, some, all
        monkeypatch.setattr(quantization, "CHUNK_WEIGHTS", at_once)
        assert torch.equal(quantization._dequantize(module), whole)
    assert 0 < (whole - linear.weight).abs().max() < 0.1


@pytest.mark.parametrize("shape", [(96, 64), (7, 384)])
def test_eight_bits_are_off_by_half_a_step_at_most(shape: tuple[int, int]) -> None:
    """Dettmers et al. 2022, section 2.1: a row's step is its absolute maximum over 127. The library
    rounds a weight to float16 before: by 2^-11 of itself, and so by 127 / 2^11 of a step at most."""
    linear = torch.nn.Linear(shape[1], shape[0], bias=False)
    found = quantization._dequantize(quantization._quantize_linear(linear, "int8", torch.float32, "cpu"))
    step = linear.weight.detach().abs().amax(1, keepdim=True) / 127
    off = ((found - linear.weight) / step).abs().max()
    assert 0.3 < off < 0.5 + 127 / 2**11
    assert ((found * 127 / 128 - linear.weight) / step).abs().max() > 0.9  # the control: a step of another size


@BITS
def test_a_product_keeps_nothing_and_a_trained_bias_has_its_gradient(bits: str) -> None:
    linear = torch.nn.Linear(64, 96)
    module = quantization._quantize_linear(linear, bits, torch.float32, "cpu")
    module.bias.requires_grad_(True)
    kept: list[torch.Tensor] = []
    x = torch.randn(2, 9, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda saved: saved):
        y = module(x)
    assert not kept
    assert not y._is_view()
    slope = torch.randn_like(y)
    y.backward(slope)
    assert torch.allclose(module.bias.grad, slope.sum((0, 1)), atol=1e-5)
    assert torch.allclose(y, x @ quantization._dequantize(module).T + linear.bias, atol=1e-5)


@BITS
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_base_read_from_its_file_is_the_one_quantised_in_memory(bits: str, stored: torch.dtype, tmp_path: Path) -> None:
    """It is exchanged map by map, straight from the mapped file, whatever the file's type."""
    save_tiny(tmp_path / "base", "llama", dtype=stored, intermediate_size=64)
    model, _ = load_model(ModelConfig(name_or_path=str(tmp_path / "base"), quantize=bits))
    wanted = tiny("llama", dtype=stored, intermediate_size=64).float()
    quantize(wanted, bits)
    assert model.dtype == model.config.dtype == torch.float32
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, wanted(input_ids=ids).logits)


@pytest.mark.skipif(sys.platform != "linux", reason="pages are counted by Linux")
def test_pages_of_an_exchanged_weight_go_back(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    save_file({"w": torch.randn(1 << 22), "v": torch.ones(5)}, tmp_path / "a.safetensors")
    weight = load_file(tmp_path / "a.safetensors")["w"]
    total = float(weight.sum())
    before = resident()
    files = quantization._MappedFiles()
    files.forget(torch.randn(1 << 16))  # in no file: left alone
    files.forget(weight)
    assert before - resident() > 15e6
    assert float(weight.sum()) == total  # whoever reads it again reads the file


def resident() -> int:
    """Bytes of mapped files that are in memory."""
    return int(Path("/proc/self/status").read_text().partition("RssFile:")[2].split()[0]) * 1024


@BITS
def test_merging_into_few_bits_is_refused_and_leaves_everything_as_it_was(bits: str) -> None:
    family = few("llama", bits)
    before = digest(family)
    attached = attach(family, "lora")
    stir(attached)
    with pytest.raises(NotMergeable, match="is quantized and cannot be trained"):
        attached.merge()
    assert digest(family) == before


@BITS
def test_biases_merge_into_few_bits_as_they_are(bits: str) -> None:
    family = few("qwen2", bits)
    attached = attach(family, "bitfit")
    wanted = logits(family)
    attached.merge()
    assert (logits(family) - wanted).abs().max() < 1e-5 * wanted.abs().max()


@BITS
@pytest.mark.parametrize("name", ["OFT", "LORA", "IA3", "VERA"])
def test_tuners_of_peft_are_not_merged_into_few_bits(name: str, bits: str) -> None:
    pytest.importorskip("peft")
    family = few("qwen2", bits)
    attached = attach(family, "peft", type=name, config={"r": 2} if name in ("LORA", "VERA") else {})
    wanted = logits(family)
    with pytest.raises(NotMergeable, match="is quantized and cannot be trained"):
        attached.merge()
    assert torch.equal(logits(family), wanted)


@pytest.mark.parametrize("name", ["LOHA", "LOKR"])
def test_tuners_that_cannot_stand_beside_packed_bits_say_so_at_once(name: str) -> None:
    pytest.importorskip("peft")
    family = few("qwen2", "nf4")
    wanted = logits(family)
    with pytest.raises(RecipeError, match=f"{name} does not support this quantization"):
        attach(family, "peft", type=name, config={"r": 2})
    assert torch.equal(logits(family), wanted)
    attach(few("qwen2", "int8"), "peft", type=name, config={"r": 2})


def test_what_trains_the_base_itself_is_refused() -> None:
    with pytest.raises((BaseError, RecipeError), match="is quantized and cannot be trained"):
        attach(few("llama", "nf4"), "full")


def test_float64_has_no_few_bits() -> None:
    with pytest.raises(BaseError, match="float64"):
        quantize(tiny("llama"), "nf4")


@BITS
def test_packed_weights_are_counted_as_the_weights_that_they_are(bits: str) -> None:
    family, whole = few("llama", bits), CausalLM(tiny("llama", dtype=torch.float32, hidden_size=32, intermediate_size=64), TOKENIZER)
    shares = [count_trainable(base, attach(base, "lora")) for base in (family, whole)]
    assert shares[0] == shares[1]


@BITS
@pytest.mark.parametrize("kind", ["gpt2", "mixtral"])
def test_a_base_that_would_stay_whole_is_refused(bits: Any, kind: str) -> None:
    """GPT-2's maps are transposed ones, a mixture's experts one parameter: both would be left as they are."""
    model = tiny(kind, dtype=torch.float32)
    with pytest.raises(BaseError, match="fused experts, which are not supported"):
        quantize(model, bits)


@BITS
def test_an_encoders_own_head_stays_whole(bits: Any, tmp_path: Path) -> None:
    save_tiny(tmp_path, "bert", dtype=torch.float32, words=True)
    model, _ = load_model(ModelConfig(name_or_path=str(tmp_path), quantize=bits, device="cpu"), with_mlm_head=True)
    few = {name for name, module in model.named_modules()
           if "Linear" in type(module).__name__ and type(module) is not torch.nn.Linear}
    assert few
    assert all(name.startswith("bert.encoder.") for name in few)
