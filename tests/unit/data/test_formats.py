"""Every format becomes the right example; every wrong value is refused with its reason and line."""

from __future__ import annotations

import pytest

from luthier.core.errors import DataError
from luthier.core.examples import ChatExample, CompletionExample, Message, Origin, TextExample
from luthier.data.formats.registry import FORMATS, RowReader, read_examples
from luthier.data.rows import RejectedRow, Row

HERE = Origin("f", 1)
ASK, ANSWER = Message("user", "q"), Message("assistant", "a")
WEATHER = {"name": "weather", "parameters": {}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}


def become(*rows: dict, **options: object) -> list:
    return list(read_examples([Row(row, Origin("f", line)) for line, row in enumerate(rows, 1)], **options))


def chat(*messages: Message, **options: object) -> ChatExample:
    return ChatExample(messages, HERE, **options)


CASES = {
    "messages": ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "id": 7}, chat(ASK, ANSWER)),
    "messages as JSON": ({"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'}, chat(ASK, ANSWER)),
    "turn weights": ({"messages": [{"role": "user", "content": "q", "weight": 0.5}, {"role": "assistant", "content": "a", "train": False}]},
                     chat(Message("user", "q", 0.5), Message("assistant", "a", 0.0))),
    "row weight": ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "weight": "0.25"},
                   chat(ASK, ANSWER, weight=0.25)),
    "text parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, {"role": "assistant", "content": "a", "name": None}]},
                   chat(ASK, ANSWER)),
    "openai calls": ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}]}], "tools": [WEATHER]},
        chat(ASK, Message("assistant", "", None, {"tool_calls": [{"id": "1", **CALL}]}), tools=({"type": "function", "function": WEATHER},))),
    "sharegpt": ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
                 chat(Message("system", "s"), ASK, ANSWER)),
    "sharegpt calls": ({"conversations": [{"from": "human", "value": "q"},
                                          {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Ulm"}}'},
                                          {"from": "observation", "value": "rain"}, {"from": "gpt", "value": "a"}], "tools": '[{"name": "weather", "parameters": {}}]'},
                       chat(ASK, Message("assistant", "", None, {"tool_calls": [CALL]}), Message("tool", "rain"), ANSWER,
                            tools=({"type": "function", "function": WEATHER},))),
    "alpaca": ({"instruction": "q", "input": "", "output": "a"}, chat(ASK, ANSWER)),
    "alpaca in full": ({"instruction": "q", "input": "i", "output": "a", "system": "s", "history": [["q", "a"]]},
                       chat(Message("system", "s"), ASK, ANSWER, Message("user", "q\ni"), ANSWER)),
    "completion": ({"prompt": "q", "completion": "a"}, CompletionExample("q", "a", HERE)),
    "completion of turns": ({"prompt": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "q"}],
                             "completion": [{"role": "assistant", "content": "a"}]},
                            chat(Message("user", "q", 0.0), Message("assistant", "a", 0.0), Message("user", "q", 0.0), ANSWER)),
    "completion with a system prompt": ({"prompt": "q", "completion": "a", "system": "s", "weight": 2},
                                        chat(Message("system", "s"), Message("user", "q", 0.0), ANSWER, weight=2.0)),
    "completion with tools": ({"prompt": "q", "completion": "a", "system": " ", "tools": [WEATHER]},
                              chat(Message("user", "q", 0.0), ANSWER, tools=({"type": "function", "function": WEATHER},))),
    "prompt of turns": ({"prompt": [{"role": "user", "content": "q"}], "completion": "a"}, chat(Message("user", "q", 0.0), ANSWER)),
    "text": ({"text": " words ", "id": 1}, TextExample(" words ", HERE)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_row_becomes_its_example(name) -> None:
    row, expected = CASES[name]
    assert become(row) == [expected]


def test_columns_rename() -> None:
    gsm = {"question": "q", "answer": "a"}
    assert become(gsm, columns={"prompt": "question", "completion": "answer"}) == [CompletionExample("q", "a", HERE)]
    swapped = {"prompt": "a", "completion": "q"}
    assert become(swapped, columns={"prompt": "completion", "completion": "prompt"}) == [CompletionExample("q", "a", HERE)]


def test_a_column_that_is_renamed_is_not_found_under_its_own_name_too() -> None:
    assert become({"messages": "plain words"}, columns={"text": "messages"}) == [TextExample("plain words", HERE)]


def test_a_given_format_goes_before_recognition() -> None:
    both = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "text": "t"}
    assert become(both, format="text") == [TextExample("t", HERE)]
    assert isinstance(become(both)[0], ChatExample)


REFUSED = {
    "turns are no list": ({"messages": 5}, "messages is not a list of turns"),
    "turns are no JSON": ({"messages": "hello"}, "messages is not JSON"),
    "no turns": ({"messages": []}, "messages is empty"),
    "a turn is text": ({"messages": ["hello"]}, "a turn is not an object"),
    "no role": ({"messages": [{"content": "q"}]}, "a turn has no role"),
    "strange role": ({"messages": [{"role": "asistant", "content": "q"}]}, "a turn has an unknown role"),
    "numeric content": ({"messages": [{"role": "user", "content": 3}]}, "the content of a turn is not a string"),
    "a picture": ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}, "a turn has a part that is not text"),
    "silent assistant": ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}]}, "an assistant turn is empty"),
    "nobody answers": ({"messages": [{"role": "user", "content": "q"}]}, "no assistant turn"),
    "weight in words": ({"messages": [{"role": "user", "content": "q", "weight": "heavy"}]}, "weight is not a number"),
    "negative weight": ({"text": "t", "weight": -1}, "weight is not a finite number from 0 up"),
    "endless weight": ({"text": "t", "weight": float("nan")}, "weight is not a finite number from 0 up"),
    "train in words": ({"messages": [{"role": "user", "content": "q", "train": "yes"}]}, "train is not true or false"),
    "tools": ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "tools": "{}"}, "tools is not a list of objects"),
    "call": ({"conversations": [{"from": "function_call", "value": "weather()"}]}, "function_call is not JSON"),
    "nameless call": ({"conversations": [{"from": "function_call", "value": "{}"}]}, "a function call has no name"),
    "empty output": ({"instruction": "q", "output": ""}, "empty output"),
    "empty instruction": ({"instruction": "", "output": "a"}, "empty instruction"),
    "numeric output": ({"instruction": "q", "output": 4}, "output is not text"),
    "history": ({"instruction": "q", "output": "a", "history": [["q"]]}, "history is not a list of [question, answer]"),
    "history in numbers": ({"instruction": "q", "output": "a", "history": 3}, "history is not a list of [question, answer]"),
    "numeric completion": ({"prompt": "q", "completion": 5}, "completion is not text"),
    "blank text": ({"text": "  \n"}, "empty text"),
    "text in a list": ({"text": ["t"]}, "text is not text"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_value_is_refused_with_its_reason(name) -> None:
    row, reason = REFUSED[name]
    (found,) = become(row)
    assert isinstance(found, RejectedRow)
    assert (found.reason, str(found.origin)) == (reason, "f:1")


def test_a_second_format_in_a_file_is_refused_by_the_row() -> None:
    first, second, third = become({"text": "t"}, {"prompt": "q", "completion": "a"}, {"text": None})
    assert isinstance(first, TextExample)
    assert str(second) == "f:2: no text (the format of the file is text, which needs text)"
    assert third.reason == "no text"


def test_a_stranger_before_the_first_known_row_is_refused() -> None:
    stranger, known = become({"x": 1}, {"text": "t"})
    assert (stranger.reason, known) == ("columns of no known format", TextExample("t", Origin("f", 2)))


def test_columns_of_no_format_are_named_with_the_remedy() -> None:
    with pytest.raises(DataError) as caught:
        become({"question": "q", "answer": "a"})
    for word in ("'question', 'answer'", "columns: {prompt: question", *FORMATS):
        assert word in str(caught.value)


def test_a_misspelt_column_names_its_neighbour() -> None:
    with pytest.raises(DataError, match="did you mean 'question'"):
        become({"question": "q", "answer": "a"}, columns={"prompt": "qestion", "completion": "answer"})


def test_a_file_of_strangers_is_given_up_early() -> None:
    met = []

    def rows():
        for line in range(10**6):
            met.append(line)
            yield Row({"x": "y"}, Origin("f", line))

    with pytest.raises(DataError, match="match no known format"):
        list(read_examples(rows()))
    assert len(met) <= 100


def test_preference_pairs_are_not_imitated() -> None:
    reader = RowReader(frozenset({"ChatExample", "TextExample"}), {"dpo": ["PreferenceExample"], "sft": ["ChatExample"]})
    with pytest.raises(DataError, match=r"'sharegpt_pair' \(PreferenceExample\).*\n.*an objective that reads them: dpo;"):
        become({"conversations": [{"from": "human", "value": "q"}], "chosen": "a", "rejected": "b"}, reader=reader)
