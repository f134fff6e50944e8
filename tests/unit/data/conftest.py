"""Tokenizers that the data tests share: one token a byte, and one that merges bytes into words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from luthier.core.types import TokenizedExample
from tiny import CHATML, tiny_tokenizer

LINES = ["What is the capital of France? The capital of France is Paris.", "the answer is yes, the answer is no",
         "user system assistant tool", "one two three four five six seven", "\n\n  \n", "good bad better 你好 世界 🙂"]


@pytest.fixture
def letters() -> PreTrainedTokenizerFast:
    """Every byte is a token."""
    return tiny_tokenizer()


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges, which trims white space from its offsets."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    special = [AddedToken(word, special=True, normalized=False) for word in ("<|im_start|>", "<|im_end|>")]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(LINES * 10, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", bos_token=None)
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], str]:
    """Writes a file and gives its path."""
    def written(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)
    return written


@pytest.fixture
def trained() -> Callable[[TokenizedExample, PreTrainedTokenizerFast], list[str]]:
    """The runs of words that are predicted with a weight."""
    def runs(encoded: TokenizedExample, tokenizer: PreTrainedTokenizerFast) -> list[str]:
        (span,) = encoded.spans
        found: list[list[int]] = [[]]
        for i, (token, weight) in enumerate(zip(span.ids, span.weights, strict=True)):
            if i and weight:
                found[-1].append(token)
            elif found[-1]:
                found.append([])
        return [tokenizer.decode(run) for run in found if run]
    return runs
