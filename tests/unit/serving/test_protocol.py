"""What the protocol says beyond plain answers: log-probabilities, penalties, caches, keys, limits. Read `test_openai_serving.py`."""
# ruff: noqa: F811  pytest gives the fixture `server` to the arguments of that name

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request as Call
from urllib.request import urlopen

import pytest
import torch

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
pytest.importorskip("starlette", reason="the extra `serve` is not installed")

from starlette.testclient import TestClient
from test_openai_serving import ONE, Server, server, text  # noqa: F401  the fixture

from luthier.core.errors import RecipeError
from luthier.core.examples import Message
from luthier.core.protocols import SamplingParams
from luthier.serving.engine import QueueFull, Request, TokenDelta
from luthier.serving.http_server import AccessRules, build_app
from luthier.serving.openai_serving import OpenAIServing


def stream(server: Server, where: str, **body: Any) -> list[dict[str, Any]]:
    with urlopen(Call(f"{server.url}/{where}", json.dumps(body | {"stream": True}).encode(),
                      {"Content-Type": "application/json"})) as got:
        lines = [line.removeprefix("data: ") for line in got.read().decode().split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


# ---------------------------------------------------------------- log-probabilities


def test_log_probabilities_of_a_chat_are_those_of_the_model(server: Server) -> None:
    answer = server.chat("law", "Why?", logprobs=True, top_logprobs=3, temperature=1.3, seed=5)
    served = server.serving.served
    items = answer["choices"][0]["logprobs"]["content"]
    assert len(items) == answer["usage"]["completion_tokens"]
    prompt = served.encode_chat("law", [Message("user", "Why?")])
    (output,) = served.base.generate([prompt], SamplingParams(12, 1.3, seed=5), served.get_adapter_indices(["law"]))
    ids = list(output.token_ids)
    assert len(ids) == len(items)
    with torch.no_grad(), served.manager.use_adapter("law"):
        logits = served.base.model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0].log_softmax(-1)
    for place, (token, item) in enumerate(zip(ids, items, strict=True), len(prompt) - 1):
        assert item["logprob"] == pytest.approx(float(logits[place, token]), abs=1e-4)
        assert [top["logprob"] for top in item["top_logprobs"]] == pytest.approx(logits[place].topk(3).values.tolist(), abs=1e-4)
        assert bytes(item["bytes"]).decode() == item["token"] == served.base.tokenizer.decode([token])


def test_streamed_log_probabilities_are_those_of_the_whole_answer(server: Server) -> None:
    body = {"model": "law", "messages": ONE, "temperature": 0, "max_tokens": 8, "logprobs": True, "top_logprobs": 2}
    whole = server.post("chat/completions", **body)["choices"][0]["logprobs"]["content"]
    events = stream(server, "chat/completions", **body)
    parts = [item for event in events for choice in event["choices"] if choice["logprobs"] for item in choice["logprobs"]["content"]]
    assert parts == whole


def test_log_probabilities_of_a_text_have_offsets(server: Server) -> None:
    body = {"model": "law", "prompt": "Once", "temperature": 0, "max_tokens": 8, "logprobs": 2}
    choice = server.post("completions", **body)["choices"][0]
    found = choice["logprobs"]
    assert len(found["tokens"]) == len(found["token_logprobs"]) == len(found["top_logprobs"]) == len(found["text_offset"])
    assert found["text_offset"] == [sum(map(len, found["tokens"][:i])) for i in range(len(found["tokens"]))]
    assert all(len(top) <= 2 and max(top.values()) <= 0 for top in found["top_logprobs"])
    assert all(math.isfinite(value) for value in found["token_logprobs"])
    assert server.post("completions", **{**body, "logprobs": None})["choices"][0]["logprobs"] is None


# ---------------------------------------------------------------- sampling


def test_a_bias_and_penalties_act(server: Server) -> None:
    assert text(server.chat("law", "Why?", logit_bias={"65": 100}, max_tokens=3)) == "AAA"
    assert text(server.chat("law", "Why?", logit_bias={"65": 100, "66": 99}, presence_penalty=2, max_tokens=3)) == "ABA"
    assert text(server.chat("law", "Why?", top_k=1, temperature=2.0)) == text(server.chat("law", "Why?"))
    assert text(server.chat("law", "Why?", min_p=1.0, temperature=2.0)) == text(server.chat("law", "Why?"))


def test_a_cached_prompt_is_counted_and_gives_the_same_answer(server: Server) -> None:
    serving = OpenAIServing(server.serving.served, prefix_cache_bytes=10**8)
    serving.engine.start()
    try:
        client = TestClient(build_app(serving), base_url="http://127.0.0.1")
        body = {"model": "law", "messages": [{"role": "user", "content": "x" * 150}], "temperature": 0, "max_tokens": 6}
        first, second, without = (client.post("/v1/chat/completions", json=body | more).json()
                                  for more in ({}, {}, {"prompt_cache": False}))
        cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in (first, second, without)]
        assert cached == [0, 128, 0]
        assert text(first) == text(second) == text(without)
        other = client.post("/v1/chat/completions", json=body | {"model": "medicine"}).json()
        assert other["usage"]["prompt_tokens_details"]["cached_tokens"] == 0, "adapters share nothing"
    finally:
        serving.engine.close()


# ---------------------------------------------------------------- models, embeddings, metrics


def test_models_are_shown_and_removed(server: Server) -> None:
    served = server.serving.served
    names = dict(served.names)
    client = TestClient(build_app(server.serving), base_url="http://127.0.0.1")
    try:
        assert client.get("/v1/models/law").json()["id"] == "law"
        assert client.get("/v1/models/none").status_code == 404
        assert client.delete("/v1/models/base").status_code == 400
        assert client.delete("/v1/models/law").json() == {"id": "law", "object": "model", "deleted": True}
        assert client.get("/v1/models/law").status_code == 404
        refused = client.post("/v1/chat/completions", json={"model": "law", "messages": ONE})
        assert (refused.status_code, refused.json()["error"]["param"]) == (404, "model")
    finally:
        served.names.clear()
        served.names.update(names)


def test_embeddings_of_fewer_dimensions_have_length_one(server: Server) -> None:
    whole, short = (server.post("embeddings", model="law", input="a cat", **more)["data"][0]["embedding"]
                    for more in ({}, {"dimensions": 8}))
    norm = math.sqrt(sum(x * x for x in whole[:8]))
    assert short == pytest.approx([x / norm for x in whole[:8]], abs=1e-6)
    for given, words in (([1, 2], "check_embedding_ctx_length=False"), ([[1, 2]], "check_embedding_ctx_length=False"), ([], "no text")):
        code, message = server.refusal("embeddings", model="law", input=given)
        assert code == 400
        assert words in message
    assert server.refusal("embeddings", model="law", input="a", dimensions=10**6)[0] == 400


def test_health_and_metrics(server: Server) -> None:
    server.chat("law", "Count?")
    root = server.url.removesuffix("/v1")
    with urlopen(f"{root}/health") as got:
        assert json.load(got) == {"status": "ok"}
    with urlopen(f"{root}/metrics") as got:
        lines = dict(line.split() for line in got.read().decode().splitlines() if not line.startswith("#"))
    assert float(lines["luthier_tokens_generated"]) > 0
    assert float(lines["luthier_running"]) == 0


# ---------------------------------------------------------------- access and limits


def test_a_key_is_needed_beyond_this_machine() -> None:
    with pytest.raises(RecipeError, match="there is no API key"):
        AccessRules("", "0.0.0.0")
    AccessRules("secret", "0.0.0.0")


@pytest.mark.parametrize(("headers", "code"), [
    ({"Authorization": "Bearer secret"}, 200), ({}, 401), ({"Authorization": "Bearer wrong"}, 401), ({"Authorization": "secret!"}, 401),
    ({"Authorization": "Bearer secret", "Host": "evil.example"}, 401),
    ({"Authorization": "Bearer secret", "Host": "127.0.0.1.evil.example"}, 401),
    ({"Authorization": "Bearer secret", "Origin": "https://evil.example"}, 401),
    ({"Authorization": "Bearer secret", "Origin": "null"}, 401),
    ({"Authorization": "Bearer secret", "Origin": "http://127.0.0.1:3000"}, 200)])
def test_who_may_use_the_server(server: Server, headers: dict[str, str], code: int) -> None:
    client = TestClient(build_app(server.serving, AccessRules("secret")), base_url="http://127.0.0.1:8000")
    assert client.get("/v1/models", headers=headers).status_code == code
    assert client.get("/metrics", headers=headers).status_code == code
    posted = client.post("/v1/chat/completions", headers=headers, json={"model": "law", "messages": ONE, "max_tokens": 1})
    assert posted.status_code == code
    if code == 401:
        assert posted.json()["error"]["type"] == "authentication_error"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
def test_what_a_web_page_can_send_unasked_is_refused(server: Server, kind: str) -> None:
    client = TestClient(build_app(server.serving), base_url="http://127.0.0.1")
    got = client.post("/v1/chat/completions", content=json.dumps({"model": "law", "messages": ONE}), headers={"Content-Type": kind})
    assert got.status_code == 400
    assert "Content-Type: application/json" in got.json()["error"]["message"]


def test_a_body_has_a_size_limit(server: Server) -> None:
    client = TestClient(build_app(server.serving, AccessRules(max_body_bytes=1000)), base_url="http://127.0.0.1")
    got = client.post("/v1/completions", json={"model": "law", "prompt": "x" * 2000})
    assert (got.status_code, got.json()["error"]["code"]) == (413, "TooLarge")
    deep = client.post("/v1/completions", content="[" * 900, headers={"Content-Type": "application/json"})
    assert deep.status_code == 400


def test_a_full_queue_says_when_to_come_again(server: Server) -> None:
    serving = OpenAIServing(server.serving.served, max_num_seqs=1, max_queue=2)  # not started: everything waits
    for _ in range(2):
        serving.engine.submit(Request([1]), lambda delta: None)
    with pytest.raises(QueueFull):
        serving.engine.submit(Request([1]), lambda delta: None)
    got = TestClient(build_app(serving), base_url="http://127.0.0.1").post(
        "/v1/completions", json={"model": "law", "prompt": "x"})
    assert got.status_code == 429
    assert int(got.headers["Retry-After"]) >= 1
    assert got.json()["error"]["type"] == "rate_limit_error"
    serving.engine.close()


def test_a_client_that_leaves_frees_its_place(server: Server) -> None:
    engine = server.serving.engine
    call = urlopen(Call(f"{server.url}/completions", json.dumps(
        {"model": "law", "prompt": "x", "max_tokens": 200, "stream": True, "logit_bias": {"65": 100}}).encode(),
        {"Content-Type": "application/json"}))
    call.read(10)
    call.close()
    deadline = time.monotonic() + 20
    while engine.statistics["running"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.statistics["running"] == 0


@pytest.fixture
def busy(server: Server) -> Iterator[Server]:
    return server


def test_many_clients_of_many_kinds_lose_nothing(busy: Server) -> None:
    """Answers under load are those that each request gets alone; bad bodies and clients that leave in between."""
    asked = [("law" if i % 2 else "medicine", {"messages": [{"role": "user", "content": f"Q{i % 7}?" * (1 + i % 5)}],
                                               "temperature": 0 if i % 3 else 1.0, "seed": i % 4, "max_tokens": 4 + i % 9})
             for i in range(40)]
    alone = [busy.post("chat/completions", model=model, **body)["choices"] for model, body in asked]

    def ask(i: int) -> Any:
        if i % 5 == 4:
            with pytest.raises(HTTPError):
                busy.post("chat/completions", model="law", messages=3)
        model, body = asked[i]
        return busy.post("chat/completions", model=model, **body)["choices"]

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(len(asked)))) == alone


def test_sampling_parameters_reach_the_engine(server: Server) -> None:
    _, (request,) = server.serving.build_requests(
        {"model": "law", "messages": ONE, "top_k": 7, "min_p": 0.1, "presence_penalty": 0.5, "frequency_penalty": 0.25,
         "repetition_penalty": 1.2, "logit_bias": {"3": 1.5}, "temperature": 0.5, "top_p": 0.9, "seed": 11, "max_completion_tokens": 9,
         "logprobs": True, "top_logprobs": 4}, chat=True)
    assert request.sampling == SamplingParams(9, 0.5, 0.9, 7, seed=11, min_p=0.1, presence_penalty=0.5, frequency_penalty=0.25,
                                              repetition_penalty=1.2, logit_bias={3: 1.5}, logprobs=4)
    assert TokenDelta("").finish_reason == ""
