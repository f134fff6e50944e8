"""OpenAI's protocol without a server: requests, the parts of responses, errors. There is no simpler file to read first.

A field that would change the output and is not supported is refused, never ignored.
"""

from __future__ import annotations

import base64
import json
import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError
from torch import Tensor

from luthier import assembly
from luthier.core.errors import LuthierError, RecipeError, RunError
from luthier.core.examples import Message
from luthier.core.generation import TokenLogprob
from luthier.core.protocols import SamplingParams
from luthier.serving.engine import QueueFull, Request, TokenDelta

DEFAULT_MAX_TOKENS = 1024  # of a completion whose request has none
LOWEST = -9999.0  # JSON has no minus infinity; OpenAI writes this number
MAX_STOPS, MAX_TOP_LOGPROBS, MAX_TEXT_LOGPROBS = 4, 20, 5
# Fields that would change the output and are not supported, with the values that ask for nothing.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "response_format": ({"type": "text"},),
    "echo": (False,), "suffix": ("",), "best_of": (1,), "modalities": (["text"],),
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
    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] = Field(default_factory=dict)
    logprobs: bool | int | None = None  # of a chat whether, of a text how many
    top_logprobs: int = Field(0, ge=0, le=MAX_TOP_LOGPROBS)
    n: int = Field(1, ge=1, le=16)
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    prompt_cache: bool = True

    def count_logprobs(self, chat: bool) -> int | None:
        """How many of the most probable tokens are reported with each token; None: no log-probabilities at all. Raises
        `RecipeError` for a number where a chat takes a boolean, and the other way round."""
        if self.logprobs is None or self.logprobs is False:
            if self.top_logprobs:
                raise RecipeError("top_logprobs: it needs logprobs: true", "set logprobs, or omit top_logprobs")
            return None
        if chat:
            if self.logprobs is not True:
                raise RecipeError(f"logprobs: {self.logprobs!r}; in a chat it is true or false", "use top_logprobs: N")
            return self.top_logprobs
        if self.logprobs is True or not 0 <= self.logprobs <= MAX_TEXT_LOGPROBS:
            raise RecipeError(f"logprobs: {self.logprobs!r}; for a text it is 0 to {MAX_TEXT_LOGPROBS}",
                              "give a number")
        return int(self.logprobs)

    def build_sampling(self, chat: bool, seed: int, vocabulary: int) -> SamplingParams:
        """The parameters for the engine. Raises `RecipeError` for a token that is not in the vocabulary."""
        if unknown := next((token for token in self.logit_bias if not 0 <= token < vocabulary), None):
            raise RecipeError(f"logit_bias: {unknown} is not a token; this model has 0 to {vocabulary - 1}",
                              "use the ids of this model's tokenizer")
        return SamplingParams(
            self.max_completion_tokens or self.max_tokens or DEFAULT_MAX_TOKENS, self.temperature, self.top_p,
            max(self.top_k, 0), seed=seed, min_p=self.min_p, presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty, repetition_penalty=self.repetition_penalty,
            logit_bias=self.logit_bias, logprobs=self.count_logprobs(chat))


class EmbeddingRequest(BaseModel):
    """Texts to embed. `dimensions`: only so many of the first numbers, normalized again."""

    model: str
    input: str | list[str] | list[int] | list[list[int]]
    dimensions: int | None = Field(None, ge=1)
    encoding_format: Literal["float", "base64"] = "float"  # OpenAI's own client sends base64 by default

    def get_texts(self) -> list[str]:
        """The texts. Raises `RecipeError` for token ids: they are of another tokenizer."""
        given = [self.input] if isinstance(self.input, str) else self.input
        texts = [text for text in given if isinstance(text, str)]
        if len(texts) != len(given):
            raise RecipeError("input: token ids are of OpenAI's tokenizer, not of this model's",
                              "send text; in LangChain: OpenAIEmbeddings(check_embedding_ctx_length=False)")
        if not texts:
            raise RecipeError("input: there is no text to embed", "send at least one text")
        return texts


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


def count_usage(body: CompletionRequest, requests: Sequence[Request], last: Sequence[TokenDelta]) -> dict[str, Any]:
    """The `usage` of a response; a prompt counts once, however many completions it has."""
    read = sum(len(request.prompt) for request in requests[::body.n])
    written = sum(delta.tokens for delta in last)
    cached = sum(delta.cached_tokens for delta in last[::body.n])
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written,
            "prompt_tokens_details": {"cached_tokens": cached}}


def format_chat_logprobs(found: Sequence[TokenLogprob], decode: Callable[[Sequence[int]], str]) -> dict[str, Any]:
    """`logprobs` of a chat: natural logarithms of the probabilities before temperature, penalties and filters."""
    def describe(token: int, logprob: float) -> dict[str, Any]:
        text = decode([token])
        return {"token": text, "bytes": list(text.encode()), "logprob": max(logprob, LOWEST)}

    return {"content": [{**describe(one.token, one.logprob), "top_logprobs": [describe(*top) for top in one.top]}
                        for one in found], "refusal": None}


def format_text_logprobs(found: Sequence[TokenLogprob], decode: Callable[[Sequence[int]], str],
                         offset: int) -> dict[str, Any]:
    """`logprobs` of a text completion; `offset`: characters of the completion before these tokens."""
    tokens = [decode([one.token]) for one in found]
    offsets = [offset, *accumulate(map(len, tokens), initial=offset)][1:len(tokens) + 1]
    return {"tokens": tokens, "token_logprobs": [max(one.logprob, LOWEST) for one in found], "text_offset": offsets,
            "top_logprobs": [{decode([token]): max(value, LOWEST) for token, value in one.top} for one in found]}


def format_event(content: Mapping[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


class UnknownModel(RecipeError):
    """A request names a model that is not served."""


class Unauthorized(RecipeError):
    """A request without the server's key, or from a web page of another site."""


class TooLarge(RecipeError):
    """A body of more bytes than the server reads."""


STATUS: Mapping[type[LuthierError], tuple[int, str]] = {  # error -> status of HTTP, type of OpenAI's error
    UnknownModel: (404, "invalid_request_error"), Unauthorized: (401, "authentication_error"),
    TooLarge: (413, "invalid_request_error"), QueueFull: (429, "rate_limit_error")}


def find_status(error: LuthierError) -> tuple[int, str]:
    """The status of HTTP and the type of an error; 500 only where the server itself failed."""
    failed = isinstance(error, RunError) and error.what.startswith("the server failed")
    return (500, "server_error") if failed else STATUS.get(type(error), (400, "invalid_request_error"))


def format_error(error: LuthierError) -> dict[str, Any]:
    """An error as OpenAI's protocol has it; `param` is the field that it begins with, if there is one."""
    field = error.what.partition(":")[0]
    return {"error": {"message": str(error), "type": find_status(error)[1],
                      "param": field if re.fullmatch(r"[a-z_][\w.]*", field) else None, "code": type(error).__name__}}
