"""Texts or pictures that belong together come close, others apart. Read `base.py` first.

All of it is of the cosine between pooled states. With z the states at length 1 and t the temperature:

    pairs     - mean over an anchor's positives p of  log e^(z_a z_p / t) / (e^(z_a z_p / t) + sum_n e^(z_a z_n / t)),
              n: other anchors' positives and everybody's hard negatives (InfoNCE)      count = anchors
    labels    - mean over the other items p of i's class of  log e^(z_i z_p / t) / sum_{a != i} e^(z_i z_a / t)
                                                                                        count = items
    triplet   max(0, z_a z_n - z_a z_p + margin), n: the anchor's own hard negatives    count = triplets
    scores    G log(1 + sum over i, j with score_i < score_j of e^((cos_i - cos_j) / t))    count = pairs of texts, G

A row's weight w multiplies the loss of its anchor, item or triplets, and counts it w times; among negatives it stands
once. Of scores, w_i w_j multiplies a term of the sum, and G is the sum of the weights. So for triplets and scores 2 is
as good as the row twice; elsewhere a row's twin would be a negative of the other.

Rows meet in the loss, so it is always of the whole batch, however that is cut. Where two anchors of a batch have the
same positive text, each counts as a negative of the other, unless `mask_duplicates` leaves out of `pairs` each negative
that is known to be none: (a, n) is left out where a and n are the same text, or where some row of the batch has the
text of n as a positive of the text of a. It is what sentence-transformers' no-duplicates batch sampler avoids, without
a sampler. What is the same text is decided by the tokens, after truncation.

Shape letters: A items, D hidden size, N anchors, M others (positives and hard negatives), G groups.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from luthier.core.errors import DataError, RecipeError
from luthier.core.labels import is_continuous, label_key, label_name
from luthier.core.protocols import Head
from luthier.core.types import Loss, Outputs, Target
from luthier.objectives import metrics as measures
from luthier.objectives.base import (
    Metrics,
    ObjectiveConfig,
    count_correct_pairs,
    group_weights,
    grouped,
    item_weights,
    sums,
    wide,
)

HOTTEST = math.log(100.0)  # CLIP's limit on the learned scale: a temperature of 0.01
SCALE = "log_scale"

# ---------------------------------------------------------------- the formulas; `similar` is cosine / temperature


def info_nce(similar: Tensor, positive: Tensor, both: bool, known: Tensor | None = None) -> Tensor:
    """[N] InfoNCE of each anchor. van den Oord et al. 2018 (arXiv:1807.03748), eq. 4; `both`: the mean with the other
    direction, from a positive to its anchor among all, as in CLIP (Radford et al. 2021, arXiv:2103.00020, fig. 3).
    Several positives of one anchor share its weight and are no negatives of one another. `known`: pairs that are no
    negatives either, see `known_pairs`. All of them: [N, M]."""
    anchor, other = positive.nonzero(as_tuple=True)
    right = similar[anchor, other]
    if known is not None:
        similar = similar.masked_fill(known & ~positive, -torch.inf)
    negatives = similar.masked_fill(positive, -torch.inf).logsumexp(1)
    terms = F.softplus(negatives[anchor] - right)
    if both:
        terms = (terms + similar.logsumexp(0)[other] - right) / 2
    return torch.zeros_like(similar[:, 0]).index_add(0, anchor, terms / positive.sum(1)[anchor])


def known_pairs(anchors: Tensor, others: Tensor, positive: Tensor) -> Tensor:
    """[N, M] flags: the two texts are the same, or belong together in some row. Of the texts' numbers [N] and [M]
    (equal texts, equal numbers) and each anchor's own positives [N, M]."""
    _, dense = torch.cat([anchors, others]).unique(return_inverse=True)
    left, right = dense[:anchors.shape[0]], dense[anchors.shape[0]:]
    pairs = left[:, None] * dense.shape[0] + right[None, :]
    return torch.isin(pairs, pairs[positive]) | (left[:, None] == right[None, :])


def supervised(similar: Tensor, labels: Tensor) -> Tensor:
    """[A] Khosla et al. 2020 (arXiv:2004.11362), eq. 2; 0 for the only one of its class. [A, A] and [A]."""
    itself = torch.eye(labels.shape[0], dtype=torch.bool, device=labels.device)
    positive = (labels[:, None] == labels[None, :]) & ~itself
    logps = similar - similar.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    return -torch.where(positive, logps, 0).sum(1) / positive.sum(1).clamp(min=1)


def cosent(similar: Tensor, scores: Tensor, weights: Tensor) -> Tensor:
    """[] that pairs which are more alike have the larger cosine. Su 2022 (CoSENT); Huang et al. 2024
    (10.1109/TASLP.2024.3402087). `similar`, `scores`, `weights`: [G]."""
    rare = weights.to(similar.dtype).log()
    wrong = (similar + rare)[:, None] - (similar - rare)[None, :]
    ordered = scores[:, None] < scores[None, :]
    return F.softplus(wrong.masked_fill(~ordered, -torch.inf).flatten().logsumexp(0))


class _Bounded(torch.autograd.Function):
    """min(x, most), whose gradient may still lead back from the limit, so that a learned scale is never stuck there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, most: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.most = most
        return x.clamp(max=most)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, = ctx.saved_tensors
        return torch.where(x < ctx.most, grad, grad.clamp(min=0)), None


# ---------------------------------------------------------------- the objective


class ContrastiveConfig(ObjectiveConfig):
    """Contrastive tuning.

    Requires: `pooled` [A, D]; a learned temperature adds the scalar `log_scale`. Items: for pairs and triplets, label 0
    is an anchor, 1 its positives, 2 and more its hard negatives; for scores, the label is how alike the two items of a
    group are; for labels, the class.
    Metrics: `match_accuracy` (pairs: the most similar of all was a positive; triplet: the positive was nearer than the
    negative), `temperature` where it is learned. Of held-out rows: `mrr`, `recall_at_1`, `recall_at_5`, `recall_at_10`;
    for scores `spearman` and `pearson` of the cosine.
    Raises: `DataError` where an example has not the items that `kind` is about.

    Example:
        >>> target = Target(torch.zeros(0), torch.zeros(0), torch.zeros(0), 2, items=torch.arange(4),
        ...                 labels=torch.tensor([0.0, 1, 0, 1]), groups=torch.tensor([0, 0, 1, 1]))
        >>> states = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
        >>> loss = ContrastiveConfig(temperature=1.0)(Outputs(pooled=states), target)
        >>> round(float(loss.total), 4), float(loss.count)  # 2 log(1 + 1/e)
        (0.6265, 2.0)
    """

    name: Literal["contrastive"] = "contrastive"
    example_types: ClassVar[frozenset[str]] = frozenset({"TextsExample", "LabelledExample", "ImageExample"})
    required_outputs: ClassVar[frozenset[str]] = frozenset({"pooled"})
    needs_full_batch: ClassVar[bool] = True
    has_eval_metrics: ClassVar[bool] = True

    kind: Literal["pairs", "labels", "scores", "triplet"] = Field("pairs", description=(
        "what the rows say: anchor, positive, negatives; a class; how alike two texts are; anchor, positive, negative"))
    temperature: float = Field(0.05, ge=0.01, le=1, description="divides the cosines; its start where it is learned")
    learned: bool = Field(False, description="whether the temperature trains; it stays above 0.01")
    both: bool = Field(False, description="pairs: whether a positive is to find its anchor, too")
    mask_duplicates: bool = Field(False, description=(
        "pairs: leave out the negatives that the batch shows to be none: equal texts, positives of an equal anchor"))
    margin: float = Field(0.5, gt=0, le=2, description="triplet: by how much the positive's cosine is to be larger")

    labels: tuple[str, ...] = Field((), description="the classes by their numbers; left out: those in the train rows")

    @field_validator("labels", mode="before")
    @classmethod
    def _names(cls, raw: Any) -> Any:
        return [label_name(one) if isinstance(one, (str, int, float)) else one for one in raw] \
            if isinstance(raw, (list, tuple)) else raw

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len({label_key(label) for label in self.labels}) != len(self.labels):
            raise ValueError("a class is named once (1, 1.0, '1' and true are one)")
        if self.kind == "triplet" and self.learned:
            raise ValueError("a triplet has no temperature to learn: leave out learned")
        return self

    @property
    def heads(self) -> tuple[Head, ...]:
        return (Head(SCALE, "scalar", start=-math.log(self.temperature)),) if self.learned else ()

    @property
    def classes(self) -> tuple[str, ...] | None:
        return self.labels if self.kind == "labels" else None

    def with_labels(self, labels: tuple[str, ...], counts: Mapping[str, float] | None = None) -> Self:
        if self.kind != "labels":
            return self
        if not self.labels and is_continuous(labels, sum(counts.values()) if counts else math.inf):
            raise RecipeError(f"the train rows have {len(labels)} different numbers for labels, such as {labels[0]} "
                              f"and {labels[-1]}: each would be a class of its own",
                              "give classes; or how alike two texts are, with objective.kind: scores")
        return self.model_copy(update={"labels": self.labels or labels})

    def count(self, target: Target) -> float:
        if self.kind == "labels":
            return float(item_weights(target).sum())
        if self.kind == "scores":
            return float(group_weights(target, _two(target)).sum())
        anchors, others = _roles(target)
        positive, negative = _own(anchors, others, target)
        if self.kind == "triplet":
            triplets = positive.sum(1) * self._hard(negative).sum(1)
            return float((item_weights(target)[anchors] * triplets).sum())
        return float(item_weights(target)[anchors].sum())

    def __call__(self, outputs: Outputs, target: Target) -> Loss:
        states = self._states(outputs)
        scale = self._scale(outputs, states)
        metrics: Metrics = {"temperature": (scale.detach().reciprocal(), 1.0)} if self.learned else {}
        if self.kind == "labels":
            each = supervised(scale * _products(states, states), target.labels)
            return _weighted(each, item_weights(target), metrics)
        if self.kind == "scores":
            cosines, scores = self._cosines(states, target)
            weights = group_weights(target, _two(target))
            return Loss(weights.sum() * cosent(scale * cosines, scores, weights), weights.sum(), metrics)
        anchors, others = _roles(target)
        cosines = _products(states[anchors], states[others])
        positive, negative = _own(anchors, others, target)
        if self.kind == "triplet":
            group, near, far = (positive[:, :, None] & self._hard(negative)[:, None, :]).nonzero(as_tuple=True)
            gaps = cosines[group, far] - cosines[group, near]
            return _weighted(torch.relu(gaps + self.margin), item_weights(target)[anchors[group]],
                             {**sums(match_accuracy=count_correct_pairs(-gaps, torch.zeros_like(gaps))), **metrics})
        known = self._known(anchors, others, positive, target)
        each = info_nce(scale * cosines, positive, self.both, known)
        if known is not None:
            cosines = cosines.masked_fill(known & ~positive, -torch.inf)
        best = positive[torch.arange(anchors.shape[0], device=anchors.device), cosines.argmax(1)]
        return _weighted(each, item_weights(target)[anchors], {**sums(match_accuracy=best), **metrics})

    def compute_eval_metrics(self, outputs: Outputs, target: Target) -> dict[str, float]:
        states = self._states(outputs)
        if self.kind == "scores":
            cosines, scores = self._cosines(states, target)
            return {"spearman": measures.spearman(cosines, scores), "pearson": measures.pearson(cosines, scores)}
        if self.kind == "labels":
            same = target.labels[:, None] == target.labels[None, :]
            others = ~torch.eye(same.shape[0], dtype=torch.bool, device=same.device)
            return measures.retrieval(_products(states, states), same, others)
        anchors, others = _roles(target)
        positive, _ = _own(anchors, others, target)
        known = self._known(anchors, others, positive, target)
        candidate = torch.ones_like(positive) if known is None else positive | ~known
        return measures.retrieval(_products(states[anchors], states[others]), positive, candidate)

    def _known(self, anchors: Tensor, others: Tensor, positive: Tensor, target: Target) -> Tensor | None:
        """[N, M] see `known_pairs`; None where duplicates count."""
        if not self.mask_duplicates or self.kind != "pairs":
            return None
        if target.text_ids.shape != target.labels.shape:
            raise DataError("contrastive: mask_duplicates compares texts, and these rows have none",
                            "leave objective.mask_duplicates out")
        return known_pairs(target.text_ids[anchors], target.text_ids[others], positive)

    def _states(self, outputs: Outputs) -> Tensor:
        assert outputs.pooled is not None
        return F.normalize(wide(outputs.pooled), dim=-1)

    def _scale(self, outputs: Outputs, states: Tensor) -> Tensor:
        """One over the temperature."""
        if self.learned:
            return torch.exp(_Bounded.apply(outputs.scalars[SCALE], HOTTEST))
        return states.new_tensor(1 / self.temperature)

    def _cosines(self, states: Tensor, target: Target) -> tuple[Tensor, Tensor]:
        """[G] cosine of each group's two items, and how alike they are."""
        table = _two(target)
        return (states[table[:, 0]] * states[table[:, 1]]).sum(-1), target.labels[table[:, 0]]

    def _hard(self, negative: Tensor) -> Tensor:
        if not bool(negative.any(1).all()):
            raise DataError("contrastive (kind: triplet): an example has no hard negative",
                            "give anchor, positive and negative in every row, or use kind: pairs")
        return negative


def _weighted(each: Tensor, weights: Tensor, metrics: Metrics) -> Loss:
    return Loss((weights.to(each.dtype) * each).sum(), weights.sum(), metrics)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """[N, M] of [N, D] and [M, D], in full precision: divided by the temperature, sixteen bits would be too coarse."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b.T


def _two(target: Target) -> Tensor:
    """[G, 2] the items of each group."""
    table = grouped(target)
    if table.shape[1] != 2 or bool((table < 0).any()):
        raise DataError("contrastive (kind: scores): an example has not two texts",
                        "give two texts and how alike they are in every row")
    return table


def _roles(target: Target) -> tuple[Tensor, Tensor]:
    """[N] the anchors, [M] positives and hard negatives. Raises `DataError` where a group has not both."""
    anchor, positive = target.labels == 0, target.labels == 1
    each = torch.zeros(target.examples, 3, device=target.groups.device)
    each.index_add_(0, target.groups, torch.stack([anchor, positive, torch.ones_like(anchor)], 1).to(each.dtype))
    if bool(((each[:, 2] > 0) & ((each[:, 0] != 1) | (each[:, 1] < 1))).any()):
        raise DataError("contrastive: an example has not one anchor and at least one positive",
                        "give two texts that belong together in every row; for rows with a class use kind: labels")
    return anchor.nonzero()[:, 0], (~anchor).nonzero()[:, 0]


def _own(anchors: Tensor, others: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """[N, M] flags: an anchor's own positives, its own hard negatives."""
    own = target.groups[anchors][:, None] == target.groups[others][None, :]
    positive = (target.labels[others] == 1)[None, :]
    return own & positive, own & ~positive
