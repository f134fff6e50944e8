"""Metrics of a generated answer: pure functions of an answer and its reference, in one dict. Read `core/errors.py`
first.

An answer is generated text, so an answer that cannot be parsed scores 0. A reference is user data, so a reference that
the metric cannot parse raises `DataError`. `docs/metrics.md` has an entry for every name in `METRICS`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from decimal import Decimal, InvalidOperation
from typing import Any, NoReturn

from luthier.core.errors import DataError

Scorer = Callable[[str, str], float]

_MISSING = object()


def exact_match(answer: str, reference: str) -> float:
    """Whether both texts are equal after normalizing whitespace.

    Definition: 1 if equal after every run of whitespace becomes one space and the ends are stripped, else 0.
    Range: 0 or 1. Case and punctuation count.
    Source: exact match as in Rajpurkar et al. 2016 (SQuAD), without its removal of articles, case and punctuation.

    >>> exact_match("Paris \\n", "Paris"), exact_match("paris", "Paris")
    (1.0, 0.0)
    """
    return float(_normalize_spaces(answer) == _normalize_spaces(reference))


def contains(answer: str, reference: str) -> float:
    """Whether the answer contains the reference.

    Definition: 1 if the reference is a substring of the answer, both with whitespace as in `exact_match`, else 0.
    Range: 0 or 1. It looks at characters, not words: "art" is in "part".
    Source: the common lenient form of exact match, e.g. Mallen et al. 2023 (PopQA).

    Raises:
        DataError: the reference is empty, so every answer would contain it.

    >>> contains("It is Paris, I think.", "Paris")
    1.0
    """
    wanted = _normalize_spaces(reference)
    if not wanted:
        raise DataError("the reference is empty, and every answer contains the empty text",
                        "give the row a reference, or use the metric `exact_match`")
    return float(wanted in _normalize_spaces(answer))


def json_equal(answer: str, reference: str) -> float:
    """Whether the answer contains the JSON value of the reference.

    Definition: 1 if both parse and are equal as JSON values, else 0. Numbers are compared by value (1 = 1.0), the order
    of keys is ignored, that of a list is not, and true is not 1. What is parsed is the whole text, or else a fenced
    block, or else the first balanced object in it.
    Range: 0 or 1.
    Source: RFC 8259; NaN and Infinity are not JSON.

    Raises:
        DataError: the reference is not JSON.

    >>> json_equal('Here you are: {"b": 2, "a": 1.0}', '{"a":1,"b":2}')
    1.0
    """
    wanted = _parse_reference_json(reference)
    return float(_is_equal(_find_json(answer), wanted))


def json_fields(answer: str, reference: str) -> float:
    """The fraction of the reference's fields that the answer has with the same value.

    Definition: |{k : answer[k] = reference[k]}| / |reference| over the top-level fields of the reference's object,
    found and compared as in `json_equal`. Additional fields of the answer are ignored.
    Range: 0 to 1; an answer that is not an object scores 0.
    Source: our own; the partial credit of `json_equal`.

    Raises:
        DataError: the reference is not a JSON object, or an empty one.

    >>> json_fields('{"a": 1, "b": 3}', '{"a": 1, "b": 2}')
    0.5
    """
    wanted, found = _parse_reference_json(reference), _find_json(answer)
    if not isinstance(wanted, dict) or not wanted:
        raise DataError(f"the reference {_shorten(reference)} is not a JSON object with fields, as `json_fields` needs",
                        "use the metric `json_equal` for these rows")
    if not isinstance(found, dict):
        return 0.0
    return sum(_is_equal(found.get(key, _MISSING), value) for key, value in wanted.items()) / len(wanted)


def numeric_match(answer: str, reference: str) -> float:
    """Whether the final number of the answer equals that of the reference.

    Definition: 1 if the two texts' final numbers are equal as decimals, else 0. The final number is the first one after
    ``####``, or without that mark the last of the text; thousands commas, currency and percent signs are removed.
    Range: 0 or 1. 18, 18.00 and $18 are one number; 50% is 50; of a fraction 3/4 it is 4.
    Source: Cobbe et al. 2021 (GSM8K), whose references end on ``#### N``.

    Raises:
        DataError: the reference has no number.

    >>> numeric_match("She pays $1,250.00 in all.", "... #### 1250")
    1.0
    """
    wanted = _find_final_number(reference)
    if wanted is None:
        raise DataError(f"the reference {_shorten(reference)} has no number",
                        "use another metric, or fix the row")
    return float(_find_final_number(answer) == wanted)


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L: F-measure of the longest common subsequence of words.

    Definition: with L the length of the longest common subsequence of tokens, P = L / |answer| and R = L / |reference|,
    the score is F = 2PR / (P + R). Tokens are lower-cased words; punctuation is ignored; each Chinese character or
    Japanese kana is a token by itself.
    Range: 0 to 1. Two texts without tokens score 1; if only one has no tokens, 0. On ASCII text it equals the package
    rouge_score, which ignores other letters: Chinese text scores 0 there, and café is caf.
    Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", equations 2-4, beta = 1, unstemmed.

    >>> rouge_l("police kill the gunman", "police killed the gunman")
    0.75
    """
    left, right = _split_tokens(answer), _split_tokens(reference)
    if not left or not right:
        return float(left == right)
    return 2 * _compute_lcs_length(left, right) / (len(left) + len(right))


METRICS: dict[str, Scorer] = {
    "exact_match": exact_match,
    "contains": contains,
    "json_equal": json_equal,
    "json_fields": json_fields,
    "numeric_match": numeric_match,
    "rouge_l": rouge_l,
}


def _normalize_spaces(text: str) -> str:
    return " ".join(text.split())


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


# ---------------------------------------------------------------- JSON

_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL | re.IGNORECASE)
_BRACES = re.compile(r'"(?:\\.|[^"\\])*"|[{}]', re.DOTALL)


def _parse_reference_json(reference: str) -> Any:
    value = _find_json(reference)
    if value is _MISSING:
        raise DataError(f"the reference {_shorten(reference)} is not JSON",
                        "use another metric, or fix the row")
    return value


def _find_json(text: str) -> Any:
    """The first JSON value in the text, numbers as decimals; `_MISSING` where there is none."""
    for candidate in _find_json_candidates(text):
        value = _parse_json(candidate)
        if value is not _MISSING:
            return value
    return _MISSING


def _find_json_candidates(text: str) -> Iterator[str]:
    """The whole text, then fenced blocks, then every outermost balanced object."""
    yield text
    yield from _FENCE.findall(text)
    start = text.find("{")
    while start >= 0:
        end = _find_closing_brace(text, start)
        if end < 0:  # truncated: nested objects are only parts of an answer
            return
        yield text[start:end]
        start = text.find("{", end)


def _find_closing_brace(text: str, start: int) -> int:
    """The end of the object that opens at `start`, ignoring braces inside strings; -1 if it is not closed."""
    depth = 0
    for mark in _BRACES.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(mark.group(), 0)
        if depth == 0 and mark.group() == "}":
            return mark.end()
    return -1


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text, parse_float=Decimal, parse_int=Decimal, parse_constant=_refuse_constant)
    except (ValueError, RecursionError, InvalidOperation):  # models may write "[[[[[..." or "9e999999..."
        return _MISSING


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def _is_equal(left: Any, right: Any) -> bool:
    """Equality of JSON values; unlike in Python, true is not equal to 1."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_is_equal(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(_is_equal, left, right))
    return bool(left == right)


# ---------------------------------------------------------------- numbers

# A minus belongs to the number unless something countable stands before it: 10-3 ends on 3, "is -3" on -3.
_NUMBER = re.compile(
    r"((?<![\w.)%])[-−](?=[$€£¥]?\.?\d))?"
    r"[$€£¥]?"
    r"((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")


def _find_final_number(text: str) -> Decimal | None:
    marked = _NUMBER.search(text, text.index("####")) if "####" in text else None
    found = marked or _find_last_match(_NUMBER, text)
    if found is None:
        return None
    sign, digits = found.groups()
    value = Decimal(digits.replace(",", ""))
    return -value if sign else value


def _find_last_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    found = None
    for found in pattern.finditer(text):  # noqa: B007
        pass
    return found


# ---------------------------------------------------------------- common subsequences

_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # kana and Han
_TOKEN = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")


def _split_tokens(text: str) -> list[str]:
    return _TOKEN.findall(text.lower())


def _compute_lcs_length(left: list[str], right: list[str]) -> int:
    """Length of the longest common subsequence; each row of the usual table is the bits of one integer.

    Hyyrö 2004, "Bit-parallel LCS-length computation revisited": a bit of `row` is 0 where the table steps up.
    """
    places: dict[str, int] = {}
    for index, token in enumerate(left):
        places[token] = places.get(token, 0) | 1 << index
    full = (1 << len(left)) - 1
    row = full
    for token in right:
        hits = row & places.get(token, 0)
        row = ((row + hits) | (row - hits)) & full
    return len(left) - row.bit_count()
