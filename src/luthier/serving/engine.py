"""The inference engine: one thread owns the model and generates for compatible requests in one batch.

    engine = InferenceEngine(family, get_adapter_indices)
    engine.start()
    engine.submit(Request(prompt=ids, adapter="law"), on_output)  # on_output(TokenDelta("Who may sue", 3, "stop"))

Each request goes through its own adapter, so many tuned models on one base share a batch. Requests with the same
sampling parameters share a batch; requests that arrive later wait for the next one. Read `detokenizer.py` first.
"""

from __future__ import annotations

import secrets
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Any, Literal

from luthier import assembly
from luthier.core.errors import LuthierError, RunError
from luthier.core.protocols import Family, SamplingParams
from luthier.serving.detokenizer import IncrementalDetokenizer

FinishReason = Literal["", "stop", "length", "cancelled"]


@dataclass(frozen=True)
class TokenDelta:
    """New output of one request.

    Args:
        text: the text that became final since the last delta.
        tokens: number of tokens generated so far.
        finish_reason: empty until the request has finished.
        error: why the request failed.
    """

    text: str
    tokens: int = 0
    finish_reason: FinishReason = ""
    error: LuthierError | None = None


@dataclass(eq=False)
class Request:
    """One completion to generate.

    Args:
        prompt: token ids.
        adapter: name of the adapter; None: the base model alone.
        stop: strings that end the completion; they are not part of it.
        seed: of the sampling; None: a new one for every batch.
        group: a request with a seed shares a batch with its own group only; otherwise its output would depend on
            requests of other clients.
        index: position within the group. If a group takes more than one batch, each batch samples with other random
            numbers.
        cancelled: set it to get no more output.
        on_output: called with every delta, from the engine's thread.
    """

    prompt: Sequence[int]
    adapter: str | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    group: str = ""
    stop: tuple[str, ...] = ()
    index: int = 0
    cancelled: bool = False
    on_output: Callable[[TokenDelta], None] = field(default=lambda delta: None, repr=False)

    def can_share_batch(self, other: Request) -> bool:
        """Whether both can be sampled in one batch."""
        mine, theirs = ((r.temperature, r.top_p, r.seed, r.seed is not None and r.group) for r in (self, other))
        return mine == theirs


@dataclass(eq=False)
class EngineTask:
    """Other work on the model, done between two batches."""

    work: Callable[[], Any]
    done: Future[Any]


class InferenceEngine:
    """Queues requests for one model; its thread generates for them. Call `start` before the first result is needed.

    Args:
        family: the model; no other thread may call it after `start`. Only causal language models generate; every
            model can run tasks.
        get_adapter_indices: names of adapters -> their indices in the model; None: the base model is served alone.
        max_num_seqs: largest number of requests in one batch.
    """

    def __init__(self, family: Family,
                 get_adapter_indices: Callable[[Iterable[str | None]], tuple[int, ...]] | None = None,
                 max_num_seqs: int = 16) -> None:
        self.family, self.get_adapter_indices, self.max_num_seqs = family, get_adapter_indices, max_num_seqs
        self.batches = 0
        self._waiting: deque[Request | EngineTask] = deque()
        self._changed = Condition()  # of `_waiting` and `_is_open`
        self._is_open = True
        self._thread = Thread(target=self._process_queue, name="inference-engine", daemon=True)

    def start(self) -> None:
        """Start the thread. Requests that were submitted before are processed now."""
        self.family.train(False)
        self._thread.start()

    def submit(self, request: Request, on_output: Callable[[TokenDelta], None]) -> Request:
        """Queue a request. `on_output` is called with every delta, from the engine's thread; the last delta has a
        `finish_reason` or an `error`. Set `cancelled` on the returned request to get no more deltas."""
        request.on_output = on_output
        self._enqueue(request)
        return request

    def run_exclusive(self, work: Callable[[], Any]) -> Future[Any]:
        """Queue other work on the model; it runs alone, between two batches."""
        task = EngineTask(work, Future())
        self._enqueue(task)
        return task.done

    def _enqueue(self, item: Request | EngineTask) -> None:
        with self._changed:
            self._waiting.append(item)
            self._changed.notify()

    def close(self) -> None:
        """Stop the thread after its current batch. Requests that still wait are cancelled."""
        with self._changed:
            self._is_open = False
            self._changed.notify()
        if self._thread.ident is not None:  # it was started
            self._thread.join()
        for item in self._waiting:
            if isinstance(item, EngineTask):
                item.done.cancel()
            else:
                item.on_output(TokenDelta("", 0, "cancelled"))

    # ------------------------------------------------------------ in the engine's thread

    def _process_queue(self) -> None:
        while batch := self._take_batch():
            if isinstance(batch, EngineTask):
                _run_task(batch)
                continue
            self.batches += 1
            try:
                self._generate(batch)
            except LuthierError as error:
                _fail_requests(batch, error)
            except Exception as error:  # without an answer the clients would wait forever
                traceback.print_exc()
                _fail_requests(batch, RunError(f"the server failed: {error}", "see the traceback on stderr"))

    def _take_batch(self) -> list[Request] | EngineTask | None:
        """The first item in the queue, with all requests that can share its batch; waits for one. None once the engine
        is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or not self._is_open)
            if not self._is_open:
                return None
            first = self._waiting[0]
            if isinstance(first, EngineTask):
                self._waiting.popleft()
                return first
            compatible = [r for r in self._waiting if isinstance(r, Request) and r.can_share_batch(first)]
            batch = compatible[:self.max_num_seqs]
            self._waiting = deque(item for item in self._waiting if item not in batch)
            return batch

    def _generate(self, batch: list[Request]) -> None:
        first = batch[0]
        seed = secrets.randbits(32) if first.seed is None else first.seed + 1_000_003 * first.index
        sampling = SamplingParams(max(r.max_new_tokens for r in batch), first.temperature, first.top_p,
                                  batch_size=len(batch), seed=seed)
        indices = self.get_adapter_indices([r.adapter for r in batch]) if self.get_adapter_indices else ()
        running = [_RunningRequest(request, self.family.tokenizer.decode) for request in batch]
        assert isinstance(self.family, assembly.CausalLM), "the protocol refuses completions of other models"
        for index, token in self.family.stream_batch([request.prompt for request in batch], sampling, indices):
            running[index].push(token)
            if all(request.is_finished for request in running):
                return
        for request in running:  # these have reached the context length
            request.finish("length")


def _run_task(task: EngineTask) -> None:
    try:
        task.done.set_result(task.work())
    except Exception as error:  # raised again where the result is awaited
        task.done.set_exception(error)


def _fail_requests(batch: Iterable[Request], error: LuthierError) -> None:
    for request in batch:
        request.on_output(TokenDelta("", error=error))


class _RunningRequest:
    """A request in the current batch: detokenizes, looks for stop strings and emits deltas."""

    def __init__(self, request: Request, decode: Callable[..., str]) -> None:
        self.request, self.detokenizer = request, IncrementalDetokenizer(decode)
        self.tokens, self.is_finished = 0, False
        self.held = ""  # text that may be the beginning of a stop string

    def push(self, token: int | None) -> None:
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
        self._emit(self.detokenizer.push(token))
        if not self.is_finished and self.tokens >= self.request.max_new_tokens:
            self.finish("length")

    def finish(self, reason: FinishReason) -> None:
        """Emit what is still held back, and the finish reason."""
        if not self.is_finished:
            self._emit(self.detokenizer.flush())
        if not self.is_finished:
            self.is_finished = True
            self.request.on_output(TokenDelta(self.held, self.tokens, reason))

    def _emit(self, text: str) -> None:
        self.held += text
        starts = [at for stop in self.request.stop if (at := self.held.find(stop)) >= 0]
        if starts:
            self.is_finished = True
            self.request.on_output(TokenDelta(self.held[:min(starts)], self.tokens, "stop"))
            return
        keep = max((n for stop in self.request.stop for n in range(1, len(stop)) if self.held.endswith(stop[:n])),
                   default=0)
        final, self.held = self.held[:len(self.held) - keep], self.held[len(self.held) - keep:]
        if final:
            self.request.on_output(TokenDelta(final, self.tokens))
