"""Which of its choices a question's answer is. Read `row_values.py` first.

An answer is looked up in this order; a number is the last thing that it can be:

1. the label of a choice, where choices have labels
2. a choice's own words: "2" among "1", "2", "3" is the second
3. a letter from A on, where choices have no labels
4. the number of a choice, where choices have no labels: from 0 or from 1, as the rows of the source show it

Of the rows whose answer can only be the number of a choice, one that is 0 shows that numbers begin at 0, and one that
is as large as the number of choices that they begin at 1. Where they show both, or neither, such rows are refused.
Where they show one, a row whose number says one choice and whose words say another is refused, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.core.labels import get_label_key, get_label_name, parse_number
from luthier.data.row_values import InvalidRowError, Values, check_finite, parse_json, read_list

REMEDY = "write the choice's own words or its letter, or set first_choice of the source to 0 or 1"


@dataclass(frozen=True)
class Numbering:
    """How the answers of a source number the choices.

    Args:
        first: the number of the first choice; None where no row shows it.
        reason: why it is None.
        given: whether somebody says so, rather than the rows: an answer that can be a number then is one.
    """

    first: int | None = None
    reason: str = ""
    given: bool = False


@dataclass(frozen=True)
class Choices:
    """The choices of one question, and its answer.

    Args:
        choices: text, or turns.
        labels: of each choice; empty where they have none.
    """

    choices: tuple[Any, ...]
    labels: tuple[Any, ...]
    answer: Any

    @classmethod
    def of(cls, values: Values) -> Choices:
        """Those of a row. Raises `UnfitError` for what is no list of choices."""
        found = parse_json(values["choices"], "choices")
        labels: Sequence[Any] = ()
        if isinstance(found, dict):
            found, labels = found.get("text", ()), found.get("label", ())
        choices = tuple(_format_choice(choice) for choice in read_list({"choices": found}, "choices"))
        if labels and len(labels) != len(choices):
            raise InvalidRowError("choices and their labels differ in number", f"{len(choices)} and {len(labels)}")
        answer = values["answer"]
        if isinstance(answer, (int, float)):
            check_finite(parse_number(answer) or 0, "answer")
        return cls(choices, tuple(labels or ()), answer)

    def place(self, numbering: Callable[[], Numbering]) -> int:
        """Where the answer stands among the choices; see the top of the file."""
        named, number = self.named(), self.number()
        if number is None and named is None:
            raise self._none()
        told = Numbering() if number is None else numbering()
        if named is not None and (number is None or told.first is None):
            return named
        if told.first is None or number is None:
            raise InvalidRowError(told.reason, REMEDY)
        place = number - told.first
        if not 0 <= place < len(self.choices):
            if named is not None:
                return named
            raise self._none(f"numbers run from {told.first} to {len(self.choices) + told.first - 1}")
        if named not in (None, place) and not told.given:
            raise InvalidRowError("answer is the number of one choice and the words of another",
                                  f"{self.answer!r}: {REMEDY}")
        return place

    def named(self) -> int | None:
        """The place that a label, a choice's words or a letter say; None where none of them does."""
        if (place := self._only(self.labels)) is not None:
            return place
        if (place := self._only(self.choices)) is not None:
            return place
        letter = self.answer.strip() if isinstance(self.answer, str) else ""
        place = ord(letter.upper()) - ord("A") if len(letter) == 1 and letter.isascii() and letter.isalpha() else -1
        if self.labels or not 0 <= place < len(self.choices):
            return None
        alike = [i for i, choice in enumerate(self.choices) if isinstance(choice, str)
                 and choice.strip().lower() == letter.lower()]
        if alike and alike != [place]:
            raise InvalidRowError("answer is a letter and, in the other case, a choice", f"{self.answer!r}: {REMEDY}")
        return place

    def number(self) -> int | None:
        """The number that the answer is; true and false are none, nor is a number where choices have labels."""
        found = parse_number(self.answer)
        truth = get_label_name(self.answer) in ("true", "false")
        return found if isinstance(found, int) and not truth and not self.labels and found >= 0 else None

    def _only(self, among: Sequence[Any]) -> int | None:
        """Where the answer stands alone among labels or choices; None where it does not stand there."""
        key = self._key(self.answer)
        same = [place for place, one in enumerate(among) if self._key(one) == key]
        exact = [place for place in same if among[place] == self.answer]
        if len(same) > 1 and len(exact) != 1:
            raise InvalidRowError("answer is several of the choices", f"{self.answer!r}")
        return exact[0] if len(exact) == 1 else same[0] if same else None

    @staticmethod
    def _key(value: Any) -> Any:
        return get_label_key(value) if isinstance(value, (str, int, float)) else value

    def _none(self, why: str = "") -> InvalidRowError:
        asked = (f"give one of {', '.join(map(str, self.labels))}" if self.labels else
                 "give a choice's own words, a letter from A on, or a number")
        return InvalidRowError("answer is none of the choices", f"{self.answer!r}: {why or asked}")


def _format_choice(choice: Any) -> Any:
    """A choice that is a number as text, with all its digits."""
    if isinstance(choice, (int, float)):
        check_finite(parse_number(choice) or 0, "choice")
        return get_label_name(choice)
    return choice


def find_numbering(rows: Iterable[Values]) -> Numbering:
    """What the rows of a source show; see the top of the file."""
    zero = last = False
    for values in rows:
        try:
            asked = Choices.of(values)
            number = asked.number() if asked.named() is None else None
        except InvalidRowError:  # refused by its reader
            continue
        zero, last = zero or number == 0, last or number == len(asked.choices)
    if zero and last:
        return Numbering(reason="answers are numbers that begin at 0 in one row and at 1 in another")
    if not zero and not last:
        return Numbering(reason="answer is a number, and no row shows whether the first choice is 0 or 1")
    return Numbering(int(last))
