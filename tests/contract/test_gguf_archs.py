"""GGUF files of Gemma and GPT-2: llama.cpp computes from them what Transformers computes. Read `test_gguf.py` first.

On a CPU llama.cpp looks the activation up in a table of sixteen bits, wherever its argument is between -10 and 10. So
the models are compared twice: with a gate so steep that its argument is never there, exactly, and as they come, as
closely as sixteen bits are.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from lab import attach, logits
from lab_gguf import TEXTS, distance, llama, opened, saved, theirs
from test_gguf_pieces import tokenizer
from torch import Tensor

from luthier.api.export import export
from luthier.core.errors import BaseError
from luthier.models import CausalLM
from luthier.models.gguf import archs as archs
from luthier.models.gguf import writer as out
from tiny import KINDS, tiny

TOKENIZER = tokenizer("Gemma's")
GATE = re.compile(r"(gate_proj|c_fc)$")
SIZES = {"vocab_size": 800, "eos_token_id": 2, "bos_token_id": 1}
LINEAR = {"full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
          "sliding_attention": {"rope_type": "default", "rope_theta": 300.0}}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("gemma", {}),
    "gemma, wide heads": ("gemma", {"head_dim": 16, "num_key_value_heads": 1}),
    "gemma2": ("gemma2", {}),
    "gemma2, linear angles": ("gemma2", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}}),
    "gemma2, other windows": ("gemma2", {"num_hidden_layers": 3, "layer_types": [
        "full_attention", "full_attention", "sliding_attention"]}),
    "gemma2, 46 layers": ("gemma2", {"num_hidden_layers": 46, "query_pre_attn_scalar": 8, "head_dim": 16}),
    "gemma3": ("gemma3", {}),
    "gemma3, angles": ("gemma3", {"rope_parameters": LINEAR, "final_logit_softcapping": 3.0}),
    "gemma3, no windows": ("gemma3", {"layer_types": ["full_attention"] * 2}),
    "gemma3, untied": ("gemma3", {"tie_word_embeddings": False}),
    "gpt2": ("gpt2", {}),
    "gpt2, untied, narrow": ("gpt2", {"tie_word_embeddings": False, "n_inner": 40}),
}


def family(name: str, steep: bool = True, **overrides: Any) -> CausalLM:
    kind, settings = MODELS[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(KINDS, "gemma", {**KINDS["qwen2"], "model_type": "gemma"})
        model = tiny(kind, dtype=torch.float32, **{**SIZES, "tie_word_embeddings": True, **settings, **overrides})
    if steep:
        steepen(model)
    return CausalLM(model, TOKENIZER)


@torch.no_grad()
def steepen(model: Any) -> None:
    for path, weight in model.named_parameters():
        if GATE.search(path.rpartition(".")[0]):
            weight *= 1e9
        if path.endswith(("down_proj.weight", "mlp.c_proj.weight")):
            weight *= 1e-9


def ids(length: int = 40) -> list[int]:
    found = TOKENIZER("I'll see 12 things or 日本, they'll return x " * 4).input_ids
    return found[:length]


def wanted(base: CausalLM, tokens: list[int], steep: bool = True) -> Tensor:
    """[T, V], having looked that the gates are as steep as they should be."""
    least: list[float] = []
    hooks = [module.register_forward_hook(lambda _, __, y: least.append(float(y.abs().min())))
             for path, module in base.model.named_modules() if GATE.search(path)]
    found = logits(base, tokens)
    for hook in hooks:
        hook.remove()
    assert (min(least) > 10) == steep
    return found


@llama
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_what_transformers_computes(name: str, tmp_path: Path) -> None:
    base = family(name)
    out.write_gguf(base, tmp_path / "a.gguf", "float32")
    assert distance(theirs(tmp_path / "a.gguf", ids()), wanted(base, ids())) < 2e-5


@llama
@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3", "gpt2"])
def test_the_activation_too_as_closely_as_its_table(name: str, tmp_path: Path) -> None:
    base = family(name, steep=False)
    out.write_gguf(base, tmp_path / "a.gguf", "float32")
    right = wanted(base, ids(), steep=False)
    assert distance(theirs(tmp_path / "a.gguf", ids()), right) < 5e-3
    for path in [path for path, _ in base.model.named_modules() if path.endswith((".act_fn", ".act"))]:
        base.model.set_submodule(path, torch.nn.SiLU())
    assert distance(theirs(tmp_path / "a.gguf", ids()), logits(base, ids())) > 5e-2


@llama
@pytest.mark.parametrize(("name", "forgotten"), [
    ("gemma", "raised"), ("gemma2", "scores"), ("gemma2", "logits"), ("gemma2", "windows"), ("gemma3", "windows"),
    ("gemma3, angles", "angles"), ("gpt2", "epsilon")])
def test_the_comparison_would_see_a_mistake(name: str, forgotten: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = family(name)
    if forgotten == "raised":
        monkeypatch.setattr(archs.TensorNames, "raised", lambda self, name, weight: weight)
    else:
        key = {"scores": "attn_logit_softcapping", "logits": "final_logit_softcapping", "windows": "sliding_window",
               "angles": "rope_freq_base_swa", "epsilon": "layer_norm_eps"}[forgotten]
        right = getattr(gguf.GGUFWriter, f"add_{key}")
        monkeypatch.setattr(gguf.GGUFWriter, f"add_{key}", lambda self, value: right(self, 2 * value + 1))
    out.write_gguf(base, tmp_path / "a.gguf", "float32")
    assert distance(theirs(tmp_path / "a.gguf", ids()), wanted(base, ids())) > 1e-3


@llama
@pytest.mark.parametrize("name", ["gemma3", "gpt2"])
@pytest.mark.parametrize(("numbers", "close"), [("float16", 1e-2), ("q8_0", 0.3)])
def test_smaller_numbers_are_close(name: str, numbers: Any, close: float, tmp_path: Path) -> None:
    base = family(name, steep=False)
    out.write_gguf(base, tmp_path / "a.gguf", numbers)
    assert distance(theirs(tmp_path / "a.gguf", ids()), wanted(base, ids(), steep=False)) < close


@llama
@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3", "gpt2"])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "rank": 4, "alpha_pattern": {"up": 3.0}}])
def test_a_lora_on_the_base_is_the_run(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    base = family(name)
    out.write_gguf(base, tmp_path / "base.gguf", "float32")
    bare = logits(base, ids())
    attached = attach(base, "lora", **settings)
    changes = {layer.site.name: out.LoraDelta(*layer.get_factors(), layer.scale) for layer in attached.layers}  # type: ignore[attr-defined]
    out.write_gguf_adapter(base, changes, tmp_path / "adapter.gguf")
    right = wanted(base, ids())
    assert distance(bare, right) > 1e-2
    assert distance(theirs(tmp_path / "base.gguf", ids(), lora_path=str(tmp_path / "adapter.gguf")), right) < 1e-4
    attached.merge()
    out.write_gguf(base, tmp_path / "merged.gguf", "float32")
    assert distance(theirs(tmp_path / "merged.gguf", ids()), right) < 1e-4


@llama
def test_a_run_on_gemma_goes_the_whole_way(tmp_path: Path) -> None:
    base = family("gemma2")
    run = saved(tmp_path, base, {"name": "lora"})
    right = wanted(base, ids())
    file, adapter = export(run, "gguf", dtype="float32"), export(run, "gguf-adapter")
    assert distance(theirs(file, ids()), right) < 1e-4
    with opened(file) as found:
        for text in TEXTS:
            assert found.tokenize(text.encode(), add_bos=True, special=True) == TOKENIZER(text).input_ids
    out.write_gguf(family("gemma2"), tmp_path / "base.gguf", "float32")
    assert distance(theirs(tmp_path / "base.gguf", ids(), lora_path=str(adapter)), right) < 1e-4


@pytest.mark.parametrize(("name", "overrides", "said"), [
    ("gemma", {"hidden_act": "silu"}, "'silu'"), ("gemma2", {"hidden_activation": "relu"}, "'relu'"),
    ("gemma", {"use_bidirectional_attention": True}, "bidirectional attention"),
    ("gemma", {"tie_word_embeddings": False}, "no place for 'lm_head'"),
    ("gemma2", {"attention_bias": True}, "does not add"),
    ("gemma2", {"query_pre_attn_scalar": 10}, r"sqrt\(10\)"), ("gemma3", {"query_pre_attn_scalar": 10}, r"sqrt\(10\)"),
    ("gemma2", {"attn_logit_softcapping": None}, "no soft cap"), ("gemma2", {"final_logit_softcapping": None}, "no soft cap"),
    ("gpt2", {"activation_function": "gelu"}, "'gelu'"), ("gpt2", {"scale_attn_weights": False}, "head_dim.* alone"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "head_dim.* alone"),
    ("gemma3", {"attn_logit_softcapping": 5.0}, "soft cap of 5.0"),
    ("gemma3", {"rope_parameters": {**LINEAR, "sliding_attention": LINEAR["full_attention"]}}, "layers with a sliding window"),
    ("gemma3", {"rope_parameters": {**LINEAR, "full_attention": {**LINEAR["full_attention"], "rope_type": "yarn"}}}, "yarn"),
])
def test_a_model_that_llama_cpp_would_compute_otherwise_is_refused(name: str, overrides: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(BaseError, match=said):
        out.write_gguf(family(name, **overrides), tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())
