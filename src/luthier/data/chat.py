"""Renders conversations as text and marks which characters are trained. Read `conversation.py` first.

An assistant turn is trained from the position where generation would start to the end-of-turn token:

    start    the end of   render(turns before it, with the generation prompt)
    end      the end of the end-of-turn token in   render(turns up to it)

The text before `start` is therefore exactly the prompt of that turn in generation: `render_prompt` renders it for
evaluation, chat, serving and rollouts. Positions of turns follow from these renderings; the text is never searched.

Some templates rewrite history (they drop the reasoning of earlier turns). Then the text up to one turn is not a prefix
of the text up to the next turn, and each trained turn becomes a separate text, as the model sees it in generation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from luthier.core.examples import ChatExample, Message
from luthier.core.protocols import Tokenizer
from luthier.data.control_tokens import START, is_mark_broken, remove_marks
from luthier.data.conversation import (
    LINK_MISSING,
    LINK_REFUSED,
    SYSTEM,
    Conversation,
    RenderingRules,
    build_conversation,
    format_call,
    with_links,
)
from luthier.data.templates import RenderError, measure_common_prefix

__all__ = ["RenderedChat", "RenderError", "WeightedSpan", "find_content_ranges", "render_chat", "render_prompt",
           "compute_turn_weights"]

THOUGHT, THOUGHT_END = "<think>", "</think>"
THOUGHTS_LOST = "reasoning that the chat template does not render"


@dataclass(frozen=True)
class WeightedSpan:
    """Characters `start` to `end` of a text, and their loss weight."""

    start: int
    end: int
    weight: float


@dataclass(frozen=True)
class RenderedChat:
    """A text, its weighted spans in order, and the weight of all other characters.

    Args:
        boundaries: positions where generation starts; no token spans them.
        remarks: the rules that were used to render the row, for the data report.
    """

    text: str
    spans: tuple[WeightedSpan, ...] = ()
    rest: float = 0.0
    boundaries: tuple[int, ...] = ()
    remarks: tuple[str, ...] = ()


def compute_turn_weights(turns: Sequence[Mapping[str, Any] | Message], given: Sequence[float | None],
                         loss_on: str) -> list[float]:
    """The weight of each turn: its own, otherwise the weight that `loss_on` gives its role."""
    roles = [turn.role if isinstance(turn, Message) else turn["role"] for turn in turns]
    last = max((i for i, role in enumerate(roles) if role == "assistant"), default=-1)
    by_rule = {"all": lambda i: 1.0, "last": lambda i: float(i == last),
               "assistant": lambda i: float(roles[i] == "assistant")}[loss_on]
    return [by_rule(i) if weight is None else weight for i, weight in enumerate(given)]


def render_chat(example: ChatExample, tokenizer: Tokenizer, rules: RenderingRules, loss_on: str) -> list[RenderedChat]:
    """Renders a chat: one text, or one for each trained turn if the template rewrites history. Raises `RenderError`."""
    conversation = build_conversation(example.messages, example.tools, tokenizer, rules)
    rest = float(loss_on == "all")
    weights = compute_turn_weights(conversation.turns, conversation.weights, loss_on)
    chat = _ChatRenderer(conversation, weights, whole=loss_on == "all")
    own = [i for i, weight in enumerate(weights) if weight != rest]
    text = chat.until(len(conversation.turns))
    chat.refuse_dropped(len(conversation.turns))
    spoken = [i for i, turn in enumerate(conversation.turns) if turn["role"] == "assistant"]
    if rest and spoken and chat.drops_thought(spoken[-1]):
        raise RenderError("set data.loss_on to assistant, which trains each turn after its own prompt", THOUGHTS_LOST)
    if all(text.startswith(chat.through(i)) for i in own):
        return [chat.rendered(text, own, rest)]
    if rest:
        raise RenderError("the template rewrites earlier turns, so these cannot have separate weights")
    return [chat.rendered(chat.alone(i), [i], 0.0) for i in own]


def render_prompt(example: ChatExample, tokenizer: Tokenizer, rules: RenderingRules) -> tuple[RenderedChat, str]:
    """The text before the last assistant turn (of a chat without one: the whole text), and that turn's content. Raises
    `RenderError`."""
    conversation = build_conversation(example.messages, example.tools, tokenizer, rules)
    last = max((i for i, turn in enumerate(conversation.turns) if turn["role"] == "assistant"),
               default=len(conversation.turns))
    chat = _ChatRenderer(conversation, [0.0] * len(conversation.turns))
    prompt = chat.prompt(last)
    chat.refuse_dropped(last, generate=True)
    answer = remove_marks(_is_answer(conversation.turns[last])) if last < len(conversation.turns) else ""
    return RenderedChat(prompt, boundaries=chat.boundaries(prompt, last), remarks=conversation.remarks), answer


def find_content_ranges(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], tokenizer: Tokenizer,
                        rules: RenderingRules) -> tuple[tuple[int, int], ...]:
    """Character ranges of the content of a prompt's turns, except system turns: what truncation may remove without
    changing a control token, a header or the system prompt."""
    conversation = build_conversation(messages, tools, tokenizer, rules)
    return _ChatRenderer(conversation, [0.0] * len(conversation.turns)).contents()


def _is_answer(turn: Mapping[str, Any]) -> str:
    calls: Sequence[Mapping[str, Any]] = turn.get("tool_calls") or ()
    return "\n".join([*([turn["content"]] if turn["content"] else []), *map(format_call, calls)])


@dataclass(frozen=True)
class _ChatRenderer:
    """Renders one conversation. `whole`: headers of assistant turns are trained too."""

    conversation: Conversation
    weights: Sequence[float]
    whole: bool = False
    known: dict[tuple[int, bool], str] = field(default_factory=dict)
    prompts: dict[int, str] = field(default_factory=dict)

    def until(self, count: int, generate: bool = False) -> str:
        """The first `count` turns as text; rendered once."""
        if (count, generate) not in self.known:
            text = self._render(self.conversation.turns[:count], generate)
            if is_mark_broken(text):
                raise RenderError("it splits a control token that is written in a message")
            self.known[count, generate] = text
        return self.known[count, generate]

    def _render(self, turns: Sequence[Mapping[str, Any]], generate: bool) -> str:
        """The turns as text. If the template fails only because a key is missing, the error names the key."""
        try:
            return self.conversation.template.render(turns, tools=self.conversation.tools, generate=generate)
        except RenderError as fault:
            for reason, replace in ((LINK_MISSING, False), (LINK_REFUSED, True)):
                linked, keys = with_links(turns, replace)
                if keys and self._try(linked, generate) is not None:
                    raise RenderError(f"{' and '.join(keys)}: {fault}", reason) from fault
            raise

    def _try(self, turns: Sequence[Mapping[str, Any]], generate: bool = False) -> str | None:
        try:
            return self.conversation.template.render(turns, tools=self.conversation.tools, generate=generate)
        except RenderError:
            return None

    def prompt(self, index: int) -> str:
        """The prompt of assistant turn `index`: all turns before it, with the generation prompt."""
        if index not in self.prompts:
            opening = self.conversation.template.opening
            prompt = self.until(index, generate=True) if index else opening(self.conversation.tools)
            self.prompts[index] = self._with_header(prompt, index) if index else prompt
        return self.prompts[index]

    def _with_header(self, prompt: str, index: int) -> str:
        """The prompt if the template writes no generation prompt after these turns: ends with the header that it
        writes before the assistant's content."""
        if not self.conversation.template.has_generation_prompt or prompt != self.until(index):
            return prompt
        first, second = (self._try([*self.conversation.turns[:index], {"role": "assistant", "content": content}]) or ""
                         for content in ("qqq", "jjj"))
        return first[:max(measure_common_prefix(first, second), len(prompt))] if first.startswith(prompt) else prompt

    def alone(self, index: int) -> str:
        """The text up to and including turn `index`, which starts with its prompt."""
        text = self.until(index + 1)
        if self.conversation.turns[index]["role"] != "assistant" or self.whole:
            return text
        prompt = self.prompt(index)
        if not text.startswith(prompt):
            return prompt + self._behind(prompt, text, index)
        if not self.drops_thought(index):
            return text
        if THOUGHT_END in prompt[measure_common_prefix(prompt, self.until(index)) if index else 0:]:
            raise RenderError("the generation prompt already closes the reasoning; remove reasoning_content, or add "
                              "it to data.chat.ignore_keys", THOUGHTS_LOST)
        return f"{prompt}{THOUGHT}\n{self._close_thought(index, text[len(prompt):])}"

    def _close_thought(self, index: int, words: str) -> str:
        """The reasoning of a turn, its end marker, and the content after it."""
        thought = self._thought(index)
        words = words.removeprefix("\n\n") if thought else words  # these are already after the reasoning
        return f"{thought}\n{THOUGHT_END}\n\n{words}"

    def _thought(self, index: int) -> str:
        turn = self.conversation.turns[index]
        content, thought = turn["content"], turn.get("reasoning_content", "")
        if THOUGHT_END in content and content.startswith(THOUGHT):
            thought = content[len(THOUGHT):content.index(THOUGHT_END)]
        return str(thought).strip(chr(10))

    def drops_thought(self, index: int) -> bool:
        """Whether the text up to turn `index` does not contain its reasoning."""
        turn, thought = self.conversation.turns[index], self._thought(index)
        if not thought.strip():
            return False
        content = turn["content"]
        inside = THOUGHT_END in content and content.startswith(THOUGHT)
        changed = {"content": f"{THOUGHT}j{content[len(THOUGHT):]}"} if inside else {"reasoning_content": f"j{thought}"}
        return self._try([*self.conversation.turns[:index], {**turn, **changed}]) == self.until(index + 1)

    def _behind(self, prompt: str, text: str, index: int) -> str:
        """The turn after a generation prompt that opens reasoning, when the turn is rendered without reasoning."""
        twins = (self.conversation.template.render([*self.conversation.turns[:index],
                                                    {"role": "assistant", "content": content}],
                                           tools=self.conversation.tools) for content in ("qqq", "jjj"))
        shared = min(measure_common_prefix(prompt, other) for other in (text, *twins))
        opened = prompt[shared:]
        if not index or shared < len(self.until(index)) or THOUGHT not in opened:
            raise RenderError("it rewrites the text before an assistant turn")
        return self._close_thought(index, text[shared:])

    def through(self, index: int) -> str:
        """`alone` up to the end-of-turn token. Text that the template writes after it belongs to no turn."""
        text, marks = self.alone(index), self.conversation.template.turn_end_texts
        if self.conversation.turns[index]["role"] != "assistant" or self.whole or not marks:
            return text
        # The template ends with one of them; one that a message spells is between `START` and `END`.
        at, mark = max((text.rfind(mark), mark) for mark in marks)
        return text[:at + len(mark)] if at >= len(self.prompt(index)) and text[at - 1] != START else text

    def rendered(self, text: str, own: Sequence[int], rest: float) -> RenderedChat:
        """Removes what the template writes after the end-of-turn token of the last turn."""
        last = own[-1] if own else len(self.conversation.turns)
        if last == len(self.conversation.turns) - 1 and not self.whole:
            text = self.through(last)
        return RenderedChat(text, tuple(self._span(i) for i in own), rest, self.boundaries(text, last + 1),
                            self.conversation.remarks)

    def _span(self, index: int) -> WeightedSpan:
        text = self.through(index)
        if self.whole or self.conversation.turns[index]["role"] != "assistant":
            start = measure_common_prefix(self.until(index), text) if index else 0
        else:
            start = len(self.prompt(index))
        return WeightedSpan(start, len(text), self.weights[index])

    def boundaries(self, text: str, count: int) -> tuple[int, ...]:
        """Start positions in `text` of the assistant turns among the first `count` turns that the template does not
        rewrite."""
        spoken = [i for i, turn in enumerate(self.conversation.turns[:count]) if turn["role"] == "assistant"]
        return tuple(len(self.prompt(i)) for i in spoken if text.startswith(self.prompt(i)))

    def contents(self) -> tuple[tuple[int, int], ...]:
        """The character range of each turn's content in the prompt of all turns, found by comparing with the prompt of
        another content."""
        turns, prompt, found = self.conversation.turns, self.prompt(len(self.conversation.turns)), []
        for i, turn in enumerate(turns):
            if turn["role"] in SYSTEM or not turn["content"]:
                continue
            other = {**turn, "content": "j" if turn["content"].lstrip()[:1] != "j" else "q"}
            twin = self.conversation.template.render([*turns[:i], other, *turns[i + 1:]],
                                                     tools=self.conversation.tools, generate=True)
            start = measure_common_prefix(prompt, twin)
            end = len(prompt) - measure_common_prefix(prompt[start:][::-1], twin[start:][::-1])
            if end > start:
                found.append((start, end))
        return tuple(found)

    def refuse_dropped(self, count: int, generate: bool = False) -> None:
        """Raises `RenderError` if the text lacks the content of one of the first `count` turns."""
        text = self.until(count, generate) if count else ""
        at, contents = 0, []
        for turn in self.conversation.turns[:count]:
            contents.append(turn["content"].rpartition(THOUGHT_END)[2].strip())  # earlier reasoning may be omitted
            found = text.find(contents[-1], at)
            at = found + len(contents[-1]) if at >= 0 <= found else -1
        if at >= 0:
            return  # each is after the previous one
        for i, turn in enumerate(self.conversation.turns[:count]):
            if contents[i]:
                changed = {**turn, "content": turn["content"] + "j"}
                turns = [*self.conversation.turns[:i], changed, *self.conversation.turns[i + 1:count]]
                if self.conversation.template.render(turns, tools=self.conversation.tools, generate=generate) == text:
                    raise RenderError(f"it drops the content of turn {i + 1} ({turn['role']})",
                                      "a turn that the chat template does not render")
