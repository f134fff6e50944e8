"""Converts text to tokens and weights. Read `chat.py` first, for the trained parts of a chat; `encoding.py` uses this
file.

    Example -> tokenize_example -> TokenizedText (all tokens) -> truncate -> TokenizedExample (at most max_length
    tokens)

A token is trained if any of its characters is trained: it has the weight of the span that it overlaps. No token spans
the boundary between a prompt and its answer, so training and `encode_prompt` give the prompt the same tokens.

`bytes` counts the UTF-8 bytes of the predicted text, without the end token, so that bits per byte can be compared
between tokenizers.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace

from luthier.core.examples import (
    ChatExample,
    CompletionExample,
    Example,
    LMExample,
    Message,
    Origin,
    PreferenceExample,
    PromptExample,
    TextExample,
    UnpairedPreferenceExample,
)
from luthier.core.protocols import Tokenizer
from luthier.core.types import TokenizedExample, TokenSpan
from luthier.data.char_offsets import get_special_tokens, tokenize_rendered
from luthier.data.chat import RenderedChat, RenderError, WeightedSpan, render_chat, render_prompt
from luthier.data.config import DataConfig
from luthier.data.control_tokens import find_control_tokens, remove_marks
from luthier.data.formats.labels import get_prompt_and_reference, get_tools
from luthier.data.rows import RejectedRow


@dataclass(frozen=True)
class TokenizedText:
    """All tokens of one text, before truncation.

    Args:
        ends: for each token, the end of its characters in `text`.
        divisible: whether it may be split into several examples (documents may, chats may not).
        source: number of tokens of the source (the encoder's input), which is a separate span.
        shortened: whether the source was truncated.
        remarks: see `RenderedChat`.
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


def encode_text_example(example: LMExample, tokenizer: Tokenizer, config: DataConfig) -> tuple[list[TokenizedExample],
                                                                                            bool] | RejectedRow:
    """The example as tokens and weights (several if it was split), and whether it was truncated."""
    texts = tokenize_example(example, tokenizer, config)
    if isinstance(texts, RejectedRow):
        return texts
    found: list[TokenizedExample] = []
    for text in texts:
        spans = truncate(text, config, tokenizer)
        if isinstance(spans, RejectedRow):
            return spans
        found += spans
    return found, config.truncation == "truncate" and any(
        text.shortened or len(text.ids) - text.source > config.token_limit for text in texts)


# ---------------------------------------------------------------- tokenizing


def tokenize_example(example: LMExample, tokenizer: Tokenizer, config: DataConfig) -> list[TokenizedText] | RejectedRow:
    """The texts of the example before truncation: one, or several for chats with a template that rewrites history."""
    bare = isinstance(example, CompletionExample) and not uses_chat_template(tokenizer, config)
    if config.is_encoder_decoder:
        return _tokenize_source_and_answer(example, tokenizer, config, bare)
    texts = _build_texts(example, tokenizer, config, bare)
    if isinstance(texts, RejectedRow):
        return texts
    closed = bare or isinstance(example, TextExample)
    return [_tokenize_text(text, tokenizer, example, closed=closed) for text in texts]


def _build_texts(example: LMExample, tokenizer: Tokenizer, config: DataConfig,
                 bare: bool) -> list[RenderedChat] | RejectedRow:
    if isinstance(example, TextExample):
        return [_build_document(example, tokenizer, config)]
    if isinstance(example, CompletionExample) and bare:
        return [_is_bare(example, tokenizer, config, rest=float(config.loss_on == "all"))]
    chat = convert_to_chat(example) if isinstance(example, CompletionExample) else example
    try:
        return render_chat(chat, tokenizer, config.rules, config.loss_on)
    except RenderError as fault:
        return RejectedRow(example.origin, fault.reason, str(fault))


def _build_document(example: TextExample, tokenizer: Tokenizer, config: DataConfig) -> RenderedChat:
    text = find_control_tokens(tokenizer, "", config.chat.control_tokens).mark(example.text, "user")
    return RenderedChat(text, rest=1.0, remarks=_list_remarks(text, example.text))


def uses_chat_template(tokenizer: Tokenizer, config: DataConfig) -> bool:
    """Whether a prompt and its completion are rendered with the chat template, or concatenated without one."""
    return bool(tokenizer.chat_template) and config.format != "completion"


def is_conversation(example: Example, tokenizer: Tokenizer, config: DataConfig) -> bool:
    """Whether the example is rendered with a chat template."""
    if isinstance(example, ChatExample):
        return True
    if not isinstance(example, CompletionExample | PreferenceExample | UnpairedPreferenceExample | PromptExample):
        return False
    return uses_chat_template(tokenizer, config) or not isinstance(example.prompt, str) or bool(get_tools(example))


def convert_to_chat(example: CompletionExample) -> ChatExample:
    """A prompt and its completion as a user turn and an assistant turn."""
    return ChatExample((Message("user", example.prompt), Message("assistant", example.completion)),
                       example.origin, example.weight)


ENDS_IN_SPACE = "a prompt ends in a space: move the space to the start of the answer, where tokenizers expect it"


def _is_bare(example: CompletionExample, tokenizer: Tokenizer, config: DataConfig, rest: float) -> RenderedChat:
    control = find_control_tokens(tokenizer, "", config.chat.control_tokens)
    prompt, completion = control.mark(example.prompt, "user"), control.mark(example.completion, "assistant")
    text, start = prompt + completion, len(prompt)
    remarks = _list_remarks(text, example.prompt + example.completion)
    return RenderedChat(text, (WeightedSpan(start, len(text), 1.0),), rest, boundaries=(start,),
                        remarks=(*remarks, ENDS_IN_SPACE) if prompt.endswith(" ") else remarks)


def _list_remarks(marked: str, text: str) -> tuple[str, ...]:
    return () if marked == text else ("control tokens in the text were read as plain text (data.chat.control_tokens)",)


def _tokenize_text(text: RenderedChat, tokenizer: Tokenizer, example: LMExample, *, closed: bool) -> TokenizedText:
    """`closed`: add the tokenizer's opening token and the end token (a template writes its own)."""
    ids, starts, ends = tokenize_rendered(text, tokenizer, special=closed)
    weights = [text.rest * example.weight] * len(ids)
    for span in text.spans:
        first, last = bisect_right(ends, span.start), bisect_left(starts, span.end)
        weights[first:last] = [span.weight * example.weight] * (last - first)
    if closed and tokenizer.eos_token_id is not None:
        if not ids or ids[-1] != tokenizer.eos_token_id:
            ids, weights, ends = [*ids, tokenizer.eos_token_id], [*weights, 0.0], [*ends, len(text.text)]
        weights[-1] = example.weight
    return TokenizedText(text.text, ids, weights, ends, example.origin, divisible=isinstance(example, TextExample),
                         remarks=text.remarks)


# ---------------------------------------------------------------- sources and targets of encoder-decoder models


def _tokenize_source_and_answer(example: LMExample, tokenizer: Tokenizer, config: DataConfig,
                                bare: bool) -> list[TokenizedText] | RejectedRow:
    """`tokenize_example` for encoder-decoder models: the text before the first trained token is the source, the rest
    the target. Each is tokenized separately and has its own end token."""
    texts = _build_texts(example, tokenizer, config, bare)
    if isinstance(texts, RejectedRow):
        return texts
    found = []
    for text in texts:
        if text.rest or not text.spans or not text.text[:text.spans[0].start].strip():
            return RejectedRow(example.origin, "there is no source text",
                               "an encoder-decoder model needs a source before the target; the source is not trained")
        halves = _join_source_and_answer(text, tokenizer, example, config, bare)
        if isinstance(halves, RejectedRow):
            return halves
        found.append(halves)
    return found


def _join_source_and_answer(text: RenderedChat, tokenizer: Tokenizer, example: LMExample, config: DataConfig,
                            bare: bool) -> TokenizedText | RejectedRow:
    """Source and target, tokenized separately and concatenated."""
    start, end_mark = text.spans[0].start, tokenizer.eos_token_id
    source = RenderedChat(text.text[:start], boundaries=text.boundaries)
    ids, _, ends = tokenize_rendered(source, tokenizer, special=bare)
    closing = [] if end_mark is None else [end_mark]
    if closing and ids and ids[-1] == end_mark:
        ids, ends = ids[:-1], ends[:-1]
    room = config.token_limit - len(closing)
    shortened = len(ids) > room
    if shortened and config.truncation != "truncate":
        return RejectedRow(example.origin, "longer than max_length", f"{len(ids)} tokens of source, at most {room}")
    ids, ends = ids[:room] + closing, ends[:room] + [start] * len(closing)
    said = text.text[start:]
    if not bare:  # the template's end token, and what it writes after it
        said = said.rstrip().removesuffix(tokenizer.eos_token or "")
    spans = tuple(WeightedSpan(s.start - start, min(s.end - start, len(said)), s.weight) for s in text.spans)
    answer = _tokenize_text(RenderedChat(said, spans), tokenizer, example, closed=True)
    weights = [answer.weights[0] or example.weight * text.spans[0].weight, *answer.weights[1:]]  # an opening token
    return TokenizedText(source.text + said, ids + answer.ids, [0.0] * len(ids) + weights,
                         ends + [start + end for end in answer.ends], example.origin, source=len(ids),
                         shortened=shortened,
                         remarks=text.remarks)


# ---------------------------------------------------------------- truncating


def truncate(text: TokenizedText, config: DataConfig, tokenizer: Tokenizer) -> list[TokenizedExample] | RejectedRow:
    """`text` in at most `max_length` tokens.

    Consecutive parts of a split text overlap by one token. The first token of a part is never predicted, so every
    token except
    the document's first is predicted exactly once. If the tokenizer adds an opening token, every part begins with it.
    """
    length, most, end_mark = len(text.ids), config.token_limit + text.source, tokenizer.eos_token_id
    if length <= most or config.truncation == "truncate":
        ranges = [(0, min(length, most))]
    elif config.truncation == "split" and text.divisible:
        return _split_document(text, most, tokenizer)
    else:
        only = "; only documents can be split" if config.truncation == "split" else ""
        return RejectedRow(text.origin, "longer than max_length", f"{length} tokens, at most {most}{only}")
    found = [_build_example(text, start, stop, end_mark) for start, stop in ranges if any(text.weights[start + 1:stop])]
    if not found:
        cutoff = f"none within max_length={most} of {length} tokens" if length > most else f"{length} tokens"
        return RejectedRow(text.origin, "nothing to train on", cutoff)
    return found


def _split_document(text: TokenizedText, most: int, tokenizer: Tokenizer) -> list[TokenizedExample] | RejectedRow:
    """Parts of a document, each of at most `most` tokens, its opening token included."""
    opening, length = get_special_tokens(tokenizer)[0], len(text.ids)
    if most < len(opening) + 2:
        return RejectedRow(text.origin, "longer than max_length",
                           f"{most} tokens are too few for the opening token and two tokens of text")
    found, start, stop = [], 0, most
    while True:
        part = _build_example(text, start, min(stop, length), tokenizer.eos_token_id)
        if start and opening:
            (span,) = part.spans
            weights = ((0.0,) * (len(opening) + 1), span.weights[1:])  # the shared token has been predicted
            part = replace(part, spans=(TokenSpan((*opening, *span.ids), weights[0] + weights[1]),))
        if part.spans[0].predicted:
            found.append(part)
        if stop >= length:
            return found or RejectedRow(text.origin, "nothing to train on", f"{length} tokens")
        start, stop = stop - 1, stop - 1 + most - len(opening)


def _build_example(text: TokenizedText, start: int, stop: int, end_mark: int | None) -> TokenizedExample:
    first = start + text.source
    spans = [TokenSpan(tuple(text.ids[start:first]), tuple(text.weights[start:first]))] if text.source else []
    spans.append(TokenSpan(tuple(text.ids[first:stop]), tuple(text.weights[first:stop]), len(spans) - 1))
    return TokenizedExample(tuple(spans), text.origin, count_predicted_bytes(text, start, stop, end_mark),
                            remarks=() if start else text.remarks)


def count_predicted_bytes(text: TokenizedText, start: int, stop: int, end_mark: int | None) -> int:
    """The number of UTF-8 bytes of the predicted tokens; the first token of a part is never predicted."""
    total, opened, ends = 0, -1, text.ends
    for i in range(start + 1, stop):
        counts = text.weights[i] != 0 and text.ids[i] != end_mark
        if counts and opened < 0:
            opened = ends[i - 1]
        elif not counts and opened >= 0:
            total += len(remove_marks(text.text[opened:ends[i - 1]]).encode())
            opened = -1
    return total + (len(remove_marks(text.text[opened:ends[stop - 1]]).encode()) if opened >= 0 else 0)


# ---------------------------------------------------------------- for generation


def encode_prompt(example: Example, tokenizer: Tokenizer, config: DataConfig) -> tuple[list[int], str]:
    """The prompt of an example as token ids, and the reference answer (the best one of several).

    The prompt of a chat ends before the last assistant turn; a plain text is split in the middle. Raises `RenderError`
    if the chat template cannot render the conversation.
    """
    prompt, answer = encode_prompt_with_remarks(example, tokenizer, config)
    return prompt.ids, answer


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids of a prompt, and the rules that were used to render it."""

    ids: list[int]
    remarks: tuple[str, ...] = ()


def encode_prompt_with_remarks(example: Example, tokenizer: Tokenizer, config: DataConfig) -> tuple[EncodedPrompt, str]:
    """`encode_prompt`, with the remarks for the data report."""
    if isinstance(example, TextExample):
        middle = (len(example.text) + 1) // 2
        return encode_prompt_text(example.text[:middle], tokenizer, config), example.text[middle:]
    if isinstance(example, ChatExample):
        return _render_prompt(example, tokenizer, config)
    asked, answer = get_prompt_and_reference(example)
    if isinstance(asked, str) and not uses_chat_template(tokenizer, config):
        return encode_prompt_text(asked, tokenizer, config), answer
    said = (Message("user", asked),) if isinstance(asked, str) else asked
    chat = ChatExample((*said, Message("assistant", "")), example.origin, tools=get_tools(example))
    return _render_prompt(chat, tokenizer, config)[0], answer


def _render_prompt(example: ChatExample, tokenizer: Tokenizer, config: DataConfig) -> tuple[EncodedPrompt, str]:
    prompt, answer = render_prompt(example, tokenizer, config.rules)
    return EncodedPrompt(tokenize_rendered(prompt, tokenizer, special=False)[0], prompt.remarks), answer


def encode_prompt_text(text: str, tokenizer: Tokenizer, config: DataConfig) -> EncodedPrompt:
    """A plain text to continue: with the tokenizer's opening token, without an end token."""
    marked = find_control_tokens(tokenizer, "", config.chat.control_tokens).mark(text, "user")
    opening, _ = get_special_tokens(tokenizer)
    ids = tokenize_rendered(RenderedChat(marked), tokenizer, special=False)[0]
    return EncodedPrompt([*opening, *ids], _list_remarks(marked, text)
                         + ((ENDS_IN_SPACE,) if text.endswith(" ") else ()))
