"""Converts rows with chats, completions and documents. Read `row_values.py` first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from luthier.core.errors import suggest_nearest
from luthier.core.examples import ChatExample, CompletionExample, Example, Message, Origin, TextExample
from luthier.data.row_values import (
    InvalidRowError,
    Values,
    parse_json,
    read_nonempty_string,
    read_row_weight,
    read_string,
    read_tools,
    read_weight,
)

ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant", "model": "assistant",
         "observation": "tool", "function_response": "tool", "function_call": "function_call", "system": "system",
         "user": "user", "assistant": "assistant", "tool": "tool", "function": "tool", "developer": "developer"}
SYSTEM = ("system", "developer")  # roles above the user
READ = ("role", "from", "content", "value", "weight", "train", "function_call", "reasoning_content", "reasoning",
        "thinking")  # keys that `read_turn` reads
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # names for reasoning


def read_turn(raw: Any) -> Message:
    """One turn, as `role`/`content` or as ShareGPT's `from`/`value`."""
    if not isinstance(raw, dict):
        raise InvalidRowError("a turn is not an object", f"it is {type(raw).__name__}")
    named = raw.get("role") or raw.get("from")
    if not isinstance(named, str):
        raise InvalidRowError("a turn has no role")
    if named not in ROLES:
        raise InvalidRowError("a turn has an unknown role", f"{named!r}: {suggest_nearest(named, ROLES)}")
    role = ROLES[named]
    content = raw.get("content") if raw.get("content") is not None else raw.get("value")
    extra = {key: value for key, value in raw.items() if key not in READ and value not in (None, "", [], {})}
    if role == "function_call":
        return Message("assistant", "", _read_turn_weight(raw),
                       {"tool_calls": _read_tool_calls(parse_json(content, "function_call"))})
    extra |= _read_reasoning(raw)
    calls = _read_tool_calls(extra["tool_calls"]) if extra.get("tool_calls") else []
    if raw.get("function_call") not in (None, "", {}):  # OpenAI's older name for one call
        calls += _read_tool_calls(raw["function_call"])
    if calls:
        extra["tool_calls"] = calls
    said = _read_content(content)
    if role == "assistant" and not said.strip() and not {"tool_calls", "reasoning_content"} & extra.keys():
        raise InvalidRowError("an assistant turn is empty")
    return Message(role, said, _read_turn_weight(raw), extra)


def _read_reasoning(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A turn's reasoning under the name that chat templates use."""
    found = {str(raw[key]): raw[key] for key in THOUGHTS if raw.get(key) not in (None, "", [], {})}
    if len(found) > 1:
        raise InvalidRowError("a turn has two reasoning texts", ", ".join(key for key in THOUGHTS if raw.get(key)))
    thought = next(iter(found.values()), None)
    if thought is not None and not isinstance(thought, str):
        raise InvalidRowError("the reasoning of a turn is not a string", f"they are {type(thought).__name__}")
    return {} if thought is None else {"reasoning_content": thought}


def _read_turn_weight(turn: Mapping[str, Any]) -> float | None:
    train = turn.get("train")
    if turn.get("weight") is None and train is not None:
        if not isinstance(train, bool):
            raise InvalidRowError("train is not true or false", repr(train))
        return float(train)
    return read_weight(turn.get("weight"))


def _read_content(content: Any) -> str:
    """A turn's content; OpenAI's list of text parts is joined."""
    if content is None:
        return ""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise InvalidRowError("a turn has a part that is not text")
        return "".join(map(str, parts))
    if not isinstance(content, str):
        raise InvalidRowError("the content of a turn is not a string", f"it is {type(content).__name__}")
    return content


def _read_tool_calls(raw: Any) -> list[dict[str, Any]]:
    """Function calls as `{"type": "function", "function": {"name", "arguments"}}`, arguments parsed from JSON."""
    calls = []
    for call in raw if isinstance(raw, list) else [raw]:
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise InvalidRowError("a function call has no name")
        arguments = inner.get("arguments", {})
        if isinstance(arguments, str) and arguments.strip().startswith("{"):
            arguments = parse_json(arguments, "function_call")
        calls.append({**({"id": call["id"]} if call.get("id") else {}), "type": "function",
                      "function": {"name": inner["name"], "arguments": arguments}})
    return calls


def read_turns(raw: Any, column: str) -> list[Message]:
    found = parse_json(raw, column)
    if not isinstance(found, (list, tuple)):
        raise InvalidRowError(f"{column} is not a list of turns", f"it is {type(found).__name__}")
    if not found:
        raise InvalidRowError(f"{column} is empty")
    return [read_turn(said) for said in found]


def build_chat(messages: Sequence[Message], values: Values, origin: Origin) -> ChatExample:
    system = read_string(values, "system", "")
    if system.strip() and messages[0].role not in SYSTEM:
        messages = [Message("system", system), *messages]
    if not any(message.role == "assistant" for message in messages):
        raise InvalidRowError("no assistant turn")
    return ChatExample(tuple(messages), origin, read_row_weight(values), read_tools(values))


# ---------------------------------------------------------------- the formats


def convert_messages(values: Values, origin: Origin) -> Example:
    return build_chat(read_turns(values["messages"], "messages"), values, origin)


def convert_sharegpt(values: Values, origin: Origin) -> Example:
    return build_chat(read_turns(values["conversations"], "conversations"), values, origin)


def convert_alpaca(values: Values, origin: Origin) -> Example:
    asked = "\n".join(part for part in (read_string(values, "instruction"), read_string(values, "input", ""))
                      if part.strip())
    if not asked:
        raise InvalidRowError("empty instruction")
    messages: list[Message] = []
    history = parse_json(values.get("history") or [], "history")
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(said, str) for said in pair):
            raise InvalidRowError("history is not a list of [question, answer]")
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    messages += [Message("user", asked), Message("assistant", read_nonempty_string(values, "output"))]
    return build_chat(messages, values, origin)


def convert_completion(values: Values, origin: Origin) -> Example:
    """A prompt and a completion, each a string or a list of turns; of turns, only those of the completion are trained.
    With a system prompt or tools, strings are converted to turns, because plain text has no place for these."""
    prompt, completion = values["prompt"], values["completion"]
    beside = bool(read_string(values, "system", "").strip()) or bool(read_tools(values))
    if not beside and not isinstance(prompt, list) and not isinstance(completion, list):
        return CompletionExample(read_nonempty_string(values, "prompt"), read_nonempty_string(values, "completion"),
                                 origin, read_row_weight(values))
    asked = _read_side(values, "prompt", "user")
    said = _read_side(values, "completion", "assistant")
    return build_chat([*(Message(m.role, m.content, 0.0, m.extra) for m in asked), *said], values, origin)


def _read_side(values: Values, column: str, role: str) -> list[Message]:
    if isinstance(values[column], list):
        return read_turns(values[column], column)
    return [Message(role, read_nonempty_string(values, column))]


def convert_text(values: Values, origin: Origin) -> Example:
    return TextExample(read_nonempty_string(values, "text"), origin, read_row_weight(values))
