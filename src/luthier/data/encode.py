"""Text to tokens and weights. Read `chat.py` first, for which parts of a chat are trained; `items.py` goes on.

    Example -> spell -> Spelled (all its tokens) -> cut -> Encoded (at most max_length tokens each)

A token is trained if any of its characters is: its weight is that of the span it reaches into. No token reaches from a
prompt into its answer, so what is trained as a prompt is, token for token, what `prompt_of` asks.

`bytes` counts the UTF-8 bytes of the words that are predicted, without the end mark: bits per byte can then be compared
between tokenizers.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from luthier.core.examples import (
    ChatExample,
    ComparedExample,
    CompletionExample,
    Example,
    JudgedExample,
    Message,
    Origin,
    PromptExample,
    TextExample,
    Worded,
)
from luthier.core.protocols import Tokenizer
from luthier.core.types import Encoded, Piece
from luthier.data.chat import Rendered, RenderError, Span, render_chat, render_prompt
from luthier.data.config import DataConfig
from luthier.data.control_tokens import TextPart, control_tokens, split_text, unmark
from luthier.data.labelled import asked_of, tools_of
from luthier.data.rows import Refusal


@dataclass(frozen=True)
class Spelled:
    """All tokens of one text, before anything is cut.

    Args:
        ends: for each token, where its characters end in `text`.
        divisible: whether it may be cut into several examples (documents may, chats may not).
        source: how many tokens are a source, which is read and not gone on with: a piece of its own.
        shortened: whether some of the source was cut off.
        remarks: see `Rendered`.
    """

    text: str
    ids: list[int]
    weights: list[float]
    ends: list[int]
    origin: Origin
    divisible: bool = False
    source: int = 0
    shortened: bool = False
    remarks: tuple[str, ...] = ()


def encode_words(example: Worded, tokenizer: Tokenizer, config: DataConfig) -> tuple[list[Encoded], bool] | Refusal:
    """The example as tokens and weights (several where it was split), and whether its end was cut off."""
    texts = spell(example, tokenizer, config)
    if isinstance(texts, Refusal):
        return texts
    found: list[Encoded] = []
    for text in texts:
        pieces = cut(text, config, tokenizer.eos_token_id)
        if isinstance(pieces, Refusal):
            return pieces
        found += pieces
    return found, config.overlong == "truncate" and any(text.shortened or len(text.ids) - text.source > config.most
                                                        for text in texts)


# ---------------------------------------------------------------- spelling


def spell(example: Worded, tokenizer: Tokenizer, config: DataConfig) -> list[Spelled] | Refusal:
    """The example's texts, uncut: one, but for chats under a template that rewrites history."""
    bare = isinstance(example, CompletionExample) and not templated(tokenizer, config)
    if config.divided:
        return _divided(example, tokenizer, config, bare)
    texts = _texts(example, tokenizer, config, bare)
    if isinstance(texts, Refusal):
        return texts
    closed = bare or isinstance(example, TextExample)
    return [_spelled(text, tokenizer, example, closed=closed) for text in texts]


def _texts(example: Worded, tokenizer: Tokenizer, config: DataConfig, bare: bool) -> list[Rendered] | Refusal:
    if isinstance(example, TextExample):
        return [_document(example, tokenizer, config)]
    if isinstance(example, CompletionExample) and bare:
        return [_bare(example, tokenizer, config)]
    chat = as_chat(example) if isinstance(example, CompletionExample) else example
    try:
        return render_chat(chat, tokenizer, config.rules, config.train_on)
    except RenderError as fault:
        return Refusal(example.origin, fault.reason, str(fault))


def _document(example: TextExample, tokenizer: Tokenizer, config: DataConfig) -> Rendered:
    text = control_tokens(tokenizer, "", config.chat.control_tokens).mark(example.text, "user")
    return Rendered(text, rest=1.0, remarks=_remarks(text, example.text))


def templated(tokenizer: Tokenizer, config: DataConfig) -> bool:
    """Whether a prompt and its completion are put into the chat template, or joined bare."""
    return bool(tokenizer.chat_template) and config.format != "completion"


def is_conversation(example: Example, tokenizer: Tokenizer, config: DataConfig) -> bool:
    """Whether the example is put into a chat template."""
    if isinstance(example, ChatExample):
        return True
    if not isinstance(example, CompletionExample | ComparedExample | JudgedExample | PromptExample):
        return False
    return templated(tokenizer, config) or not isinstance(example.prompt, str) or bool(tools_of(example))


def as_chat(example: CompletionExample) -> ChatExample:
    """A prompt and its completion as one exchange."""
    return ChatExample((Message("user", example.prompt), Message("assistant", example.completion)),
                       example.origin, example.weight)


ENDS_IN_SPACE = "a prompt ends in a space: a model expects the space to open the answer (write it there)"


def _bare(example: CompletionExample, tokenizer: Tokenizer, config: DataConfig) -> Rendered:
    control = control_tokens(tokenizer, "", config.chat.control_tokens)
    prompt, completion = control.mark(example.prompt, "user"), control.mark(example.completion, "assistant")
    text, start = prompt + completion, len(prompt)
    remarks = _remarks(text, example.prompt + example.completion)
    return Rendered(text, (Span(start, len(text), 1.0),), boundaries=(start,),
                    remarks=(*remarks, ENDS_IN_SPACE) if prompt.endswith(" ") else remarks)


def _remarks(marked: str, text: str) -> tuple[str, ...]:
    return () if marked == text else ("control tokens spelt in a text are plain text (data.chat.control_tokens)",)


def _spelled(text: Rendered, tokenizer: Tokenizer, example: Worded, *, closed: bool) -> Spelled:
    """`closed`: the tokenizer's own opening and the end mark are put around it (a template brings its own)."""
    ids, starts, ends = tokens(text, tokenizer, special=closed)
    weights = [text.rest * example.weight] * len(ids)
    for span in text.spans:
        first, last = bisect_right(ends, span.start), bisect_left(starts, span.end)
        weights[first:last] = [span.weight * example.weight] * (last - first)
    if closed and tokenizer.eos_token_id is not None:
        if not ids or ids[-1] != tokenizer.eos_token_id:
            ids, weights, ends = [*ids, tokenizer.eos_token_id], [*weights, 0.0], [*ends, len(text.text)]
        weights[-1] = example.weight
    return Spelled(text.text, ids, weights, ends, example.origin, divisible=isinstance(example, TextExample),
                   remarks=text.remarks)


def tokens(text: Rendered, tokenizer: Tokenizer, *, special: bool) -> tuple[list[int], list[int], list[int]]:
    """Ids, and where each token's characters start and end; both never fall.

    The text is encoded in pieces: up to where a sampler begins to write, and on from there, so that the prompt's tokens
    are those that are asked; and what only spells a control token apart from the rest.

    Args:
        special: whether the tokenizer's own marks are put around the whole.
    """
    parts = list(split_text(text.text, text.boundaries))
    if tokenizer.is_fast and len(parts) == 1 and not parts[0].plain:
        return _whole(text.text, tokenizer, special)
    return _joined(text.text, parts if tokenizer.is_fast else _finer(parts, text), tokenizer, special)


def _whole(text: str, tokenizer: Tokenizer, special: bool) -> tuple[list[int], list[int], list[int]]:
    out = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    starts, ends, at = [], [], 0
    for start, end in out["offset_mapping"]:
        if end < at:  # an end mark of the tokenizer's own, which stands for no characters
            start = end = at
        elif start == end:  # white space, where the tokenizer trims it from the offsets
            start = min(start, at)
        starts.append(start)
        ends.append(end)
        at = end
    return out["input_ids"], starts, ends


def _finer(parts: list[TextPart], text: Rendered) -> list[TextPart]:
    """The parts divided once more where spans start and end, for a tokenizer that keeps no offsets."""
    bounds = {at for span in text.spans for at in (span.start, span.end)}
    found: list[TextPart] = []
    for part in parts:
        inner = sorted(at for at in bounds if part.start < at < part.end)
        found += [TextPart(a, b, part.plain) for a, b in pairwise([part.start, *inner, part.end])]
    return found


def _joined(text: str, parts: Sequence[TextPart], tokenizer: Tokenizer,
            special: bool) -> tuple[list[int], list[int], list[int]]:
    """The tokens of the parts one behind the other."""
    opening, closing = marks_around(tokenizer) if special else ((), ())
    ids, starts, ends = list(opening), [0] * len(opening), [0] * len(opening)
    for part in parts:
        found, begin, stop = _part(text[part.start:part.end], tokenizer, part.plain, first=not part.start)
        ids += found
        starts += [part.start + at for at in begin]
        ends += [part.start + at for at in stop]
    return [*ids, *closing], starts + [len(text)] * len(closing), ends + [len(text)] * len(closing)


ANCHORS = ("\n", ".", "a")  # characters to encode a part behind, tried in turn: some merge with what follows


def _part(text: str, tokenizer: Tokenizer, plain: bool, first: bool) -> tuple[list[int], list[int], list[int]]:
    """One part. Further ones are encoded behind another character, whose tokens are taken off again: at the beginning
    of a text some tokenizers write a space that is not there.

    Args:
        plain: it spells a control token, and none of its tokens may be one.
    """
    for anchor in ("",) if first else (*ANCHORS, ""):
        alone = _encoded_part(anchor, tokenizer, plain)[0] if anchor else []
        ids, offsets = _encoded_part(anchor + text, tokenizer, plain)
        before, length = len(alone), len(anchor)
        if ids[:before] == alone and _ends_at(offsets, before, anchor):
            break
    if offsets is None:
        return ids[before:], [0] * (len(ids) - before), [len(text)] * (len(ids) - before)
    return ids[before:], *_rising([(max(a - length, 0), b - length) for a, b in offsets[before:]])


def _encoded_part(text: str, tokenizer: Tokenizer, plain: bool) -> tuple[list[int], list[tuple[int, int]] | None]:
    """Ids, and the characters of each where the tokenizer knows them."""
    options: dict[str, Any] = {"add_special_tokens": False, "verbose": False}
    if plain:
        options["split_special_tokens"] = True
    if not tokenizer.is_fast:
        return list(tokenizer(text, **options)["input_ids"]), None
    out = tokenizer(text, return_offsets_mapping=True, **options)
    return list(out["input_ids"]), list(out["offset_mapping"])


def _ends_at(offsets: list[tuple[int, int]] | None, count: int, anchor: str) -> bool:
    """Whether the first `count` tokens stand for the anchor and nothing more."""
    return offsets is None or all(end <= len(anchor) for _, end in offsets[:count])


def _rising(offsets: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Starts and ends of tokens, neither of which falls."""
    starts, ends, at = [], [], 0
    for start, end in offsets:
        start, end = (min(start, at), max(end, at)) if start == end else (start, max(end, at))
        starts.append(start)
        ends.append(end)
        at = end
    return starts, ends


def marks_around(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens that the tokenizer puts before a text and behind it."""
    bare = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    whole = list(tokenizer("a", verbose=False)["input_ids"])
    at = next((i for i in range(len(whole)) if whole[i:i + len(bare)] == bare), len(whole))
    return tuple(whole[:at]), tuple(whole[at + len(bare):])


# ---------------------------------------------------------------- sources and their answers


def _divided(example: Worded, tokenizer: Tokenizer, config: DataConfig, bare: bool) -> list[Spelled] | Refusal:
    """`spell` for a base that reads a source and writes its answer: everything before the first trained word, and what
    follows it, each tokenised alone and with an end mark of its own."""
    texts = _texts(example, tokenizer, config, bare)
    if isinstance(texts, Refusal):
        return texts
    found = []
    for text in texts:
        if text.rest or not text.spans or not text.text[:text.spans[0].start].strip():
            return Refusal(example.origin, "nothing is asked",
                           "the base reads a source, which is never trained, and writes its answer")
        halves = _halves(text, tokenizer, example, config, bare)
        if isinstance(halves, Refusal):
            return halves
        found.append(halves)
    return found


def _halves(text: Rendered, tokenizer: Tokenizer, example: Worded, config: DataConfig,
            bare: bool) -> Spelled | Refusal:
    """Source and answer, spelt alone and put one behind the other."""
    start, end_mark = text.spans[0].start, tokenizer.eos_token_id
    source = Rendered(text.text[:start], boundaries=text.boundaries)
    ids, _, ends = tokens(source, tokenizer, special=bare)
    closing = [] if end_mark is None else [end_mark]
    if closing and ids and ids[-1] == end_mark:
        ids, ends = ids[:-1], ends[:-1]
    room = config.most - len(closing)
    shortened = len(ids) > room
    if shortened and config.overlong != "truncate":
        return Refusal(example.origin, "longer than max_length", f"{len(ids)} tokens of source, at most {room}")
    ids, ends = ids[:room] + closing, ends[:room] + [start] * len(closing)
    said = text.text[start:]
    if not bare:  # a template's own end mark, and what it puts behind it
        said = said.rstrip().removesuffix(tokenizer.eos_token or "")
    spans = tuple(Span(s.start - start, min(s.end - start, len(said)), s.weight) for s in text.spans)
    answer = _spelled(Rendered(said, spans), tokenizer, example, closed=True)
    weights = [answer.weights[0] or example.weight * text.spans[0].weight, *answer.weights[1:]]  # an opening mark
    return Spelled(source.text + said, ids + answer.ids, [0.0] * len(ids) + weights,
                   ends + [start + end for end in answer.ends], example.origin, source=len(ids), shortened=shortened,
                   remarks=text.remarks)


# ---------------------------------------------------------------- cutting


def cut(text: Spelled, config: DataConfig, end_mark: int | None) -> list[Encoded] | Refusal:
    """`text` in at most `max_length` tokens.

    Split parts share one token: the first token of a part is never predicted, so it is the last of the part before,
    and every token but the document's first is predicted exactly once.
    """
    length, most = len(text.ids), config.most + text.source
    if length <= most or config.overlong == "truncate":
        ranges = [(0, min(length, most))]
    elif config.overlong == "split" and text.divisible:
        ranges = [(start, min(start + most, length)) for start in range(0, length - 1, most - 1)]
    else:
        only = "; only a text can be split" if config.overlong == "split" else ""
        return Refusal(text.origin, "longer than max_length", f"{length} tokens, at most {most}{only}")
    found = [_encoded(text, start, stop, end_mark) for start, stop in ranges if any(text.weights[start + 1:stop])]
    if not found:
        cutoff = f"none within max_length={most} of {length} tokens" if length > most else f"{length} tokens"
        return Refusal(text.origin, "nothing to train on", cutoff)
    return found


def _encoded(text: Spelled, start: int, stop: int, end_mark: int | None) -> Encoded:
    first = start + text.source
    pieces = [Piece(tuple(text.ids[start:first]), tuple(text.weights[start:first]))] if text.source else []
    pieces.append(Piece(tuple(text.ids[first:stop]), tuple(text.weights[first:stop]), len(pieces) - 1))
    return Encoded(tuple(pieces), text.origin, predicted_bytes(text, start, stop, end_mark),
                   remarks=() if start else text.remarks)


def predicted_bytes(text: Spelled, start: int, stop: int, end_mark: int | None) -> int:
    """Bytes behind each run of predicted tokens; the part's first token is never predicted."""
    total, opened, ends = 0, -1, text.ends
    for i in range(start + 1, stop):
        counts = text.weights[i] != 0 and text.ids[i] != end_mark
        if counts and opened < 0:
            opened = ends[i - 1]
        elif not counts and opened >= 0:
            total += len(unmark(text.text[opened:ends[i - 1]]).encode())
            opened = -1
    return total + (len(unmark(text.text[opened:ends[stop - 1]]).encode()) if opened >= 0 else 0)


# ---------------------------------------------------------------- for generation


def prompt_of(example: Example, tokenizer: Tokenizer, config: DataConfig) -> tuple[list[int], str]:
    """What a sampler continues, as token ids, and the reference answer: the best one, where several were compared.

    A chat is asked up to the assistant's last turn, a completion up to its prompt; a text is cut in half. Raises
    `RenderError` where the chat template refuses a conversation.
    """
    prompt, answer = prompt_and_answer(example, tokenizer, config)
    return prompt.ids, answer


@dataclass(frozen=True)
class Prompt:
    """Token ids that a sampler continues, and the rules by which they were made."""

    ids: list[int]
    remarks: tuple[str, ...] = ()


def prompt_and_answer(example: Example, tokenizer: Tokenizer, config: DataConfig) -> tuple[Prompt, str]:
    """`prompt_of`, with the remarks for the data report."""
    if isinstance(example, TextExample):
        middle = (len(example.text) + 1) // 2
        return encode_prompt_text(example.text[:middle], tokenizer, config), example.text[middle:]
    if isinstance(example, ChatExample):
        return _rendered_prompt(example, tokenizer, config)
    asked, answer = asked_of(example)
    if isinstance(asked, str) and not templated(tokenizer, config):
        return encode_prompt_text(asked, tokenizer, config), answer
    said = (Message("user", asked),) if isinstance(asked, str) else asked
    chat = ChatExample((*said, Message("assistant", "")), example.origin, tools=tools_of(example))
    return _rendered_prompt(chat, tokenizer, config)[0], answer


def _rendered_prompt(example: ChatExample, tokenizer: Tokenizer, config: DataConfig) -> tuple[Prompt, str]:
    prompt, answer = render_prompt(example, tokenizer, config.rules)
    return Prompt(tokens(prompt, tokenizer, special=False)[0], prompt.remarks), answer


def encode_prompt_text(text: str, tokenizer: Tokenizer, config: DataConfig) -> Prompt:
    """A bare text to go on with: the tokenizer's own opening before it, and no end mark behind it."""
    marked = control_tokens(tokenizer, "", config.chat.control_tokens).mark(text, "user")
    opening, _ = marks_around(tokenizer)
    ids = tokens(Rendered(marked), tokenizer, special=False)[0]
    return Prompt([*opening, *ids], _remarks(marked, text) + ((ENDS_IN_SPACE,) if text.endswith(" ") else ()))
