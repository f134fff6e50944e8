"""What the tests of the sequence-to-sequence family share: two tiny T5s, pairs of a source and its answer, Transformers'
own way to run them. Read `lab.py` first.

`relu` is as the first T5 (states shrunk before the head), `gated` as the later ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from lab import Dice
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.t5 import modeling_t5

from luthier.core.examples import Origin
from luthier.core.protocols import SamplingParams
from luthier.core.types import TokenizedExample, TokenSpan
from luthier.models.families.seq2seq import Seq2Seq
from tiny import END_OF_TEXT, IM_END, VOCABULARY, tiny_tokenizer

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


def widen(monkeypatch: pytest.MonkeyPatch) -> None:
    """For one test, T5's norms compute in float64."""
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
    config = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                      relative_attention_num_buckets=8, relative_attention_max_distance=16,
                      decoder_start_token_id=END_OF_TEXT, pad_token_id=END_OF_TEXT, eos_token_id=IM_END,
                      **{"vocab_size": VOCABULARY, "dropout_rate": 0.0, "num_decoder_layers": 3, **KINDS[kind], **settings})
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


def pairs(flat: bool = False, seed: int = 0) -> list[TokenizedExample]:
    """A source and its answer, of many lengths; `flat`: all weights are 1."""
    dice = Dice(seed)
    found = [TokenizedExample((dice.span(n, masked=n), dice.span(m, 0)), Origin("lab", i), m)
             for i, (n, m) in enumerate(zip(SOURCES, ANSWERS, strict=True))]
    return [TokenizedExample((e.spans[0], TokenSpan(e.spans[1].ids, (1.0,) * len(e.spans[1].ids), 0)), e.origin, e.num_bytes)
            for e in found] if flat else found


def segment_tree() -> TokenizedExample:
    """A source with three answers, one of which goes on in two ways."""
    dice = Dice(5)
    parents = (-1, 0, 0, 2, 2, 0)
    return TokenizedExample(tuple(dice.span(3 + 2 * i, p, masked=3 * (p < 0)) for i, p in enumerate(parents)), Origin("lab", 0), 1)


def padded(examples: Sequence[TokenizedExample]) -> dict[str, Tensor]:
    """As Transformers takes them."""
    sources, answers = ([torch.tensor(e.spans[i].ids) for e in examples] for i in (0, 1))
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
    found = sorted(family.generate(prompts, SamplingParams(**{"max_new_tokens": 12, **sampling})), key=lambda g: g.index)
    assert [g.index for g in found] == list(range(len(prompts)))
    return [g.token_ids for g in found]
