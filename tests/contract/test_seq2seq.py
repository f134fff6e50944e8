"""The sequence-to-sequence family against Transformers' own T5, and itself done slowly. Read `lab_t5.py` first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lab import SFT, Dice, apart, attach, measured
from lab_t5 import (
    ANSWERS,
    FAR,
    KIND,
    METHOD,
    PROMPTS,
    SAME,
    base,
    padded,
    pairs,
    said,
    segment_tree,
    slowly,
    t5,
    tokenizer,
    widen,
)
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration, T5ForConditionalGeneration

from luthier.core.errors import BaseError, DataError
from luthier.core.examples import Origin
from luthier.core.protocols import Head, SamplingParams
from luthier.core.types import LabeledSpan, TokenizedExample, TokenSpan
from luthier.data.packing import build_batch, pack_examples
from luthier.models.families import seq2seq
from luthier.models.families.seq2seq import Seq2Seq
from tiny import END_OF_TEXT, IM_END, VOCABULARY


@pytest.fixture(autouse=True)
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    widen(monkeypatch)


# ---------------------------------------------------------------- the same numbers


@KIND
def test_it_is_transformers_own_t5_in_loss_and_every_gradient(kind: str) -> None:
    family = base(kind)
    attached = attach(family, "full", stirred=False)
    found = measured(family, attached, [build_batch(pairs(flat=True))])
    plain = t5(kind)
    plain.set_attn_implementation("eager")
    for rotated in (False, True):  # rotated: the control, in which every source has another's answer
        given = padded(pairs(flat=True))
        if rotated:
            given["labels"] = given["labels"].roll(1, 0)
        plain.zero_grad()
        loss = plain(**given).loss
        loss.backward()
        wanted = {"loss": loss.detach(), **{n: p.grad for n, p in plain.named_parameters() if n in found}}
        assert (apart(found, wanted) > FAR) if rotated else (apart(found, wanted) < SAME)


@KIND
def test_weights_of_tokens_are_factors_of_their_log_probs(kind: str) -> None:
    family, examples = base(kind), pairs()
    row, given = build_batch(examples), padded(examples)
    with torch.no_grad():
        logps = family.forward(row.inputs, row.target, SFT.required_outputs).token_logps
        every = -F.cross_entropy(family.model(**given).logits.transpose(1, 2), given["labels"], reduction="none")
    wanted = torch.cat([every[i, :n] for i, n in enumerate(ANSWERS)])
    assert (logps - wanted).abs().max() < SAME
    assert torch.equal(row.target.weights, torch.tensor([w for e in examples for w in e.spans[1].weights]))


def alone(tree: TokenizedExample) -> list[TokenizedExample]:
    """Each leaf with a source of its own; what several share has its weights in the first alone."""
    inner, seen, found = {p.parent for p in tree.spans}, set(), []
    for leaf in (i for i in range(len(tree.spans)) if i not in inner):
        path = [leaf]
        while (parent := tree.spans[path[0]].parent) >= 0:
            path.insert(0, parent)
        ids = tuple(t for i in path[1:] for t in tree.spans[i].ids)
        weights = tuple(0.0 if i in seen else w for i in path[1:] for w in tree.spans[i].weights)
        seen.update(path)
        found.append(TokenizedExample((tree.spans[0], TokenSpan(ids, weights, 0)), tree.origin, 1))
    return found


@KIND
@METHOD
def test_several_answers_of_one_source_are_each_of_them_alone(kind: str, method: str) -> None:
    family = base(kind)
    attached = attach(family, method)
    whole = measured(family, attached, [build_batch([segment_tree()])])
    assert len(alone(segment_tree())) == 4
    assert apart(whole, measured(family, attached, [build_batch([e]) for e in alone(segment_tree())])) < SAME
    flat = TokenizedExample(tuple(TokenSpan(p.ids, p.weights, min(p.parent, 0)) for p in segment_tree().spans), Origin("lab", 0), 1)
    assert apart(whole, measured(family, attached, [build_batch([flat])])) > FAR


def test_a_source_is_read_once_however_many_answers_it_has() -> None:
    family, widths = base(), []
    family.encoder.register_forward_pre_hook(lambda _m, _a, given: widths.append(given["input_ids"].numel()), with_kwargs=True)
    row = build_batch([segment_tree()])
    family.forward(row.inputs, row.target, SFT.required_outputs)
    assert widths == [len(segment_tree().spans[0].ids)]


@KIND
@METHOD
def test_how_a_batch_is_cut_changes_nothing(kind: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, examples = base(kind), [*pairs(), segment_tree()]
    attached = attach(family, method)
    whole = measured(family, attached, pack_examples(examples, None))
    for max_tokens in (1, 40, 90):
        rows = pack_examples(examples, max_tokens)
        assert len(rows) > 1
        assert apart(measured(family, attached, rows), whole) < SAME
    monkeypatch.setattr(seq2seq, "PADDING_FACTOR", 1e9)
    assert apart(measured(family, attached, pack_examples(examples, None)), whole) < SAME


def test_little_of_a_padded_batch_is_padding() -> None:
    sizes = [300, *[2] * 200, 290, 40, 41, 39]
    groups = seq2seq._group_by_length(range(len(sizes)), sizes)
    assert sorted(i for group in groups for i in group) == list(range(len(sizes)))
    places = sum(len(group) * max(sizes[i] for i in group) for group in groups)
    assert places <= seq2seq.PADDING_FACTOR * sum(sizes) + seq2seq.PADDING_ALLOWANCE * len(groups)
    assert len(groups) <= 4


@METHOD
def test_gradient_checkpointing_changes_nothing_but_the_work(method: str) -> None:
    calls: list[int] = []

    def run(checkpointing: bool) -> dict[str, Tensor]:
        family = base()
        family.train(True)
        if checkpointing:
            family.enable_gradient_checkpointing()
        calls.append(0)
        for block in family.structure.layers:
            block.attention.register_forward_hook(lambda *_: calls.__setitem__(-1, calls[-1] + 1))
        return measured(family, attach(family, method), [build_batch([segment_tree()])])

    without = run(False)
    assert apart(run(True), without) < SAME
    assert calls == [5, 10]


def test_a_source_is_never_predicted() -> None:
    """The encoder sees all of it, so its own tokens would be read off, not learnt."""
    dice, family = Dice(), base()
    row = build_batch([TokenizedExample((dice.span(6), dice.span(3, 0)), Origin("lab", 0))])
    with pytest.raises(RuntimeError, match="cannot be predicted"):
        family.forward(row.inputs, row.target, SFT.required_outputs)


def test_heads_stand_on_the_decoders_states() -> None:
    """An answer's item is its last token's state; a source's is that of the start token."""
    family, dice = base(), Dice()
    family.add_heads([Head("score", "item", 2)], 0)
    spans = (dice.span(7, masked=7), dice.span(4, 0), dice.span(5, 0))
    whole = build_batch([TokenizedExample(spans, Origin("lab", 0), labeled_spans=(LabeledSpan(0, 0.0), LabeledSpan(1, 0.0), LabeledSpan(2, 1.0)))])
    lone = build_batch([TokenizedExample(spans[:1], Origin("lab", 0), labeled_spans=(LabeledSpan(0, 0.0),))])
    with torch.no_grad():
        found = family.forward(whole.inputs, whole.target, frozenset({"pooled", "scores"}))
        single = family.forward(lone.inputs, lone.target, frozenset({"pooled"}))
        states = [family.model(input_ids=torch.tensor([spans[0].ids]), output_hidden_states=True,
                               decoder_input_ids=torch.tensor([[END_OF_TEXT, *ids]])).decoder_hidden_states[-1][0, -1]
                  for ids in ((), spans[1].ids, spans[2].ids)]
    assert (found.pooled - torch.stack(states)).abs().max() < SAME
    assert (single.pooled[0] - states[0]).abs().max() < SAME
    assert found.scores.shape == (3, 2)


def bart() -> Any:
    """Positions that are learnt, biases, a head without scale: another family with the same two parts."""
    config = BartConfig(vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4,
                        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
                        init_std=0.2, dropout=0.0, pad_token_id=END_OF_TEXT, bos_token_id=None, eos_token_id=IM_END,
                        decoder_start_token_id=IM_END, forced_eos_token_id=None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return BartForConditionalGeneration(config).double().eval()


def test_bart_is_understood_too() -> None:
    family = Seq2Seq(bart(), tokenizer())
    found = measured(family, attach(family, "full", stirred=False), [build_batch(pairs(flat=True))])
    plain = bart()
    loss = plain(**padded(pairs(flat=True))).loss
    loss.backward()
    assert apart(found, {"loss": loss.detach(), **{n: p.grad for n, p in plain.named_parameters() if n in found}}) < SAME
    for prompt, answer in zip(PROMPTS, said(family, batch_size=2), strict=True):
        assert list(answer) == slowly(family, prompt, len(answer), start=IM_END)
    assert {site.role for site in family.structure.linears} == {"q", "k", "v", "o", "up", "down"}
    assert family.structure.layers[3].mlp_in is family.decoder.layers[1].fc1
    with pytest.raises(BaseError, match="reads at most 64"):
        family.generate([range(64)], SamplingParams())


# ---------------------------------------------------------------- bases


def test_a_model_that_is_called_otherwise_is_refused() -> None:
    class Otherwise(T5ForConditionalGeneration):
        def forward(self, *args: Any, **options: Any) -> Any:
            out = super().forward(*args, **options)
            out.logits = out.logits.flip(-1)
            return out

    with pytest.raises(BaseError, match="unsupported way"):
        Seq2Seq(Otherwise(t5("relu").config).double().eval(), tokenizer())


def test_a_base_without_a_start_token_is_refused() -> None:
    model = t5("relu")
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = None
    with pytest.raises(BaseError, match="decoder_start_token_id"):
        Seq2Seq(model, tokenizer())


def test_every_linear_map_has_its_role() -> None:
    for kind, mlp in (("relu", {"up": 5, "down": 5}), ("gated", {"gate": 5, "up": 5, "down": 5})):
        family = base(kind)
        roles = [site.role for site in family.structure.linears]
        assert {role: roles.count(role) for role in set(roles)} == {"q": 8, "k": 8, "v": 8, "o": 8, **mlp}
        assert family.structure.task == "SEQ_2_SEQ_LM"
        for block in family.structure.layers:
            inside = block.module.layer
            assert block.attention is inside[0].SelfAttention
            assert block.attention_out is inside[0].SelfAttention.o
            assert block.mlp is block.mlp_in is block.mlp_out is inside[-1].DenseReluDense
            assert len(block.norms) == len(inside)


# ---------------------------------------------------------------- answers

@KIND
def test_answers_are_those_of_one_step_after_another(kind: str) -> None:
    family = base(kind)
    wanted = [tuple(slowly(family, prompt, 12)) for prompt in PROMPTS]
    assert len(set(wanted)) > 2
    for batch_size in (1, 2, 5):
        assert said(family, batch_size=batch_size) == wanted
    assert said(family, [(*p, IM_END) for p in PROMPTS]) == wanted
    assert tuple(family.stream(PROMPTS[1], SamplingParams(max_new_tokens=12))) == wanted[1]


def test_answers_end_where_they_stop_and_leave_the_others_alone() -> None:
    family = base()
    wanted = said(family)
    stop = wanted[0][3]
    found = list(family.generate(PROMPTS, SamplingParams(max_new_tokens=12, stop=(stop,))))
    for answer in found:
        whole = wanted[answer.index]
        assert answer.token_ids == (whole[:whole.index(stop)] if stop in whole else whole)
        assert answer.finished == (stop in whole)
    assert 0 < sum(answer.finished for answer in found) < len(found)


def test_a_drawn_answer_depends_on_its_index_and_the_seed_alone() -> None:
    family = base()
    drawn = {"temperature": 1.5, "top_p": 0.9, "seed": 3}
    wanted = said(family, **drawn)
    assert said(family, batch_size=2, **drawn) == wanted
    assert said(family, **{**drawn, "seed": 4}) != wanted
    assert tuple(family.stream(PROMPTS[0], SamplingParams(max_new_tokens=12, **drawn))) == wanted[0]


def test_a_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(DataError, match="prompt 1"):
        list(base().generate([(3, 4), ()], SamplingParams()))
