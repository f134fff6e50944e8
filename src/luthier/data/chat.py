"""Conversations as text: what the model reads, and which characters of it are trained. Read `conversation.py` first.

A turn of the assistant is trained from where a sampler would begin to write to the mark that ends the turn:

    start    the end of   render(turns before it, with the generation prompt)
    end      the end of the mark in   render(turns up to it)

So the text in front of `start` is exactly what is prompt when that turn is generated: `render_prompt` makes it, for
evaluation, chat, serving and rollouts alike. Where a turn lies comes from these renderings; nothing is searched for.

Some templates rewrite history (they drop the thoughts of earlier turns). Then the text up to one turn is not a
beginning of the text up to the next, and each trained turn becomes a text of its own, as the model would meet it.
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
THOUGHTS_LOST = "thoughts that the chat template does not render"


@dataclass(frozen=True)
class WeightedSpan:
    """Characters `start` to `end` of a text, and the weight of predicting them."""

    start: int
    end: int
    weight: float


@dataclass(frozen=True)
class RenderedChat:
    """A text, the parts of it that have a weight of their own, in order, and the weight of all the rest.

    Args:
        boundaries: where a sampler begins to write: no token reaches across.
        remarks: the rules by which the row was rendered, for the data report.
    """

    text: str
    spans: tuple[WeightedSpan, ...] = ()
    rest: float = 0.0
    boundaries: tuple[int, ...] = ()
    remarks: tuple[str, ...] = ()


def compute_turn_weights(turns: Sequence[Mapping[str, Any] | Message], given: Sequence[float | None],
                         loss_on: str) -> list[float]:
    """The weight of each turn: its own, else what `loss_on` says of its role."""
    roles = [turn.role if isinstance(turn, Message) else turn["role"] for turn in turns]
    last = max((i for i, role in enumerate(roles) if role == "assistant"), default=-1)
    by_rule = {"all": lambda i: 1.0, "last": lambda i: float(i == last),
               "assistant": lambda i: float(roles[i] == "assistant")}[loss_on]
    return [by_rule(i) if weight is None else weight for i, weight in enumerate(given)]


def render_chat(example: ChatExample, tokenizer: Tokenizer, rules: RenderingRules, loss_on: str) -> list[RenderedChat]:
    """The texts of a chat with their trained parts: one, or one for each trained turn where history is rewritten.
    Raises `RenderError`."""
    conversation = build_conversation(example.messages, example.tools, tokenizer, rules)
    rest = float(loss_on == "all")
    weights = compute_turn_weights(conversation.turns, conversation.weights, loss_on)
    chat = _ChatRenderer(conversation, weights, whole=loss_on == "all")
    own = [i for i, weight in enumerate(weights) if weight != rest]
    text = chat.until(len(conversation.turns))
    chat.refuse_dropped(len(conversation.turns))
    spoken = [i for i, turn in enumerate(conversation.turns) if turn["role"] == "assistant"]
    if rest and spoken and chat.drops_thought(spoken[-1]):
        raise RenderError("set data.train_on to assistant, which trains each turn behind its own prompt", THOUGHTS_LOST)
    if all(text.startswith(chat.through(i)) for i in own):
        return [chat.rendered(text, own, rest)]
    if rest:
        raise RenderError("the template rewrites earlier turns, so they cannot have weights of their own")
    return [chat.rendered(chat.alone(i), [i], 0.0) for i in own]


def render_prompt(example: ChatExample, tokenizer: Tokenizer, rules: RenderingRules) -> tuple[RenderedChat, str]:
    """The text up to where the assistant's last turn begins (a chat without one: to its end), and that turn's words.
    Raises `RenderError`."""
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
    """Where the words of a prompt's turns lie in its text, but for those of system turns: what may be cut away without
    touching a mark, a header or a system prompt."""
    conversation = build_conversation(messages, tools, tokenizer, rules)
    return _ChatRenderer(conversation, [0.0] * len(conversation.turns)).contents()


def _is_answer(turn: Mapping[str, Any]) -> str:
    calls: Sequence[Mapping[str, Any]] = turn.get("tool_calls") or ()
    return "\n".join([*([turn["content"]] if turn["content"] else []), *map(format_call, calls)])


@dataclass(frozen=True)
class _ChatRenderer:
    """One conversation being rendered. `whole`: headers of the assistant's turns are trained too."""

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
                raise RenderError("it takes apart a control token that is spelt in a message")
            self.known[count, generate] = text
        return self.known[count, generate]

    def _render(self, turns: Sequence[Mapping[str, Any]], generate: bool) -> str:
        """The turns as text. Names the key where the template refuses them for the want of it alone."""
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
        """What is prompt for turn `index` of the assistant: all before it, with the generation prompt."""
        if index not in self.prompts:
            opening = self.conversation.template.opening
            prompt = self.until(index, generate=True) if index else opening(self.conversation.tools)
            self.prompts[index] = self._with_header(prompt, index) if index else prompt
        return self.prompts[index]

    def _with_header(self, prompt: str, index: int) -> str:
        """The prompt, where the template writes no generation prompt behind just these turns: with the header that it
        writes before the assistant's words."""
        if not self.conversation.template.has_generation_prompt or prompt != self.until(index):
            return prompt
        first, second = (self._try([*self.conversation.turns[:index], {"role": "assistant", "content": content}]) or ""
                         for content in ("qqq", "jjj"))
        return first[:max(measure_common_prefix(first, second), len(prompt))] if first.startswith(prompt) else prompt

    def alone(self, index: int) -> str:
        """The text up to turn `index` and with it, which goes on from its prompt."""
        text = self.until(index + 1)
        if self.conversation.turns[index]["role"] != "assistant" or self.whole:
            return text
        prompt = self.prompt(index)
        if not text.startswith(prompt):
            return prompt + self._behind(prompt, text, index)
        if not self.drops_thought(index):
            return text
        if THOUGHT_END in prompt[measure_common_prefix(prompt, self.until(index)) if index else 0:]:
            raise RenderError("it closes the thoughts before the assistant begins; remove reasoning_content, or name "
                              "it in data.chat.ignore_keys", THOUGHTS_LOST)
        return f"{prompt}{THOUGHT}\n{self._close_thought(index, text[len(prompt):])}"

    def _close_thought(self, index: int, words: str) -> str:
        """The thoughts of a turn, their end, and the words behind them."""
        thought = self._thought(index)
        words = words.removeprefix("\n\n") if thought else words  # these stood behind the thoughts already
        return f"{thought}\n{THOUGHT_END}\n\n{words}"

    def _thought(self, index: int) -> str:
        turn = self.conversation.turns[index]
        content, thought = turn["content"], turn.get("reasoning_content", "")
        if THOUGHT_END in content and content.startswith(THOUGHT):
            thought = content[len(THOUGHT):content.index(THOUGHT_END)]
        return str(thought).strip(chr(10))

    def drops_thought(self, index: int) -> bool:
        """Whether the thoughts of turn `index` do not reach the text up to it."""
        turn, thought = self.conversation.turns[index], self._thought(index)
        if not thought.strip():
            return False
        content = turn["content"]
        inside = THOUGHT_END in content and content.startswith(THOUGHT)
        changed = {"content": f"{THOUGHT}j{content[len(THOUGHT):]}"} if inside else {"reasoning_content": f"j{thought}"}
        return self._try([*self.conversation.turns[:index], {**turn, **changed}]) == self.until(index + 1)

    def _behind(self, prompt: str, text: str, index: int) -> str:
        """The turn behind a generation prompt that opens a thought, while the turn is rendered without one."""
        twins = (self.conversation.template.render([*self.conversation.turns[:index],
                                                    {"role": "assistant", "content": content}],
                                           tools=self.conversation.tools) for content in ("qqq", "jjj"))
        shared = min(measure_common_prefix(prompt, other) for other in (text, *twins))
        opened = prompt[shared:]
        if not index or shared < len(self.until(index)) or THOUGHT not in opened:
            raise RenderError("it rewrites what stands before an assistant's turn")
        return self._close_thought(index, text[shared:])

    def through(self, index: int) -> str:
        """`alone`, up to the mark that ends the turn; what the template writes behind it is nobody's words."""
        text, marks = self.alone(index), self.conversation.template.turn_end_texts
        if self.conversation.turns[index]["role"] != "assistant" or self.whole or not marks:
            return text
        # The template ends with one of them; one that a message spells stands between marks.
        at, mark = max((text.rfind(mark), mark) for mark in marks)
        return text[:at + len(mark)] if at >= len(self.prompt(index)) and text[at - 1] != START else text

    def rendered(self, text: str, own: Sequence[int], rest: float) -> RenderedChat:
        """What the template writes behind the mark of the very last turn is left out: nothing comes after it."""
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
        """Where the assistant's turns among the first `count` begin in `text`, as far as they are not rewritten."""
        spoken = [i for i, turn in enumerate(self.conversation.turns[:count]) if turn["role"] == "assistant"]
        return tuple(len(self.prompt(i)) for i in spoken if text.startswith(self.prompt(i)))

    def contents(self) -> tuple[tuple[int, int], ...]:
        """Where each turn's words lie in the prompt that ends with all turns: between what it shares with the prompt
        of other words."""
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
        """Raises `RenderError` where the words of one of the first `count` turns do not reach the text."""
        text = self.until(count, generate) if count else ""
        at, contents = 0, []
        for turn in self.conversation.turns[:count]:
            contents.append(turn["content"].rpartition(THOUGHT_END)[2].strip())  # earlier thoughts may be left out
            found = text.find(contents[-1], at)
            at = found + len(contents[-1]) if at >= 0 <= found else -1
        if at >= 0:
            return  # each stands behind the one before it
        for i, turn in enumerate(self.conversation.turns[:count]):
            if contents[i]:
                changed = {**turn, "content": turn["content"] + "j"}
                turns = [*self.conversation.turns[:i], changed, *self.conversation.turns[i + 1:count]]
                if self.conversation.template.render(turns, tools=self.conversation.tools, generate=generate) == text:
                    raise RenderError(f"it drops the words of turn {i + 1} ({turn['role']})",
                                      "a turn that the chat template does not render")
