"""Rules for messages that the round trip over templates does not reach: what is refused, counted and read."""

from __future__ import annotations

import pytest

from chat_templates import tokenizer_with
from luthier.core.examples import ChatExample, Message, Origin
from luthier.data.config import DataConfig
from luthier.data.control_tokens import END, START, is_mark_broken
from luthier.data.encoding import encode_example
from luthier.data.formats.text import read_turn
from luthier.data.row_values import InvalidRowError
from luthier.data.rows import RejectedRow
from tiny import CHATML, tiny_tokenizer

HERE = Origin("rows.jsonl", 1)
CONFIG = DataConfig.parse({"train": "-"})


@pytest.mark.parametrize("dropped", ["user", "system"])
def test_a_turn_that_the_template_drops_is_refused(dropped: str) -> None:
    """A template that writes no turn of one role: silence would train answers to nothing."""
    tokenizer = tiny_tokenizer()
    chat = ChatExample((Message("system", "be kind"), Message("user", "hi"), Message("assistant", "yo")), HERE)
    assert not isinstance(encode_example(chat, tokenizer, CONFIG), RejectedRow)
    tokenizer.chat_template = CHATML.replace("<|im_start|>{{ message['role'] }}", f"{{% if message['role'] != '{dropped}' or loop.index0 > 1 %}}"
                                             "<|im_start|>{{ message['role'] }}", 1).replace("<|im_end|>\n{% endfor %}", "<|im_end|>\n{% endif %}{% endfor %}")
    chat = ChatExample((Message("user", "hi"), Message("assistant", "yo")), HERE) if dropped == "user" else chat
    found = encode_example(chat, tokenizer, CONFIG)
    if dropped == "system":  # the rule for templates without a system role
        assert not isinstance(found, RejectedRow)
        assert "user\nbe kind\n\nhi" in tokenizer.decode(found[0].spans[0].ids)
        return
    assert isinstance(found, RejectedRow)
    assert (found.reason, found.detail) == ("a turn that the chat template does not render", "it drops the words of turn 1 (user)")


@pytest.mark.parametrize(("raw", "reason"), [
    ({"role": "assistant", "content": ""}, "an assistant's turn is empty"),
    ({"role": "assistant", "content": "a", "reasoning": "x", "thinking": "y"}, "a turn has two different thoughts"),
    ({"role": "assistant", "content": "a", "reasoning_content": ["x"]}, "a turn's thoughts are not text"),
    ({"role": "assistant", "function_call": {"arguments": "{}"}}, "a function call has no name"),
    ({"role": "narrator", "content": "a"}, "a turn has an unknown role"),
    ({"content": "a"}, "a turn has no role"),
    ({"role": "user", "content": [{"type": "image_url"}]}, "a turn holds something other than text"),
])
def test_a_turn_that_cannot_be_read_says_why(raw: dict[str, object], reason: str) -> None:
    with pytest.raises(InvalidRowError) as error:
        read_turn(raw)
    assert error.value.reason == reason


@pytest.mark.parametrize(("raw", "role", "content", "extra"), [
    ({"role": "function", "name": "f", "content": "1"}, "tool", "1", {"name": "f"}),
    ({"role": "assistant", "content": None, "reasoning": "t", "tool_calls": [], "refusal": None, "audio": ""}, "assistant", "",
     {"reasoning_content": "t"}),
    ({"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": "{\"a\": 1}"}}, "assistant", "",
     {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]}),
    ({"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "developer", "ab", {}),
])
def test_a_turn_is_read_under_one_name_for_each_thing(raw: dict[str, object], role: str, content: str, extra: dict[str, object]) -> None:
    found = read_turn(raw)
    assert (found.role, found.content, dict(found.extra)) == (role, content, extra)


def test_each_rule_that_was_used_is_a_remark() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}
    chat = ChatExample((Message("system", "s"), Message("user", "<|im_end|>"), Message("assistant", "", None, {"tool_calls": [call]}),
                        Message("tool", "r", None, {"tool_call_id": "1"}), Message("assistant", "a", None, {"reasoning_content": "t"})),
                       HERE, tools=({"type": "function", "function": {"name": "f"}},))
    (found,) = encode_example(chat, tokenizer_with("chatml"), CONFIG)  # type: ignore[misc]
    for words in ("tools are listed in the system turn", "plain text", "<tool_call>", "tool_call_id", "<think>"):
        assert any(words in remark for remark in found.remarks), words
    (plain,) = encode_example(ChatExample((Message("user", "q"), Message("assistant", "a")), HERE), tokenizer_with("chatml"), CONFIG)  # type: ignore[misc]
    assert plain.remarks == ()


def test_a_system_turn_at_the_very_end_is_not_lost() -> None:
    chat = ChatExample((Message("user", "q"), Message("assistant", "a"), Message("system", "be kind")), HERE)
    (found,) = encode_example(chat, tokenizer_with("gemma"), CONFIG)  # type: ignore[misc]
    assert "<start_of_turn>user\nbe kind<end_of_turn>" in tokenizer_with("gemma").decode(found.spans[0].ids)


def test_a_mark_that_a_template_tore_is_noticed_beside_a_whole_one() -> None:
    whole = f"{START}<|im_end|>{END}"
    assert not is_mark_broken(f"a {whole} b {whole}")
    assert not is_mark_broken("plain")
    for torn in (START, END):
        assert is_mark_broken(f"a {torn} b")
        assert is_mark_broken(f"{whole} and {torn}")
