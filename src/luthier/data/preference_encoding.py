"""Answers to one prompt, compared or judged, as tokens. Read `tokenization.py` first.

Every answer is first spelt whole, behind its prompt, as it would be alone. Two forms follow, which train the same:

    repeated    every answer a root:      [prompt answer]  [prompt answer]  ...
    shared      the prompt their parent:  [prompt] -> [answer], [answer], ...

What is shared is the longest beginning of token ids that all answers have and that is not trained in any of them, so
form and prediction agree token for token. `data.share_prompt: auto` shares where that saves at least `WORTH` of all
tokens: on a CPU, a pair gained 1.24 times at 128 tokens of prompt to 64 of answer, and lost at 32 to 128 (0.90).

What is too long loses words of its prompt, the oldest first and the same for all answers; the opening token, headers,
marks and the system prompt stay. It is refused where that is not enough.
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
    """One item for each answer, labeled with its rank; the best has the margin."""
    labels = [(float(rank), (example.margin or 0.0) if rank == 0 else 0.0) for rank in example.ranks]
    row = _PromptAndAnswers(example.prompt, example.answers, example.tools, example.origin)
    return _build_tree(row, labels, example.weight, tokenizer, config)


def encode_unpaired(example: UnpairedPreferenceExample, tokenizer: Tokenizer, config: DataConfig,
                    other: Words | None = None) -> tuple[list[TokenizedExample], bool] | RejectedRow:
    """One item, labeled 1 or 0; and `other`, an answer to another prompt put behind this one, labeled -1."""
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
    """What is kept: of the `shared` first tokens, which all texts begin with, all but those in `removed`, and each
    text up to its stop."""

    shared: int
    stops: tuple[int, ...]
    removed: frozenset[int] = frozenset()

    def kept(self, start: int, stop: int) -> list[int]:
        """The places of the tokens that are kept between two places."""
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
    """Every answer behind its prompt; only the answers' words have a weight. The row's own is its items': on the words
    it would scale log-probabilities, not losses."""
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
            return RejectedRow(row.origin, "an answer of several turns under a template that rewrites earlier turns")
        if not any(texts[0].weights[1:]):
            return RejectedRow(row.origin, "an answer has nothing to train on")
        found += texts
    return found


def _get_messages(prompt: Words) -> tuple[Message, ...]:
    return (Message("user", prompt),) if isinstance(prompt, str) else prompt


def _truncate_prompt(row: _PromptAndAnswers, texts: Sequence[TokenizedText], whole: int, tokenizer: Tokenizer,
                     config: DataConfig) -> _Truncation | RejectedRow:
    """Cuts words of the prompt away until the first `whole` texts fit; the end of any further ones."""
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
        return RejectedRow(row.origin, "an answer leaves no room for its prompt",
                           f"{longest} tokens, at most {config.token_limit}; "
                           f"{len(words)} of them are words of the prompt, of "
                           "which one at least is kept")
    return _Truncation(prompt, stops, frozenset(words[:excess]))


def _find_removable_tokens(row: _PromptAndAnswers, text: TokenizedText, prompt: int, tokenizer: Tokenizer,
                           config: DataConfig) -> list[int]:
    """The places of the tokens that are words of the prompt's turns, and nothing of the template or the tokenizer."""
    if config.is_encoder_decoder:
        return list(range(prompt - 1))  # a source keeps its end mark
    if isinstance(row.prompt, str) and not uses_chat_template(tokenizer, config) and not row.tools:
        return list(range(len(get_special_tokens(tokenizer)[0]), prompt))
    ranges = find_content_ranges(_get_messages(row.prompt), row.tools, tokenizer, config.rules)
    ends = text.ends[:prompt]
    return [i for i in range(prompt) if any(start <= (ends[i - 1] if i else 0) and ends[i] <= end and ends[i] > start
                                            for start, end in ranges)]


def _count_shared_tokens(texts: Sequence[TokenizedText]) -> int:
    """How many tokens all texts begin with, of those that no text trains."""
    columns = zip(*(zip(text.ids, text.weights, strict=True) for text in texts), strict=False)
    return sum(1 for _ in takewhile(lambda column: all(weight == 0 and token == column[0][0]
                                                       for token, weight in column), columns))


def _is_sharing_useful(cut: _Truncation, config: DataConfig) -> bool:
    """Whether the prompt is computed once."""
    if config.share_prompt != "auto" or not cut.shared or len(cut.stops) == 1:
        return config.share_prompt is True and cut.shared > 0
    shared, whole = cut.shared - len(cut.removed), sum(cut.stops) - len(cut.removed) * len(cut.stops)
    return shared * (len(cut.stops) - 1) >= MIN_SHARED * whole
