"""The verb `serve`: runs and bases behind the protocol that OpenAI's client speaks. Read `serving/engine.py` first.

    GET  /v1/models              the base and every run on it, by their names
    POST /v1/chat/completions    a conversation; `stream: true` sends it word by word
    POST /v1/completions         a text that is gone on with
    POST /v1/embeddings          pooled states, of length 1

`model` in a request names who answers: a run, or the base itself. All runs stand on one copy of the base, and requests
to different ones are answered in one batch. What would change an answer and is not known here is refused, never
ignored. The only file that imports starlette and uvicorn.
"""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field, ValidationError
from torch import Tensor

from luthier import assembly
from luthier.assembly.multi_adapter_loading import ServedModels, display_name, load_served_models
from luthier.core.errors import LuthierError, MissingExtra, RecipeError
from luthier.core.examples import Message
from luthier.reporting.progress import print_line, status
from luthier.serving.engine import InferenceEngine, Request, TokenDelta

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.responses import Response

LONGEST = 1024  # tokens of an answer where the request does not say
# What would change the answer and is not known here: the values that ask for nothing.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "response_format": ({"type": "text"},),
    "logprobs": (False, 0), "top_logprobs": (0,), "logit_bias": ({},), "presence_penalty": (0,),
    "frequency_penalty": (0,), "echo": (False,), "suffix": ("",), "best_of": (1,), "dimensions": (),
    "modalities": (["text"],), "top_k": (0, -1), "min_p": (0,), "repetition_penalty": (1,),
}
# What changes no answer: who asks, and how a host of others' models keeps books.
ASIDE = frozenset({"user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier",
                   "prompt_cache_key", "prompt_cache_retention", "prediction"})
ASIDE_IN_TURN = frozenset({"refusal", "annotations"})


class ChatMessage(BaseModel):
    """One message, read as a row's is; `content` is a text, or parts of which each is a text."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    def message(self) -> Message:
        parts = self.content if isinstance(self.content, list) else []
        if strange := next((part.get("type") for part in parts if part.get("type") != "text"), None):
            raise RecipeError(f"a message has a part of type {strange!r}, and this model reads text", "send text alone")
        try:
            return assembly.rows.read_turn(self.model_dump(exclude_none=True))
        except assembly.rows.InvalidRowError as unfit:
            raise RecipeError(f"messages: {unfit.reason}" + (f" ({unfit.detail})" if unfit.detail else ""),
                              "fix that message") from None


class CompletionRequest(BaseModel):
    """What chat and text completions have in common, with the protocol's own defaults."""

    model: str
    messages: list[ChatMessage] = Field(default_factory=list)
    prompt: str | list[str] = Field(default_factory=list)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1, le=16)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None


class EmbeddingRequest(BaseModel):
    """What is asked of the embeddings."""

    model: str
    input: str | list[str]
    encoding_format: Literal["float", "base64"] = "float"  # the second is what OpenAI's own client asks for by itself


# ---------------------------------------------------------------- the protocol, without a server


class OpenAIServing:
    """Turns bodies of requests into answers of the protocol.

    Args:
        served: what answers.
        max_num_seqs: requests in one batch.
    """

    def __init__(self, served: ServedModels, max_num_seqs: int = 16) -> None:
        self.served = served
        self.desk = InferenceEngine(served.base, served.numbers, max_num_seqs)
        self.born = int(time.time())

    def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": self.born, "owned_by": "luthier"}
                                           for name in self.served.names]}

    async def embeddings(self, body: Mapping[str, Any]) -> dict[str, Any]:
        asked = _parse_request(EmbeddingRequest, body)
        texts = [asked.input] if isinstance(asked.input, str) else asked.input
        if not texts:
            raise RecipeError("input: there is no text to embed", "send one text at least")
        states = await asyncio.wrap_future(self.desk.run(lambda: self.served.states(asked.model, texts)))
        rows = [_encode_embedding(row, asked.encoding_format) for row in states / states.norm(dim=-1, keepdim=True)]
        used = sum(len(self.served.base.tokenizer(text)["input_ids"]) for text in texts)
        return {"object": "list", "model": asked.model, "usage": {"prompt_tokens": used, "total_tokens": used},
                "data": [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(rows)]}

    def requests(self, body: Mapping[str, Any], chat: bool) -> tuple[CompletionRequest, list[Request]]:
        """The answers that a body asks for: `n` for each prompt. Raises `RecipeError` for what cannot be."""
        asked = _parse_request(CompletionRequest, body)
        adapter = self.served.adapter(asked.model)
        if not self.served.can_generate:
            raise RecipeError(f"{asked.model!r} reads and does not write", "ask it for /v1/embeddings")
        if chat and not asked.messages:
            raise RecipeError("messages: a conversation has at least one", "send messages")
        texts = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
        prompts = ([self.served.prompt(asked.model, [turn.message() for turn in asked.messages])] if chat
                   else [self.served.continued(asked.model, text) for text in texts])
        room = self.served.rooms[asked.model]
        for prompt in prompts or [[]]:
            if not 0 < len(prompt) < room:
                raise RecipeError(f"a prompt of {len(prompt)} tokens, and this model reads 1 to {room - 1}, with "
                                  "room for an answer", "send another prompt")
        stop = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ())
        one = Request((), adapter, asked.max_completion_tokens or asked.max_tokens or LONGEST, asked.temperature,
                      asked.top_p, asked.seed, uuid.uuid4().hex, tuple(s for s in stop if s))
        several = [prompt for prompt in prompts for _ in range(asked.n)]
        return asked, [replace(one, prompt=prompt, place=place) for place, prompt in enumerate(several)]

    async def bits(self, requests: Sequence[Request]) -> AsyncIterator[tuple[int, TokenDelta]]:
        """(which answer, its next bit) until all have ended. Whoever stops listening cancels them."""
        loop, heard = asyncio.get_running_loop(), asyncio.Queue[tuple[int, TokenDelta]]()

        def tell(index: int, bit: TokenDelta) -> None:
            loop.call_soon_threadsafe(heard.put_nowait, (index, bit))

        left = set(range(len(requests)))
        try:
            for index, request in enumerate(requests):
                self.desk.ask(request, partial(tell, index))
            while left:
                index, bit = await heard.get()
                if bit.error is not None:
                    raise bit.error
                if bit.end:
                    left.discard(index)
                yield index, bit
        finally:
            for request in requests:
                request.cancelled = True

    async def answered(self, asked: CompletionRequest, requests: Sequence[Request], chat: bool) -> dict[str, Any]:
        """The whole answer at once."""
        texts, last = [""] * len(requests), [TokenDelta("")] * len(requests)
        async for index, bit in self.bits(requests):
            texts[index] += bit.text
            last[index] = bit
        choices = [{"index": i, "finish_reason": bit.end, "logprobs": None, **(
            {"message": {"role": "assistant", "content": text}} if chat else {"text": text})}
            for i, (text, bit) in enumerate(zip(texts, last, strict=True))]
        return {**_build_response_head(asked, chat, ""), "choices": choices,
                "usage": _count_usage(asked, requests, last)}

    async def streamed(self, asked: CompletionRequest, requests: Sequence[Request], chat: bool) -> AsyncIterator[str]:
        """The answer as server-sent events. What fails once it has begun is told as an event."""
        head, last = _build_response_head(asked, chat, ".chunk" if chat else ""), [TokenDelta("")] * len(requests)

        def event(index: int, said: dict[str, Any], end: str | None) -> str:
            inner = {"delta": said} if chat else {"text": said.get("content", "")}
            return _format_event({**head, "choices": [{"index": index, **inner, "logprobs": None,
                                                       "finish_reason": end}]})

        if chat:
            for index in range(len(requests)):
                yield event(index, {"role": "assistant", "content": ""}, None)
        try:
            async for index, bit in self.bits(requests):
                last[index] = bit
                yield event(index, {"content": bit.text} if bit.text else {}, bit.end or None)
        except LuthierError as error:
            yield _format_event(_format_error(error))
            return
        if (asked.stream_options or {}).get("include_usage"):
            yield _format_event({**head, "choices": [], "usage": _count_usage(asked, requests, last)})
        yield "data: [DONE]\n\n"


def _parse_request(kind: type[Any], body: Mapping[str, Any]) -> Any:
    """A body as its type. Raises `RecipeError` naming every fault, and everything that would silently be ignored."""
    _refuse_unknown(body, kind, "")
    turns = body.get("messages")
    for number, turn in enumerate(turns if isinstance(turns, list) else ()):
        if isinstance(turn, Mapping):
            _refuse_unknown(turn, ChatMessage, f"messages.{number}.")
    try:
        return kind.model_validate({key: value for key, value in body.items() if value is not None})
    except ValidationError as error:
        raise RecipeError("; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']} (got {fault['input']!r})"
                                    for fault in error.errors(include_url=False)), "mend the request") from None


def _encode_embedding(row: Tensor, encoding: str) -> list[float] | str:
    """Numbers as they are, or the bytes of their float32, the lowest first, in base64."""
    if encoding == "float":
        numbers: list[float] = row.tolist()
        return numbers
    return base64.b64encode(row.numpy().astype("<f4").tobytes()).decode()


def _refuse_unknown(body: Mapping[str, Any], kind: type[BaseModel], where: str) -> None:
    """Raises `RecipeError` for what is said and not known: who said it expects another answer than would come."""
    aside = ASIDE_IN_TURN if kind is ChatMessage else ASIDE
    for name, value in body.items():
        if name in kind.model_fields or name in aside or value is None or value == []:
            continue
        if value not in NEUTRAL.get(name, ()):
            raise RecipeError(f"{where}{name}: {value!r} would change the answer, and this server does not know it",
                              f"leave {name} out")


def _build_response_head(asked: CompletionRequest, chat: bool, form: str) -> dict[str, Any]:
    return {"id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", "created": int(time.time()),
            "model": asked.model, "object": f"{'chat' if chat else 'text'}{'.' if chat else '_'}completion{form}"}


def _count_usage(asked: CompletionRequest, requests: Sequence[Request], last: Sequence[TokenDelta]) -> dict[str, int]:
    read = sum(len(request.prompt) for request in requests[::asked.n])
    written = sum(bit.tokens for bit in last)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _format_event(content: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _format_error(error: LuthierError) -> dict[str, Any]:
    return {"error": {"message": str(error), "type": "invalid_request_error", "param": None,
                      "code": type(error).__name__}}


# ---------------------------------------------------------------- the server


def build_app(counter: OpenAIServing) -> Starlette:
    """The protocol over HTTP."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request as Call
    from starlette.responses import JSONResponse, StreamingResponse
    from starlette.routing import Route

    async def body_of(call: Call) -> dict[str, Any]:
        try:
            body = await call.json()
        except ValueError:
            raise RecipeError("the body is no JSON", "send a JSON object") from None
        if not isinstance(body, dict):
            raise RecipeError(f"the body is a {type(body).__name__}", "send a JSON object")
        return body

    async def models(call: Call) -> Response:
        return JSONResponse(counter.models())

    async def completions(call: Call, chat: bool) -> Response:
        asked, requests = await run_in_threadpool(counter.requests, await body_of(call), chat)
        if asked.stream:
            return StreamingResponse(counter.streamed(asked, requests, chat), media_type="text/event-stream")
        return JSONResponse(await counter.answered(asked, requests, chat))

    async def embeddings(call: Call) -> Response:
        return JSONResponse(await counter.embeddings(await body_of(call)))

    async def refused(call: Call, error: Exception) -> Response:
        assert isinstance(error, LuthierError)
        return JSONResponse(_format_error(error), 404 if "there is no model" in error.what else 400)

    async def chat(call: Call) -> Response:
        return await completions(call, True)

    async def text(call: Call) -> Response:
        return await completions(call, False)

    routes = [Route("/v1/models", models), Route("/v1/chat/completions", chat, methods=["POST"]),
              Route("/v1/completions", text, methods=["POST"]), Route("/v1/embeddings", embeddings, methods=["POST"])]
    return Starlette(routes=routes, exception_handlers={LuthierError: refused})


def serve(runs: Sequence[str] | Mapping[str, str], *, host: str = "127.0.0.1", port: int = 8000, max_num_seqs: int = 16,
          quiet: bool = False, base_model: str | None = None) -> None:
    """Answer until interrupted.

    Args:
        runs: run folders, a base, or names for them: ``{"law": "runs/law"}`` or ``["law=runs/law"]``; a folder's own
            name where none is given.
        host: the address to listen on; 0.0.0.0 lets other machines in, whoever they are.
        max_num_seqs: requests answered in one batch.
        base_model: where the base of the runs is now, if it was moved.

    Raises:
        MissingExtra: starlette or uvicorn is not installed.
        LuthierError: something cannot be served.
    """
    for package in ("starlette", "uvicorn"):
        if find_spec(package) is None:
            raise MissingExtra(package, "serve", "luthier serve")
    import uvicorn
    found = dict(runs) if isinstance(runs, Mapping) else name_runs(runs)
    door = _open_socket(host, port)
    with status("loading", quiet=quiet):
        counter = OpenAIServing(load_served_models(found, base_model, partial(print_line, quiet=quiet)), max_num_seqs)
    if not quiet:
        address = f"http://{host}:{door.getsockname()[1]}/v1"
        print(f"serving {', '.join(counter.served.names)} at {address}  (Ctrl-C ends)", flush=True)
    try:
        uvicorn.Server(uvicorn.Config(build_app(counter), log_level="warning")).run(sockets=[door])
    finally:
        counter.desk.close()


def name_runs(runs: Sequence[str]) -> dict[str, str]:
    """Runs by the names that they are given, as NAME=RUN, or else by their own. Raises `RecipeError` for one name
    twice."""
    found: dict[str, str] = {}
    for word in runs:
        name, given, run = word.partition("=")
        name, run = (name, run) if given and not Path(word).exists() else (display_name(word), word)
        if name in found:
            raise RecipeError(f"two of {', '.join(runs)} have the name {name!r}", "name them: NAME=RUN")
        found[name] = run
    return found


def _open_socket(host: str, port: int) -> socket.socket:
    """A socket that listens, before any model is loaded. Raises `RecipeError` where it cannot."""
    door = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        door.bind((host, port))
    except (OSError, OverflowError) as error:
        door.close()
        raise RecipeError(f"nothing can listen at {host}:{port}: {error}", "choose another --port or --host") from None
    return door
