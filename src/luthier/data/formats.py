"""Rows to examples: which columns mean what. Read `sources.py` first.

The format of a file is the first of `FORMATS` whose required columns a row has. Rows of the same file that do not fit
are refused, each with its reason. Where nothing fits, one `DataError` names the columns found and the remedy.

Every format also takes a `weight` column: the weight of the whole row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from luthier.core.errors import DataError, nearest
from luthier.core.examples import ChatExample, CompletionExample, Example, Message, Origin, TextExample
from luthier.data.sources import Refusal, Row

Columns = Mapping[str, str | int]
ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant", "model": "assistant",
         "observation": "tool", "function_response": "tool", "function_call": "function_call", "system": "system",
         "user": "user", "assistant": "assistant", "tool": "tool", "developer": "developer"}
PATIENCE = 100  # rows that fit no format before the whole file is given up


class UnfitError(ValueError):
    """A row cannot become an example: a reason to count by, and what is particular to the row."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason, self.detail = reason, detail
        super().__init__(reason, detail)


# ---------------------------------------------------------------- values, checked


def _text(values: Mapping[str, Any], column: str, default: str | None = None) -> str:
    value = values.get(column)
    if value is None and default is not None:
        return default
    if value is None:
        raise UnfitError(f"no {column}")
    if not isinstance(value, str):
        raise UnfitError(f"{column} is not text", f"it is {type(value).__name__}")
    return value


def _words(values: Mapping[str, Any], column: str) -> str:
    """Text that says something."""
    text = _text(values, column)
    if not text.strip():
        raise UnfitError(f"empty {column}")
    return text


def _weight(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise UnfitError("weight is not a number", repr(value)) from None
    if not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise UnfitError("weight is not a finite number from 0 up", repr(value))
    return float(value)


def _row_weight(values: Mapping[str, Any]) -> float:
    weight = _weight(values.get("weight"))
    return 1.0 if weight is None else weight


def _parsed(value: Any, what: str) -> Any:
    """JSON inside a string, or the value itself where it is already structured."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as fault:
        raise UnfitError(f"{what} is not JSON", str(fault)) from None


def _tools(values: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    raw = values.get("tools")
    tools = _parsed(raw, "tools") if raw else []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UnfitError("tools is not a list of objects")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)


# ---------------------------------------------------------------- turns


def _turn(turn: Any) -> Message:
    """One turn, as `role`/`content` or as ShareGPT's `from`/`value`."""
    if not isinstance(turn, dict):
        raise UnfitError("a turn is not an object", f"it is {type(turn).__name__}")
    named = turn.get("role") or turn.get("from")
    if not isinstance(named, str):
        raise UnfitError("a turn has no role")
    if named not in ROLES:
        raise UnfitError("a turn has an unknown role", f"{named!r}: {nearest(named, ROLES)}")
    role = ROLES[named]
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    extra = {key: value for key, value in turn.items()
             if key not in ("role", "from", "content", "value", "weight", "train") and value is not None}
    if role == "function_call":
        return Message("assistant", "", _turn_weight(turn), {"tool_calls": _calls(_parsed(content, "function_call"))})
    if extra.get("tool_calls"):
        extra["tool_calls"] = _calls(extra["tool_calls"])
    said = _said(content)
    if role == "assistant" and not said.strip() and not extra.get("tool_calls"):
        raise UnfitError("an assistant's turn is empty")
    return Message(role, said, _turn_weight(turn), extra)


def _turn_weight(turn: Mapping[str, Any]) -> float | None:
    train = turn.get("train")
    if turn.get("weight") is None and train is not None:
        if not isinstance(train, bool):
            raise UnfitError("train is neither true nor false", repr(train))
        return float(train)
    return _weight(turn.get("weight"))


def _said(content: Any) -> str:
    """A turn's words; OpenAI's list of text parts is joined."""
    if content is None:
        return ""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise UnfitError("a turn holds something other than text")
        return "".join(map(str, parts))
    if not isinstance(content, str):
        raise UnfitError("a turn's content is not text", f"it is {type(content).__name__}")
    return content


def _calls(raw: Any) -> list[dict[str, Any]]:
    """Function calls as `{"type": "function", "function": {"name", "arguments"}}`, arguments structured."""
    calls = []
    for call in raw if isinstance(raw, list) else [raw]:
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise UnfitError("a function call has no name")
        arguments = inner.get("arguments", {})
        if isinstance(arguments, str) and arguments.strip().startswith("{"):
            arguments = _parsed(arguments, "function_call")
        calls.append({**({"id": call["id"]} if call.get("id") else {}), "type": "function",
                      "function": {"name": inner["name"], "arguments": arguments}})
    return calls


def _turns(raw: Any, column: str) -> list[Message]:
    turns = _parsed(raw, column)
    if not isinstance(turns, (list, tuple)):
        raise UnfitError(f"{column} is not a list of turns", f"it is {type(turns).__name__}")
    if not turns:
        raise UnfitError(f"{column} is empty")
    return [_turn(turn) for turn in turns]


def _chat(messages: Sequence[Message], values: Mapping[str, Any], origin: Origin) -> ChatExample:
    system = _text(values, "system", "")
    if system.strip() and messages[0].role != "system":
        messages = [Message("system", system), *messages]
    if not any(message.role == "assistant" for message in messages):
        raise UnfitError("no assistant's turn")
    return ChatExample(tuple(messages), origin, _row_weight(values), _tools(values))


# ---------------------------------------------------------------- the formats


def _from_messages(values: Mapping[str, Any], origin: Origin) -> Example:
    return _chat(_turns(values["messages"], "messages"), values, origin)


def _from_sharegpt(values: Mapping[str, Any], origin: Origin) -> Example:
    return _chat(_turns(values["conversations"], "conversations"), values, origin)


def _from_alpaca(values: Mapping[str, Any], origin: Origin) -> Example:
    asked = "\n".join(part for part in (_text(values, "instruction"), _text(values, "input", "")) if part.strip())
    if not asked:
        raise UnfitError("empty instruction")
    messages: list[Message] = []
    history = _parsed(values.get("history") or [], "history")
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(said, str) for said in pair):
            raise UnfitError("history is not a list of [question, answer]")
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    messages += [Message("user", asked), Message("assistant", _words(values, "output"))]
    return _chat(messages, values, origin)


def _from_completion(values: Mapping[str, Any], origin: Origin) -> Example:
    """Two strings, or turns on either side; of turns only the completion's are trained."""
    prompt, completion = values["prompt"], values["completion"]
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return CompletionExample(_words(values, "prompt"), _words(values, "completion"), origin, _row_weight(values))
    asked = _side(values, "prompt", "user")
    said = _side(values, "completion", "assistant")
    return _chat([*(Message(m.role, m.content, 0.0, m.extra) for m in asked), *said], values, origin)


def _side(values: Mapping[str, Any], column: str, role: str) -> list[Message]:
    if isinstance(values[column], list):
        return _turns(values[column], column)
    return [Message(role, _words(values, column))]


def _from_text(values: Mapping[str, Any], origin: Origin) -> Example:
    return TextExample(_words(values, "text"), origin, _row_weight(values))


@dataclass(frozen=True)
class Format:
    """A way to write examples as rows: its columns, and how a row becomes an example."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Callable[[Mapping[str, Any], Origin], Example]


FormatName = Literal["messages", "sharegpt", "alpaca", "completion", "text"]
FORMATS: dict[str, Format] = {  # in order of precedence: a row with `messages` and `prompt` is of the first
    "messages": Format(("messages",), ("tools", "system", "weight"), _from_messages),
    "sharegpt": Format(("conversations",), ("tools", "system", "weight"), _from_sharegpt),
    "alpaca": Format(("instruction", "output"), ("input", "system", "history", "tools", "weight"), _from_alpaca),
    "completion": Format(("prompt", "completion"), ("system", "tools", "weight"), _from_completion),
    "text": Format(("text",), ("weight",), _from_text),
}
COLUMNS = frozenset(column for known in FORMATS.values() for column in known.required + known.optional)


# ---------------------------------------------------------------- a file's rows to examples


def examples(rows: Iterable[Row | Refusal], format: str = "auto",
             columns: Columns | None = None) -> Iterator[Example | Refusal]:
    """One example or refusal for each row of one file. Raises `DataError` where the columns fit no format."""
    columns = columns or {}
    found = None if format == "auto" else format
    strangers: list[Row] = []
    for row in rows:
        if isinstance(row, Refusal):
            yield row
            continue
        values = _renamed(row.values, columns)
        if {"chosen", "rejected"} <= values.keys():
            raise DataError(f"{row.origin}: 'chosen' and 'rejected' are preference pairs, not examples to imitate",
                            "use an objective for preferences, or map the answer that you want with `columns:`")
        found = found or recognise(values)
        if found is None:
            strangers.append(row)
            if len(strangers) >= PATIENCE:
                break
            yield Refusal(row.origin, "columns of no known format")
        else:
            yield convert(values, found, row.origin)
    if found is None and strangers:
        raise _no_format(strangers[0], columns)


def recognise(values: Mapping[str, Any]) -> str | None:
    """The first format whose required columns all have a value."""
    return next((name for name, known in FORMATS.items()
                 if all(values.get(column) is not None for column in known.required)), None)


def convert(values: Mapping[str, Any], format: str, origin: Origin) -> Example | Refusal:
    """One row of a known format."""
    known = FORMATS[format]
    missing = [column for column in known.required if values.get(column) is None]
    if missing:
        needed = ", ".join(known.required)
        return Refusal(origin, f"no {missing[0]}", f"the file's format is {format}, which needs {needed}")
    try:
        return known.convert(values, origin)
    except UnfitError as unfit:
        return Refusal(origin, unfit.reason, unfit.detail)


def _renamed(values: Mapping[str, Any], columns: Columns) -> Mapping[str, Any]:
    """The row under standard names. A column that `columns` claims is not also found under its own name."""
    if not columns:
        return values
    claimed = {str(theirs) for theirs in columns.values()}
    kept = {name: value for name, value in values.items() if name not in claimed}
    return {**kept, **{ours: values.get(str(theirs)) for ours, theirs in columns.items()}}


def _no_format(row: Row, columns: Columns) -> DataError:
    there = [name[:40] for name in row.values]
    wrong = [str(theirs) for theirs in columns.values() if str(theirs) not in row.values]
    if wrong:
        return DataError(f"{row.origin}: `columns` names {wrong[0]!r}, which the file has not",
                         nearest(wrong[0], there))
    known = "; ".join(f"{name} ({', '.join(f.required)})" for name, f in FORMATS.items())
    return DataError(f"{row.origin}: the columns {', '.join(map(repr, there))} fit no known format: {known}",
                     "say which column is which, as in `columns: {prompt: question, completion: answer}`")
