"""Virtual tokens: ours against PEFT's and against a plain re-derivation, and every way to call the model against the
others. Read `lab.py` first; what every method must keep is in `test_methods.py`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lab import TOKENIZER, apart, attach, base, documents, logits, measured, paths, stir, trees
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, DynamicCache

from luthier import assembly
from luthier.assembly.factory import attach_method, load_family
from luthier.assembly.run_io import open_run, save_tuned
from luthier.core.errors import BaseError, RecipeError, RunError
from luthier.core.examples import Origin
from luthier.core.protocols import TRAINING, SamplingParams
from luthier.core.types import TokenizedExample, TokenSpan
from luthier.data.packing import build_batch, pack_examples
from luthier.methods import METHODS, READERS
from luthier.methods.prompt import EMBEDDINGS
from luthier.models import CausalLM
from luthier.models.families.encoder import Encoder
from luthier.training.optimizer import Optimizer, OptimizerConfig
from luthier.training.run_folder import Run
from luthier.training.step import step
from tiny import KINDS, save_tiny, tiny

pytestmark = pytest.mark.usefixtures("double")

SAME, FAR = 1e-9, 1e-3
N = 5
TOKENS = torch.tensor([[7, 201, 33, 33, 90, 255, 12, 64, 3, 150, 41, 8]])
WINDOWED = {"mistral", "gemma2", "gemma3"}
KIND = pytest.mark.parametrize("kind", KINDS)
SETTINGS: dict[str, dict[str, Any]] = {"prompt": {"num_virtual_tokens": N}, "ptuning": {"num_virtual_tokens": N, "encoder_hidden_size": 7},
                                       "prefix": {"num_virtual_tokens": N}, "ptuning_v2": {"num_virtual_tokens": N}}
METHOD = pytest.mark.parametrize("method", SETTINGS)
DEEP = {"prefix", "ptuning_v2"}


def tuned(kind: str, method: str, layout: Any = None, **settings: Any) -> tuple[CausalLM, Any]:
    family = base(kind, layout)
    return family, attach(family, method, **{**SETTINGS[method], **settings})


# ---------------------------------------------------------------- a plain re-derivation: before every document by itself


def alone(family: CausalLM, attached: Any, ids: torch.Tensor, deep: bool) -> torch.Tensor:
    """[1, L, V] logits of one document behind the virtual tokens, by Transformers' own arguments."""
    with attached.disabled():
        if not deep:
            embeds = torch.cat([attached.compute_virtual_tokens()[None], family.structure.embedding(ids)], dim=1)
            return family.model(inputs_embeds=embeds).logits[:, attached.compute_virtual_tokens().shape[0]:]
        cache = DynamicCache()
        for i, (key, value) in enumerate(attached.compute_virtual_tokens()):
            cache.update(key[None], value[None], i)
        n = attached.compute_virtual_tokens().shape[3]
        positions = torch.arange(n, n + ids.shape[1])[None]
        return family.model(input_ids=ids, past_key_values=cache, position_ids=positions).logits


@KIND
@METHOD
def test_computed_once_a_row_is_put_before_every_document(kind: str, method: str) -> None:
    # A window would hide a prefix that Transformers keeps in its cache: here it is wider than all.
    wide = {"sliding_window": 64} if kind in WINDOWED and method in DEEP else {}
    family = base(kind, "packed", **wide)
    attached = attach(family, method, **SETTINGS[method])
    examples = documents()
    found = measured(family, attached, [build_batch(examples)])
    weight = sum(sum(e.spans[0].weights[1:]) for e in examples)
    for n in (len(examples), len(examples) - 1):  # the control leaves one document out
        loss = torch.zeros((), dtype=torch.float64)
        for example in examples[:n]:
            ids, weights = torch.tensor([example.spans[0].ids]), torch.tensor(example.spans[0].weights).double()
            said = alone(family, attached, ids, method in DEEP)[0, :-1]
            loss = loss + (F.cross_entropy(said, ids[0, 1:], reduction="none") * weights[1:]).sum() / weight
        named = attached.parameters()
        slopes = torch.autograd.grad(loss, list(named.values()))
        wanted = {"loss": loss.detach(), **dict(zip(named, slopes, strict=True))}
        assert (apart(found, wanted) < SAME) == (n == len(examples))


@KIND
@METHOD
def test_packed_is_padded_and_a_tree_is_its_paths(kind: str, method: str) -> None:
    family, attached = tuned(kind, method, "packed")
    rows = [build_batch([*documents(), *trees()])]
    found = measured(family, attached, rows)
    assert apart(measured(*tuned(kind, method, "padded"), rows), found) < SAME
    tree = trees()[1]
    whole = measured(family, attached, [build_batch([tree])])
    assert apart(whole, measured(family, attached, [build_batch([path]) for path in paths(tree)])) < SAME
    assert apart(whole, measured(family, attached, [build_batch(trees()[:1])])) > FAR


@METHOD
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_how_a_batch_is_cut_changes_nothing(kind: str, method: str) -> None:
    family, attached = tuned(kind, method)
    examples = [*documents(), *trees()]
    whole = measured(family, attached, pack_examples(examples, None))
    assert apart(measured(family, attached, pack_examples(examples, 40)), whole) < SAME


@METHOD
@pytest.mark.parametrize("kind", ["gpt2", "gemma3"])
def test_recomputed_blocks_meet_the_tokens_of_their_forward_pass(kind: str, method: str) -> None:
    rows = [build_batch(documents())]
    family, attached = tuned(kind, method)
    wanted = measured(family, attached, rows)
    family.enable_gradient_checkpointing()
    family.train(True)
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:  # the virtual tokens move between the forward and the backward pass of an earlier call
        outputs = family.forward(row.inputs, row.target, frozenset({"token_logps"}))
        with torch.no_grad(), attached.disabled():
            family.forward(row.inputs, row.target, frozenset({"token_logps"}))
        total = total - (row.target.weights * outputs.token_logps).sum() / float(row.target.weights.double().sum())
    for parameter in attached.parameters().values():
        parameter.grad = None
    total.backward()
    found = {"loss": total.detach(), **{n: p.grad for n, p in attached.parameters().items()}}
    assert apart(found, wanted) < SAME


# ---------------------------------------------------------------- every way to call the model


@KIND
@METHOD
def test_padding_on_either_side_and_the_bare_call_give_the_same(kind: str, method: str) -> None:
    family, _ = tuned(kind, method)
    rows = [list(range(20, 20 + n)) for n in (13, 4, 9)]
    width = max(map(len, rows))
    with torch.no_grad():
        single = [family.model(input_ids=torch.tensor([row])).logits[0] for row in rows]
        for left in (True, False):
            gap = [[0] * (width - len(row)) for row in rows]
            ids, mask = (torch.tensor([g + r if left else r + g for g, r in zip(gap, side, strict=True)])
                         for side in (rows, [[1] * len(row) for row in rows]))
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            said = family.model(input_ids=ids, attention_mask=mask, position_ids=positions,
                                output_hidden_states=True)
            assert said.logits.shape[1] == width == said.hidden_states[0].shape[1]
            for row, found, wanted in zip(mask, said.logits, single, strict=True):
                assert (found[row.bool()] - wanted).abs().max() < SAME
        assert (single[0][:4] - family.model(input_ids=torch.tensor([rows[1]])).logits[0]).abs().max() < SAME
        assert torch.equal(family.model(torch.tensor([rows[0]]), return_dict=False)[0][0], single[0])


@KIND
@METHOD
def test_calls_with_a_cache_go_on_where_the_last_ended(kind: str, method: str) -> None:
    family, attached = tuned(kind, method)
    ids = torch.arange(30, 52)[None]
    with torch.no_grad():
        whole = family.model(input_ids=ids).logits
        for told in (True, False):  # with positions and a mask, or with neither
            cache, said = DynamicCache(config=family.model.config), []
            for start, end in ((0, 7), (7, 8), (8, 12), (12, 22)):
                given = {"position_ids": torch.arange(start, end)[None],
                         "attention_mask": torch.ones(1, end, dtype=torch.int64)} if told else {}
                said.append(family.model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True, **given).logits)
            assert (torch.cat(said, 1) - whole).abs().max() < SAME
        with attached.disabled():
            assert (family.model(input_ids=ids).logits - whole).abs().max() > FAR


@METHOD
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_transformers_own_generation_gives_our_answers(kind: str, method: str) -> None:
    family, _ = tuned(kind, method)
    prompts = [list(range(40, 49)), [9, 8, 7]]
    ours = [g.token_ids for g in sorted(family.generate(prompts, SamplingParams(max_new_tokens=8)), key=lambda g: g.index)]
    ids = torch.tensor([prompts[0], [0] * 6 + prompts[1]])
    mask = torch.tensor([[1] * 9, [0] * 6 + [1] * 3])
    theirs = family.model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0,
                                   eos_token_id=None)[:, 9:].tolist()
    for mine, other in zip(ours, theirs, strict=True):
        assert tuple(other[:len(mine)]) == mine
        assert len(mine) > 2


@METHOD
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_text_that_leaves_no_room_is_refused_and_one_that_just_does_is_not(kind: str, method: str) -> None:
    family, attached = tuned(kind, method)
    last = 256 - N
    with torch.no_grad():
        family.model(input_ids=torch.zeros(1, last, dtype=torch.int64))
        with pytest.raises(BaseError, match=f"{last + 1} tokens and {N} virtual"):
            family.model(input_ids=torch.zeros(1, last + 1, dtype=torch.int64))
        padding = torch.tensor([[0] * N + [1] * last])  # padding is no text
        family.model(input_ids=torch.zeros(1, 256, dtype=torch.int64), attention_mask=padding,
                     position_ids=(padding.cumsum(1) - 1).clamp(min=0))
        long = documents((last + 1,))
        with pytest.raises(BaseError, match="virtual"):
            family.forward(build_batch(long).inputs, build_batch(long).target, frozenset({"token_logps"}))
    (answer,) = family.generate([[5] * (last - 3)], SamplingParams(max_new_tokens=50))
    assert len(answer.token_ids) <= 3
    with attached.disabled(), torch.no_grad():
        family.model(input_ids=torch.zeros(1, 256, dtype=torch.int64))


def test_two_kinds_of_virtual_tokens_stand_behind_one_another() -> None:
    family = base("llama")
    prompt, prefix = attach(family, "prompt", num_virtual_tokens=3), attach(family, "prefix", num_virtual_tokens=4)
    with torch.no_grad():
        found = family.model(input_ids=TOKENS).logits
        with prompt.disabled():
            longer = torch.cat([prompt.compute_virtual_tokens()[None], family.structure.embedding(TOKENS)], dim=1)
            assert (family.model(inputs_embeds=longer).logits[:, 3:] - found).abs().max() < SAME
    rows = [build_batch(documents())]
    both = {n: p for part in (prompt, prefix) for n, p in part.parameters().items()}
    padded = base("llama", "padded")
    again = [attach(padded, name, num_virtual_tokens=n) for name, n in (("prompt", 3), ("prefix", 4))]
    assert {**measured(family, prefix, rows)}.keys() == {"loss", *prefix.parameters()}
    assert apart(measured(family, prefix, rows), measured(padded, again[1], rows)) < SAME
    assert apart(measured(family, prompt, rows), measured(padded, again[0], rows)) < SAME
    assert len(both) == 5


def test_what_has_no_meaning_is_refused() -> None:
    family, attached = tuned("llama", "prompt")
    attached.gate.scale = 0.5
    with pytest.raises(RunError, match=r"weight of 0\.5"):
        logits(family)
    attached.gate.scale, attached.gate.token_index, attached.gate.dim_size = 1.0, (1, torch.tensor([0, 1])), 20
    with pytest.raises(RunError, match="cannot have different adapters"):
        logits(family)
    with pytest.raises(RecipeError, match="does not support virtual tokens"):
        METHODS["prefix"]().attach(replace(family.structure, injector=None), seed=0)


# ---------------------------------------------------------------- encoders: what is put in sees what follows it

SMALL = {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 70, "initializer_range": 0.15, "hidden_dropout_prob": 0.0,
         "attention_probs_dropout_prob": 0.0}
READS = pytest.mark.parametrize("kind", ["bert", "roberta"])  # the second counts positions from 2


def reader(kind: str, layout: Any = None) -> Encoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **SMALL, pad_token_id=1 if kind == "roberta" else 0)
        model = AutoModel.from_config(config, dtype=torch.float64, add_pooling_layer=False).eval()
    return Encoder(model, TOKENIZER, layout)


def states(family: Encoder, attached: Any, examples: list[TokenizedExample]) -> dict[str, torch.Tensor]:
    """States of a packed row, and the gradients of an odd function of them."""
    found = family.states(build_batch(examples).inputs)
    slope = torch.sin(torch.arange(found.numel(), dtype=torch.float64)).view_as(found)
    named = attached.parameters()
    return {"states": found.detach(),
            **dict(zip(named, torch.autograd.grad((found * slope).sum(), list(named.values())), strict=True))}


def behind(family: Encoder, attached: Any, ids: torch.Tensor, deep: bool) -> torch.Tensor:
    """[L, D] states of one text behind the virtual tokens, by the bare model. A prefix is played by N more tokens whose
    keys and values are exchanged for it in every layer: what else becomes of them, nobody sees."""
    embeds = family.structure.embedding(torch.cat([torch.full((N,), 9), ids]))[None]
    with attached.disabled():
        if not deep:
            embeds = torch.cat([attached.compute_virtual_tokens()[None], embeds[:, N:]], dim=1)
            return family.model(inputs_embeds=embeds).last_hidden_state[0, N:]
        handles = []
        for site in family.structure.linears:
            if site.role in ("k", "v"):
                rows = attached.compute_virtual_tokens()[site.layer_index, int(site.role == "v")].transpose(0, 1).flatten(1)
                handles.append(site.module.register_forward_hook(
                    lambda _m, _a, out, rows=rows: torch.cat([rows[None], out[:, N:]], dim=1)))
        found = family.model(inputs_embeds=embeds).last_hidden_state[0, N:]
        for handle in handles:
            handle.remove()
        return found


@READS
@METHOD
def test_an_encoders_packed_row_is_padded_and_each_text_by_itself(kind: str, method: str) -> None:
    family = reader(kind, "packed")
    attached = attach(family, method, **SETTINGS[method])
    examples = [TokenizedExample((TokenSpan(tuple(range(20 + n, 20 + 2 * n)), (1.0,) * n),), Origin("lab", n)) for n in (7, 2, 12)]
    found = states(family, attached, examples)
    single = torch.cat([behind(family, attached, torch.tensor(e.spans[0].ids), method in DEEP) for e in examples])
    assert (found["states"] - single).abs().max() < SAME
    plain = torch.cat([family.model(input_ids=torch.tensor([e.spans[0].ids])).last_hidden_state[0] for e in examples])
    assert (plain - single).abs().max() < SAME  # without positions
    with torch.no_grad(), attached.disabled():
        assert (family.states(build_batch(examples).inputs) - single).abs().max() > FAR
    for rows in (examples, [*examples, *trees()]):
        other = reader(kind, "padded")
        wanted = states(other, attach(other, method, **SETTINGS[method]), rows)
        assert apart(states(family, attached, rows), wanted) < SAME


@READS
def test_an_encoder_says_when_a_text_leaves_no_room(kind: str) -> None:
    family = reader(kind)
    attach(family, "prefix", num_virtual_tokens=N)
    last = family.structure.sizes["context"] - N
    with torch.no_grad():
        family.model(input_ids=torch.full((1, last), 7))
        with pytest.raises(BaseError, match="virtual"):
            family.model(input_ids=torch.full((1, last + 1), 7))


def test_lists_hold_one_kind_of_virtual_tokens(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="prompt and prefix all train virtual tokens"):
        assembly.build_recipe({"data": "-", "method": ["prompt", "lora", "prefix"]})
    origin = save_tiny(tmp_path / "base", "llama")
    made = assembly.build_recipe({"model": str(origin), "data": "-", "method": [{"name": "ptuning", "num_virtual_tokens": N}, "bitfit"],
                         "output_dir": str(tmp_path / "run")})
    run = Run(tmp_path / "run")
    run.create(assembly.dump_recipe(made), {})
    family = load_family(made.model)
    attached = attach_method(family, made.method, 0)
    stir(attached)
    save_tuned(run, made, family, attached)
    _, other, again = open_run(run)
    assert (logits(other) - logits(family)).abs().max() < 1e-5  # the base was loaded in float32
    with again.disabled():
        assert (logits(other) - logits(family)).abs().max() > FAR


# ---------------------------------------------------------------- where they start


def test_they_start_as_the_words_of_a_text() -> None:
    family = base("llama")
    ids = list(b"to to")
    prompt = attach(family, "prompt", stirred=False, num_virtual_tokens=7, prompt_tuning_init_text="to to")
    assert torch.equal(prompt.compute_virtual_tokens(), family.structure.embedding(torch.tensor((ids * 2)[:7])))
    for name in ("ptuning", "prefix"):
        fresh = base("llama")
        attached = attach(fresh, name, stirred=False, num_virtual_tokens=5, prompt_tuning_init_text="to to")
        bare = base("llama")
        with torch.no_grad():
            whole = bare.model(input_ids=torch.tensor([[*ids, *TOKENS[0]]])).logits[:, 5:]
            assert (fresh.model(input_ids=TOKENS).logits - whole).abs().max() < SAME, name
        stir(attached)
        assert (logits(fresh) - logits(bare)).abs().max() > FAR
    with pytest.raises(RecipeError, match="omit the text"):
        METHODS["prompt"].parse({"prompt_tuning_init_text": "to", "prompt_tuning_init": "random"})


def test_the_rate_is_in_units_of_what_stands_there() -> None:
    family = base("llama", num_hidden_layers=3)
    prompt = attach(family, "prompt", stirred=False)
    assert prompt.lr_multiplier(EMBEDDINGS) == pytest.approx(float(prompt.compute_virtual_tokens().square().mean().sqrt()))
    prefix = attach(base("llama", num_hidden_layers=3), "prefix", stirred=False)
    rates = {name: prefix.lr_multiplier(name) for name in prefix.parameters()}
    assert len(set(rates.values())) == 6
    for name, parameter in prefix.parameters().items():
        assert rates[name] == pytest.approx(float(parameter.square().mean().sqrt()))


# ---------------------------------------------------------------- the encoder is folded away, and training goes on


@pytest.mark.parametrize(("method", "settings"), [("ptuning", {"encoder_reparameterization_type": "lstm", "encoder_hidden_size": 4}), ("ptuning", {}),
                                                  ("prefix", {"prefix_projection": True, "encoder_hidden_size": 6})])
def test_the_saved_file_holds_the_result_and_the_checkpoint_the_encoder(method: str, settings: dict[str, Any],
                                                                        tmp_path: Path) -> None:
    origin = save_tiny(tmp_path / "base", "llama")
    made = assembly.build_recipe({"model": str(origin), "data": "-", "method": {"name": method, "num_virtual_tokens": N, **settings}})

    def begun() -> tuple[CausalLM, Any, Optimizer]:
        family = base("llama")
        attached = attach_method(family, made.method, 0)
        return family, attached, Optimizer(attached.parameters(), attached.lr_multiplier, 1e-2, OptimizerConfig(), 4)

    def go_on(family: CausalLM, adam: Optimizer, steps: range) -> None:
        for i in steps:
            adam.set_learning_rate(i)
            step(family, assembly.build_recipe({"data": "-"}).objective, [build_batch(documents())], adam)

    family, attached, adam = begun()
    go_on(family, adam, range(2))
    state, moments = ({n: t.clone() for n, t in part.state().items()} for part in (attached, adam))
    go_on(family, adam, range(2, 4))
    other, again, resumed = begun()
    again.load(state)
    resumed.load(moments)
    go_on(other, resumed, range(2, 4))
    assert torch.equal(logits(other), logits(family))

    (tmp_path / "run").mkdir()
    save_tuned(Run(tmp_path / "run"), made, family, attached)
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert saved.keys() == {EMBEDDINGS}
    fresh, folded, _ = begun()
    folded.load(saved)
    assert (logits(fresh) - logits(family)).abs().max() < SAME
    assert folded.parameters().keys() == saved.keys() == folded.state().keys()
    held = folded.parameters()[EMBEDDINGS]
    folded.load(saved)
    assert folded.parameters()[EMBEDDINGS] is held, "an optimizer may hold it already"
    assert folded.lr_multiplier(EMBEDDINGS) != 1
    with pytest.raises(RunError, match="missing"):
        folded.load({n: t for n, t in state.items() if n != TRAINING + "start"})


# ---------------------------------------------------------------- PEFT's

peft = pytest.importorskip("peft")
CONFIGS: dict[str, Any] = {
    "prompt": lambda task: peft.PromptTuningConfig(task_type=task, num_virtual_tokens=N),
    "ptuning": lambda task: peft.PromptEncoderConfig(task_type=task, num_virtual_tokens=N, encoder_hidden_size=7),
    "prefix": lambda task: peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=N),
}
ORACLE = pytest.mark.parametrize("method", CONFIGS)
UNWINDOWED = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in WINDOWED])


def theirs(kind: str, method: str) -> Any:
    return peft.get_peft_model(tiny(kind), CONFIGS[method]("CAUSAL_LM")).double().eval()


def outcome(model: Any, parameters: dict[str, Any], own: slice = slice(None)) -> dict[str, torch.Tensor]:
    """Logits and gradients of an odd function of them."""
    found = model(input_ids=TOKENS).logits[:, own]
    slope = torch.sin(torch.arange(found.numel(), dtype=torch.float64)).view_as(found)
    gradients = torch.autograd.grad((found * slope).sum(), list(parameters.values()))
    return {"logits": found.detach(), **dict(zip(parameters, gradients, strict=True))}


@ORACLE
@UNWINDOWED
def test_the_same_weights_give_pefts_function_and_gradients(kind: str, method: str) -> None:
    other = theirs(kind, method)
    encoder = other.prompt_encoder["default"]
    family, attached = tuned(kind, method)
    named = {EMBEDDINGS: encoder.embedding.weight}
    if method == "ptuning":  # the encoder too, weight by weight
        attached.start, attached.scale = torch.zeros_like(attached.start), torch.ones_like(attached.scale)
        named = {TRAINING + name: parameter for name, parameter in encoder.named_parameters()}
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(attached.parameters()[name] if method == "ptuning" else attached.state()[name])
    wanted = outcome(other, named, slice(0 if method == "prefix" else N, None))
    found = outcome(family.model, attached.parameters())
    if method == "prefix":
        pairs = [[found.pop(f"{EMBEDDINGS}.{i}.{kind}") for kind in ("key", "value")] for i in range(2)]
        found[EMBEDDINGS] = torch.stack([torch.stack(pair) for pair in pairs]).permute(3, 0, 1, 2, 4).flatten(1)
    assert apart(found, wanted) < SAME
    with torch.no_grad():
        named[next(iter(named))].mul_(1.1)
    assert apart(outcome(other, named, slice(0 if method == "prefix" else N, None)), found) > FAR


@METHOD
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
def test_our_folder_loads_in_peft(kind: str, method: str, tmp_path: Path) -> None:
    wide = {"sliding_window": 256} if kind in WINDOWED else {}  # as long as the context: there is no window
    origin, family = save_tiny(tmp_path / "base", kind, **wide), base(kind, **wide)
    attached = attach(family, method, **SETTINGS[method])
    made = assembly.build_recipe({"model": str(origin), "data": "-", "method": {"name": method, **SETTINGS[method]}})
    (tmp_path / "run").mkdir()
    save_tuned(Run(tmp_path / "run"), made, family, attached)
    other = peft.PeftModel.from_pretrained(tiny(kind, **wide), tmp_path / "run").double().eval()
    attached.load({EMBEDDINGS: attached.state()[EMBEDDINGS].to(torch.float32).to(torch.float64)})  # as PEFT holds them
    with torch.no_grad():
        said = other(input_ids=TOKENS).logits[:, 0 if method in DEEP else N:]
        assert (said - family.model(input_ids=TOKENS).logits).abs().max() < SAME
        with attached.disabled():
            assert (said - family.model(input_ids=TOKENS).logits).abs().max() > FAR


@ORACLE
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_folder_of_pefts_opens_as_a_run(kind: str, method: str, tmp_path: Path) -> None:
    origin = save_tiny(tmp_path / "base", kind, dtype=torch.float32)
    other = peft.get_peft_model(tiny(kind, dtype=torch.float32), CONFIGS[method]("CAUSAL_LM")).eval()
    other.peft_config["default"].base_model_name_or_path = str(origin)
    with torch.no_grad():
        wanted = other(input_ids=TOKENS).logits[:, 0 if method == "prefix" else N:]
    other.save_pretrained(tmp_path / "run")
    made, family, attached = open_run(Run(tmp_path / "run"))
    assert isinstance(made.method, READERS[json.loads((tmp_path / "run/adapter_config.json").read_text())["peft_type"]])
    assert made.method.num_virtual_tokens == N
    with torch.no_grad():
        assert (family.model(input_ids=TOKENS).logits - wanted).abs().max() < 1e-4
        with attached.disabled():
            assert (family.model(input_ids=TOKENS).logits - wanted).abs().max() > FAR
