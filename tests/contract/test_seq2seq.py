"""The sequence-to-sequence family against Transformers' own T5, PEFT, and itself done slowly. Read `lab.py` first.

`relu` is as the first T5 (states shrunk before the head), `gated` as the later ones.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lab import SFT, Dice, apart, attach, measured, stir
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration
from transformers.models.t5 import modeling_t5

import luthier
from luthier import build
from luthier.core.errors import BaseError, DataError, RecipeError, RunError
from luthier.core.examples import (
    ChatExample,
    ComparedExample,
    CompletionExample,
    Message,
    Origin,
    PromptExample,
    TextExample,
)
from luthier.core.protocols import Head, Sampling
from luthier.core.types import Encoded, Item, Piece
from luthier.data import DataConfig, DividedConfig, encode
from luthier.data.pack import batch, pack
from luthier.families import seq2seq
from luthier.families.seq2seq import Seq2Seq
from luthier.methods import METHODS
from luthier.methods.bank import Bank
from luthier.runtime.run import Run
from tiny import END_OF_TEXT, IM_END, IM_START, VOCABULARY, tiny_tokenizer

SAME, FAR = 1e-9, 1e-3
KINDS: dict[str, dict[str, Any]] = {
    "relu": {}, "gated": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}}
KIND = pytest.mark.parametrize("kind", KINDS)
METHOD = pytest.mark.parametrize("method", ["full", "lora"])
SOURCES, ANSWERS = (9, 3, 22, 12, 5, 30), (4, 7, 1, 12, 2, 15)


class _Wide:
    """torch, but its float32 is float64, so that T5's norms do not round."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture(autouse=True)
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_t5, "torch", _Wide())


def tokenizer() -> Any:
    """As T5's: no chat template, an end mark behind every text."""
    made = tiny_tokenizer()
    made.chat_template = None
    made.backend_tokenizer.post_processor = TemplateProcessing(single="$A <|im_end|>",
                                                               special_tokens=[("<|im_end|>", IM_END)])
    return made


def t5(kind: str, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """A random T5 whose decoder is deeper than its encoder; its buckets of distance are few, so that all are used."""
    config = T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                      relative_attention_num_buckets=8, relative_attention_max_distance=16, dropout_rate=0.0,
                      decoder_start_token_id=END_OF_TEXT, pad_token_id=END_OF_TEXT, eos_token_id=IM_END,
                      **{"num_decoder_layers": 3, **KINDS[kind], **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(config).to(dtype)
        with torch.no_grad():
            model.shared.weight.mul_(1.0 if config.scale_decoder_outputs else 0.3)
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def base(kind: str = "relu", **settings: Any) -> Seq2Seq:
    return Seq2Seq(t5(kind, **settings), tokenizer())


def pairs(flat: bool = False, seed: int = 0) -> list[Encoded]:
    """A source and its answer, of many lengths; `flat`: all weights are 1."""
    dice = Dice(seed)
    found = [Encoded((dice.piece(n, masked=n), dice.piece(m, 0)), Origin("lab", i), m)
             for i, (n, m) in enumerate(zip(SOURCES, ANSWERS, strict=True))]
    return [Encoded((e.pieces[0], Piece(e.pieces[1].ids, (1.0,) * len(e.pieces[1].ids), 0)), e.origin, e.bytes)
            for e in found] if flat else found


def padded(examples: Sequence[Encoded]) -> dict[str, Tensor]:
    """As Transformers takes them."""
    sources, answers = ([torch.tensor(e.pieces[i].ids) for e in examples] for i in (0, 1))
    width = max(map(len, sources))
    rows = torch.full((len(sources), width), END_OF_TEXT)
    mask = torch.zeros(len(sources), width, dtype=torch.int64)
    labels = torch.full((len(answers), max(map(len, answers))), -100)
    for i, (source, answer) in enumerate(zip(sources, answers, strict=True)):
        rows[i, :len(source)], mask[i, :len(source)], labels[i, :len(answer)] = source, 1, answer
    return {"input_ids": rows, "attention_mask": mask, "labels": labels}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """[L, V] of one pair, through Transformers' own call."""
    return model(**padded(pairs()[:1])).logits[0]


# ---------------------------------------------------------------- the same numbers


@KIND
def test_it_is_transformers_own_t5_in_loss_and_every_gradient(kind: str) -> None:
    family = base(kind)
    attached = attach(family, "full", stirred=False)
    found = measured(family, attached, [batch(pairs(flat=True))])
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
    row, given = batch(examples), padded(examples)
    with torch.no_grad():
        logps = family.forward(row.inputs, row.target, SFT.needs).token_logps
        every = -F.cross_entropy(family.model(**given).logits.transpose(1, 2), given["labels"], reduction="none")
    wanted = torch.cat([every[i, :n] for i, n in enumerate(ANSWERS)])
    assert (logps - wanted).abs().max() < SAME
    assert torch.equal(row.target.weights, torch.tensor([w for e in examples for w in e.pieces[1].weights]))


def forest() -> Encoded:
    """A source with three answers, one of which goes on in two ways."""
    dice = Dice(5)
    parents = (-1, 0, 0, 2, 2, 0)
    return Encoded(tuple(dice.piece(3 + 2 * i, p, masked=3 * (p < 0)) for i, p in enumerate(parents)), Origin("lab", 0), 1)


def alone(tree: Encoded) -> list[Encoded]:
    """Each leaf with a source of its own; what several share has its weights in the first alone."""
    inner, seen, found = {p.parent for p in tree.pieces}, set(), []
    for leaf in (i for i in range(len(tree.pieces)) if i not in inner):
        path = [leaf]
        while (parent := tree.pieces[path[0]].parent) >= 0:
            path.insert(0, parent)
        ids = tuple(t for i in path[1:] for t in tree.pieces[i].ids)
        weights = tuple(0.0 if i in seen else w for i in path[1:] for w in tree.pieces[i].weights)
        seen.update(path)
        found.append(Encoded((tree.pieces[0], Piece(ids, weights, 0)), tree.origin, 1))
    return found


@KIND
@METHOD
def test_several_answers_of_one_source_are_each_of_them_alone(kind: str, method: str) -> None:
    family = base(kind)
    attached = attach(family, method)
    whole = measured(family, attached, [batch([forest()])])
    assert len(alone(forest())) == 4
    assert apart(whole, measured(family, attached, [batch([e]) for e in alone(forest())])) < SAME
    flat = Encoded(tuple(Piece(p.ids, p.weights, min(p.parent, 0)) for p in forest().pieces), Origin("lab", 0), 1)
    assert apart(whole, measured(family, attached, [batch([flat])])) > FAR


def test_a_source_is_read_once_however_many_answers_it_has() -> None:
    family, widths = base(), []
    family.encoder.register_forward_pre_hook(lambda _m, _a, given: widths.append(given["input_ids"].numel()), with_kwargs=True)
    row = batch([forest()])
    family.forward(row.inputs, row.target, SFT.needs)
    assert widths == [len(forest().pieces[0].ids)]


@KIND
@METHOD
def test_how_a_batch_is_cut_changes_nothing(kind: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, examples = base(kind), [*pairs(), forest()]
    attached = attach(family, method)
    whole = measured(family, attached, pack(examples, None))
    for micro_tokens in (1, 40, 90):
        rows = pack(examples, micro_tokens)
        assert len(rows) > 1
        assert apart(measured(family, attached, rows), whole) < SAME
    monkeypatch.setattr(seq2seq, "SPARE", 1e9)
    assert apart(measured(family, attached, pack(examples, None)), whole) < SAME


def test_little_of_a_padded_batch_is_padding() -> None:
    sizes = [300, *[2] * 200, 290, 40, 41, 39]
    groups = seq2seq._groups(range(len(sizes)), sizes)
    assert sorted(i for group in groups for i in group) == list(range(len(sizes)))
    places = sum(len(group) * max(sizes[i] for i in group) for group in groups)
    assert places <= seq2seq.SPARE * sum(sizes) + seq2seq.FLOOR * len(groups)
    assert len(groups) <= 4


@METHOD
def test_gradient_checkpointing_changes_nothing_but_the_work(method: str) -> None:
    calls: list[int] = []

    def run(checkpointing: bool) -> dict[str, Tensor]:
        family = base()
        family.train(True)
        if checkpointing:
            family.checkpointing()
        calls.append(0)
        for block in family.anatomy.blocks:
            block.attention.register_forward_hook(lambda *_: calls.__setitem__(-1, calls[-1] + 1))
        return measured(family, attach(family, method), [batch([forest()])])

    without = run(False)
    assert apart(run(True), without) < SAME
    assert calls == [5, 10]


def test_a_source_is_never_predicted() -> None:
    """The encoder sees all of it, so its own tokens would be read off, not learnt."""
    dice, family = Dice(), base()
    row = batch([Encoded((dice.piece(6), dice.piece(3, 0)), Origin("lab", 0))])
    with pytest.raises(RuntimeError, match="never predicted"):
        family.forward(row.inputs, row.target, SFT.needs)


def test_heads_stand_on_the_decoders_states() -> None:
    """An answer's item is its last token's state; a source's is that of the start token."""
    family, dice = base(), Dice()
    family.add([Head("score", "item", 2)], 0)
    pieces = (dice.piece(7, masked=7), dice.piece(4, 0), dice.piece(5, 0))
    whole = batch([Encoded(pieces, Origin("lab", 0), items=(Item(0, 0.0), Item(1, 0.0), Item(2, 1.0)))])
    lone = batch([Encoded(pieces[:1], Origin("lab", 0), items=(Item(0, 0.0),))])
    with torch.no_grad():
        found = family.forward(whole.inputs, whole.target, frozenset({"pooled", "scores"}))
        single = family.forward(lone.inputs, lone.target, frozenset({"pooled"}))
        states = [family.model(input_ids=torch.tensor([pieces[0].ids]), output_hidden_states=True,
                               decoder_input_ids=torch.tensor([[END_OF_TEXT, *ids]])).decoder_hidden_states[-1][0, -1]
                  for ids in ((), pieces[1].ids, pieces[2].ids)]
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
    found = measured(family, attach(family, "full", stirred=False), [batch(pairs(flat=True))])
    plain = bart()
    loss = plain(**padded(pairs(flat=True))).loss
    loss.backward()
    assert apart(found, {"loss": loss.detach(), **{n: p.grad for n, p in plain.named_parameters() if n in found}}) < SAME
    for prompt, answer in zip(PROMPTS, said(family, batch_size=2), strict=True):
        assert list(answer) == slowly(family, prompt, len(answer), start=IM_END)
    assert {site.role for site in family.anatomy.sites} == {"q", "k", "v", "o", "up", "down"}
    assert family.anatomy.blocks[3].mlp_in is family.decoder.layers[1].fc1
    with pytest.raises(BaseError, match="reads at most 64"):
        family.generate([range(64)], Sampling())


# ---------------------------------------------------------------- bases


def test_a_model_that_is_called_otherwise_is_refused() -> None:
    class Otherwise(T5ForConditionalGeneration):
        def forward(self, *args: Any, **options: Any) -> Any:
            out = super().forward(*args, **options)
            out.logits = out.logits.flip(-1)
            return out

    with pytest.raises(BaseError, match="not known here"):
        Seq2Seq(Otherwise(t5("relu").config).double().eval(), tokenizer())


def test_a_base_without_a_start_token_is_refused() -> None:
    model = t5("relu")
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = None
    with pytest.raises(BaseError, match="decoder_start_token_id"):
        Seq2Seq(model, tokenizer())


def test_every_linear_map_has_its_role() -> None:
    for kind, mlp in (("relu", {"up": 5, "down": 5}), ("gated", {"gate": 5, "up": 5, "down": 5})):
        family = base(kind)
        roles = [site.role for site in family.anatomy.sites]
        assert {role: roles.count(role) for role in set(roles)} == {"q": 8, "k": 8, "v": 8, "o": 8, **mlp}
        assert family.anatomy.task == "SEQ_2_SEQ_LM"
        for block in family.anatomy.blocks:
            inside = block.module.layer
            assert block.attention is inside[0].SelfAttention
            assert block.attention_out is inside[0].SelfAttention.o
            assert block.mlp is block.mlp_in is block.mlp_out is inside[-1].DenseReluDense
            assert len(block.norms) == len(inside)


# ---------------------------------------------------------------- rows of a file


def encoded(example: Any, **settings: Any) -> Any:
    config = DividedConfig.of(DataConfig.parse({"train": "-", **settings}))
    return encode(example, tokenizer(), config)


def spelt(ids: Sequence[int]) -> str:
    return "".join("$" if i == IM_END else chr(i) for i in ids)


ROW = CompletionExample("say it", " twice", Origin("lab", 1), 0.5)


def test_source_and_answer_are_two_pieces_with_an_end_mark_each() -> None:
    (found,) = encoded(ROW)
    source, answer = found.pieces
    assert (spelt(source.ids), source.weights, source.parent) == ("say it$", (0.0,) * 7, -1)
    assert (spelt(answer.ids), answer.weights, answer.parent) == (" twice$", (0.5,) * 7, 0)
    assert found.bytes == len(" twice")
    row = batch([found])
    assert row.target.tokens.tolist() == list(answer.ids)  # the first one too, and the end mark
    assert row.target.at.tolist() == [6, *range(7, 13)]


def test_each_of_the_two_has_max_length_to_itself() -> None:
    (found,) = encoded(ROW, max_length=4)
    assert [spelt(piece.ids) for piece in found.pieces] == ["say$", " twi"]
    assert found.bytes == 4
    refused = encoded(ROW, max_length=6, overlong="refuse")
    assert refused.reason == "longer than max_length"
    assert "source" in refused.detail
    assert len(encoded(ROW, max_length=7, overlong="refuse")) == 1


def test_a_chat_is_asked_up_to_the_first_answer() -> None:
    chat = ChatExample((Message("user", "Hi"), Message("assistant", "Ho")), Origin("lab", 1))
    (found,) = encoded(chat)
    assert [spelt(piece.ids) for piece in found.pieces] == ["### User:\nHi\n\n### Assistant:\n$", "Ho$"]
    assert found.pieces[1].weights == (1.0,) * 3


def test_what_asks_nothing_is_refused() -> None:
    for example in (TextExample("only text", Origin("lab", 1)), CompletionExample(" ", "an answer", Origin("lab", 1))):
        assert encoded(example).reason == "nothing is asked"
    chat = ChatExample((Message("user", "Hi"), Message("assistant", "Ho")), Origin("lab", 1))
    assert encoded(chat, train_on="all").reason == "nothing is asked"


def test_answers_that_are_compared_share_their_source() -> None:
    (found,) = encoded(ComparedExample("which", ("this", "that"), (0, 1), Origin("lab", 1)))
    assert [(spelt(p.ids), p.parent) for p in found.pieces] == [("which$", -1), ("this$", 0), ("that$", 0)]
    assert [item.piece for item in found.items] == [1, 2]
    (alone,) = encoded(PromptExample("which", Origin("lab", 1)))
    assert spelt(alone.pieces[0].ids) == "which$"


def test_an_opening_mark_belongs_to_its_half() -> None:
    """BART's tokenizer puts one before every text; the decoder learns to write it."""
    opened = tokenizer()
    opened.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", IM_START), ("<|im_end|>", IM_END)])
    found = encode(ROW, opened, DividedConfig.of(DataConfig.parse({"train": "-"})))
    source, answer = found[0].pieces
    assert source.ids[0] == answer.ids[0] == IM_START
    assert source.ids[-1] == answer.ids[-1] == IM_END
    assert answer.weights == (0.5,) * 8


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_learns_a_task_and_opens_again(method: str, tmp_path: Path) -> None:
    """From a folder and a file to a trained run that answers, reads its own file again and goes to Transformers."""
    # As many layers in both halves: the cache of Transformers' own `generate` has as many as the encoder.
    t5("gated", torch.float32, num_decoder_layers=2).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    rows = [{"prompt": f"{word}:", "completion": word[0] * 2} for word in ("apple", "berry", "cherry", "date")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = luthier.train(base={"name": str(tmp_path / "base"), "dtype": "float64"}, method=method, quiet=True,
                        run=str(tmp_path / "run"),
                        data={"train": str(tmp_path / "rows.jsonl"), "test": str(tmp_path / "rows.jsonl")},
                        optimizer={"learning_rate": 3e-2 if method == "lora" else 1e-2},
                        training={"steps": 24, "batch_size": 4, "micro_tokens": 30},
                        evaluate={"metrics": "exact", "max_new_tokens": 4})
    assert run.results["before"] == 0.0
    assert run.results["after"] == 1.0
    assert run.results["test"]["nll"] < 0.4 < run.results["test_before"]["nll"]
    _, family, _ = build.open_run(Run(tmp_path / "run"))
    assert isinstance(family, Seq2Seq)
    family.train(False)
    asked = tuple(b"cherry:")
    assert said(family, [asked]) == [tuple(b"cc")]
    if method == "lora":
        peft = pytest.importorskip("peft")
        plain = T5ForConditionalGeneration.from_pretrained(tmp_path / "base", dtype=torch.float64)
        plain = peft.PeftModel.from_pretrained(plain, tmp_path / "run")
    else:
        plain = T5ForConditionalGeneration.from_pretrained(tmp_path / "run", dtype=torch.float64)
    answer = plain.generate(input_ids=torch.tensor([[*asked, IM_END]]), max_new_tokens=4)[0].tolist()
    assert answer == [END_OF_TEXT, *b"cc", IM_END]


# ---------------------------------------------------------------- answers

PROMPTS = [tuple(range(n, 3 * n)) for n in (4, 9, 15, 2, 11)]


def slowly(family: Seq2Seq, prompt: Sequence[int], steps: int, start: int = END_OF_TEXT) -> list[int]:
    """Greedy, without a cache, one prompt at a time, through Transformers' own call."""
    said: list[int] = []
    with torch.no_grad():
        while len(said) < steps:
            out = family.model(input_ids=torch.tensor([[*prompt, IM_END]]), decoder_input_ids=torch.tensor([[start, *said]]))
            said.append(int(out.logits[0, -1].argmax()))
    return said


def said(family: Seq2Seq, prompts: Sequence[Sequence[int]] = PROMPTS, **sampling: Any) -> list[tuple[int, ...]]:
    found = sorted(family.generate(prompts, Sampling(**{"max_new_tokens": 12, **sampling})), key=lambda g: g.index)
    assert [g.index for g in found] == list(range(len(prompts)))
    return [g.tokens for g in found]


@KIND
def test_answers_are_those_of_one_step_after_another(kind: str) -> None:
    family = base(kind)
    wanted = [tuple(slowly(family, prompt, 12)) for prompt in PROMPTS]
    assert len(set(wanted)) > 2
    for batch_size in (1, 2, 5):
        assert said(family, batch_size=batch_size) == wanted
    assert said(family, [(*p, IM_END) for p in PROMPTS]) == wanted
    assert tuple(family.stream(PROMPTS[1], Sampling(max_new_tokens=12))) == wanted[1]


def test_answers_end_where_they_stop_and_leave_the_others_alone() -> None:
    family = base()
    wanted = said(family)
    stop = wanted[0][3]
    found = list(family.generate(PROMPTS, Sampling(max_new_tokens=12, stop=(stop,))))
    for answer in found:
        whole = wanted[answer.index]
        assert answer.tokens == (whole[:whole.index(stop)] if stop in whole else whole)
        assert answer.finished == (stop in whole)
    assert 0 < sum(answer.finished for answer in found) < len(found)


def test_a_drawn_answer_depends_on_its_index_and_the_seed_alone() -> None:
    family = base()
    drawn = {"temperature": 1.5, "top_p": 0.9, "seed": 3}
    wanted = said(family, **drawn)
    assert said(family, batch_size=2, **drawn) == wanted
    assert said(family, **{**drawn, "seed": 4}) != wanted
    assert tuple(family.stream(PROMPTS[0], Sampling(max_new_tokens=12, **drawn))) == wanted[0]


def test_a_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(DataError, match="prompt 1"):
        list(base().generate([(3, 4), ()], Sampling()))


# ---------------------------------------------------------------- methods

SETTINGS: dict[str, dict[str, Any]] = {"full": {"keep_base": True}}


NO_PLACE = {"prompt", "ptuning", "prefix", "ptuning_v2"}  # this family has no ports


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_what_it_promises_or_says_why_not(method: str) -> None:
    family = base("gated")
    bare = logits(family.model)
    if method in NO_PLACE:
        with pytest.raises(RecipeError, match="no place for virtual tokens"):
            attach(family, method)
        return
    attached = attach(family, method, stirred=False, **SETTINGS.get(method, {}))
    assert (logits(family.model) - bare).abs().max() < SAME
    stir(attached)
    found = measured(family, attached, [batch(pairs())])
    assert all(float(t.abs().sum()) > 0 for t in found.values())
    with attached.disabled():
        assert torch.equal(logits(family.model), bare)
    fresh = base("gated")
    attach(fresh, method, stirred=False, **SETTINGS.get(method, {})).load(attached.state())
    assert torch.equal(logits(fresh.model), logits(family.model))
    assert (logits(fresh.model) - bare).abs().max() > 0.01


def test_merged_is_attached() -> None:
    family = base("gated")
    attached = attach(family, "lora")
    tuned, answers = logits(family.model), said(family)
    attached.merge()
    assert (logits(family.model) - tuned).abs().max() < SAME
    assert said(family) == answers
    attached.unmerge()
    assert torch.equal(logits(family.model), tuned)


@pytest.mark.parametrize(("targets", "theirs"), [("all-linear", ["q", "k", "v", "o", "wi", "wo"]),
                                                 (("q", "v"), ["q", "v"]), (("EncDecAttention.k",), ["EncDecAttention.k"])])
def test_lora_is_pefts(targets: Any, theirs: list[str], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    family = base()
    attached = attach(family, "lora", rank=4, alpha=12.0, targets=targets)
    config = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, lora_alpha=12, target_modules=theirs)
    other = peft.get_peft_model(t5("relu"), config, autocast_adapter_dtype=False).eval()
    wanted = {n.replace(".default", ""): p for n, p in other.named_parameters() if "lora_" in n}
    state = attached.state()
    assert {n: t.shape for n, t in state.items()} == {n: p.shape for n, p in wanted.items()}
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(state[name])
    assert (logits(other) - logits(family.model)).abs().max() < SAME
    given = padded(pairs(flat=True))
    other(**given).loss.backward()
    found = measured(family, attached, [batch(pairs(flat=True))])
    assert apart({n: t for n, t in found.items() if n != "loss"}, {n: p.grad for n, p in wanted.items()}) < SAME
    stir(attached)
    assert (logits(other) - logits(family.model)).abs().max() > FAR
    assert attached.peft()["task_type"] == "SEQ_2_SEQ_LM"


def test_rows_and_prompts_go_through_adapters_of_their_own() -> None:
    family = base()
    bank = Bank(family.anatomy)
    for i, name in enumerate("ab"):
        bank.add(name, attach(family, "lora", seed=i))
        stir(bank.members[name], seed=10 + i)
    family.router = bank
    names = ["a", "b", None, "a", "b", None]

    def total(who: str | None, examples: list[Encoded]) -> Tensor:
        with bank.using(who):
            row = batch(examples)
            return SFT(family.forward(row.inputs, row.target, SFT.needs), row.target).total

    examples = pairs()
    apart_ = sum(total(who, [e for e, n in zip(examples, names, strict=True) if n == who]) for who in ("a", "b", None))
    row = batch(examples)
    inputs = bank.through(row.inputs, [name for name in names for _ in range(2)])
    assert (SFT(family.forward(inputs, row.target, SFT.needs), row.target).total - apart_).abs() < SAME
    assert (total("a", examples) - apart_).abs() > FAR

    found = sorted(family.generate(PROMPTS, Sampling(max_new_tokens=6, batch_size=5), [0, 1, -1, 0, 1]), key=lambda g: g.index)
    for i, who in enumerate(["a", "b", None, "a", "b"]):
        with bank.using(who):
            assert said(family, [PROMPTS[i]], max_new_tokens=6) == [found[i].tokens]

    tree = batch([forest()])
    with pytest.raises(RunError, match="another adapter"):
        family.forward(bank.through(tree.inputs, ["a", "a", "b", "a", "a", "a"]), tree.target, SFT.needs)


def test_a_saved_base_is_the_same_base(tmp_path: Path) -> None:
    family = base("gated")
    attach(family, "full")
    family.save(tmp_path)
    again = T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert torch.equal(logits(again), logits(family.model))
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "t5"
