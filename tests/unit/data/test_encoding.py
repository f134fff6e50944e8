"""Texts and completions as tokens; what becomes of the overlong; tokenizers with habits of their own."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from luthier.core.examples import ChatExample, CompletionExample, Message, Origin, TextExample
from luthier.data.config import DataConfig
from luthier.data.encoding import encode_example
from luthier.data.rows import RejectedRow
from luthier.data.tokenization import encode_prompt
from tiny import END_OF_TEXT, IM_END, IM_START

HERE = Origin("f", 1)


def config(**options: object) -> DataConfig:
    return DataConfig.parse({"train": "f", **options})


class Slow:
    """A tokenizer that cannot say which characters a token stands for."""

    is_fast = False

    def __init__(self, inner) -> None:
        self.inner = inner
        self.eos_token_id, self.eos_token, self.chat_template = inner.eos_token_id, inner.eos_token, inner.chat_template
        self.added_tokens_decoder, self.all_special_ids = inner.added_tokens_decoder, inner.all_special_ids
        self.apply_chat_template, self.decode = inner.apply_chat_template, inner.decode

    def __len__(self) -> int:
        return len(self.inner)

    def __call__(self, text, **options):
        assert "return_offsets_mapping" not in options
        return self.inner(text, **options)


def test_a_text_is_trained_whole_and_ends_with_the_end_mark(letters) -> None:
    (found,) = encode_example(TextExample("ab", HERE, 0.5), letters, config())
    assert found.spans[0].ids == (*b"ab", IM_END)
    assert found.spans[0].weights == (0.5, 0.5, 0.5)
    assert found.num_bytes == 1  # `a` follows nothing and is not predicted


def test_a_tokenizers_own_marks_are_kept_and_not_doubled(letters) -> None:
    letters.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A <|im_end|>", special_tokens=[("<|endoftext|>", END_OF_TEXT), ("<|im_end|>", IM_END)])
    (found,) = encode_example(TextExample("ab", HERE), letters, config())
    assert found.spans[0].ids == (END_OF_TEXT, *b"ab", IM_END)
    assert found.num_bytes == 2
    letters.eos_token = "<|im_start|>"  # now the closing mark is not the end mark, and still stands for no bytes
    (found,) = encode_example(TextExample("ab", HERE), letters, config())
    assert (found.spans[0].ids, found.num_bytes) == ((END_OF_TEXT, *b"ab", IM_END, IM_START), 2)
    letters.eos_token = "<|im_end|>"
    (found,) = encode_example(CompletionExample("a", "b", HERE), letters, config(format="completion"))
    assert found.spans[0].ids == (END_OF_TEXT, *b"ab", IM_END)
    assert found.spans[0].weights == (0, 0, 1, 1)
    assert encode_prompt(CompletionExample("a", "b", HERE), letters, config(format="completion")) == ([END_OF_TEXT, *b"a"], "b")


def test_a_completion_is_joined_bare_where_the_format_says_so(letters, words, trained) -> None:
    for tokenizer in (letters, words):
        (found,) = encode_example(CompletionExample("the answer is", " yes", HERE, 2.0), tokenizer, config(format="completion"))
        assert trained(found, tokenizer) == [" yes<|im_end|>"]
        assert tokenizer.decode(found.spans[0].ids) == "the answer is yes<|im_end|>"
        assert set(found.spans[0].weights) == {0.0, 2.0}
        assert found.num_bytes == 4
        tokenizer.chat_template = None
        assert encode_example(CompletionExample("the answer is", " yes", HERE, 2.0), tokenizer, config()) == [found]


def test_white_space_that_the_tokenizer_trims_from_its_offsets_is_trained(words, trained) -> None:
    (found,) = encode_example(CompletionExample("one", " two  ", HERE), words, config(format="completion"))
    assert trained(found, words) == [" two  <|im_end|>"]
    assert found.num_bytes == 6


def test_a_token_across_the_border_is_trained(words, trained) -> None:
    (found,) = encode_example(CompletionExample("the answer is ", "yes", HERE), words, config(format="completion"))
    assert trained(found, words) in (["yes<|im_end|>"], [" yes<|im_end|>"])


def test_truncation_keeps_the_beginning(letters) -> None:
    (found,) = encode_example(TextExample("abcdef", HERE), letters, config(max_length=4))
    assert (found.spans[0].ids, found.num_bytes) == (tuple(b"abcd"), 3)


def test_a_chat_whose_answer_is_cut_off_is_refused(letters) -> None:
    chat = ChatExample((Message("user", "q" * 50), Message("assistant", "a")), HERE)
    found = encode_example(chat, letters, config(max_length=20))
    assert isinstance(found, RejectedRow)
    assert found.reason == "nothing to train on"
    assert "max_length=20" in found.detail


@pytest.mark.parametrize("truncation", ["refuse", "split"])
def test_an_overlong_chat_is_refused(letters, truncation) -> None:
    chat = ChatExample((Message("user", "q"), Message("assistant", "a" * 50)), HERE)
    found = encode_example(chat, letters, config(max_length=20, truncation=truncation))
    assert isinstance(found, RejectedRow)
    assert found.reason == "longer than max_length"


def test_nothing_with_a_weight_is_refused(letters) -> None:
    for example in (ChatExample((Message("user", "q"), Message("assistant", "a", 0.0)), HERE), TextExample("ab", HERE, 0.0),
                    CompletionExample("a", "b", HERE, 0.0), ChatExample((Message("user", "q"),), HERE)):
        found = encode_example(example, letters, config())
        assert isinstance(found, RejectedRow), example
        assert found.reason == "nothing to train on"


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(codec="utf-8"), min_size=2, max_size=60).filter(lambda t: "<|" not in t), st.integers(2, 20))
def test_splitting_predicts_every_token_but_the_first_once(letters, text, most) -> None:
    (whole,) = encode_example(TextExample(text, HERE), letters, config(max_length=10**6))
    parts = encode_example(TextExample(text, HERE), letters, config(max_length=most, truncation="split"))
    predicted = [token for part in parts for token in part.spans[0].ids[1:]]
    assert tuple(predicted) == whole.spans[0].ids[1:]
    assert all(len(part.spans[0].ids) <= most for part in parts)
    assert sum(part.num_bytes for part in parts) == whole.num_bytes


def test_every_part_of_a_document_begins_as_the_tokenizer_opens_a_text(letters) -> None:
    letters.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", END_OF_TEXT)])
    text = bytes(range(65, 91)).decode()
    for most in (3, 4, 7, 26, 27, 28, 40):
        parts = encode_example(TextExample(text, HERE), letters, config(max_length=most, truncation="split"))
        assert all(len(part.spans[0].ids) <= most and part.spans[0].ids[0] == END_OF_TEXT for part in parts)
        predicted = [part.spans[0].ids[i] for part in parts for i in part.spans[0].predicted]
        assert predicted == [*text.encode(), IM_END]  # each once
        assert sum(part.num_bytes for part in parts) == len(text)


def test_a_slow_tokenizer_gives_the_same(letters) -> None:
    chat = ChatExample((Message("user", "q"), Message("assistant", "a🙂"), Message("user", "r"), Message("assistant", "b")), HERE)
    for example in (chat, TextExample("abc 🙂", HERE), CompletionExample("a", "b🙂", HERE)):
        for options in ({}, {"format": "completion"}, {"loss_on": "all"}):
            fast = encode_example(example, letters, config(**options))
            slow = encode_example(example, Slow(letters), config(**options))
            assert [part.spans for part in slow] == [part.spans for part in fast]


def test_the_prompt_of_a_text_is_its_first_half(letters) -> None:
    assert encode_prompt(TextExample("abcde", HERE), letters, config()) == ([*b"abc"], "de")
