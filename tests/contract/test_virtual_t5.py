"""Virtual tokens on T5: before every source by Transformers' own call, ours against PEFT's, and every way to call the
model against the others. Read `lab_t5.py` and `test_virtual.py` first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lab import SFT, apart, attach, measured
from lab_t5 import FAR, KIND, PROMPTS, SAME, base, padded, pairs, said, segment_tree, slowly, t5, tokenizer, widen
from torch import Tensor

from luthier.core.errors import BaseError
from luthier.core.examples import Origin
from luthier.core.protocols import TRAINING, SamplingParams
from luthier.core.types import TokenizedExample, TokenSpan
from luthier.data.packing import build_batch, pack_examples
from luthier.methods.multi_adapter import AdapterManager
from luthier.methods.prompt import EMBEDDINGS
from luthier.models.attention.biased import BiasedVirtualKeyValues
from luthier.models.families import seq2seq
from luthier.models.families.seq2seq import Seq2Seq
from luthier.models.soft_prompts.seq2seq import InjectedKeyValues
from tiny import END_OF_TEXT, IM_END

N = 5
SETTINGS: dict[str, dict[str, Any]] = {"prompt": {"num_virtual_tokens": N}, "ptuning": {"num_virtual_tokens": N, "encoder_hidden_size": 7},
                                       "prefix": {"num_virtual_tokens": N}, "ptuning_v2": {"num_virtual_tokens": N}}
METHOD = pytest.mark.parametrize("method", SETTINGS)
DEEP = {"prefix", "ptuning_v2"}


@pytest.fixture(autouse=True)
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    widen(monkeypatch)


def tuned(kind: str, method: str) -> tuple[Seq2Seq, Any]:
    family = base(kind)
    return family, attach(family, method, **SETTINGS[method])


# ---------------------------------------------------------------- a plain re-derivation


def attentions(model: Any) -> list[Any]:
    """In the order of a prefix's pairs."""
    found = [block.layer[0].SelfAttention for block in model.encoder.block]
    return found + [m for b in model.decoder.block for m in (b.layer[0].SelfAttention, b.layer[1].EncDecAttention)]


@contextmanager
def exchanged(model: Any, virtual: Tensor) -> Iterator[None]:
    """The first N keys and values of every attention are those of the prefix, [attentions, 2, H, N, d]."""
    handles = []
    for module, pair in zip(attentions(model), virtual, strict=True):
        for site, rows in zip((module.k, module.v), pair, strict=True):
            flat = rows.transpose(0, 1).flatten(1)
            handles.append(site.register_forward_hook(
                lambda _m, _a, out, flat=flat: torch.cat([flat.expand(len(out), -1, -1), out[:, N:]], 1)))
    yield
    for handle in handles:
        handle.remove()


def alone(plain: Any, virtual: Tensor, source: Tensor, answer: Tensor, deep: bool) -> Tensor:
    """[L, V] logits of one pair by Transformers' own eager attention. Of a prefix, N tokens stand before both texts,
    whose keys and values are exchanged for it: what else becomes of them, nobody sees."""
    given = torch.cat([torch.tensor([END_OF_TEXT]), answer[:-1]])
    embeds = plain.shared(source)
    if not deep:
        return plain(inputs_embeds=torch.cat([virtual, embeds])[None], decoder_input_ids=given[None]).logits[0]
    nobody = torch.full((N,), 9)
    with exchanged(plain, virtual):
        return plain(input_ids=torch.cat([nobody, source])[None],
                     decoder_input_ids=torch.cat([nobody, given])[None]).logits[0, N:]


@KIND
@METHOD
def test_it_stands_before_every_source_in_loss_and_every_gradient(kind: str, method: str) -> None:
    family, attached = tuned(kind, method)
    examples = pairs()
    found = measured(family, attached, [build_batch(examples)])
    plain = t5(kind)
    plain.set_attn_implementation("eager")
    weight = sum(sum(e.spans[1].weights) for e in examples)
    for n in (len(examples), len(examples) - 1):  # the control leaves one pair out
        loss = torch.zeros((), dtype=torch.float64)
        for example in examples[:n]:
            source, answer = (torch.tensor(span.ids) for span in example.spans)
            logits = alone(plain, attached.compute_virtual_tokens(), source, answer, method in DEEP)
            costs = F.cross_entropy(logits, answer, reduction="none") * torch.tensor(example.spans[1].weights).double()
            loss = loss + costs.sum() / weight
        named = attached.parameters()
        wanted = {"loss": loss.detach(), **dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))}
        assert (apart(found, wanted) < SAME) == (n == len(examples))


@METHOD
def test_only_what_it_promises_gets_a_gradient_and_off_is_the_base(method: str) -> None:
    family = base("gated")
    given = padded(pairs()[:2])
    with torch.no_grad():
        bare = family.model(**given).logits
    attached = attach(family, method, **SETTINGS[method])
    found = measured(family, attached, [build_batch(pairs())])
    assert all(float(t.abs().sum()) > 0 for t in found.values())
    assert all(p.grad is None for p in family.model.parameters())
    with torch.no_grad():
        there = family.model(**given).logits
        assert (there - bare).abs().max() > FAR
        with attached.disabled(), attached.disabled():
            assert torch.equal(family.model(**given).logits, bare)
        assert torch.equal(family.model(**given).logits, there)


# ---------------------------------------------------------------- every way to call the model


@KIND
@METHOD
def test_padded_on_either_side_each_row_is_as_alone(kind: str, method: str) -> None:
    family, _ = tuned(kind, method)
    rows, answers = [list(range(20, 20 + n)) for n in (13, 4, 9)], torch.tensor([[END_OF_TEXT, 7, 8, 9, 10, 11, 12]] * 3)
    width = max(map(len, rows))
    with torch.no_grad():
        single = [family.model(input_ids=torch.tensor([row]), decoder_input_ids=answers[:1]).logits[0] for row in rows]
        for left in (True, False):
            gap = [[0] * (width - len(row)) for row in rows]
            ids, mask = (torch.tensor([g + r if left else r + g for g, r in zip(gap, side, strict=True)])
                         for side in (rows, [[1] * len(row) for row in rows]))
            found = family.model(input_ids=ids, attention_mask=mask, decoder_input_ids=answers).logits
            assert found.shape[1] == answers.shape[1]
            assert max(float((x - y).abs().max()) for x, y in zip(found, single, strict=True)) < SAME
        assert (single[0] - single[1]).abs().max() > FAR


@METHOD
def test_how_a_batch_is_cut_changes_nothing(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, attached = tuned("gated", method)
    whole = measured(family, attached, pack_examples(pairs(), None))
    assert apart(measured(family, attached, pack_examples(pairs(), 40)), whole) < SAME
    monkeypatch.setattr(seq2seq, "PADDING_FACTOR", 1.0)
    monkeypatch.setattr(seq2seq, "PADDING_ALLOWANCE", 0)
    assert apart(measured(family, attached, pack_examples(pairs(), None)), whole) < SAME


@METHOD
def test_several_answers_of_one_source_are_each_of_them_alone(method: str) -> None:
    family, attached = tuned("relu", method)
    tree = segment_tree()
    row = build_batch([tree])
    with torch.no_grad():
        states = family.states(row.inputs)
        for leaf in (1, 3, 4, 5):
            ids = [tree.spans[i].ids for i in ((0, 2, leaf) if leaf in (3, 4) else (0, leaf))]
            one = build_batch([TokenizedExample((TokenSpan(ids[0], (0.0,) * len(ids[0])), TokenSpan(sum(ids[1:], ()), (1.0,) * sum(
                map(len, ids[1:])), 0)), Origin("lab", 0))])
            wanted = family.states(one.inputs)[-len(ids[-1]):]
            start = sum(len(span.ids) for span in tree.spans[:leaf])
            assert (states[start:start + len(ids[-1])] - wanted).abs().max() < SAME
    assert attached.compute_virtual_tokens().shape


@METHOD
def test_recomputed_blocks_change_nothing_but_the_work(method: str) -> None:
    family, attached = tuned("gated", method)
    wanted = measured(family, attached, [build_batch(pairs())])
    calls: list[int] = []
    family.structure.layers[0].attention.register_forward_hook(lambda *_: calls.append(1))
    family.enable_gradient_checkpointing()
    family.train(True)
    assert apart(measured(family, attached, [build_batch(pairs())]), wanted) < SAME
    assert len(calls) % 2 == 0, "each is computed twice"


@METHOD
def test_answers_with_a_cache_are_those_without_and_transformers_own(method: str) -> None:
    family = base("gated", num_decoder_layers=2)  # Transformers makes its cache as deep as the encoder
    attached = attach(family, method, **SETTINGS[method])
    answers = said(family, max_new_tokens=8)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert tuple(slowly(family, prompt, 8)[:len(answer)]) == answer
    assert len({len(set(answer)) for answer in answers} | {1}) > 1, "all say one thing over and over"
    rows = [[*prompt, IM_END] for prompt in PROMPTS]
    width = max(map(len, rows))
    ids, mask = (torch.tensor([x + [fill] * (width - len(x)) for x in lines])
                 for lines, fill in ((rows, END_OF_TEXT), ([[1] * len(row) for row in rows], 0)))
    theirs = family.model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False).tolist()
    for mine, other in zip(answers, theirs, strict=True):
        assert tuple(other[1:1 + len(mine)]) == mine
    with attached.disabled():
        assert said(family, max_new_tokens=8) != answers
    given = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    slow, beams = (family.model.generate(ids, use_cache=False, num_beams=n, **given) for n in (1, 3))
    assert torch.equal(family.model.generate(ids, cache_implementation="static", **given), slow)
    assert torch.equal(family.model.generate(ids, num_beams=3, **given), beams)


def test_a_prompt_and_a_prefix_stand_beside_one_another() -> None:
    family = base("relu")
    prompt, prefix = attach(family, "prompt", num_virtual_tokens=3), attach(family, "prefix", num_virtual_tokens=4)
    given = padded(pairs()[:1])
    with torch.no_grad():
        found = family.model(**given).logits
        with prompt.disabled():
            embeds = torch.cat([prompt.compute_virtual_tokens()[None], family.model.shared(given["input_ids"])], 1)
            wanted = family.model(inputs_embeds=embeds, labels=given["labels"]).logits
        assert (found - wanted).abs().max() < SAME
        with prefix.disabled():
            assert (found - family.model(**given).logits).abs().max() > FAR


def test_rows_and_prompts_go_through_adapters_of_their_own() -> None:
    family = base()
    manager = AdapterManager(family.structure)
    for name, method in (("a", "prompt"), ("b", "prefix"), ("c", "lora")):
        manager.add(name, attach(family, method, **SETTINGS.get(method, {})))
    family.router = manager
    names = ["a", "b", None, "c", "b", "a"]

    def total(who: str | None, examples: list[TokenizedExample]) -> Tensor:
        with manager.use_adapter(who):
            row = build_batch(examples)
            return SFT(family.forward(row.inputs, row.target, SFT.required_outputs), row.target).total

    examples = pairs()
    single = sum(total(who, [e for e, n in zip(examples, names, strict=True) if n == who]) for who in ("a", "b", "c", None))
    row = build_batch(examples)
    inputs = manager.with_adapters(row.inputs, [name for name in names for _ in range(2)])
    assert (SFT(family.forward(inputs, row.target, SFT.required_outputs), row.target).total - single).abs() < SAME
    assert (total("a", examples) - single).abs() > FAR
    owners = ["b", "a", None, "c", "a"]
    found = sorted(family.generate(PROMPTS, SamplingParams(max_new_tokens=6), manager.resolve_indices(owners)), key=lambda g: g.index)
    for prompt, answer, who in zip(PROMPTS, found, owners, strict=True):
        with manager.use_adapter(who):
            assert said(family, [prompt], max_new_tokens=6) == [answer.token_ids]


# ---------------------------------------------------------------- where they start, and what is refused


def test_they_start_as_the_words_of_a_text() -> None:
    family = base()
    prompt = attach(family, "prompt", stirred=False, num_virtual_tokens=7, prompt_tuning_init_text="to to")
    ids = (list(b"to to") * 2)[:7]
    assert torch.equal(prompt.compute_virtual_tokens(), family.structure.embedding(torch.tensor(ids)))
    fresh, bare = base(), base()
    prefix = attach(fresh, "prefix", stirred=False, num_virtual_tokens=5, prompt_tuning_init_text="to to")
    words = torch.tensor([list(b"to to")])
    with torch.no_grad():  # a causal decoder cannot tell them from words that it begins with
        read = bare.encoder(input_ids=words).last_hidden_state
        own = torch.tensor([[3, 4, 5]])
        longer = bare.decoder(input_ids=torch.cat([words, own], 1), encoder_hidden_states=read).last_hidden_state[:, 5:]
        decoder = [m for m in attentions(fresh.model) if m.is_decoder]
        pairs_ = [p for p, m in zip(prefix.compute_virtual_tokens(), attentions(fresh.model), strict=True) if m.is_decoder]
        biases = fresh.structure.injector._compute_biases(fresh.decoder, 3, 0, 5, None)
        own_only = InjectedKeyValues({m: BiasedVirtualKeyValues(p[0][None], p[1][None], biases.get(m))
                            for m, p in zip(decoder, pairs_, strict=True) if m.is_causal})
        with prefix.disabled():
            found = fresh.decoder(input_ids=own, encoder_hidden_states=read, virtual=own_only).last_hidden_state
    assert (found - longer).abs().max() < SAME


def test_a_base_whose_attention_cannot_be_reached_is_refused_a_prefix() -> None:
    model = t5("relu")
    model.set_attn_implementation("eager")
    family = Seq2Seq(model, tokenizer())
    attach(family, "prompt", num_virtual_tokens=N)
    with pytest.raises(BaseError, match="does not expose"):
        attach(family, "prefix", num_virtual_tokens=N)


# ---------------------------------------------------------------- PEFT's

peft = pytest.importorskip("peft")
CONFIGS: dict[str, Any] = {
    "prompt": lambda **more: peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=N, **more),
    "ptuning": lambda **more: peft.PromptEncoderConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=N,
                                                       encoder_hidden_size=7, **more),
}
ORACLE = pytest.mark.parametrize("method", CONFIGS)
SUBMODULES = pytest.mark.parametrize("submodules", [1, 2])  # 2 is PEFT's own choice, and puts in no more


def outcome(model: Any, named: dict[str, Any]) -> dict[str, Tensor]:
    """Logits of a padded batch and gradients of an odd function of them."""
    found = model(**padded(pairs())).logits
    slope = torch.sin(torch.arange(found.numel(), dtype=torch.float64)).view_as(found)
    return {"logits": found.detach(),
            **dict(zip(named, torch.autograd.grad((found * slope).sum(), list(named.values())), strict=True))}


@ORACLE
@KIND
@SUBMODULES
def test_the_same_weights_give_pefts_function_and_gradients(kind: str, method: str, submodules: int) -> None:
    other = peft.get_peft_model(t5(kind), CONFIGS[method](num_transformer_submodules=submodules)).double().eval()
    encoder = other.prompt_encoder["default"]
    family, attached = tuned(kind, method)
    named = {EMBEDDINGS: encoder.embedding.weight}
    if method == "ptuning":  # the encoder too, weight by weight
        attached.start, attached.scale = torch.zeros_like(attached.start), torch.ones_like(attached.scale)
        named = {TRAINING + name: parameter for name, parameter in encoder.named_parameters()}
    with torch.no_grad():
        for name, parameter in named.items():
            parameter[:len(attached.parameters()[name])] = attached.parameters()[name]
    wanted = outcome(other, named)
    for name in named:
        if wanted[name].shape != attached.parameters()[name].shape:  # PEFT's second set trains on nothing
            assert submodules == 2
            assert not wanted[name][N:].any()
            wanted[name] = wanted[name][:N]
    found = outcome(family.model, attached.parameters())
    assert apart(found, wanted) < SAME
    with torch.no_grad():
        named[next(iter(named))].mul_(1.1)
    assert float((other(**padded(pairs())).logits - found["logits"]).abs().max()) > FAR


def test_pefts_prefix_is_a_part_of_ours_with_shared_pairs() -> None:
    """It acts on the decoder's own attention alone; layer i gets pair 2i modulo their number."""
    config = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=N, num_layers=3)
    other = peft.get_peft_model(t5("relu"), config).double().eval()
    family, attached = tuned("relu", "prefix")
    every = attentions(family.model)
    own = [i for i, module in enumerate(every) if module.is_decoder and module.is_causal]
    chosen = attached.compute_virtual_tokens()[own].detach()  # [3, 2, H, N, d]
    layers = torch.empty_like(chosen)
    for i in range(3):
        layers[2 * i % 3] = chosen[i]
    with torch.no_grad():
        other.prompt_encoder["default"].embedding.weight.copy_(layers.permute(3, 0, 1, 2, 4).flatten(1))
        given = padded(pairs())
        wanted = other(**given).logits
        start = family.model._shift_right(given["labels"])
        biases = family.structure.injector._compute_biases(family.decoder, start.shape[1], 0, N, None)
        with attached.disabled():
            read = family.encoder(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).last_hidden_state
            for zero in (False, True):  # zero: the control, a prefix without T5's bias
                carried = InjectedKeyValues({every[i]: BiasedVirtualKeyValues(k[None], v[None], None if zero else biases[every[i]])
                                   for i, (k, v) in zip(own, chosen, strict=True)})
                states = family.decoder(input_ids=start, encoder_hidden_states=read, virtual=carried,
                                        encoder_attention_mask=given["attention_mask"]).last_hidden_state
                apart_ = float((family.structure.head(states * family.scale) - wanted).abs().max())
                assert (apart_ > FAR) if zero else (apart_ < SAME)
