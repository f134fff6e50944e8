"""Parts of architectures that `tiny.py` does not have: where methods enter them, and what is not put in their place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from luthier.methods.adapter import AdapterConfig
from luthier.models import CausalLM
from luthier.models.activation_recompute import ActivationRecomputer, GatedMLP, replace_gated_mlps
from tiny import tiny_tokenizer

SIZES: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": 0.0, "init_std": 0.3},
    "phi": {"intermediate_size": 24, "initializer_range": 0.3}}


def base(kind: str) -> CausalLM:
    config = AutoConfig.for_model(kind, vocab_size=264, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                  max_position_embeddings=32, bos_token_id=None, eos_token_id=258, pad_token_id=1,
                                  **SIZES[kind])
    torch.manual_seed(0)
    return CausalLM(AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval(), tiny_tokenizer())


@pytest.mark.parametrize(("kind", "placement", "read", "written"), [
    ("opt", "parallel", "fc1", "fc2"), ("opt", "pfeiffer", "fc2", "fc2"),
    ("phi", "parallel", "mlp.fc1", "mlp.fc2"), ("phi", "houlsby", "self_attn.dense", "self_attn.dense")])
def test_an_adapter_reads_and_writes_at_its_own_place(kind: str, placement: Any, read: str, written: str) -> None:
    family = base(kind)
    family.structure.model.requires_grad_(False)
    attached = AdapterConfig(placement=placement).attach(family.structure, seed=0)
    with torch.no_grad():
        for parameter in attached.parameters().values():
            parameter += 0.3
    block = family.structure.layers[0].module
    source, last = block.get_submodule(read), block.get_submodule(written)
    seen: dict[str, Tensor] = {}
    source.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    last.register_forward_pre_hook(lambda _, args: seen.update(inner=args[0]))
    last.register_forward_hook(lambda _, args, out: seen.update(out=out))
    family.model(input_ids=torch.tensor([[5, 9, 70, 41]]))
    made = next(iter(attached.bottlenecks.values()))
    plain = F.linear(seen["inner"], last.weight, last.bias)
    change = made(seen["x"] if placement == "parallel" else plain)
    assert change.abs().max() > 0.1
    assert torch.allclose(seen["out"], plain + change, rtol=0, atol=1e-12)


class Bounded(LlamaMLP):
    """DeepSeek V4's and GLM 5's: large numbers are cut off."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x).clamp(max=7), self.up_proj(x).clamp(-7, 7)
        return self.down_proj(self.act_fn(gate) * up)


class Dropping(LlamaMLP):
    """Seed-OSS's: dropout that no module stands for."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.1, self.training)


@pytest.mark.parametrize(("make", "replaced"), [(LlamaMLP, True), (Bounded, False), (Dropping, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_mlp_that_computes_something_else_is_left_alone(make: type, replaced: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    holder = nn.ModuleDict({"mlp": make(AutoConfig.for_model("llama", hidden_size=32, intermediate_size=48))}).to(dtype).eval()
    before = torch.get_rng_state()
    replace_gated_mlps(holder, ActivationRecomputer())
    assert isinstance(holder["mlp"], GatedMLP) is replaced
    assert not any(module.training for module in holder.modules())
    assert torch.equal(torch.get_rng_state(), before)
