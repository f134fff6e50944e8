"""Contrastive losses: texts or images that belong together get similar embeddings, others get different ones.

Read `base.py` first. All losses use the cosine of pooled states. With z the states at length 1 and t the temperature:

    infonce   - mean over an anchor's positives p of  log e^(z_a z_p / t) / (e^(z_a z_p / t) + sum_n e^(z_a z_n / t)),
              n: the positives of other anchors, and all hard negatives                 count = anchors
    supcon    - mean over the other items p of i's class of  log e^(z_i z_p / t) / sum_{a != i} e^(z_i z_a / t)
                                                                                        count = items
    triplet   max(0, z_a z_n - z_a z_p + margin), n: the anchor's own hard negatives    count = triplets
    cosent    G log(1 + sum over i, j with score_i < score_j of e^((cos_i - cos_j) / t))    count = pairs of texts, G

The weight w of a row multiplies the loss of its anchor, item or triplets, and its count; as a negative the row counts
once. In cosent, w_i w_j multiplies a term of the sum, and G is the sum of the weights. So in triplet and cosent the
weight 2 equals the row given twice; in the others the two copies would be negatives of each other.

The rows of a batch interact, so the loss is always computed over the whole batch, however it is split. If two anchors
of a batch have the same positive text, each positive counts as a negative of the other anchor. `mask_duplicates`
removes such false negatives from infonce: (a, n) is removed if a and n are the same text, or if some row of the batch
has the text of n as a positive of the text of a. sentence-transformers avoids them with its no-duplicates batch
sampler. Two texts are the same if their tokens are, after truncation.

Shape letters: A items, D hidden size, N anchors, M others (positives and hard negatives), G groups, T triplets.
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
from luthier.core.labels import get_label_key, get_label_name, is_continuous
from luthier.core.protocols import Head
from luthier.core.types import Loss, LossInputs, Outputs
from luthier.objectives.base import (
    Metrics,
    ObjectiveConfig,
    build_group_table,
    count_correct_pairs,
    get_group_weights,
    get_item_weights,
    sum_and_count,
    upcast_to_float32,
)
from luthier.objectives.metrics import compute_pearson, compute_retrieval_metrics, compute_spearman

MAX_LOG_SCALE = math.log(100.0)  # CLIP's limit on the learned scale: a temperature of 0.01
SCALE = "log_scale"  # name of the scalar head of a learned temperature

# ---------------------------------------------------------------- the losses; `similar` is cosine / temperature


def infonce_loss(similar: Tensor, positive: Tensor, symmetric: bool, excluded: Tensor | None = None) -> Tensor:
    """InfoNCE of each anchor. Returns [N].

    van den Oord et al. 2018 (arXiv:1807.03748), eq. 4. The positives of one anchor share its weight and are not
    negatives of one another.

    Args:
        similar: [N, M].
        positive: [N, M] bool, each anchor's own positives.
        symmetric: the mean with the other direction, from a positive to its anchor among all anchors, as in CLIP
            (Radford et al. 2021, arXiv:2103.00020, fig. 3).
        excluded: [N, M] bool, pairs that are not negatives; see `find_false_negatives`.
    """
    anchor, other = positive.nonzero(as_tuple=True)  # [number of positives]
    right = similar[anchor, other]  # [number of positives]
    if excluded is not None:
        similar = similar.masked_fill(excluded & ~positive, -torch.inf)  # [N, M] e^-inf = 0 in the sum
    negatives = similar.masked_fill(positive, -torch.inf).logsumexp(1)  # [N]
    terms = F.softplus(negatives[anchor] - right)  # [number of positives]
    if symmetric:
        terms = (terms + similar.logsumexp(0)[other] - right) / 2
    return torch.zeros_like(similar[:, 0]).index_add(0, anchor, terms / positive.sum(1)[anchor])  # [N]


def find_false_negatives(anchors: Tensor, others: Tensor, positive: Tensor) -> Tensor:
    """[N, M] bool: whether an anchor and another text are the same text, or a positive pair in some row of the batch.

    Args:
        anchors, others: [N] and [M] text ids; equal texts have equal ids.
        positive: [N, M] bool, each anchor's own positives.
    """
    _, dense = torch.cat([anchors, others]).unique(return_inverse=True)  # [N + M] ids from 0
    left, right = dense[:anchors.shape[0]], dense[anchors.shape[0]:]  # [N], [M]
    pairs = left[:, None] * dense.shape[0] + right[None, :]  # [N, M] one id for each pair of texts
    return torch.isin(pairs, pairs[positive]) | (left[:, None] == right[None, :])


def supcon_loss(similar: Tensor, labels: Tensor) -> Tensor:
    """Supervised contrastive loss of each item, 0 for an item without another of its class. Returns [A].

    Khosla et al. 2020 (arXiv:2004.11362), eq. 2.

    Args:
        similar: [A, A].
        labels: [A].
    """
    itself = torch.eye(labels.shape[0], dtype=torch.bool, device=labels.device)  # [A, A]
    positive = (labels[:, None] == labels[None, :]) & ~itself  # [A, A]
    logps = similar - similar.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)  # [A, A]
    return -torch.where(positive, logps, 0).sum(1) / positive.sum(1).clamp(min=1)


def cosent_loss(similar: Tensor, scores: Tensor, weights: Tensor) -> Tensor:
    """Pairs with a higher score must have the larger cosine. Returns [].

    Su 2022 (CoSENT); Huang et al. 2024 (10.1109/TASLP.2024.3402087).

    Args:
        similar, scores, weights: [G].
    """
    log_weights = weights.to(similar.dtype).log()  # [G]
    differences = (similar + log_weights)[:, None] - (similar - log_weights)[None, :]  # [G, G]
    ordered = scores[:, None] < scores[None, :]  # [G, G]
    return F.softplus(differences.masked_fill(~ordered, -torch.inf).flatten().logsumexp(0))


class _ClampMax(torch.autograd.Function):
    """min(x, limit). At the limit gradients that lead back below it pass, so a learned scale can leave the limit."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.limit = limit
        return x.clamp(max=limit)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, = ctx.saved_tensors
        return torch.where(x < ctx.limit, grad, grad.clamp(min=0)), None


# ---------------------------------------------------------------- the objective


class ContrastiveConfig(ObjectiveConfig):
    """Contrastive losses on pooled states.

    Requires: `pooled` [A, D]; a learned temperature adds the scalar `log_scale`. Items: for infonce and triplet, the
    label 0 is an anchor, 1 its positives, 2 and above its hard negatives; for cosent the label is the similarity score
    of the two items of a group; for supcon the class.
    Metrics: `match_accuracy` (infonce: the most similar of all others was a positive; triplet: the positive was nearer
    than the negative), `temperature` if it is learned. On held-out rows: `mrr`, `recall_at_1`, `recall_at_5`,
    `recall_at_10`; for cosent `spearman` and `pearson` of the cosine.
    Raises: `DataError` if an example does not have the items that `loss` needs.

    Example:
        >>> target = LossInputs(torch.zeros(0), torch.zeros(0), torch.zeros(0), 2, labeled_segments=torch.arange(4),
        ...                 labels=torch.tensor([0.0, 1, 0, 1]), groups=torch.tensor([0, 0, 1, 1]))
        >>> states = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
        >>> loss = ContrastiveConfig(temperature=1.0)(Outputs(pooled=states), target)
        >>> round(float(loss.total), 4), float(loss.count)  # 2 log(1 + 1/e)
        (0.6265, 2.0)
    """

    example_types: ClassVar[frozenset[str]] = frozenset({"ContrastiveExample", "ClassificationExample", "ImageExample"})
    required_outputs: ClassVar[frozenset[str]] = frozenset({"pooled"})
    needs_full_batch: ClassVar[bool] = True
    has_eval_metrics: ClassVar[bool] = True

    name: Literal["contrastive"] = "contrastive"
    loss: Literal["infonce", "supcon", "cosent", "triplet"] = Field("infonce", description=(
        "infonce: rows of anchor, positive and hard negatives; supcon: rows with a class; cosent: pairs with a "
        "similarity score; triplet: anchor, positive, negative"))
    temperature: float = Field(0.05, ge=0.01, le=1, description="divides the cosines; initial value if it is learned")
    learn_temperature: bool = Field(False, description="train the temperature; it stays above 0.01")
    symmetric: bool = Field(False, description="infonce: also rank all anchors for each positive")
    mask_duplicates: bool = Field(False, description=(
        "infonce: remove false negatives found in the batch: equal texts, and positives of an equal anchor"))
    margin: float = Field(0.5, gt=0, le=2, description="triplet: how much larger the positive's cosine must be")

    labels: tuple[str, ...] = Field((), description="the classes, by index; omitted: the classes of the train rows")

    @field_validator("labels", mode="before")
    @classmethod
    def _normalize_labels(cls, raw: Any) -> Any:
        return [get_label_name(label) if isinstance(label, (str, int, float)) else label for label in raw] \
            if isinstance(raw, (list, tuple)) else raw

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        if len({get_label_key(label) for label in self.labels}) != len(self.labels):
            raise ValueError("a class appears twice (1, 1.0, '1' and true are the same class)")
        if self.loss == "triplet" and self.learn_temperature:
            raise ValueError("the triplet loss has no temperature: omit learn_temperature")
        return self

    @property
    def heads(self) -> tuple[Head, ...]:
        return (Head(SCALE, "scalar", start=-math.log(self.temperature)),) if self.learn_temperature else ()

    @property
    def classes(self) -> tuple[str, ...] | None:
        return self.labels if self.loss == "supcon" else None

    def with_labels(self, labels: tuple[str, ...], counts: Mapping[str, float] | None = None) -> Self:
        if self.loss != "supcon":
            return self
        if not self.labels and is_continuous(labels, sum(counts.values()) if counts else math.inf):
            raise RecipeError(f"the train rows have {len(labels)} different numbers for labels, such as {labels[0]} "
                              f"and {labels[-1]}: each would be a class of its own",
                              "give classes; for similarity scores of two texts use objective.loss: cosent")
        return self.model_copy(update={"labels": self.labels or labels})

    def count(self, target: LossInputs) -> float:
        if self.loss == "supcon":
            return float(get_item_weights(target).sum())
        if self.loss == "cosent":
            return float(get_group_weights(target, _build_pair_table(target)).sum())
        anchors, others = _find_anchors(target)
        positive, negative = _find_own_items(anchors, others, target)
        if self.loss == "triplet":
            triplets = positive.sum(1) * self._require_negatives(negative).sum(1)
            return float((get_item_weights(target)[anchors] * triplets).sum())
        return float(get_item_weights(target)[anchors].sum())

    def __call__(self, outputs: Outputs, target: LossInputs) -> Loss:
        states = self._normalize_states(outputs)  # [A, D]
        scale = self._compute_scale(outputs, states)  # []
        metrics: Metrics = {"temperature": (scale.detach().reciprocal(), 1.0)} if self.learn_temperature else {}
        if self.loss == "supcon":
            losses = supcon_loss(scale * _compute_products(states, states), target.labels)  # [A]
            return _sum_weighted(losses, get_item_weights(target), metrics)
        if self.loss == "cosent":
            cosines, scores = self._compute_pair_cosines(states, target)  # [G]
            weights = get_group_weights(target, _build_pair_table(target))  # [G]
            return Loss(weights.sum() * cosent_loss(scale * cosines, scores, weights), weights.sum(), metrics)
        anchors, others = _find_anchors(target)  # [N], [M]
        cosines = _compute_products(states[anchors], states[others])  # [N, M]
        positive, negative = _find_own_items(anchors, others, target)  # [N, M] bool
        if self.loss == "triplet":
            combinations = positive[:, :, None] & self._require_negatives(negative)[:, None, :]  # [N, M, M]
            group, near, far = combinations.nonzero(as_tuple=True)  # [T] each
            gaps = cosines[group, far] - cosines[group, near]  # [T]
            correct = count_correct_pairs(-gaps, torch.zeros_like(gaps))  # [T]
            return _sum_weighted(torch.relu(gaps + self.margin), get_item_weights(target)[anchors[group]],
                                 {**sum_and_count({"match_accuracy": correct}), **metrics})
        excluded = self._find_excluded(anchors, others, positive, target)  # [N, M] or None
        losses = infonce_loss(scale * cosines, positive, self.symmetric, excluded)  # [N]
        if excluded is not None:
            cosines = cosines.masked_fill(excluded & ~positive, -torch.inf)
        correct = positive[torch.arange(anchors.shape[0], device=anchors.device), cosines.argmax(1)]  # [N]
        return _sum_weighted(losses, get_item_weights(target)[anchors],
                             {**sum_and_count({"match_accuracy": correct}), **metrics})

    def compute_eval_metrics(self, outputs: Outputs, target: LossInputs) -> dict[str, float]:
        states = self._normalize_states(outputs)  # [A, D]
        if self.loss == "cosent":
            cosines, scores = self._compute_pair_cosines(states, target)  # [G] each
            return {"spearman": compute_spearman(cosines, scores), "pearson": compute_pearson(cosines, scores)}
        if self.loss == "supcon":
            same = target.labels[:, None] == target.labels[None, :]  # [A, A]
            others = ~torch.eye(same.shape[0], dtype=torch.bool, device=same.device)  # [A, A]
            return compute_retrieval_metrics(_compute_products(states, states), same, others)
        anchors, others = _find_anchors(target)
        positive, _ = _find_own_items(anchors, others, target)
        excluded = self._find_excluded(anchors, others, positive, target)
        candidate = torch.ones_like(positive) if excluded is None else positive | ~excluded  # [N, M]
        return compute_retrieval_metrics(_compute_products(states[anchors], states[others]), positive, candidate)

    def _find_excluded(self, anchors: Tensor, others: Tensor, positive: Tensor, target: LossInputs) -> Tensor | None:
        """[N, M] from `find_false_negatives`; None without `mask_duplicates`."""
        if not self.mask_duplicates or self.loss != "infonce":
            return None
        if target.text_ids.shape != target.labels.shape:
            raise DataError("contrastive: mask_duplicates compares texts, and these rows have none",
                            "omit objective.mask_duplicates")
        return find_false_negatives(target.text_ids[anchors], target.text_ids[others], positive)

    def _normalize_states(self, outputs: Outputs) -> Tensor:
        assert outputs.pooled is not None
        return F.normalize(upcast_to_float32(outputs.pooled), dim=-1)  # [A, D]

    def _compute_scale(self, outputs: Outputs, states: Tensor) -> Tensor:
        """One over the temperature."""
        if self.learn_temperature:
            return torch.exp(_ClampMax.apply(outputs.scalars[SCALE], MAX_LOG_SCALE))
        return states.new_tensor(1 / self.temperature)

    def _compute_pair_cosines(self, states: Tensor, target: LossInputs) -> tuple[Tensor, Tensor]:
        """[G] cosine of the two items of each group, and [G] their similarity score."""
        table = _build_pair_table(target)  # [G, 2]
        return (states[table[:, 0]] * states[table[:, 1]]).sum(-1), target.labels[table[:, 0]]

    def _require_negatives(self, negative: Tensor) -> Tensor:
        if not bool(negative.any(1).all()):
            raise DataError("contrastive (loss: triplet): an example has no hard negative",
                            "give anchor, positive and negative in every row, or use loss: infonce")
        return negative


def _sum_weighted(losses: Tensor, weights: Tensor, metrics: Metrics) -> Loss:
    return Loss((weights.to(losses.dtype) * losses).sum(), weights.sum(), metrics)


def _compute_products(a: Tensor, b: Tensor) -> Tensor:
    """[N, M] of [N, D] and [M, D], in full precision: after division by the temperature, 16 bits are too coarse."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b.T


def _build_pair_table(target: LossInputs) -> Tensor:
    """[G, 2] the items of each group. Raises `DataError` if a group does not have two."""
    table = build_group_table(target)  # [G, K]
    if table.shape[1] != 2 or bool((table < 0).any()):
        raise DataError("contrastive (loss: cosent): an example does not have two texts",
                        "give two texts and their similarity score in every row")
    return table


def _find_anchors(target: LossInputs) -> tuple[Tensor, Tensor]:
    """[N] the anchors, [M] positives and hard negatives. Raises `DataError` if a group does not have both."""
    anchor, positive = target.labels == 0, target.labels == 1  # [A]
    numbers = torch.zeros(target.num_examples, 3, device=target.groups.device)  # of anchors, positives, items
    numbers.index_add_(0, target.groups, torch.stack([anchor, positive, torch.ones_like(anchor)], 1).to(numbers.dtype))
    if bool(((numbers[:, 2] > 0) & ((numbers[:, 0] != 1) | (numbers[:, 1] < 1))).any()):
        raise DataError("contrastive: an example does not have one anchor and at least one positive",
                        "give two texts that belong together in every row; for rows with a class use loss: supcon")
    return anchor.nonzero()[:, 0], (~anchor).nonzero()[:, 0]


def _find_own_items(anchors: Tensor, others: Tensor, target: LossInputs) -> tuple[Tensor, Tensor]:
    """[N, M] bool: an anchor's own positives, and its own hard negatives."""
    own = target.groups[anchors][:, None] == target.groups[others][None, :]  # [N, M]
    positive = (target.labels[others] == 1)[None, :]  # [1, M]
    return own & positive, own & ~positive
