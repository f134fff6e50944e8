"""The words of an answer as they become certain, texts that end it, how it ended, and what a request is billed for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the extra `serve` is not installed")

from luthier.api.serve import CompletionRequest, _count_usage
from luthier.serving.engine import IncrementalDetokenizer, Request, TokenDelta, _RunningRequest


def decode(ids: Sequence[int], **_: Any) -> str:
    return bytes(ids).decode(errors="replace")


def answered(text: str, most: int = 100, stop: tuple[str, ...] = (), ended: bool = True) -> tuple[str, list[TokenDelta]]:
    """What an answer says where the model writes this text byte by byte and then ends."""
    told: list[TokenDelta] = []
    request = Request((1,), max_new_tokens=most, stop=stop)
    request.tell = told.append
    answer = _RunningRequest(request, decode)
    for token in text.encode():
        answer.hear(token)
    if ended:
        answer.hear(None)
    assert [bool(bit.end) for bit in told] == [False] * (len(told) - 1) + [answer.ended] if told else True
    return "".join(bit.text for bit in told), told


@pytest.mark.parametrize(("text", "stop", "wanted", "tokens"), [
    ("one END two", ("END",), "one ", 7),
    ("one STOP two END", ("END", "STOP"), "one ", 8),  # what comes first in the text, not in the request
    ("one END two STOP", ("STOP", "END"), "one ", 7),
    ("abcd", ("bcd", "c"), "ab", 3),  # c is whole before bcd is
    ("xaab", ("aab", "ab"), "x", 4),  # two are whole with the same token: the one that begins first
    ("xaab", ("ab", "aab"), "x", 4),
    ("one EN two", ("END",), "one EN two", 10),  # the beginning of a stop is held back and said
    ("one EN", ("END",), "one EN", 6),
    ("none", (), "none", 4),
    ("END", ("END",), "", 3)])
def test_a_text_that_ends_an_answer(text: str, stop: tuple[str, ...], wanted: str, tokens: int) -> None:
    said, told = answered(text, stop=stop)
    assert said == wanted
    assert told[-1].end == "stop"
    assert told[-1].tokens == tokens
    for bit in told[:-1]:
        assert bit.text  # nothing is told twice, and nothing that might be a stop is told


def test_no_part_of_a_stop_is_ever_told() -> None:
    heard = ""
    for bit in answered("aaEaENaEND more", stop=("END",))[1]:
        heard += bit.text
        assert "aaEaENa".startswith(heard)
    assert heard == "aaEaENa"


@pytest.mark.parametrize(("most", "end", "tokens"), [(3, "length", 3), (4, "length", 4), (5, "stop", 4)])
def test_an_answer_ends_at_its_length(most: int, end: str, tokens: int) -> None:
    said, told = answered("four", most)
    assert (said, told[-1].end, told[-1].tokens) == ("four"[:most], end, tokens)


def test_a_letter_is_told_when_all_its_bytes_are_there() -> None:
    words = IncrementalDetokenizer(decode)
    assert [words.hear(token) for token in "aäb".encode()] == ["a", "", "ä", "b"]
    assert words.rest() == ""
    assert answered("ä"[:1] + "x")[0] == "äx"


def test_whoever_cancels_is_told_no_more() -> None:
    told: list[TokenDelta] = []
    request = Request((1,), max_new_tokens=9)
    request.tell = told.append
    answer = _RunningRequest(request, decode)
    answer.hear(97)
    request.cancelled = True
    answer.hear(98)
    assert [bit.text for bit in told] == ["a"]
    assert answer.ended


@pytest.mark.parametrize("n", [1, 3])
def test_a_prompt_counts_once_however_many_answers_it_has(n: int) -> None:
    asked = CompletionRequest(model="m", prompt=["a", "b"], n=n)
    requests = [Request(prompt) for prompt in ((1, 2, 3), (4, 5)) for _ in range(n)]
    last = [TokenDelta("", tokens=7 + i) for i in range(2 * n)]
    written = sum(7 + i for i in range(2 * n))
    assert _count_usage(asked, requests, last) == {"prompt_tokens": 5, "completion_tokens": written, "total_tokens": 5 + written}


def test_requests_that_sample_alike_share_a_batch() -> None:
    one = Request((1,), temperature=1.0, top_p=0.9)
    same = (Request((2, 3), "law", 5, 1.0, 0.9), Request((1,), temperature=1.0, top_p=0.9, stop=("x",)))
    other = (Request((1,), temperature=0.5, top_p=0.9), Request((1,), temperature=1.0, top_p=0.8),
             Request((1,), temperature=1.0, top_p=0.9, seed=1))
    assert all(one.alike(each) for each in same)
    assert not any(one.alike(each) for each in other)
    seeded = Request((1,), seed=1, group="a")
    assert seeded.alike(Request((2,), seed=1, group="a"))
    assert not seeded.alike(Request((2,), seed=1, group="b"))
    assert not seeded.alike(Request((2,), seed=2, group="a"))


