"""OpenAI's protocol without a server: requests, the parts of responses, errors. There is no simpler file to read first.

A field that would change the output and is not supported is refused, never ignored.
"""

from __future__ import annotations

import base64
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError
from torch import Tensor

from luthier import assembly
from luthier.core.errors import LuthierError, RecipeError
from luthier.core.examples import Message
from luthier.serving.engine import Request, TokenDelta

# Fields that would change the output and are not supported, with the values that ask for nothing.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "response_format": ({"type": "text"},),
    "logprobs": (False, 0), "top_logprobs": (0,), "logit_bias": ({},), "presence_penalty": (0,),
    "frequency_penalty": (0,), "echo": (False,), "suffix": ("",), "best_of": (1,), "dimensions": (),
    "modalities": (["text"],), "top_k": (0, -1), "min_p": (0,), "repetition_penalty": (1,),
}
# Fields that change no output: accepted and ignored.
IGNORED = frozenset({"user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier",
                     "prompt_cache_key", "prompt_cache_retention", "prediction"})
IGNORED_IN_MESSAGE = frozenset({"refusal", "annotations"})


class ChatMessage(BaseModel):
    """One message, read as a message of a training row; `content` is a string, or a list of text parts."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    def to_message(self) -> Message:
        """Raises `RecipeError` for a part that is not text, or a message that no training row could hold."""
        parts = self.content if isinstance(self.content, list) else []
        if unsupported := next((part.get("type") for part in parts if part.get("type") != "text"), None):
            raise RecipeError(f"a message has a part of type {unsupported!r}, and this model reads text",
                              "send text parts only")
        try:
            return assembly.rows.read_turn(self.model_dump(exclude_none=True))
        except assembly.rows.InvalidRowError as unfit:
            raise RecipeError(f"messages: {unfit.reason}" + (f" ({unfit.detail})" if unfit.detail else ""),
                              "fix that message") from None


class CompletionRequest(BaseModel):
    """A chat or text completion, with the protocol's defaults."""

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
    """Texts to embed."""

    model: str
    input: str | list[str]
    encoding_format: Literal["float", "base64"] = "float"  # OpenAI's own client sends base64 by default


def parse_request(kind: type[Any], body: Mapping[str, Any]) -> Any:
    """A JSON body as a request of this type. Raises `RecipeError` that names every invalid and unsupported field."""
    _refuse_unsupported(body, kind, "")
    messages = body.get("messages")
    for number, message in enumerate(messages if isinstance(messages, list) else ()):
        if isinstance(message, Mapping):
            _refuse_unsupported(message, ChatMessage, f"messages.{number}.")
    try:
        return kind.model_validate({key: value for key, value in body.items() if value is not None})
    except ValidationError as error:
        raise RecipeError("; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']} (got {fault['input']!r})"
                                    for fault in error.errors(include_url=False)), "fix these fields") from None


def _refuse_unsupported(body: Mapping[str, Any], kind: type[BaseModel], where: str) -> None:
    """Raises `RecipeError` for a field that is not supported: the client expects another output than it would get."""
    ignored = IGNORED_IN_MESSAGE if kind is ChatMessage else IGNORED
    for name, value in body.items():
        if name in kind.model_fields or name in ignored or value is None or value == []:
            continue
        if value not in NEUTRAL.get(name, ()):
            raise RecipeError(f"{where}{name}: {value!r} would change the answer, and this server does not support it",
                              f"omit {name}")


def encode_embedding(row: Tensor, encoding: str) -> list[float] | str:
    """[D] as a list of numbers, or as base64 of little-endian float32."""
    if encoding == "float":
        numbers: list[float] = row.tolist()
        return numbers
    return base64.b64encode(row.numpy().astype("<f4").tobytes()).decode()


def build_response_head(request: CompletionRequest, chat: bool, suffix: str) -> dict[str, Any]:
    """The fields that every response and every streamed chunk begins with; `suffix`: of the object's name."""
    return {"id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", "created": int(time.time()),
            "model": request.model, "object": f"{'chat' if chat else 'text'}{'.' if chat else '_'}completion{suffix}"}


def count_usage(body: CompletionRequest, requests: Sequence[Request], last: Sequence[TokenDelta]) -> dict[str, int]:
    """The `usage` of a response; a prompt counts once, however many completions it has."""
    read = sum(len(request.prompt) for request in requests[::body.n])
    written = sum(delta.tokens for delta in last)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def format_event(content: Mapping[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def format_error(error: LuthierError) -> dict[str, Any]:
    """An error as OpenAI's protocol has it."""
    return {"error": {"message": str(error), "type": "invalid_request_error", "param": None,
                      "code": type(error).__name__}}
