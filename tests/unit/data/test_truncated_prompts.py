"""A prompt that is too long for its answers loses words of its turns, and never an opening token, a header or its system
prompt. Over every chat template of the collection, and bare prompts."""

from __future__ import annotations

import pytest

from chat_templates import KINDS, tokenizer_with
from luthier.core.examples import Message, Origin, PreferenceExample, UnpairedPreferenceExample
from luthier.data.config import DataConfig
from luthier.data.encoding import encode_with_truncation
from luthier.data.rows import RejectedRow

HERE = Origin("pairs.jsonl", 3)
SYSTEM, LONG, SAID, LATER, WORSE = "Answer in one word.", "x" * 300, "zz", "y" * 40, "no no"
PROMPT = (Message("system", SYSTEM), Message("user", LONG), Message("assistant", SAID), Message("user", LATER))


def pair(prompt: object) -> PreferenceExample:
    return PreferenceExample(prompt, ((Message("assistant", "yes"),), (Message("assistant", WORSE),))  # type: ignore[arg-type]
                             if isinstance(prompt, tuple) else ("yes", WORSE), (0, 1), HERE)


def config(**options: object) -> DataConfig:
    return DataConfig.parse({"train": "-", **options})


def texts(found: object, tokenizer: object) -> list[tuple[str, int]]:
    """Every answer behind its prompt, and how many tokens that are."""
    assert isinstance(found, list)
    spans = found[0].spans
    paths = [((spans[p.parent].ids if p.parent >= 0 else ()) + p.ids) for p in spans if p.parent >= 0 or len(spans) == 2]
    return [(tokenizer.decode(ids), len(ids)) for ids in paths]  # type: ignore[attr-defined]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_cut_are_the_oldest_words_of_turns(kind: str, share: bool) -> None:
    tokenizer = tokenizer_with(kind)
    made = encode_with_truncation(pair(PROMPT), tokenizer, config(max_length=10**6, share_prompt=share))
    assert not isinstance(made, RejectedRow)
    whole = texts(made[0], tokenizer)
    longest = max(length for _, length in whole)
    folded = SYSTEM + "\n\n" if kind in ("gemma", "mistral") else ""  # there the system prompt is the user's words
    for excess in (1, 100, 299, 303):  # 303 empties two turns and reaches into the third
        made = encode_with_truncation(pair(PROMPT), tokenizer, config(max_length=longest - excess, share_prompt=share))
        assert not isinstance(made, RejectedRow), (excess, str(made))
        assert made[1]  # counted as truncated
        for (text, length), (full, count) in zip(texts(made[0], tokenizer), whole, strict=True):
            left, wanted = excess, full
            for words in (folded + LONG, SAID, LATER):
                wanted, left = wanted.replace(words, words[left:], 1), max(0, left - len(words))
            assert (text, length) == (wanted, count - excess), excess
            assert folded or SYSTEM in text


def test_a_bare_prompt_keeps_its_opening_token() -> None:
    tokenizer = tokenizer_with("none")
    made = encode_with_truncation(pair(LONG), tokenizer, config(max_length=100))
    assert not isinstance(made, RejectedRow)
    for text, length in texts(made[0], tokenizer):
        assert text.startswith("<s>xxx")
        assert length <= 100


def test_a_prompt_of_which_no_word_would_be_left_is_refused() -> None:
    for kind in ("chatml", "llama3"):
        made = encode_with_truncation(pair(PROMPT), tokenizer_with(kind), config(max_length=60))
        assert isinstance(made, RejectedRow)
        assert made.reason == "an answer leaves no space for its prompt"


def test_a_single_answer_with_a_verdict_is_cut_in_the_same_way() -> None:
    tokenizer = tokenizer_with("chatml")
    made = encode_with_truncation(UnpairedPreferenceExample(PROMPT, (Message("assistant", "yes"),), True, HERE), tokenizer, config(max_length=200))
    assert not isinstance(made, RejectedRow)
    text = tokenizer.decode(made[0][0].spans[0].ids)
    assert text.startswith(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nx")
    assert text.endswith(f"{LATER}<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>")
