"""Classes, flags or a number for a text or a picture, and tags for words. Read `cross_entropy.py` and `base.py` first.

With scores s of an item (or of a tagged token), its label y, its row's weight w, and a weight u_c for each class, 1
where none is given:

    single       - sum_i w_i u_(y_i) log softmax(s_i)_(y_i)                            count = sum_i w_i u_(y_i)
    multi        - sum_(i,c) w_i u_c (y_ic log sigmoid(s_ic) + (1 - y_ic) log sigmoid(-s_ic))  count = sum_(i,c) w_i u_c
    regression   sum_i w_i (s_i - y_i)^2                                               count = sum_i w_i
    tokens       as single, over the tokens that carry a tag, w the token's own

A label may be a mixture: flags and numbers between, and of a single class a share q_c of each, so that u_y log p_y
becomes sum_c q_c u_c log p_c, and u_y in the count sum_c q_c u_c. Accuracy is then against the class of the greatest
share.

Balanced weights are u_c = n / (C n_c), for n training labels, n_c of them of class c out of C, each as often as its row
counts (scikit-learn's `balanced`, after King and Zeng 2001, "Logistic regression in rare events data"): every class
then has the same share of the count.

Shape letters: A items, P predictions, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from luthier.core.errors import DataError, RecipeError, nearest
from luthier.core.labels import is_continuous, label_key, label_name
from luthier.core.protocols import Head
from luthier.core.types import Loss, Outputs, Target
from luthier.objectives import metrics
from luthier.objectives.base import ObjectiveConfig, item_weights, sums, wide

TASKS: Mapping[str, Any] = {"single": "single_label_classification", "multi": "multi_label_classification",
                            "regression": "regression", "tokens": "token_classification"}  # Transformers' names
SHAPES = {"single": "one label each", "multi": "a list of labels each", "tokens": "a tag for each word"}


class ClassifyConfig(ObjectiveConfig):
    """Classification and regression, the losses of Transformers' models for it.

    Requires: `scores` [A, C] of the head `score`, or for tags `token_scores` [P, C].
    Metrics: `accuracy`, for a regression `squared_error`. Of held-out rows: `f1_macro`, `f1_micro`, `mcc` and the
    confusion matrix (`confusion_i_j`: how often class i was taken for class j); for a regression `pearson`, `spearman`.
    Raises: `DataError` where the rows' labels are not what `task` is about.

    Example:
        >>> target = Target(torch.zeros(0), torch.zeros(0), torch.zeros(0), 1, items=torch.tensor([0]),
        ...                 labels=torch.tensor([1.0]))
        >>> made = ClassifyConfig(labels=("bad", "good"), class_weights={"good": 3.0})
        >>> loss = made(Outputs(scores=torch.tensor([[0.0, 0.0]])), target)
        >>> round(float(loss.total), 4), float(loss.count)  # 3 log 2
        (2.0794, 3.0)
    """

    name: Literal["classify"] = "classify"
    example_types: ClassVar[frozenset[str]] = frozenset({"LabelledExample", "TaggedExample", "ImageExample"})
    has_eval_metrics: ClassVar[bool] = True

    @property
    def supports_soft_labels(self) -> bool:  # type: ignore[override]
        return self.task != "tokens"

    task: Literal["single", "multi", "regression", "tokens"] = Field("single", description=(
        "what a label is: one class, any number of classes, a number, or a class for each word"))
    labels: tuple[str, ...] = Field((), description="the classes by their numbers; left out: those in the train rows")
    class_weights: Mapping[str, float] | Literal["balanced"] = Field(default_factory=dict, description=(
        "class: how much its examples count; 1 for those not named. balanced: from the train rows, so that every class "
        "has the same share; the run's recipe holds the numbers"))

    @field_validator("labels", mode="before")
    @classmethod
    def _names(cls, raw: Any) -> Any:
        return [label_name(one) if isinstance(one, (str, int, float)) else one for one in raw] \
            if isinstance(raw, (list, tuple)) else raw

    @field_validator("class_weights", mode="before")
    @classmethod
    def _weighted_names(cls, raw: Any) -> Any:
        return {label_name(label): weight for label, weight in raw.items()} if isinstance(raw, Mapping) else raw

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len({label_key(label) for label in self.labels}) != len(self.labels):
            raise ValueError("a class is named once (1, 1.0, '1' and true are one)")
        if self.task == "regression" and (self.labels or self.class_weights):
            raise ValueError("a regression has no classes: leave out labels and class_weights")
        if any(weight <= 0 for weight in self._given.values()):
            raise ValueError("class_weights lie above 0")
        return self

    @property
    def _given(self) -> Mapping[str, float]:
        return {} if isinstance(self.class_weights, str) else self.class_weights

    @property
    def required_outputs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"token_scores" if self.task == "tokens" else "scores"})

    @property
    def heads(self) -> tuple[Head, ...]:
        width = 1 if self.task == "regression" else len(self.labels)
        if not width:
            raise RecipeError("objective.labels: nothing says which classes there are",
                              "train on rows that have labels, or name the classes in objective.labels")
        return (Head("score", "token" if self.task == "tokens" else "item", width, task=TASKS[self.task],
                     labels=self.labels),)

    @property
    def classes(self) -> tuple[str, ...] | None:
        return None if self.task == "regression" else self.labels

    def with_labels(self, labels: tuple[str, ...], counts: Mapping[str, float] | None = None) -> Self:
        """With the classes of the train rows where the recipe names none, and their weights where these are to balance
        them. Raises `RecipeError` if they do not fit."""
        if self.task == "regression":
            return self
        names = self.labels or labels
        if strange := [name for name in labels if name not in names]:
            raise RecipeError(f"the train rows have the class {strange[0]!r}, which objective.labels does not name: "
                              f"{nearest(strange[0], names)}", "name every class, or leave objective.labels out")
        if strange := [name for name in self._given if label_key(name) not in map(label_key, names)]:
            raise RecipeError(f"objective.class_weights names {strange[0]!r}, which is no class: "
                              f"{nearest(strange[0], names)}", "name classes of the train rows")
        if not self.labels and is_continuous(labels, sum(counts.values()) if counts else math.inf):
            raise RecipeError(f"the train rows have {len(labels)} different numbers for labels, such as {labels[0]} "
                              f"and {labels[-1]}: each would be a class of its own",
                              "to predict the number, set objective.task to regression; where each number is a class, "
                              "name them all in objective.labels")
        if len(names) < (1 if self.task == "multi" else 2):
            raise RecipeError(f"the train rows have {len(names)} class: {', '.join(names)}",
                              "there is nothing to tell apart; give rows of at least two classes")
        weights = balanced(names, counts or {}) if self.class_weights == "balanced" else self.class_weights
        return self.model_copy(update={"labels": names, "class_weights": weights})

    def count(self, target: Target) -> float:
        return float(self._counts(target).sum())

    def __call__(self, outputs: Outputs, target: Target) -> Loss:
        counts = self._counts(target)
        scores = self._scores(outputs)
        if self.task == "regression":
            errors = (scores[:, 0] - target.labels.to(scores.dtype)).square()
            return Loss((counts.to(scores.dtype) * errors).sum(), counts.sum(), sums(squared_error=errors))
        if self.task == "multi":
            each = F.binary_cross_entropy_with_logits(scores, target.labels.to(scores.dtype), reduction="none")
            right = ((scores > 0) == (target.labels > 0.5)).all(-1)
        elif target.shares.shape[0]:
            shares, weights = target.shares.to(scores.dtype), self._weights(target).to(scores.dtype)
            each = F.cross_entropy(scores, shares, weights, reduction="none")
            right = scores.argmax(-1) == self._truth(target)
            return Loss((item_weights(target).to(scores.dtype) * each).sum(), counts.sum(), sums(accuracy=right))
        else:
            truth = self._truth(target)
            each, right = F.cross_entropy(scores, truth, reduction="none"), scores.argmax(-1) == truth
        return Loss((counts.to(scores.dtype) * each).sum(), counts.sum(), sums(accuracy=right))

    def compute_eval_metrics(self, outputs: Outputs, target: Target) -> dict[str, float]:
        scores = self._scores(outputs)
        if not scores.shape[0]:
            return {}
        if self.task == "regression":
            found, truth = scores[:, 0], target.labels
            return {"pearson": metrics.pearson(found, truth), "spearman": metrics.spearman(found, truth)}
        if self.task == "multi":
            flags, wanted = scores > 0, target.labels > 0
            macro, micro = metrics.f1((flags & wanted).sum(0), wanted.sum(0), flags.sum(0))
            return {"f1_macro": macro, "f1_micro": micro}
        matrix = metrics.confusion(self._truth(target), scores.argmax(-1), scores.shape[1])
        macro, micro = metrics.f1(matrix.diagonal(), matrix.sum(1), matrix.sum(0))
        cells = {f"confusion_{i}_{j}": float(matrix[i, j]) for i, j in matrix.nonzero().tolist()}
        return {"f1_macro": macro, "f1_micro": micro, "mcc": metrics.mcc(matrix), **cells}

    def _scores(self, outputs: Outputs) -> Tensor:
        scores = outputs.token_scores if self.task == "tokens" else outputs.scores
        assert scores is not None
        return wide(scores)

    def _truth(self, target: Target) -> Tensor:
        """[A] or [P] class numbers."""
        truth = target.tokens if self.task == "tokens" else target.labels.long()
        assert bool(((truth >= 0) & (truth < len(self.labels))).all()), "a class that no train row has: data refuses it"
        return truth

    def _counts(self, target: Target) -> Tensor:
        """[A], [A, C] or [P] how much each label counts. Raises `DataError` where the labels are not the task's."""
        found = "tokens" if not target.labels.shape[0] else "multi" if target.labels.dim() == 2 else "single"
        wanted = "single" if self.task == "regression" else self.task
        if found != wanted:
            raise DataError(f"objective.task is {self.task}, and the rows have {SHAPES[found]}",
                            f"set objective.task to {found}, or give rows with {SHAPES[wanted]}")
        if self.task == "regression":
            return item_weights(target)
        assert self.class_weights != "balanced", "`with_labels` puts the numbers in"
        weights = self._weights(target)
        if target.shares.shape[0]:
            return target.shares @ weights * item_weights(target)
        if self.task == "multi":
            assert target.labels.shape[1:] == weights.shape, "one flag for each class"
            return weights * item_weights(target)[:, None]
        return weights[self._truth(target)] * (target.weights if self.task == "tokens" else item_weights(target))

    def _weights(self, target: Target) -> Tensor:
        """[C] u."""
        given = {label_key(name): weight for name, weight in self._given.items()}
        return torch.tensor([given.get(label_key(name), 1.0) for name in self.labels], device=target.weights.device)


def balanced(names: tuple[str, ...], counts: Mapping[str, float]) -> dict[str, float]:
    """n / (C n_c) for each class. Raises `RecipeError` where a class has no training row."""
    if missing := [name for name in names if not counts.get(name)]:
        raise RecipeError(f"objective.class_weights: balanced, and no train row has the class {missing[0]!r}",
                          "leave it out of objective.labels, do not stream, or give numbers for class_weights")
    total = sum(counts[name] for name in names)
    return {name: total / (len(names) * counts[name]) for name in names}
