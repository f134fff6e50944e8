"""OpenAI's protocol over HTTP. The only file that imports starlette and uvicorn. Read `openai_serving.py` first.

    GET    /v1/models              the base and every run on it, by name
    GET    /v1/models/NAME         one of them
    DELETE /v1/models/NAME         serve a run no more
    POST   /v1/chat/completions    a conversation; `stream: true` streams the answer
    POST   /v1/completions         the continuation of a text
    POST   /v1/embeddings          pooled states of length 1
    GET    /health, /metrics       whether the server is up; counters as Prometheus reads them
"""

from __future__ import annotations

import hmac
import json
import socket
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from luthier.core.errors import LuthierError, MissingExtra, RecipeError
from luthier.serving.engine import QueueFull
from luthier.serving.openai_protocol import TooLarge, Unauthorized, find_status, format_error
from luthier.serving.openai_serving import OpenAIServing

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request as HTTPRequest
    from starlette.responses import Response

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class AccessRules:
    """Who may use the server.

    Args:
        api_key: what clients send as `Authorization: Bearer KEY`; empty: no key is needed.
        host: the address that is listened on. On loopback, requests must name it in their Host header, so that no web
            page can reach the server under a name that points here.
        max_body_bytes: of a request.
    """

    api_key: str = ""
    host: str = "127.0.0.1"
    max_body_bytes: int = 10_000_000

    def __post_init__(self) -> None:
        if self.host not in LOOPBACK and not self.api_key:
            raise RecipeError(f"host {self.host!r} accepts requests of other machines, and there is no API key",
                              "set one: --api-key KEY, or the environment variable LUTHIER_API_KEY")

    def check(self, request: HTTPRequest) -> None:
        """Raises `Unauthorized` for a request that may not be answered."""
        name = urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
        if self.host in LOOPBACK and name not in LOOPBACK:
            raise Unauthorized(f"the request is for the host {name!r}, and this server answers on this machine only",
                               "use http://127.0.0.1:PORT/v1")
        origin = request.headers.get("origin")
        if origin and urlsplit(origin).hostname != name:
            raise Unauthorized(f"the request comes from a web page of {origin!r}", "send requests from a program")
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.api_key and not hmac.compare_digest(given.encode(), self.api_key.encode()):
            raise Unauthorized("the API key is missing or wrong", "send the header Authorization: Bearer KEY")

    async def read_body(self, request: HTTPRequest) -> dict[str, Any]:
        """The JSON object of a request, read no further than the limit."""
        kind = request.headers.get("content-type", "application/json").partition(";")[0].strip()
        if kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
            # What a web page of another site can send without asking first.
            raise RecipeError(f"the body has the type {kind!r}", "send the header Content-Type: application/json")
        content = b""
        async for part in request.stream():
            content += part
            if len(content) > self.max_body_bytes:
                raise TooLarge(f"the body has more than {self.max_body_bytes:,} bytes", "send a smaller request")
        try:
            body = json.loads(content)
        except (ValueError, RecursionError):
            raise RecipeError("the body is not JSON", "send a JSON object") from None
        if not isinstance(body, dict):
            raise RecipeError(f"the body is a {type(body).__name__}", "send a JSON object")
        return body


def check_installed() -> None:
    """Raises `MissingExtra` where starlette or uvicorn is not installed."""
    for package in ("starlette", "uvicorn"):
        if find_spec(package) is None:
            raise MissingExtra(package, "serve", "luthier serve")


def build_app(serving: OpenAIServing, access: AccessRules | None = None) -> Starlette:
    """The ASGI application."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
    from starlette.routing import Route
    rules = access or AccessRules()

    async def list_models(request: HTTPRequest) -> Response:
        return JSONResponse(serving.list_models())

    async def describe_model(request: HTTPRequest) -> Response:
        return JSONResponse(serving.describe_model(request.path_params["name"]))

    async def delete_model(request: HTTPRequest) -> Response:
        return JSONResponse(serving.delete_model(request.path_params["name"]))

    async def create_completion(request: HTTPRequest, chat: bool) -> Response:
        body, requests = await run_in_threadpool(serving.build_requests, await rules.read_body(request), chat)
        if body.stream:
            return StreamingResponse(serving.stream_events(body, requests, chat), media_type="text/event-stream")
        return JSONResponse(await serving.complete(body, requests, chat))

    async def create_chat_completion(request: HTTPRequest) -> Response:
        return await create_completion(request, True)

    async def create_text_completion(request: HTTPRequest) -> Response:
        return await create_completion(request, False)

    async def create_embeddings(request: HTTPRequest) -> Response:
        return JSONResponse(await serving.create_embeddings(await rules.read_body(request)))

    async def show_health(request: HTTPRequest) -> Response:
        return JSONResponse({"status": "ok"})

    async def show_metrics(request: HTTPRequest) -> Response:
        return PlainTextResponse(serving.format_metrics(), media_type="text/plain; version=0.0.4")

    async def answer_error(request: HTTPRequest, error: Exception) -> Response:
        assert isinstance(error, LuthierError)
        wait = {"Retry-After": str(error.retry_after)} if isinstance(error, QueueFull) else {}
        return JSONResponse(format_error(error), find_status(error)[0], wait)

    def checked(endpoint: Callable[[HTTPRequest], Any]) -> Callable[[HTTPRequest], Any]:
        async def answer(request: HTTPRequest) -> Response:
            rules.check(request)
            response: Response = await endpoint(request)
            return response
        return answer

    routes = [Route("/v1/models", checked(list_models)),
              Route("/v1/models/{name:path}", checked(describe_model), methods=["GET"]),
              Route("/v1/models/{name:path}", checked(delete_model), methods=["DELETE"]),
              Route("/v1/chat/completions", checked(create_chat_completion), methods=["POST"]),
              Route("/v1/completions", checked(create_text_completion), methods=["POST"]),
              Route("/v1/embeddings", checked(create_embeddings), methods=["POST"]),
              Route("/health", show_health), Route("/metrics", checked(show_metrics))]
    return Starlette(routes=routes, exception_handlers={LuthierError: answer_error})


def open_socket(host: str, port: int) -> socket.socket:
    """A bound socket, opened before any model is loaded. Raises `RecipeError` where the address cannot be bound."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        raise RecipeError(f"cannot listen at {host}:{port}: {error}", "choose another --port or --host") from None
    return bound


def run_server(serving: OpenAIServing, bound: socket.socket, access: AccessRules | None = None,
               grace_seconds: int = 10) -> None:
    """Serve on this socket until interrupted; running answers then have `grace_seconds` to end."""
    import uvicorn
    serving.engine.start()
    config = uvicorn.Config(build_app(serving, access), log_level="warning", timeout_keep_alive=30,
                            timeout_graceful_shutdown=grace_seconds)
    try:
        uvicorn.Server(config).run(sockets=[bound])
    finally:
        serving.engine.close()
