"""The laws of a method, for every row of `METHODS` on every kind of model. Read `lab.py` first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lab import SFT, apart, attach, base, digest, documents, logits, measured, stir

from luthier.assembly.factory import attach_method
from luthier.core.errors import NotMergeable, RecipeError, RunError
from luthier.core.protocols import SamplingParams
from luthier.data.packing import build_batch
from luthier.methods import METHODS
from luthier.models import CausalLM
from luthier.training.optimizer import Optimizer, OptimizerConfig
from luthier.training.step import step
from tiny import KINDS

# Settings that a row of METHODS is tried with, besides its defaults.
ALWAYS: dict[str, dict[str, Any]] = {name: {"keep_base": True} for name in ("full", "freeze")}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "lora": [{"use_dora": True}, {"init_lora_weights": "pissa", "rank": 4}, {"init_lora_weights": "gaussian", "use_rslora": True},
             {"init_lora_weights": "pissa", "rank": 2, "use_dora": True, "use_rslora": True}],
    "adalora": [{"target_r": 5, "init_r": 6, "final_fraction": 0.3}, {"target_modules": ("o",), "orth_reg_weight": 0.0}],
    "freeze": [{"layers": (0, 0), "head": True}, {"patterns": ("mlp",), "embeddings": True}],
    "adapter": [{"placement": "houlsby", "reduction_factor": 4.0, "activation": "relu"}, {"placement": "parallel"}],
    "bitfit": [{"bias_scope": "paper"}],
    "prompt": [{"prompt_tuning_init": "random", "num_virtual_tokens": 3}], "ptuning": [{"encoder_reparameterization_type": "lstm", "encoder_hidden_size": 5}, {"prompt_tuning_init": "random"}],
    "prefix": [{"prefix_projection": True, "encoder_hidden_size": 6}, {"prompt_tuning_init_text": "a start", "num_virtual_tokens": 3}], "ptuning_v2": [{"prompt_tuning_init": "text"}],
}
VIRTUAL = {"prompt", "ptuning", "prefix", "ptuning_v2"}
UNMERGEABLE = {"full", "adapter", *VIRTUAL}  # each says why
IN_PLACE = {"freeze", "ln_tuning"}  # they train the base's own weights, so unmerging changes nothing
# What cannot start as the base: tokens that every text sees change what it says, whatever they are.
STARTS_ELSEWHERE = VIRTUAL
BRIDGES = {"peft"}  # not ours; what they keep of the contract is in tests of their own
ROWS = [(name, {**ALWAYS.get(name, {}), **settings}) for name in METHODS if name not in BRIDGES
        for settings in [{}, *VARIANTS.get(name, [])]]
ROW = pytest.mark.parametrize(("name", "settings"), ROWS, ids=lambda v: v if isinstance(v, str) else "+".join(map(str, v)))
KIND = pytest.mark.parametrize("kind", KINDS)
ROUNDING = 1e-5  # Transformers' norms compute in float32, whatever the model's dtype
CLOSE = 1e-10


def optimizer(attached: Any, rate: float = 1e-2) -> Optimizer:
    return Optimizer(attached.parameters(), attached.lr_multiplier, rate, OptimizerConfig(), 3, attached.optimizer_hooks)


def take_steps(family: CausalLM, attached: Any, steps: int = 3) -> None:
    adam, rows = optimizer(attached), [build_batch(documents())]
    for i in range(steps):
        adam.set_learning_rate(i)
        step(family, SFT, rows, adam)


@KIND
@ROW
def test_it_trains_what_it_promises_and_nothing_else(name: str, settings: dict[str, Any], kind: str) -> None:
    family = base(kind)
    before, own = digest(family), {id(p) for p in family.model.parameters()}
    attached = attach(family, name, stirred=False, **settings)
    trained = attached.parameters()
    start, state = ({n: t.detach().clone() for n, t in found.items()} for found in (trained, attached.state()))
    stir(attached)
    measured(family, attached, [build_batch(documents())])
    for parameter in family.model.parameters():
        assert (parameter.grad is not None) == any(parameter is p for p in trained.values())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    attached.load(state)
    take_steps(family, attached)
    assert all(not torch.equal(p, start[n]) for n, p in trained.items())
    if not own & {id(p) for p in trained.values()}:
        assert digest(family) == before
    else:
        assert digest(family) != before


@KIND
@ROW
def test_it_starts_as_the_base(name: str, settings: dict[str, Any], kind: str) -> None:
    family = base(kind)
    bare = logits(family)
    attached = attach(family, name, stirred=False, **settings)
    assert (float((logits(family) - bare).abs().max()) < ROUNDING) == (name not in STARTS_ELSEWHERE)
    stir(attached)
    assert (logits(family) - bare).abs().max() > 0.01


@KIND
@ROW
def test_disabled_is_the_base_bit_for_bit_and_nests(name: str, settings: dict[str, Any], kind: str) -> None:
    family = base(kind)
    bare, weights = logits(family), digest(family)
    attached = attach(family, name, **settings)
    tuned = logits(family)
    assert not torch.equal(tuned, bare)
    with attached.disabled():
        assert torch.equal(logits(family), bare)
        with attached.disabled():
            assert torch.equal(logits(family), bare)
        assert torch.equal(logits(family), bare)
        assert digest(family) == weights
    assert torch.equal(logits(family), tuned)
    with pytest.raises(KeyError), attached.disabled():
        raise KeyError
    assert torch.equal(logits(family), tuned)


@KIND
@ROW
def test_its_state_on_a_fresh_base_gives_the_same_bits(name: str, settings: dict[str, Any], kind: str) -> None:
    family = base(kind)
    attached = attach(family, name, seed=5, **settings)
    wanted, state = logits(family), {n: t.clone() for n, t in attached.state().items()}

    fresh = base(kind)
    other = attach(fresh, name, seed=6, stirred=False, **settings)
    assert not torch.equal(logits(fresh), wanted)
    other.load(state)
    assert torch.equal(logits(fresh), wanted)
    again = other.state()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[n], t) for n, t in state.items())


@ROW
def test_a_state_that_does_not_fit_is_refused(name: str, settings: dict[str, Any]) -> None:
    attached = attach(base("llama"), name, **settings)
    state = {n: t.clone() for n, t in attached.state().items()}
    first = min(state)
    for broken, word in (({n: t for n, t in state.items() if n != first}, "missing"),
                         ({**state, "stranger": torch.zeros(1)}, "unexpected"),
                         ({**state, first: torch.zeros(*state[first].shape, 2)}, "mismatched"),
                         ({**state, first: torch.zeros(state[first].shape[0] + 1, *state[first].shape[1:])}, "mismatched")):
        with pytest.raises(RunError, match=word):
            attached.load(broken)
        assert all(torch.equal(attached.state()[n], t) for n, t in state.items()), "half of a refused state was taken"


@KIND
@ROW
@pytest.mark.usefixtures("double")
def test_merged_is_attached_and_unmerged_is_the_base(name: str, settings: dict[str, Any], kind: str) -> None:
    family = base(kind)
    bare, weights = logits(family), digest(family)
    attached = attach(family, name, **settings)
    tuned = logits(family)
    if name in UNMERGEABLE:
        with pytest.raises(NotMergeable) as why:
            attached.merge()
        assert why.value.remedy
        return
    attached.merge()
    assert (logits(family) - tuned).abs().max() < CLOSE
    assert (logits(family) - bare).abs().max() > 0.01
    assert digest(family) != weights
    with attached.disabled():
        assert torch.equal(logits(family), bare), "disabled is the base, merged or not"
    assert (logits(family) - tuned).abs().max() < CLOSE
    attached.unmerge()
    assert (digest(family) == weights) is (name not in IN_PLACE)
    assert torch.equal(logits(family), tuned)


@ROW
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_under_a_bfloat16_base_the_change_is_kept_in_float32(name: str, settings: dict[str, Any], kind: str) -> None:
    family = base(kind, dtype=torch.bfloat16)
    weights, bare = digest(family), logits(family)
    attached = attach(family, name, stirred=False, **settings)
    own = {id(p) for p in family.model.parameters()}
    adapter = [p for p in attached.parameters().values() if id(p) not in own]
    assert all(p.dtype == torch.float32 for p in adapter)
    take_steps(family, attached)
    assert logits(family).dtype == torch.bfloat16
    assert not torch.equal(logits(family), bare)
    with attached.disabled():
        assert digest(family) == weights
        assert torch.equal(logits(family), bare)


@ROW
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3", "mistral"])
def test_answers_are_the_same_attached_merged_and_without_a_cache(name: str, settings: dict[str, Any], kind: str) -> None:
    family = base(kind)
    prompts, sampling = [tuple(range(n, 3 * n)) for n in (4, 9, 15)], SamplingParams(max_new_tokens=12, batch_size=2)

    def answers() -> list[tuple[int, ...]]:
        return [g.token_ids for g in sorted(family.generate(prompts, sampling), key=lambda g: g.index)]

    bare = answers()
    attached = attach(family, name, **settings)
    tuned = answers()
    assert tuned != bare
    for prompt, answer in zip(prompts, tuned, strict=True):
        ids = list(prompt)
        for token in answer:
            assert int(logits(family, ids)[-1].argmax()) == token
            ids.append(token)
    with attached.disabled():
        assert answers() == bare
    if name in UNMERGEABLE:
        return
    attached.merge()
    assert answers() == tuned


# ---------------------------------------------------------------- LoRA's own


def widths(attached: Any) -> dict[str, int]:
    """Rank of each site."""
    return {n.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): p.shape[0]
            for n, p in attached.parameters().items() if n.endswith("lora_A.weight")}


@KIND
def test_a_target_that_matches_nothing_is_an_error(kind: str) -> None:
    with pytest.raises(RecipeError, match="'qq_proj' matches no linear layer"):
        attach(base(kind), "lora", target_modules=("o", "qq_proj"))


@pytest.mark.parametrize(("kind", "targets", "names"), [
    ("llama", ("q", "v"), {"q_proj", "v_proj"}),
    ("llama", ("down_proj",), {"down_proj"}),
    ("llama", (r"model\.layers\.1\..*_proj",), {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ("gpt2", ("qkv", "up"), {"c_attn", "c_fc"}),
    ("gpt2", ("mlp.c_proj",), {"c_proj"}),
    ("mixtral", "all-linear", {"q_proj", "k_proj", "v_proj", "o_proj"}),
])
def test_targets_are_roles_endings_or_expressions(kind: str, targets: Any, names: set[str]) -> None:
    found = widths(attach(base(kind), "lora", target_modules=targets))
    assert {name.rsplit(".", 1)[-1] for name in found} == names
    if "layers" in targets[0]:
        assert all(".1." in name for name in found)
    if targets == ("mlp.c_proj",):
        assert all("mlp" in name for name in found)


def test_rank_and_alpha_patterns_reach_their_sites() -> None:
    family = base("llama")
    attached = attach(family, "lora", rank=4, alpha=8.0, rank_pattern={"q": 2, "layers.1.mlp.down_proj": 6},
                      alpha_pattern={"v_proj": 32.0})
    found = widths(attached)
    for name, rank in found.items():
        assert rank == (2 if "q_proj" in name else 6 if name.endswith("layers.1.mlp.down_proj") else 4)
    scales = {layer.site.name: layer.scale for layer in attached.layers}
    for name, scale in scales.items():
        assert scale == (32.0 if "v_proj" in name else 8.0) / found[name]


def test_the_rates_of_lora_plus_reach_the_optimiser() -> None:
    family = base("llama")
    attached = attach(family, "lora", stirred=False, loraplus_lr_ratio=16.0)
    adam = optimizer(attached, rate=1e-3)
    adam.set_learning_rate(0)
    rate = {id(p): group["lr"] for group in adam.adam.param_groups for p in group["params"]}
    for name, parameter in attached.parameters().items():
        assert rate[id(parameter)] == pytest.approx(1e-3 * (16 if "lora_B" in name else 1))
    plain = attach(base("llama"), "lora", stirred=False)
    assert {group["factor"] for group in optimizer(plain).adam.param_groups} == {1.0}


def test_a_pissa_state_brings_its_own_start() -> None:
    """Singular vectors have no sign of their own: elsewhere they come out otherwise."""
    settings = {"init_lora_weights": "pissa", "rank": 4}
    family = base("llama")
    wanted, state = logits(family), attach(family, "lora", **settings).state()
    fresh = base("llama")
    other = attach(fresh, "lora", stirred=False, **settings)
    for layer in other.layers:
        layer.initial_factors = (-1.5 * layer.initial_factors[0], layer.initial_factors[1])
    other.load(state)
    assert torch.equal(logits(fresh), logits(family))
    assert not torch.equal(logits(fresh), wanted)


def test_dropout_acts_in_training_only() -> None:
    family = base("llama")
    attached = attach(family, "lora", dropout=0.5)
    rows = [build_batch(documents())]
    assert apart(measured(family, attached, rows), measured(family, attached, rows)) == 0
    family.train(True)
    assert apart(measured(family, attached, rows), measured(family, attached, rows)) > 1e-3


def test_full_without_a_kept_base_says_that_it_is_gone() -> None:
    attached = attach(base("llama"), "full")
    with pytest.raises(RunError, match="overwritten"), attached.disabled():
        pass
    with pytest.raises(NotMergeable):
        attached.merge()


def test_attaching_freezes_the_rest_whatever_was_on() -> None:
    family = base("llama")
    family.model.requires_grad_(True)
    attach_method(family, METHODS["lora"](), 0)
    assert not any(p.requires_grad for p in family.model.parameters())
