"""AdaLoRA's search: against PEFT's own step by step, however a batch is cut, and resumed. Read `test_peft.py` first."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import SFT, TOKENIZER, apart, attach, base, documents, logits
from safetensors.torch import load_file
from torch import Tensor

from luthier import assembly
from luthier.api.inspect_run import inspect_run
from luthier.api.train import train
from luthier.assembly.factory import attach_method
from luthier.assembly.run_io import open_run, save_tuned
from luthier.core.errors import NotFinite, RecipeError, RunError
from luthier.core.protocols import TRAINING
from luthier.data.packing import pack_examples
from luthier.methods.adalora import AdaLora, AdaLoraConfig
from luthier.methods.composite import CompositeConfig
from luthier.methods.multi_adapter import AdapterManager
from luthier.methods.prefixed import PrefixedMethod
from luthier.models import CausalLM
from luthier.training import checkpoint
from luthier.training.optimizer import Optimizer, OptimizerConfig
from luthier.training.run_folder import Run
from luthier.training.step import step
from tiny import save_tiny, tiny

peft = pytest.importorskip("peft")

SAME, FAR = 1e-9, 1e-3
STEPS, RATE = 14, 5e-3
SEARCH = {"target_r": 2, "init_r": 4, "alpha": 12.0, "warmup_fraction": 0.2, "final_fraction": 0.3, "prune_interval": 0.15}  # steps 3, 10 and 2
TOKENS = torch.tensor([[7, 201, 33, 33, 90, 255, 12, 64, 3, 150, 41, 8]])
MAPS = {"llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "gpt2": ["c_attn", "c_proj", "c_fc"]}
KIND = pytest.mark.parametrize("kind", MAPS)


def optimizer(attached: Any, config: OptimizerConfig | None = None, total: int = STEPS) -> Optimizer:
    return Optimizer(attached.parameters(), attached.lr_multiplier, RATE, config or OptimizerConfig(lr_scheduler_type="constant", warmup_ratio=0),
                     total, attached.optimizer_hooks)


def searched(kind: str = "llama", **settings: Any) -> tuple[CausalLM, AdaLora]:
    family = base(kind)
    attached = attach(family, "adalora", stirred=False, **SEARCH | settings)
    assert isinstance(attached, AdaLora)
    return family, attached


def take(family: CausalLM, attached: Any, adam: Optimizer, steps: range, micro: int | None = None) -> None:
    for i in steps:
        adam.set_learning_rate(i)
        step(family, SFT, pack_examples(documents(seed=i), micro), adam)


def kept(attached: AdaLora) -> list[list[bool]]:
    return [layer.kept.tolist() for layer in attached.layers]


# ---------------------------------------------------------------- against PEFT


def theirs(kind: str, attached: AdaLora) -> Any:
    """PEFT's, of the settings `SEARCH` and the same weights."""
    first, last, every = AdaLoraConfig(**SEARCH).compute_schedule(STEPS)
    config = peft.AdaLoraConfig(
        task_type="CAUSAL_LM", target_modules=MAPS[kind], target_r=2, init_r=4, lora_alpha=12, tinit=first,
        tfinal=STEPS - last, deltaT=every, total_step=STEPS, fan_in_fan_out=kind == "gpt2")
    model = peft.get_peft_model(tiny(kind), config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in adapter(model).items():
            parameter.copy_(attached.parameters()[name])
    return model


def adapter(model: Any) -> dict[str, torch.nn.Parameter]:
    """PEFT's parameters by the names that they have in its files."""
    return {n.replace(".default", ""): p for n, p in model.named_parameters()
            if "lora_" in n and "ranknum" not in n}


def pattern(model: Any, attached: AdaLora) -> list[list[bool]]:
    """The ranks that PEFT's last pruning left, in our order."""
    found = {n.replace(".default", ""): p for n, p in model.peft_config["default"].rank_pattern.items()}
    return [found[f"{layer.site.name}.lora_E"] for layer in attached.layers]


def steps_of_both(kind: str, **settings: Any) -> Iterator[tuple[int, AdaLora, Any]]:
    """Both trained side by side on the same tokens, each by its own gradients; yielded after each step."""
    family, attached = searched(kind, **settings)
    other = theirs(kind, attached)
    adam = optimizer(attached)
    plain = torch.optim.AdamW(adapter(other).values(), lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    last = attached.config.compute_schedule(STEPS)[1]
    for k in range(1, STEPS + 1):
        tokens = (TOKENS * k + k) % 250
        adam.set_learning_rate(k - 1)
        family.model(input_ids=tokens, labels=tokens).loss.backward()
        adam.run_pre_step_hook()
        adam.step(adam.clip_grad_norm())
        other(input_ids=tokens, labels=tokens).loss.backward()  # PEFT adds the penalty to it
        torch.nn.utils.clip_grad_norm_(adapter(other).values(), 1.0)
        plain.step()
        if k == last:  # the paper measures before this pruning too; PEFT leaves it out
            other.base_model.rankallocator.update_ipt(other.base_model.model)
        other.base_model.update_and_allocate(k)
        plain.zero_grad()
        yield k, attached, other


@KIND
@pytest.mark.usefixtures("double")
def test_every_step_of_the_search_is_pefts(kind: str) -> None:
    left = []
    for k, attached, other in steps_of_both(kind):
        assert apart({n: p.detach() for n, p in attached.parameters().items()},
                     {n: p.detach() for n, p in adapter(other).items()}) < SAME, f"step {k}"
        if other.peft_config["default"].rank_pattern is not None:
            assert kept(attached) == pattern(other, attached), f"step {k}"
        for part, name in ((part, f"{layer.site.name}.{part.name}.default") for layer in attached.layers for part in layer.parts):
            memory = other.base_model.rankallocator.exp_avg_ipt.get(name)  # forgotten once the search has ended
            assert (memory is None) == (k >= 10)
            assert memory is None or torch.allclose(part.mean, memory, rtol=SAME, atol=0)
        left.append(sum(map(sum, kept(attached))))
    maps = len(attached.layers)
    assert left[:3] == [4 * maps] * 3
    assert left[9:] == [2 * maps] * 5
    assert len(set(left)) > 3, "it went down in several prunings"
    assert len(set(map(sum, kept(attached)))) > 1, "some maps kept more than others"


@pytest.mark.parametrize("settings", [{"beta1": 0.2}, {"orth_reg_weight": 0.0}, {"prune_interval": 0.07}])
@pytest.mark.usefixtures("double")
def test_another_search_is_not_pefts(settings: dict[str, Any]) -> None:
    """The control of the equality above: PEFT's settings stay as they are, all but one of what ours read."""
    assert any(apart({n: p.detach() for n, p in attached.parameters().items()},
                     {n: p.detach() for n, p in adapter(other).items()}) > FAR
               for _, attached, other in steps_of_both("llama", **settings))


@KIND
@pytest.mark.usefixtures("double")
def test_the_same_weights_give_the_same_function_and_gradients(kind: str) -> None:
    family = base(kind)
    attached = attach(family, "adalora", **SEARCH)
    other = theirs(kind, attached).eval()

    def outcome(model: Any, parameters: dict[str, Any]) -> dict[str, Tensor]:
        found = model(input_ids=TOKENS).logits
        slope = torch.sin(torch.arange(found.numel(), dtype=torch.float64)).view_as(found)
        gradients = torch.autograd.grad((found * slope).sum(), list(parameters.values()))
        return {"logits": found.detach(), **dict(zip(parameters, gradients, strict=True))}

    found = outcome(family.model, attached.parameters())
    assert apart(found, outcome(other, adapter(other))) < SAME
    with torch.no_grad():
        next(iter(adapter(other).values())).mul_(1.1)
    assert apart(found, outcome(other, adapter(other))) > FAR


@pytest.mark.parametrize(("total", "settings"), [(1, {}), (2, {}), (7, {}), (40, {}), (100, {"prune_interval": 0.03}),
                                                 (23, {"warmup_fraction": 0.0, "final_fraction": 0.0}), (1000, {"final_fraction": 0.7})])
def test_the_budget_is_pefts_at_every_step(total: int, settings: dict[str, Any]) -> None:
    config = AdaLoraConfig(**settings)
    first, last, every = config.compute_schedule(total)
    assert config.compute_budget(last, total, 3) == 8 * 3, "it always ends"
    if first >= last:
        return
    model = tiny("llama")
    other = peft.get_peft_model(model, peft.AdaLoraConfig(
        target_modules=["q_proj"], tinit=first, tfinal=total - last, deltaT=every, total_step=total))
    for k in range(1, last):
        budget, due = other.base_model.rankallocator.budget_schedule(k)
        assert config.compute_budget(k, total, 2) == (budget if due else None), k


@pytest.mark.usefixtures("double")
def test_our_folder_loads_in_peft(tmp_path: Path) -> None:
    family, attached = searched()
    bare, origin = logits(family), save_tiny(tmp_path / "base", "llama")
    take(family, attached, optimizer(attached), range(STEPS))
    made = assembly.build_recipe({"model": str(origin), "data": "-", "method": attached.config.model_dump()})
    (tmp_path / "run").mkdir()
    save_tuned(Run(tmp_path / "run"), made, family, attached)
    form, saved = (json.loads((tmp_path / "run/adapter_config.json").read_text()),
                   load_file(tmp_path / "run/adapter_model.safetensors"))
    for layer in attached.layers:
        assert form["rank_pattern"][f"{layer.site.name}.lora_E"] == layer.kept.tolist()
        assert saved[f"{layer.path}.lora_A"].shape[0] == saved[f"{layer.path}.lora_B"].shape[1] == int(layer.kept.sum())
    assert sum(t.shape[0] for n, t in saved.items() if n.endswith("lora_E")) == 2 * len(attached.layers)
    assert not any(name.startswith(TRAINING) for name in saved)
    model = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "run", autocast_adapter_dtype=False).eval()
    family.train(False)
    assert (logits(CausalLM(model, TOKENIZER)) - logits(family)).abs().max() < SAME
    assert (logits(family) - bare).abs().max() > FAR
    again, fresh = attach_method(base("llama"), AdaLoraConfig.from_peft(form), 8), base("llama")
    assert {n: t.shape for n, t in again.state().items()}.keys() == attached.state().keys()
    attach_method(fresh, attached.config, 9).load(saved)
    assert (logits(fresh) - logits(family)).abs().max() < SAME


@pytest.mark.usefixtures("double")
def test_a_folder_of_pefts_loads_here_and_merges(tmp_path: Path) -> None:
    *_, (_, attached, other) = steps_of_both("llama")
    other.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = other(input_ids=TOKENS).logits
    form = json.loads((tmp_path / "adapter_config.json").read_text())
    assert form["rank_pattern"]
    config = assembly.build_recipe({"model": "-", "data": "-", "method": AdaLoraConfig.from_peft(form).model_dump()}).method
    assert (config.target_r, config.init_r, config.alpha) == (2, 4, 12.0)
    assert config.compute_schedule(STEPS) == attached.config.compute_schedule(STEPS)
    family = base("llama")
    bare = logits(family)
    loaded = attach_method(family, config, 0)
    loaded.load(load_file(tmp_path / "adapter_model.safetensors"))
    with torch.no_grad():
        assert (family.model(input_ids=TOKENS).logits - wanted).abs().max() < SAME
        loaded.merge()
        assert (family.model(input_ids=TOKENS).logits - wanted).abs().max() < SAME
        with loaded.disabled():
            assert torch.equal(logits(family), bare)


def test_a_folder_of_pefts_opens_as_a_run(tmp_path: Path) -> None:
    origin = save_tiny(tmp_path / "base", "llama", dtype=torch.float32)
    _, attached = searched()
    other = theirs("llama", attached)
    other.peft_config["default"].base_model_name_or_path = str(origin)
    other.save_pretrained(tmp_path / "run")
    made, _, opened = open_run(Run(tmp_path / "run"))
    assert made.method.name == "adalora"
    assert isinstance(opened, AdaLora)


@pytest.mark.parametrize("field", [{"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"use_dora": True},
                                   {"trainable_token_indices": [0]}, {"a_field_of_the_future": True}])
def test_what_is_not_read_of_pefts_settings_is_refused(field: dict[str, Any]) -> None:
    plain = peft.AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], total_step=9).to_dict()
    assert AdaLoraConfig.from_peft(plain).target_r == 8
    with pytest.raises(RunError, match=next(iter(field))):
        AdaLoraConfig.from_peft({**plain, **field})


# ---------------------------------------------------------------- the laws of a step


@pytest.mark.usefixtures("double")
def test_how_a_batch_is_cut_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(micro: int | None) -> AdaLora:
        family, attached = searched()
        take(family, attached, optimizer(attached), range(STEPS), micro)
        return attached

    whole, cut = trained(None), trained(20)
    assert len(pack_examples(documents(), 20)) > 2
    assert kept(whole) == kept(cut)
    for name, tensor in whole.state().items():
        assert torch.allclose(cut.state()[name].double(), tensor.double(), rtol=1e-7, atol=1e-12), name
    add_penalty = AdaLora.pre_step
    monkeypatch.setattr(AdaLora, "pre_step", lambda self: [add_penalty(self) for _ in pack_examples(documents(), 20)])
    often = trained(20)  # the control: the penalty once a micro-batch
    assert any(not torch.allclose(p, often.parameters()[n], rtol=1e-5) for n, p in whole.parameters().items())


def test_the_penaltys_gradient_is_that_of_its_formula() -> None:
    attached = attach(base("llama"), "adalora", **SEARCH, orth_reg_weight=0.3)
    parameters = attached.parameters()
    penalty = torch.zeros((), dtype=torch.float64)
    for layer in attached.layers:
        one = torch.eye(4, dtype=torch.float64)
        penalty = penalty + (layer.a @ layer.a.T - one).norm() + (layer.b.T @ layer.b - one).norm()
    (0.3 / (2 * len(attached.layers)) * penalty).backward()
    wanted = {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}
    for parameter in parameters.values():
        parameter.grad = None
    attached.pre_step()
    assert apart({n: parameters[n].grad for n in wanted}, wanted) < 1e-12
    assert len(wanted) == 2 * len(attached.layers)


@pytest.mark.parametrize("at", [2, 5, 10, 12])  # before, within, at the end of and after the search
def test_resumed_across_a_pruning_it_ends_with_the_same_bits(at: int, tmp_path: Path) -> None:
    family, attached = searched()
    adam = optimizer(attached)
    take(family, attached, adam, range(at))
    checkpoint.save_checkpoint(tmp_path, at, {"method": attached.state(), "optimizer": adam.state()}, {}, keep=1)
    take(family, attached, adam, range(at, STEPS))

    def resumed(forget: str = "nothing") -> AdaLora:
        fresh, again = searched(seed=99) if forget == "nothing" else searched()
        saved = checkpoint.load_checkpoint(tmp_path / f"step-{at}")
        again.load({n: torch.zeros_like(t) if n.endswith(forget) else t for n, t in saved.tensors["method"].items()})
        adam = optimizer(again)
        adam.load(saved.tensors["optimizer"])
        take(fresh, again, adam, range(at, STEPS))
        return again

    found, wanted = resumed().state(), attached.state()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[n], t) for n, t in wanted.items())
    if at == 5:  # the control: the search's memory decides
        assert kept(resumed("mean")) != kept(attached)


def test_what_is_not_finite_changes_nothing() -> None:
    family, attached = searched()
    adam = optimizer(attached)
    take(family, attached, adam, range(5))
    before, ranks = {n: t.clone() for n, t in attached.state().items()}, kept(attached)

    class Infinite:
        required_outputs, count, needs_full_batch = SFT.required_outputs, SFT.count, False

        def __call__(self, outputs: Any, target: Any) -> Any:
            loss = SFT(outputs, target)
            return type(loss)(loss.total * math.inf, loss.count, loss.metrics)

    adam.set_learning_rate(5)  # the sixth step, of which a pruning is due
    assert attached.config.compute_budget(6, STEPS, 14) is not None
    with pytest.raises(NotFinite):
        step(family, Infinite(), pack_examples(documents(), None), adam).read_metrics()
    assert all(torch.equal(t, before[n]) for n, t in attached.state().items())
    assert kept(attached) == ranks
    take(family, attached, adam, range(5, 6))
    assert sum(map(sum, kept(attached))) == attached.config.compute_budget(6, STEPS, 14)


def test_what_fell_may_rise_until_the_search_ends() -> None:
    family, attached = searched()
    adam = optimizer(attached)

    def praised() -> tuple[Any, int]:
        """A triplet that the last pruning took, its memory made that of the most important one."""
        layer = next(layer for layer in attached.layers if not layer.kept.all())
        place = int((~layer.kept).nonzero()[0])
        for part in layer.parts:
            part.mean.select(part.dim, place).fill_(1e3)
            part.uncertainty.select(part.dim, place).fill_(1e3)
        return layer, place

    take(family, attached, adam, range(4))
    layer, place = praised()
    assert layer.e[place] == 0
    take(family, attached, adam, range(4, 6))
    assert layer.kept[place]
    assert layer.e[place] != 0
    take(family, attached, adam, range(6, 10))
    layer, place = praised()
    for i in range(10, STEPS):
        take(family, attached, adam, range(i, i + 1))
        assert not layer.kept[place]
        assert layer.e[place] == 0


def test_an_adapter_saved_between_prunings_keeps_what_grew_again() -> None:
    family, attached = searched()
    take(family, attached, optimizer(attached), range(5))  # pruned after the fourth step; in the fifth all of e moves
    assert not all(map(all, kept(attached)))
    fresh, again = searched(seed=99)
    again.load({n: t for n, t in attached.state().items() if not n.startswith(TRAINING)})
    family.train(False)
    assert (logits(fresh) - logits(family)).abs().max() < 1e-6
    assert all(layer.get_active_mask().all() for layer in again.layers)


def test_a_run_searches(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"{w}?", "completion": w[::-1]}) + "\n"
                                                 for w in ("alpha", "beta", "gamma", "delta")))
    run = train(model=str(save_tiny(tmp_path / "base", "llama", dtype=torch.float32)), data=str(tmp_path / "rows.jsonl"),
                method={"name": "adalora", **SEARCH}, training={"max_steps": STEPS, "batch_size": 2}, output_dir=str(tmp_path / "run"),
                optimizer={"learning_rate": RATE}, quiet=True)
    left = [t.shape[0] for n, t in load_file(run.path / "adapter_model.safetensors").items() if n.endswith("lora_E")]
    assert (len(left), sum(left)) == (14, 2 * 14)
    assert len(set(left)) > 1


def test_wrappers_pass_the_update_on() -> None:
    family = base("llama")
    several = CompositeConfig.parse({"parts": ["bitfit", {"name": "adalora", **SEARCH}]}).attach(family.structure, seed=0)
    inner = next(part for part in several.parts if isinstance(part, AdaLora))
    assert several.parts[0] is inner, "it comes before what adds to the changed map"
    take(family, several, optimizer(several), range(STEPS))
    assert sum(map(sum, kept(inner))) == 2 * len(inner.layers)
    assert PrefixedMethod("critic", inner).optimizer_hooks == (inner,)
    manager = AdapterManager(family.structure)
    manager.add("policy", inner)
    assert len(manager.optimizer_hooks) == 1
    manager.freeze("policy")
    assert manager.optimizer_hooks == ()
    assert attach(base("llama"), "lora").optimizer_hooks == ()


# ---------------------------------------------------------------- settings, and what it says of itself


@pytest.mark.parametrize(("settings", "words"), [
    ({"target_r": 8, "init_r": 4}, "init_r 4 is below target_r 8"), ({"warmup_fraction": 0.6, "final_fraction": 0.5}, "no step for the search")])
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        AdaLoraConfig.parse(settings)


def test_experts_are_refused() -> None:
    with pytest.raises(RecipeError, match="experts"):
        attach(base("mixtral"), "adalora", target_modules=("q", "experts"))


def test_inspect_shows_the_ranks_that_are_left(tmp_path: Path) -> None:
    family, attached = searched()
    take(family, attached, optimizer(attached), range(STEPS))
    with torch.no_grad():  # a map that lost all of its ranks
        attached.layers[3].kept.fill_(False)
        attached.layers[3].e.zero_()
    made = assembly.build_recipe({"model": str(save_tiny(tmp_path / "base", "llama")), "data": "-", "output_dir": str(tmp_path / "run"),
                         "method": attached.config.model_dump()})
    run = Run(tmp_path / "run")
    run.create(assembly.dump_recipe(made), {})
    save_tuned(run, made, family, attached)
    (reading,) = inspect_run(run, quiet=True)["readings"]
    for layer, row in zip(attached.layers, reading["rows"], strict=True):
        assert row["of"] == int(layer.kept.sum())
        change = layer.scale * (layer.b @ torch.diag(layer.e[:, 0]) @ layer.a).detach()
        assert row["size"] == pytest.approx(float(change.norm() / layer.site.weight.norm()), rel=1e-4)
        assert row["rank"] <= row["of"] + 1e-6
    assert reading["rows"][3]["of"] == reading["rows"][3]["rank"] == 0
