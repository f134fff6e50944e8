"""Requests of OpenAI's protocol to responses, without HTTP. Read `engine.py` and `openai_protocol.py` first."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from luthier.assembly.multi_adapter_loading import ServedModels
from luthier.core.errors import LuthierError, RecipeError
from luthier.core.generation import TokenLogprob
from luthier.serving.engine import InferenceEngine, Request, TokenDelta
from luthier.serving.openai_protocol import (
    CompletionRequest,
    EmbeddingRequest,
    UnknownModel,
    build_response_head,
    count_usage,
    encode_embedding,
    format_chat_logprobs,
    format_error,
    format_event,
    format_text_logprobs,
    parse_request,
)

COUNTERS = frozenset({"steps_total", "tokens_generated", "prefix_cache_queries", "prefix_cache_hits"})  # of /metrics


class OpenAIServing:
    """Answers requests of OpenAI's protocol. Start and close its `engine`.

    Args:
        served: the models.
        max_num_seqs: largest number of requests that are decoded together.
        max_queue: largest number of requests that wait.
        prefix_cache_bytes: how much of what was read is kept for prompts that begin alike.
        max_cache_bytes: of keys and values of running requests; others wait.
    """

    def __init__(self, served: ServedModels, max_num_seqs: int = 16, *, max_queue: int = 1024,
                 prefix_cache_bytes: int = 0, max_cache_bytes: int | None = None) -> None:
        self.served = served
        self.engine = InferenceEngine(served.base, served.get_adapter_indices, max_num_seqs, max_queue=max_queue,
                                      prefix_cache_bytes=prefix_cache_bytes, max_cache_bytes=max_cache_bytes)
        self.created = int(time.time())

    def list_models(self) -> dict[str, Any]:
        """The response of GET /v1/models."""
        return {"object": "list", "data": [self.describe_model(name) for name in self.served.names]}

    def describe_model(self, name: str) -> dict[str, Any]:
        """The response of GET /v1/models/NAME."""
        self._check_model(name)
        return {"id": name, "object": "model", "created": self.created, "owned_by": "luthier"}

    def delete_model(self, name: str) -> dict[str, Any]:
        """The response of DELETE /v1/models/NAME: it is not served any more; its files stay."""
        if self._check_model(name) is None:
            raise RecipeError(f"model: {name!r} is the base of the others, or served alone", "stop the server")
        self.served.remove(name)
        return {"id": name, "object": "model", "deleted": True}

    def _check_model(self, name: str) -> str | None:
        """The adapter of a model. Raises `UnknownModel`."""
        try:
            return self.served.get_adapter(name)
        except RecipeError as error:
            raise UnknownModel(f"model: {error.what}", error.remedy) from None

    def format_metrics(self) -> str:
        """The response of /metrics, as Prometheus reads it."""
        found = {**self.engine.statistics, "steps_total": self.engine.steps}
        return "".join(f"# TYPE luthier_{name} {'counter' if name in COUNTERS else 'gauge'}\nluthier_{name} {value:g}\n"
                       for name, value in found.items())

    async def create_embeddings(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The response of /v1/embeddings: pooled states of length 1."""
        request = parse_request(EmbeddingRequest, body)
        texts = request.get_texts()
        self._check_model(request.model)
        work = self.engine.run_exclusive(lambda: self.served.embed_texts(request.model, texts))
        states = await asyncio.wrap_future(work)  # [texts, D]
        if request.dimensions is not None:
            if request.dimensions > states.shape[1]:
                raise RecipeError(f"dimensions: {request.dimensions}, and this model has {states.shape[1]}",
                                  "ask for fewer")
            states = states[:, :request.dimensions]
        normalized = states / states.norm(dim=-1, keepdim=True)
        rows = [encode_embedding(row, request.encoding_format) for row in normalized]
        used = sum(len(self.served.base.tokenizer(text)["input_ids"]) for text in texts)
        return {"object": "list", "model": request.model, "usage": {"prompt_tokens": used, "total_tokens": used},
                "data": [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(rows)]}

    def build_requests(self, body: Mapping[str, Any], chat: bool) -> tuple[CompletionRequest, list[Request]]:
        """The engine requests of a completion: `n` for each prompt. Raises `RecipeError` for what is not supported."""
        parsed = parse_request(CompletionRequest, body)
        adapter = self._check_model(parsed.model)
        if not self.served.can_generate:
            raise RecipeError(f"{parsed.model!r} cannot generate text", "use it with /v1/embeddings")
        if chat and not parsed.messages:
            raise RecipeError("messages: a conversation has at least one", "send messages")
        texts = [parsed.prompt] if isinstance(parsed.prompt, str) else parsed.prompt
        prompts = ([self.served.encode_chat(parsed.model, [message.to_message() for message in parsed.messages])]
                   if chat else [self.served.encode_text(parsed.model, text) for text in texts])
        limit = self.served.context_lengths[parsed.model]
        for prompt in prompts or [[]]:
            if not 0 < len(prompt) < limit:
                raise RecipeError(f"a prompt of {len(prompt)} tokens, and this model reads 1 to {limit - 1}, with "
                                  "room for an answer", "send another prompt")
        stop = (parsed.stop,) if isinstance(parsed.stop, str) else tuple(parsed.stop or ())
        sampling = parsed.build_sampling(chat, secrets.randbits(32) if parsed.seed is None else parsed.seed,
                                         self.served.base.structure.sizes["vocabulary"])
        first = Request((), adapter, sampling, tuple(s for s in stop if s), use_prefix_cache=parsed.prompt_cache)
        repeated = [prompt for prompt in prompts for _ in range(parsed.n)]
        return parsed, [replace(first, prompt=prompt, index=index) for index, prompt in enumerate(repeated)]

    async def stream_deltas(self, requests: Sequence[Request]) -> AsyncIterator[tuple[int, TokenDelta]]:
        """(index of the request, its next delta) until all have finished. If the caller stops, they are cancelled."""
        loop, deltas = asyncio.get_running_loop(), asyncio.Queue[tuple[int, TokenDelta]]()

        def enqueue(index: int, delta: TokenDelta) -> None:  # called in the engine's thread
            loop.call_soon_threadsafe(deltas.put_nowait, (index, delta))

        unfinished = set(range(len(requests)))
        try:
            for index, request in enumerate(requests):
                self.engine.submit(request, partial(enqueue, index))
            while unfinished:
                index, delta = await deltas.get()
                if delta.error is not None:
                    raise delta.error
                if delta.finish_reason:
                    unfinished.discard(index)
                yield index, delta
        finally:
            for request in requests:
                request.cancelled = True

    def _format_logprobs(self, found: Sequence[TokenLogprob], chat: bool, offset: int) -> dict[str, Any]:
        decode = self.served.base.tokenizer.decode
        return format_chat_logprobs(found, decode) if chat else format_text_logprobs(found, decode, offset)

    async def complete(self, body: CompletionRequest, requests: Sequence[Request], chat: bool) -> dict[str, Any]:
        """The response in one piece."""
        texts, last = [""] * len(requests), [TokenDelta("")] * len(requests)
        logprobs: list[list[TokenLogprob]] = [[] for _ in requests]
        async for index, delta in self.stream_deltas(requests):
            texts[index] += delta.text
            logprobs[index] += delta.logprobs
            last[index] = delta
        wanted = body.count_logprobs(chat) is not None
        choices = [{"index": i, "finish_reason": delta.finish_reason,
                    "logprobs": self._format_logprobs(logprobs[i], chat, 0) if wanted else None, **(
            {"message": {"role": "assistant", "content": text, "refusal": None}} if chat else {"text": text})}
            for i, (text, delta) in enumerate(zip(texts, last, strict=True))]
        return {**build_response_head(body, chat, ""), "choices": choices, "usage": count_usage(body, requests, last)}

    async def stream_events(self, body: CompletionRequest, requests: Sequence[Request],
                            chat: bool) -> AsyncIterator[str]:
        """The response as server-sent events. An error after the first event is sent as an event."""
        head, last = build_response_head(body, chat, ".chunk" if chat else ""), [TokenDelta("")] * len(requests)

        wanted, written = body.count_logprobs(chat) is not None, [0] * len(requests)
        with_usage = bool((body.stream_options or {}).get("include_usage"))

        def build_event(index: int, content: dict[str, Any], finish_reason: str | None,
                        logprobs: Sequence[TokenLogprob] = ()) -> str:
            inner = {"delta": content} if chat else {"text": content.get("content", "")}
            found = self._format_logprobs(logprobs, chat, written[index]) if wanted and logprobs else None
            written[index] += len(content.get("content") or "")
            return format_event({**head, **({"usage": None} if with_usage else {}), "choices": [
                {"index": index, **inner, "logprobs": found, "finish_reason": finish_reason}]})

        if chat:
            for index in range(len(requests)):
                yield build_event(index, {"role": "assistant", "content": ""}, None)
        try:
            async for index, delta in self.stream_deltas(requests):
                last[index] = delta
                yield build_event(index, {"content": delta.text} if delta.text else {}, delta.finish_reason or None,
                                  delta.logprobs)
        except LuthierError as error:
            yield format_event(format_error(error))
            return
        if with_usage:
            yield format_event({**head, "choices": [], "usage": count_usage(body, requests, last)})
        yield "data: [DONE]\n\n"
