"""Answers to one prompt, compared or judged, as tokens. Read `encode.py` first.

Every answer is first spelt whole, behind its prompt, as it would be alone. Two forms follow, which train the same:

    repeated    every answer a root:      [prompt answer]  [prompt answer]  ...
    shared      the prompt their parent:  [prompt] -> [answer], [answer], ...

What is shared is the longest beginning of token ids that all answers have and that is not trained in any of them, so
form and prediction agree token for token. `data.share_prompt: auto` shares where that saves at least `WORTH` of all
tokens: on a CPU, a pair gained 1.24 times at 128 tokens of prompt to 64 of answer, and lost at 32 to 128 (0.90).

What is too long loses the beginning of its prompt, the same for all answers, and is refused where the answer alone
is too long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from luthier.core.examples import ChatExample, ComparedExample, CompletionExample, JudgedExample, Message, Origin
from luthier.core.protocols import Tokenizer
from luthier.core.types import Encoded, Item, Piece
from luthier.data.config import DataConfig
from luthier.data.encode import Spelled, predicted_bytes, spell
from luthier.data.rows import Refusal

Words = tuple[Message, ...] | str
WORTH = 1 / 6
MISMATCHED = -1.0  # the label of another row's answer


def compared(example: ComparedExample, tokenizer: Tokenizer,
             config: DataConfig) -> tuple[list[Encoded], bool] | Refusal:
    """One item for each answer, labelled with its rank; the best has the margin."""
    labels = [(float(rank), (example.margin or 0.0) if rank == 0 else 0.0) for rank in example.ranks]
    return _tree(example.prompt, example.answers, labels, example.weight, example.origin, tokenizer, config)


def judged(example: JudgedExample, tokenizer: Tokenizer, config: DataConfig,
           other: Words | None = None) -> tuple[list[Encoded], bool] | Refusal:
    """One item, labelled 1 or 0; and `other`, an answer to another prompt put behind this one, labelled -1."""
    answers = (example.answer,) if other is None else (example.answer, other)
    labels = [(float(example.good), 0.0), (MISMATCHED, 0.0)][:len(answers)]
    return _tree(example.prompt, answers, labels, example.weight, example.origin, tokenizer, config)


@dataclass(frozen=True)
class _Cut:
    """Where each answer's text starts and stops, and how many tokens from there on all of them share."""

    start: int
    stops: tuple[int, ...]
    shared: int


def _tree(prompt: Words, answers: Sequence[Words], labels: Sequence[tuple[float, float]], weight: float, origin: Origin,
          tokenizer: Tokenizer, config: DataConfig) -> tuple[list[Encoded], bool] | Refusal:
    texts = _spelt(prompt, answers, origin, tokenizer, config)
    if isinstance(texts, Refusal):
        return texts
    cut = _cut(texts, sum(1 for label, _ in labels if label != MISMATCHED), config)
    if isinstance(cut, Refusal):
        return cut
    shared = cut.shared if _worth(cut, config) else 0
    pieces = [Piece(tuple(text.ids[cut.start + shared:stop]), tuple(text.weights[cut.start + shared:stop]),
                    0 if shared else -1) for text, stop in zip(texts, cut.stops, strict=True)]
    if shared:
        pieces.insert(0, Piece(tuple(texts[0].ids[cut.start:cut.start + shared]), (0.0,) * shared))
    items = tuple(Item(index + bool(shared), *label, weight) for index, label in enumerate(labels))
    length = sum(predicted_bytes(text, cut.start, stop, tokenizer.eos_token_id)
                 for text, stop in zip(texts, cut.stops, strict=True))
    shortened = bool(cut.start) or any(stop < len(text.ids) for text, stop in zip(texts, cut.stops, strict=True))
    return [Encoded(tuple(pieces), origin, length, items)], shortened


def _spelt(prompt: Words, answers: Sequence[Words], origin: Origin, tokenizer: Tokenizer,
           config: DataConfig) -> list[Spelled] | Refusal:
    """Every answer behind its prompt; only the answers' words have a weight. The row's own is its items': on the words
    it would scale log-probabilities, not losses."""
    if config.train_on == "all":
        config = config.model_copy(update={"train_on": "assistant"})
    found: list[Spelled] = []
    for answer in answers:
        if isinstance(prompt, str) and isinstance(answer, str):
            texts = spell(CompletionExample(prompt, answer, origin), tokenizer, config)
        else:
            asked = (Message("user", prompt),) if isinstance(prompt, str) else prompt
            said = (Message("assistant", answer),) if isinstance(answer, str) else answer
            untrained = (Message(m.role, m.content, 0.0, m.extra) for m in asked)
            texts = spell(ChatExample((*untrained, *said), origin), tokenizer, config)
        if isinstance(texts, Refusal):
            return texts
        if len(texts) > 1:
            return Refusal(origin, "an answer of several turns under a template that rewrites earlier turns")
        if not any(texts[0].weights[1:]):
            return Refusal(origin, "an answer has nothing to train on")
        found += texts
    return found


def _cut(texts: Sequence[Spelled], whole: int, config: DataConfig) -> _Cut | Refusal:
    """Cuts the prompt's beginning off until the first `whole` texts fit; the end of any further ones."""
    prompt = _shared(texts)
    longest = max(len(text.ids) for text in texts[:whole])
    start = max(0, longest - config.most)
    if start and config.overlong != "truncate":
        return Refusal(texts[0].origin, "longer than max_length", f"{longest} tokens, at most {config.most}")
    if start >= max(prompt, 1):
        return Refusal(texts[0].origin, "an answer leaves no room for its prompt",
                       f"{longest} tokens with {prompt} of prompt, at most {config.most}")
    return _Cut(start, tuple(min(len(text.ids), start + config.most) for text in texts), prompt - start)


def _shared(texts: Sequence[Spelled]) -> int:
    """How many tokens all texts begin with, of those that no text trains."""
    columns = zip(*(zip(text.ids, text.weights, strict=True) for text in texts), strict=False)
    return sum(1 for _ in takewhile(lambda column: all(weight == 0 and token == column[0][0]
                                                       for token, weight in column), columns))


def _worth(cut: _Cut, config: DataConfig) -> bool:
    """Whether the prompt is computed once."""
    if config.share_prompt != "auto" or not cut.shared or len(cut.stops) == 1:
        return config.share_prompt is True and cut.shared > 0
    saved = cut.shared * (len(cut.stops) - 1)
    return saved >= WORTH * sum(stop - cut.start for stop in cut.stops)
