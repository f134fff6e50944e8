"""Adapters, BitFit, (IA)^3, parts of the base and the bridge to PEFT: what each says it computes, against another way.

Read `lab.py` and `test_methods.py` first: the laws that all methods share are there. Here are the oracles (PEFT, an
architecture's own biases, modules put in by hand), the ways through files, and each method's own settings.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from lab import SFT, TOKENIZER, apart, attach, base, digest, documents, logits, measured, stir
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from luthier import assembly
from luthier.api.export import export
from luthier.api.load_adapters import load_adapters
from luthier.assembly.factory import attach_method
from luthier.assembly.run_io import open_run, save_tuned
from luthier.core.errors import NotMergeable, RecipeError, RunError
from luthier.core.protocols import SamplingParams
from luthier.core.types import Inputs, SegmentTree
from luthier.data.packing import build_batch
from luthier.methods import READERS
from luthier.methods.composite import CompositeMethod
from luthier.methods.freeze import matches_name
from luthier.models import CausalLM
from luthier.models.families.encoder import Encoder
from luthier.models.families.seq2seq import Seq2Seq
from luthier.models.families.vision import Vision
from luthier.models.image_processor import ImageProcessor
from luthier.training.optimizer import Optimizer, OptimizerConfig
from luthier.training.run_folder import Run
from luthier.training.step import step
from tiny import save_tiny, tiny

peft = pytest.importorskip("peft")

SAME, FAR = 1e-9, 1e-3
TOKENS = torch.tensor([[7, 201, 33, 33, 90, 255, 12, 64, 3, 150, 41, 8]])
PREFIX = "base_model.model."


def outcome(model: Any, parameters: dict[str, Any]) -> dict[str, Tensor]:
    """Logits and gradients of an odd function of them."""
    found = model(input_ids=TOKENS).logits
    slope = torch.sin(torch.arange(found.numel(), dtype=torch.float64)).view_as(found)
    gradients = torch.autograd.grad((found * slope).sum(), list(parameters.values()))
    return {"logits": found.detach(), **dict(zip(parameters, gradients, strict=True))}


def saved(family: CausalLM, attached: Any, place: Path, origin: Path, method: Any) -> Run:
    """A run folder's adapter, as `train` writes it, without a recipe."""
    place.mkdir()
    save_tuned(Run(place), assembly.build_recipe({"model": str(origin), "data": "-", "method": method}), family, attached)
    return Run(place)


# ---------------------------------------------------------------- every one, every way of computing

WAYS = [("adapter", {"placement": "houlsby"}), ("adapter", {"placement": "parallel"}), ("bitfit", {}), ("ia3", {}),
        ("ln_tuning", {}), ("freeze", {"num_trainable_layers": 1, "keep_base": True})]


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize(("name", "settings"), WAYS, ids=lambda v: v if isinstance(v, str) else "+".join(map(str, v.values())))
def test_packed_padded_recomputed_and_cut_up_are_the_same(name: str, settings: dict[str, Any], kind: str) -> None:
    rows = documents((23, 5, 9, 14))
    plain = base(kind, layout="packed")
    wanted = measured(plain, attach(plain, name, **settings), [build_batch(rows)])
    padded = base(kind, layout="padded")
    assert apart(measured(padded, attach(padded, name, **settings), [build_batch(rows)]), wanted) < SAME
    again = base(kind, layout="packed")
    again.enable_gradient_checkpointing(0)
    again.train(True)
    attached = attach(again, name, **settings)
    assert apart(measured(again, attached, [build_batch(rows)]), wanted) < SAME
    assert apart(measured(again, attached, [build_batch([row]) for row in rows]), wanted) < SAME
    stir(attached, seed=8)
    assert apart(measured(again, attached, [build_batch(rows)]), wanted) > FAR


# ---------------------------------------------------------------- (IA)^3 against PEFT's

LLAMA_IA3 = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
IA3: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "paper": ("llama", {}, LLAMA_IA3),
    "biases": ("qwen2", {}, LLAMA_IA3),
    "no map in the mixture": ("mixtral", {}, {"target_modules": ["k_proj", "v_proj"], "feedforward_modules": []}),
    "fused, whole": ("gpt2", {"target_modules": ("c_attn",)},
                     {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"], "fan_in_fan_out": True}),
    "chosen": ("gemma3", {"target_modules": ("o", "v"), "feedforward_modules": ("layers.0.mlp.down_proj", "q")},
               {"target_modules": ["o_proj", "v_proj", "layers.0.mlp.down_proj", "q_proj"],
                "feedforward_modules": ["layers.0.mlp.down_proj", "q_proj"]}),
}
IA3_CASE = pytest.mark.parametrize("case", IA3)


def their_ia3(kind: str, settings: dict[str, Any]) -> tuple[Any, dict[str, nn.Parameter]]:
    """PEFT's model with scales away from one, and the scales by the names in its files."""
    model = peft.get_peft_model(tiny(kind), peft.IA3Config(task_type="CAUSAL_LM", **settings), autocast_adapter_dtype=False)
    found = {n.removesuffix(".default"): p for n, p in model.named_parameters() if "ia3_l" in n}
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for scale in found.values():
            scale += 0.3 * torch.randn(scale.shape, generator=generator, dtype=torch.float64)
    return model.eval(), found


@pytest.mark.usefixtures("double")
@IA3_CASE
def test_ia3_is_pefts(case: str) -> None:
    kind, ours, settings = IA3[case]
    other, wanted = their_ia3(kind, settings)
    family = base(kind)
    attached = attach(family, "ia3", stirred=False, **ours)
    assert {n: t.shape for n, t in attached.state().items()} == {n: p.shape for n, p in wanted.items()}
    attached.load({n: p.detach() for n, p in wanted.items()})
    found = {n: t if n == "logits" else t.view_as(wanted[n])
             for n, t in outcome(family.model, attached.parameters()).items()}
    assert apart(found, expected := outcome(other, wanted)) < SAME
    with torch.no_grad():
        next(iter(wanted.values())).mul_(1.1)
    assert apart(outcome(other, wanted), expected) > FAR


@pytest.mark.usefixtures("double")
@IA3_CASE
def test_ia3_files_go_both_ways(case: str, tmp_path: Path) -> None:
    kind, ours, settings = IA3[case]
    family, origin = base(kind), save_tiny(tmp_path / "base", kind)
    attached = attach(family, "ia3", **ours)
    run = saved(family, attached, tmp_path / "run", origin, {"name": "ia3", **ours})
    model = peft.PeftModel.from_pretrained(tiny(kind), run.path, autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        mine = family.model(input_ids=TOKENS).logits
        assert (model(input_ids=TOKENS).logits - mine).abs().max() < SAME

    other, _ = their_ia3(kind, settings)
    other.save_pretrained(tmp_path / "theirs")
    fresh = base(kind)
    method = READERS["IA3"].from_peft(json.loads((tmp_path / "theirs" / "adapter_config.json").read_text()))
    attach_method(fresh, method, 0).load(load_file(tmp_path / "theirs" / "adapter_model.safetensors"))
    with torch.no_grad():
        assert (fresh.model(input_ids=TOKENS).logits - other(input_ids=TOKENS).logits).abs().max() < SAME
        assert (fresh.model(input_ids=TOKENS).logits - mine).abs().max() > FAR


def test_of_a_fused_map_the_keys_and_values_alone_are_scaled() -> None:
    attached = attach(base("gpt2"), "ia3")
    fused = {n: t for n, t in attached.state().items() if "c_attn" in n}
    assert len(fused) == 2
    assert all(t.shape == (96, 1) and (t[:32] == 1).all() and (t[32:] != 1).all() for t in fused.values())
    assert all(attached.parameters()[n].shape == (64,) for n in fused)
    with pytest.raises(RunError, match="queries"):
        attached.load({n: torch.full_like(t, 2.0) for n, t in attached.state().items()})


def test_a_map_that_mixes_queries_and_keys_head_by_head_is_not_taken_apart() -> None:
    config = transformers.BloomConfig(vocab_size=264, hidden_size=32, n_layer=2, n_head=4)
    family = CausalLM(transformers.BloomForCausalLM(config).to(torch.float64).eval(), TOKENIZER)
    for name, settings in (("ia3", {}), ("bitfit", {"bias_scope": "paper"})):
        with pytest.raises(RecipeError, match="neither separate nor fused"):
            attach(family, name, **settings)
    named = attach(family, "ia3", target_modules=("query_key_value",), feedforward_modules=("down",))
    assert {t.shape for n, t in named.state().items() if "query_key_value" in n} == {(96, 1)}


def test_ia3_says_what_it_does_not_find_or_read() -> None:
    with pytest.raises(RecipeError, match="'qq' matches no linear layer"):
        attach(base("llama"), "ia3", target_modules=("qq",))
    plain = peft.IA3Config(**LLAMA_IA3).to_dict()
    assert READERS["IA3"].from_peft(plain).parse(READERS["IA3"].from_peft(plain).model_dump()).feedforward_modules
    with pytest.raises(RunError, match="modules_to_save"):
        READERS["IA3"].from_peft({**plain, "modules_to_save": ["lm_head"]})


# ---------------------------------------------------------------- adapters against modules put in by hand


class ByHand(nn.Module):
    """A sublayer with a bottleneck behind it, or beside it."""

    def __init__(self, inner: nn.Module, weights: dict[str, Tensor], act: Any, scale: float, beside: bool) -> None:
        super().__init__()
        self.inner, self.act, self.scale, self.beside = inner, act, scale, beside
        self.down, self.up = nn.Linear(32, len(weights["down.bias"])), nn.Linear(len(weights["down.bias"]), 32)
        self.to(torch.float64).load_state_dict(weights, strict=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        return h + self.scale * self.up(self.act(self.down(x if self.beside else h)))


PLACES = {"gpt2": ("attn.c_proj", "mlp"), "llama": ("self_attn.o_proj", "mlp"), "gemma2": ("self_attn.o_proj", "mlp"),
          "mixtral": ("self_attn.o_proj", "mlp")}


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize(("placement", "activation", "scale"), [
    ("houlsby", "relu", None), ("pfeiffer", "tanh", 0.5), ("parallel", "gelu", None)])
def test_adapters_are_what_the_papers_draw(placement: str, activation: str, scale: float | None, kind: str) -> None:
    family = base(kind)
    attached = attach(family, "adapter", placement=placement, activation=activation, scale=scale, reduction_factor=8.0)
    stem = next(iter(attached.bottlenecks)).partition(".0.")[0]
    model: Any = tiny(kind)
    acts = {"relu": nn.ReLU(), "tanh": nn.Tanh(), "gelu": nn.GELU()}
    wanted = {}
    for i, block in enumerate(model.get_submodule(stem)):
        parts = zip(("attention", "mlp"), PLACES[kind], strict=True)
        for part, path in parts if placement == "houlsby" else [("mlp", PLACES[kind][1])]:
            name = f"{PREFIX}{stem}.{i}.{part}.adapter."
            weights = {n.removeprefix(name): p.detach() for n, p in attached.parameters().items() if n.startswith(name)}
            made = ByHand(block.get_submodule(path), weights, acts[activation], scale or (4.0 if placement == "parallel" else 1.0),
                          beside=placement == "parallel")
            above, _, last = path.rpartition(".")
            setattr(block.get_submodule(above), last, made)
            wanted |= {name + n: p for n, p in made.named_parameters() if not n.startswith("inner")}
    assert wanted.keys() == attached.parameters().keys()
    found = outcome(family.model, attached.parameters())
    assert apart(found, outcome(model, {n: wanted[n] for n in attached.parameters()})) < SAME
    with attached.disabled():
        assert (logits(family) - logits(CausalLM(model, TOKENIZER))).abs().max() > 0.01


def test_the_width_of_an_adapter_follows_its_place() -> None:
    attached = attach(base("llama"), "adapter", placement="houlsby", reduction_factor=8.0,
                      reduction_pattern={"layers.1.mlp": 2.0, r".*\.attention": 32.0})
    widths = {place: made.parameters["down.bias"].shape[0] for place, made in attached.bottlenecks.items()}
    assert widths == {"model.layers.0.attention": 1, "model.layers.0.mlp": 4, "model.layers.1.attention": 1, "model.layers.1.mlp": 16}
    with pytest.raises(RecipeError, match=r"'layers\.7' matches no adapter"):
        attach(base("llama"), "adapter", reduction_pattern={"layers.7": 2.0})


def test_an_adapters_dropout_acts_in_training_only() -> None:
    family = base("llama")
    attached = attach(family, "adapter", dropout=0.5)
    rows = [build_batch(documents((23, 5)))]
    assert apart(measured(family, attached, rows), measured(family, attached, rows)) == 0
    family.train(True)
    assert apart(measured(family, attached, rows), measured(family, attached, rows)) > FAR


# ---------------------------------------------------------------- BitFit against an architecture's own biases


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("kind", "which"), [("gpt2", "all"), ("gpt2", "norms"), ("llama", "all"), ("llama", "paper")])
def test_bitfit_trains_the_biases_that_the_architecture_has_or_could_have(kind: str, which: str) -> None:
    family = base(kind)
    attached = attach(family, "bitfit", bias_scope=which)
    flags = {"attention_bias": True, "mlp_bias": True} if kind == "llama" else {}
    model = tiny(kind, **flags)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in tiny(kind).named_parameters():
            own[name].copy_(parameter)
        biases = {n: own[n.removeprefix(PREFIX).replace(".bitfit", ".bias")] for n in attached.parameters()}
        for name in own.keys() - dict(family.model.named_parameters()).keys():
            own[name].zero_()
        for name, change in attached.parameters().items():
            biases[name] += change
    assert apart(outcome(family.model, attached.parameters()), outcome(model, biases)) < SAME
    names = {name.rsplit(".", 2)[1] for name in biases}
    assert names == {("gpt2", "all"): {"c_attn", "c_proj", "c_fc", "ln_1", "ln_2", "ln_f"}, ("gpt2", "norms"): {"ln_1", "ln_2", "ln_f"},
                     ("llama", "all"): {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
                     ("llama", "paper"): {"q_proj", "up_proj"}}[kind, which]


def test_bitfits_choices() -> None:
    paper = attach(base("gpt2"), "bitfit", bias_scope="paper")
    assert {n.rsplit(".", 2)[1]: tuple(p.shape) for n, p in paper.parameters().items()} == {"c_attn": (32,), "c_fc": (128,)}
    chosen = attach(base("llama"), "bitfit", bias_scope=("o", "layers.1.mlp.up_proj"))
    assert sorted(n.partition("layers.")[2] for n in chosen.parameters()) == [
        "0.self_attn.o_proj.bitfit", "1.mlp.up_proj.bitfit", "1.self_attn.o_proj.bitfit"]
    with pytest.raises(RecipeError, match="norms of this model have no biases"):
        attach(base("llama"), "bitfit", bias_scope="norms")
    with pytest.raises(RecipeError, match="'qq' matches no linear layer"):
        attach(base("llama"), "bitfit", bias_scope=("qq",))


@pytest.mark.parametrize(("kind", "which", "flags"), [
    ("llama", "all", {"attention_bias": True, "mlp_bias": True}), ("llama", ("o",), {"attention_bias": True, "mlp_bias": False}),
    ("gemma2", ("q", "v"), {"attention_bias": True}), ("qwen2", ("q", "k", "v"), {}), ("gpt2", "all", {})])
def test_a_model_with_grown_biases_is_saved_so_that_it_loads(kind: str, which: Any, flags: dict[str, bool], tmp_path: Path) -> None:
    family = base(kind)
    bare = logits(family)
    attached = attach(family, "bitfit", bias_scope=which)
    attached.merge()
    wanted = logits(family)
    family.save(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert {key: getattr(again.config, key) for key in flags} == flags
    with torch.no_grad():
        found = again(input_ids=torch.tensor([list(range(40, 60))])).logits[0]
    assert (found - wanted).abs().max() < 1e-5
    assert (found - bare).abs().max() > 0.01


@pytest.mark.parametrize(("kind", "which"), [("qwen2", ("o",)), ("mistral", "all"), ("gemma2", ("up",))])
def test_a_bias_that_an_architecture_cannot_keep_is_refused(kind: str, which: Any, tmp_path: Path) -> None:
    family = base(kind)
    attach(family, "bitfit", bias_scope=which).merge()
    with pytest.raises(NotMergeable, match="cannot keep"):
        family.save(tmp_path)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- parts of the base


@pytest.mark.parametrize(("kind", "settings", "names"), [
    ("llama", {"num_trainable_layers": 1}, {"model.layers.1"}),
    ("llama", {"layers": (-2, 0)}, {"model.layers.0"}),
    ("llama", {"embeddings": True}, {"model.embed_tokens"}),
    ("llama", {"head": True, "patterns": ("q_proj", r".*\.0\.mlp\..*")},
     {"lm_head", "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.0.mlp"}),
    ("qwen2", {"head": True}, {"model.embed_tokens"}),  # tied, and named once
    ("llama", {}, {"model.layers.0", "model.layers.1"}),
])
def test_freeze_trains_what_is_named(kind: str, settings: dict[str, Any], names: set[str]) -> None:
    found = set(attach(base(kind), "freeze", **settings).parameters())
    assert found == {n for n, _ in tiny(kind).named_parameters() if any(n.startswith(f"{name}.") for name in names)}


@pytest.mark.parametrize(("settings", "words"), [
    ({"patterns": ("qq_proj",)}, "'qq_proj' matches no parameter"), ({"layers": (1, 5)}, "0 to 1"), ({"layers": (1, 0)}, "0 to 1"),
    ({"num_trainable_layers": 3}, "3, but this model has 2 layers")])
def test_freeze_says_what_it_does_not_find(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        attach(base("llama"), "freeze", **settings)


def test_names_are_fitted_part_by_part() -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    assert all(matches_name(name, p) for p in ("mlp", "layers.1", "up_proj.weight", r"model\.layers\.[12]\..*"))
    assert not any(matches_name(name, p) for p in ("up", "layers.11", "layers.1.up_proj", r"mlp\..*"))


@pytest.mark.parametrize(("kind", "biases", "names"), [
    ("llama", True, {"input_layernorm.weight", "post_attention_layernorm.weight", "norm.weight"}),
    ("gpt2", True, {f"{norm}.{part}" for norm in ("ln_1", "ln_2", "ln_f") for part in ("weight", "bias")}),
    ("gpt2", False, {"ln_1.weight", "ln_2.weight", "ln_f.weight"}),
])
def test_ln_trains_every_norm(kind: str, biases: bool, names: set[str]) -> None:
    found = attach(base(kind), "ln_tuning", biases=biases).parameters()
    assert {".".join(n.rsplit(".", 2)[1:]) for n in found} == names
    assert len(found) == (5 if kind == "llama" else 10 if biases else 5)


@pytest.mark.parametrize(("name", "settings"), [
    ("freeze", {"num_trainable_layers": 1}), ("freeze", {"embeddings": True, "head": True}), ("ln_tuning", {})], ids=str)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_a_part_of_the_base_is_saved_alone(name: str, settings: dict[str, Any], kind: str, tmp_path: Path) -> None:
    family, origin = base(kind, dtype=torch.float32), save_tiny(tmp_path / "base", kind, dtype=torch.float32)
    bare = logits(family)
    attached = attach(family, name, **settings)
    tuned, run = logits(family), saved(family, attached, tmp_path / "run", origin, {"name": name, **settings})
    recipe = assembly.build_recipe({"model": str(origin), "data": "-", "method": {"name": name, **settings}})
    run.write("recipe.yaml", yaml.safe_dump(assembly.dump_recipe(recipe)))
    assert (tuned - bare).abs().max() > 1e-3
    file = load_file(run.path / "adapter_model.safetensors")
    assert sorted(file) == sorted(attached.state())
    assert sum(tensor.numel() for tensor in file.values()) == sum(p.numel() for p in attached.parameters().values())
    _, again, tuner = open_run(run)
    assert torch.equal(logits(again), tuned)
    assert tuner is not None
    with tuner.disabled():  # also where training kept no copy of the base
        assert torch.equal(logits(again), bare)
    assert torch.equal(logits(again), tuned)
    whole = export(run.path, "merged", tmp_path / "whole")
    _, loaded, none = open_run(Run(whole))
    assert none is None
    assert torch.equal(logits(loaded), tuned)
    with pytest.raises(RunError, match="cannot share a base model"):
        load_adapters(str(origin), {"a": run.path})


# ---------------------------------------------------------------- runs and exports


@pytest.mark.parametrize(("name", "settings"), [("adapter", {"placement": "parallel"}), ("bitfit", {}), ("ia3", {})])
@pytest.mark.parametrize("recipe", [True, False])
def test_a_run_opens_again_with_and_without_its_recipe(name: str, settings: dict[str, Any], recipe: bool, tmp_path: Path) -> None:
    origin = save_tiny(tmp_path / "base", "llama", dtype=torch.float32)
    family = base("llama", dtype=torch.float32)
    bare = logits(family)
    attached = attach(family, name, **settings)
    run = saved(family, attached, tmp_path / "run", origin, {"name": name, **settings})
    if recipe:
        run.create(assembly.dump_recipe(assembly.build_recipe({"model": str(origin), "data": "-", "method": {"name": name, **settings}})), {})
    made, again, method = open_run(run)
    assert made.method.name == name
    assert torch.equal(logits(again), logits(family))
    assert not torch.equal(logits(again), bare)
    if name == "adapter":
        with pytest.raises(NotMergeable, match="activation"):
            export(run, "merged", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    merged = AutoModelForCausalLM.from_pretrained(export(run, "merged", tmp_path / "out"))
    with torch.no_grad():
        found = merged(input_ids=torch.tensor([list(range(40, 60))])).logits[0]
    assert (found - logits(family)).abs().max() < 1e-3
    assert method is not None


@pytest.mark.usefixtures("double")
def test_bitfit_and_lora_are_one_method_together() -> None:
    def both(family: CausalLM, seed: int, stirred: bool) -> CompositeMethod:
        return CompositeMethod([attach(family, "bitfit", seed, stirred), attach(family, "lora", seed, stirred, rank=4)])

    family = base("llama")
    bare, weights = logits(family), digest(family)
    attached = both(family, 3, stirred=False)
    assert torch.equal(logits(family), bare)
    start = {n: p.detach().clone() for n, p in attached.parameters().items()}
    assert any("bitfit" in n for n in start)
    assert any("lora_A" in n for n in start)
    adam = Optimizer(attached.parameters(), attached.lr_multiplier, 1e-2, OptimizerConfig(warmup_ratio=0), 4)
    for i in range(3):
        adam.set_learning_rate(i)
        step(family, SFT, [build_batch(documents())], adam)
    assert all(not torch.equal(p, start[n]) for n, p in attached.parameters().items())
    assert digest(family) == weights
    tuned = logits(family)
    with attached.disabled():
        assert torch.equal(logits(family), bare)
    fresh = base("llama")
    other = both(fresh, 7, stirred=True)
    other.load(attached.state())
    assert torch.equal(logits(fresh), tuned)
    attached.merge()
    assert (logits(family) - tuned).abs().max() < SAME
    with attached.disabled():
        assert torch.equal(logits(family), bare)
    assert (logits(family) - tuned).abs().max() < SAME
    attached.unmerge()
    assert digest(family) == weights
    assert torch.equal(logits(family), tuned)


# ---------------------------------------------------------------- the bridge to PEFT

BRIDGED = [("LOHA", {"r": 4, "alpha": 8}), ("OFT", {"r": 4, "oft_block_size": 0}), ("VERA", {"r": 8, "target_modules": ["q_proj", "o_proj"]}),
           ("LN_TUNING", {"target_modules": ["input_layernorm"]})]
BRIDGE = pytest.mark.parametrize(("kind", "config"), BRIDGED, ids=[kind for kind, _ in BRIDGED])


def bridged(kind: str, config: dict[str, Any], seed: int = 3, stirred: bool = True) -> tuple[CausalLM, Any]:
    family = base("llama", dtype=torch.float32)
    return family, attach(family, "peft", seed, stirred, type=kind, config=config)


@BRIDGE
def test_the_bridge_keeps_the_law(kind: str, config: dict[str, Any]) -> None:
    bare_family = base("llama", dtype=torch.float32)
    bare, weights = logits(bare_family), digest(bare_family)
    family, attached = bridged(kind, config, stirred=False)
    assert (logits(family) - bare).abs().max() < 1e-4
    start = {n: p.detach().clone() for n, p in attached.parameters().items()}
    stir(attached)
    measured(family, attached, [build_batch(documents((23, 5, 9)))])
    trained = {id(p) for p in attached.parameters().values()}
    assert all((p.grad is not None) == (id(p) in trained) for p in family.model.parameters())
    assert all(p.grad.abs().sum() > 0 and not torch.equal(p, start[n]) for n, p in attached.parameters().items())
    tuned = logits(family)
    assert (tuned - bare).abs().max() > 0.01
    with attached.disabled():
        assert torch.equal(logits(family), bare)
        with attached.disabled():
            state = {n: t.clone() for n, t in attached.state().items()}
        assert torch.equal(logits(family), bare)
        assert digest(family) == weights
    assert torch.equal(logits(family), tuned)

    fresh, other = bridged(kind, config, seed=6, stirred=False)
    assert not torch.equal(logits(fresh), tuned)
    with pytest.raises(RunError, match="missing"):
        other.load({n: t for n, t in state.items() if n != min(state)})
    with pytest.raises(RunError, match="unexpected"):
        other.load({**state, "stranger": torch.zeros(1)})
    other.load(state)
    assert torch.equal(logits(fresh), tuned)

    attached.merge()
    assert (logits(family) - tuned).abs().max() < 1e-3
    assert digest(family).keys() == weights.keys()
    assert digest(family) != weights
    with attached.disabled():
        assert torch.equal(logits(family), bare)
    attached.unmerge()
    assert torch.equal(logits(family), tuned)
    with attached.disabled():
        assert digest(family) == weights


@BRIDGE
def test_what_the_bridge_trains_is_a_folder_of_pefts(kind: str, config: dict[str, Any], tmp_path: Path) -> None:
    origin = save_tiny(tmp_path / "base", "llama", dtype=torch.float32)
    family, attached = bridged(kind, config)
    run = saved(family, attached, tmp_path / "run", origin, {"name": "peft", "type": kind, "config": config})
    theirs = peft.PeftModel.from_pretrained(tiny("llama", dtype=torch.float32), run.path).eval()
    with torch.no_grad():
        wanted = family.model(input_ids=TOKENS).logits
        assert (theirs(input_ids=TOKENS).logits - wanted).abs().max() < 1e-4
    made, again, _ = open_run(run)
    assert (made.method.name, made.method.type) == ("peft", kind)
    with torch.no_grad():
        assert torch.equal(again.model(input_ids=TOKENS).logits, wanted)


@pytest.mark.parametrize(("kind", "config", "words"), [
    ("LOHO", {}, "LOHA"), ("LOHA", {"rank": 4}, "no field 'rank'"), ("PROMPT_TUNING", {"num_virtual_tokens": 2}, "prompt, prefix"),
    ("ADALORA", {"total_step": 3}, "a call in every step"), ("LOHA", {"modules_to_save": ["mlp"]}, "contains other modules"),
    ("LOHA", {"target_modules": ["nothing"]}, "PEFT cannot apply LOHA"), ("LOHA", {"modules_to_save": ["x"]}, "no module 'x'")])
def test_the_bridge_says_what_cannot_be(kind: str, config: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        attach(base("llama"), "peft", type=kind, config=config)


def test_the_bridge_works_packed_recomputed_and_in_answers() -> None:
    rows = documents((23, 5, 9, 14))
    found = {}
    for way in ("packed", "padded", "recomputed"):
        family = base("llama", layout="padded" if way == "padded" else "packed")
        if way == "recomputed":
            family.enable_gradient_checkpointing(0)
            family.train(True)
        found[way] = measured(family, attach(family, "peft", type="LOHA", config={"r": 4}), [build_batch(rows)])
    assert apart(found["packed"], found["padded"]) < 1e-5
    assert apart(found["packed"], found["recomputed"]) < 1e-5
    family = base("llama")
    attach(family, "peft", type="LOHA", config={"r": 4})
    prompt = list(range(9, 27))
    (answer,) = family.generate([prompt], SamplingParams(max_new_tokens=8))
    for token in answer.token_ids:
        assert int(logits(family, prompt)[-1].argmax()) == token
        prompt.append(token)


# ---------------------------------------------------------------- encoders, sequence to sequence, pictures

STACK = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def bert() -> Any:
    model = transformers.BertModel(transformers.BertConfig(vocab_size=264, max_position_embeddings=64, type_vocab_size=1, **STACK),
                                   add_pooling_layer=False)
    return Encoder(shaken(model), TOKENIZER)


def t5() -> Any:
    return Seq2Seq(shaken(transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=264, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=256, pad_token_id=256,
        eos_token_id=258))), TOKENIZER)


def vit() -> Any:
    model = transformers.ViTModel(transformers.ViTConfig(image_size=8, patch_size=4, num_channels=1, **STACK),
                                  add_pooling_layer=False)
    return Vision(shaken(model), ImageProcessor(1, (8, 8), (8, 8), (0.5,), (0.5,), 1 / 255, "bilinear", "{}"))


def alike(make: Any) -> Any:
    """The same family every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def shaken(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn(parameter.shape, generator=generator)
    return model.to(torch.float64).eval()


def row(family: Any) -> Inputs:
    """Two roots and a child each (of pictures, four roots)."""
    if isinstance(family, Vision):
        pictures = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return Inputs(torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64), SegmentTree((1,) * 4, (-1,) * 4), pictures)
    segment_tree = SegmentTree((7, 5, 4, 6), (-1, 0, -1, 2) if isinstance(family, Seq2Seq) else (-1,) * 4)
    places = [torch.arange(n) + (segment_tree.lengths[p] if p >= 0 else 0) for n, p in zip(segment_tree.lengths, segment_tree.parents, strict=True)]
    return Inputs(torch.arange(22) * 5 % 250, torch.cat(places), segment_tree)


@pytest.mark.parametrize("make", [bert, t5, vit])
@pytest.mark.parametrize(("name", "settings"), [*WAYS, ("adapter", {}), ("bitfit", {"bias_scope": "paper"})],
                         ids=lambda v: v if isinstance(v, str) else "+".join(map(str, v.values())))
def test_every_family_takes_them(name: str, settings: dict[str, Any], make: Any) -> None:
    family, fresh = alike(make), alike(make)
    inputs = row(family)

    @torch.no_grad()
    def states(of: Any = family) -> Tensor:
        return of.states(inputs)

    bare, weights = states(), digest(family)
    attached = attach(family, name, stirred=False, **settings)
    assert (states() - bare).abs().max() < 1e-6
    stir(attached)
    found = family.states(inputs)
    slope = torch.sin(torch.arange(found.numel(), dtype=torch.float64)).view_as(found)
    (found * slope).sum().backward()
    trained = {id(p) for p in attached.parameters().values()}
    assert all((p.grad is not None) == (id(p) in trained) for p in family.model.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in attached.parameters().values())
    tuned = states()
    assert (tuned - bare).abs().max() > 0.01
    with attached.disabled():
        assert torch.equal(states(), bare)
        assert digest(family) == weights
    other = attach(fresh, name, seed=7, stirred=False, **settings)
    other.load(attached.state())
    assert torch.equal(states(fresh), tuned)
    if name in ("bitfit", "ia3"):
        attached.merge()
        assert (states() - tuned).abs().max() < 1e-6
        attached.unmerge()
        assert digest(family) == weights
    elif name in ("ln_tuning", "freeze"):
        attached.merge()  # the trained weights are the base's own
        assert torch.equal(states(), tuned)
    else:
        with pytest.raises(NotMergeable):
            attached.merge()
