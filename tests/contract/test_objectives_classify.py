"""Classification against Transformers' own losses and scikit-learn's measures. Read `cases.py` first."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cases import Case, cases
from luthier.core.errors import DataError, RecipeError
from luthier.core.types import LossInputs, Outputs
from luthier.objectives import OBJECTIVES
from luthier.objectives import metrics as measures

NAMES = ("a", "b", "c")


def make_case(task: str, labels: Tensor, scores: Tensor, **settings: object) -> Case:
    n = len(labels)
    if task != "regression":
        settings["labels"] = NAMES
    nothing = torch.zeros(0, dtype=torch.int64)
    target = LossInputs(nothing, nothing, torch.zeros(0), n, labeled_segments=torch.arange(n), labels=labels.float(), groups=torch.arange(n))
    return Case(OBJECTIVES["classify"](task=task, **settings), Outputs(scores=scores.double().requires_grad_()), target, nothing)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def check_loss_and_gradient(case: Case, wanted: Tensor, leaf: str = "scores") -> None:
    at = vars(case.outputs)[leaf]
    found = case.loss().total / case.objective.count(case.target)
    torch.testing.assert_close(found, wanted.double(), rtol=1e-7, atol=1e-9)
    mine, theirs = (torch.autograd.grad(x, at)[0] for x in (found, wanted))
    torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)
    assert theirs.abs().max() > 1e-2


LABELS = {"single": torch.tensor([0, 2, 1, 1, 0, 2, 2]), "multi": (draw(7, 3) > 0.2).float(), "regression": 1 - draw(7)}
PROBLEM = {"single": "single_label_classification", "multi": "multi_label_classification", "regression": "regression"}


@pytest.mark.parametrize("task", LABELS)
def test_loss_equals_transformers(task: str) -> None:
    from transformers.loss.loss_utils import ForSequenceClassificationLoss
    labels = LABELS[task]
    case = make_case(task, labels, draw(7, 1 if task == "regression" else 3))
    config = SimpleNamespace(problem_type=PROBLEM[task], num_labels=1 if task == "regression" else 3)
    check_loss_and_gradient(case, ForSequenceClassificationLoss(labels if task == "single" else case.target.labels.double(), case.outputs.scores, config))


def test_token_loss_equals_transformers_and_weights_equal_torch() -> None:
    from transformers.loss.loss_utils import ForTokenClassification
    case = cases()["classify-tokens"]
    plain = Case(OBJECTIVES["classify"](task="tokens", labels=NAMES), case.outputs,
                 LossInputs(case.target.state_index, case.target.token_ids, torch.ones(12), 4), case.owner)
    config = SimpleNamespace(num_labels=3)
    check_loss_and_gradient(plain, ForTokenClassification(case.outputs.token_scores, case.target.token_ids, config), "token_scores")
    each = F.cross_entropy(case.outputs.token_scores, case.target.token_ids, reduction="none")
    weights = case.target.weights.double() * torch.tensor([2.0, 1.0, 0.5])[case.target.token_ids]
    check_loss_and_gradient(case, (weights * each).sum() / weights.sum(), "token_scores")


def test_class_weights_equal_torch() -> None:
    weights = torch.tensor([2.0, 1.0, 0.25], dtype=torch.float64)
    given = {"a": 2.0, "c": 0.25}
    single = make_case("single", LABELS["single"], draw(7, 3), class_weights=given)
    wanted = F.cross_entropy(single.outputs.scores, LABELS["single"], weight=weights)
    check_loss_and_gradient(single, wanted)
    assert abs(float(wanted) - float(F.cross_entropy(single.outputs.scores, LABELS["single"]))) > 1e-2  # the control
    multi = make_case("multi", LABELS["multi"], draw(7, 3), class_weights=given)
    each = F.binary_cross_entropy_with_logits(multi.outputs.scores, LABELS["multi"].double(), weight=weights, reduction="sum")
    check_loss_and_gradient(multi, each / (7 * weights.sum()))


def test_accuracy() -> None:
    scores = torch.eye(3)[[0, 2, 1, 0, 0, 2, 1]]
    assert tuple(map(float, make_case("single", LABELS["single"], scores).loss().metrics["accuracy"])) == (5.0, 7.0)
    flags = torch.tensor([[1.0, 0, 1], [0, 0, 0]])
    found = make_case("multi", flags, torch.tensor([[3.0, -1, 2], [-1, 1, -1]])).loss()  # one of two rows is right in every flag
    assert tuple(map(float, found.metrics["accuracy"])) == (1.0, 2.0)
    squared, n = make_case("regression", torch.tensor([1.0, 2.0]), torch.tensor([[3.0], [2.0]])).loss().metrics["squared_error"]
    assert (float(squared), float(n)) == (4.0, 2.0)


# ---------------------------------------------------------------- measures of held-out rows


def test_eval_metrics_equal_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    truth, scores = torch.randint(2, (60,), generator=torch.Generator().manual_seed(0)), draw(60, 3)  # class c is never true
    case = make_case("single", truth, scores)
    found = case.objective.compute_eval_metrics(case.outputs, case.target)
    guess = scores.argmax(-1)
    matrix = metrics.confusion_matrix(truth, guess, labels=[0, 1, 2])
    for i in range(3):
        for j in range(3):
            assert found.pop(f"confusion_{i}_{j}", 0.0) == matrix[i, j]
    assert found == pytest.approx({"f1_macro": metrics.f1_score(truth, guess, average="macro"),
                                   "f1_micro": metrics.f1_score(truth, guess, average="micro"),
                                   "mcc": metrics.matthews_corrcoef(truth, guess)}, rel=1e-12)
    flags, scores = draw(60, 3) > 0.5, draw(61, 3)[1:]
    case = make_case("multi", flags, scores)
    assert case.objective.compute_eval_metrics(case.outputs, case.target) == pytest.approx(
        {f"f1_{how}": metrics.f1_score(flags, scores > 0, average=how) for how in ("macro", "micro")}, rel=1e-12)


def test_correlations_with_ties_equal_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    truth, guess = (draw(2, 40) * 3).round().unbind()
    case = make_case("regression", truth, guess[:, None].clone())
    wanted = {"pearson": stats.pearsonr(truth, guess)[0], "spearman": stats.spearmanr(truth, guess)[0]}
    assert case.objective.compute_eval_metrics(case.outputs, case.target) == pytest.approx(wanted, rel=1e-6)


def test_eval_metrics_of_no_rows() -> None:
    flat = torch.ones(5)
    assert measures.compute_pearson(flat, torch.arange(5.0)) == measures.compute_spearman(torch.arange(5.0), flat) == 0.0
    assert measures.compute_f1(*torch.zeros(3, 4)) == (0.0, 0.0)
    assert measures.compute_mcc(measures.compute_confusion_matrix(torch.zeros(4).long(), torch.zeros(4).long(), 2)) == 0.0


# ---------------------------------------------------------------- what cannot be


def test_classes_come_from_the_rows_or_the_recipe() -> None:
    bare = OBJECTIVES["classify"](class_weights={"no": 2.0})
    assert bare.classes == ()
    assert bare.with_labels(("no", "yes")).heads[0].width == 2
    assert OBJECTIVES["classify"](labels=("yes", "no", "rare")).with_labels(("no", "yes")).classes == ("yes", "no", "rare")
    assert OBJECTIVES["classify"](task="regression").with_labels(()).heads[0].width == 1
    assert OBJECTIVES["classify"](task="regression").classes is None
    tags = OBJECTIVES["classify"](task="tokens").with_labels(("B", "I", "O"))
    assert (tags.heads[0].kind, tags.heads[0].width, tags.required_outputs) == ("token", 3, frozenset({"token_scores"}))


@pytest.mark.parametrize(("settings", "labels", "match"), [
    ({}, ("only",), "1 class: only"),
    ({"labels": ("yes", "no")}, ("yes", "noo"), "'noo'.*did you mean 'no'"),
    ({"class_weights": {"yess": 2.0}}, ("yes", "no"), "'yess', which is not a class.*did you mean 'yes'"),
])
def test_classes_that_do_not_fit_are_refused(settings: dict, labels: tuple, match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        OBJECTIVES["classify"](**settings).with_labels(labels)


@pytest.mark.parametrize(("settings", "match"), [
    ({"labels": ["a", "a"]}, "appears twice"), ({"task": "regression", "labels": ["a", "b"]}, "no classes"),
    ({"class_weights": {"a": 0.0}}, "above 0")])
def test_invalid_settings_are_refused(settings: dict, match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        OBJECTIVES["classify"].parse(settings)


def test_heads_without_classes_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"objective\.labels"):
        _ = OBJECTIVES["classify"]().heads


@pytest.mark.parametrize("label", [3, -1])
def test_class_index_out_of_range_fails(label: int) -> None:
    case = make_case("single", torch.tensor([0, label]), draw(2, 3))
    with pytest.raises(AssertionError, match="data rejects rows"):
        case.objective.count(case.target)
    with pytest.raises(AssertionError, match="data rejects rows"):
        case.loss()


@pytest.mark.parametrize(("task", "labels", "match"), [
    ("single", torch.zeros(2, 3), "task is single, and the rows have a list of labels"),
    ("multi", torch.zeros(2), "set objective.task to single"), ("regression", torch.zeros(2, 3), "set objective.task to multi"),
    ("single", torch.zeros(0), "set objective.task to tokens"), ("tokens", torch.zeros(2), "a tag for each word")])
def test_labels_of_another_task_are_refused(task: str, labels: Tensor, match: str) -> None:
    case = make_case(task, labels, draw(len(labels), 3))
    for call in (lambda: case.objective.count(case.target), case.loss):
        with pytest.raises(DataError, match=match):
            call()
