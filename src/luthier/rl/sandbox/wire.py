"""Plain values between two processes, as lines of JSON. Uses the standard library only; there is no simpler file.

Only exact built-in types pass: None, bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset. An
object of another class, such as one that equals everything, stays in its process, and a number stands for it.
"""

import json
import math
import os
from collections.abc import Callable
from typing import Any

MAX_DEPTH, MAX_ITEMS, MAX_BYTES = 50, 200_000, 4_000_000
CONTAINERS: "dict[Any, str]" = {list: "list", tuple: "tuple", set: "set", frozenset: "frozenset"}
BUILD: "dict[str, Callable[[list[Any]], Any]]" = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


class NotPlain(Exception):
    """A value that may not pass, or a message that is too large or not well formed."""


def encode(value: Any, keep: "Callable[[Any], int] | None" = None) -> Any:
    """A value as JSON. `keep`: called with an object of another class; gives the number that stands for it."""
    return _encode(value, keep, MAX_DEPTH, [0])


def _encode(value: Any, keep: "Callable[[Any], int] | None", depth: int, count: "list[int]") -> Any:
    count[0] += 1
    if depth == 0 or count[0] > MAX_ITEMS:
        raise NotPlain(f"a value of more than {MAX_ITEMS} items, or nested more than {MAX_DEPTH} deep")
    kind = type(value)  # exact: a subclass may compare as it likes
    if value is None or kind is bool or kind is str:
        return ["str", value.encode("utf-8", "surrogatepass").hex()] if kind is str and not _is_utf8(value) else value
    if kind is int:
        return ["int", hex(value)]
    if kind is float:
        return ["float", value.hex() if math.isfinite(value) else repr(value)]
    if kind is complex:
        return ["complex", _encode(value.real, keep, depth - 1, count), _encode(value.imag, keep, depth - 1, count)]
    if kind is bytes:
        return ["bytes", value.hex()]
    if kind in CONTAINERS:
        return [CONTAINERS[kind], *(_encode(inner, keep, depth - 1, count) for inner in value)]
    if kind is dict:
        return ["dict", *([_encode(key, keep, depth - 1, count), _encode(inner, keep, depth - 1, count)]
                          for key, inner in value.items())]
    if keep is None:
        raise NotPlain(f"a {kind.__name__} is not a plain value")
    return ["object", keep(value)]


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def decode(found: Any, find: "Callable[[int], Any] | None" = None) -> Any:
    """The value of `encode`. `find`: the object that a number stands for. Raises `NotPlain` for anything else."""
    if found is None or type(found) in (bool, str):
        return found
    if type(found) is not list or not found or type(found[0]) is not str:
        raise NotPlain("a message that is not well formed")
    kind, *parts = found
    try:
        if kind in BUILD:
            return BUILD[kind]([decode(part, find) for part in parts])
        if kind == "dict":
            return {decode(key, find): decode(value, find) for key, value in parts}
        (first,), second = parts[:1], parts[1:]
        if kind == "int":
            return int(first, 16)
        if kind == "float":
            return float.fromhex(first)
        if kind == "complex":
            return complex(decode(first), decode(second[0]))
        if kind == "bytes":
            return bytes.fromhex(first)
        if kind == "str":
            return bytes.fromhex(first).decode("utf-8", "surrogatepass")
        if kind == "object" and find is not None and type(first) is int:
            return find(first)
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        raise NotPlain(f"a message that is not well formed: {error}") from None
    raise NotPlain(f"a message of the unknown kind {kind!r}")


class Channel:
    """Messages over two file descriptors, one JSON value a line."""

    def __init__(self, read: int, write: int) -> None:
        self._in = os.fdopen(read, "rb", buffering=65536, closefd=False)
        self._out = write

    def send(self, message: Any) -> None:
        line = json.dumps(message).encode() + b"\n"
        if len(line) > MAX_BYTES:
            raise NotPlain(f"a message of {len(line):,} bytes, and {MAX_BYTES:,} are allowed")
        send_all(self._out, line)

    def receive(self) -> Any:
        """The next message. Raises `EOFError` when the other process has ended."""
        line = self._in.readline(MAX_BYTES + 1)
        if not line.endswith(b"\n"):
            if len(line) > MAX_BYTES:
                raise NotPlain(f"a message of more than {MAX_BYTES:,} bytes")
            raise EOFError("the other process has ended")
        try:
            return json.loads(line)
        except (ValueError, RecursionError) as error:
            raise NotPlain(f"a message that is not JSON: {error}") from None


def send_all(handle: int, content: bytes) -> None:
    while content:
        content = content[os.write(handle, content):]
