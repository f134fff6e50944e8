"""Answers that someone compared or judged, out of rows: pairs, rankings, transcripts, choices, verdicts.

Read `data/formats/text.py` first.

Answers are put best first. Ranks must run without ties or gaps, and answers must differ and say something.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import combinations, takewhile
from typing import Any

from luthier.core.examples import ComparedExample, Example, Message, Origin, UnpairedPreferenceExample
from luthier.data.answer_choices import Choices, Numbering, find_numbering
from luthier.data.formats.text import SYSTEM, turn, turns
from luthier.data.row_values import UnfitError, Values, listed, number, parsed, row_weight, text, tools, verdict, words

Words = tuple[Message, ...] | str
SPEAKERS = {"Human": "user", "Assistant": "assistant"}
SPOKEN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def from_pair(values: Values, origin: Origin) -> Example:
    """A prompt with a better and a worse answer; whole conversations in place of answers are cut where they part."""
    chosen, rejected = _answer(values["chosen"], "chosen"), _answer(values["rejected"], "rejected")
    if isinstance(chosen, tuple) and chosen[0].role != "assistant":
        return _parted(chosen, rejected, values, origin)
    return _compared(_prompt(values, "prompt"), (chosen, rejected), (0, 1), values, origin)


def from_transcripts(values: Values, origin: Origin) -> Example:
    """Two whole conversations, as turns or as text with "Human:" and "Assistant:"; what they share is the prompt."""
    return _parted(_transcript(values["chosen"], "chosen"), _transcript(values["rejected"], "rejected"), values, origin)


def from_sharegpt_pair(values: Values, origin: Origin) -> Example:
    answers = _answer(values["chosen"], "chosen"), _answer(values["rejected"], "rejected")
    return _compared(tuple(turns(values["conversations"], "conversations")), answers, (0, 1), values, origin)


def from_rejected_response(values: Values, origin: Origin) -> Example:
    """A chat whose last turn is the better answer, and the worse one beside it."""
    prompt, answer = _last(values)
    return _compared(prompt, (answer, _answer(values["rejected_response"], "rejected_response")), (0, 1), values,
                     origin)


def from_openai_pair(values: Values, origin: Origin) -> Example:
    asked = parsed(values["input"], "input")
    if not isinstance(asked, dict) or "messages" not in asked:
        raise UnfitError("input holds no messages")
    answers = tuple(_answer(values[column], column) for column in ("preferred_output", "non_preferred_output"))
    return _compared(tuple(turns(asked["messages"], "input.messages")), answers, (0, 1), values, origin)


def from_ranking(values: Values, origin: Origin) -> Example:
    """Answers in order, best first, or each with its `rank`, where 0 or 1 is best."""
    answers = listed(values, "answers")
    ranked = [isinstance(answer, dict) and answer.get("rank") is not None for answer in answers]
    if any(ranked) and not all(ranked):
        raise UnfitError("an answer has no rank", f"answer {ranked.index(False) + 1} of {len(answers)}")
    ranks = [number(answer["rank"], "rank") for answer in answers] if all(ranked) else list(range(len(answers)))
    _demand_order(sorted(ranks))
    said = tuple(_answer(answer.get("text", answer) if isinstance(answer, dict) else answer, "answer")
                 for answer in answers)
    return _compared(_prompt(values, "prompt"), said, [int(rank - min(ranks)) for rank in ranks], values, origin)


def from_choices(values: Values, origin: Origin, numbering: Callable[[], Numbering] | None = None) -> Example:
    """A question, its choices, and which is right (see `answer_choices.py`), which has rank 0, all others 1. Choices
    may lie in an object, `text` with a `label` each.

    Args:
        numbering: how the answers of the source number the choices; None: as this row alone shows it.
    """
    asked = Choices.of(values)
    place = asked.place(numbering or (lambda: find_numbering([values])))
    return _compared(_prompt(values, "prompt"), tuple(_answer(choice, "choice") for choice in asked.choices),
                     [int(each != place) for each in range(len(asked.choices))], values, origin)


def from_judged(values: Values, origin: Origin) -> Example:
    good = verdict(values["label"])
    prompt, answer = _alike(_prompt(values, "prompt"), (_answer(values["completion"], "completion"),))
    return UnpairedPreferenceExample(prompt, answer[0], good, origin, row_weight(values), tools(values))


def from_judged_chat(values: Values, origin: Origin) -> Example:
    prompt, answer = _last(values)
    return UnpairedPreferenceExample(prompt, answer, verdict(values["label"]), origin, row_weight(values),
                                     tools(values))


# ---------------------------------------------------------------- parts


def _prompt(values: Values, column: str) -> Words:
    found: Words = (tuple(turns(values[column], column)) if isinstance(values[column], list)
                    else words(values, column))
    return _with_system(found, values)


def _with_system(prompt: Words, values: Values) -> Words:
    system = text(values, "system", "")
    if not system.strip():
        return prompt
    said = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    return said if said and said[0].role in SYSTEM else (Message("system", system), *said)


def _answer(raw: Any, column: str) -> Words:
    """One answer: a string, a turn, or turns."""
    if isinstance(raw, str):
        if not raw.strip():
            raise UnfitError(f"empty {column}")
        return raw
    if isinstance(raw, dict):
        if "role" in raw or "from" in raw:
            return (turn(raw),)
        return words({column: raw.get("content", raw.get("value"))}, column)
    return tuple(turns(raw, column))


def _last(values: Values) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """A chat as what was asked, and its last turn."""
    said = turns(values["messages"], "messages")
    if said[-1].role != "assistant":
        raise UnfitError("the last turn is not the assistant's")
    if len(said) < 2:
        raise UnfitError("nothing was asked")
    prompt = _with_system(tuple(said[:-1]), values)
    assert isinstance(prompt, tuple)
    return prompt, (said[-1],)


def _transcript(raw: Any, column: str) -> tuple[Message, ...]:
    if not isinstance(raw, str):
        return tuple(turns(raw, column))
    opening, *rest = SPOKEN.split(raw)
    if opening.strip() or not rest:
        raise UnfitError(f"{column} is no transcript",
                         'without a `prompt`, it holds turns of "Human:" and "Assistant:" with blank lines between')
    said = []
    for speaker, spoken in zip(rest[::2], rest[1::2], strict=True):
        if not spoken.strip():
            raise UnfitError("a turn of the transcript is empty", f"{speaker}'s in {column}")
        said.append(Message(SPEAKERS[speaker], spoken.strip()))
    return tuple(said)


def _parted(chosen: Words, rejected: Words, values: Values, origin: Origin) -> ComparedExample:
    """Two conversations as what they share and how each goes on, at least with its last turn."""
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise UnfitError("one answer is turns, the other a string")
    if chosen == rejected:
        raise UnfitError("chosen and rejected are the same")
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen[:-1], rejected[:-1], strict=False)))
    prompt = _with_system(chosen[:shared], values)
    return _compared(prompt, (chosen[shared:], rejected[shared:]), (0, 1), values, origin)


def _compared(prompt: Words, answers: tuple[Words, ...], ranks: Sequence[int], values: Values,
              origin: Origin) -> ComparedExample:
    prompt, said = _alike(prompt, answers)
    if len(said) < 2:
        raise UnfitError("one answer alone cannot be compared")
    for answer in said:
        if not isinstance(answer, str) and answer[-1].role != "assistant":
            raise UnfitError("an answer does not end with the assistant's turn")
    order = sorted(range(len(said)), key=lambda i: ranks[i])
    for a, b in combinations(range(len(said)), 2):
        if _plain(said[a]) == _plain(said[b]):
            raise UnfitError("chosen and rejected are the same" if len(said) == 2 else "two answers are the same")
    margin = None if values.get("margin") is None else number(values["margin"], "margin")
    return ComparedExample(prompt, tuple(said[i] for i in order), tuple(ranks[i] for i in order), origin, margin,
                           row_weight(values), tools(values))


def _demand_order(ranks: Sequence[float]) -> None:
    """Sorted ranks must be 0, 1, 2, ... or 1, 2, 3, ..."""
    for place, rank in enumerate(ranks):
        if place and rank == ranks[place - 1]:
            raise UnfitError("ranks are tied", f"two answers have rank {rank:g}")
        if rank - ranks[0] != place or ranks[0] not in (0, 1):
            raise UnfitError("ranks have a gap", f"they are {', '.join(f'{r:g}' for r in ranks)}; 0 or 1 is best")


def _plain(answer: Words) -> Any:
    if isinstance(answer, str):
        return answer.strip()
    return [(said.role, said.content.strip(), said.extra) for said in answer]


def _alike(prompt: Words, answers: tuple[Words, ...]) -> tuple[Words, tuple[Words, ...]]:
    """All strings, or all turns where any of them is."""
    if all(isinstance(part, str) for part in (prompt, *answers)):
        return prompt, answers
    asked = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    return asked, tuple((Message("assistant", answer),) if isinstance(answer, str) else answer for answer in answers)
