"""Core types: token spans, tokenized examples, batches, model outputs, losses. Read `examples.py` first.

Data flows one way through them::

    row -> Example -> TokenizedExample (spans of tokens and weights) -> Batch -> Outputs -> Loss

Shape letters used everywhere:
    T  tokens in a packed row          S  segments in the row
    P  positions where something is predicted (trained or scored)
    A  labeled spans: spans with one label for the whole span (a text with a class, a ranked completion)
    D  hidden size      V  vocabulary      R  rank      C  outputs of a head
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from luthier.core.device import DeviceMovable as DeviceMovable
from luthier.core.device import to_device as to_device
from luthier.core.embedding_mix import EmbeddingMix, SpanMix
from luthier.core.examples import Origin

# ---------------------------------------------------------------- tokenized examples


@dataclass(frozen=True)
class TokenSpan:
    """Consecutive tokens of one example. A span continues its parent span, if it has one.

    Args:
        ids: token ids.
        weights: same length as `ids`; entry i is the loss weight of predicting token i from all tokens before it,
            including those of the ancestors. The first token of a root is never predicted, so its weight is unused.
        parent: index of the parent span in the example; -1 for a root.
        tags: empty, or same length as `ids`: the tag index of each token, predicted at the token itself instead of the
            next token. The weights are then those of the tags; -1 for tokens without a tag.
        mix: tokens whose embeddings are mixed with those of `ids` (mixup); None: no mixing.
    """

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    parent: int = -1
    tags: tuple[int, ...] = ()
    mix: SpanMix | None = None

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.weights) > 0, (len(self.ids), len(self.weights))
        assert len(self.tags) in (0, len(self.ids)), (len(self.tags), len(self.ids))
        assert self.mix is None or len(self.mix.ids) == len(self.ids), "one other token for each token"

    @property
    def predicted(self) -> tuple[int, ...]:
        """Indices of the tokens that are predicted with a weight, or whose tags are."""
        if self.tags:
            return tuple(i for i, tag in enumerate(self.tags) if tag >= 0 and self.weights[i])
        return tuple(i for i, weight in enumerate(self.weights) if weight and (i or self.parent >= 0))


@dataclass(frozen=True)
class LabeledSpan:
    """A label for a whole span.

    Args:
        span_index: index of the span in the example.
        label: a class index, one flag for each class (multi-label), a rank (0 is best), 1 or 0 for desirable or
            undesirable, or a similarity; the objective defines which.
        margin: how much better this span is than the others of its group, if the data provide it.
        weight: loss weight; 2 has the effect of two copies of the row. All labeled spans of an example share it.
        soft_label: the share of each class after mixup; `label` is then the class with the largest share.
        text_id: hash of the span's tokens where texts are compared, else None.
    """

    span_index: int
    label: float | tuple[float, ...]
    margin: float = 0.0
    weight: float = 1.0
    soft_label: tuple[float, ...] = ()
    text_id: int | None = field(default=None, compare=False, repr=False)


class PendingMasking(Protocol):
    """Masks tokens of a document before it goes into a batch."""

    @property
    def digest(self) -> bytes:
        """Hash of all settings that determine the masked tokens."""
        ...

    def apply(self, example: TokenizedExample, seed: Sequence[int]) -> TokenizedExample:
        """The example with some tokens masked, chosen by `seed`, and with the predictions of these tokens."""
        ...


class PendingImage(Protocol):
    """An image that is decoded, augmented and processed when it goes into a batch."""

    @property
    def digest(self) -> bytes:
        """Hash of the pixels and of the augmentations."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the pixels."""  # [height, width] or [height, width, 3]
        ...

    def tensor(self) -> Tensor:
        """Float tensor for the model."""  # [channels, height, width]
        ...


@dataclass(frozen=True)
class TokenizedExample:
    """One example as tokens: one span for a text or a chat, a tree of spans for completions that share a prompt,
    several roots for texts that are compared.

    Args:
        num_bytes: UTF-8 length of the predicted text, for bits per byte.
        labeled_spans: the spans that have a label.
        images: one image for each span, either [channels, height, width] or a `PendingImage`. Each span then holds one
            placeholder token.
        metadata: columns of the row that reward functions receive.
        precomputed: name -> one number for each prediction, in order (see `LossInputs.precomputed`).
        masking: masks some of the tokens again in every epoch; None: no masking.
        remarks: rules that were applied when the row was rendered; the data report counts them.
    """

    spans: tuple[TokenSpan, ...]
    origin: Origin
    num_bytes: int = 0
    labeled_spans: tuple[LabeledSpan, ...] = ()
    images: tuple[Tensor | PendingImage, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    precomputed: Mapping[str, Tensor] = field(default_factory=dict)
    masking: PendingMasking | None = None
    remarks: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(span.ids) for span in self.spans)


# ---------------------------------------------------------------- batches


@dataclass(frozen=True)
class SegmentTree:
    """Segments of a packed row, in order and without gaps.

    A segment attends to itself causally and to all tokens of its ancestors.

    Args:
        lengths: tokens of each segment; they sum to T.
        parents: index of the segment that each one continues, -1 for a root. A parent precedes its children.
        adapters: index of each segment's adapter, -1 for the base model; empty if no adapter is routed.
    """

    lengths: tuple[int, ...]  # [S]
    parents: tuple[int, ...]  # [S]
    adapters: tuple[int, ...] = ()  # [S] or [0]

    def __post_init__(self) -> None:
        assert len(self.lengths) == len(self.parents)
        assert all(p < i for i, p in enumerate(self.parents)), "a parent precedes its children"

    @property
    def starts(self) -> tuple[int, ...]:
        starts, at = [], 0
        for length in self.lengths:
            starts.append(at)
            at += length
        return tuple(starts)

    @property
    def is_flat(self) -> bool:
        """Whether every segment is a root, as in plain packing."""
        return all(p < 0 for p in self.parents)

    def find_path(self, segment: int) -> tuple[int, ...]:
        """Indices of the segments from the root to `segment`."""
        path = [segment]
        while (parent := self.parents[path[-1]]) >= 0:
            path.append(parent)
        return tuple(reversed(path))


@dataclass(frozen=True)
class Inputs(DeviceMovable):
    """Inputs of the model: one row without padding.

    Args:
        tokens: [T] token ids.
        positions: [T] position of each token in its document; a child continues the positions of its parent.
        segment_tree: the row's segments. Encoder-decoder models read roots as sources and children as their targets.
        images: [S, channels, height, width] if every segment is an image (with one placeholder token); else None.
        mix: embeddings that are mixed into those of `tokens`; None: no mixing.
    """

    tokens: Tensor  # [T]
    positions: Tensor  # [T]
    segment_tree: SegmentTree
    images: Tensor | None = None  # [S, channels, height, width]
    mix: EmbeddingMix | None = None


def _build_empty() -> Tensor:
    return torch.zeros(0, dtype=torch.int64)


@dataclass(frozen=True)
class LossInputs(DeviceMovable):
    """Inputs of the objective: a flat list of P predictions, and a flat list of A labeled spans ("items").

    Args:
        state_index: [P] index into the row of the hidden state that predicts.
        token_ids: [P] the token to predict; for token classification the tag of the token at `state_index`.
        weights: [P] float32 weight of each prediction; never 0.
        num_examples: number of examples in the batch.
        num_bytes: UTF-8 bytes of the predicted text.
        labeled_segments: [A] segment of each item.
        labels: [A] or [A, C] float32 label of each item (see `LabeledSpan`).
        margins: [A] float32, how much better an item is than the others of its group; 0 if unknown.
        groups: [A] example of each item; items of one group are compared with one another.
        item_of: [P] item of each prediction, -1 for none.
        precomputed: name -> [P] values that were computed before the step (`old_logps`, `advantages`, ...).
        item_weights: [A] float32 loss weight of each item; empty: 1 each.
        soft_labels: [A, C] float32 share of every class for each item; empty if no item is a mixture.
        text_ids: [A] hash of each item's tokens: equal texts have equal hashes; empty if texts are not compared.
        temperature: sampling temperature at which every log-probability is computed.
    """

    state_index: Tensor  # [P]
    token_ids: Tensor  # [P]
    weights: Tensor  # [P]
    num_examples: int
    num_bytes: int = 0
    labeled_segments: Tensor = field(default_factory=_build_empty)  # [A]
    labels: Tensor = field(default_factory=lambda: torch.zeros(0))  # [A] or [A, C]
    margins: Tensor = field(default_factory=lambda: torch.zeros(0))  # [A]
    groups: Tensor = field(default_factory=_build_empty)  # [A]
    item_of: Tensor = field(default_factory=_build_empty)  # [P]
    precomputed: Mapping[str, Tensor] = field(default_factory=dict)  # name -> [P]
    item_weights: Tensor = field(default_factory=lambda: torch.zeros(0))  # [A] or [0]
    soft_labels: Tensor = field(default_factory=lambda: torch.zeros(0))  # [A, C] or [0]
    text_ids: Tensor = field(default_factory=_build_empty)  # [A] or [0]
    temperature: float = 1.0

    @staticmethod
    def concatenate(targets: Sequence[LossInputs]) -> LossInputs:
        """The lists of several batches as one. `state_index` and `labeled_segments` still point into their own rows."""
        examples = _offsets(t.num_examples for t in targets)
        items = _offsets(t.labeled_segments.shape[0] for t in targets)
        return LossInputs(
            torch.cat([t.state_index for t in targets]), torch.cat([t.token_ids for t in targets]),
            torch.cat([t.weights for t in targets]), sum(t.num_examples for t in targets),
            sum(t.num_bytes for t in targets),
            torch.cat([t.labeled_segments for t in targets]), torch.cat([t.labels for t in targets]),
            torch.cat([t.margins for t in targets]),
            # [A] Every batch numbers its examples from 0.
            torch.cat([t.groups + start for t, start in zip(targets, examples, strict=True)]),
            torch.cat([torch.where(t.item_of < 0, -1, t.item_of + start)
                       for t, start in zip(targets, items, strict=True)]),  # [P] -1 stays -1: no item
            {name: torch.cat([t.precomputed[name] for t in targets]) for name in targets[0].precomputed},
            torch.cat([t.item_weights for t in targets]), torch.cat([t.soft_labels for t in targets]),
            torch.cat([t.text_ids for t in targets]), targets[0].temperature)


def _offsets(sizes: Iterable[int]) -> list[int]:
    return [0, *accumulate(sizes)][:-1]


@dataclass(frozen=True)
class Batch(DeviceMovable):
    """A frozen, self-describing micro-batch, independent of the model."""

    inputs: Inputs
    target: LossInputs
    origins: tuple[Origin, ...] = ()


# ---------------------------------------------------------------- outputs and losses


@dataclass(frozen=True)
class Outputs:
    """What the model computed for the `LossInputs`: the outputs that the objective requires; None for all others.

    Args:
        token_logps: [P] log-probability of each target token (natural logarithm), float32 or wider.
        token_hits: [P] bool, whether the target token is the most probable one.
        token_entropies: [P] entropy of the prediction, in nats.
        states: [P, D] last hidden states, after the final norm.
        token_scores: [P, C] the objective's token head on `states`: values, tags.
        pooled: [A, D] one state for each item, by the model's pooling: last token, first token, or mean.
        scores: [A, C] the objective's item head on `pooled`: classes, rewards.
        reference_logps: [P] `token_logps` of the reference model, without a gradient.
        scalars: name -> [], trained scalars of the objective, such as a temperature.
    """

    token_logps: Tensor | None = None  # [P]
    token_hits: Tensor | None = None  # [P]
    token_entropies: Tensor | None = None  # [P]
    states: Tensor | None = None  # [P, D]
    token_scores: Tensor | None = None  # [P, C]
    pooled: Tensor | None = None  # [A, D]
    scores: Tensor | None = None  # [A, C]
    reference_logps: Tensor | None = None  # [P]
    scalars: Mapping[str, Tensor] = field(default_factory=dict)  # name -> []

    def tensors(self) -> dict[str, Tensor]:
        """The computed fields, without the scalars."""
        return {f.name: v for f in fields(self) if isinstance(v := self.__dict__[f.name], Tensor)}

    @staticmethod
    def concatenate(parts: Sequence[Outputs]) -> Outputs:
        """The outputs of several batches as one, in the order of `LossInputs.concatenate`."""
        found = [part.tensors() for part in parts]
        return Outputs(**{name: torch.cat([tensors[name] for tensors in found]) for name in found[0]},
                       scalars=parts[0].scalars)


@dataclass(frozen=True)
class Loss:
    """Sums, never means: only the step divides `total`, by the count over the whole batch.

    Args:
        total: scalar with a gradient.
        count: divisor of `total`, after both are summed over all micro-batches and ranks.
        metrics: name -> (sum, count), both without a gradient. Tensors stay on their device, because reading one
            waits for the device.
    """

    total: Tensor  # []
    count: Tensor  # []
    metrics: Mapping[str, tuple[Tensor, Tensor | float]]
