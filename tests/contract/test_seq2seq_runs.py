"""Rows of a file for a base that reads sources and writes answers, and every method on it. Read `lab_t5.py` first."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import SFT, apart, attach, measured, stir
from lab_t5 import FAR, PROMPTS, SAME, base, logits, padded, pairs, said, segment_tree, t5, tokenizer, widen
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import T5ForConditionalGeneration

import luthier
from luthier.assembly.run_io import open_run
from luthier.core.errors import RunError
from luthier.core.examples import (
    ChatExample,
    CompletionExample,
    Message,
    Origin,
    PreferenceExample,
    PromptExample,
    TextExample,
)
from luthier.core.protocols import SamplingParams
from luthier.core.types import TokenizedExample
from luthier.data import DataConfig, DividedConfig, encode_example
from luthier.data.packing import build_batch
from luthier.methods import METHODS
from luthier.methods.multi_adapter import AdapterManager
from luthier.methods.prompt import VirtualTokenConfig
from luthier.models.families.seq2seq import Seq2Seq
from luthier.training.run_folder import Run
from tiny import END_OF_TEXT, IM_END, IM_START


@pytest.fixture(autouse=True)
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    widen(monkeypatch)


# ---------------------------------------------------------------- rows of a file


def encoded(example: Any, **settings: Any) -> Any:
    config = DividedConfig.of(DataConfig.parse({"train": "-", **settings}))
    return encode_example(example, tokenizer(), config)


def spelt(ids: Sequence[int]) -> str:
    return "".join("$" if i == IM_END else chr(i) for i in ids)


ROW = CompletionExample("say it", " twice", Origin("lab", 1), 0.5)


def test_source_and_answer_are_two_spans_with_an_end_mark_each() -> None:
    (found,) = encoded(ROW)
    source, answer = found.spans
    assert (spelt(source.ids), source.weights, source.parent) == ("say it$", (0.0,) * 7, -1)
    assert (spelt(answer.ids), answer.weights, answer.parent) == (" twice$", (0.5,) * 7, 0)
    assert found.num_bytes == len(" twice")
    row = build_batch([found])
    assert row.target.token_ids.tolist() == list(answer.ids)  # the first one too, and the end mark
    assert row.target.state_index.tolist() == [6, *range(7, 13)]


def test_each_of_the_two_has_max_length_to_itself() -> None:
    (found,) = encoded(ROW, max_length=4)
    assert [spelt(span.ids) for span in found.spans] == ["say$", " twi"]
    assert found.num_bytes == 4
    refused = encoded(ROW, max_length=6, truncation="refuse")
    assert refused.reason == "longer than max_length"
    assert "source" in refused.detail
    assert len(encoded(ROW, max_length=7, truncation="refuse")) == 1


def test_a_chat_is_asked_up_to_the_first_answer() -> None:
    chat = ChatExample((Message("user", "Hi"), Message("assistant", "Ho")), Origin("lab", 1))
    (found,) = encoded(chat)
    assert [spelt(span.ids) for span in found.spans] == ["### User:\nHi\n\n### Assistant:\n$", "Ho$"]
    assert found.spans[1].weights == (1.0,) * 3


def test_what_asks_nothing_is_refused() -> None:
    for example in (TextExample("only text", Origin("lab", 1)), CompletionExample(" ", "an answer", Origin("lab", 1))):
        assert encoded(example).reason == "there is no source text"
    chat = ChatExample((Message("user", "Hi"), Message("assistant", "Ho")), Origin("lab", 1))
    assert encoded(chat, loss_on="all").reason == "there is no source text"


def test_answers_that_are_compared_share_their_source() -> None:
    (found,) = encoded(PreferenceExample("which", ("this", "that"), (0, 1), Origin("lab", 1)))
    assert [(spelt(p.ids), p.parent) for p in found.spans] == [("which$", -1), ("this$", 0), ("that$", 0)]
    assert [item.span_index for item in found.labeled_spans] == [1, 2]
    (alone,) = encoded(PromptExample("which", Origin("lab", 1)))
    assert spelt(alone.spans[0].ids) == "which$"


def test_an_opening_mark_belongs_to_its_half() -> None:
    """BART's tokenizer puts one before every text; the decoder learns to write it."""
    opened = tokenizer()
    opened.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", IM_START), ("<|im_end|>", IM_END)])
    found = encode_example(ROW, opened, DividedConfig.of(DataConfig.parse({"train": "-"})))
    source, answer = found[0].spans
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
    run = luthier.train(model={"name_or_path": str(tmp_path / "base"), "dtype": "float64"}, method=method, quiet=True,
                        output_dir=str(tmp_path / "run"),
                        data={"train": str(tmp_path / "rows.jsonl"), "test": str(tmp_path / "rows.jsonl")},
                        optimizer={"learning_rate": 3e-2 if method == "lora" else 1e-2},
                        training={"max_steps": 24, "batch_size": 4, "max_tokens_per_micro_batch": 30},
                        evaluate={"metrics": "exact_match", "max_new_tokens": 4})
    assert run.results["before"] == 0.0
    assert run.results["after"] == 1.0
    assert run.results["test"]["nll"] < 0.4 < run.results["test_before"]["nll"]
    _, family, _ = open_run(Run(tmp_path / "run"))
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


# ---------------------------------------------------------------- methods

SETTINGS: dict[str, dict[str, Any]] = {name: {"keep_base": True} for name in ("full", "freeze")}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_what_it_promises(method: str) -> None:
    family = base("gated")
    bare = logits(family.model)
    attached = attach(family, method, stirred=False, **SETTINGS.get(method, {}))
    virtual = issubclass(METHODS[method], VirtualTokenConfig)  # what stands beside the words is seen at once
    assert ((logits(family.model) - bare).abs().max() < SAME) is not virtual
    stir(attached)
    found = measured(family, attached, [build_batch(pairs())])
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
    attached = attach(family, "lora", rank=4, alpha=12.0, target_modules=targets)
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
    found = measured(family, attached, [build_batch(pairs(flat=True))])
    assert apart({n: t for n, t in found.items() if n != "loss"}, {n: p.grad for n, p in wanted.items()}) < SAME
    stir(attached)
    assert (logits(other) - logits(family.model)).abs().max() > FAR
    assert attached.get_peft_config()["task_type"] == "SEQ_2_SEQ_LM"


def test_rows_and_prompts_go_through_adapters_of_their_own() -> None:
    family = base()
    manager = AdapterManager(family.structure)
    for i, name in enumerate("ab"):
        manager.add(name, attach(family, "lora", seed=i))
        stir(manager.adapters[name], seed=10 + i)
    family.router = manager
    names = ["a", "b", None, "a", "b", None]

    def total(who: str | None, examples: list[TokenizedExample]) -> Tensor:
        with manager.use_adapter(who):
            row = build_batch(examples)
            return SFT(family.forward(row.inputs, row.target, SFT.required_outputs), row.target).total

    examples = pairs()
    apart_ = sum(total(who, [e for e, n in zip(examples, names, strict=True) if n == who]) for who in ("a", "b", None))
    row = build_batch(examples)
    inputs = manager.with_adapters(row.inputs, [name for name in names for _ in range(2)])
    assert (SFT(family.forward(inputs, row.target, SFT.required_outputs), row.target).total - apart_).abs() < SAME
    assert (total("a", examples) - apart_).abs() > FAR

    found = sorted(family.generate(PROMPTS, SamplingParams(max_new_tokens=6, batch_size=5), [0, 1, -1, 0, 1]), key=lambda g: g.index)
    for i, who in enumerate(["a", "b", None, "a", "b"]):
        with manager.use_adapter(who):
            assert said(family, [PROMPTS[i]], max_new_tokens=6) == [found[i].token_ids]

    tree = build_batch([segment_tree()])
    with pytest.raises(RunError, match="a different adapter than its parent"):
        family.forward(manager.with_adapters(tree.inputs, ["a", "a", "b", "a", "a", "a"]), tree.target, SFT.required_outputs)


def test_a_saved_base_is_the_same_base(tmp_path: Path) -> None:
    family = base("gated")
    attach(family, "full")
    family.save(tmp_path)
    again = T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert torch.equal(logits(again), logits(family.model))
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "t5"
