"""The inference engine: one thread owns the model and decodes all requests together, step by step.

    engine = InferenceEngine(family, get_adapter_indices)
    engine.start()
    engine.submit(Request(prompt=ids, adapter="law"), on_output)  # on_output(TokenDelta("Who may sue", 3, "stop"))

Requests join and leave at every step. Each has its own adapter and sampling parameters, and its output depends on no
other request. Read `detokenizer.py` and `core/generation.py` first.
"""

from __future__ import annotations

import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Any, Literal

from torch import Tensor

from luthier import assembly
from luthier.core.errors import LuthierError, RunError
from luthier.core.generation import GenerationEngine, SequenceRequest, TokenLogprob, TokenOutput
from luthier.core.protocols import Family, SamplingParams
from luthier.serving.detokenizer import IncrementalDetokenizer

FinishReason = Literal["", "stop", "length", "cancelled"]


class QueueFull(LuthierError):
    """More requests wait than the server accepts; `retry_after` seconds later there may be room."""

    def __init__(self, limit: int, retry_after: int) -> None:
        self.retry_after = retry_after
        super().__init__(f"{limit} requests are waiting, and this server lets no more wait",
                         f"send the request again in {retry_after} seconds")


@dataclass(frozen=True)
class TokenDelta:
    """New output of one request.

    Args:
        text: the text that became final since the last delta.
        tokens: number of tokens generated so far.
        finish_reason: empty until the request has finished.
        error: why the request failed.
        logprobs: of the tokens whose text became final, if the request asks for them.
        cached_tokens: prompt tokens that were read from the prefix cache.
    """

    text: str
    tokens: int = 0
    finish_reason: FinishReason = ""
    error: LuthierError | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    cached_tokens: int = 0


@dataclass(eq=False)
class Request:
    """One completion to generate.

    Args:
        prompt: token ids.
        adapter: name of the adapter; None: the base model alone.
        sampling: its parameters; the output depends on `sampling.seed` and `index`.
        stop: strings that end the completion; they are not part of it.
        index: position among the completions of one call.
        allowed_tokens: see `SequenceRequest`; for grammars.
        use_prefix_cache: whether what earlier requests have computed may be used.
        cancelled: set it to get no more output.
        on_output: called with every delta, from the engine's thread.
    """

    prompt: Sequence[int]
    adapter: str | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    index: int = 0
    allowed_tokens: Callable[[Sequence[int]], Tensor | None] | None = field(default=None, repr=False)
    use_prefix_cache: bool = True
    cancelled: bool = False
    on_output: Callable[[TokenDelta], None] = field(default=lambda delta: None, repr=False)


@dataclass(eq=False)
class EngineTask:
    """Other work on the model, done between two steps."""

    work: Callable[[], Any]
    done: Future[Any]


class InferenceEngine:
    """Queues requests for one model; its thread generates for them. Call `start` before the first result is needed.

    Args:
        family: the model; no other thread may call it after `start`. Only causal language models generate; every
            model can run tasks.
        get_adapter_indices: names of adapters -> their indices in the model; None: the base model is served alone.
        max_num_seqs: largest number of requests that are decoded together.
        max_queue: largest number of requests that wait.
        max_cache_bytes, prefix_cache_bytes, is_continuous: see `CausalLM.build_engine`.
    """

    def __init__(self, family: Family,
                 get_adapter_indices: Callable[[Iterable[str | None]], tuple[int, ...]] | None = None,
                 max_num_seqs: int = 16, *, max_queue: int = 1024, max_cache_bytes: int | None = None,
                 prefix_cache_bytes: int = 0, is_continuous: bool = True) -> None:
        self.family, self.get_adapter_indices, self.max_num_seqs = family, get_adapter_indices, max_num_seqs
        self.max_queue = max_queue
        self.steps = 0
        self._options: dict[str, Any] = {"max_cache_bytes": max_cache_bytes, "prefix_cache_bytes": prefix_cache_bytes,
                                         "is_continuous": is_continuous}
        self._waiting: deque[Request | EngineTask] = deque()
        self._changed = Condition()  # of `_waiting` and `_is_open`
        self._is_open = True
        self._grace_seconds = 0.0
        self._running: dict[SequenceRequest, _RunningRequest] = {}
        self._engine: GenerationEngine | None = None
        self._thread = Thread(target=self._run, name="inference-engine", daemon=True)

    def start(self) -> None:
        """Start the thread. Requests that were submitted before are processed now."""
        self.family.train(False)
        if isinstance(self.family, assembly.CausalLM):
            self._engine = self.family.build_engine(self.max_num_seqs, **self._options)
        self._thread.start()

    def submit(self, request: Request, on_output: Callable[[TokenDelta], None]) -> Request:
        """Queue a request. `on_output` is called with every delta, from the engine's thread; the last delta has a
        `finish_reason` or an `error`. Set `cancelled` on the returned request to get no more deltas.

        Raises:
            QueueFull: too many requests wait.
        """
        request.on_output = on_output
        with self._changed:
            waiting = len(self._waiting) + int(self.statistics["waiting"])
            if waiting >= self.max_queue:
                raise QueueFull(self.max_queue, 1 + waiting // max(1, self.max_num_seqs))
            self._waiting.append(request)
            self._changed.notify()
        return request

    def run_exclusive(self, work: Callable[[], Any]) -> Future[Any]:
        """Queue other work on the model; it runs alone, between two steps."""
        task = EngineTask(work, Future())
        with self._changed:
            self._waiting.append(task)
            self._changed.notify()
        return task.done

    @property
    def statistics(self) -> Mapping[str, float]:
        """Those of the model's engine (see `GenerationEngine`)."""
        return {"running": 0, "waiting": 0, "kv_cache_bytes": 0} if self._engine is None else self._engine.statistics

    def close(self, grace_seconds: float = 0.0) -> None:
        """Stop the thread. Running requests have `grace_seconds` to end; those that are left are cancelled."""
        with self._changed:
            self._is_open = False
            self._grace_seconds = grace_seconds
            self._changed.notify()
        if self._thread.ident is not None:  # it was started
            self._thread.join()
        for item in self._waiting:
            if isinstance(item, EngineTask):
                item.done.cancel()
            else:
                item.on_output(TokenDelta("", 0, "cancelled"))
        for running in self._running.values():
            running.cancel()

    # ------------------------------------------------------------ in the engine's thread

    def _run(self) -> None:
        deadline: float | None = None
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._running or not self._is_open)
                items = list(self._waiting) if self._is_open else []
                self._waiting = deque() if self._is_open else self._waiting
            if not self._is_open:
                deadline = time.monotonic() + self._grace_seconds if deadline is None else deadline
                if not self._running or time.monotonic() >= deadline:
                    return
            for item in items:
                if isinstance(item, EngineTask):
                    _run_task(item)
                else:
                    self._begin(item)
            self._step()

    def _begin(self, request: Request) -> None:
        """Hand a request to the model's engine."""
        if request.cancelled:
            return
        assert self._engine is not None, "the protocol refuses completions of other models"
        try:
            adapter = self.get_adapter_indices([request.adapter])[0] if self.get_adapter_indices else None
            sequence = SequenceRequest(request.prompt, request.sampling, adapter, request.index,
                                       request.allowed_tokens, request.use_prefix_cache)
            self._engine.add(sequence)
        except LuthierError as error:  # the adapter was unloaded, or the prompt cannot be read
            request.on_output(TokenDelta("", error=error))
            return
        self._running[sequence] = _RunningRequest(request, self.family.tokenizer.decode)

    def _step(self) -> None:
        """One token of every running request."""
        for sequence, running in list(self._running.items()):
            if running.request.cancelled:
                self._drop(sequence)
        if not self._running:
            return
        assert self._engine is not None
        self.steps += 1
        try:
            outputs = self._engine.step()
        except Exception as error:  # without an answer the clients would wait forever
            traceback.print_exc()
            self._fail_all(error if isinstance(error, LuthierError) else
                           RunError(f"the server failed: {error}", "see the traceback on stderr"))
            return
        for output in outputs:
            self._push(output)

    def _push(self, output: TokenOutput) -> None:
        running = self._running.get(output.request)
        if running is None:
            return
        if output.error is not None:
            error = output.error
            assert isinstance(error, LuthierError)
            running.request.on_output(TokenDelta("", error=error))
        else:
            running.cached_tokens = output.cached_tokens
            is_stop = output.finish_reason == "stop"
            running.push(None if is_stop else output.token, None if is_stop else output.logprob)
            if output.finish_reason == "length":
                running.finish("length")
        if output.finish_reason or running.is_finished:
            self._drop(output.request)

    def _drop(self, sequence: SequenceRequest) -> None:
        assert self._engine is not None
        self._engine.cancel(sequence)
        del self._running[sequence]

    def _fail_all(self, error: LuthierError) -> None:
        for sequence, running in list(self._running.items()):
            running.request.on_output(TokenDelta("", error=error))
            self._drop(sequence)


def _run_task(task: EngineTask) -> None:
    try:
        task.done.set_result(task.work())
    except Exception as error:  # raised again where the result is awaited
        task.done.set_exception(error)


class _RunningRequest:
    """A request that is being decoded: detokenizes, looks for stop strings and emits deltas."""

    def __init__(self, request: Request, decode: Callable[..., str]) -> None:
        self.request, self.detokenizer = request, IncrementalDetokenizer(decode)
        self.tokens, self.is_finished = 0, False
        self.held = ""  # text that may be the beginning of a stop string
        self.cached_tokens = 0
        self._logprobs: list[TokenLogprob] = []  # of tokens whose text has not been emitted

    def push(self, token: int | None, logprob: TokenLogprob | None = None) -> None:
        """The next token, or None where the model has ended the completion."""
        if self.is_finished:
            return
        if self.request.cancelled:
            self.is_finished = True
            return
        if token is None:
            self.finish("stop")
            return
        self.tokens += 1
        if logprob is not None:
            self._logprobs.append(logprob)
        self._emit(self.detokenizer.push(token))

    def finish(self, reason: FinishReason) -> None:
        """Emit what is still held back, and the finish reason."""
        if not self.is_finished:
            self._emit(self.detokenizer.flush())
        if not self.is_finished:
            self.is_finished = True
            self._send(self.held, reason)

    def cancel(self) -> None:
        """Tell the client that there is no more."""
        if not self.is_finished:
            self.is_finished = True
            self._send("", "cancelled")

    def _emit(self, text: str) -> None:
        self.held += text
        starts = [at for stop in self.request.stop if (at := self.held.find(stop)) >= 0]
        if starts:
            self.is_finished = True
            self._send(self.held[:min(starts)], "stop")
            return
        keep = max((n for stop in self.request.stop for n in range(1, len(stop)) if self.held.endswith(stop[:n])),
                   default=0)
        final, self.held = self.held[:len(self.held) - keep], self.held[len(self.held) - keep:]
        if final:
            self._send(final)

    def _send(self, text: str, reason: FinishReason = "") -> None:
        logprobs, self._logprobs = tuple(self._logprobs), []
        self.request.on_output(TokenDelta(text, self.tokens, reason, None, logprobs, self.cached_tokens))
