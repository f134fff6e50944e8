"""The engine without a model: detokenized text, stop strings, finish reasons, batches and usage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the extra `serve` is not installed")

from luthier.serving.detokenizer import IncrementalDetokenizer
from luthier.serving.engine import InferenceEngine, Request, TokenDelta, _RunningRequest
from luthier.serving.openai_protocol import CompletionRequest, count_usage


def decode(ids: Sequence[int], **_: Any) -> str:
    return bytes(ids).decode(errors="replace")


def run_request(text: str, most: int = 100, stop: tuple[str, ...] = (), ended: bool = True) -> tuple[str, list[TokenDelta]]:
    """The output of a request for which the model generates this text byte by byte, then the stop token."""
    deltas: list[TokenDelta] = []
    request = Request((1,), stop=stop)
    request.on_output = deltas.append
    running = _RunningRequest(request, decode)
    for number, token in enumerate(text.encode(), 1):
        running.push(token)
        if number == most:  # the engine of the model ends it there
            running.finish("length")
    if ended:
        running.push(None)
    assert [bool(delta.finish_reason) for delta in deltas] == [False] * (len(deltas) - 1) + [running.is_finished] if deltas else True
    return "".join(delta.text for delta in deltas), deltas


@pytest.mark.parametrize(("text", "stop", "wanted", "tokens"), [
    ("one END two", ("END",), "one ", 7),
    ("one STOP two END", ("END", "STOP"), "one ", 8),  # the first in the text, not in the request
    ("one END two STOP", ("STOP", "END"), "one ", 7),
    ("abcd", ("bcd", "c"), "ab", 3),  # c is whole before bcd is
    ("xaab", ("aab", "ab"), "x", 4),  # two are whole with the same token: the one that begins first
    ("xaab", ("ab", "aab"), "x", 4),
    ("one EN two", ("END",), "one EN two", 10),  # the beginning of a stop is held back, then emitted
    ("one EN", ("END",), "one EN", 6),
    ("none", (), "none", 4),
    ("END", ("END",), "", 3)])
def test_a_stop_string_ends_the_completion(text: str, stop: tuple[str, ...], wanted: str, tokens: int) -> None:
    text_out, deltas = run_request(text, stop=stop)
    assert text_out == wanted
    assert deltas[-1].finish_reason == "stop"
    assert deltas[-1].tokens == tokens
    for delta in deltas[:-1]:
        assert delta.text  # nothing is emitted twice, and nothing that may begin a stop string


def test_no_part_of_a_stop_string_is_emitted() -> None:
    emitted = ""
    for delta in run_request("aaEaENaEND more", stop=("END",))[1]:
        emitted += delta.text
        assert "aaEaENa".startswith(emitted)
    assert emitted == "aaEaENa"


@pytest.mark.parametrize(("most", "end", "tokens"), [(3, "length", 3), (4, "length", 4), (5, "stop", 4)])
def test_a_completion_ends_at_its_length(most: int, end: str, tokens: int) -> None:
    text_out, deltas = run_request("four", most)
    assert (text_out, deltas[-1].finish_reason, deltas[-1].tokens) == ("four"[:most], end, tokens)


def test_a_character_is_emitted_once_all_its_bytes_are_there() -> None:
    detokenizer = IncrementalDetokenizer(decode)
    assert [detokenizer.push(token) for token in "aäb".encode()] == ["a", "", "ä", "b"]
    assert detokenizer.flush() == ""
    assert run_request("ä"[:1] + "x")[0] == "äx"


def test_a_cancelled_request_emits_nothing_more() -> None:
    deltas: list[TokenDelta] = []
    request = Request((1,))
    request.on_output = deltas.append
    running = _RunningRequest(request, decode)
    running.push(97)
    request.cancelled = True
    running.push(98)
    assert [delta.text for delta in deltas] == ["a"]
    assert running.is_finished


@pytest.mark.parametrize("n", [1, 3])
def test_a_prompt_counts_once_for_all_its_completions(n: int) -> None:
    body = CompletionRequest(model="m", prompt=["a", "b"], n=n)
    requests = [Request(prompt) for prompt in ((1, 2, 3), (4, 5)) for _ in range(n)]
    last = [TokenDelta("", tokens=7 + i) for i in range(2 * n)]
    written = sum(7 + i for i in range(2 * n))
    assert count_usage(body, requests, last) == {"prompt_tokens": 5, "completion_tokens": written, "total_tokens": 5 + written,
                                                "prompt_tokens_details": {"cached_tokens": 0}}


def test_the_constructor_starts_no_thread() -> None:
    class Model:
        is_training = True

        def train(self, mode: bool) -> None:
            self.is_training = mode

    model: Any = Model()
    engine = InferenceEngine(model)
    assert not engine._thread.is_alive()
    assert model.is_training
    result = engine.run_exclusive(lambda: 7)
    cancelled: list[TokenDelta] = []
    assert not result.done()
    engine.start()
    assert result.result(timeout=10) == 7
    assert not model.is_training
    engine.close()
    other = InferenceEngine(model)
    other.submit(Request((1,)), cancelled.append)
    other.close()  # without a thread to wait for
    assert [delta.finish_reason for delta in cancelled] == ["cancelled"]
