"""What is trained of a chat is exactly what the assistant says, under every template and switch."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luthier.core.examples import ChatExample, CompletionExample, Message, Origin
from luthier.data.config import DataConfig
from luthier.data.encoding import encode_example
from luthier.data.rows import RejectedRow
from luthier.data.templates import FALLBACK_TEMPLATE
from luthier.data.tokenization import encode_prompt
from tiny import CHATML

HERE = Origin("f", 1)
CHAT = (Message("system", "s"), Message("user", "one"), Message("assistant", "the answer"), Message("user", "two"),
        Message("assistant", "good 🙂"))
THOUGHTS = (  # drops what was thought in earlier turns, and opens a thought in the generation prompt
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.last or m['role'] != 'assistant' %}{{ m['content'] }}{% else %}{{ m['content'].split('</think>')[-1] }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}")
TOOLS = "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if m.tool_calls %}CALL {{ m.tool_calls[0].function.name }}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def config(**options: object) -> DataConfig:
    return DataConfig.parse({"train": "f", **options})


@pytest.fixture(params=["letters", "words"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def test_the_assistants_turns_are_trained_to_their_end(tokenizer, trained) -> None:
    (found,) = encode_example(ChatExample(CHAT, HERE), tokenizer, config())
    assert trained(found, tokenizer) == ["the answer<|im_end|>", "good 🙂<|im_end|>"]
    assert tokenizer.decode(found.spans[0].ids) == tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in CHAT], tokenize=False).removesuffix("\n")
    assert found.num_bytes == len("the answergood 🙂".encode())


def test_last_trains_the_last_answer_only(tokenizer, trained) -> None:
    (found,) = encode_example(ChatExample(CHAT, HERE), tokenizer, config(loss_on="last"))
    assert trained(found, tokenizer) == ["good 🙂<|im_end|>"]


def test_all_trains_every_token(tokenizer) -> None:
    (found,) = encode_example(ChatExample(CHAT, HERE), tokenizer, config(loss_on="all"))
    assert set(found.spans[0].weights) == {1.0}


def test_a_turns_own_weight_goes_first(tokenizer, trained) -> None:
    chat = ChatExample((Message("user", "one", 0.5), Message("assistant", "two", 0.0), Message("user", "three"),
                        Message("assistant", "four", 2.0)), HERE, weight=0.5)
    (found,) = encode_example(chat, tokenizer, config())
    assert trained(found, tokenizer) == ["user\none<|im_end|>\n", "four<|im_end|>"]
    assert set(found.spans[0].weights) == {0.25, 0.0, 1.0}
    (found,) = encode_example(ChatExample(chat.messages[2:], HERE), tokenizer, config(loss_on="all"))
    assert sorted(set(found.spans[0].weights)) == [1.0, 2.0]
    quiet = ChatExample((Message("user", "one", 0.0), Message("assistant", "two")), HERE)
    (found,) = encode_example(quiet, tokenizer, config(loss_on="all"))
    assert trained(found, tokenizer) == ["<|im_start|>assistant\ntwo<|im_end|>\n"]


def test_without_a_template_the_plain_one_is_used(tokenizer, trained) -> None:
    tokenizer.chat_template = None
    (found,) = encode_example(ChatExample(CHAT, HERE), tokenizer, config())
    assert tokenizer.decode(found.spans[0].ids) == (
        "### System:\ns\n\n### User:\none\n\n### Assistant:\nthe answer<|im_end|>\n\n"
        "### User:\ntwo\n\n### Assistant:\ngood 🙂<|im_end|>")
    assert [words.rstrip("\n") for words in trained(found, tokenizer)] == ["the answer<|im_end|>", "good 🙂<|im_end|>"]
    assert "eos_token" in FALLBACK_TEMPLATE


def test_a_system_prompt_stands_before_chats_that_have_none(letters) -> None:
    (without,) = encode_example(ChatExample(CHAT[1:], HERE), letters, config(system="s"))
    (within,) = encode_example(ChatExample(CHAT, HERE), letters, config(system="other"))
    assert without.spans == within.spans


def test_a_template_that_rewrites_history_gives_each_turn_its_own_text(letters, trained) -> None:
    letters.chat_template = THOUGHTS
    chat = ChatExample((Message("user", "q"), Message("assistant", "<think>hm</think>a"), Message("user", "r"),
                        Message("assistant", "<think>so</think>b")), HERE)
    first, second = encode_example(chat, letters, config())
    assert trained(first, letters) == ["hm</think>a<|im_end|>"]
    assert trained(second, letters) == ["so</think>b<|im_end|>"]
    assert "assistant\na<|im_end|>" in letters.decode(second.spans[0].ids)
    (last,) = encode_example(chat, letters, config(loss_on="last"))
    assert last.spans == second.spans


def test_a_thought_that_the_generation_prompt_opens_is_closed_where_the_turn_has_none(letters, trained) -> None:
    letters.chat_template = THOUGHTS
    (found,) = encode_example(ChatExample((Message("user", "q"), Message("assistant", "plain")), HERE), letters, config())
    assert trained(found, letters) == ["\n</think>\n\nplain<|im_end|>"]


def test_an_opening_turn_of_the_assistant_is_trained_without_its_header(letters, trained) -> None:
    (found,) = encode_example(ChatExample((Message("assistant", "hello"), *CHAT[1:3]), HERE), letters, config())
    assert trained(found, letters) == ["hello<|im_end|>", "the answer<|im_end|>"]


def test_what_the_template_refuses_is_refused_with_its_words(letters) -> None:
    letters.chat_template = "{{ raise_exception('roles must alternate') }}"
    found = encode_example(ChatExample(CHAT, HERE), letters, config())
    assert isinstance(found, RejectedRow)
    assert str(found) == "f:1: the chat template raises an error (roles must alternate)"


def test_calls_and_tools_are_put_into_words_where_the_template_has_none(letters, trained) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}
    chat = ChatExample((Message("user", "q"), Message("assistant", "", None, {"tool_calls": [call]}), Message("tool", "rain"),
                        Message("assistant", "wet")), HERE, tools=({"type": "function", "function": {"name": "weather"}},))
    (found,) = encode_example(chat, letters, config())
    assert trained(found, letters) == [
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call><|im_end|>', "wet<|im_end|>"]
    assert '<tool_call> and </tool_call>.\n{"type": "function"' in letters.decode(found.spans[0].ids)
    letters.chat_template = TOOLS
    (found,) = encode_example(chat, letters, config())
    assert trained(found, letters) == ["CALL weather<|im_end|>", "wet<|im_end|>"]
    assert letters.decode(found.spans[0].ids).startswith('<tools>[{"type": "function"')


@pytest.mark.parametrize(("prompt", "completion"), [
    ("What is the capital of France?", "Paris."), ("one", "\n\ntwo"), ("one\n", " two"), ("你好", "🙂世"), (" ", "yes ")])
def test_the_prompt_is_trls_and_the_answer_ends_with_its_mark(tokenizer, trained, prompt, completion) -> None:
    """The prompt's ids are those of TRL and of whoever asks; the line break behind the mark is nobody's word."""
    asked = [{"role": "user", "content": prompt}]
    before = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
    text = tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": completion}], tokenize=False)
    (found,) = encode_example(CompletionExample(prompt, completion, HERE), tokenizer, config())
    ids, weights = list(found.spans[0].ids), list(found.spans[0].weights)
    assert (ids[:len(before)], set(weights[:len(before)])) == (before, {0.0})
    assert tokenizer.decode(ids) == text.removesuffix("\n")
    assert trained(found, tokenizer) == [f"{completion}<|im_end|>"]


def test_the_prompt_is_what_stands_before_the_first_trained_token(tokenizer) -> None:
    chat = ChatExample(CHAT, HERE)
    ids, answer = encode_prompt(chat, tokenizer, config(system="unused"))
    (found,) = encode_example(chat, tokenizer, config(loss_on="last"))
    assert (answer, tuple(ids)) == ("good 🙂", found.spans[0].ids[:len(ids)])
    assert not any(found.spans[0].weights[:len(ids)])
    assert tokenizer.decode([t for t, w in zip(found.spans[0].ids, found.spans[0].weights, strict=True) if w]) == "good 🙂<|im_end|>"


SAID = st.text(st.characters(codec="utf-8", exclude_characters="\r"), min_size=1, max_size=12).filter(lambda t: "<|" not in t and t.strip())


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(SAID, SAID), min_size=1, max_size=4), st.sampled_from([CHATML, None]))
def test_whatever_is_said_comes_back_from_the_trained_tokens(letters, trained, exchanges, template) -> None:
    letters.chat_template = template
    chat = ChatExample(tuple(m for q, a in exchanges for m in (Message("user", q), Message("assistant", a))), HERE)
    (found,) = encode_example(chat, letters, config(max_length=10**6))
    assert trained(found, letters) == [f"{answer}<|im_end|>" for _, answer in exchanges]
    assert found.num_bytes == sum(len(answer.encode()) for _, answer in exchanges)
