"""Scorers: what each counts as right, with traps; GSM8K's own references where they are at hand."""

from __future__ import annotations

import doctest
import json
import random
from pathlib import Path

import pytest

from luthier.core.errors import DataError
from luthier.evaluation import answer_metrics
from luthier.evaluation.answer_metrics import METRICS

ROOT = Path(__file__).parents[2]
GSM8K = ROOT.parent / "shared/data/gsm8k_test.jsonl"
OBJECT = '{"part":"bridge","hours":1.5,"tags":["a",{"b":null}],"ok":true}'


@pytest.mark.parametrize(("name", "answer", "reference", "score"), [
    ("exact_match", " a  b\n", "a b", 1),
    ("exact_match", "ab", "a b", 0),
    ("exact_match", "A b", "a b", 0),
    ("exact_match", "", " \n", 1),
    ("contains", "the answer\nis  42.", "answer is 42", 1),
    ("contains", "4 2", "42", 0),
    ("contains", "", "42", 0),
    ("json_equal", OBJECT, OBJECT, 1),
    ("json_equal", '{"b": 2.0, "a": 1}', '{"a":1.0,"b":2}', 1),
    ("json_equal", '{"a": 0.1}', '{"a": 0.10}', 1),
    ("json_equal", '{"a": 1e2}', '{"a": 100}', 1),
    ("json_equal", '{"a": true}', '{"a": 1}', 0),
    ("json_equal", '{"a": "1"}', '{"a": 1}', 0),
    ("json_equal", '{"a": null}', '{}', 0),
    ("json_equal", '{"a": 1, "b": 2}', '{"a": 1}', 0),
    ("json_equal", "[1, 2]", "[2, 1]", 0),
    ("json_equal", "[1, 2]", "[1, 2, 3]", 0),
    ("json_equal", "7.0", "7", 1),
    ("json_equal", 'Sure:\n```json\n{"a": [1]}\n```\nbye {"a": 2}', '{"a":[1]}', 1),
    ("json_equal", "```\n[1]\n```", "[1]", 1),
    ("json_equal", 'I say {"a": "}{\\""} and {"a": 2}', '{"a": "}{\\""}', 1),
    ("json_equal", 'with {braces} first, then {"a": 1}', '{"a": 1}', 1),
    ("json_equal", '{"outer": {"a": 1}', '{"a": 1}', 0),
    ("json_equal", '{"a": NaN}', '{"a": 1}', 0),
    ("json_equal", "no JSON at all", '{"a": 1}', 0),
    ("json_equal", "[" * 100_000, '{"a": 1}', 0),
    ("json_equal", '{"a": ' + "9" * 5000 + "}", '{"a": 1}', 0),
    ("json_equal", '{"a": 1e99999999999999999999}', '{"a": 1}', 0),
    ("json_fields", '{"a": 1, "b": 2, "c": 3}', '{"a": 1.0, "b": 2}', 1),
    ("json_fields", '{"a": 1, "b": 3}', '{"a": 1, "b": 2, "c": null, "d": 0}', 0.25),
    ("json_fields", "[1]", '{"a": 1}', 0),
    ("json_fields", "?", '{"a": 1}', 0),
    ("numeric_match", "so 3 + 4 = 7.", "#### 7", 1),
    ("numeric_match", "#### 7\nNext question: 9 apples", "7", 1),
    ("numeric_match", "First 9. #### none", "9", 1),
    ("numeric_match", "$1,234,567.50", "1234567.5", 1),
    ("numeric_match", "one of 1,2,3", "3", 1),
    ("numeric_match", "10-3", "3", 1),
    ("numeric_match", "it is -3", "-3", 1),
    ("numeric_match", "a loss of -$5", "-5", 1),
    ("numeric_match", "$-5", "-5", 1),
    ("numeric_match", "it is −3", "-3", 1),
    ("numeric_match", "- 5 apples", "5", 1),
    ("numeric_match", "50%", "50", 1),
    ("numeric_match", "18.00", "18", 1),
    ("numeric_match", "0.5", ".5", 1),
    ("numeric_match", "18.5", "18", 0),
    ("numeric_match", "答案是12个", "12", 1),
    ("numeric_match", "none", "0", 0),
    ("rouge_l", "", "", 1),
    ("rouge_l", "...", "word", 0),
    ("rouge_l", "The Cat, sat!", "the cat sat", 1),
    ("rouge_l", "the gunman kill police", "police killed the gunman", 0.5),
    ("rouge_l", "今天天气好", "今天天气很好", 10 / 11),
    ("rouge_l", "用Python写", "用 python 写", 1),
    ("rouge_l", "It is 3.5 m_long, isn't it?", "it is 3 5 m long; isn t", 16 / 17),  # as rouge_score 0.1.2 has it, and the
    ("rouge_l", "Hello-world (2 times)", "hello, world two times", 0.75),  # next two too
    ("rouge_l", "a b c d", "d c b a", 0.25),
])
def test_score(name: str, answer: str, reference: str, score: float) -> None:
    assert METRICS[name](answer, reference) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize(("name", "reference"), [
    ("contains", " "), ("json_equal", "{"), ("json_fields", "[1]"), ("json_fields", "{}"), ("numeric_match", "many"),
])
def test_unreadable_reference_is_the_users_to_mend(name: str, reference: str) -> None:
    with pytest.raises(DataError, match="reference"):
        METRICS[name]("anything", reference)


def table(left: list[str], right: list[str]) -> int:
    """The textbook's table: the slow twin of `_common`."""
    above = [0] * (len(right) + 1)
    for a in left:
        row = [0]
        for j, b in enumerate(right):
            row.append(above[j] + 1 if a == b else max(above[j + 1], row[j]))
        above = row
    return above[-1]


def test_the_bit_parallel_lcs_agrees_with_the_table() -> None:
    rng = random.Random(0)
    for _ in range(300):
        left, right = (rng.choices("abcd", k=rng.randrange(1, 90)) for _ in range(2))
        assert answer_metrics._compute_lcs_length(left, right) == table(left, right)


def test_docstrings_run() -> None:
    found = doctest.testmod(answer_metrics)
    assert found.attempted >= len(METRICS)
    assert not found.failed


@pytest.mark.parametrize("name", METRICS)
def test_every_scorer_is_in_the_glossary_and_says_its_definition(name: str) -> None:
    assert f"### {name}\n" in (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    doc = METRICS[name].__doc__ or ""
    assert all(word in doc for word in ("Definition:", "Range:", "Source:"))


@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K's test split is not at hand")
def test_gsm8k_references_score_themselves() -> None:
    rows = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()[:200]]
    for row in rows:
        final = row["answer"].rsplit("#### ", 1)[1]
        assert METRICS["numeric_match"](f"Therefore the answer is ${final}.", row["answer"]) == 1
        assert METRICS["numeric_match"](f"Therefore the answer is {final}1.", row["answer"]) == 0
