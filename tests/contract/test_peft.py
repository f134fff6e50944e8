"""Ours against PEFT's: the same weights give the same function and the same gradients, and folders go both ways.

Read `lab.py` first. PEFT is used by tests alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import TOKENIZER, apart, attach, base, digest, logits
from safetensors.torch import load_file

from luthier import assembly
from luthier.assembly.factory import attach_method
from luthier.assembly.run_io import open_run, save_tuned
from luthier.core.errors import RunError
from luthier.methods import LoraConfig
from luthier.models import CausalLM
from luthier.training.run_folder import Run
from tiny import save_tiny, tiny

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("double")

SAME, FAR = 1e-9, 1e-3
TOKENS = torch.tensor([[7, 201, 33, 33, 90, 255, 12, 64, 3, 150, 41, 8]])
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# kind, our settings, PEFT's settings
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("llama", {"rank": 4, "alpha": 12.0}, {"r": 4, "lora_alpha": 12.0, "target_modules": LINEAR}),
    "biases": ("qwen2", {"rank": 4, "alpha": 12.0}, {"r": 4, "lora_alpha": 12.0, "target_modules": LINEAR}),
    "rslora": ("llama", {"rank": 4, "use_rslora": True},
               {"r": 4, "lora_alpha": 16, "use_rslora": True, "target_modules": LINEAR}),
    "dora": ("llama", {"rank": 4, "use_dora": True}, {"r": 4, "lora_alpha": 16, "use_dora": True, "target_modules": LINEAR}),
    "dora with biases": ("qwen2", {"rank": 4, "use_dora": True},
                         {"r": 4, "lora_alpha": 16, "use_dora": True, "target_modules": LINEAR}),
    "gaussian": ("llama", {"rank": 4, "init_lora_weights": "gaussian"},
                 {"r": 4, "lora_alpha": 16, "init_lora_weights": "gaussian", "target_modules": LINEAR}),
    "q and v": ("gemma3", {"target_modules": ("q", "v")}, {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}),
    "expression": ("llama", {"target_modules": (r"model\.layers\.1\.mlp\..*",)},
                   {"r": 8, "lora_alpha": 16, "target_modules": r"model\.layers\.1\.mlp\..*_proj"}),
    "patterns": ("llama", {"rank": 4, "rank_pattern": {"q": 2, "layers.1.mlp.down_proj": 6},
                           "alpha_pattern": {"v": 32.0, "q_proj": 5.0}},
                 {"r": 4, "lora_alpha": 16, "target_modules": LINEAR,
                  "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6},
                  "alpha_pattern": {"v_proj": 32.0, "q_proj": 5.0}}),
    "conv1d": ("gpt2", {}, {"r": 8, "lora_alpha": 16, "target_modules": ["c_attn", "c_proj", "c_fc"],
                            "fan_in_fan_out": True}),
    "conv1d dora rslora": ("gpt2", {"use_dora": True, "use_rslora": True},
                           {"r": 8, "lora_alpha": 16, "target_modules": ["c_attn", "c_proj", "c_fc"],
                            "fan_in_fan_out": True, "use_dora": True, "use_rslora": True}),
    "mixture": ("mixtral", {}, {"r": 8, "lora_alpha": 16, "target_modules": LINEAR[:4]}),
}
CASE = pytest.mark.parametrize("case", CASES)
PISSA = pytest.mark.parametrize(("kind", "rslora"), [("llama", False), ("qwen2", True), ("gpt2", False)])


def theirs(kind: str, settings: dict[str, Any]) -> Any:
    config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    return peft.get_peft_model(tiny(kind), config, autocast_adapter_dtype=False).eval()


def adapter(model: Any) -> dict[str, torch.nn.Parameter]:
    """PEFT's adapter parameters by the names that they have in its files."""
    return {n.replace(".default", "").removesuffix(".weight" if "magnitude" in n else "."): p
            for n, p in model.named_parameters() if "lora_" in n}


def outcome(model: Any, parameters: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Logits and gradients of an odd function of them."""
    found = model(input_ids=TOKENS).logits
    slope = torch.sin(torch.arange(found.numel(), dtype=torch.float64)).view_as(found)
    gradients = torch.autograd.grad((found * slope).sum(), list(parameters.values()))
    return {"logits": found.detach(), **dict(zip(parameters, gradients, strict=True))}


def save(family: CausalLM, attached: Any, place: Path, method: LoraConfig, origin: Path) -> Path:
    """Our run folder's adapter, as `train` writes it."""
    made = assembly.build_recipe({"model": str(origin), "data": "-", "method": method.model_dump()})
    place.mkdir()
    save_tuned(Run(place), made, family, attached)
    return place


@CASE
def test_the_same_weights_give_the_same_function_and_gradients(case: str) -> None:
    kind, ours, settings = CASES[case]
    other = theirs(kind, settings)
    family = base(kind)
    attached = attach(family, "lora", **ours)
    wanted = adapter(other)
    state = attached.state()
    assert {n: t.shape for n, t in state.items()} == {n: p.shape for n, p in wanted.items()}
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(state[name])
    found = outcome(family.model, attached.parameters())
    assert apart(found, expected := outcome(other, wanted)) < SAME
    with torch.no_grad():
        next(iter(wanted.values())).mul_(1.1)
    assert apart(outcome(other, wanted), expected) > FAR


@CASE
def test_our_folder_loads_in_peft(case: str, tmp_path: Path) -> None:
    kind, ours, _ = CASES[case]
    family, origin = base(kind), save_tiny(tmp_path / "base", kind)
    bare = logits(family)
    attached = attach(family, "lora", **ours)
    folder = save(family, attached, tmp_path / "run", attached.config, origin)
    model = peft.PeftModel.from_pretrained(tiny(kind), folder, autocast_adapter_dtype=False).eval()
    again = CausalLM(model, TOKENIZER)
    assert (logits(again) - logits(family)).abs().max() < SAME
    assert (logits(family) - bare).abs().max() > FAR
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(origin)


@CASE
def test_a_folder_of_pefts_loads_here(case: str, tmp_path: Path) -> None:
    kind, _, settings = CASES[case]
    other = theirs(kind, settings)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in adapter(other).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        wanted = other(input_ids=TOKENS).logits
    other.save_pretrained(tmp_path)
    method = LoraConfig.from_peft(json.loads((tmp_path / "adapter_config.json").read_text()))
    family = base(kind)
    attached = attach_method(family, method, 0)
    attached.load(load_file(tmp_path / "adapter_model.safetensors"))
    with torch.no_grad():
        assert (family.model(input_ids=TOKENS).logits - wanted).abs().max() < SAME
        with attached.disabled():
            assert (family.model(input_ids=TOKENS).logits - wanted).abs().max() > FAR


def test_a_folder_of_pefts_opens_as_a_run(tmp_path: Path) -> None:
    origin = save_tiny(tmp_path / "base", "llama", dtype=torch.float32)
    other = theirs("llama", CASES["plain"][2])
    other.peft_config["default"].base_model_name_or_path = str(origin)
    other.save_pretrained(tmp_path / "run")
    made, family, attached = open_run(Run(tmp_path / "run"))
    assert made.method.rank == 4
    assert attached is not None
    assert attached.state().keys() == adapter(other).keys()
    assert family.structure.sizes["layers"] == 2


# ---------------------------------------------------------------- PiSSA: PEFT changes the base, we do not


@PISSA
def test_pissa_starts_and_moves_as_in_peft(kind: str, rslora: bool) -> None:
    other = theirs_in_float32(kind, {
        "r": 4, "lora_alpha": 8, "init_lora_weights": "pissa", "use_rslora": rslora, "fan_in_fan_out": kind == "gpt2",
        "target_modules": ["c_attn", "c_proj", "c_fc"] if kind == "gpt2" else LINEAR})
    family = base(kind)
    before, bare = digest(family), family_logits(kind)
    attached = attach(family, "lora", stirred=False, rank=4, alpha=8.0, init_lora_weights="pissa", use_rslora=rslora)
    mine, wanted = attached.parameters(), adapter(other)
    residual = {n.removeprefix("base_model.model.").replace(".base_layer", ""): p
                for n, p in other.named_parameters() if "base_layer.weight" in n}
    for layer in attached.layers:
        a, b = (wanted[f"base_model.model.{layer.site.name}.lora_{x}.weight"].detach() for x in "AB")
        assert (layer.b @ layer.a - b @ a).abs().max() < 1e-4 * float((b @ a).abs().max())
        # A singular vector has no sign of its own: take theirs, in our start too.
        assert (layer.a.abs() - a.abs()).abs().max() < 1e-3 * float(a.abs().max())
        layer.a.data, layer.b.data, layer.initial_factors = a.clone(), b.clone(), (a.clone(), b.clone())
        # PEFT takes the start out of the base in float32; do it again exactly.
        left = layer.base_weight() - layer.scale * b @ a
        kept = residual[f"{layer.site.name}.weight"]
        left = left.T if layer.site.transposed else left
        assert (kept - left).abs().max() < 1e-5
        kept.data = left
    assert (family_logits(kind) - outcome(family.model, mine)["logits"]).abs().max() < SAME
    for name, parameter in wanted.items():
        moved = 0.05 * torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        parameter.data += moved
        mine[name].data += moved
    found = outcome(family.model, mine)
    assert apart(found, outcome(other, wanted)) < SAME
    assert (found["logits"] - bare).abs().max() > 0.05
    assert digest(family) == before


def theirs_in_float32(kind: str, settings: dict[str, Any]) -> Any:
    """PEFT decomposes in nothing wider."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(tiny(kind).to(torch.float32), config).to(torch.float64).eval()
    exact = dict(tiny(kind).named_parameters())
    for name, parameter in model.named_parameters():
        if not name.endswith("base_layer.weight") and "lora_" not in name:
            parameter.data = exact[name.removeprefix("base_model.model.").replace(".base_layer", "")].data
    return model


def family_logits(kind: str) -> torch.Tensor:
    with torch.no_grad():
        return tiny(kind)(input_ids=TOKENS).logits


@PISSA
@pytest.mark.parametrize("dora", [False, True])
def test_pissa_is_exported_for_the_untouched_base(kind: str, rslora: bool, dora: bool, tmp_path: Path) -> None:
    family, origin = base(kind), save_tiny(tmp_path / "base", kind)
    attached = attach(family, "lora", rank=4, init_lora_weights="pissa", use_rslora=rslora, use_dora=dora,
                      rank_pattern={"mlp.down_proj": 2, "mlp.c_proj": 2}, alpha_pattern={"q_proj": 6.0})
    folder = save(family, attached, tmp_path / "run", attached.config, origin)
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 8
    model = peft.PeftModel.from_pretrained(tiny(kind), folder, autocast_adapter_dtype=False).eval()
    assert (logits(CausalLM(model, TOKENIZER)) - logits(family)).abs().max() < SAME
    fresh = base(kind)
    attach_method(fresh, attached.config, 77).load(load_file(folder / "adapter_model.safetensors"))
    assert torch.equal(logits(fresh), logits(family))


@pytest.mark.parametrize("field", [{"init_lora_weights": "pissa_niter_16"}, {"init_lora_weights": "olora"}, {"bias": "all"},
                                   {"modules_to_save": ["lm_head"]}, {"layer_replication": [[0, 1], [0, 1]]},
                                   {"trainable_token_indices": [3]}, {"a_field_of_the_future": True}])
def test_what_is_not_read_of_pefts_settings_is_refused(field: dict[str, Any]) -> None:
    plain = peft.LoraConfig(task_type="CAUSAL_LM", **CASES["plain"][2]).to_dict()
    assert LoraConfig.from_peft(plain).rank == 4
    with pytest.raises(RunError, match=next(iter(field))):
        LoraConfig.from_peft({**plain, **field})
