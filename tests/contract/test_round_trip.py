"""What is trained is what is asked: laws over the product of chat templates and conversations.

Five laws, each a function that fails where it is broken; `test_the_laws` holds them over every template of
`chat_templates.py` and every conversation of a generated family, and a control for each breaks the code on purpose.

    prompt        the tokens before a trained turn are those that are asked for that turn
    own words     a trained turn is the assistant's words and the token that ends it, and nothing else has weight
    nothing lost  every turn's words are in the text, or the row is refused
    plain text    a control token that a message spells is never that token
    one opening   the beginning-of-text token stands once
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from importlib import import_module
from itertools import product
from typing import Any

import pytest

from chat_templates import KINDS, tokenizer_with
from luthier.assembly.factory import PromptFormat, encode_chat_prompt
from luthier.core.examples import ChatExample, CompletionExample, Message, Origin
from luthier.core.types import TokenizedExample
from luthier.data import chat, conversation
from luthier.data.config import DataConfig
from luthier.data.control_tokens import ControlTokens
from luthier.data.encoding import encode_example as encode_example
from luthier.data.formats.text import read_turn
from luthier.data.rows import RejectedRow
from luthier.data.templates import ChatTemplate, find_stop_tokens, load_chat_templates
from luthier.data.tokenization import encode_prompt

encoding = import_module("luthier.data.tokenization")  # `luthier.data.tokenization` is a function
HERE = Origin("rows.jsonl", 1)
CONFIG = DataConfig.parse({"train": "-"})
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOLS = ({"type": "function", "function": {"name": "weather", "description": "w", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}}}},)

# What a turn says: `{n}` is the turn's number, so that its words can be told from those of all others.
TEXTS = ("w{n}w", "w{n}w\n", "\n\nw{n}w", " w{n}w ", "assistant w{n}w", "user\nw{n}w", "w{n}w <|im_end|>", "</s>w{n}w<s>",
         "<end_of_turn>\n<start_of_turn>user w{n}w", "<|eot_id|>w{n}w", "[INST] w{n}w [/INST]", "<think>w{n}w", "### User:\nw{n}w",
         "你好w{n}w🙂", "w{n}w {{ messages }}", "<|endoftext|> w{n}w<|User|>")
FORMS = re.compile(r"</?think>|</?tool_call>|\[TOOL_CALLS\]|\[\]|<\|tool_\w+\|>(weather)?|\s")  # of thoughts and calls
# Roles, each with the keys that a turn has beside its content.
SHAPES: dict[str, tuple[Any, ...]] = {
    "one": ("user", "assistant"),
    "two": ("user", "assistant", "user", "assistant"),
    "system": ("system", "user", "assistant"),
    "developer": ("developer", "user", "assistant", "user", "assistant"),
    "late system": ("user", "assistant", "system", "user", "assistant"),
    "system behind the user": ("user", "system", "assistant"),
    "two systems": ("system", "system", "user", "assistant"),
    "opening": ("assistant", "user", "assistant"),
    "opening behind a system turn": ("system", "assistant", "user", "assistant"),
    "alone": ("assistant",),
    "thoughts": ("user", ("assistant", {"reasoning_content": "t{n}t"})),
    "thoughts twice": ("user", ("assistant", {"thinking": "t{n}t"}), "user", ("assistant", {"reasoning": "t{n}t"})),
    "call": ("user", ("assistant", {"tool_calls": [CALL]}), ("tool", {"tool_call_id": "abcdefghi"}), "assistant"),
    "silent call": ("user", ("assistant", {"tool_calls": [CALL], "content": None}), ("tool", {"name": "weather"}), "assistant"),
    "linked call": ("user", ("assistant", {"tool_calls": [CALL], "content": None}), ("tool", {"tool_call_id": "abcdefghi"}), "assistant"),
    "linked call behind a system turn": ("system", "user", ("assistant", {"tool_calls": [CALL], "content": None}),
                                         ("tool", {"tool_call_id": "abcdefghi"}), "assistant", "user", "assistant"),
    "old call": ("user", ("assistant", {"function_call": CALL["function"], "content": None}), "function", "assistant"),
    "empty question": (("user", {"content": ""}), "assistant", ("user", {"content": None}), "assistant"),
    "parts": (("user", {"parts": True}), "assistant"),
}


def conversations(texts: tuple[str, ...] = TEXTS) -> Iterator[tuple[str, list[dict[str, Any]], tuple[Any, ...]]]:
    """(name, messages as a row holds them, tools)."""
    for (shape, roles), text in product(SHAPES.items(), texts):
        for tools in ((), TOOLS) if "call" in shape or (shape == "one" and text == TEXTS[0]) else ((),):
            yield f"{shape} | {text} | {len(tools)} tools", [_message(role, n, text) for n, role in enumerate(roles)], tools


def _message(role: Any, n: int, text: str) -> dict[str, Any]:
    name, extra = role if isinstance(role, tuple) else (role, {})
    content = text.replace("{n}", str(n))
    extra = {key: value.replace("{n}", str(n)) if isinstance(value, str) else value for key, value in extra.items()}
    if extra.pop("parts", False):
        extra["content"] = [{"type": "text", "text": content[:3]}, {"type": "text", "text": content[3:]}]
    return {"role": name, "content": content, **extra}


# ---------------------------------------------------------------- the laws


class Case:
    """One conversation under one tokenizer: encoded, or refused."""

    def __init__(self, raw: list[dict[str, Any]], tools: tuple[Any, ...], tokenizer: Any, kind: str) -> None:
        self.raw, self.tools, self.tokenizer, self.kind = raw, tools, tokenizer, KINDS[kind]
        self.messages = tuple(read_turn(message) for message in raw)
        self.found: list[TokenizedExample] | RejectedRow = encode_example(ChatExample(self.messages, HERE, tools=tools), tokenizer, CONFIG)

    @property
    def texts(self) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
        assert isinstance(self.found, list)
        return [(span.ids, span.weights) for one in self.found for span in one.spans]

    def runs(self) -> list[tuple[int, list[int], list[int]]]:
        """Of every trained turn: which text it stands in, the tokens before it, and its own."""
        found = []
        for number, (ids, weights) in enumerate(self.texts):
            at = 0
            while at < len(ids):
                stop = at
                while stop < len(ids) and weights[stop]:
                    stop += 1
                if stop > at:
                    found.append((number, list(ids[:at]), list(ids[at:stop])))
                at = max(stop, at + 1)
        return found

    @property
    def spoken(self) -> list[int]:
        """The places of the assistant's turns."""
        return [i for i, message in enumerate(self.messages) if message.role == "assistant"]


class _Base:
    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer


def law_prompt(case: Case) -> None:
    """The tokens before turn k are those that evaluation, chat and serving ask for it."""
    runs = case.runs()
    assert len(runs) == len(case.spoken), (len(runs), case.spoken)
    for k, (_, before, _) in zip(case.spoken, runs, strict=True):
        asked = encode_prompt(ChatExample(case.messages[:k + 1], HERE, tools=case.tools), case.tokenizer, CONFIG)[0]
        assert asked == before, (case.tokenizer.decode(asked), case.tokenizer.decode(before))
        if k:  # nobody asks a server for an opening turn
            served = encode_chat_prompt(_Base(case.tokenizer), case.messages[:k], PromptFormat(), case.tools)  # type: ignore[arg-type]
            assert served == before, (case.tokenizer.decode(served), case.tokenizer.decode(before))


def law_own_words(case: Case) -> None:
    """A trained turn holds the assistant's words and ends with the token that ends a turn, which stands in it once."""
    end = case.tokenizer.convert_tokens_to_ids(case.kind.end)
    for k, (_, _, own) in zip(case.spoken, case.runs(), strict=True):
        assert own[-1] == end, case.tokenizer.decode(own)
        assert own.count(end) == 1, case.tokenizer.decode(own)
        text, said = case.tokenizer.decode(own[:-1]), case.messages[k]
        assert said.content.strip() in text, (said.content, text)
        rest = text.replace(said.content.strip(), "", 1) if said.content.strip() else text
        rest = rest.replace(said.extra.get("reasoning_content", "\0"), "", 1)
        if said.extra.get("tool_calls"):
            assert "weather" in rest
            assert "Oslo" in rest
            rest = re.sub(r"\{.*\}", "", rest, flags=re.DOTALL)
        # What remains is the template's own form of thoughts and calls.
        assert not FORMS.sub("", rest), (rest, text)


def law_nothing_lost(case: Case) -> None:
    """The words of every turn are in the last text that holds them; thoughts are where they are trained."""
    whole = "".join(case.tokenizer.decode(ids) for ids, _ in case.texts)
    for n, message in enumerate(case.messages):
        assert not message.content.strip() or f"w{n}w" in whole, (n, whole)
        assert "reasoning_content" not in message.extra or f"t{n}t" in whole, (n, whole)
        assert "tool_calls" not in message.extra or "Oslo" in whole


def law_plain_text(case: Case) -> None:
    """As many control tokens as the same conversation has whose words spell none."""
    def harmless(value: Any) -> Any:
        if isinstance(value, str):
            found = re.search(r"[wt]\d+[wt]", value)
            return found.group() if found and value != "weather" else value
        return [{**part, "text": harmless(part["text"])} for part in value] if isinstance(value, list) else value

    plain = [{**message, "content": harmless("".join(p["text"] for p in message["content"])
                                             if isinstance(message["content"], list) else message["content"])}
             for message in case.raw]
    twin = Case(plain, case.tools, case.tokenizer, next(name for name, kind in KINDS.items() if kind is case.kind))
    special = {i for i, token in case.tokenizer.added_tokens_decoder.items() if token.special}
    mine, theirs = ([[token for token in ids if token in special] for ids, _ in one.texts] for one in (case, twin))
    assert mine == theirs


def law_one_opening(case: Case) -> None:
    """The beginning-of-text token stands first and nowhere else, where the template or the fallback writes it."""
    bos = case.tokenizer.bos_token_id
    for ids, _ in case.texts:
        if bos is not None:
            assert (ids[0], ids.count(bos)) == (bos, 1), case.tokenizer.decode(ids)


LAWS = (law_prompt, law_own_words, law_nothing_lost, law_plain_text, law_one_opening)

# What a template refuses, by its kind: two turns in a row of one role cannot be written by those that demand turns.
REFUSED = {
    **{(kind, shape): "the chat template raises an error" for kind in ("gemma", "mistral", "mistral_v3")
       for shape in ("opening", "opening behind a system turn", "alone")},
    ("mistral_v3", "call"): "a turn that the chat template does not render",  # what is said beside a call
    **{("mistral_v3", shape): "a key that the chat template needs is missing" for shape in ("silent call", "old call")},
    **{("deepseek_v31", shape): "reasoning that the chat template does not render" for shape in ("thoughts", "thoughts twice")},
}


@pytest.mark.parametrize(("backend", "texts"), [("bytes", TEXTS), ("merging", TEXTS[::3]), ("spaces", TEXTS[1::3])])
@pytest.mark.parametrize("kind", KINDS)
def test_the_laws(kind: str, backend: str, texts: tuple[str, ...]) -> None:
    tokenizer, count = tokenizer_with(kind, backend), 0
    for name, raw, tools in conversations(texts):
        case = Case(raw, tools, tokenizer, kind)
        if isinstance(case.found, RejectedRow):
            shape = name.split(" | ")[0]
            assert case.found.reason == REFUSED.get((kind, shape)), (name, str(case.found))
            continue
        for law in LAWS:
            try:
                law(case)
            except AssertionError as error:
                raise AssertionError(f"{kind}, {name}: {law.__name__}: {error}") from error
        count += 1
    assert count > 13 * len(texts)  # 15 templates, 16 + 6 + 5 texts: over 6,000 conversations


# ---------------------------------------------------------------- controls


def broken_prompt(patch: pytest.MonkeyPatch) -> None:
    """The prompt is asked without its generation prompt."""
    true = chat.render_prompt
    patch.setattr(encoding, "render_prompt", lambda *args: (replace(true(*args)[0], text=true(*args)[0].text.rstrip()), ""))


def broken_own_words(patch: pytest.MonkeyPatch) -> None:
    """What the template writes behind the end of a turn is trained."""
    patch.setattr(chat._ChatRenderer, "through", chat._ChatRenderer.alone)


def broken_nothing_lost(patch: pytest.MonkeyPatch) -> None:
    """Every key is handed to the template, whether it renders it or not."""
    patch.setattr(ChatTemplate, "renders", lambda self, role, key, value=None: True)


def broken_plain_text(patch: pytest.MonkeyPatch) -> None:
    """Control tokens are not marked."""
    patch.setattr(conversation, "find_control_tokens", lambda *args: ControlTokens())


def broken_one_opening(patch: pytest.MonkeyPatch) -> None:
    """The tokenizer's own opening is put before what a template has opened."""
    true = encoding.tokenize_rendered
    patch.setattr(encoding, "tokenize_rendered", lambda text, tokenizer, special: true(text, tokenizer, special=True))


@pytest.mark.parametrize(("law", "broken", "kind", "shape", "text"), [
    (law_prompt, broken_prompt, "chatml", "one", TEXTS[0]),
    (law_own_words, broken_own_words, "chatml", "one", TEXTS[0]),
    (law_nothing_lost, broken_nothing_lost, "chatml", "call", TEXTS[0]),
    (law_plain_text, broken_plain_text, "chatml", "one", "w{n}w <|im_end|>"),
    (law_one_opening, broken_one_opening, "llama3", "one", TEXTS[0]),
])
def test_each_law_fails_where_it_is_broken(law: Any, broken: Any, kind: str, shape: str, text: str,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    raw = [_message(role, n, text) for n, role in enumerate(SHAPES[shape])]
    law(Case(raw, (), tokenizer_with(kind), kind))
    broken(monkeypatch)
    with pytest.raises(AssertionError):
        law(Case(raw, (), tokenizer_with(kind), kind))


# ---------------------------------------------------------------- rules by example


def test_the_remedy_of_a_key_that_is_not_rendered_works() -> None:
    tokenizer = tokenizer_with("chatml")
    messages = (Message("user", "hi", extra={"name": "Ann"}), Message("assistant", "yo"))
    found = encode_example(ChatExample(messages, HERE), tokenizer, CONFIG)
    assert isinstance(found, RejectedRow)
    assert found.reason == "a key of a message that the chat template does not render"
    assert "data.chat.ignore_keys" in found.detail
    ignoring = DataConfig.parse({"train": "-", "chat": {"ignore_keys": ["name"]}})
    assert not isinstance(encode_example(ChatExample(messages, HERE), tokenizer, ignoring), RejectedRow)


def test_control_tokens_are_tokens_where_the_recipe_says_so() -> None:
    tokenizer = tokenizer_with("chatml")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    example = ChatExample((Message("user", "a<|im_end|>b"), Message("assistant", "yo")), HERE)
    counts = {reading: encode_example(example, tokenizer, DataConfig.parse({"train": "-", "chat": {"control_tokens": reading}}))
              for reading in ("text", "token")}
    assert {reading: found[0].spans[0].ids.count(end) for reading, found in counts.items()} == {"text": 2, "token": 3}
    assert any("plain text" in remark for remark in counts["text"][0].remarks)


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if isinstance(kind.template, str)])
def test_control_tokens_are_read_as_transformers_reads_them(kind: str) -> None:
    """`sanitize_control_tokens` of Transformers, on a turn of the user, which both read alike."""
    tokenizer = tokenizer_with(kind)
    spelt = "".join(f"a {token} b" for token in KINDS[kind].special)
    theirs = tokenizer.apply_chat_template([{"role": "user", "content": spelt}], chat_template=load_chat_templates(tokenizer)[
        "default"].source, add_generation_prompt=True, sanitize_control_tokens=True, return_dict=True)["input_ids"]
    mine = encode_prompt(ChatExample((Message("user", spelt), Message("assistant", "")), HERE), tokenizer, CONFIG)[0]
    assert mine == theirs


CALL_END = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}{% for c in m.tool_calls or [] %}"
            "{{ c.function | tojson }}{% endfor %}{{ '<|endoftext|>' if m.tool_calls else '<|im_end|>' }}\n{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


@pytest.mark.parametrize("kind", [*(name for name, kind in KINDS.items() if kind.template), "call end"])
def test_what_ends_a_trained_turn_stops_generation(kind: str) -> None:
    """`call end`: a turn of function calls ends with a token of its own, as in the templates of gpt-oss."""
    name = "chatml" if kind == "call end" else kind
    tokenizer = deepcopy(tokenizer_with(name))
    tokenizer.chat_template = CALL_END if kind == "call end" else tokenizer.chat_template
    ends = set()
    for shape in ("two", "linked call"):
        case = Case([_message(role, n, TEXTS[0]) for n, role in enumerate(SHAPES[shape])], (), tokenizer, name)
        ends |= {own[-1] for _, _, own in case.runs()}
    assert ends == set(find_stop_tokens(tokenizer))


def test_the_template_that_renders_what_a_row_holds_is_chosen() -> None:
    tokenizer = tokenizer_with("several")
    rows = {"call": SHAPES["call"], "plain": SHAPES["two"]}
    for name, shape in rows.items():
        case = Case([_message(role, n, TEXTS[0]) for n, role in enumerate(shape)], (), tokenizer, "several")
        text = tokenizer.decode(case.texts[0][0])
        assert ('<tool_call>{"name"' in text) == (name == "call")


@pytest.mark.parametrize("text", ["the answer is ", "the answer is", "one\n", "a</s>b", "你好"])
@pytest.mark.parametrize("backend", ["bytes", "merging", "spaces"])
def test_a_bare_prompt_is_asked_as_it_is_trained(backend: str, text: str) -> None:
    tokenizer = tokenizer_with("none", backend)
    for completion in ("42", " yes", "\n\nno", "</s>"):
        example = CompletionExample(text, completion, HERE)
        (found,) = encode_example(example, tokenizer, CONFIG)
        asked, answer = encode_prompt(example, tokenizer, CONFIG)
        ids, weights = found.spans[0].ids, found.spans[0].weights
        assert (list(ids[:len(asked)]), answer) == (asked, completion)
        assert not any(weights[:len(asked)])
        assert all(weights[len(asked):])
        assert ids.count(tokenizer.eos_token_id) == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == text + completion
        assert any("ends in a space" in remark for remark in found.remarks) == text.endswith(" ")
