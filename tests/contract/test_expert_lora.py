"""LoRA on experts that are one parameter: PEFT's `target_parameters` on the same weights. Read `lab.py` first."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import SFT, TOKENIZER, apart, base, documents, logits, measured, stir
from lab import attach as attached_to
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from luthier import assembly
from luthier.assembly.factory import attach_method
from luthier.assembly.run_io import save_tuned
from luthier.core.errors import RecipeError, RunError
from luthier.core.protocols import Tuner
from luthier.data.packing import build_batch
from luthier.methods import METHODS, LoraConfig
from luthier.methods.multi_adapter import AdapterManager
from luthier.models import CausalLM
from luthier.training.run_folder import Run
from tiny import IM_END, VOCABULARY, save_tiny, tiny

pytestmark = pytest.mark.usefixtures("double")
SAME, FAR = 1e-9, 1e-3
ALL = ("q", "experts")
TARGETS = pytest.mark.parametrize(("targets", "parameters"), [
    (ALL, ["experts.gate_up_proj", "experts.down_proj"]), (("q", "experts.down_proj"), ["experts.down_proj"]),
    (("q", "mlp.experts.gate_up_proj"), ["mlp.experts.gate_up_proj"])])
KINDS = ("mixtral", "qwen3_moe", "gpt_oss")
KIND = pytest.mark.parametrize("kind", KINDS)


def model(kind: str) -> Any:
    """gpt_oss: weights turned round, biases, gates of its own making."""
    if kind == "mixtral":
        return tiny(kind)
    common = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.15, "eos_token_id": IM_END,
              "pad_token_id": None, "num_experts_per_tok": 2, "experts_implementation": "eager"}
    own = {"qwen3_moe": {"num_experts": 5, "moe_intermediate_size": 24, "intermediate_size": 48},
           "gpt_oss": {"num_local_experts": 3, "intermediate_size": 24,
                       "layer_types": ["full_attention", "full_attention"]}}[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **common, **own), dtype=torch.float64)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if parameter.dim() == 1 or name.endswith("_bias"):
                    parameter += 0.1 * torch.randn_like(parameter)
    return made.eval()


def family(kind: str) -> CausalLM:
    # The sinks of gpt_oss's attention are refused when a base is opened; here only its experts are looked at.
    made = CausalLM(model(kind), TOKENIZER, layout="packed" if kind == "gpt_oss" else None)
    if kind == "gpt_oss":
        made.model.set_attn_implementation("eager")  # whose attention has sinks, which ours knows nothing of
    return made


def attach(on: CausalLM, targets: Sequence[str] = ALL, **settings: Any) -> Tuner:
    return attached_to(on, "lora", target_modules=tuple(targets), rank=3, alpha=7.0, **settings)


def theirs(kind: str, parameters: list[str]) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=7, target_modules=["q_proj"],
                             target_parameters=parameters)
    return peft.get_peft_model(model(kind), config, autocast_adapter_dtype=False).eval()


def outcome(whole: Any, parameters: dict[str, Any]) -> dict[str, Tensor]:
    tokens = torch.tensor([[7, 201, 33, 33, 90, 255, 12, 64, 3, 150, 41, 8]])
    found = whole(input_ids=tokens).logits
    slope = torch.sin(torch.arange(found.numel(), dtype=torch.float64)).view_as(found)
    gradients = torch.autograd.grad((found * slope).sum(), list(parameters.values()))
    return {"logits": found.detach(), **dict(zip(parameters, gradients, strict=True))}


@KIND
@TARGETS
def test_it_is_pefts_in_function_and_gradients(kind: str, targets: tuple[str, ...], parameters: list[str]) -> None:
    other, ours = theirs(kind, parameters), family(kind)
    attached = attach(ours, targets)
    wanted = {n.replace(".default", ""): p for n, p in other.named_parameters() if "lora_" in n}
    state = attached.state()
    assert {n: t.shape for n, t in state.items()} == {n: p.shape for n, p in wanted.items()}
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(state[name])
    found = outcome(ours.model, attached.parameters())
    assert apart(found, outcome(other, wanted)) < SAME
    stir(attached)
    assert apart(outcome(ours.model, attached.parameters()), found) > FAR


@KIND
def test_disabled_is_the_base_bit_for_bit_and_merged_is_attached(kind: str) -> None:
    ours = family(kind)
    bare = logits(ours)
    attached = attach(ours, stirred=False)
    assert (logits(ours) - bare).abs().max() < SAME
    stir(attached)
    tuned = logits(ours)
    assert (tuned - bare).abs().max() > 0.01
    with attached.disabled():
        assert torch.equal(logits(ours), bare)
    attached.merge()
    assert (logits(ours) - tuned).abs().max() < SAME
    with attached.disabled():
        assert torch.equal(logits(ours), bare)
    attached.unmerge()
    assert torch.equal(logits(ours), tuned)
    fresh = family(kind)
    attach(fresh, seed=9, stirred=False).load(attached.state())
    assert torch.equal(logits(fresh), tuned)


@pytest.mark.parametrize("real", ["eager", "batched_mm"])
def test_the_function_that_ran_before_runs_while_nothing_acts(real: str) -> None:
    ours = family("mixtral")
    ours.model.set_experts_implementation(real)
    bare = logits(ours)
    attached = attach(ours)
    with attached.disabled():
        assert torch.equal(logits(ours), bare)
    assert ours.model.config._experts_implementation == real


def test_a_mixture_that_nobody_touches_keeps_its_own_function() -> None:
    ours = family("mixtral")
    modules = [block.mlp.experts for block in ours.structure.layers]
    attached_to(ours, "lora")
    assert all(module.config is ours.model.config for module in modules)
    attach(ours)
    assert all(module.config is not ours.model.config for module in modules)


def test_a_row_trains_packed_recomputed_and_every_parameter() -> None:
    ours, rows = family("mixtral"), [build_batch(documents())]
    attached = attach(ours)
    found = measured(ours, attached, rows)
    assert all(float(t.abs().sum()) > 0 for t in found.values())
    padded = CausalLM(model("mixtral"), TOKENIZER, layout="padded")
    assert apart(measured(padded, attach(padded), rows), found) < SAME
    again = family("mixtral")
    again.train(True)
    again.enable_gradient_checkpointing()
    assert apart(measured(again, attach(again), rows), found) < SAME


def test_folders_go_both_ways(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    ours, origin = base("mixtral"), save_tiny(tmp_path / "base", "mixtral")
    attached = attach(ours)
    made = assembly.build_recipe({"model": str(origin), "data": "-", "method": attached.config.model_dump()})
    (tmp_path / "run").mkdir()
    save_tuned(Run(tmp_path / "run"), made, ours, attached)
    loaded = peft.PeftModel.from_pretrained(tiny("mixtral"), tmp_path / "run", autocast_adapter_dtype=False).eval()
    assert (loaded(input_ids=torch.arange(40, 60)[None]).logits[0] - logits(ours)).abs().max() < SAME

    loaded.save_pretrained(tmp_path / "theirs")
    settings = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    fresh = base("mixtral")
    attach_method(fresh, LoraConfig.from_peft(settings), 1).load(load_file(tmp_path / "theirs" / "adapter_model.safetensors"))
    assert torch.equal(logits(fresh), logits(ours))


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"dropout": 0.1}, {"init_lora_weights": "pissa"},
                                      {"rank_pattern": {"experts.down_proj": 2}}, {"alpha_pattern": {"experts": 2.0}}])
def test_a_variant_without_a_form_for_experts_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=f"do not support {next(iter(settings))}"):
        attach(family("mixtral"), **settings)


def test_a_dense_model_has_no_experts() -> None:
    with pytest.raises(RecipeError, match="'experts' matches no linear layer"):
        attach(base("llama"))


def test_tokens_of_a_row_cannot_be_told_apart() -> None:
    ours = family("mixtral")
    manager = AdapterManager(ours.structure)
    for name in "ab":
        manager.add(name, attach_method(ours, METHODS["lora"](target_modules=("experts",)), 0))
    ours.router = manager
    row = build_batch(documents()[:2])
    with pytest.raises(RunError, match="some tokens of a row"):
        ours.forward(manager.with_adapters(row.inputs, ["a", "b"]), row.target, SFT.required_outputs)
