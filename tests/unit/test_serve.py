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
from dataclasses import dataclass, replace
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
from luthier.api.serve import OpenAIServing, _open_socket, build_app, name_runs
from luthier.assembly.multi_adapter_loading import load_served_models
from luthier.core.errors import RecipeError
from luthier.core.examples import Message
from luthier.core.protocols import SamplingParams
from luthier.serving.engine import InferenceEngine, Request, TokenDelta
from tiny import save_tiny

RUNS = ("law", "medicine")
MODULE = import_module("luthier.assembly.multi_adapter_loading")  # the name `luthier.assembly.multi_adapter_loading` is a function


@dataclass
class House:
    """A server of two runs on one tiny base, at an address of this machine."""

    path: Path
    counter: OpenAIServing
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


def opened(counter: OpenAIServing) -> Iterator[str]:
    door = _open_socket("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(build_app(counter), log_level="error"))
    thread = Thread(target=server.run, kwargs={"sockets": [door]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{door.getsockname()[1]}/v1"
    server.should_exit = True
    thread.join()
    counter.desk.close()


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    home = tmp_path_factory.mktemp("served")
    save_tiny(home / "base", "llama", dtype=torch.float32)
    for number, name in enumerate(RUNS):
        rows = [{"prompt": f"{name} {i}?", "completion": "abcdefgh"[number * 4:][:4] * (1 + i)} for i in range(4)]
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        luthier.train(model=str(home / "base"), data=str(home / f"{name}.jsonl"), output_dir=str(home / name), quiet=True,
                      **{"training.max_steps": 6, "optimizer.learning_rate": 0.05, "seed": number})
    counter = OpenAIServing(load_served_models({name: home / name for name in RUNS}))
    server = opened(counter)
    yield House(home, counter, next(server))
    next(server, None)


def text(answer: Any) -> str:
    return answer["choices"][0]["message"]["content"]


# ---------------------------------------------------------------- answers


def test_every_run_answers_by_its_name_as_it_does_in_python(house: House) -> None:
    with urlopen(f"{house.url}/models") as got:
        assert [model["id"] for model in json.load(got)["data"]] == ["base", *RUNS]
    tuned = luthier.load_adapters(str(house.path / "base"), {name: house.path / name for name in RUNS})
    wanted = {name: tuned.answer(["Who?"], None if name == "base" else name, SamplingParams(max_new_tokens=12))[0]
              for name in ("base", *RUNS)}
    assert {name: text(house.chat(name, "Who?")) for name in wanted} == wanted
    assert len(set(wanted.values())) == 3, "each answers in its own way, or this says nothing"


def test_requests_to_different_runs_share_a_batch_and_do_not_touch_each_other(house: House) -> None:
    asked = [(name, f"Why {i}?") for i in range(4) for name in ("base", *RUNS)]
    alone = [text(house.chat(*one)) for one in asked]
    before = house.counter.desk.batches
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(lambda one: text(house.chat(*one)), asked))
    assert together == alone
    assert house.counter.desk.batches - before < len(asked), "some of them waited and went together"


def test_a_stream_says_the_same_words(house: House) -> None:
    whole = house.chat("law", "Stream?")
    body = {"model": "law", "messages": [{"role": "user", "content": "Stream?"}], "temperature": 0, "max_tokens": 12,
            "stream": True, "stream_options": {"include_usage": True}}
    with urlopen(Call(f"{house.url}/chat/completions", json.dumps(body).encode())) as got:
        assert got.headers["Content-Type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in got.read().decode().split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    events = [json.loads(line) for line in lines]
    assert events[-1]["usage"] == whole["usage"]
    said = [event["choices"][0] for event in events[:-1]]
    assert "".join(choice["delta"].get("content", "") for choice in said) == text(whole)
    assert said[-1]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert len(said) > 3, "it came in bits"


def test_lengths_stops_and_usage(house: House) -> None:
    whole = house.chat("law", "Long?", max_tokens=12)
    short = house.chat("law", "Long?", max_completion_tokens=3, max_tokens=None)
    assert short["usage"]["completion_tokens"] == 3
    assert short["choices"][0]["finish_reason"] == "length"
    assert text(whole).startswith(text(short))
    cut = text(whole)[2:4]
    stopped = house.chat("law", "Long?", stop=["never said", cut])
    assert text(stopped) == text(whole)[:text(whole).index(cut)]
    assert stopped["choices"][0]["finish_reason"] == "stop"
    assert whole["usage"]["total_tokens"] == whole["usage"]["prompt_tokens"] + whole["usage"]["completion_tokens"]


def test_a_seed_decides_whoever_else_asks(house: House) -> None:
    def thrown(seed: int | None) -> str:
        return text(house.chat("base", "Dice?", temperature=1.0, seed=seed))
    first = thrown(7)
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(thrown, [7, 7, 7, 7])) == [first] * 4
        assert len(set(pool.map(thrown, [None] * 6))) > 1, "without one each throws its own dice"
    several = house.chat("base", "Dice?", temperature=1.0, seed=7, n=3)["choices"]
    assert [choice["index"] for choice in several] == [0, 1, 2]
    assert len({choice["message"]["content"] for choice in several}) > 1


def test_what_samples_otherwise_waits_for_the_next_batch() -> None:
    one = Request([1], "law", 5, 0.5, 0.9, 7, "group", ("x",), 1)
    assert one.alike(replace(one, adapter="medicine", max_new_tokens=9, stop=(), place=2, prompt=[2, 3]))
    for other in ({"temperature": 0.6}, {"top_p": 0.8}, {"seed": 8}, {"seed": None}, {"group": "another"}):
        assert not one.alike(replace(one, **other)), other
    free = replace(one, seed=None)
    assert free.alike(replace(free, group="another"))


def test_a_runs_own_system_prompt_stands_where_none_is_brought(house: House, tmp_path: Path) -> None:
    luthier.train(model=str(house.path / "base"), data=str(house.path / "law.jsonl"), output_dir=str(tmp_path / "told"), quiet=True,
                  **{"training.max_steps": 1, "data.system": "Be brief."})
    served = load_served_models({"told": tmp_path / "told", "law": house.path / "law"})
    said = {name: served.base.tokenizer.decode(served.prompt(name, [Message("user", "Hi")])) for name in ("told", "law", "base")}
    assert "Be brief." in said["told"]
    assert said["law"] == said["base"] == said["told"].replace("<|im_start|>system\nBe brief.<|im_end|>\n", "")
    own = served.prompt("told", [Message("system", "Be long."), Message("user", "Hi")])
    assert "Be brief." not in served.base.tokenizer.decode(own)


def test_a_text_is_gone_on_with(house: House) -> None:
    answer = house.post("completions", model="law", prompt=["one", "two"], temperature=0, max_tokens=4)
    assert answer["object"] == "text_completion"
    alone = [house.post("completions", model="law", prompt=p, temperature=0, max_tokens=4)["choices"][0]["text"]
             for p in ("one", "two")]
    assert [choice["text"] for choice in answer["choices"]] == alone


def test_embeddings_are_the_pooled_states_at_length_one(house: House) -> None:
    got = house.post("embeddings", model="law", input=["a cat", "a long dog"])["data"]
    vectors = torch.tensor([row["embedding"] for row in got])
    assert torch.allclose(vectors.norm(dim=-1), torch.ones(2), atol=1e-5)
    (packed,) = house.post("embeddings", model="law", input="a cat", encoding_format="base64")["data"]
    assert torch.allclose(torch.tensor(struct.unpack("<32f", base64.b64decode(packed["embedding"]))), vectors[0], atol=1e-5)
    alone = torch.tensor(house.post("embeddings", model="law", input="a cat")["data"][0]["embedding"])
    assert torch.allclose(vectors[0], alone, atol=1e-5)
    bare = torch.tensor(house.post("embeddings", model="base", input="a cat")["data"][0]["embedding"])
    assert not torch.allclose(bare, alone, atol=1e-3), "the run's adapter acts"


def test_texts_to_embed_are_read_whole_or_refused(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["x" * 256, "a cat", "y" * 200, "a long dog"]
    whole = house.post("embeddings", model="law", input=texts)["data"]
    monkeypatch.setattr(MODULE, "ROW", 260)  # in several rows they are what they were
    again = house.post("embeddings", model="law", input=texts)["data"]
    vectors, others = (torch.tensor([row["embedding"] for row in rows]) for rows in (whole, again))
    assert torch.allclose(vectors, others, atol=1e-5)
    assert not torch.allclose(vectors, others.roll(1, 0), atol=1e-2)
    code, said = house.refusal("embeddings", model="law", input=["a cat", "x" * 257])
    assert code == 400
    assert "input 1 cannot be read" in said
    assert "257 tokens, at most 256" in said


def test_an_encoder_embeds_and_does_not_chat(tmp_path: Path) -> None:
    save_tiny(tmp_path / "bert", "bert", dtype=torch.float32)
    counter = OpenAIServing(load_served_models({"bert": tmp_path / "bert"}))
    server = opened(counter)
    house = House(tmp_path, counter, next(server))
    assert len(house.post("embeddings", model="bert", input="a cat")["data"][0]["embedding"]) == 32
    code, said = house.refusal("chat/completions", model="bert", messages=[{"role": "user", "content": "Hi"}])
    assert code == 400
    assert "reads and does not write" in said
    next(server, None)


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
    (400, "top_k: 1 would change the answer", {"model": "law", "messages": ONE, "top_k": 1}),
    (400, "reasoning_effort", {"model": "law", "messages": ONE, "reasoning_effort": "high"}),
    (400, "'name' of a message with role 'user'", {"model": "law", "messages": [{**ONE[0], "name": "Ann"}]}),
    (400, "a function call has no name", {"model": "law", "messages": [*ONE, {
        "role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"arguments": "{}"}}]}]}),
])
def test_what_cannot_be_is_refused_with_its_reason(house: House, code: int, words: str, body: dict[str, Any]) -> None:
    got, said = house.refusal("chat/completions", **body)
    assert got == code
    assert words in said
    assert text(house.chat("law", "Still there?")) is not None


def test_what_changes_no_answer_is_let_through(house: House) -> None:
    turn = {**ONE[0], "name": None, "tool_calls": None, "refusal": None, "annotations": []}
    body = {"messages": [turn], "user": "ann", "metadata": {"a": "b"}, "top_k": -1, "min_p": 0.0, "tools": [], "logit_bias": {}}
    answer = house.post("chat/completions", model="law", temperature=0, max_tokens=12, **body)
    assert text(answer) == text(house.chat("law", "Hi"))


def test_what_the_chat_template_refuses_is_told(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    monkeypatch.setattr(house.counter.served.base.tokenizer, "chat_template", template)
    code, said = house.refusal("chat/completions", model="law", messages=ONE)
    assert code == 400
    assert "roles must alternate" in said


def test_a_run_with_virtual_tokens_reads_less_and_spoils_nobodys_batch(house: House, tmp_path: Path) -> None:
    luthier.train(model=str(house.path / "base"), data=str(house.path / "law.jsonl"), output_dir=str(tmp_path / "soft"), quiet=True,
                  method={"name": "prompt", "num_virtual_tokens": 20}, **{"training.max_steps": 1})
    counter = OpenAIServing(load_served_models({"soft": tmp_path / "soft", "law": house.path / "law"}))
    try:
        long = {"prompt": "x" * 240, "max_tokens": 3, "temperature": 0}
        assert counter.served.rooms == {"base": 256, "law": 256, "soft": 236}
        with pytest.raises(RecipeError, match="240 tokens, and this model reads 1 to 235"):
            counter.requests({"model": "soft", **long}, chat=False)
        _, (whole,) = counter.requests({"model": "law", **long}, chat=False)
        _, (fits,) = counter.requests({"model": "soft", **long, "prompt": "x" * 235}, chat=False)
        heard: list[TokenDelta] = []
        with counter.desk._bell:  # both in one batch
            for one in (whole, fits):
                counter.desk._waiting.append(replace(one, tell=heard.append))
            counter.desk._bell.notify()
        while sum(bool(bit.end or bit.error) for bit in heard) < 2:
            time.sleep(0.01)
        assert [bit.error for bit in heard if bit.end] == [None, None]
    finally:
        counter.desk.close()


def test_a_group_of_more_than_one_batch_throws_other_dice_in_each(house: House) -> None:
    counter = OpenAIServing(house.counter.served, max_num_seqs=2)
    try:
        asked = {"model": "base", "prompt": "Dice?", "temperature": 1.0, "max_tokens": 12, "seed": 7, "n": 4}

        async def said() -> list[str]:
            return [choice["text"] for choice in (await counter.answered(*counter.requests(asked, False), False))["choices"]]

        answers = asyncio.run(said())
        assert len(set(answers)) == 4
        assert asyncio.run(said()) == answers
    finally:
        counter.desk.close()


def test_runs_are_called_by_their_whole_names(tmp_path: Path) -> None:
    assert name_runs(["runs/lora-0.1", "runs/lora-0.2", "law=runs/x"]) == {
        "lora-0.1": "runs/lora-0.1", "lora-0.2": "runs/lora-0.2", "law": "runs/x"}
    (tmp_path / "lr=0.1").mkdir()
    assert list(name_runs([str(tmp_path / "lr=0.1")])) == ["lr=0.1"]
    with pytest.raises(RecipeError, match="have the name 'law'"):
        name_runs(["a/law", "law=b"])


def test_a_broken_body_is_told(house: House) -> None:
    with pytest.raises(HTTPError) as caught:
        urlopen(Call(f"{house.url}/chat/completions", b"{"))
    assert caught.value.code == 400
    assert "no JSON" in json.load(caught.value)["error"]["message"]


def test_a_port_that_is_taken_is_told_before_anything_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(RecipeError, match="nothing can listen"):
            luthier.serve(["no such run"], port=taken.getsockname()[1])


def test_whole_models_and_other_bases_are_not_served_together(house: House, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="by itself"):
        load_served_models({"law": house.path / "law", "whole": house.path / "base"})
    with pytest.raises(RecipeError, match="nothing to serve"):
        load_served_models({})


def test_a_failure_is_told_to_whoever_waits_and_the_desk_goes_on(house: House, monkeypatch: pytest.MonkeyPatch,
                                                                 capsys: pytest.CaptureFixture[str]) -> None:
    desk: InferenceEngine = house.counter.desk
    with monkeypatch.context() as broken:
        broken.setattr(type(desk.family), "tokens", lambda *_: iter([(99, 1)]))
        heard: list[TokenDelta] = []
        desk.ask(Request([1, 2]), heard.append)
        while not heard:
            time.sleep(0.01)
        assert "the server failed" in str(heard[0].error)
    assert "IndexError" in capsys.readouterr().err, "the trace is not hidden"
    assert text(house.chat("law", "Still there?")) is not None


def test_whoever_hangs_up_is_told_no_more(house: House) -> None:
    desk: InferenceEngine = house.counter.desk
    heard: list[TokenDelta] = []
    request = desk.ask(Request([1, 2, 3], "law", 40), heard.append)
    request.cancelled = True
    assert text(house.chat("law", "Next?")) is not None
    assert not any(bit.end for bit in heard)


# ---------------------------------------------------------------- the clients that people use


def test_the_openai_client(house: House) -> None:
    openai = pytest.importorskip("openai", reason="the client is not installed")
    client = openai.OpenAI(base_url=house.url, api_key="none")
    assert [model.id for model in client.models.list()] == ["base", *RUNS]
    asked: dict[str, Any] = {"model": "medicine", "messages": [{"role": "user", "content": "Who?"}], "temperature": 0,
                             "max_tokens": 12}
    wanted = text(house.chat("medicine", "Who?"))
    assert client.chat.completions.create(**asked).choices[0].message.content == wanted
    chunks = client.chat.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == wanted
    plain, own = (client.embeddings.create(model="law", input="a cat", **form).data[0].embedding
                  for form in ({"encoding_format": "float"}, {}))  # the client's own choice is base64
    assert len(plain) == 32
    assert own == pytest.approx(plain, abs=1e-6)
    with pytest.raises(openai.NotFoundError, match="did you mean"):
        client.chat.completions.create(**{**asked, "model": "medicin"})


def test_langchain(house: House) -> None:
    langchain = pytest.importorskip("langchain_openai", reason="LangChain's client is not installed")
    model = langchain.ChatOpenAI(base_url=house.url, api_key="none", model="law", temperature=0, max_tokens=12)
    wanted = text(house.chat("law", "Who?"))
    assert model.invoke("Who?").content == wanted
    assert "".join(chunk.content for chunk in model.stream("Who?")) == wanted
    assert [answer.content for answer in model.batch(["Who?", "Who?"])] == [wanted] * 2
