"""An answer that stands among the choices is that choice; a number counts only where the source shows from where."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from luthier.core.errors import DataError
from luthier.core.examples import Origin, PreferenceExample
from luthier.data.answer_choices import Choices, Numbering, find_numbering
from luthier.data.config import DataConfig, Source
from luthier.data.formats.registry import ANY, read_examples
from luthier.data.load import iterate_examples, read_datasets
from luthier.data.row_values import InvalidRowError
from luthier.data.rows import RejectedRow, Row
from luthier.data.streaming import StreamingBatchSource

Write = Callable[[str, str | bytes], str]
ABCD = ["ant", "bee", "cat", "dog"]
UNKNOWN = "answer is an index, and no row shows whether indices start at 0 or at 1"

# choices, answer, the right one by its own words; or the reason of the refusal
ALONE: dict[str, tuple[Any, Any, str]] = {
    "own words": (ABCD, "cat", "cat"),
    "own words with space": (ABCD, " cat ", "cat"),
    "a number among numbers": ([2, 3, 4], 2, "2"),
    "a text among numbers": ([2, 3, 4], "2", "2"),
    "a number among texts": (["1", "2", "3"], 2, "2"),
    "a text among texts": (["1", "2", "3"], "2", "2"),
    "a float among whole numbers": ([1, 2, 3], 2.0, "2"),
    "a decimal": ([0.5, 2.5], "2.50", "2.5"),
    "all digits": ([1234567, 1234568], 1234568, "1234568"),
    "true": ([True, False], False, "false"),
    "true among words": (["true", "false"], True, "true"),
    "true among numbers": ([0, 1], True, "1"),
    "JSON in a cell": (json.dumps(["1", "2", "3"]), "2", "2"),
    "a letter": (ABCD, "C", "cat"),
    "a small letter": (ABCD, "c", "cat"),
    "a letter among letters": (["B", "A"], "A", "A"),
    "a label": ({"text": ABCD, "label": ["A", "B", "C", "D"]}, "C", "cat"),
    "a label that is a number": ({"text": ABCD, "label": ["1", "2", "3", "4"]}, 3, "cat"),
    "a label before words": ({"text": ["2", "3", "1"], "label": ["1", "2", "3"]}, "1", "2"),
    "words beside labels": ({"text": ABCD, "label": ["A", "B", "C", "D"]}, "cat", "cat"),
    "0": (ABCD, 0, "ant"),
    "0 in a table of floats": (ABCD, "0.0", "ant"),
    "the number of choices": (ABCD, 4, "dog"),
    "no number shows it": (["a", "b", "c", "d"], "1", UNKNOWN),
    "no number shows it, either": (ABCD, 3, UNKNOWN),
    "too large": (ABCD, 5, UNKNOWN),
    "true is no number": (ABCD, True, "answer matches no choice"),
    "below 0": (ABCD, -1, "answer matches no choice"),
    "a decimal that is none": (ABCD, 1.5, "answer matches no choice"),
    "other words": (ABCD, "cow", "answer matches no choice"),
    "a letter too far": (ABCD, "E", "answer matches no choice"),
    "empty": (ABCD, "", "answer matches no choice"),
    "a list": (ABCD, ["cat"], "answer matches no choice"),
    "a number beside labels": ({"text": ABCD, "label": ["A", "B", "C", "D"]}, 0, "answer matches no choice"),
    "a letter beside labels": ({"text": ABCD, "label": ["1", "2", "3", "4"]}, "A", "answer matches no choice"),
    "several of the choices": (["1", "1.0", "2"], 1.0, "answer matches several choices"),
    "one of the same, exactly": (["1", "1.0", "2"], "1.0", "1.0"),
    "a letter in the other case": (["b", "a"], "A", "answer is a letter that is also a choice in other case"),
    "too few labels": ({"text": ABCD, "label": ["A"]}, "A", "choices and their labels differ in number"),
}


def right(found: Any) -> str:
    """The words of the right choice, or the reason of the refusal."""
    if isinstance(found, RejectedRow):
        return found.reason
    assert isinstance(found, PreferenceExample)
    return str(found.answers[found.ranks.index(0)])


@pytest.mark.parametrize("name", ALONE)
def test_the_answer_of_one_row(name: str) -> None:
    choices, answer, wanted = ALONE[name]
    (found,) = read_examples([Row({"question": "q", "choices": choices, "answer": answer}, Origin("f", 7))])
    assert right(found) == wanted
    if isinstance(found, RejectedRow):
        assert str(found).startswith("f:7: ")


# the rows' answers to ABCD (or to 1, 2, 3 where written so), and what becomes of them
SOURCES: dict[str, tuple[list[Any], list[str]]] = {
    "from 0": ([1, 2, 0, 3], ["bee", "cat", "ant", "dog"]),
    "from 1": ([1, 2, 4, 3], ["ant", "bee", "dog", "cat"]),
    "from 1, as a table has them": (["1.0", "4.0"], ["ant", "dog"]),
    "both": ([0, 1, 4], ["answers are indices that start at 0 in one row and at 1 in another"] * 3),
    "neither": ([1, 2, 3], [UNKNOWN] * 3),
    "too large": ([0, 1, 9], ["ant", "bee", "answer matches no choice"]),
    "words beside them": (["cat", 1, 2], ["cat", UNKNOWN, UNKNOWN]),
    "letters show nothing": (["A", "D", 2], ["ant", "dog", UNKNOWN]),
    "what the rows show is of numbers alone": ([[2, "2"], [3, "3"], 2], ["2", "3", UNKNOWN]),
    "words that are numbers, too": ([0, [2, None]], ["ant", "answer is the index of one choice and the text of another"]),
    "words and number say the same": ([4, [2, None]], ["dog", "2"]),
}
NUMBERS = ["1", "2", "3"]


def source(answers: list[Any]) -> str:
    """Rows; an answer in a list is one to `NUMBERS`."""
    return "".join(json.dumps({"question": f"q{i}", "choices": NUMBERS if isinstance(one, list) else ABCD,
                               "answer": one[0] if isinstance(one, list) else one}) + "\n" for i, one in enumerate(answers))


@pytest.mark.parametrize("name", SOURCES)
def test_the_rows_of_a_source_show_from_where_numbers_count(name: str, write: Write) -> None:
    answers, wanted = SOURCES[name]
    path = write("a.jsonl", source(answers))
    found = [right(one) for one in iterate_examples(Source(path=path), DataConfig.parse({"train": path}), ANY)]
    assert found == wanted


def test_all_files_of_a_source_and_rows_beyond_the_limit_show_it(write: Write, tmp_path_factory: pytest.TempPathFactory, letters: PreTrainedTokenizerFast) -> None:
    write("set/a.jsonl", source([1, 2]))
    folder = write("set/b.jsonl", source([3, 4])).rsplit("/", 1)[0]
    made = DataConfig.parse({"train": folder, "max_samples": 1})
    assert [right(one) for one in iterate_examples(made.train[0], made, ANY)] == ["ant"]
    made = DataConfig.parse({"train": folder, "shuffle": False})
    ((first, *_),) = [[right(one) for one in iterate_examples(made.train[0], made, ANY)]]
    assert first == "ant"
    streamed = StreamingBatchSource(made, letters, 4, None)
    next(streamed)
    assert (streamed.tally.kept, streamed.tally.read) == (4, 4)


@pytest.mark.parametrize(("first", "wanted"), [(0, ["bee", "cat"]), (1, ["ant", "bee"])])
def test_whoever_knows_says_from_where(first: int, wanted: list[str], write: Write, letters: PreTrainedTokenizerFast) -> None:
    path = write("a.jsonl", source([1, 2]))
    made = DataConfig.parse({"train": {"path": path, "first_choice": first}})
    assert [right(one) for one in iterate_examples(made.train[0], made, ANY)] == wanted
    with pytest.raises(DataError, match=r"a.jsonl:1: answer is an index.*set first_choice of the source to 0 or 1"):
        read_datasets(DataConfig.parse({"train": path}), letters, seed=0)


def test_a_number_that_somebody_says_counts_is_no_word(write: Write) -> None:
    path = write("a.jsonl", source([[1, None]]))
    made = DataConfig.parse({"train": {"path": path, "first_choice": 0}})
    assert [right(one) for one in iterate_examples(made.train[0], made, ANY)] == ["2"]


# ---------------------------------------------------------------- the law


WORDS = st.lists(st.one_of(st.integers(0, 5), st.integers(0, 5).map(str), st.integers(0, 5).map(float), st.sampled_from("abcABC"), st.sampled_from(["x", "yes", True, False])),
                 min_size=2, max_size=5)


def breaches(choices: list[Any], place: int, find: Callable[[Choices], int]) -> bool:
    """Whether an answer that is spelled as a choice is taken for one of another value."""
    asked = Choices.of({"choices": choices, "answer": choices[place]})
    try:
        found = find(asked)
    except InvalidRowError:
        return False
    return Choices._key(asked.choices[found]) != Choices._key(asked.choices[place])


def unnumbered() -> Numbering:
    return find_numbering([])


@given(WORDS, st.data())
@settings(max_examples=400, deadline=None)
def test_an_answer_among_the_choices_is_no_other_choice(choices: list[Any], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(choices) - 1))
    assert not breaches(choices, place, lambda asked: asked.place(unnumbered))
    told = data.draw(st.sampled_from([0, 1]))
    assert not breaches(choices, place, lambda asked: asked.place(lambda: Numbering(told)))


def by_position(asked: Choices) -> int:
    number = asked.number()
    return asked.place(unnumbered) if number is None or number >= len(asked.choices) else number


def test_the_law_notices_a_reader_that_takes_values_for_positions() -> None:
    assert breaches(["1", "2", "3"], 1, by_position)
    assert not breaches(["1", "2", "3"], 1, lambda asked: asked.place(unnumbered))
