"""Adapter folders between PEFT and this project, both ways: outputs are equal, or the folder is refused by one error
that names the setting.

`READ`: adapters that PEFT makes, each with its own settings, opened here as runs. `REFUSED`: settings that are not read.
`WRITTEN`: runs of every method, loaded by PEFT. All in float64. Read `tests/tiny.py` first.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from luthier import build
from luthier.build import runs
from luthier.core.errors import LuthierError, NotMergeable, RecipeError, RunError
from luthier.families import CausalLM
from luthier.runtime.run import Run
from tiny import save_tiny, tiny

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("double")

SAME, FAR = 1e-9, 1e-3
TOKENS = torch.tensor([[7, 201, 33, 33, 90, 255, 12, 64, 3, 150, 41, 8]])
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QV = ["q_proj", "v_proj"]


def lora(**settings: Any) -> Any:
    return peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 12, "target_modules": QV, **settings})


# name -> base, PEFT's config; `qwen2` has biases and a tied head
READ: dict[str, tuple[str, Any]] = {
    "plain": ("llama", lora(target_modules=LINEAR)),
    "a name that no module has": ("llama", lora(target_modules=["q_proj", "c_attn"])),
    "expression": ("llama", lora(target_modules=r".*\.(q|v)_proj")),
    "all-linear": ("llama", lora(target_modules="all-linear")),
    "all-linear of a mixture": ("mixtral", lora(target_modules="all-linear")),
    "exclude_modules": ("llama", lora(target_modules=LINEAR, exclude_modules=["k_proj", "layers.1.self_attn.v_proj"])),
    "exclude_modules, expression": ("llama", lora(target_modules=LINEAR, exclude_modules=r".*layers\.0\..*")),
    "layers_to_transform 0": ("llama", lora(layers_to_transform=0)),
    "layers_to_transform 1": ("llama", lora(layers_to_transform=[1])),
    "layers_pattern": ("llama", lora(layers_to_transform=[0], layers_pattern="layers")),
    "layers_pattern, gpt2": ("gpt2", lora(target_modules=["c_attn", "c_fc"], layers_to_transform=[1], layers_pattern=["h"])),
    "exclude and layers": ("llama", lora(target_modules=LINEAR, layers_to_transform=[1], exclude_modules=["up_proj"])),
    "patterns": ("llama", lora(target_modules=LINEAR, rank_pattern={r"layers\.\d\.mlp\..*": 6, "^model.layers.0.self_attn.q_proj": 2},
                               alpha_pattern={"v_proj": 5, r"^model\.layers\.1\..*o_proj": 40})),
    "rslora with patterns": ("llama", lora(use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 5})),
    "dora": ("qwen2", lora(use_dora=True)),
    "fan_in_fan_out": ("gpt2", lora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "fan_in_fan_out left out": ("gpt2", lora(target_modules=["c_attn", "c_proj"])),
    "gaussian": ("llama", lora(init_lora_weights="gaussian")),
    "orthogonal": ("llama", lora(init_lora_weights="orthogonal")),
    "bias all": ("qwen2", lora(bias="all")),
    "bias lora_only": ("qwen2", lora(bias="lora_only")),
    "bias all, dora": ("qwen2", lora(bias="all", use_dora=True)),
    "lora_bias": ("llama", lora(lora_bias=True)),
    "modules_to_save lm_head": ("llama", lora(modules_to_save=["lm_head"])),
    "modules_to_save both": ("llama", lora(modules_to_save=["lm_head", "embed_tokens"])),
    "modules_to_save norm": ("llama", lora(modules_to_save=["norm", "input_layernorm"])),
    "modules_to_save, tied": ("qwen2", lora(modules_to_save=["embed_tokens"])),
    "modules_to_save head, tied": ("qwen2", lora(modules_to_save=["lm_head"])),
    "modules_to_save, kept tied": ("qwen2", lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    "embedding": ("llama", lora(target_modules=[*QV, "embed_tokens"])),
    "embedding alone": ("llama", lora(target_modules=["embed_tokens"])),
    "scaled embedding": ("gemma3", lora(target_modules=[*QV, "embed_tokens"])),
    "head": ("llama", lora(target_modules=[*QV, "lm_head"])),
    "head by expression": ("llama", lora(target_modules=r".*q_proj|lm_head")),
    "embedding and head, tied": ("qwen2", lora(target_modules=[*QV, "embed_tokens", "lm_head"])),
    "embedding, tied": ("qwen2", lora(target_modules=["embed_tokens"])),
    "trainable_token_indices": ("llama", lora(trainable_token_indices=[7, 33])),
    "trainable_token_indices, tied": ("qwen2", lora(trainable_token_indices=[7, 33])),
    "trainable_token_indices by name": ("llama", lora(trainable_token_indices={"embed_tokens": [0, 33]})),
    "target_parameters": ("mixtral", lora(target_modules=QV, target_parameters=["mlp.experts.down_proj"])),
    "adalora": ("llama", peft.AdaLoraConfig(task_type="CAUSAL_LM", init_r=6, target_r=3, lora_alpha=12, total_step=10,
                                            target_modules=LINEAR, exclude_modules=["k_proj"], layers_to_transform=[0])),
    "ia3": ("llama", peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"],
                                    feedforward_modules=["down_proj"])),
    "ia3 with exclude_modules": ("llama", peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"],
        exclude_modules=r".*layers\.0\.self_attn\.k_proj")),
    "ia3 of the feedforward alone": ("llama", peft.IA3Config(task_type="CAUSAL_LM", target_modules=["down_proj"],
                                                             feedforward_modules=["down_proj"])),
    "ia3 with modules_to_save": ("llama", peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"],
                                                         feedforward_modules=[], modules_to_save=["lm_head"])),
    "loha": ("llama", peft.LoHaConfig(task_type="CAUSAL_LM", r=4, target_modules=QV)),
    "loha with modules_to_save": ("llama", peft.LoHaConfig(task_type="CAUSAL_LM", r=4, target_modules=QV,
                                                           modules_to_save=["lm_head"])),
    "vera": ("llama", peft.VeraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])),
    "oft": ("llama", peft.OFTConfig(task_type="CAUSAL_LM", r=4, oft_block_size=0, target_modules=QV)),
    "ln_tuning": ("llama", peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"])),
    "trainable_tokens": ("llama", peft.TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[7, 33])),
}


@torch.no_grad()
def theirs(kind: str, config: Any, folder: Path) -> Tensor:
    """Save an adapter of PEFT with moved weights, and its base beside it; the logits of what PEFT loads from there."""
    origin = save_tiny(folder.parent / "base", kind)
    model = peft.get_peft_model(tiny(kind), config, autocast_adapter_dtype=False)
    dice = torch.Generator().manual_seed(9)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.1 * torch.randn(parameter.shape, generator=dice, dtype=torch.float64).to(parameter.dtype)
    model.peft_config["default"].base_model_name_or_path = str(origin)
    model.save_pretrained(folder)
    return said_by_peft(kind, folder)


@torch.no_grad()
def said_by_peft(kind: str, folder: Path) -> Tensor:
    model = peft.PeftModel.from_pretrained(tiny(kind), folder, autocast_adapter_dtype=False).eval()
    return model(input_ids=TOKENS).logits[0]


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's folders name no precision: bases are loaded in float64."""
    def recorded(run: Run) -> Any:
        made = build.recorded(run)
        return made.model_copy(update={"base": made.base.model_copy(update={"dtype": "float64"})})
    monkeypatch.setattr(runs, "recorded", recorded)


@torch.no_grad()
def said(family: Any) -> Tensor:
    return family.model(input_ids=TOKENS).logits[0]


@torch.no_grad()
def logps(family: Any) -> Tensor:
    """Log-probabilities of the tokens by the family's own way, which asks the head by itself."""
    from luthier.core.types import Forest, Inputs, Target
    n = TOKENS.shape[1]
    inputs = Inputs(TOKENS[0], torch.arange(n), Forest((n,), (-1,)))
    target = Target(torch.arange(n - 1), TOKENS[0, 1:], torch.ones(n - 1), 1)
    return family.forward(inputs, target, frozenset({"token_logps"})).token_logps


def picked(logits: Tensor, cap: float | None) -> Tensor:
    return logits.log_softmax(-1)[:-1].gather(1, TOKENS[0, 1:, None])[:, 0]


@pytest.mark.parametrize("name", READ)
def test_an_adapter_of_pefts_says_the_same_here(name: str, tmp_path: Path) -> None:
    kind, config = READ[name]
    wanted = theirs(kind, config, tmp_path / "run")
    _, family, attached = build.open_run(Run(tmp_path / "run"))
    assert attached is not None
    bare = tiny(kind)(input_ids=TOKENS).logits[0].detach()
    assert (said(family) - wanted).abs().max() < SAME
    assert (logps(family) - picked(wanted, None)).abs().max() < SAME
    assert (bare - wanted).abs().max() > FAR
    with attached.disabled():
        assert torch.equal(said(family), said(CausalLM(tiny(kind), family.tokenizer)))
    assert (said(family) - wanted).abs().max() < SAME
    # The control: other weights in the file are other outputs here.
    saved = load_file(tmp_path / "run/adapter_model.safetensors")
    attached.load({n: t + 0.1 * t.abs().mean() + 0.01 if n in attached.state() and t.is_floating_point() else t
                   for n, t in saved.items() if n in attached.state()})
    assert (said(family) - wanted).abs().max() > FAR / 10


@pytest.mark.parametrize("name", [name for name in READ if name != "lora_bias"])
def test_it_merges_into_a_model_that_says_the_same(name: str, tmp_path: Path) -> None:
    kind, config = READ[name]
    wanted = theirs(kind, config, tmp_path / "run")
    made, family, attached = build.open_run(Run(tmp_path / "run"))
    before = {n: t.clone() for n, t in attached.state().items()}
    attached.merge()
    assert (said(family) - wanted).abs().max() < 1e-7
    family.save(tmp_path / "merged")
    from transformers import AutoModelForCausalLM
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64, experts_implementation="eager").eval()
    with torch.no_grad():
        assert (again(input_ids=TOKENS).logits[0] - wanted).abs().max() < 1e-7
    attached.unmerge()
    assert (said(family) - wanted).abs().max() < SAME
    assert all(torch.equal(before[n], t) for n, t in attached.state().items())
    with attached.disabled():
        assert torch.equal(said(family), said(CausalLM(tiny(kind), family.tokenizer)))


def test_what_peft_itself_cannot_merge_stays_as_it_is(tmp_path: Path) -> None:
    wanted = theirs(*READ["lora_bias"], tmp_path / "run")
    _, family, attached = build.open_run(Run(tmp_path / "run"))
    with pytest.raises(NotMergeable, match="lora_bias"):
        attached.merge()
    assert (said(family) - wanted).abs().max() < SAME
