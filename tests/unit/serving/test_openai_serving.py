"""`luthier serve`: OpenAI's protocol in front of several runs on one base; the clients that people use get our answers."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request as Call
from urllib.request import urlopen

import pytest
import torch

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
pytest.importorskip("starlette", reason="the extra `serve` is not installed")

import uvicorn

import luthier
from luthier.api.serve import name_runs
from luthier.assembly.multi_adapter_loading import load_served_models
from luthier.core.errors import RecipeError
from luthier.core.examples import Message
from luthier.core.protocols import SamplingParams
from luthier.serving.engine import InferenceEngine, Request, TokenDelta
from luthier.serving.http_server import build_app, open_socket
from luthier.serving.openai_serving import OpenAIServing
from tiny import save_tiny

RUNS = ("law", "medicine")
MODULE = import_module("luthier.assembly.multi_adapter_loading")


@dataclass
class Server:
    """A running server of two runs on one tiny base."""

    path: Path
    serving: OpenAIServing
    url: str

    def post(self, where: str, **body: Any) -> Any:
        with urlopen(Call(f"{self.url}/{where}", json.dumps(body).encode(), {"Content-Type": "application/json"})) as got:
            return json.load(got)

    def chat(self, model: str, text: str, **more: Any) -> Any:
        return self.post("chat/completions", model=model, messages=[{"role": "user", "content": text}],
                         **{"temperature": 0, "max_tokens": 12} | more)

    def refusal(self, where: str, **body: Any) -> tuple[int, str]:
        with pytest.raises(HTTPError) as caught:
            self.post(where, **body)
        return caught.value.code, json.load(caught.value)["error"]["message"]


def run_app(serving: OpenAIServing) -> Iterator[str]:
    serving.engine.start()
    bound = open_socket("127.0.0.1", 0)
    uvicorn_server = uvicorn.Server(uvicorn.Config(build_app(serving), log_level="error"))
    thread = Thread(target=uvicorn_server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    while not uvicorn_server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{bound.getsockname()[1]}/v1"
    uvicorn_server.should_exit = True
    thread.join()
    serving.engine.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("served")
    save_tiny(home / "base", "llama", dtype=torch.float32)
    for number, name in enumerate(RUNS):
        rows = [{"prompt": f"{name} {i}?", "completion": "abcdefgh"[number * 4:][:4] * (1 + i)} for i in range(4)]
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        luthier.train(model=str(home / "base"), data=str(home / f"{name}.jsonl"), output_dir=str(home / name), quiet=True,
                      **{"training.max_steps": 6, "optimizer.learning_rate": 0.05, "seed": number})
    serving = OpenAIServing(load_served_models({name: home / name for name in RUNS}))
    running = run_app(serving)
    yield Server(home, serving, next(running))
    next(running, None)


def text(answer: Any) -> str:
    return answer["choices"][0]["message"]["content"]


# ---------------------------------------------------------------- answers


def test_every_run_answers_by_name_as_in_python(server: Server) -> None:
    with urlopen(f"{server.url}/models") as got:
        assert [model["id"] for model in json.load(got)["data"]] == ["base", *RUNS]
    tuned = luthier.load_adapters(str(server.path / "base"), {name: server.path / name for name in RUNS})
    wanted = {name: tuned.answer(["Who?"], None if name == "base" else name, SamplingParams(max_new_tokens=12))[0]
              for name in ("base", *RUNS)}
    assert {name: text(server.chat(name, "Who?")) for name in wanted} == wanted
    assert len(set(wanted.values())) == 3, "each answers in its own way, or this says nothing"


def test_requests_to_different_runs_share_a_batch_and_keep_their_answers(server: Server) -> None:
    asked = [(name, f"Why {i}?") for i in range(4) for name in ("base", *RUNS)]
    alone = [text(server.chat(*one)) for one in asked]
    before = server.serving.engine.steps
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(lambda one: text(server.chat(*one)), asked))
    assert together == alone
    assert server.serving.engine.steps - before < 12 * len(asked), "they were decoded together"


def test_a_stream_has_the_same_text(server: Server) -> None:
    whole = server.chat("law", "Stream?")
    body = {"model": "law", "messages": [{"role": "user", "content": "Stream?"}], "temperature": 0, "max_tokens": 12,
            "stream": True, "stream_options": {"include_usage": True}}
    with urlopen(Call(f"{server.url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})) as got:
        assert got.headers["Content-Type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in got.read().decode().split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    events = [json.loads(line) for line in lines]
    assert events[-1]["usage"] == whole["usage"]
    choices = [event["choices"][0] for event in events[:-1]]
    assert "".join(choice["delta"].get("content", "") for choice in choices) == text(whole)
    assert choices[-1]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert len(choices) > 3, "it came in parts"


def test_lengths_stops_and_usage(server: Server) -> None:
    whole = server.chat("law", "Long?", max_tokens=12)
    short = server.chat("law", "Long?", max_completion_tokens=3, max_tokens=None)
    assert short["usage"]["completion_tokens"] == 3
    assert short["choices"][0]["finish_reason"] == "length"
    assert text(whole).startswith(text(short))
    cut = text(whole)[2:4]
    stopped = server.chat("law", "Long?", stop=["never said", cut])
    assert text(stopped) == text(whole)[:text(whole).index(cut)]
    assert stopped["choices"][0]["finish_reason"] == "stop"
    assert whole["usage"]["total_tokens"] == whole["usage"]["prompt_tokens"] + whole["usage"]["completion_tokens"]


def test_a_seed_decides_whoever_else_asks(server: Server) -> None:
    def thrown(seed: int | None) -> str:
        return text(server.chat("base", "Numbers?", temperature=1.0, seed=seed))
    first = thrown(7)
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(thrown, [7, 7, 7, 7])) == [first] * 4
        assert len(set(pool.map(thrown, [None] * 6))) > 1, "without one each samples with its own random numbers"
    several = server.chat("base", "Numbers?", temperature=1.0, seed=7, n=3)["choices"]
    assert [choice["index"] for choice in several] == [0, 1, 2]
    assert len({choice["message"]["content"] for choice in several}) > 1


def test_a_runs_own_system_prompt_stands_where_none_is_brought(server: Server, tmp_path: Path) -> None:
    luthier.train(model=str(server.path / "base"), data=str(server.path / "law.jsonl"), output_dir=str(tmp_path / "told"), quiet=True,
                  **{"training.max_steps": 1, "data.system": "Be brief."})
    served = load_served_models({"told": tmp_path / "told", "law": server.path / "law"})
    prompts = {name: served.base.tokenizer.decode(served.encode_chat(name, [Message("user", "Hi")])) for name in ("told", "law", "base")}
    assert "Be brief." in prompts["told"]
    assert prompts["law"] == prompts["base"] == prompts["told"].replace("<|im_start|>system\nBe brief.<|im_end|>\n", "")
    own = served.encode_chat("told", [Message("system", "Be long."), Message("user", "Hi")])
    assert "Be brief." not in served.base.tokenizer.decode(own)


def test_a_text_is_gone_on_with(server: Server) -> None:
    answer = server.post("completions", model="law", prompt=["one", "two"], temperature=0, max_tokens=4)
    assert answer["object"] == "text_completion"
    alone = [server.post("completions", model="law", prompt=p, temperature=0, max_tokens=4)["choices"][0]["text"]
             for p in ("one", "two")]
    assert [choice["text"] for choice in answer["choices"]] == alone


def test_embeddings_are_the_pooled_states_at_length_one(server: Server) -> None:
    got = server.post("embeddings", model="law", input=["a cat", "a long dog"])["data"]
    vectors = torch.tensor([row["embedding"] for row in got])
    assert torch.allclose(vectors.norm(dim=-1), torch.ones(2), atol=1e-5)
    (packed,) = server.post("embeddings", model="law", input="a cat", encoding_format="base64")["data"]
    assert torch.allclose(torch.tensor(struct.unpack("<32f", base64.b64decode(packed["embedding"]))), vectors[0], atol=1e-5)
    alone = torch.tensor(server.post("embeddings", model="law", input="a cat")["data"][0]["embedding"])
    assert torch.allclose(vectors[0], alone, atol=1e-5)
    bare = torch.tensor(server.post("embeddings", model="base", input="a cat")["data"][0]["embedding"])
    assert not torch.allclose(bare, alone, atol=1e-3), "the run's adapter acts"


def test_texts_to_embed_are_read_whole_or_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["x" * 256, "a cat", "y" * 200, "a long dog"]
    whole = server.post("embeddings", model="law", input=texts)["data"]
    monkeypatch.setattr(MODULE, "ROW", 260)  # in several rows they are what they were
    again = server.post("embeddings", model="law", input=texts)["data"]
    vectors, others = (torch.tensor([row["embedding"] for row in rows]) for rows in (whole, again))
    assert torch.allclose(vectors, others, atol=1e-5)
    assert not torch.allclose(vectors, others.roll(1, 0), atol=1e-2)
    code, message = server.refusal("embeddings", model="law", input=["a cat", "x" * 257])
    assert code == 400
    assert "input 1 cannot be read" in message
    assert "257 tokens, at most 256" in message


def test_an_encoder_embeds_and_does_not_chat(tmp_path: Path) -> None:
    save_tiny(tmp_path / "bert", "bert", dtype=torch.float32)
    serving = OpenAIServing(load_served_models({"bert": tmp_path / "bert"}))
    running = run_app(serving)
    server = Server(tmp_path, serving, next(running))
    assert len(server.post("embeddings", model="bert", input="a cat")["data"][0]["embedding"]) == 32
    code, message = server.refusal("chat/completions", model="bert", messages=[{"role": "user", "content": "Hi"}])
    assert code == 400
    assert "cannot generate text" in message
    next(running, None)


# ---------------------------------------------------------------- refusals


ONE = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(("code", "words", "body"), [
    (404, "did you mean 'law'", {"model": "lav", "messages": ONE}),
    (400, "tools", {"model": "law", "messages": ONE, "tools": [{"type": "function"}]}),
    (400, "response_format", {"model": "law", "messages": ONE, "response_format": {"type": "json_object"}}),
    (400, "at least one", {"model": "law", "messages": []}),
    (400, "image_url", {"model": "law", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
    (400, "temperature", {"model": "law", "messages": ONE, "temperature": 3}),
    (400, "max_tokens", {"model": "law", "messages": ONE, "max_tokens": 0}),
    (400, "a prompt of", {"model": "law", "messages": [{"role": "user", "content": "x" * 5000}]}),
    (400, "model", {"messages": ONE}),
    (400, "top_k", {"model": "law", "messages": ONE, "top_k": -2}),
    (400, "min_p", {"model": "law", "messages": ONE, "min_p": 2}),
    (400, "presence_penalty", {"model": "law", "messages": ONE, "presence_penalty": 3}),
    (400, "logit_bias", {"model": "law", "messages": ONE, "logit_bias": {"7": 101}}),
    (400, "logit_bias: 5000 is not a token", {"model": "law", "messages": ONE, "logit_bias": {"5000": 1}}),
    (400, "top_logprobs", {"model": "law", "messages": ONE, "logprobs": True, "top_logprobs": 21}),
    (400, "needs logprobs: true", {"model": "law", "messages": ONE, "top_logprobs": 2}),
    (400, "true or false", {"model": "law", "messages": ONE, "logprobs": 3}),
    (400, "stop", {"model": "law", "messages": ONE, "stop": ["a", "b", "c", "d", "e"]}),
    (400, "reasoning_effort", {"model": "law", "messages": ONE, "reasoning_effort": "high"}),
    (400, "'name' of a message with role 'user'", {"model": "law", "messages": [{**ONE[0], "name": "Ann"}]}),
    (400, "a function call has no name", {"model": "law", "messages": [*ONE, {
        "role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"arguments": "{}"}}]}]}),
])
def test_an_invalid_request_is_refused_with_its_reason(server: Server, code: int, words: str, body: dict[str, Any]) -> None:
    got, message = server.refusal("chat/completions", **body)
    assert got == code
    assert words in message
    assert text(server.chat("law", "Still there?")) is not None


def test_fields_that_change_no_output_are_accepted(server: Server) -> None:
    turn = {**ONE[0], "name": None, "tool_calls": None, "refusal": None, "annotations": []}
    body = {"messages": [turn], "user": "ann", "metadata": {"a": "b"}, "top_k": -1, "min_p": 0.0, "tools": [], "logit_bias": {}}
    answer = server.post("chat/completions", model="law", temperature=0, max_tokens=12, **body)
    assert text(answer) == text(server.chat("law", "Hi"))


def test_an_error_of_the_chat_template_is_reported(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    monkeypatch.setattr(server.serving.served.base.tokenizer, "chat_template", template)
    code, message = server.refusal("chat/completions", model="law", messages=ONE)
    assert code == 400
    assert "roles must alternate" in message


def test_a_run_with_virtual_tokens_has_a_shorter_context_and_shares_a_batch(server: Server, tmp_path: Path) -> None:
    luthier.train(model=str(server.path / "base"), data=str(server.path / "law.jsonl"), output_dir=str(tmp_path / "soft"), quiet=True,
                  method={"name": "prompt", "num_virtual_tokens": 20}, **{"training.max_steps": 1})
    serving = OpenAIServing(load_served_models({"soft": tmp_path / "soft", "law": server.path / "law"}))
    serving.engine.start()
    try:
        long = {"prompt": "x" * 240, "max_tokens": 3, "temperature": 0}
        assert serving.served.context_lengths == {"base": 256, "law": 256, "soft": 236}
        with pytest.raises(RecipeError, match="240 tokens, and this model reads 1 to 235"):
            serving.build_requests({"model": "soft", **long}, chat=False)
        _, (whole,) = serving.build_requests({"model": "law", **long}, chat=False)
        _, (fits,) = serving.build_requests({"model": "soft", **long, "prompt": "x" * 235}, chat=False)
        emitted: list[TokenDelta] = []
        for one in (whole, fits):
            serving.engine.submit(one, emitted.append)
        while sum(bool(delta.finish_reason or delta.error) for delta in emitted) < 2:
            time.sleep(0.01)
        assert [delta.error for delta in emitted if delta.finish_reason] == [None, None]
    finally:
        serving.engine.close()


def test_each_batch_of_a_group_samples_with_other_random_numbers(server: Server) -> None:
    serving = OpenAIServing(server.serving.served, max_num_seqs=2)
    serving.engine.start()
    try:
        asked = {"model": "base", "prompt": "Numbers?", "temperature": 1.0, "max_tokens": 12, "seed": 7, "n": 4}

        async def complete() -> list[str]:
            return [choice["text"] for choice in (await serving.complete(*serving.build_requests(asked, False), False))["choices"]]

        answers = asyncio.run(complete())
        assert len(set(answers)) == 4
        assert asyncio.run(complete()) == answers
    finally:
        serving.engine.close()


def test_runs_have_the_whole_name_of_their_folder(tmp_path: Path) -> None:
    assert name_runs(["runs/lora-0.1", "runs/lora-0.2", "law=runs/x"]) == {
        "lora-0.1": "runs/lora-0.1", "lora-0.2": "runs/lora-0.2", "law": "runs/x"}
    (tmp_path / "lr=0.1").mkdir()
    assert list(name_runs([str(tmp_path / "lr=0.1")])) == ["lr=0.1"]
    with pytest.raises(RecipeError, match="have the name 'law'"):
        name_runs(["a/law", "law=b"])


def test_a_body_that_is_no_json_is_refused(server: Server) -> None:
    with pytest.raises(HTTPError) as caught:
        urlopen(Call(f"{server.url}/chat/completions", b"{", {"Content-Type": "application/json"}))
    assert caught.value.code == 400
    assert "not JSON" in json.load(caught.value)["error"]["message"]


def test_a_taken_port_is_refused_before_anything_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(RecipeError, match="cannot listen"):
            luthier.serve(["no such run"], port=taken.getsockname()[1])


def test_whole_models_and_other_bases_are_not_served_together(server: Server, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="serve it separately"):
        load_served_models({"law": server.path / "law", "whole": server.path / "base"})
    with pytest.raises(RecipeError, match="nothing to serve"):
        load_served_models({})


def test_a_failure_is_reported_to_every_request_and_the_engine_goes_on(server: Server, monkeypatch: pytest.MonkeyPatch,
                                                                 capsys: pytest.CaptureFixture[str]) -> None:
    engine: InferenceEngine = server.serving.engine
    with monkeypatch.context() as broken:
        broken.setattr(engine._engine, "step", lambda: [][1])
        emitted: list[TokenDelta] = []
        engine.submit(Request([1, 2]), emitted.append)
        while not emitted:
            time.sleep(0.01)
        assert "the server failed" in str(emitted[0].error)
    assert "IndexError" in capsys.readouterr().err, "the trace is not hidden"
    assert text(server.chat("law", "Still there?")) is not None


def test_a_cancelled_request_gets_no_more_deltas(server: Server) -> None:
    engine: InferenceEngine = server.serving.engine
    emitted: list[TokenDelta] = []
    request = engine.submit(Request([1, 2, 3], "law", SamplingParams(40)), emitted.append)
    request.cancelled = True
    assert text(server.chat("law", "Next?")) is not None
    assert not any(delta.finish_reason for delta in emitted)


# ---------------------------------------------------------------- the clients that people use


def test_the_openai_client(server: Server) -> None:
    openai = pytest.importorskip("openai", reason="the client is not installed")
    client = openai.OpenAI(base_url=server.url, api_key="none")
    assert [model.id for model in client.models.list()] == ["base", *RUNS]
    asked: dict[str, Any] = {"model": "medicine", "messages": [{"role": "user", "content": "Who?"}], "temperature": 0,
                             "max_tokens": 12}
    wanted = text(server.chat("medicine", "Who?"))
    assert client.chat.completions.create(**asked).choices[0].message.content == wanted
    chunks = client.chat.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == wanted
    plain, own = (client.embeddings.create(model="law", input="a cat", **form).data[0].embedding
                  for form in ({"encoding_format": "float"}, {}))  # the client's own choice is base64
    assert len(plain) == 32
    assert own == pytest.approx(plain, abs=1e-6)
    with pytest.raises(openai.NotFoundError, match="did you mean"):
        client.chat.completions.create(**{**asked, "model": "medicin"})


def test_langchain(server: Server) -> None:
    langchain = pytest.importorskip("langchain_openai", reason="LangChain's client is not installed")
    model = langchain.ChatOpenAI(base_url=server.url, api_key="none", model="law", temperature=0, max_tokens=12)
    wanted = text(server.chat("law", "Who?"))
    assert model.invoke("Who?").content == wanted
    assert "".join(chunk.content for chunk in model.stream("Who?")) == wanted
    assert [answer.content for answer in model.batch(["Who?", "Who?"])] == [wanted] * 2
