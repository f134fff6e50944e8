"""The process in which a model's program runs. Read `wire.py` first.

It executes the program, then answers calls of its functions. It never sees a test or an expected value, and its only
way out is the channel, over which plain values pass. The program can forge a reply, which is no more than returning
another value.
"""

import inspect
from typing import Any

from . import wire

BLOCKED = ("__builtins__",)


class AnswerProcess:
    """Executes a program and serves its names."""

    def __init__(self, channel: wire.Channel) -> None:
        self._channel = channel
        self._objects: dict[int, Any] = {}  # objects that only a number of leaves this process
        self._names: dict[str, Any] = {"__name__": "answer"}

    def serve(self, program: str) -> None:
        try:
            exec(compile(program, "answer", "exec"), self._names)
        except BaseException as error:
            self._reply_error(error)
            return
        self._channel.send(["names", *(name for name in self._names if name not in BLOCKED)])
        while True:
            try:
                request = self._channel.receive()
            except EOFError:
                return
            try:
                self._channel.send(self._answer(request))
            except BaseException as error:
                self._reply_error(error)

    def _answer(self, request: Any) -> Any:
        """The reply to one request: the value, and the positional arguments as the call left them."""
        kind, *parts = request
        if kind == "get":
            return ["value", self._encode(self._names[parts[0]]), []]
        target, positional, named = parts
        target, args, kwargs = (wire.decode(part, self._objects.__getitem__) for part in (target, positional, named))
        if kind == "attribute":
            return ["value", self._encode(getattr(target, args[0])), []]
        value = target(*args, **kwargs)
        if inspect.isgenerator(value):
            value = list(value)
        return ["value", self._encode(value), self._encode(args)]

    def _encode(self, value: Any) -> Any:
        return wire.encode(value, self._keep)

    def _keep(self, value: Any) -> int:
        self._objects[id(value)] = value
        return id(value)

    def _reply_error(self, error: BaseException) -> None:
        kind = next((base.__name__ for base in type(error).__mro__ if base.__module__ == "builtins"), "Exception")
        self._channel.send(["error", kind, type(error).__name__, str(error)[:500]])
