"""The words of the house as types: examples, pieces, segments, batches, outputs, losses. Imports torch only.

Data flows one way through them::

    row -> Example -> Encoded (pieces of tokens and weights) -> Batch -> Outputs -> Loss

Shape letters used everywhere:
    T  tokens in a packed row          S  segments in it
    P  positions where something is predicted (trained or scored)
    D  hidden size      V  vocabulary      R  rank
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

# ---------------------------------------------------------------- examples: typed by their kind


@dataclass(frozen=True)
class Origin:
    """Where a row came from, for every word said about it: ``train.jsonl:17``."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Message:
    """One turn of a chat. `weight` is that of its tokens in the loss; None: 1 for the assistant, 0 for others."""

    role: str
    content: str
    weight: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)  # tool_calls, name, ...: handed to the chat template


@dataclass(frozen=True)
class TextExample:
    """A document; every token of it is predicted."""

    text: str
    origin: Origin
    weight: float = 1.0


@dataclass(frozen=True)
class CompletionExample:
    """A bare prompt and its completion, joined without a chat template; the completion is predicted."""

    prompt: str
    completion: str
    origin: Origin
    weight: float = 1.0


@dataclass(frozen=True)
class ChatExample:
    """A conversation, put into words by the base's own chat template."""

    messages: tuple[Message, ...]
    origin: Origin
    weight: float = 1.0
    tools: tuple[Mapping[str, Any], ...] = ()


Example = TextExample | CompletionExample | ChatExample

# ---------------------------------------------------------------- encoded examples


@dataclass(frozen=True)
class Piece:
    """A run of tokens of one example. It continues its parent piece (an index into the example), or none.

    Args:
        ids: token ids.
        weights: as long as `ids`; entry i weighs the prediction of token i from all that stands before it, in its
            ancestors too. The very first token of a root follows nothing, so its weight is never used.
        parent: the piece that it continues, -1 for none.
    """

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    parent: int = -1

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.weights) > 0, (len(self.ids), len(self.weights))


@dataclass(frozen=True)
class Encoded:
    """One example as tokens: one piece for a text or a chat; a tree of pieces for answers that share a prompt."""

    pieces: tuple[Piece, ...]
    origin: Origin
    bytes: int = 0  # UTF-8 length of the predicted words, for bits per byte

    @property
    def tokens(self) -> int:
        return sum(len(piece.ids) for piece in self.pieces)


# ---------------------------------------------------------------- batches


class Movable:
    """A frozen dataclass whose tensors move to a device together; everything else stays as it is."""

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Self:
        moved = {f.name: v.to(device, non_blocking=non_blocking)
                 for f in fields(self)  # type: ignore[arg-type]
                 if isinstance(v := self.__dict__[f.name], Tensor | Movable)}
        return replace(self, **moved)  # type: ignore[type-var]


@dataclass(frozen=True)
class Forest:
    """Segments of a packed row, in order and without gaps.

    A segment attends to itself causally and to all its ancestors.

    Args:
        lengths: tokens of each segment; they sum to T.
        parents: index of the segment that each continues, -1 for a root. A parent stands before its children.
        adapters: index into a bank for each segment, -1 for the bare base; empty where nothing is routed.
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    adapters: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        assert len(self.lengths) == len(self.parents)
        assert all(p < i for i, p in enumerate(self.parents)), "a parent stands before its children"

    @property
    def starts(self) -> tuple[int, ...]:
        starts, at = [], 0
        for length in self.lengths:
            starts.append(at)
            at += length
        return tuple(starts)

    @property
    def flat(self) -> bool:
        """Whether every segment is a root: plain packing."""
        return all(p < 0 for p in self.parents)

    def path(self, segment: int) -> tuple[int, ...]:
        """The segment's ancestors from the root down, and itself last."""
        found = [segment]
        while (parent := self.parents[found[-1]]) >= 0:
            found.append(parent)
        return tuple(reversed(found))


@dataclass(frozen=True)
class Inputs(Movable):
    """What the model sees: one row without padding.

    Args:
        tokens: [T] token ids.
        positions: [T] each token's place in its own document; a child goes on where its parent ends.
        forest: the row's segments.
    """

    tokens: Tensor
    positions: Tensor
    forest: Forest


@dataclass(frozen=True)
class Target(Movable):
    """What the objective sees: predictions, as a flat list of P.

    Args:
        at: [P] index into the row of the state that predicts.
        tokens: [P] the token that should come next.
        weights: [P] float32 weight of each prediction; never 0.
        owners: [P] which example of the batch each prediction belongs to.
        examples: how many examples the batch holds.
        bytes: UTF-8 bytes of what is predicted.
    """

    at: Tensor
    tokens: Tensor
    weights: Tensor
    owners: Tensor
    examples: int
    bytes: int = 0


@dataclass(frozen=True)
class Batch(Movable):
    """A frozen, self-describing micro-batch that knows no model."""

    inputs: Inputs
    target: Target
    origins: tuple[Origin, ...] = ()


# ---------------------------------------------------------------- what comes back


@dataclass(frozen=True)
class Outputs:
    """What the family computed at the target's positions, as far as the objective asked for it; None for the rest.

    Args:
        token_logps: [P] log-probability of each target token (natural logarithm), float32 or wider.
        token_hits: [P] bool, whether the target token was the most probable one.
        states: [P, D] last hidden states, after the final norm.
    """

    token_logps: Tensor | None = None
    token_hits: Tensor | None = None
    states: Tensor | None = None


@dataclass(frozen=True)
class Loss:
    """Sums, never means: whoever divides (only the step does) divides `total` by a count taken over the whole batch.

    Args:
        total: scalar with a gradient.
        count: what `total` is to be divided by, once summed over all micro-batches and ranks.
        metrics: name -> (sum, count), both without a gradient. Tensors stay on their device: reading one is a wait.
    """

    total: Tensor
    count: Tensor
    metrics: Mapping[str, tuple[Tensor, Tensor | float]]
