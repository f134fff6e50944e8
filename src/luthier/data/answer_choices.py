"""Matches the answer of a multiple-choice question to one of its choices. Read `row_values.py` first.

An answer is matched in this order:

1. the label of a choice
2. the text of a choice: "2" in "1", "2", "3" is the second choice
3. a letter, where A is the first choice, if choices have no labels
4. the index of a choice, if choices have no labels; the rows of the source show whether indices start at 0 or at 1

Among the rows whose answer can only be an index, an answer of 0 shows that indices start at 0, and an answer equal to
the
number of choices shows that they start at 1. If rows show both or neither, these rows are rejected. If rows show one,
a row whose answer is the index of one choice and the text of another is rejected too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.core.labels import get_label_key, get_label_name, parse_number
from luthier.data.row_values import InvalidRowError, Values, check_finite, parse_json, read_list

REMEDY = "write the text or the letter of the choice, or set first_choice of the source to 0 or 1"


@dataclass(frozen=True)
class Numbering:
    """Whether the indices in a source start at 0 or at 1.

    Args:
        first: the index of the first choice; None if no row shows it.
        reason: why it is None.
        given: whether the recipe sets it (`first_choice`). An answer that can be an index is then read as an index.
    """

    first: int | None = None
    reason: str = ""
    given: bool = False


@dataclass(frozen=True)
class Choices:
    """The choices of a question, and its answer.

    Args:
        choices: text, or turns.
        labels: of each choice; empty if choices have none.
    """

    choices: tuple[Any, ...]
    labels: tuple[Any, ...]
    answer: Any

    @classmethod
    def of(cls, values: Values) -> Choices:
        """The choices of a row. Raises `InvalidRowError` if `choices` is not a list of choices."""
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
        """The position of the answer among the choices; see the module docstring."""
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
            raise self._none(f"indices run from {told.first} to {len(self.choices) + told.first - 1}")
        if named not in (None, place) and not told.given:
            raise InvalidRowError("answer is the index of one choice and the text of another",
                                  f"{self.answer!r}: {REMEDY}")
        return place

    def named(self) -> int | None:
        """The position that matches by label, text or letter; None if there is no match."""
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
            raise InvalidRowError("answer is a letter that is also a choice in other case", f"{self.answer!r}: "
                                                                                            f"{REMEDY}")
        return place

    def number(self) -> int | None:
        """The answer as an index. None for true and false, and if choices have labels."""
        found = parse_number(self.answer)
        truth = get_label_name(self.answer) in ("true", "false")
        return found if isinstance(found, int) and not truth and not self.labels and found >= 0 else None

    def _only(self, among: Sequence[Any]) -> int | None:
        """The position of the only label or choice that equals the answer; None if there is none."""
        key = self._key(self.answer)
        same = [place for place, one in enumerate(among) if self._key(one) == key]
        exact = [place for place in same if among[place] == self.answer]
        if len(same) > 1 and len(exact) != 1:
            raise InvalidRowError("answer matches several choices", f"{self.answer!r}")
        return exact[0] if len(exact) == 1 else same[0] if same else None

    @staticmethod
    def _key(value: Any) -> Any:
        return get_label_key(value) if isinstance(value, (str, int, float)) else value

    def _none(self, why: str = "") -> InvalidRowError:
        asked = (f"give one of {', '.join(map(str, self.labels))}" if self.labels else
                 "give the text of a choice, a letter from A on, or an index")
        return InvalidRowError("answer matches no choice", f"{self.answer!r}: {why or asked}")


def _format_choice(choice: Any) -> Any:
    """A choice that is a number as text, with all its digits."""
    if isinstance(choice, (int, float)):
        check_finite(parse_number(choice) or 0, "choice")
        return get_label_name(choice)
    return choice


def find_numbering(rows: Iterable[Values]) -> Numbering:
    """Reads from the rows of a source where indices start; see the module docstring."""
    zero = last = False
    for values in rows:
        try:
            asked = Choices.of(values)
            number = asked.number() if asked.named() is None else None
        except InvalidRowError:  # rejected when the row is converted
            continue
        zero, last = zero or number == 0, last or number == len(asked.choices)
    if zero and last:
        return Numbering(reason="answers are indices that start at 0 in one row and at 1 in another")
    if not zero and not last:
        return Numbering(reason="answer is an index, and no row shows whether indices start at 0 or at 1")
    return Numbering(int(last))
