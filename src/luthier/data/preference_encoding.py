"""Tokenizes preferences: several answers to one prompt. Read `tokenization.py` first.

Every answer is first tokenized as a whole text, after its prompt. There are two layouts, which train the same tokens:

    repeated    every answer a root:      [prompt answer]  [prompt answer]  ...
    shared      the prompt their parent:  [prompt] -> [answer], [answer], ...

The shared part is the longest common prefix of token ids that is not trained in any answer, so both layouts have the
same
predictions. `data.share_prompt: auto` shares if that saves at least a sixth of all tokens: on a CPU, a pair was 1.24
times as fast with 128 prompt tokens and 64 answer tokens, and 0.90 times as fast with 32 and 128.

Examples that are too long lose words of their prompt, the oldest first and the same for all answers. The opening token,
headers, control tokens and the system prompt are kept. If that is not enough, the row is rejected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from luthier.core.examples import (
    ChatExample,
    CompletionExample,
    Message,
    Origin,
    PreferenceExample,
    UnpairedPreferenceExample,
)
from luthier.core.protocols import Tokenizer
from luthier.core.types import LabeledSpan, TokenizedExample, TokenSpan
from luthier.data.char_offsets import get_special_tokens
from luthier.data.chat import find_content_ranges
from luthier.data.config import DataConfig
from luthier.data.rows import RejectedRow
from luthier.data.tokenization import TokenizedText, count_predicted_bytes, tokenize_example, uses_chat_template

Words = tuple[Message, ...] | str
Tools = tuple[Mapping[str, Any], ...]
MIN_SHARED = 1 / 6
MISMATCHED = -1.0  # the label of another row's answer


def encode_comparison(example: PreferenceExample, tokenizer: Tokenizer,
                      config: DataConfig) -> tuple[list[TokenizedExample], bool] | RejectedRow:
    """One labeled span per answer, its label is the rank; the best one has the margin."""
    labels = [(float(rank), (example.margin or 0.0) if rank == 0 else 0.0) for rank in example.ranks]
    row = _PromptAndAnswers(example.prompt, example.answers, example.tools, example.origin)
    return _build_tree(row, labels, example.weight, tokenizer, config)


def encode_unpaired(example: UnpairedPreferenceExample, tokenizer: Tokenizer, config: DataConfig,
                    other: Words | None = None) -> tuple[list[TokenizedExample], bool] | RejectedRow:
    """One labeled span with label 1 or 0; and `other`, a mismatched completion after this prompt, with label -1."""
    answers = (example.answer,) if other is None else (example.answer, other)
    labels = [(float(example.good), 0.0), (MISMATCHED, 0.0)][:len(answers)]
    row = _PromptAndAnswers(example.prompt, answers, example.tools, example.origin)
    return _build_tree(row, labels, example.weight, tokenizer, config)


@dataclass(frozen=True)
class _PromptAndAnswers:
    """A prompt and its answers."""

    prompt: Words
    answers: Sequence[Words]
    tools: Tools
    origin: Origin


@dataclass(frozen=True)
class _Truncation:
    """The tokens that truncation keeps: the first `shared` tokens, common to all texts, without those in `removed`;
    and each text up to its stop."""

    shared: int
    stops: tuple[int, ...]
    removed: frozenset[int] = frozenset()

    def kept(self, start: int, stop: int) -> list[int]:
        """The indices of kept tokens in a range."""
        return [i for i in range(start, stop) if i not in self.removed]


def _build_tree(row: _PromptAndAnswers, labels: Sequence[tuple[float, float]], weight: float, tokenizer: Tokenizer,
                config: DataConfig) -> tuple[list[TokenizedExample], bool] | RejectedRow:
    texts = _tokenize_answers(row, tokenizer, config)
    if isinstance(texts, RejectedRow):
        return texts
    cut = _truncate_prompt(row, texts, sum(1 for label, _ in labels if label != MISMATCHED), tokenizer, config)
    if isinstance(cut, RejectedRow):
        return cut
    shared = cut.shared if _is_sharing_useful(cut, config) else 0
    spans = [_build_span(text, cut.kept(shared, stop), 0 if shared else -1)
              for text, stop in zip(texts, cut.stops, strict=True)]
    if shared:
        spans.insert(0, _build_span(texts[0], cut.kept(0, shared), -1))
    items = tuple(LabeledSpan(index + bool(shared), *label, weight) for index, label in enumerate(labels))
    length = sum(count_predicted_bytes(text, 0, stop, tokenizer.eos_token_id)
                 for text, stop in zip(texts, cut.stops, strict=True))
    shortened = bool(cut.removed) or any(stop < len(text.ids) for text, stop in zip(texts, cut.stops, strict=True))
    remarks = tuple(dict.fromkeys(remark for text in texts for remark in text.remarks))
    return [TokenizedExample(tuple(spans), row.origin, length, items, remarks=remarks)], shortened


def _build_span(text: TokenizedText, places: Sequence[int], parent: int) -> TokenSpan:
    return TokenSpan(tuple(text.ids[i] for i in places), tuple(text.weights[i] for i in places), parent)


def _tokenize_answers(row: _PromptAndAnswers, tokenizer: Tokenizer,
                      config: DataConfig) -> list[TokenizedText] | RejectedRow:
    """Every answer after its prompt; only answer tokens have a weight. The weight of the row belongs to its labeled
    spans: as a token weight it would scale log-probabilities, not losses."""
    if config.loss_on == "all":
        config = config.model_copy(update={"loss_on": "assistant"})
    found: list[TokenizedText] = []
    for answer in row.answers:
        if isinstance(row.prompt, str) and isinstance(answer, str) and not row.tools:
            texts = tokenize_example(CompletionExample(row.prompt, answer, row.origin), tokenizer, config)
        else:
            said = (Message("assistant", answer),) if isinstance(answer, str) else answer
            untrained = (Message(m.role, m.content, 0.0, m.extra) for m in _get_messages(row.prompt))
            texts = tokenize_example(ChatExample((*untrained, *said), row.origin, tools=row.tools), tokenizer, config)
        if isinstance(texts, RejectedRow):
            return texts
        if len(texts) > 1:
            return RejectedRow(row.origin, "an answer has several turns, and the chat template rewrites earlier turns")
        if not any(texts[0].weights[1:]):
            return RejectedRow(row.origin, "an answer has nothing to train on")
        found += texts
    return found


def _get_messages(prompt: Words) -> tuple[Message, ...]:
    return (Message("user", prompt),) if isinstance(prompt, str) else prompt


def _truncate_prompt(row: _PromptAndAnswers, texts: Sequence[TokenizedText], whole: int, tokenizer: Tokenizer,
                     config: DataConfig) -> _Truncation | RejectedRow:
    """Removes words of the prompt until the first `whole` texts fit; further texts lose their end."""
    prompt = _count_shared_tokens(texts)
    longest = max(len(text.ids) for text in texts[:whole])
    excess = max(0, longest - config.token_limit)
    stops = tuple(min(len(text.ids), config.token_limit + excess) for text in texts)
    if not excess:
        return _Truncation(prompt, stops)
    if config.truncation != "truncate":
        return RejectedRow(row.origin, "longer than max_length", f"{longest} tokens, at most {config.token_limit}")
    words = _find_removable_tokens(row, texts[0], prompt, tokenizer, config)
    if excess >= max(len(words), 1):
        return RejectedRow(row.origin, "an answer leaves no space for its prompt",
                           f"{longest} tokens, at most {config.token_limit}; "
                           f"{len(words)} of them are prompt tokens that may be removed, and at least one must be kept")
    return _Truncation(prompt, stops, frozenset(words[:excess]))


def _find_removable_tokens(row: _PromptAndAnswers, text: TokenizedText, prompt: int, tokenizer: Tokenizer,
                           config: DataConfig) -> list[int]:
    """Indices of the tokens of the content of the prompt's turns, without tokens of the template or the tokenizer."""
    if config.is_encoder_decoder:
        return list(range(prompt - 1))  # a source keeps its end token
    if isinstance(row.prompt, str) and not uses_chat_template(tokenizer, config) and not row.tools:
        return list(range(len(get_special_tokens(tokenizer)[0]), prompt))
    ranges = find_content_ranges(_get_messages(row.prompt), row.tools, tokenizer, config.rules)
    ends = text.ends[:prompt]
    return [i for i in range(prompt) if any(start <= (ends[i - 1] if i else 0) and ends[i] <= end and ends[i] > start
                                            for start, end in ranges)]


def _count_shared_tokens(texts: Sequence[TokenizedText]) -> int:
    """The length of the common prefix of untrained tokens."""
    columns = zip(*(zip(text.ids, text.weights, strict=True) for text in texts), strict=False)
    return sum(1 for _ in takewhile(lambda column: all(weight == 0 and token == column[0][0]
                                                       for token, weight in column), columns))


def _is_sharing_useful(cut: _Truncation, config: DataConfig) -> bool:
    """Whether the prompt is computed once."""
    if config.share_prompt != "auto" or not cut.shared or len(cut.stops) == 1:
        return config.share_prompt is True and cut.shared > 0
    shared, whole = cut.shared - len(cut.removed), sum(cut.stops) - len(cut.removed) * len(cut.stops)
    return shared * (len(cut.stops) - 1) >= MIN_SHARED * whole
