"""The encoder family: packed = padded = Transformers' own model, and methods as on any other. Read `lab.py` first."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import apart, attach, digest, documents, judged, paths, scored, stir, trees
from peft import LoraConfig as PeftLora
from peft import get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification

from luthier.core.errors import BaseError
from luthier.core.protocols import SamplingParams
from luthier.core.types import Batch, Inputs, LossInputs, SegmentTree
from luthier.data.packing import build_batch, pack_examples
from luthier.models import CausalLM, Encoder, ModelConfig, open_family, resolve_name
from luthier.models.architectures import detect_architecture
from luthier.models.families.encoder import compute_token_types, read_pooling
from tiny import ENCODERS, SEP, pair_tokenizer, save_tiny, tiny

SAME, FAR = 1e-9, 1e-3
KIND = pytest.mark.parametrize("kind", ENCODERS)
METHOD = pytest.mark.parametrize("method", ["full", "lora"])
TOKENIZER = pair_tokenizer()


def encoder(kind: str, layout: Any = None, pooling: Any = "mean", **overrides: Any) -> Encoder:
    return Encoder(tiny(kind, **overrides), TOKENIZER, layout, pooling)


def states(family: Encoder, ids: list[int]) -> torch.Tensor:
    """[T, D] of one document as a row of its own."""
    with torch.no_grad():
        return family.states(Inputs(torch.tensor(ids), torch.arange(len(ids)), SegmentTree((len(ids),), (-1,))))


def folder(path: Path) -> ModelConfig:
    return ModelConfig(name_or_path=str(path), dtype="auto", device="cpu")


# ---------------------------------------------------------------- rows


@KIND
@METHOD
def test_packed_is_padded(kind: str, method: str) -> None:
    rows = [build_batch(judged([*documents(), *trees()]))]
    packed = encoder(kind, "packed", "last")
    found = scored(packed, attach(packed, method), rows)
    padded = encoder(kind, "padded", "last")
    assert apart(found, scored(padded, attach(padded, method), rows)) < SAME

    # The control: every document sees the one before it.
    inputs = replace(rows[0].inputs, segment_tree=SegmentTree(rows[0].inputs.segment_tree.lengths,
                                                        tuple(range(-1, len(rows[0].inputs.segment_tree.lengths) - 1))))
    assert apart(scored(packed, attach(packed, method, stirred=False), [replace(rows[0], inputs=inputs)]),
                 scored(packed, attach(packed, method, stirred=False), rows)) > FAR


@KIND
def test_every_kind_proves_itself_packed(kind: str) -> None:
    assert encoder(kind).layout == "packed"


@pytest.mark.parametrize(("kind", "settings"), [
    ("modernbert", {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2, "local_attention": 8}),
    ("deberta-v2", {"relative_attention": True, "position_biased_input": False}),
])
def test_an_architecture_with_attention_of_its_own_runs_padded(kind: str, settings: dict[str, Any]) -> None:
    """And gives each document what it has alone."""
    model = tiny("bert")  # for its sizes
    config = AutoConfig.for_model(kind, hidden_size=32, intermediate_size=48, num_hidden_layers=2, pad_token_id=0,
                                  num_attention_heads=4, vocab_size=model.config.vocab_size, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        family = Encoder(AutoModelForMaskedLM.from_config(config, dtype=torch.float64).base_model.eval(), TOKENIZER)
    assert family.layout == "padded"
    row = build_batch(documents()).inputs
    with torch.no_grad():
        alone = [family.model(input_ids=part[None]).last_hidden_state[0] for part in row.tokens.split(row.segment_tree.lengths)]
        assert (family.states(row) - torch.cat(alone)).abs().max() < 1e-5


@KIND
def test_packed_is_transformers_own_model_one_document_at_a_time(kind: str) -> None:
    """The loss and every gradient of the untouched model, eager attention, by the mean of its states."""
    examples = judged(documents())
    family = encoder(kind)
    found = scored(family, attach(family, "full", stirred=False), [build_batch(examples)])
    plain, head = tiny(kind), family.heads.modules["score"]
    plain.set_attn_implementation("eager")
    head.zero_grad()
    for causal in (False, True):  # True: the control
        plain.zero_grad()
        loss = torch.zeros((), dtype=torch.float64)
        for example in examples:
            ids = torch.tensor([example.spans[0].ids])
            mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.float64)
            mask = (1 - mask.tril()) * -1e9 if causal else torch.zeros_like(mask)
            mean = plain(input_ids=ids, attention_mask=mask).last_hidden_state[0].mean(0)
            label = torch.tensor(example.labeled_spans[0].label, dtype=torch.float32).double()
            loss = loss + (head(mean) - label).square().sum() / len(examples)
        loss.backward()
        wanted = {"loss": loss.detach(), **{n: p.grad for n, p in plain.named_parameters()}}
        mine = {name: tensor for name, tensor in found.items() if name in wanted}
        assert (apart(mine, wanted) > FAR) if causal else (apart(mine, wanted) < SAME)


@METHOD
@pytest.mark.parametrize("pooling", ["first", "last", "mean"])
def test_how_a_batch_is_cut_changes_nothing(pooling: str, method: str) -> None:
    family, examples = encoder("bert", pooling=pooling), judged([*documents(), *trees()])
    attached = attach(family, method)
    whole = scored(family, attached, pack_examples(examples, None))
    for max_tokens in (1, 40):
        rows = pack_examples(examples, max_tokens)
        assert len(rows) > 1
        assert apart(scored(family, attached, rows), whole) < SAME
    assert apart(scored(family, attached, pack_examples(examples[:-1], None)), whole) > FAR


@KIND
def test_an_ancestor_never_sees_its_descendants(kind: str) -> None:
    family, tree = encoder(kind), trees()[0]
    row, alone = build_batch([tree]).inputs, build_batch(paths(tree)[:1]).inputs
    root = len(tree.spans[0].ids)
    with torch.no_grad():
        whole = family.states(row)
    assert (whole[:root] - states(family, list(tree.spans[0].ids))).abs().max() < SAME
    assert (whole[:root] - states(family, alone.tokens.tolist())[:root]).abs().max() > FAR


@pytest.mark.parametrize("method", ["full", "lora"])
def test_gradient_checkpointing_changes_nothing_but_the_work(method: str) -> None:
    calls: list[int] = []
    rows = [build_batch(judged(documents()))]

    def run(checkpointing: bool) -> dict[str, torch.Tensor]:
        family = encoder("bert")
        family.train(True)
        if checkpointing:
            family.enable_gradient_checkpointing()
        calls.append(0)

        def count(*_: object) -> None:
            calls[-1] += 1

        family.structure.layers[0].attention.register_forward_hook(count)
        return scored(family, attach(family, method), rows)

    without = run(False)
    assert apart(run(True), without) < SAME
    assert calls == [1, 2]


# ---------------------------------------------------------------- pooling and types


@pytest.mark.parametrize("pooling", ["first", "last", "mean"])
def test_pooled_is_that_of_transformers_own_states(pooling: str) -> None:
    family, examples = encoder("bert", pooling=pooling), judged(documents())
    plain = tiny("bert")
    row = build_batch(examples)
    with torch.no_grad():
        found = family.forward(row.inputs, row.target, frozenset({"pooled"})).pooled
        alone = [plain(input_ids=torch.tensor([e.spans[0].ids])).last_hidden_state[0] for e in examples]
    by = {"first": [s[0] for s in alone], "last": [s[-1] for s in alone], "mean": [s.mean(0) for s in alone]}
    assert (found - torch.stack(by.pop(pooling))).abs().max() < SAME
    for others in by.values():
        assert (found - torch.stack(others)).abs().max() > FAR


def test_pairs_have_the_types_of_the_tokenizer() -> None:
    family, plain = encoder("bert"), tiny("bert")
    for words in (("some words",), ("a question", "its answer"), ("", "b")):
        told = TOKENIZER(*words, return_tensors="pt")
        with torch.no_grad():
            wanted = plain(**told).last_hidden_state[0]
            untyped = plain(input_ids=told["input_ids"]).last_hidden_state[0]
        found = states(family, told["input_ids"][0].tolist())
        assert (found - wanted).abs().max() < SAME
        assert ((found - untyped).abs().max() > FAR) == (len(words) == 2)


def test_types_count_from_the_root_of_each_document() -> None:
    tokens = torch.tensor([1, SEP, 2, SEP, 3, 3, SEP, 1, SEP, 4])
    assert compute_token_types(tokens, SegmentTree((4, 6), (-1, -1)), SEP).tolist() == [0, 0, 1, 1, 0, 0, 0, 1, 1, 1]
    assert compute_token_types(tokens, SegmentTree((2, 2, 3, 3), (-1, 0, -1, 2)), SEP).tolist() == [0, 0, 1, 1, 0, 0, 0, 1, 1, 1]
    assert compute_token_types(tokens, SegmentTree((1, 3, 6), (-1, 0, 0)), SEP).tolist() == [0, 0, 1, 1, 0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(("told", "pooling"), [
    (None, "first"), ({"pooling_mode_mean_tokens": True}, "mean"), ({"pooling_mode_cls_token": True}, "first"),
    ({"pooling_mode": "lasttoken"}, "last"), ({"pooling_mode": ["mean"]}, "mean"), ({}, "mean"),
    ({"pooling_mode_max_tokens": True}, None), ({"pooling_mode": ["cls", "mean"]}, None),
])
def test_pooling_is_read_from_the_folder(told: dict[str, Any] | None, pooling: str | None, tmp_path: Path) -> None:
    save_tiny(tmp_path, "bert")
    if told is not None:
        (tmp_path / "1_Pooling").mkdir()
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(told))
    if pooling is None:
        with pytest.raises(BaseError, match=r"set model\.pooling"):
            read_pooling(tmp_path)
        return
    assert read_pooling(tmp_path) == pooling
    assert open_family(folder(tmp_path)).pooling == pooling
    assert open_family(folder(tmp_path).model_copy(update={"pooling": "last"})).pooling == "last"


# ---------------------------------------------------------------- methods


@KIND
def test_the_parts_are_found(kind: str) -> None:
    family, called = encoder(kind), []
    for number, block in enumerate(family.structure.layers):
        assert [s.role for s in family.structure.linears if s.layer_index == number] == ["q", "k", "v", "o", "up", "down"]
        sites = {s.role: s.module for s in family.structure.linears if s.layer_index == number}
        assert (block.attention_out, block.mlp_out) == (sites["o"], sites["down"])
        assert len(block.norms) == 2
        assert sites["q"] in list(block.attention.children())
        assert sites["up"] in list(block.mlp_in.modules())
        block.mlp_in.register_forward_pre_hook(lambda module, args: called.append(args[0]))
        sites["up"].register_forward_pre_hook(lambda module, args: called.append(args[0]))
    states(family, [5, 6, 7])
    assert len(called) == 4
    assert torch.equal(called[0], called[1])  # what enters the MLP is its first argument
    assert family.structure.task == "FEATURE_EXTRACTION"
    assert family.structure.head is None
    for name, parameter in family.model.named_parameters():
        assert "pooler" not in name, parameter.shape


@pytest.mark.parametrize(("name", "settings"), [("full", {"keep_base": True}), ("lora", {}), ("lora", {"use_dora": True})])
def test_the_laws_of_a_method(name: str, settings: dict[str, Any]) -> None:
    ids = list(range(20, 40))
    family = encoder("bert")
    bare, weights = states(family, ids), digest(family)
    attached = attach(family, name, stirred=False, **settings)
    assert (states(family, ids) - bare).abs().max() < 1e-12
    stir(attached)
    scored(family, attached, [build_batch(judged(documents()))])
    assert all(float(p.grad.abs().sum()) > 0 for p in attached.parameters().values())
    tuned, state = states(family, ids), {n: t.clone() for n, t in attached.state().items()}
    assert (tuned - bare).abs().max() > FAR
    with attached.disabled(), attached.disabled():
        assert torch.equal(states(family, ids), bare)
        assert digest(family) == weights
    assert torch.equal(states(family, ids), tuned)
    fresh = encoder("bert")
    other = attach(fresh, name, seed=9, stirred=False, **settings)
    other.load(state)
    assert torch.equal(states(fresh, ids), tuned)
    if name == "lora":
        attached.merge()
        assert (states(family, ids) - tuned).abs().max() < 1e-10
        attached.unmerge()
        assert digest(family) == weights


def test_lora_is_pefts() -> None:
    ids = torch.arange(20, 40)
    family = encoder("bert")
    attached = attach(family, "lora", rank=4, alpha=8)
    form = attached.get_peft_config()
    assert form is not None
    assert form["task_type"] == "FEATURE_EXTRACTION"
    theirs = get_peft_model(tiny("bert"), PeftLora(r=4, lora_alpha=8, target_modules=form["target_modules"],
                                                   task_type="FEATURE_EXTRACTION")).double().eval()
    with torch.no_grad():
        bare = theirs(input_ids=ids[None]).last_hidden_state[0]
        loaded = set_peft_model_state_dict(theirs, attached.state())
        wanted = theirs(input_ids=ids[None]).last_hidden_state[0]
    assert not loaded.unexpected_keys
    assert (states(family, ids.tolist()) - wanted).abs().max() < SAME
    assert (bare - wanted).abs().max() > FAR


# ---------------------------------------------------------------- folders


@KIND
def test_a_folder_opens_as_an_encoder_and_is_written_as_one(kind: str, tmp_path: Path,
                                                            capfd: pytest.CaptureFixture[str]) -> None:
    save_tiny(tmp_path / "base", kind)
    capfd.readouterr()
    family = open_family(folder(tmp_path / "base").model_copy(update={"pooling": "mean"}))
    assert capfd.readouterr() == ("", ""), "loading is silent"
    assert isinstance(family, Encoder)
    assert torch.equal(states(family, [5, 6, 7]), states(encoder(kind), [5, 6, 7]))
    (tmp_path / "again").mkdir()
    family.save(tmp_path / "again")
    again = open_family(folder(tmp_path / "again"))
    assert isinstance(again, Encoder)
    assert again.pooling == "mean"
    assert torch.equal(states(again, [5, 6, 7]), states(family, [5, 6, 7]))


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("built", [AutoModelForMaskedLM, AutoModelForSequenceClassification])
def test_heads_of_earlier_training_stay_in_the_file(kind: str, built: Any, tmp_path: Path) -> None:
    config = dict(ENCODERS[kind])
    model = built.from_config(AutoConfig.for_model(config.pop("model_type"), **config), dtype=torch.float64).eval()
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    family = open_family(folder(tmp_path))
    assert isinstance(family, Encoder)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(states(family, [5, 6, 7]), model.base_model(input_ids=ids).last_hidden_state[0])
    weights = load_file(tmp_path / "model.safetensors")
    weights["encoder.layer.7.attention.self.query.weight"] = torch.zeros(2, 2)  # not a head: something is wrong
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseError, match=r"unexpected: encoder\.layer\.7"):
        open_family(folder(tmp_path))


def test_the_config_decides_which_family_it_is(tmp_path: Path) -> None:
    config = {k: v for k, v in ENCODERS["bert"].items() if k != "model_type"}
    for changed, kind in (({}, "encoder"), ({"is_decoder": True}, "causal"), ({"architectures": ["BertModel"]}, "encoder"),
                          ({"architectures": ["BertLMHeadModel"]}, "causal"),
                          ({"architectures": ["BertForMaskedLM"]}, "encoder")):
        assert detect_architecture(AutoConfig.for_model("bert", **{**config, **changed})) == kind
    assert detect_architecture(AutoConfig.for_model("llama")) == "causal"
    assert detect_architecture(AutoConfig.for_model("t5")) == "seq2seq"
    assert detect_architecture(AutoConfig.for_model("vit")) == "vision"
    assert detect_architecture(AutoConfig.for_model("wav2vec2")) is None
    assert isinstance(open_family(folder(save_tiny(tmp_path, "llama"))), CausalLM)


def test_an_encoder_refuses_what_it_cannot() -> None:
    family = encoder("bert")
    row: Batch = build_batch(documents())
    target: LossInputs = row.target
    with pytest.raises(BaseError, match="masked-language-modeling head predicts no tokens"):
        family.forward(row.inputs, target, frozenset({"token_logps"}))
    with pytest.raises(BaseError, match="cannot generate"):
        family.generate([[1, 2]], SamplingParams())


def test_what_is_written_is_a_sentence_transformer(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    family = encoder("bert")
    family.save(tmp_path)
    theirs = SentenceTransformer(str(tmp_path), device="cpu").double()
    for text in ("one text", "another, longer one"):
        ids = TOKENIZER(text)["input_ids"]
        wanted = torch.as_tensor(theirs.encode(text, show_progress_bar=False)).double()
        assert (states(family, ids).mean(0) - wanted).abs().max() < 1e-6
        assert (states(family, ids)[0] - wanted).abs().max() > FAR


@pytest.mark.parametrize(("name", "pooling"), [("minilm", "mean"), ("../shared/models/bge-small-zh", "first")])
def test_real_encoders_load(name: str, pooling: str) -> None:
    try:
        resolve_name(name)
    except BaseError as absent:
        pytest.skip(str(absent))
    family = open_family(ModelConfig(name_or_path=name, device="cpu"))
    assert isinstance(family, Encoder)
    assert (family.layout, family.pooling) == ("packed", pooling)
    texts = ("一只猫坐在垫子上", "垫子上有一只小猫", "股票市场今天下跌") if "zh" in name else (
        "A cat sits on the mat", "There is a kitten on the rug", "Stocks fell today")
    found = [states(family, family.tokenizer(text)["input_ids"]) for text in texts]
    first, alike, other = (s.mean(0) if pooling == "mean" else s[0] for s in found)
    assert torch.cosine_similarity(first, alike, dim=0) > torch.cosine_similarity(first, other, dim=0) + 0.2
