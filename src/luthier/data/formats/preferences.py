"""Converts rows with preferences: pairs, rankings, transcripts, choices, unpaired preferences.

Read `data/formats/text.py` first.

Answers are sorted with the best first. Ranks must have no ties and no gaps. Answers must differ and must not be empty.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import combinations, takewhile
from typing import Any

from luthier.core.examples import Example, Message, Origin, PreferenceExample, UnpairedPreferenceExample
from luthier.data.answer_choices import Choices, Numbering, find_numbering
from luthier.data.formats.text import SYSTEM, read_turn, read_turns
from luthier.data.row_values import (
    InvalidRowError,
    Values,
    parse_json,
    read_list,
    read_nonempty_string,
    read_number,
    read_row_weight,
    read_string,
    read_tools,
    read_verdict,
)

Words = tuple[Message, ...] | str
SPEAKERS = {"Human": "user", "Assistant": "assistant"}
TURN_MARK = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def convert_pair(values: Values, origin: Origin) -> Example:
    """A prompt with a preferred and a rejected answer; whole conversations are split after their common turns."""
    chosen, rejected = _read_answer(values["chosen"], "chosen"), _read_answer(values["rejected"], "rejected")
    if isinstance(chosen, tuple) and chosen[0].role != "assistant":
        return _split_common_prompt(chosen, rejected, values, origin)
    return _build_preference(_read_prompt(values, "prompt"), (chosen, rejected), (0, 1), values, origin)


def convert_implicit_prompt(values: Values, origin: Origin) -> Example:
    """Two whole conversations, as turns or as text with "Human:" and "Assistant:"; their common part is the prompt."""
    return _split_common_prompt(_read_transcript(values["chosen"], "chosen"),
                                _read_transcript(values["rejected"], "rejected"), values, origin)


def convert_sharegpt_pair(values: Values, origin: Origin) -> Example:
    answers = _read_answer(values["chosen"], "chosen"), _read_answer(values["rejected"], "rejected")
    return _build_preference(tuple(read_turns(values["conversations"], "conversations")), answers, (0, 1), values,
                             origin)


def convert_rejected_response(values: Values, origin: Origin) -> Example:
    """A chat whose last turn is the preferred answer, and a rejected answer."""
    prompt, answer = _split_last_turn(values)
    return _build_preference(prompt, (answer, _read_answer(values["rejected_response"], "rejected_response")), (0, 1),
                             values,
                             origin)


def convert_openai_pair(values: Values, origin: Origin) -> Example:
    asked = parse_json(values["input"], "input")
    if not isinstance(asked, dict) or "messages" not in asked:
        raise InvalidRowError("input has no messages")
    answers = tuple(_read_answer(values[column], column) for column in ("preferred_output", "non_preferred_output"))
    return _build_preference(tuple(read_turns(asked["messages"], "input.messages")), answers, (0, 1), values, origin)


def convert_ranking(values: Values, origin: Origin) -> Example:
    """Answers with the best first, or each with its `rank`, where 0 or 1 is the best."""
    answers = read_list(values, "answers")
    ranked = [isinstance(answer, dict) and answer.get("rank") is not None for answer in answers]
    if any(ranked) and not all(ranked):
        raise InvalidRowError("an answer has no rank", f"answer {ranked.index(False) + 1} of {len(answers)}")
    ranks = [read_number(answer["rank"], "rank") for answer in answers] if all(ranked) else list(range(len(answers)))
    _check_ranks(sorted(ranks))
    said = tuple(_read_answer(answer.get("text", answer) if isinstance(answer, dict) else answer, "answer")
                 for answer in answers)
    return _build_preference(_read_prompt(values, "prompt"), said, [int(rank - min(ranks)) for rank in ranks], values,
                             origin)


def convert_choices(values: Values, origin: Origin, numbering: Callable[[], Numbering] | None = None) -> Example:
    """A question with its choices. The correct choice (see `answer_choices.py`) has rank 0, all others 1. Choices may
    be an object with `text` and `label`.

    Args:
        numbering: whether indices in the source start at 0 or at 1; None: read from this row alone.
    """
    asked = Choices.of(values)
    place = asked.place(numbering or (lambda: find_numbering([values])))
    return _build_preference(_read_prompt(values, "prompt"),
                             tuple(_read_answer(choice, "choice") for choice in asked.choices),
                             [int(each != place) for each in range(len(asked.choices))], values, origin)


def convert_unpaired(values: Values, origin: Origin) -> Example:
    good = read_verdict(values["label"])
    prompt, answer = _unify_types(_read_prompt(values, "prompt"), (_read_answer(values["completion"], "completion"),))
    return UnpairedPreferenceExample(prompt, answer[0], good, origin, read_row_weight(values), read_tools(values))


def convert_unpaired_chat(values: Values, origin: Origin) -> Example:
    prompt, answer = _split_last_turn(values)
    return UnpairedPreferenceExample(prompt, answer, read_verdict(values["label"]), origin, read_row_weight(values),
                                     read_tools(values))


# ---------------------------------------------------------------- parts


def _read_prompt(values: Values, column: str) -> Words:
    found: Words = (tuple(read_turns(values[column], column)) if isinstance(values[column], list)
                    else read_nonempty_string(values, column))
    return _add_system(found, values)


def _add_system(prompt: Words, values: Values) -> Words:
    system = read_string(values, "system", "")
    if not system.strip():
        return prompt
    said = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    return said if said and said[0].role in SYSTEM else (Message("system", system), *said)


def _read_answer(raw: Any, column: str) -> Words:
    """One answer: a string, a turn, or turns."""
    if isinstance(raw, str):
        if not raw.strip():
            raise InvalidRowError(f"empty {column}")
        return raw
    if isinstance(raw, dict):
        if "role" in raw or "from" in raw:
            return (read_turn(raw),)
        return read_nonempty_string({column: raw.get("content", raw.get("value"))}, column)
    return tuple(read_turns(raw, column))


def _split_last_turn(values: Values) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """Splits a chat into the prompt and its last turn."""
    said = read_turns(values["messages"], "messages")
    if said[-1].role != "assistant":
        raise InvalidRowError("the last turn is not an assistant turn")
    if len(said) < 2:
        raise InvalidRowError("there is no prompt before the answer")
    prompt = _add_system(tuple(said[:-1]), values)
    assert isinstance(prompt, tuple)
    return prompt, (said[-1],)


def _read_transcript(raw: Any, column: str) -> tuple[Message, ...]:
    if not isinstance(raw, str):
        return tuple(read_turns(raw, column))
    opening, *rest = TURN_MARK.split(raw)
    if opening.strip() or not rest:
        raise InvalidRowError(f"{column} is not a transcript",
                              'without a `prompt`, it must contain turns of "Human:" and "Assistant:", separated by '
                              'blank lines')
    said = []
    for speaker, spoken in zip(rest[::2], rest[1::2], strict=True):
        if not spoken.strip():
            raise InvalidRowError("a turn of the transcript is empty", f"{speaker}'s in {column}")
        said.append(Message(SPEAKERS[speaker], spoken.strip()))
    return tuple(said)


def _split_common_prompt(chosen: Words, rejected: Words, values: Values, origin: Origin) -> PreferenceExample:
    """Splits two conversations into their common turns and the rest of each, at least its last turn."""
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise InvalidRowError("one answer is a list of turns, the other a string")
    if chosen == rejected:
        raise InvalidRowError("chosen and rejected are the same")
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen[:-1], rejected[:-1], strict=False)))
    prompt = _add_system(chosen[:shared], values)
    return _build_preference(prompt, (chosen[shared:], rejected[shared:]), (0, 1), values, origin)


def _build_preference(prompt: Words, answers: tuple[Words, ...], ranks: Sequence[int], values: Values,
                      origin: Origin) -> PreferenceExample:
    prompt, said = _unify_types(prompt, answers)
    if len(said) < 2:
        raise InvalidRowError("a single answer cannot be compared")
    for answer in said:
        if not isinstance(answer, str) and answer[-1].role != "assistant":
            raise InvalidRowError("an answer does not end with an assistant turn")
    order = sorted(range(len(said)), key=lambda i: ranks[i])
    for a, b in combinations(range(len(said)), 2):
        if _get_plain_text(said[a]) == _get_plain_text(said[b]):
            raise InvalidRowError("chosen and rejected are the same" if len(said) == 2 else "two answers are the same")
    margin = None if values.get("margin") is None else read_number(values["margin"], "margin")
    return PreferenceExample(prompt, tuple(said[i] for i in order), tuple(ranks[i] for i in order), origin, margin,
                             read_row_weight(values), read_tools(values))


def _check_ranks(ranks: Sequence[float]) -> None:
    """Sorted ranks must be 0, 1, 2, ... or 1, 2, 3, ..."""
    for place, rank in enumerate(ranks):
        if place and rank == ranks[place - 1]:
            raise InvalidRowError("ranks are tied", f"two answers have rank {rank:g}")
        if rank - ranks[0] != place or ranks[0] not in (0, 1):
            raise InvalidRowError("ranks have a gap", f"they are {', '.join(f'{r:g}' for r in ranks)}; 0 or 1 is best")


def _get_plain_text(answer: Words) -> Any:
    if isinstance(answer, str):
        return answer.strip()
    return [(said.role, said.content.strip(), said.extra) for said in answer]


def _unify_types(prompt: Words, answers: tuple[Words, ...]) -> tuple[Words, tuple[Words, ...]]:
    """All answers as strings, or all as turns if any of them is a list of turns."""
    if all(isinstance(part, str) for part in (prompt, *answers)):
        return prompt, answers
    asked = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    return asked, tuple((Message("assistant", answer),) if isinstance(answer, str) else answer for answer in answers)
