"""OpenAI's protocol over HTTP. The only file that imports starlette and uvicorn. Read `openai_serving.py` first.

    GET  /v1/models              the base and every run on it, by name
    POST /v1/chat/completions    a conversation; `stream: true` streams the answer
    POST /v1/completions         the continuation of a text
    POST /v1/embeddings          pooled states of length 1
"""

from __future__ import annotations

import socket
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from luthier.core.errors import LuthierError, MissingExtra, RecipeError
from luthier.serving.openai_protocol import format_error
from luthier.serving.openai_serving import OpenAIServing

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.responses import Response


def check_installed() -> None:
    """Raises `MissingExtra` if starlette or uvicorn is not installed."""
    for package in ("starlette", "uvicorn"):
        if find_spec(package) is None:
            raise MissingExtra(package, "serve", "luthier serve")


def build_app(serving: OpenAIServing) -> Starlette:
    """The ASGI application."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request as HTTPRequest
    from starlette.responses import JSONResponse, StreamingResponse
    from starlette.routing import Route

    async def read_body(request: HTTPRequest) -> dict[str, Any]:
        try:
            body = await request.json()
        except ValueError:
            raise RecipeError("the body is not JSON", "send a JSON object") from None
        if not isinstance(body, dict):
            raise RecipeError(f"the body is a {type(body).__name__}", "send a JSON object")
        return body

    async def list_models(request: HTTPRequest) -> Response:
        return JSONResponse(serving.list_models())

    async def create_completion(request: HTTPRequest, chat: bool) -> Response:
        body, requests = await run_in_threadpool(serving.build_requests, await read_body(request), chat)
        if body.stream:
            return StreamingResponse(serving.stream_events(body, requests, chat), media_type="text/event-stream")
        return JSONResponse(await serving.complete(body, requests, chat))

    async def create_embeddings(request: HTTPRequest) -> Response:
        return JSONResponse(await serving.create_embeddings(await read_body(request)))

    async def answer_error(request: HTTPRequest, error: Exception) -> Response:
        assert isinstance(error, LuthierError)
        return JSONResponse(format_error(error), 404 if error.what.startswith("unknown model ") else 400)

    async def create_chat_completion(request: HTTPRequest) -> Response:
        return await create_completion(request, True)

    async def create_text_completion(request: HTTPRequest) -> Response:
        return await create_completion(request, False)

    routes = [Route("/v1/models", list_models),
              Route("/v1/chat/completions", create_chat_completion, methods=["POST"]),
              Route("/v1/completions", create_text_completion, methods=["POST"]),
              Route("/v1/embeddings", create_embeddings, methods=["POST"])]
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


def run_server(serving: OpenAIServing, bound: socket.socket) -> None:
    """Serve on this socket until interrupted; the engine runs as long."""
    import uvicorn
    serving.engine.start()
    try:
        uvicorn.Server(uvicorn.Config(build_app(serving), log_level="warning")).run(sockets=[bound])
    finally:
        serving.engine.close()
