"""Rewards: built in, a user's own, an address; and what happens when one breaks."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from luthier.core.errors import RecipeError, RunError
from luthier.core.examples import Origin
from luthier.rl.builtin_rewards import extract_code
from luthier.rl.function_rewards import load_reward, wrap_function
from luthier.rl.http_rewards import build_endpoint_reward
from luthier.rl.rewards import Completion, compute_rewards


def answer(text: str, **metadata: Any) -> Completion:
    return Completion("What is it?", text, Origin("rows.jsonl", 7), metadata)


@pytest.mark.parametrize(("name", "text", "metadata", "wanted"), [
    ("numeric_match", "so it is 18.0", {"reference": "#### 18"}, 1.0),
    ("numeric_match", "so it is 17", {"reference": "#### 18"}, 0.0),
    ("json_equal", '{"a": 1}', {"reference": '{"a": 1.0}'}, 1.0),
    ("contains", "in Paris", {"reference": "Paris"}, 1.0),
    ("length", "one two three", {"length": 3}, 1.0),
    ("length", "one two", {"length": 4}, 0.5),
    ("length", "one two three four five six seven eight nine", {"length": 4}, 0.0),
    ("code_tests", "```python\ndef f(x):\n    return x + 1\n```", {"tests": ["assert f(1) == 2", "assert f(1) == 3"]}, 0.5),
    ("code_tests", "def f(x): return x", {"tests": "assert f(1) == 1"}, 1.0),
])
def test_built_in_rewards(name: str, text: str, metadata: dict[str, Any], wanted: float) -> None:
    assert compute_rewards([answer(text, **metadata)], [(load_reward(name, 5.0), 1.0)]) == [wanted]


def test_several_rewards_are_added_by_their_weights() -> None:
    rewards = [(load_reward("length", 1.0), 2.0), (wrap_function(lambda p, a, f: [len(x) for x in a], "f"), -0.5)]
    assert compute_rewards([answer("one two", length=2), answer("one", length=2)], rewards) == [2 - 3.5, 1 - 1.5]


@pytest.mark.parametrize(("name", "metadata", "word"), [
    ("numeric_match", {}, "has no 'reference'"), ("numeric_match", {"reference": "none"}, "has no number"),
    ("length", {"length": "long"}, "needs a number of words"), ("code_tests", {"tests": []}, "is empty")])
def test_a_row_that_cannot_be_scored_is_named(name: str, metadata: dict[str, Any], word: str) -> None:
    with pytest.raises(RunError, match=word) as caught:
        load_reward(name, 1.0)([answer("3", **metadata)])
    assert "rows.jsonl:7" in str(caught.value)
    assert "What is it?" in str(caught.value)


@pytest.mark.parametrize(("function", "word"), [
    (lambda p, a, f: 1 / 0, "ZeroDivisionError"), (lambda p, a, f: [math.nan], "nan for completion 0, not a finite number"),
    (lambda p, a, f: [math.inf], "inf"), (lambda p, a, f: [1.0, 2.0], "2 numbers for 1 completions"),
    (lambda p, a, f: ["good"], "str 'good' for completion 0"), (lambda p, a, f: None, "returned NoneType None")])
def test_a_function_that_breaks_names_the_prompt(function: Any, word: str) -> None:
    with pytest.raises(RunError, match=word) as caught:
        compute_rewards([answer("3")], [(wrap_function(function, "mine:f"), 1.0)])
    assert "What is it?" in str(caught.value)


def test_a_function_in_a_file_receives_prompts_completions_and_metadata(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def f(prompts, completions, metadata):\n    return [len(p) + len(a) + f['x'] for p, a, f "
                                      "in zip(prompts, completions, metadata)]\n")
    assert load_reward(f"{tmp_path}/mine.py:f", 1.0)([answer("abc", x=100)]) == [11 + 3 + 100]
    with pytest.raises(RecipeError, match="defines no function 'g'"):
        load_reward(f"{tmp_path}/mine.py:g", 1.0)
    with pytest.raises(RecipeError, match="cannot be imported"):
        load_reward(f"{tmp_path}/none.py:g", 1.0)
    with pytest.raises(RecipeError, match="did you mean 'length'"):
        load_reward("lenght", 1.0)


@pytest.mark.parametrize(("text", "code"), [
    ("a\n```python\nx = 1\n```\nb", "x = 1\n"), ("```\nx = 1\n```", "x = 1\n"), ("x = 1", "x = 1"),
    ("```py\nx = 1", "x = 1")])
def test_the_code_of_an_answer(text: str, code: str) -> None:
    assert extract_code(text) == code


class _Service(BaseHTTPRequestHandler):
    said: bytes = b"{}"
    code = 200

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(self.code)
        self.end_headers()
        self.wfile.write(self.said or json.dumps({"rewards": [len(a) for a in asked["completions"]]}).encode())

    def log_message(self, *words: Any) -> None:
        """Nothing to say."""


@pytest.fixture
def service() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_an_endpoint_returns_rewards_or_the_error_says_why_not(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Service, "said", b"")
    assert compute_rewards([answer("abc"), answer("")], [(build_endpoint_reward(service, 5.0), 1.0)]) == [3.0, 0.0]
    for said, code, word in ((b"nonsense", 200, "its response is not"), (b'{"scores": [1]}', 200, "KeyError"),
                             (b"", 503, "status 503")):
        monkeypatch.setattr(_Service, "said", said)
        monkeypatch.setattr(_Service, "code", code)
        with pytest.raises(RunError, match=word) as caught:
            build_endpoint_reward(service, 5.0)([answer("abc")])
        assert service in str(caught.value)


def test_an_endpoint_that_does_not_respond_is_a_plain_error(service: str) -> None:
    with pytest.raises(RunError, match="failed for"):
        build_endpoint_reward("http://127.0.0.1:9", 1.0)([answer("a")])
    with pytest.raises(RecipeError, match="not an http"):
        build_endpoint_reward("127.0.0.1:9", 1.0)


def test_a_package_that_a_reward_needs_is_no_missing_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "needy_reward.py").write_text("import no_such_package_here\ndef f(prompts, completions, metadata): return [0.0] * len(prompts)\n")
    with pytest.raises(RecipeError, match=r"needy_reward raised ModuleNotFoundError: No module named 'no_such_package_here'"):
        load_reward("needy_reward:f", 1.0)
    with pytest.raises(RecipeError, match=r"name a module on Python's path"):
        load_reward("no_such_reward_here:f", 1.0)
