"""Adapter folders between PEFT and this project, both ways: outputs are equal, or the folder is refused by one error
that names the setting.

`READ`: adapters that PEFT makes, each with its own settings, opened here as runs. `REFUSED`: settings that are not read.
`WRITTEN`: runs of every method, loaded by PEFT. All in float64. Read `tests/tiny.py` first.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from luthier import assembly
from luthier.api.export import export
from luthier.assembly import run_io
from luthier.assembly.factory import attach_method, load_family
from luthier.assembly.multi_adapter_loading import load_served_models
from luthier.assembly.provenance import open_recipe
from luthier.assembly.rl_setup import init_rl_policy
from luthier.assembly.run_io import open_run, save_tuned
from luthier.cli.main import main
from luthier.core.errors import LuthierError, NotMergeable, RunError
from luthier.core.types import Inputs, LossInputs, SegmentTree
from luthier.models import CausalLM
from luthier.training.run_folder import Run
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
    "target_parameters with patterns": ("mixtral", lora(
        target_modules=QV, target_parameters=["mlp.experts.down_proj"], alpha_pattern={"experts.down_proj": 40, "q_proj": 5})),
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
    def opened(run: Run, *options: Any) -> Any:
        made = open_recipe(run, *options)
        return made.model_copy(update={"model": made.model.model_copy(update={"dtype": "float64"})})
    monkeypatch.setattr(run_io, "open_recipe", opened)


@torch.no_grad()
def said(family: Any) -> Tensor:
    return family.model(input_ids=TOKENS).logits[0]


@torch.no_grad()
def logps(family: Any) -> Tensor:
    """Log-probabilities of the tokens by the family's own way, which asks the head by itself."""
    n = TOKENS.shape[1]
    inputs = Inputs(TOKENS[0], torch.arange(n), SegmentTree((n,), (-1,)))
    target = LossInputs(torch.arange(n - 1), TOKENS[0, 1:], torch.ones(n - 1), 1)
    return family.forward(inputs, target, frozenset({"token_logps"})).token_logps


def picked(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1)[:-1].gather(1, TOKENS[0, 1:, None])[:, 0]


@pytest.mark.parametrize("name", READ)
def test_an_adapter_of_pefts_says_the_same_here(name: str, tmp_path: Path) -> None:
    kind, config = READ[name]
    wanted = theirs(kind, config, tmp_path / "run")
    _, family, attached = open_run(Run(tmp_path / "run"))
    assert attached is not None
    bare = tiny(kind)(input_ids=TOKENS).logits[0].detach()
    assert (said(family) - wanted).abs().max() < SAME
    assert (logps(family) - picked(wanted)).abs().max() < SAME
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
    _, family, attached = open_run(Run(tmp_path / "run"))
    before = {n: t.clone() for n, t in attached.state().items()}
    attached.merge()
    assert (said(family) - wanted).abs().max() < 1e-7
    family.save(tmp_path / "merged")
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
    _, family, attached = open_run(Run(tmp_path / "run"))
    with pytest.raises(NotMergeable, match="lora_bias"):
        attached.merge()
    assert (said(family) - wanted).abs().max() < SAME


# ---------------------------------------------------------------- settings that are not read

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a start that changes the base": ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights='pissa_niter_16'"),
    "olora": ({"init_lora_weights": "olora"}, "olora"),
    "with a bias over the bridge too": ({"init_lora_weights": "pissa", "bias": "all"}, "pissa"),
    "layer_replication": ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication"),
    "alora": ({"alora_invocation_tokens": [1, 2]}, "use it with PEFT"),
    "kasa": ({"kasa_config": {"beta": 1e-4}}, "kasa_config"),
    "a field of the future": ({"a_field_of_the_future": 0}, "a_field_of_the_future=0"),
    "a field of the future, over the bridge": ({"a_field_of_the_future": 0, "bias": "all"}, "a_field_of_the_future=0"),
    "an old field": ({"enable_lora": [True, False]}, "enable_lora"),
    "a class head": ({"task_type": "SEQ_CLS", "modules_to_save": ["score"]}, "SEQ_CLS"),
    "a module that the base has not": ({"modules_to_save": ["value_head"]}, "value_head"),
    "a module of modules": ({"modules_to_save": ["mlp"]}, "'mlp' contains other modules"),
    "r is no number": ({"r": "eight"}, "r is 'eight'"),
    "r is true": ({"r": True}, "r is True"),
    "no expression": ({"target_modules": "*_proj"}, r"target_modules '\*_proj' is not a valid regular expression"),
    "no pattern": ({"rank_pattern": {"*q_proj": 2}}, "rank_pattern"),
    "rank_pattern is a list": ({"rank_pattern": [2]}, "rank_pattern"),
    "a rank below 1": ({"r": 0}, "rank"),
    "no targets, no weights of one": ({"target_modules": []}, "target_modules"),
    "no such tuner": ({"peft_type": "FOO"}, "no tuner 'FOO'"),
    "no base": ({"base_model_name_or_path": None}, "names no base"),
    "other layers than in the file": ({"layers_to_transform": 1}, "do not match this method"),
    "fewer modules than in the file": ({"target_modules": ["q_proj"]}, "do not match this method"),
    "more modules than in the file": ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "do not match this method"),
    "another rank than in the file": ({"r": 5}, "do not match this method"),
}
HARMLESS: dict[str, dict[str, Any]] = {
    "an old field without effect": {"enable_lora": None, "merge_weights": False},
    "a field of the future that says nothing": {"a_field_of_the_future": None, "another": False, "third": []},
    "over the bridge too": {"a_field_of_the_future": None, "bias": "lora_only"},
    "settings of the start": {"eva_config": {"rho": 2.0}, "corda_config": {}, "init_lora_weights": "eva"},
}


def edit(folder: Path, changes: dict[str, Any], drop: tuple[str, ...] = ()) -> None:
    file = folder / "adapter_config.json"
    form = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in form.items() if key not in drop}))


@pytest.fixture
def plain(tmp_path: Path) -> tuple[Path, Tensor]:
    """A plain adapter of PEFT's and what it says."""
    wanted = theirs("llama", lora(), tmp_path / "run")
    return tmp_path / "run", wanted


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_that_is_not_read_is_refused_by_its_name(name: str, plain: tuple[Path, Tensor]) -> None:
    changes, words = REFUSED[name]
    open_run(Run(plain[0]))  # the control: without the change it is read
    edit(plain[0], changes)
    with pytest.raises(LuthierError, match=words) as caught:
        open_run(Run(plain[0]))
    assert caught.value.remedy


@pytest.mark.parametrize("name", HARMLESS)
def test_a_setting_without_effect_is_no_reason_to_refuse(name: str, plain: tuple[Path, Tensor]) -> None:
    edit(plain[0], HARMLESS[name])
    _, family, _ = open_run(Run(plain[0]))
    assert (said(family) - plain[1]).abs().max() < SAME


def test_what_an_old_config_leaves_out_is_pefts_default(plain: tuple[Path, Tensor]) -> None:
    edit(plain[0], {"r": 4}, drop=("lora_alpha", "lora_dropout", "bias", "use_rslora", "use_dora", "rank_pattern",
                                   "alpha_pattern", "fan_in_fan_out", "modules_to_save", "task_type", "peft_version"))
    wanted = said_by_peft("llama", plain[0])
    assert (wanted - plain[1]).abs().max() > FAR  # alpha is 8 now
    _, family, _ = open_run(Run(plain[0]))
    assert (said(family) - wanted).abs().max() < SAME


# ---------------------------------------------------------------- folders of other libraries, damaged folders


def _truncate(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _truncate_header(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:20])


def _change_weights(change: Any) -> Any:
    def damage(folder: Path) -> None:
        state = load_file(folder / "adapter_model.safetensors")
        save_file(change(state), folder / "adapter_model.safetensors")
    return damage


def _config(text: str) -> Any:
    return lambda folder: (folder / "adapter_config.json").write_text(text)


def _pickle(folder: Path) -> None:
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def _hub(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    torch.save({}, folder / "pytorch_adapter.bin")
    (folder / "adapter_config.json").write_text(json.dumps({
        "config": {"adapter_residual_before_ln": False, "architecture": None, "r": 8}, "hidden_size": 32,
        "model_class": "LlamaAdapterModel", "model_name": "base", "model_type": "llama", "name": "mine",
        "version": "adapters.1.2.0"}))


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
DAMAGED: dict[str, tuple[Any, str]] = {
    "weights cut off": (_truncate, "is damaged"),
    "header cut off": (_truncate_header, "is damaged"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
    "pickle alone": (_pickle, "pickle is never loaded"),
    "a missing weight": (_change_weights(lambda s: {n: t for n, t in s.items() if n != FIRST}), "missing"),
    "a missing module": (_change_weights(lambda s: {n: t for n, t in s.items() if "layers.0.self_attn.q_proj" not in n}), "missing"),
    "a wrong shape": (_change_weights(lambda s: s | {FIRST: s[FIRST][:, :-1].contiguous()}), "mismatched"),
    "a weight of another model": (_change_weights(lambda s: s | {FIRST.replace(".0.", ".7."): s[FIRST].clone()}), "unexpected"),
    "other embeddings of the base": (_change_weights(lambda s: s | {
        "base_model.model.model.embed_tokens.weight": torch.ones(264, 32, dtype=torch.float64)}), "save_embedding_layers"),
    "a longer vocabulary": (_change_weights(lambda s: s | {
        "base_model.model.lm_head.weight": torch.ones(300, 32, dtype=torch.float64)}), "save_embedding_layers"),
    "config is no JSON": (_config("{not json"), "is not valid JSON"),
    "config is empty": (_config(""), "is not valid JSON"),
    "config is a list": (_config("[1]"), "holds a list"),
    "config without a type": (_config('{"r": 8}'), "has no peft_type"),
    "a type that is no word": (_config('{"peft_type": 3}'), "has no peft_type"),
    "a prompt without its length": (_config('{"peft_type": "PROMPT_TUNING", "base_model_name_or_path": "x"}'), "num_virtual_tokens"),
    "AdapterHub": (_hub, "AdapterHub"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_folder_is_one_clear_error(name: str, plain: tuple[Path, Tensor], capsys: Any) -> None:
    damage, words = DAMAGED[name]
    open_run(Run(plain[0]))
    damage(plain[0])
    with pytest.raises(LuthierError, match=words) as caught:
        open_run(Run(plain[0]))
    assert caught.value.remedy
    with pytest.raises(LuthierError, match=words):  # several adapters on one base read the same
        load_served_models({"mine": plain[0], "again": plain[0]})
    assert main(["export", str(plain[0]), "--out", str(plain[0].parent / "out")]) == 2
    assert "Traceback" not in (told := capsys.readouterr().err)
    assert told.strip()


def test_weights_of_the_base_that_are_the_bases_own_are_no_reason_to_refuse(plain: tuple[Path, Tensor]) -> None:
    base = tiny("llama").state_dict()
    _change_weights(lambda s: s | {f"base_model.model.{n}": base[n].clone()
                                   for n in ("model.embed_tokens.weight", "lm_head.weight")})(plain[0])
    _, family, _ = open_run(Run(plain[0]))
    assert (said(family) - plain[1]).abs().max() < SAME


# ---------------------------------------------------------------- what can be done with such a folder


@pytest.mark.parametrize("name", ["plain", "bias all", "modules_to_save both", "trainable_token_indices, tied"])
def test_it_is_served_and_trained_on(name: str, tmp_path: Path) -> None:
    kind, config = READ[name]
    wanted = theirs(kind, config, tmp_path / "run")
    served = load_served_models({"mine": tmp_path / "run"})
    with served.manager.use_adapter(served.get_adapter("mine")) if served.manager else nullcontext():
        assert (said(served.base).double() - wanted).abs().max() < 1e-4  # served in float32
    made = assembly.build_recipe({"init_from": str(tmp_path / "run"), "data": "-"})
    family = load_family(made.model)
    attached, reference = init_rl_policy(made, family)
    if name != "plain":
        with pytest.raises(RunError, match=r"Transformers (does not|is not known to) read"):
            export(tmp_path / "run", "bundle", tmp_path / "whole")
    assert (said(family).double() - wanted).abs().max() < 1e-4
    assert attached.parameters()
    assert reference


# ---------------------------------------------------------------- what is written

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"name": "lora", "rank": 4, "alpha": 12.0}),
    "lora of some": ("llama", {"name": "lora", "target_modules": ["q", r"model\.layers\.1\.mlp\..*"]}),
    "patterns": ("llama", {"name": "lora", "rank": 4, "rank_pattern": {"q": 2, "down": 6}, "alpha_pattern": {"v": 5.0, "o": 0.3}}),
    "rslora, tied": ("qwen2", {"name": "lora", "use_rslora": True, "rank_pattern": {"q": 2}}),
    "pissa": ("llama", {"name": "lora", "init_lora_weights": "pissa", "rank": 3}),
    "conv1d": ("gpt2", {"name": "lora", "rank_pattern": {"qkv": 2}}),
    "adalora": ("llama", {"name": "adalora", "target_r": 3, "init_r": 5, "alpha": 7.0}),
    "dora": ("llama", {"name": "lora", "use_dora": True}),
    "dora, pissa": ("qwen2", {"name": "lora", "use_dora": True, "init_lora_weights": "pissa"}),
    "experts": ("mixtral", {"name": "lora", "target_modules": ["q", "experts.down_proj"]}),
    "ia3": ("llama", {"name": "ia3"}),
    "ln_tuning": ("llama", {"name": "ln_tuning"}),
    "ln_tuning, with biases": ("gpt2", {"name": "ln_tuning"}),
    "ln_tuning, weights alone": ("gpt2", {"name": "ln_tuning", "biases": False}),
    "ln_tuning, norms of queries and keys": ("gemma3", {"name": "ln_tuning"}),
    "prompt": ("llama", {"name": "prompt", "num_virtual_tokens": 5}),
    "ptuning": ("llama", {"name": "ptuning", "num_virtual_tokens": 5}),
    "prefix": ("llama", {"name": "prefix", "num_virtual_tokens": 5}),
    "prefix, projected": ("qwen2", {"name": "prefix", "num_virtual_tokens": 5, "prefix_projection": True}),
    "ptuning_v2": ("gpt2", {"name": "ptuning_v2", "num_virtual_tokens": 5}),
    "prefix, window as long as the context": ("mistral", {"name": "prefix", "num_virtual_tokens": 5}),
    "loha": ("llama", {"name": "peft", "type": "LOHA", "config": {"r": 4, "alpha": 8.0}}),
    "oft": ("llama", {"name": "peft", "type": "OFT", "config": {"r": 4, "oft_block_size": 0}}),
    "peft's lora with all": ("qwen2", {"name": "peft", "type": "LORA", "config": {
        "r": 4, "bias": "all", "target_modules": ["q_proj", "lm_head"], "modules_to_save": ["norm"],
        "trainable_token_indices": {"embed_tokens": [7]}}}),
}
OPTIONS = {"prefix, window as long as the context": {"sliding_window": 256}}
OWN = {"bitfit": "llama", "adapter": "llama", "freeze": "llama"}
VIRTUAL = ("prompt", "ptuning")
PLAIN = ("lora", "lora of some", "patterns", "rslora, tied", "pissa", "conv1d", "adalora")


def made_run(kind: str, method: Any, folder: Path, **options: Any) -> tuple[Any, Any]:
    """A run folder of ours with moved weights, and what it holds."""
    origin = save_tiny(folder.parent / "base", kind, **options)
    made = assembly.build_recipe({"model": {"name_or_path": str(origin), "dtype": "float64"}, "data": "-", "method": method, "output_dir": str(folder)})
    run = Run(folder)
    run.create(assembly.dump_recipe(made), {})
    family = load_family(made.model)
    attached = attach_method(family, made.method, 3)
    dice = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in attached.parameters().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=dice, dtype=torch.float64).to(parameter.dtype)
    save_tuned(run, made, family, attached)
    return family, attached


@torch.no_grad()
def in_peft(kind: str, folder: Path, **options: Any) -> Tensor:
    model = peft.PeftModel.from_pretrained(tiny(kind, **options), folder, autocast_adapter_dtype=False)
    return model.double().eval()(input_ids=TOKENS).logits[0][-TOKENS.shape[1]:]


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_writes_says_the_same_in_peft_and_here(name: str, tmp_path: Path) -> None:
    (kind, method), options = METHODS[name], OPTIONS.get(name, {})
    family, attached = made_run(kind, method, tmp_path / "run", **options)
    wanted, folder = said(family), tmp_path / "run"
    near = 1e-5 if {"prompt_embeddings"} & attached.state().keys() else SAME  # PEFT keeps them in float32
    assert (in_peft(kind, folder, **options) - wanted).abs().max() < near
    exported = export(folder, "adapter", tmp_path / "adapter")
    assert (in_peft(kind, exported, **options) - wanted).abs().max() < near
    assert not (exported / "recipe.yaml").exists()
    _, again, _ = open_run(Run(exported), False, str(tmp_path / "base"))  # by PEFT's settings alone
    assert (said(again) - wanted).abs().max() < SAME
    with attached.disabled():
        assert (said(family) - wanted).abs().max() > FAR


@pytest.mark.parametrize("name", OWN)
def test_a_method_that_peft_has_not_is_written_in_a_form_that_peft_refuses(name: str, tmp_path: Path) -> None:
    family, _ = made_run(OWN[name], {"name": name}, tmp_path / "run")
    if (tmp_path / "run/adapter_config.json").exists():
        with pytest.raises((KeyError, ValueError, TypeError)):
            in_peft(OWN[name], tmp_path / "run")
    _, again, _ = open_run(Run(tmp_path / "run"))
    assert (said(again) - said(family)).abs().max() < SAME


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("adalora",)])
def test_alphas_are_whole_numbers_where_they_are_whole(name: str, tmp_path: Path) -> None:
    made_run(*METHODS[name], tmp_path / "run", **OPTIONS.get(name, {}))
    form = json.loads((tmp_path / "run/adapter_config.json").read_text())
    found = [form.get("lora_alpha"), form.get("alpha"), *(form.get("alpha_pattern") or {}).values()]
    found = [alpha for alpha in found if alpha is not None]
    assert all(isinstance(alpha, int) or not alpha.is_integer() for alpha in found)
    if name == "patterns":
        assert sorted(map(str, found)) == ["0.3", "0.3", "16", "5", "5"]


def test_target_modules_are_plain_names_where_they_mean_the_same(tmp_path: Path) -> None:
    made_run(*METHODS["lora"], tmp_path / "all")
    assert json.loads((tmp_path / "all/adapter_config.json").read_text())["target_modules"] == sorted(LINEAR)
    made_run(*METHODS["lora of some"], tmp_path / "some")
    assert json.loads((tmp_path / "some/adapter_config.json").read_text())["target_modules"] == [
        "model.layers.1.mlp.down_proj", "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj", "q_proj"]


def by_rank_and_alpha_alone(kind: str, folder: Path) -> Tensor:
    """What a server computes that reads `r`, `lora_alpha`, the names and nothing else of the settings."""
    form = json.loads((folder / "adapter_config.json").read_text())
    state = load_file(folder / "adapter_model.safetensors")
    model = tiny(kind)
    with torch.no_grad():
        for name, a in state.items():
            if name.endswith("lora_A.weight"):
                b, path = state[name.replace("lora_A", "lora_B")], name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                change = form["lora_alpha"] / form["r"] * (b @ a)
                weight = model.get_submodule(path).weight
                weight += change.T if kind == "gpt2" else change
        return model(input_ids=TOKENS).logits[0]


@pytest.mark.parametrize("rank", ["auto", 16])
@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_lora_of_one_rank_says_the_same_to_whoever_reads_rank_and_alpha_alone(name: str, rank: Any, tmp_path: Path) -> None:
    kind, method = METHODS[name]
    family, _ = made_run(kind, method, tmp_path / "run")
    wanted = said(family)
    folder = export(tmp_path / "run", "adapter", tmp_path / "plain", lora_rank=rank)
    form = json.loads((folder / "adapter_config.json").read_text())
    shapes = {t.shape[0] for n, t in load_file(folder / "adapter_model.safetensors").items() if "lora_A" in n}
    assert shapes == {form["r"]}
    assert form["r"] == (rank if rank != "auto" else form["r"])
    assert isinstance(form["lora_alpha"], int)
    assert (form["peft_type"], form["use_rslora"], form["use_dora"], form["bias"]) == ("LORA", False, False, "none")
    assert not form["rank_pattern"]
    assert not form["alpha_pattern"]
    assert (by_rank_and_alpha_alone(kind, folder) - wanted).abs().max() < 1e-6
    assert (in_peft(kind, folder) - wanted).abs().max() < 1e-6
    if name in ("patterns", "rslora, tied", "adalora"):  # the control: as it is written without the option
        assert name == "adalora" or (by_rank_and_alpha_alone(kind, tmp_path / "run") - wanted).abs().max() > FAR


@pytest.mark.parametrize(("name", "rank", "words"), [
    ("dora", "auto", "DoRA"), ("experts", "auto", "changes experts"), ("ia3", 8, "only a LoRA or an AdaLoRA"),
    ("patterns", 4, "down_proj, 6"), ("lora", 0, "lora_rank is 0"), ("lora", 3, "--lora-rank 3 is below")])
def test_what_is_no_plain_lora_is_refused(name: str, rank: Any, words: str, tmp_path: Path) -> None:
    made_run(*METHODS[name], tmp_path / "run")
    with pytest.raises(RunError, match=words):
        export(tmp_path / "run", "adapter", tmp_path / "plain", lora_rank=rank)
    with pytest.raises(RunError, match="no effect on 'merged'"):
        export(tmp_path / "run", "merged", tmp_path / "plain", lora_rank=8)
    assert not (tmp_path / "plain").exists()


# ---------------------------------------------------------------- prefixes beside a window

WINDOWS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "mistral": ("mistral", {}, True),
    "mistral without one": ("mistral", {"sliding_window": None}, False),
    "mistral with one as long as the context": ("mistral", {"sliding_window": 256}, False),
    "gemma2": ("gemma2", {}, True),
    "gemma3": ("gemma3", {}, True),
    "gemma3, no local layer": ("gemma3", {"layer_types": ["full_attention", "full_attention"]}, False),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, True),
    "qwen2 that does not use it": ("qwen2", {"use_sliding_window": False, "sliding_window": 8}, False),
    "llama": ("llama", {}, False),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_a_prefix_is_exchanged_only_where_peft_computes_the_same(name: str, tmp_path: Path) -> None:
    kind, options, windowed = WINDOWS[name]
    family, _ = made_run(kind, {"name": "prefix", "num_virtual_tokens": 5}, tmp_path / "run", **options)
    form = json.loads((tmp_path / "run/adapter_config.json").read_text())
    assert form["peft_type"] == ("LUTHIER" if windowed else "PREFIX_TUNING")
    exported = Run(export(tmp_path / "run", "adapter", tmp_path / "adapter"))
    _, again, _ = open_run(exported, False, str(tmp_path / "base"))
    assert (said(again) - said(family)).abs().max() < SAME
    if not windowed:
        assert (in_peft(kind, tmp_path / "run", **options) - said(family)).abs().max() < 1e-5


@pytest.mark.parametrize("name", [name for name, row in WINDOWS.items() if row[2]])
def test_a_prefix_of_pefts_is_refused_beside_a_window(name: str, tmp_path: Path) -> None:
    kind, options, _ = WINDOWS[name]
    origin = save_tiny(tmp_path / "base", kind, **options)
    model = peft.get_peft_model(tiny(kind, **options), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    model.peft_config["default"].base_model_name_or_path = str(origin)
    model.save_pretrained(tmp_path / "run")
    with pytest.raises(RunError, match="window"):
        open_run(Run(tmp_path / "run"))
    with pytest.raises(RunError, match="window"):
        load_served_models({"mine": tmp_path / "run"})
