"""Chats into words: the base's chat template, and which of the words are trained. Read `formats.py` first.

The whole conversation is rendered once. What an assistant says runs from the end of

    render(messages before it, with the generation prompt)     to the end of     render(messages up to it)

that is, from where a sampler would begin to write, through the mark that ends the turn, to whatever the template puts
behind it. Some templates rewrite history (they drop the thoughts of earlier turns). Then the earlier rendering is not a
beginning of the later one, and each trained turn becomes a text of its own, as the model would meet it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from jinja2 import TemplateError

from luthier.core.examples import ChatExample, Message
from luthier.core.protocols import Tokenizer

FALLBACK_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'] | capitalize + ':\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token or '' }}{% endif %}"
    "{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}")
"""For a base without a chat template: `### User:`, a line break, the words; the assistant's end with the end mark."""

TOOLS_INTRODUCED = ("You may call these functions. To call one, answer with its name and arguments as JSON between "
                    "<tool_call> and </tool_call>.\n")


class RenderError(ValueError):
    """The chat template refuses this conversation, or hides where a turn begins."""


@dataclass(frozen=True)
class Span:
    """Characters `start` to `end` of a text, and the weight of predicting them."""

    start: int
    end: int
    weight: float


@dataclass(frozen=True)
class Rendered:
    """A text, the parts of it that have a weight of their own, in order, and the weight of all the rest."""

    text: str
    spans: tuple[Span, ...] = ()
    rest: float = 0.0


def turns(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], tokenizer: Tokenizer,
          system: str | None = None) -> list[dict[str, Any]]:
    """Messages as the template takes them. Function calls and tools that it does not know are put into words."""
    known = _source(tokenizer)
    found = [_turn(message, "tool_calls" in known) for message in messages]
    if system and found[0]["role"] != "system":
        found.insert(0, {"role": "system", "content": system})
    if tools and "tools" not in known:
        listed = TOOLS_INTRODUCED + "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        if found[0]["role"] == "system":
            found[0] = {**found[0], "content": found[0]["content"] + "\n\n" + listed}
        else:
            found.insert(0, {"role": "system", "content": listed})
    return found


def _source(tokenizer: Tokenizer) -> str:
    """The template's source; some bases have several, by name."""
    return json.dumps(tokenizer.chat_template) if tokenizer.chat_template else FALLBACK_TEMPLATE


def _turn(message: Message, knows_calls: bool) -> dict[str, Any]:
    turn = {**message.extra, "role": message.role, "content": message.content}
    if message.extra.get("tool_calls") and not knows_calls:
        calls = turn.pop("tool_calls")
        said = [message.content] if message.content else []
        turn["content"] = "\n".join(said + [called(call) for call in calls])
    return turn


def called(call: Mapping[str, Any]) -> str:
    """A function call in words, for templates that know none."""
    inner = call.get("function", call)
    return f"<tool_call>\n{json.dumps(inner, ensure_ascii=False)}\n</tool_call>"


def render(turns: list[dict[str, Any]], tokenizer: Tokenizer, *, tools: Sequence[Mapping[str, Any]] = (),
           generate: bool = False) -> str:
    """The conversation as text; with `generate`, up to where the assistant begins to write."""
    options: dict[str, Any] = {} if tokenizer.chat_template else {"chat_template": FALLBACK_TEMPLATE}
    if tools:
        options["tools"] = list(tools)
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generate, **options))
    except (TemplateError, TypeError) as fault:
        raise RenderError(str(fault)) from fault


def train_weights(messages: Sequence[Message], train_on: str) -> list[float]:
    """The weight of each message: its own, else what `train_on` says of its role."""
    last = max((i for i, m in enumerate(messages) if m.role == "assistant"), default=-1)
    by_rule = {"all": lambda i: 1.0, "last": lambda i: float(i == last),
               "assistant": lambda i: float(messages[i].role == "assistant")}[train_on]
    return [by_rule(i) if message.weight is None else message.weight for i, message in enumerate(messages)]


def rendered(example: ChatExample, tokenizer: Tokenizer, *, system: str | None, train_on: str) -> list[Rendered]:
    """The texts of a chat with their trained parts: one, or one for each trained turn where history is rewritten."""
    said = turns(example.messages, example.tools, tokenizer, system)
    rest = float(train_on == "all")
    weights = [rest] * (len(said) - len(example.messages)) + train_weights(example.messages, train_on)
    chat = _Chat(said, weights, tokenizer, example.tools, whole=train_on == "all")
    own = [i for i, weight in enumerate(weights) if weight != rest]
    text = chat.until(len(said))
    if all(text.startswith(chat.until(i + 1)) for i in own):
        return [Rendered(text, tuple(chat.span(i) for i in own), rest)]
    if rest:
        raise RenderError("the template rewrites earlier turns, so they cannot have weights of their own")
    return [Rendered(chat.until(i + 1), (chat.span(i),)) for i in own]


@dataclass(frozen=True)
class _Chat:
    """One conversation being rendered. `whole`: headers of the assistant's turns are trained too."""

    turns: list[dict[str, Any]]
    weights: list[float]
    tokenizer: Tokenizer
    tools: Sequence[Mapping[str, Any]]
    whole: bool
    known: dict[tuple[int, bool], str] = field(default_factory=dict)

    def until(self, count: int, generate: bool = False) -> str:
        """The first `count` turns as text; rendered once."""
        if (count, generate) not in self.known:
            text = render(self.turns[:count], self.tokenizer, tools=self.tools, generate=generate)
            self.known[count, generate] = text
        return self.known[count, generate]

    def span(self, index: int) -> Span:
        text = self.until(index + 1)
        return Span(self._start(index, text), len(text), self.weights[index])

    def _start(self, index: int, text: str) -> int:
        """Where turn `index` begins to be trained in `text`, which ends with it."""
        turn = self.turns[index]
        if self.whole or turn["role"] != "assistant":
            return _common(self.until(index), text) if index else 0
        if index == 0:  # nothing was asked, so there is no generation prompt to end behind
            start = text.find(turn["content"].strip())
            if start < 0:
                raise RenderError("an opening turn of the assistant is not found in the rendered chat")
            return start
        prompt = self.until(index, generate=True)
        start = _common(prompt, text)
        if start < len(prompt) and start < _common(self.until(index), text):
            raise RenderError("the template rewrites what stands before the assistant's turn")
        return start


def _common(first: str, second: str) -> int:
    """How many characters two texts share at their beginning."""
    if second.startswith(first):
        return len(first)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def prompt_and_answer(example: ChatExample, tokenizer: Tokenizer, system: str | None) -> tuple[str, str]:
    """The rendered chat up to the assistant's last turn with the generation prompt, and that turn's words."""
    said = turns(example.messages, example.tools, tokenizer, system)
    last = max((i for i, turn in enumerate(said) if turn["role"] == "assistant"), default=len(said))
    answer = _answer(said[last]) if last < len(said) else ""
    return render(said[:last], tokenizer, tools=example.tools, generate=True), answer


def _answer(turn: Mapping[str, Any]) -> str:
    calls: Iterable[Mapping[str, Any]] = turn.get("tool_calls") or ()
    return "\n".join([*([turn["content"]] if turn["content"] else []), *map(called, calls)])
