"""The chat templates of a tokenizer, and what they render. Read `core/examples.py` first; then `conversation.py`.

Training, evaluation, chat, serving, rollouts and exports all use `load_chat_templates`. Properties of a template are
found by rendering short test messages, never by reading its source:

    end_of_turn      the token that ends an assistant's turn; a template without one is extended by the eos token
    system, late_system, developer     which of these roles it knows
    renders(role, key)                 whether a key of a message (`tool_calls`, `name`, ...) changes the text

A tokenizer without a template gets `FALLBACK_TEMPLATE`. Both the extended and the fallback template are ordinary Jinja,
so a saved template renders the same text in every other tool.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from jinja2 import TemplateError

from luthier.core.protocols import Tokenizer

FALLBACK_TEMPLATE = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{{ '### ' + message['role'] | capitalize + ':\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token or '' }}{% endif %}"
    "{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}")
"""For a base without a chat template: `### User:`, a line break, the text; an assistant's turn ends with eos."""

EOS_ADDED = (
    "{%- set turns = namespace(all=[]) -%}{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- set turns.all = turns.all + [dict(message, content=(message['content'] or '') + eos_token)] -%}"
    "{%- else -%}{%- set turns.all = turns.all + [message] -%}{%- endif -%}"
    "{%- endfor -%}{%- set messages = turns.all -%}")
"""Prepended to a template without an end-of-turn token: every assistant turn then ends with eos."""

FOLD_SYSTEM = (
    "{%- if messages | length > 1 and messages[0]['role'] == 'system' and messages[1]['role'] == 'user'"
    " and messages[0]['content'] is string and messages[1]['content'] is string -%}"
    "{%- set messages = [dict(messages[1], content=messages[0]['content'] + '\n\n' + messages[1]['content'])]"
    " + messages[2:] -%}{%- endif -%}")
"""Prepended to a template that drops the system turn after an assistant turn: its text is put before the user turn."""

Turn = Mapping[str, Any]
DEFAULT = "default"
TOOLS_TEMPLATE = "tool_use"  # the template name that Transformers prefers for conversations with tools
ASSISTANT = {"role": "assistant", "content": "qqq"}
USER = {"role": "user", "content": "zzz"}
PROBES: Mapping[str, Any] = {
    "tool_calls": [{"id": "abcdefghi", "type": "function", "function": {"name": "vvv", "arguments": {"w": "www"}}}],
    "tools": [{"type": "function", "function": {"name": "vvv", "description": "www", "parameters": {
        "type": "object", "properties": {"w": {"type": "string", "description": "w"}}, "required": ["w"]}}}],
    "reasoning_content": "www", "name": "vvv", "id": "abcdefghi", "tool_call_id": "abcdefghi",
}


class RenderError(ValueError):
    """The chat template cannot render this conversation, or the start of a turn cannot be found. `reason` is
    counted."""

    def __init__(self, detail: str, reason: str = "the chat template raises an error") -> None:
        self.reason = reason
        super().__init__(detail)


@dataclass(frozen=True)
class ChatTemplate:
    """One template and its tokenizer.

    Args:
        source: the Jinja source that is rendered and saved.
        given: whether it is the tokenizer's own; otherwise it is the fallback.
        eos_added: whether `EOS_ADDED` was prepended.
        folds_system: whether `FOLD_SYSTEM` was prepended.
    """

    name: str
    source: str
    tokenizer: Tokenizer = field(repr=False, compare=False)
    given: bool = True
    eos_added: bool = False
    folds_system: bool = False
    known: dict[tuple[str, str], bool] = field(default_factory=dict, repr=False, compare=False)

    def render(self, turns: Sequence[Turn], *, tools: Sequence[Turn] = (), generate: bool = False) -> str:
        """Renders the conversation; with `generate`, up to the start of the assistant turn. Raises `RenderError`."""
        try:
            return str(self.tokenizer.apply_chat_template(
                [dict(turn) for turn in turns], chat_template=self.source, tokenize=False,
                add_generation_prompt=generate, **({"tools": list(tools)} if tools else {})))
        except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            raise RenderError(str(error) or type(error).__name__) from error

    def renders(self, role: str, key: str, value: Any = None) -> bool:
        """Whether `key` of a message with `role` changes the text; `tools` is not a key of a message.

        Args:
            value: used if the key is not in `PROBES`.
        """
        found = self.known.get((role, key))
        if found is None:
            found = self._reaches(role, key, PROBES.get(key, value))
            if found or key in PROBES:  # another value of a key without a probe may still change the text
                self.known[role, key] = found
        return found

    def _reaches(self, role: str, key: str, value: Any) -> bool:
        if key == "tools":
            return self._try([USER], value) not in (None, self._try([USER]))
        before = {"system": [], "developer": [], "user": [], "assistant": [USER],
                  "tool": [USER, {"role": "assistant", "content": "", "tool_calls": PROBES["tool_calls"]}]}.get(
                      role, [USER])
        links = {"tool_call_id": PROBES["tool_call_id"]} if role == "tool" and key != "tool_call_id" else {}
        # A template may require text in a turn, or no text next to a call: try both.
        for content in ("qqq", ""):
            bare = {"role": role, "content": content, **links}
            without, having = self._try([*before, bare]), self._try([*before, {**bare, key: value}])
            if having is not None and having != without:
                return True
        return False

    def _try(self, turns: Sequence[Turn], tools: Any = (), generate: bool = False) -> str | None:
        try:
            return self.render(turns, tools=tools, generate=generate)
        except RenderError:
            return None

    @cached_property
    def system(self) -> bool:
        """Whether a conversation may begin with a system turn."""
        return "sss" in (self._try([{"role": "system", "content": "sss"}, USER]) or "")

    @cached_property
    def drops_answered_system(self) -> bool:
        """Whether it renders a system turn only before the first assistant turn, as Mistral v3 does."""
        turns = [{"role": "system", "content": "sss"}, USER, ASSISTANT]
        answered = (self._try(turns), self._try([*turns, USER]))
        return self.system and any(text is not None and "sss" not in text for text in answered)

    @cached_property
    def late_system(self) -> bool:
        """Whether a system turn may also occur later in a conversation."""
        turns = [USER, ASSISTANT, {"role": "system", "content": "sss"}, USER]
        first = [{"role": "system", "content": "rrr"}, *turns] if self.system else turns
        text = self._try(first) or ""
        return "sss" in text and ("rrr" in text or not self.system)

    @cached_property
    def tool(self) -> bool:
        """Whether it renders the role `tool`."""
        call = {"role": "assistant", "content": "qqq", "tool_calls": PROBES["tool_calls"]}
        return "ttt" in (self._try([USER, call, {"role": "tool", "content": "ttt", "tool_call_id": "abcdefghi"}]) or "")

    @cached_property
    def developer(self) -> bool:
        """Whether it supports the role `developer`. ChatML-like templates render any role name. This does not count as
        support, because a model trained with them has not seen the role."""
        return "developer" in self.source

    @cached_property
    def has_generation_prompt(self) -> bool:
        """Whether it writes a generation prompt."""
        return self._try([USER], generate=True) != self._try([USER])

    @cached_property
    def end_of_turn(self) -> str | None:
        """The text of the token that ends an assistant turn; None if the template writes none."""
        ids = self._tail_ids(*({"content": content} for content in ("qqq", "jjj")))
        marks = {**_index_added_tokens(self.tokenizer)}
        if self.tokenizer.eos_token_id is not None and self.tokenizer.eos_token is not None:
            marks[self.tokenizer.eos_token_id] = self.tokenizer.eos_token
        return next((marks[token] for token in ids if token in marks and marks[token].strip()), None)

    def _tail_ids(self, *keys: Turn) -> Sequence[int]:
        """The tokens after the content of the last assistant turn: the common suffix of the renderings of two turns
        that differ only in these keys."""
        rendered = [self._try([USER, {"role": "assistant", **key}]) for key in keys]
        if None in rendered:
            return ()
        first, second = (str(text) for text in rendered)
        count = next((i for i, (a, b) in enumerate(zip(reversed(first), reversed(second), strict=False)) if a != b), 0)
        tail = first[len(first) - count:] if count else ""
        return self.tokenizer(tail, add_special_tokens=False, verbose=False)["input_ids"]

    @cached_property
    def turn_end_texts(self) -> tuple[str, ...]:
        """The texts of the tokens that end an assistant turn: `end_of_turn`, and that of `call_stop_token`."""
        call = self.call_stop_token
        found = (self.end_of_turn, None if call is None else str(self.tokenizer.added_tokens_decoder[call].content))
        return tuple(text for text in found if text is not None)

    @cached_property
    def call_stop_token(self) -> int | None:
        """The id of the token that ends a turn of function calls, if it differs from `stop_token`."""
        (call,) = PROBES["tool_calls"]
        ids = self._tail_ids(*({"content": "", "tool_calls": [
            {**call, "function": {"name": "vvv", "arguments": {"w": value}}}]} for value in ("qqq", "jjj")))
        special = set(self.tokenizer.all_special_ids) | {
            index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        last = next((index for index in reversed(ids) if index in special), None)
        return None if self.stop_token in ids else last

    @cached_property
    def stop_token(self) -> int | None:
        """The id of `end_of_turn`."""
        if self.end_of_turn is None:
            return None
        if self.end_of_turn == self.tokenizer.eos_token:
            return self.tokenizer.eos_token_id
        return next((i for i, content in _index_added_tokens(self.tokenizer).items() if content == self.end_of_turn),
                    None)

    def opening(self, tools: Sequence[Turn] = ()) -> str:
        """The text before the content of a first assistant turn: the common prefix of two renderings that differ only
        in this content. Raises `RenderError` if the template does not support it."""
        first, second = (self.render([{"role": "assistant", "content": content}], tools=tools)
                         for content in ("qqq", "jjj"))
        return first[:measure_common_prefix(first, second)]


def measure_common_prefix(first: str, second: str) -> int:
    """Length of the common prefix of two texts."""
    if second.startswith(first):
        return len(first)
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _index_added_tokens(tokenizer: Tokenizer) -> Mapping[int, str]:
    """Tokens that are matched in a text before tokenization, by their ids."""
    return _read_added_tokens(tokenizer, len(tokenizer))


@lru_cache(maxsize=8)
def _read_added_tokens(tokenizer: Tokenizer, size: int) -> Mapping[int, str]:
    return {index: str(token.content) for index, token in tokenizer.added_tokens_decoder.items()}


def load_chat_templates(tokenizer: Tokenizer) -> dict[str, ChatTemplate]:
    """The tokenizer's templates by name, each with an end-of-turn token. `default` is first if there is one; a single
    template has this name."""
    given = tokenizer.chat_template
    sources: dict[str, str | None] = dict(given) if isinstance(given, Mapping) else {DEFAULT: given or None}
    names = sorted(sources, key=lambda name: (name != DEFAULT, name != TOOLS_TEMPLATE, name))
    return {name: _resolve_template(name, sources[name], tokenizer, tokenizer.eos_token) for name in names}


@lru_cache(maxsize=64)
def _resolve_template(name: str, source: str | None, tokenizer: Tokenizer, eos: str | None) -> ChatTemplate:
    """The template for `source`, extended if necessary. Cached, because probing needs about twenty renderings."""
    found = ChatTemplate(name, source or FALLBACK_TEMPLATE, tokenizer, given=source is not None)
    if found.drops_answered_system:
        found = ChatTemplate(name, FOLD_SYSTEM + found.source, tokenizer, found.given, folds_system=True)
    if found.end_of_turn is None and eos:
        ended = ChatTemplate(name, EOS_ADDED + found.source, tokenizer, found.given, eos_added=True,
                             folds_system=found.folds_system)
        return ended if ended.end_of_turn is not None else found
    return found


def choose_template(tokenizer: Tokenizer, needs: Sequence[tuple[str, str, Any]], tools: bool) -> ChatTemplate:
    """The first template that renders all of `needs` (role, key, value). If none does, the one that Transformers uses:
    `tool_use` for a conversation with tools, otherwise `default`, otherwise the first."""
    found = load_chat_templates(tokenizer)
    usual = found.get(TOOLS_TEMPLATE) if tools else None
    usual = usual or next(iter(found.values()))
    order = [usual, *(template for template in found.values() if template is not usual)]
    return next((template for template in order if all(template.renders(*need) for need in needs)), usual)


def get_saved_chat_template(tokenizer: Tokenizer) -> Any:
    """The value of `chat_template` with which other tools render the trained format: a text, or several by name."""
    found = {name: template.source for name, template in load_chat_templates(tokenizer).items()}
    return found if isinstance(tokenizer.chat_template, Mapping) else found[DEFAULT]


def find_stop_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The end-of-turn tokens of the tokenizer's own templates, which end an answer; the default template's first.
    Empty for a tokenizer without a template."""
    templates = [template for template in load_chat_templates(tokenizer).values() if template.given]
    found = [*(template.stop_token for template in templates), *(template.call_stop_token for template in templates)]
    return tuple(dict.fromkeys(token for token in found if token is not None))
