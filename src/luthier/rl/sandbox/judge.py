"""The process in which a test runs. Read `answer.py` first.

The names of the answer's program stand in the test as proxies: a call sends plain arguments to the answer's process and
gets a plain value back, of an exact built-in type. All comparisons happen here, between values of this process.
"""

import builtins
from collections.abc import Callable, Iterator
from typing import Any

from . import wire


class AnswerError(Exception):
    """An exception of the answer's program that is of no built-in class."""


class Judge:
    """Runs one test against the process of an answer."""

    def __init__(self, channel: wire.Channel) -> None:
        self._channel = channel

    def run(self, test: str) -> str:
        """Why the test fails; empty where it runs to its end."""
        try:
            kind, *names = self._channel.receive()
            if kind != "names":
                return f"the program raised {names[1]}: {names[2]}"
            found = {name: value for name in map(str, names) for value in self._open(name)}
            exec(compile(test, "test", "exec"), {"__name__": "test", **found})
        except BaseException as error:
            return f"{type(error).__name__}: {error}"[:500]
        return ""

    def _open(self, name: str) -> "list[Any]":
        """The value of a global name of the program, a proxy where it is not plain; nothing where it cannot pass."""
        try:
            return [self._ask(["get", name])[0]]
        except (AnswerError, wire.NotPlain):
            return []

    def _ask(self, request: Any) -> "tuple[Any, Any]":
        self._channel.send(request)
        reply = self._channel.receive()
        if type(reply) is not list or not reply:
            raise wire.NotPlain("a reply that is not well formed")
        if reply[0] == "error" and len(reply) == 4:
            raise _rebuild_error(*map(str, reply[1:]))
        if reply[0] != "value" or len(reply) != 3:
            raise wire.NotPlain("a reply that is not well formed")
        return self._decode(reply[1]), self._decode(reply[2]) if reply[2] else None

    def _decode(self, found: Any) -> Any:
        return wire.decode(found, lambda number: RemoteObject(self._call, number))

    def _call(self, kind: str, number: int, args: "tuple[Any, ...]", kwargs: "dict[str, Any]") -> Any:
        request = [kind, ["object", number], _encode(list(args)), _encode(kwargs)]
        value, after = self._ask(request)
        for own, changed in zip(args, after or (), strict=False):
            _update(own, changed)
        return value


def _encode(value: Any) -> Any:
    """Plain values, and proxies as the numbers of their objects."""
    def number_of(inner: Any) -> int:
        if type(inner) is not RemoteObject:
            raise wire.NotPlain(f"a {type(inner).__name__} cannot be passed to the program: only plain values can")
        return inner.number
    return wire.encode(value, number_of)


def _update(own: Any, changed: Any) -> None:
    """Give a mutable argument the content that the call left in it: functions may work in place."""
    if type(own) is not type(changed):
        return
    if type(own) is list:
        own[:] = changed
    elif type(own) in (dict, set):
        own.clear()
        own.update(changed)


def _rebuild_error(base: str, name: str, message: str) -> BaseException:
    kind = vars(builtins).get(base)
    if isinstance(kind, type) and issubclass(kind, Exception) and kind is not Exception:
        try:
            return kind(message)
        except TypeError:  # UnicodeDecodeError takes five arguments
            pass
    return AnswerError(f"{name}: {message}")


class RemoteObject:
    """An object of the answer's process: a function, a class, an instance. It can be called and looked into, and what
    comes back is a plain value or another of these. It has no other behavior here, and is equal to nothing."""

    def __init__(self, ask: "Callable[..., Any]", number: int) -> None:
        self.ask, self.number = ask, number

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.ask("call", self.number, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return self.ask("attribute", self.number, (name,), {})

    def _method(self, name: str, *args: Any) -> Any:
        return self.ask("attribute", self.number, (name,), {})(*args)

    def __getitem__(self, key: Any) -> Any:
        return self._method("__getitem__", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._method("__setitem__", key, value)

    def __len__(self) -> int:
        length = self._method("__len__")
        if type(length) is not int:
            raise TypeError("a length that is no integer")
        return length

    def __contains__(self, item: Any) -> bool:
        return self._method("__contains__", item) is True

    def __iter__(self) -> "Iterator[Any]":
        iterator = self._method("__iter__")
        while True:
            try:
                yield iterator._method("__next__")
            except StopIteration:
                return

    def __str__(self) -> str:
        text = self._method("__str__")
        return text if type(text) is str else ""

    def __bool__(self) -> bool:
        raise TypeError("an object of the program is neither true nor false here: test a plain value of it")

    def __eq__(self, other: object) -> bool:
        raise TypeError("an object of the program cannot be compared: compare plain values of it")

    __hash__ = None  # type: ignore[assignment]
