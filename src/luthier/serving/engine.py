"""Where requests for answers wait together: one thread owns the model and answers those that go together in one batch.

    desk = Desk(family, numbers)
    desk.ask(Request(prompt=ids, adapter="law"), tell)      # tell(Bit("Who may")), tell(Bit(" sue", 3, "stop"))

Each request goes through its own adapter of a manager, so many tuned models on one base answer in one batch. Requests
that sample alike share a batch; whoever comes later waits for the next. Read `methods/multi_adapter.py` first.
"""

from __future__ import annotations

import secrets
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Any, Literal

from luthier import assembly
from luthier.core.errors import LuthierError, RunError
from luthier.core.protocols import Family, SamplingParams

End = Literal["", "stop", "length", "cancelled"]
UNFINISHED = "\ufffd"  # what a decoder writes for the first bytes of a letter whose last are still to come


@dataclass(frozen=True)
class TokenDelta:
    """What became certain of an answer: its next words, how many tokens it has so far, and how it ended, if it did."""

    text: str
    tokens: int = 0
    end: End = ""
    error: LuthierError | None = None


@dataclass(eq=False)
class Request:
    """One answer that is wanted.

    Args:
        prompt: token ids.
        adapter: its name in the manager; None: the bare base.
        stop: texts that end the answer; they are no part of it.
        seed: of the sampling; None: another every time.
        group: requests with a seed share a batch with their own group alone, or an answer would depend on who else
            came.
        place: its own in the group: where that is more than one batch, each throws other dice.
    """

    prompt: Sequence[int]
    adapter: str | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    group: str = ""
    stop: tuple[str, ...] = ()
    place: int = 0
    cancelled: bool = False
    tell: Callable[[TokenDelta], None] = field(default=lambda bit: None, repr=False)

    def alike(self, other: Request) -> bool:
        """Whether both can be sampled in one batch."""
        mine, theirs = ((r.temperature, r.top_p, r.seed, r.seed is not None and r.group) for r in (self, other))
        return mine == theirs


@dataclass(eq=False)
class EngineTask:
    """Other work on the model, done between two batches."""

    work: Callable[[], Any]
    done: Future[Any]


class InferenceEngine:
    """Requests and the thread that answers them.

    Args:
        family: nobody else may call it from now on. Only a causal language model answers; any runs errands.
        numbers: names of adapters to their indices, as `AdapterManager.resolve_indices`; None: the base is served
            as it stands.
        most: requests in one batch.
    """

    def __init__(self, family: Family, numbers: Callable[[Iterable[str | None]], tuple[int, ...]] | None = None,
                 most: int = 16) -> None:
        self.family, self.numbers, self.most = family, numbers, most
        self.batches = 0
        self._waiting: deque[Request | EngineTask] = deque()
        self._bell = Condition()
        self._open = True
        family.train(False)
        self._thread = Thread(target=self._work, name="desk", daemon=True)
        self._thread.start()

    def ask(self, request: Request, tell: Callable[[TokenDelta], None]) -> Request:
        """Put a request in the line. `tell` hears every bit, from the desk's own thread; the last one has an `end` or
        an `error`. Set `cancelled` on what comes back to be told no more."""
        request.tell = tell
        self._queue(request)
        return request

    def run(self, work: Callable[[], Any]) -> Future[Any]:
        """Do something else with the model, in the line like everybody."""
        errand = EngineTask(work, Future())
        self._queue(errand)
        return errand.done

    def _queue(self, one: Request | EngineTask) -> None:
        with self._bell:
            self._waiting.append(one)
            self._bell.notify()

    def close(self) -> None:
        """End the thread once its batch is answered. Whoever still waits is told that the answer was cancelled."""
        with self._bell:
            self._open = False
            self._bell.notify()
        self._thread.join()
        for one in self._waiting:
            if isinstance(one, EngineTask):
                one.done.cancel()
            else:
                one.tell(TokenDelta("", 0, "cancelled"))

    # ------------------------------------------------------------ the desk's own thread

    def _work(self) -> None:
        while batch := self._next():
            if isinstance(batch, EngineTask):
                _run_task(batch)
                continue
            self.batches += 1
            try:
                self._answer(batch)
            except LuthierError as error:
                _fail_requests(batch, error)
            except Exception as error:  # else whoever waits would wait for ever
                traceback.print_exc()
                _fail_requests(batch, RunError(f"the server failed: {error}", "its words on stderr say where"))

    def _next(self) -> list[Request] | EngineTask | None:
        """The first in the line, and whoever goes with it; waits for one. None once the desk is closed."""
        with self._bell:
            self._bell.wait_for(lambda: self._waiting or not self._open)
            if not self._open:
                return None
            first = self._waiting[0]
            if isinstance(first, EngineTask):
                self._waiting.popleft()
                return first
            batch = [r for r in self._waiting if isinstance(r, Request) and r.alike(first)][:self.most]
            self._waiting = deque(one for one in self._waiting if one not in batch)
            return batch

    def _answer(self, batch: list[Request]) -> None:
        first = batch[0]
        sampling = SamplingParams(max(r.max_new_tokens for r in batch), first.temperature, first.top_p,
                                  batch_size=len(batch),
                            seed=secrets.randbits(32) if first.seed is None else first.seed + 1_000_003 * first.place)
        numbers = self.numbers([request.adapter for request in batch]) if self.numbers else ()
        answers = [_RunningRequest(request, self.family.tokenizer.decode) for request in batch]
        assert isinstance(self.family, assembly.CausalLM), "nobody asks a base that does not write"
        for index, token in self.family.stream_batch([request.prompt for request in batch], sampling, numbers):
            answers[index].hear(token)
            if all(answer.ended for answer in answers):
                return
        for answer in answers:  # what the context cut off
            answer.end("length")


def _run_task(errand: EngineTask) -> None:
    try:
        errand.done.set_result(errand.work())
    except Exception as error:  # it is raised again where the result is waited for
        errand.done.set_exception(error)


def _fail_requests(batch: Iterable[Request], error: LuthierError) -> None:
    for request in batch:
        request.tell(TokenDelta("", error=error))


class _RunningRequest:
    """One answer on its way out."""

    def __init__(self, request: Request, decode: Callable[..., str]) -> None:
        self.request, self.words, self.tokens, self.ended = request, IncrementalDetokenizer(decode), 0, False
        self.held = ""  # words that may be the beginning of a text that ends the answer

    def hear(self, token: int | None) -> None:
        """The next token, or None where the model ended the answer."""
        if self.ended:
            return
        if self.request.cancelled:
            self.ended = True
            return
        if token is None:
            self.end("stop")
            return
        self.tokens += 1
        self._say(self.words.hear(token))
        if not self.ended and self.tokens >= self.request.max_new_tokens:
            self.end("length")

    def end(self, how: End) -> None:
        """Say what is still held back, and how it ended."""
        if not self.ended:
            self._say(self.words.rest())
        if not self.ended:
            self.ended = True
            self.request.tell(TokenDelta(self.held, self.tokens, how))

    def _say(self, text: str) -> None:
        self.held += text
        found = [at for stop in self.request.stop if (at := self.held.find(stop)) >= 0]
        if found:
            self.ended = True
            self.request.tell(TokenDelta(self.held[:min(found)], self.tokens, "stop"))
            return
        keep = max((n for stop in self.request.stop for n in range(1, len(stop)) if self.held.endswith(stop[:n])),
                   default=0)
        said, self.held = self.held[:len(self.held) - keep], self.held[len(self.held) - keep:]
        if said:
            self.request.tell(TokenDelta(said, self.tokens))


# ---------------------------------------------------------------- tokens to words


class IncrementalDetokenizer:
    """The text of a stream of tokens, as it becomes certain: no letter is said before all its bytes are there."""

    def __init__(self, decode: Callable[..., str]) -> None:
        self.decode, self.ids, self.shown = decode, list[int](), ""

    def hear(self, token: int) -> str:
        """What one more token makes certain."""
        self.ids.append(token)
        text: str = self.decode(self.ids, skip_special_tokens=True)
        if not text.startswith(self.shown) or text.endswith(UNFINISHED):
            return ""
        return self._new(text)

    def rest(self) -> str:
        """What the end makes certain."""
        return self._new(self.decode(self.ids, skip_special_tokens=True))

    def _new(self, text: str) -> str:
        new, self.shown = text[len(self.shown):], text
        return new


def stream(tokens: Iterable[int], decode: Callable[..., Any]) -> Iterator[str]:
    """The text of an answer's tokens, bit by bit.

    >>> list(stream(iter([72, 105, 195, 164]), lambda ids, **_: bytes(ids).decode(errors="replace")))
    ['H', 'i', 'ä']
    """
    words = IncrementalDetokenizer(decode)
    for token in tokens:
        if new := words.hear(token):
            yield new
    if new := words.rest():
        yield new
