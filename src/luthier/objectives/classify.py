"""Classification and regression of texts and images, and token classification.

Read `cross_entropy.py` and `base.py` first. With scores s of an item (or of a tagged token), its label y, the weight w
of its row, and a weight u_c for each class, 1 if not given:

    single       - sum_i w_i u_(y_i) log softmax(s_i)_(y_i)                            count = sum_i w_i u_(y_i)
    multi        - sum_(i,c) w_i u_c (y_ic log sigmoid(s_ic) + (1 - y_ic) log sigmoid(-s_ic))  count = sum_(i,c) w_i u_c
    regression   sum_i w_i (s_i - y_i)^2                                               count = sum_i w_i
    tokens       as single, over the tokens that have a tag, w the weight of the token

Labels may be soft (mixup): flags and numbers between two labels, or for a single class a probability q_c of each. Then
u_y log p_y becomes sum_c q_c u_c log p_c, and u_y in the count becomes sum_c q_c u_c. Accuracy compares with the class
of the largest probability.

Balanced weights are u_c = n / (C n_c), for n training labels of which n_c have class c, each counted with the weight of
its row. Every class then has the same share of the count. This is scikit-learn's `balanced`, after King and Zeng 2001,
"Logistic regression in rare events data".

Shape letters: A items, P predicted tokens, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from luthier.core.errors import DataError, RecipeError, suggest_nearest
from luthier.core.labels import get_label_key, get_label_name, is_continuous
from luthier.core.protocols import Head
from luthier.core.types import Loss, LossInputs, Outputs
from luthier.objectives import metrics
from luthier.objectives.base import ObjectiveConfig, get_item_weights, sum_and_count, upcast_to_float32

PROBLEM_TYPES: Mapping[str, Any] = {"single": "single_label_classification", "multi": "multi_label_classification",
                                    "regression": "regression", "tokens": "token_classification"}  # Transformers' names
LABEL_FORMS = {"single": "one label each", "multi": "a list of labels each", "tokens": "a tag for each word"}


class ClassifyConfig(ObjectiveConfig):
    """Classification and regression, with the losses of the corresponding Transformers models.

    Requires: `scores` [A, C] of the head `score`, or for tags `token_scores` [P, C].
    Metrics: `accuracy`, for a regression `squared_error`. On held-out rows: `f1_macro`, `f1_micro`, `mcc` and the
    confusion matrix (`confusion_i_j`: how often class i was predicted as class j); for a regression `pearson`,
    `spearman`.
    Raises: `DataError` if the labels of the rows do not fit `task`.

    Example:
        >>> target = LossInputs(torch.zeros(0), torch.zeros(0), torch.zeros(0), 1, labeled_segments=torch.tensor([0]),
        ...                 labels=torch.tensor([1.0]))
        >>> objective = ClassifyConfig(labels=("bad", "good"), class_weights={"good": 3.0})
        >>> loss = objective(Outputs(scores=torch.tensor([[0.0, 0.0]])), target)
        >>> round(float(loss.total), 4), float(loss.count)  # 3 log 2
        (2.0794, 3.0)
    """

    name: Literal["classify"] = "classify"
    example_types: ClassVar[frozenset[str]] = frozenset({"ClassificationExample", "TokenClassificationExample",
                                                    "ImageExample"})
    has_eval_metrics: ClassVar[bool] = True

    @property
    def supports_soft_labels(self) -> bool:  # type: ignore[override]
        return self.task != "tokens"

    task: Literal["single", "multi", "regression", "tokens"] = Field("single", description=(
        "a label is one class, any number of classes, a number, or a class for each word"))
    labels: tuple[str, ...] = Field((), description="the classes, by index; omitted: the classes of the train rows")
    class_weights: Mapping[str, float] | Literal["balanced"] = Field(default_factory=dict, description=(
        "class: loss weight of its examples; 1 for classes not named. balanced: computed from the train rows, so that "
        "every class has the same share; the recipe in the run folder has the numbers"))

    @field_validator("labels", mode="before")
    @classmethod
    def _normalize_labels(cls, raw: Any) -> Any:
        return [get_label_name(one) if isinstance(one, (str, int, float)) else one for one in raw] \
            if isinstance(raw, (list, tuple)) else raw

    @field_validator("class_weights", mode="before")
    @classmethod
    def _normalize_class_names(cls, raw: Any) -> Any:
        return {get_label_name(label): weight for label, weight in raw.items()} if isinstance(raw, Mapping) else raw

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        if len({get_label_key(label) for label in self.labels}) != len(self.labels):
            raise ValueError("a class appears twice (1, 1.0, '1' and true are the same class)")
        if self.task == "regression" and (self.labels or self.class_weights):
            raise ValueError("a regression has no classes: omit labels and class_weights")
        if any(weight <= 0 for weight in self._explicit_weights.values()):
            raise ValueError("class_weights must be above 0")
        return self

    @property
    def _explicit_weights(self) -> Mapping[str, float]:
        return {} if isinstance(self.class_weights, str) else self.class_weights

    @property
    def required_outputs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"token_scores" if self.task == "tokens" else "scores"})

    @property
    def heads(self) -> tuple[Head, ...]:
        width = 1 if self.task == "regression" else len(self.labels)
        if not width:
            raise RecipeError("objective.labels is empty, and there are no training rows to take the classes from",
                              "train on rows that have labels, or list the classes in objective.labels")
        return (Head("score", "token" if self.task == "tokens" else "item", width, task=PROBLEM_TYPES[self.task],
                     labels=self.labels),)

    @property
    def classes(self) -> tuple[str, ...] | None:
        return None if self.task == "regression" else self.labels

    def with_labels(self, labels: tuple[str, ...], counts: Mapping[str, float] | None = None) -> Self:
        """A copy with the classes of the train rows if the recipe lists none, and with balanced weights as numbers.

        Raises:
            RecipeError: if the classes of the rows and of the recipe do not fit.
        """
        if self.task == "regression":
            return self
        names = self.labels or labels
        if unknown := [name for name in labels if name not in names]:
            raise RecipeError(f"the train rows have the class {unknown[0]!r}, which is not in objective.labels: "
                              f"{suggest_nearest(unknown[0], names)}", "list every class, or omit objective.labels")
        if unknown := [name for name in self._explicit_weights if get_label_key(name) not in map(get_label_key, names)]:
            raise RecipeError(f"objective.class_weights names {unknown[0]!r}, which is not a class: "
                              f"{suggest_nearest(unknown[0], names)}", "name classes of the train rows")
        if not self.labels and is_continuous(labels, sum(counts.values()) if counts else math.inf):
            raise RecipeError(f"the train rows have {len(labels)} different numbers for labels, such as {labels[0]} "
                              f"and {labels[-1]}: each would be a class of its own",
                              "to predict the number, set objective.task to regression; if each number is a class, "
                              "list them all in objective.labels")
        if len(names) < (1 if self.task == "multi" else 2):
            raise RecipeError(f"the train rows have {len(names)} class: {', '.join(names)}",
                              "give rows of at least two classes")
        weights = (compute_balanced_weights(names, counts or {}) if self.class_weights == "balanced"
                   else self.class_weights)
        return self.model_copy(update={"labels": names, "class_weights": weights})

    def count(self, target: LossInputs) -> float:
        return float(self._weigh_labels(target).sum())

    def __call__(self, outputs: Outputs, target: LossInputs) -> Loss:
        weights = self._weigh_labels(target)  # [A], [A, C] or [P]
        count = weights.sum()  # []
        scores = self._get_scores(outputs)  # [A, C] or [P, C]
        if self.task == "regression":
            errors = (scores[:, 0] - target.labels.to(scores.dtype)).square()  # [A]
            return Loss((weights.to(scores.dtype) * errors).sum(), count, sum_and_count({"squared_error": errors}))
        if self.task == "multi":
            # [A, C]
            losses = F.binary_cross_entropy_with_logits(scores, target.labels.to(scores.dtype), reduction="none")
            correct = ((scores > 0) == (target.labels > 0.5)).all(-1)  # [A]
        elif target.soft_labels.shape[0]:
            shares = target.soft_labels.to(scores.dtype)  # [A, C]
            class_weights = self._get_class_weights(target).to(scores.dtype)  # [C]
            losses = F.cross_entropy(scores, shares, class_weights, reduction="none")  # [A]
            weights = get_item_weights(target)  # [A] the losses have the class weights already
            correct = scores.argmax(-1) == self._get_classes(target)  # [A]
        else:
            truth = self._get_classes(target)  # [A] or [P]
            losses, correct = F.cross_entropy(scores, truth, reduction="none"), scores.argmax(-1) == truth  # [A] or [P]
        return Loss((weights.to(scores.dtype) * losses).sum(), count, sum_and_count({"accuracy": correct}))

    def compute_eval_metrics(self, outputs: Outputs, target: LossInputs) -> dict[str, float]:
        scores = self._get_scores(outputs)  # [A, C] or [P, C]
        if not scores.shape[0]:
            return {}
        if self.task == "regression":
            predicted, truth = scores[:, 0], target.labels  # [A]
            return {"pearson": metrics.compute_pearson(predicted, truth),
                    "spearman": metrics.compute_spearman(predicted, truth)}
        if self.task == "multi":
            predicted, truth = scores > 0, target.labels > 0  # [A, C] bool
            macro, micro = metrics.compute_f1((predicted & truth).sum(0), truth.sum(0), predicted.sum(0))
            return {"f1_macro": macro, "f1_micro": micro}
        # [C, C]
        matrix = metrics.compute_confusion_matrix(self._get_classes(target), scores.argmax(-1), scores.shape[1])
        macro, micro = metrics.compute_f1(matrix.diagonal(), matrix.sum(1), matrix.sum(0))
        cells = {f"confusion_{i}_{j}": float(matrix[i, j]) for i, j in matrix.nonzero().tolist()}
        return {"f1_macro": macro, "f1_micro": micro, "mcc": metrics.compute_mcc(matrix), **cells}

    def _get_scores(self, outputs: Outputs) -> Tensor:
        scores = outputs.token_scores if self.task == "tokens" else outputs.scores
        assert scores is not None
        return upcast_to_float32(scores)

    def _get_classes(self, target: LossInputs) -> Tensor:
        """[A] or [P] class indices."""
        truth = target.token_ids if self.task == "tokens" else target.labels.long()
        assert bool(((truth >= 0) & (truth < len(self.labels))).all()), "data rejects rows with other classes"
        return truth

    def _weigh_labels(self, target: LossInputs) -> Tensor:
        """[A], [A, C] or [P] the loss weight of each label. Raises `DataError` if the labels do not fit the task."""
        found = "tokens" if not target.labels.shape[0] else "multi" if target.labels.dim() == 2 else "single"
        wanted = "single" if self.task == "regression" else self.task
        if found != wanted:
            raise DataError(f"objective.task is {self.task}, and the rows have {LABEL_FORMS[found]}",
                            f"set objective.task to {found}, or give rows with {LABEL_FORMS[wanted]}")
        if self.task == "regression":
            return get_item_weights(target)
        assert self.class_weights != "balanced", "`with_labels` replaces it by numbers"
        weights = self._get_class_weights(target)  # [C]
        if target.soft_labels.shape[0]:
            return target.soft_labels @ weights * get_item_weights(target)  # [A, C] @ [C] -> [A]
        if self.task == "multi":
            assert target.labels.shape[1:] == weights.shape, "one flag for each class"
            return weights * get_item_weights(target)[:, None]  # [A, C]
        row_weights = target.weights if self.task == "tokens" else get_item_weights(target)  # [P] or [A]
        return weights[self._get_classes(target)] * row_weights  # [A] or [P]

    def _get_class_weights(self, target: LossInputs) -> Tensor:
        """[C] u_c."""
        explicit = {get_label_key(name): weight for name, weight in self._explicit_weights.items()}
        return torch.tensor([explicit.get(get_label_key(name), 1.0) for name in self.labels],
                            device=target.weights.device)


def compute_balanced_weights(names: tuple[str, ...], counts: Mapping[str, float]) -> dict[str, float]:
    """n / (C n_c) for each class. Raises `RecipeError` if a class has no training row."""
    if missing := [name for name in names if not counts.get(name)]:
        raise RecipeError(f"objective.class_weights: balanced, but no train row has the class {missing[0]!r}",
                          "remove it from objective.labels, do not stream, or give numbers for class_weights")
    total = sum(counts[name] for name in names)
    return {name: total / (len(names) * counts[name]) for name in names}
