"""The words of the house as types: pieces, segments, batches, outputs, losses. Read `examples.py` first.

Data flows one way through them::

    row -> Example -> Encoded (pieces of tokens and weights) -> Batch -> Outputs -> Loss

Shape letters used everywhere:
    T  tokens in a packed row          S  segments in it
    P  positions where something is predicted (trained or scored)
    A  items: pieces that are judged as a whole (a text with a class, an answer among others)
    D  hidden size      V  vocabulary      R  rank      C  width of a head
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from typing import Any, Self

import torch
from torch import Tensor

from luthier.core.examples import Origin

# ---------------------------------------------------------------- encoded examples


@dataclass(frozen=True)
class TokenSpan:
    """A run of tokens of one example. It continues its parent piece (an index into the example), or none.

    Args:
        ids: token ids.
        weights: as long as `ids`; entry i weighs the prediction of token i from all that stands before it, in its
            ancestors too. The very first token of a root follows nothing, so its weight is never used.
        parent: the piece that it continues, -1 for none.
        tags: empty, or as long as `ids`: what is predicted is the number of each token's own tag, not the token, and
            the weights are those of the tags; -1 for tokens without one.
        others: empty, or as long as `ids`: tokens whose embeddings are mixed in; -1 for none, an embedding of zeros.
        share: of `ids` in the mixture; the rest is the others'.
    """

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    parent: int = -1
    tags: tuple[int, ...] = ()
    others: tuple[int, ...] = ()
    share: float = 1.0

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.weights) > 0, (len(self.ids), len(self.weights))
        assert len(self.tags) in (0, len(self.ids)), (len(self.tags), len(self.ids))
        assert len(self.others) in (0, len(self.ids)), (len(self.others), len(self.ids))

    @property
    def predicted(self) -> tuple[int, ...]:
        """Indices of the tokens that are predicted with a weight, or whose tags are."""
        if self.tags:
            return tuple(i for i, tag in enumerate(self.tags) if tag >= 0 and self.weights[i])
        return tuple(i for i, weight in enumerate(self.weights) if weight and (i or self.parent >= 0))


@dataclass(frozen=True)
class LabeledSpan:
    """A piece that is judged as a whole.

    Args:
        piece: its index in the example.
        label: a class's number, one flag for each class (multi-label), a rank (0 best), 1 or 0 for good or bad, a
            likeness: the objective knows which.
        margin: by how much it is better than the rest of its group, where the data say so.
        weight: how much its loss counts; 2 is as good as the row twice. All items of an example have the same.
        shares: of a mixture of classes, the share of each; `label` is then the class of the greatest.
        text_id: a hash of the piece's tokens where texts are compared, else None.
    """

    span_index: int
    label: float | tuple[float, ...]
    margin: float = 0.0
    weight: float = 1.0
    soft_label: tuple[float, ...] = ()
    text_id: int | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class TokenizedExample:
    """One example as tokens: one piece for a text or a chat; a tree of pieces for answers that share a prompt; several
    roots for texts that are compared.

    Args:
        bytes: UTF-8 length of the predicted words, for bits per byte.
        items: the pieces that are judged as a whole.
        images: one picture for each piece, [channels, height, width], where the pieces are pictures; the pieces then
            hold one placeholder token each.
        facts: what a reward function is told about a prompt.
        precomputed: name -> one number for each prediction, in their order, computed before (see `Target.precomputed`).
        hidden: what hides some of its tokens, drawn anew in every epoch; None: it is as it goes into a batch.
        remarks: rules that were applied to make text of its row, which the data report counts.
    """

    spans: tuple[TokenSpan, ...]
    origin: Origin
    num_bytes: int = 0
    labeled_spans: tuple[LabeledSpan, ...] = ()
    images: tuple[Any, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    precomputed: Mapping[str, Tensor] = field(default_factory=dict)
    masking: Any = None
    remarks: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(span.ids) for span in self.spans)


# ---------------------------------------------------------------- batches


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """`tensor` on a device. To a GPU it goes through pinned memory, so that the copy is queued behind the work that is
    there and nobody waits. From a GPU, and to others, the copy is done when this returns: a queued one would be read
    too early."""
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class DeviceMovable:
    """A frozen dataclass whose tensors move to a device together (see `sent`); everything else stays as it is."""

    def to(self, device: torch.device | str) -> Self:
        def there(value: Any) -> Any:
            if isinstance(value, Tensor):
                return to_device(value, device)
            if isinstance(value, DeviceMovable):
                return value.to(device)
            return {key: there(inner) for key, inner in value.items()} if isinstance(value, dict) else value

        moved = {f.name: there(self.__dict__[f.name]) for f in fields(self)}  # type: ignore[arg-type]
        return replace(self, **moved)  # type: ignore[type-var]


@dataclass(frozen=True)
class SegmentTree:
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
class Inputs(DeviceMovable):
    """What the model sees: one row without padding.

    Args:
        tokens: [T] token ids.
        positions: [T] each token's place in its own document; a child goes on where its parent ends.
        forest: the row's segments. A sequence-to-sequence family reads roots as sources and children as their answers.
        images: [S, channels, height, width] where every segment is a picture (and one placeholder token); else None.
        others, shares: [T] where embeddings are mixed; else None. A token's embedding is then `shares` of its own and
            1 - `shares` of that of the token in `others`, which is zeros where there is none (-1).
    """

    tokens: Tensor
    positions: Tensor
    forest: SegmentTree
    images: Tensor | None = None
    others: Tensor | None = None
    shares: Tensor | None = None


def _build_empty() -> Tensor:
    return torch.zeros(0, dtype=torch.int64)


@dataclass(frozen=True)
class LossInputs(DeviceMovable):
    """What the objective sees: predictions, a flat list of P, and items, a flat list of A.

    Args:
        at: [P] index into the row of the state that predicts.
        tokens: [P] the token that should come next (for tagged words: the number of the tag of the token at `at`).
        weights: [P] float32 weight of each prediction; never 0.
        examples: how many examples the batch holds.
        bytes: UTF-8 bytes of what is predicted.
        items: [A] the segment that each item is.
        labels: [A] or [A, C] float32, what is known about each item (see `Item`).
        margins: [A] float32, by how much an item is better than the rest of its group; 0 where nobody said.
        groups: [A] which example of the batch each item belongs to; items of one group are compared with one another.
        item_of: [P] the item that each prediction belongs to, -1 for none.
        precomputed: name -> [P], numbers about each prediction that were computed before (`old_logps`, `advantages`,
            ...).
        item_weights: [A] float32, how much each item's loss counts; empty: 1 each.
        shares: [A, C] float32, of each item the share of every class, where some are mixtures; empty where none is.
        text_ids: [A] a hash of each item's tokens: equal texts have equal numbers; empty where texts are not compared.
        temperature: every log-probability is that of sampling at this temperature.
    """

    state_index: Tensor
    token_ids: Tensor
    weights: Tensor
    num_examples: int
    num_bytes: int = 0
    labeled_segments: Tensor = field(default_factory=_build_empty)
    labels: Tensor = field(default_factory=lambda: torch.zeros(0))
    margins: Tensor = field(default_factory=lambda: torch.zeros(0))
    groups: Tensor = field(default_factory=_build_empty)
    item_of: Tensor = field(default_factory=_build_empty)
    precomputed: Mapping[str, Tensor] = field(default_factory=dict)
    item_weights: Tensor = field(default_factory=lambda: torch.zeros(0))
    soft_labels: Tensor = field(default_factory=lambda: torch.zeros(0))
    text_ids: Tensor = field(default_factory=_build_empty)
    temperature: float = 1.0

    @staticmethod
    def joined(targets: Sequence[LossInputs]) -> LossInputs:
        """Several batches' targets as one list; `at` and `items` keep pointing into their own rows."""
        examples = _offsets(t.num_examples for t in targets)
        items = _offsets(t.labeled_segments.shape[0] for t in targets)
        return LossInputs(
            torch.cat([t.state_index for t in targets]), torch.cat([t.token_ids for t in targets]),
            torch.cat([t.weights for t in targets]), sum(t.num_examples for t in targets),
            sum(t.num_bytes for t in targets),
            torch.cat([t.labeled_segments for t in targets]), torch.cat([t.labels for t in targets]),
            torch.cat([t.margins for t in targets]),
            torch.cat([t.groups + start for t, start in zip(targets, examples, strict=True)]),
            torch.cat([torch.where(t.item_of < 0, -1, t.item_of + start)
                       for t, start in zip(targets, items, strict=True)]),
            {name: torch.cat([t.precomputed[name] for t in targets]) for name in targets[0].precomputed},
            torch.cat([t.item_weights for t in targets]), torch.cat([t.soft_labels for t in targets]),
            torch.cat([t.text_ids for t in targets]), targets[0].temperature)


def _offsets(sizes: Iterable[int]) -> list[int]:
    return [0, *accumulate(sizes)][:-1]


@dataclass(frozen=True)
class Batch(DeviceMovable):
    """A frozen, self-describing micro-batch that knows no model."""

    inputs: Inputs
    target: LossInputs
    origins: tuple[Origin, ...] = ()


# ---------------------------------------------------------------- what comes back


@dataclass(frozen=True)
class Outputs:
    """What the family computed at the target's places, as far as the objective asked for it; None for the rest.

    Args:
        token_logps: [P] log-probability of each target token (natural logarithm), float32 or wider.
        token_hits: [P] bool, whether the target token was the most probable one.
        token_entropies: [P] entropy of the prediction, in nats.
        states: [P, D] last hidden states, after the final norm.
        token_scores: [P, C] the objective's token head on `states`: values, tags.
        pooled: [A, D] one state for each item, pooled as the base does it: the last token's, the first's, or the mean.
        scores: [A, C] the objective's item head on `pooled`: classes, rewards.
        reference_logps: [P] `token_logps` of the reference model, without a gradient.
        scalars: name -> [], the objective's trained numbers (a temperature).
    """

    token_logps: Tensor | None = None
    token_hits: Tensor | None = None
    token_entropies: Tensor | None = None
    states: Tensor | None = None
    token_scores: Tensor | None = None
    pooled: Tensor | None = None
    scores: Tensor | None = None
    reference_logps: Tensor | None = None
    scalars: Mapping[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """The fields that were computed, but for the scalars."""
        return {f.name: v for f in fields(self) if isinstance(v := self.__dict__[f.name], Tensor)}

    @staticmethod
    def joined(parts: Sequence[Outputs]) -> Outputs:
        """Several batches' outputs as one, in the order of `Target.joined`."""
        found = [part.tensors() for part in parts]
        return Outputs(**{name: torch.cat([tensors[name] for tensors in found]) for name in found[0]},
                       scalars=parts[0].scalars)


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
