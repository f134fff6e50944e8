"""Converts messages to the turns of a chat template without losing or adding content.

| a row contains | and the template | then |
|---|---|---|
| role `developer` | has no such role | the role becomes `system` |
| a system turn | renders none at that place | its text is put before the next user turn, or becomes one |
| a system turn | drops it after an assistant turn | its text is put before the user turn, in the saved template too |
| `reasoning_content` | does not render it | the content starts with `<think>`, the reasoning, `</think>` |
| `tool_calls` | does not render them | the content ends with `<tool_call>`, the call, `</tool_call>` |
| `tools` | does not render them | the system turn lists them |
| a tool result | has no role `tool` | a user turn, in `<tool_response>` ... `</tool_response>` |
| `tool_call_id`, `id`, a tool's `name` | does not render them | omitted: they only link a result to its call |
| any other key of a message | does not render it | the row is rejected |
| a control token in text | - | plain text (`control_tokens.py`) |

Each rule that was used is a remark, which the data report counts. Serving uses the same rules, so requests are
rendered like training rows. Read `templates.py` first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field

from luthier.core.config import Config
from luthier.core.examples import Message
from luthier.core.protocols import Tokenizer
from luthier.data.control_tokens import ControlTokens, find_control_tokens
from luthier.data.templates import PROBES, ChatTemplate, RenderError, choose_template

TOOLS_INTRODUCED = ("You may call these functions. To call one, answer with its name and arguments as JSON between "
                    "<tool_call> and </tool_call>.\n")
LINKS = frozenset({"tool_call_id", "id"})  # keys that link a result to its call
SYSTEM = ("system", "developer")


class ChatConfig(Config):
    """How messages and prompts become text."""

    control_tokens: Literal["text", "token"] = Field("text", description=(
        "how control tokens in message text are read: as plain text, or as tokens"))
    ignore_keys: tuple[str, ...] = Field((), description=(
        "message keys to drop; a row with any other key that the chat template does not render is rejected"))


@dataclass(frozen=True)
class RenderingRules:
    """Settings for rendering messages; `system` is added to conversations without a system turn."""

    chat: ChatConfig = field(default_factory=ChatConfig)
    system: str | None = None


@dataclass(frozen=True)
class Conversation:
    """The input of a template.

    Args:
        turns: one mapping each.
        weights: of each turn; None if not given.
        remarks: the rules that were used.
    """

    template: ChatTemplate
    turns: tuple[Mapping[str, Any], ...]
    weights: tuple[float | None, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    remarks: tuple[str, ...] = ()


def build_conversation(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], tokenizer: Tokenizer,
                       rules: RenderingRules) -> Conversation:
    """Builds the conversation for the template that renders it. Raises `RenderError` for a key that no rule covers."""
    if rules.system and (not messages or messages[0].role not in SYSTEM):
        messages = [Message("system", rules.system), *messages]
    kept = [Message(m.role, m.content, m.weight, {k: v for k, v in m.extra.items() if k not in rules.chat.ignore_keys})
            for m in messages]
    template = choose_template(tokenizer, _list_needs(kept, tools), bool(tools))
    return _Builder(template, find_control_tokens(tokenizer, template.source, rules.chat.control_tokens)).build(kept,
                                                                                                                tools)


def _list_needs(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, Any]]:
    """The keys and roles that a template should render, to choose among several templates."""
    keys = {(m.role, key): value for m in messages for key, value in m.extra.items() if key not in LINKS}
    return [(role, key, value) for (role, key), value in keys.items()] + ([("user", "tools", None)] if tools else [])


class _Builder:
    """Applies the rules of the table turn by turn."""

    def __init__(self, template: ChatTemplate, control: ControlTokens) -> None:
        self.template, self.control = template, control
        self.turns: list[dict[str, Any]] = []
        self.weights: list[float | None] = []
        self.remarks: dict[str, None] = {}  # in the order of their first use

    def build(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> Conversation:
        if not self.template.given:
            self._remark("the base has no chat template: turns are rendered as '### User:' and '### Assistant:', and "
                         "this template is saved with the run")
        elif self.template.eos_added:
            self._remark("the chat template writes no token at the end of a turn: the eos token was added, also in "
                         "the template that is saved with the run")
        elif self.template.end_of_turn is None:
            self._remark("neither the chat template nor the tokenizer has an end-of-turn token: generated answers "
                         "will not stop")
        if self.template.folds_system and messages and messages[0].role in SYSTEM:
            self._remark("the chat template drops the system turn after an assistant turn: its text was put before "
                         "the user turn, also in the template that is saved with the run")
        listed = self._mark(list(tools), "tool")
        if listed and not self.template.renders("user", "tools"):
            messages = self._with_tools(messages, listed)
            listed = []
        folded: list[str] = []
        for place, message in enumerate(messages):
            turn = self._turn(message)
            if turn["role"] == "system" and not self._renders_system(place):
                self._remark("a system turn was put into the user turn, because the chat template supports no system "
                             "turn there")
                folded.append(turn["content"])
                continue
            if folded and turn["role"] != "user":
                self._add_system_text(folded)
            elif folded:
                turn["content"] = "\n\n".join([*folded, turn["content"]])
            folded = []
            self._add(turn, message.weight)
        if folded:
            self._add_system_text(folded)
        return Conversation(self.template, tuple(self.turns), tuple(self.weights), tuple(listed), tuple(self.remarks))

    def _renders_system(self, place: int) -> bool:
        return self.template.system if place == 0 else self.template.late_system

    def _add(self, turn: dict[str, Any], weight: float | None) -> None:
        self.turns.append(turn)
        self.weights.append(weight)

    def _add_system_text(self, texts: list[str]) -> None:
        """System turns without a following user turn: appended to the previous turn, or a separate user turn."""
        if self.turns and self.turns[-1]["role"] == "user":
            self.turns[-1]["content"] = "\n\n".join([self.turns[-1]["content"], *texts])
        else:
            self._add({"role": "user", "content": "\n\n".join(texts)}, None)

    def _remark(self, sentence: str) -> None:
        self.remarks[sentence] = None

    def _mark(self, value: Any, role: str) -> Any:
        marked = self.control.mark(value, role)
        if marked != value:
            self._remark("control tokens in message text were read as plain text (data.chat.control_tokens)")
        return marked

    def _with_tools(self, messages: Sequence[Message], tools: Sequence[Any]) -> list[Message]:
        """The tools as text, at the end of the system turn."""
        self._remark("tools were listed in the system turn, because the chat template does not render them")
        listed = TOOLS_INTRODUCED + "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        if messages and messages[0].role in SYSTEM:
            first = messages[0]
            return [Message(first.role, f"{first.content}\n\n{listed}", first.weight, first.extra), *messages[1:]]
        return [Message("system", listed), *messages]

    def _turn(self, message: Message) -> dict[str, Any]:
        """One message by the rules for its role and keys."""
        role = "system" if message.role == "developer" and not self.template.developer else message.role
        turn: dict[str, Any] = {"role": role, "content": self._mark(message.content, role)}
        for key, value in message.extra.items():
            if self.template.renders(role, key, value):
                turn[key] = self._mark(value, role)
            elif key == "reasoning_content" and role == "assistant":
                self._remark("reasoning was put into the content as <think> ... </think>, because the chat template "
                             "does not render reasoning_content")
                turn["content"] = f"<think>\n{self._mark(value, role).strip(chr(10))}\n</think>\n\n{turn['content']}"
            elif key == "tool_calls" and role == "assistant":
                self._remark("function calls were put into the content as <tool_call> ... </tool_call>, because the "
                             "chat template does not render them")
                said = [turn["content"]] if turn["content"] else []
                turn["content"] = "\n".join(said + [format_call(call) for call in self._mark(value, role)])
            elif key in LINKS or (key == "name" and role == "tool"):
                self._remark(f"the chat template does not render {key!r}, which links a result to its call")
            else:
                raise RenderError(f"{key!r} of a message with role {role!r}; remove this key, or add it to "
                                  f"data.chat.ignore_keys", "a key of a message that the chat template does not render")
        if role == "tool" and not self.template.tool:
            self._remark("a tool result was put into a user turn as <tool_response> ... </tool_response>, because the "
                         "chat template has no role for it")
            return {"role": "user", "content": f"<tool_response>\n{turn['content']}\n</tool_response>"}
        return turn


LINK = PROBES["id"]
LINK_MISSING = "a key that the chat template needs is missing"
LINK_REFUSED = "a key has a value that the chat template does not accept"


def with_links(turns: Sequence[Mapping[str, Any]], replace: bool) -> tuple[list[dict[str, Any]], list[str]]:
    """The turns with an id added to every call and result that has none (`replace`: to all), and these keys."""
    keys: dict[str, None] = {}

    def linked(mapping: Mapping[str, Any], key: str, kind: str) -> dict[str, Any]:
        if not replace and mapping.get(key):
            return dict(mapping)
        keys[f"{key!r} of {kind}"] = None
        return {**mapping, key: LINK}

    found = [linked(turn, "tool_call_id", "a tool's result") if turn["role"] == "tool" else dict(turn)
             for turn in turns]
    for turn in found:
        if turn.get("tool_calls"):
            turn["tool_calls"] = [linked(call, "id", "a function call") for call in turn["tool_calls"]]
    return found, list(keys)


def format_call(call: Mapping[str, Any]) -> str:
    """A function call as text, for templates that do not render calls."""
    inner = call.get("function", call)
    return f"<tool_call>\n{json.dumps(inner, ensure_ascii=False)}\n</tool_call>"
