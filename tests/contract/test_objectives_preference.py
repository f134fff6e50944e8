"""Preferences and KTO against TRL's own trainers on the same numbers: value and gradient, in float64. Read `cases.py` first.

TRL's methods are called on objects that were never set up; only its model is replaced, by one that returns given numbers.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from itertools import permutations
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cases import Case, answers, cases, make_objective
from luthier.assembly import build_recipe
from luthier.core.errors import DataError, RecipeError
from luthier.core.types import Outputs
from luthier.objectives import SHORT_FORMS
from luthier.objectives.preference import DPO_LOSSES, DpoConfig, compute_completion_logps, log1mexp

trl = pytest.importorskip("trl")
RANKS = [[0, 1], [2, 0, 1], [1, 0], [3, 1, 0, 2]]


def make_case(name: str, labels: Any = RANKS, **settings: Any) -> Case:
    return answers(name, torch.Generator().manual_seed(5), labels, **settings)


def pairs(case: Case) -> tuple[list[int], list[int]]:
    """Every (better, worse) pair of items of one group, found by looking at all of them."""
    target, items = case.target, range(len(case.target.labeled_segments))
    found = [(i, j) for i, j in permutations(items, 2)
             if target.groups[i] == target.groups[j] and target.labels[i] < target.labels[j]]
    return [i for i, _ in found], [j for _, j in found]


def rows(case: Case, logps: Tensor, items: list[int]) -> tuple[Tensor, Tensor]:
    """Each item's token log-probabilities as a padded row, and the mask of its tokens with a first column for a prompt."""
    own = [(case.target.item_of == i).nonzero()[:, 0] for i in items]
    width = max(len(points) for points in own)
    values = torch.stack([F.pad(logps[points], (0, width - len(points))) for points in own])
    mask = torch.stack([F.pad(torch.ones(len(points), dtype=torch.int64), (1, width - len(points))) for points in own])
    return values, mask


def trainer(kind: Any, **settings: Any) -> Any:
    """A trainer of TRL that knows only what its loss reads."""
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)
    bare = kind.__new__(kind)
    bare.__dict__.update(model=SimpleNamespace(training=True), accelerator=accelerator, aux_loss_enabled=False, _tp_size=1,
                         _total_train_tokens=0, _metrics=defaultdict(lambda: defaultdict(list)), **settings)
    return bare


def model_output(log_probs: Tensor) -> Any:
    """What TRL's models return when log-probabilities are requested."""
    return SimpleNamespace(log_probs=log_probs, entropy=torch.zeros_like(log_probs), mean_logits=torch.zeros_like(log_probs),
                           is_top1=torch.ones_like(log_probs, dtype=torch.bool))


def trl_dpo(case: Case, loss_type: str) -> tuple[Tensor, dict[str, float]]:
    """TRL's mean loss over the pairs, and its metrics."""
    from trl import DPOTrainer
    best, worst = pairs(case)
    settings = case.objective
    trl_trainer = trainer(DPOTrainer, ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl",
                   loss_types=[loss_type], loss_weights=[1.0], use_weighting=False, beta=settings.beta,
                   label_smoothing=dict(settings).get("label_smoothing") or 0.0)
    policy, mask = rows(case, case.outputs.token_logps, best + worst)
    reference = rows(case, case.outputs.reference_logps, best + worst)[0].sum(1)
    inputs = {"input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask,
              "ref_chosen_logps": reference[:len(best)], "ref_rejected_logps": reference[len(best):]}
    loss = trl_trainer._compute_loss(lambda **_: model_output(policy), inputs, False)
    return loss, {name: values[-1] for name, values in trl_trainer._metrics["train"].items()}


def trl_cpo(case: Case, loss_type: str, reference: bool, mean: bool) -> Tensor:
    from trl.experimental.cpo import CPOTrainer
    trl_trainer = trainer(CPOTrainer, alpha=0.0, loss_type=loss_type, beta=case.objective.beta,
                   simpo_gamma=dict(case.objective).get("gamma"), label_smoothing=dict(case.objective).get("label_smoothing") or 0.0)
    logps = case.outputs.token_logps - (case.outputs.reference_logps if reference else 0)
    sides = [rows(case, logps, items) for items in pairs(case)]
    return trl_trainer.cpo_loss(*(values.sum(1) / (mask.sum(1) if mean else 1) for values, mask in sides))[0].mean()


def trl_orpo(case: Case) -> Tensor:
    """TRL's odds ratio; and as the paper has it, the mean over each better answer's tokens."""
    from trl.experimental.orpo import ORPOTrainer
    trl_trainer = trainer(ORPOTrainer, beta=case.objective.beta)
    best, worst = (values.sum(1) / mask.sum(1) for values, mask in
                   (rows(case, case.outputs.token_logps, items) for items in pairs(case)))
    return (-best - trl_trainer.odds_ratio_loss(best, worst)[0]).mean()


ORACLES = {
    "dpo": lambda case: trl_dpo(case, "sigmoid")[0],
    "ipo": lambda case: trl_dpo(case, "ipo")[0],
    "hinge": lambda case: trl_dpo(case, "hinge")[0],
    "robust": lambda case: trl_dpo(case, "robust")[0],
    "cdpo": lambda case: trl_cpo(case, "sigmoid", reference=True, mean=False),
    "simpo": lambda case: trl_cpo(case, "simpo", reference=False, mean=True),
    "orpo": trl_orpo,
}


def test_every_dpo_loss_has_an_oracle() -> None:
    assert {*DPO_LOSSES} == {"sigmoid", *SHORT_FORMS}
    assert {"dpo", *SHORT_FORMS} < ORACLES.keys()
    for loss_type in DPO_LOSSES:
        assert DpoConfig(loss_type=loss_type).loss_type == loss_type


@pytest.mark.parametrize("name", SHORT_FORMS)
def test_short_form_equals_dpo_with_that_loss_type(name: str) -> None:
    """In a recipe as a word, with settings, and laid over another recipe; a loss_type that contradicts it is an error."""
    whole = {"name": "dpo", "loss_type": name}
    for given, wanted in ((name, whole), ({"name": name, "beta": 0.3}, {**whole, "beta": 0.3}),
                          ({"name": name, "loss_type": name}, whole)):
        assert build_recipe({"data": "-", "objective": given}).objective == DpoConfig(**wanted)
    assert build_recipe({"data": "-", "objective": "sft"}, {"objective.name": name, "objective.beta": 0.3}).objective \
        == DpoConfig(**whole, beta=0.3)
    other = next(loss_type for loss_type in SHORT_FORMS if loss_type != name)
    with pytest.raises(RecipeError, match=f"loss_type: {name}, and loss_type is {other}"):
        build_recipe({"data": "-", "objective": {"name": name, "loss_type": other}})


def test_label_smoothing_is_refused_by_losses_without_it() -> None:
    assert {loss_type: DpoConfig(loss_type=loss_type).label_smoothing for loss_type in DPO_LOSSES} == {
        "sigmoid": None, "ipo": None, "hinge": None, "robust": 0.1, "cdpo": 0.1}
    assert DpoConfig(loss_type="cdpo", label_smoothing=0.0).label_smoothing == 0.0
    for loss_type in ("sigmoid", "ipo", "hinge"):
        with pytest.raises(RecipeError, match="label_smoothing has no effect with loss_type " + loss_type):
            build_recipe({"data": "-", "objective": {"name": "dpo", "loss_type": loss_type, "label_smoothing": 0.1}})


def check_loss_and_gradient(case: Case, wanted: Tensor) -> None:
    """Ours, divided as the step divides it, is `wanted`, and so is its gradient on every token."""
    loss = case.loss()
    found = loss.total / case.objective.count(case.target)
    torch.testing.assert_close(found, wanted.double(), rtol=1e-10, atol=1e-12)
    mine, theirs = (torch.autograd.grad(x, case.outputs.token_logps)[0] for x in (found, wanted))
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    assert theirs.abs().max() > 1e-3


@pytest.mark.parametrize("beta", [0.1, 1.5])
@pytest.mark.parametrize("name", ORACLES)
def test_loss_and_gradient_equal_trl(name: str, beta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # TRL rounds ORPO's to float32
    case = make_case(name, beta=beta)
    check_loss_and_gradient(case, ORACLES[name](case))


@pytest.mark.parametrize("name", ORACLES)
def test_losses_differ_from_one_another(name: str) -> None:
    """The control: another name's formula on the same numbers is far away."""
    case = make_case(name, beta=0.5)
    value = float(case.loss().total / case.loss().count)
    for other in ORACLES.keys() - {name}:
        assert abs(value - float(ORACLES[other](make_case(other, beta=0.5)))) > 1e-3, other


@pytest.mark.parametrize("name", ["dpo", "robust"])
def test_metrics_equal_trl(name: str) -> None:
    case = make_case(name, beta=0.3)
    theirs = trl_dpo(case, {"dpo": "sigmoid"}.get(name, name))[1]
    ours = {metric: float(total) / float(n) for metric, (total, n) in case.loss().metrics.items()}
    names = {"rewards/chosen": "rewards/chosen", "rewards/rejected": "rewards/rejected", "rewards/margins": "rewards/margins",
             "rewards/accuracies": "rewards/accuracies", "logps/chosen": "logps/chosen", "logps/rejected": "logps/rejected"}
    assert ours == pytest.approx({name: theirs[other] for name, other in names.items()}, rel=1e-6)


def test_weights_scale_log_probabilities_and_prompts_do_not_count() -> None:
    case = make_case("dpo")
    target = replace(case.target, weights=torch.where(case.target.item_of < 0, 7.0, 2.0))
    twice = compute_completion_logps(case.outputs.token_logps, target, mean=False)
    once = compute_completion_logps(case.outputs.token_logps, case.target, mean=False)
    torch.testing.assert_close(twice, 2 * once)
    torch.testing.assert_close(compute_completion_logps(case.outputs.token_logps, target, mean=True),
                               compute_completion_logps(case.outputs.token_logps, case.target, mean=True))
    assert float(once.sum()) == pytest.approx(float(case.outputs.token_logps[case.target.item_of >= 0].sum()))
    gradient = torch.autograd.grad(case.loss().total, case.outputs.token_logps)[0]
    assert not gradient[case.target.item_of < 0].any()


def test_mean_of_robust_over_flipped_labels_equals_sigmoid() -> None:
    """What the name promises: over pairs of which a share is flipped, the mean loss is that of the true ones."""
    right, wrong = make_case("robust", [[0, 1]], label_smoothing=0.2), make_case("robust", [[1, 0]], label_smoothing=0.2)
    flipped = 0.8 * right.loss().total + 0.2 * wrong.loss().total
    assert float(flipped) == pytest.approx(float(make_case("dpo", [[0, 1]]).loss().total), rel=1e-12)


def test_log1mexp_is_exact_at_both_ends() -> None:
    x = [-1e-12, -0.5, -0.7, -30.0]
    wanted = [math.log1p(-math.exp(v)) if v < -0.1 else math.log(-math.expm1(v)) for v in x]
    torch.testing.assert_close(log1mexp(torch.tensor(x, dtype=torch.float64)), torch.tensor(wanted, dtype=torch.float64),
                               rtol=1e-12, atol=2e-16)
    assert log1mexp(torch.zeros(1)).isfinite()


@pytest.mark.parametrize("name", [*ORACLES, "reward"])
def test_a_single_completion_is_refused(name: str) -> None:
    case = make_case("dpo", [[0, 1], [0]])
    objective, outputs = make_objective(name), replace(case.outputs, scores=torch.zeros(3, 1))
    for call in (lambda: objective.count(case.target), lambda: objective(outputs, case.target)):
        with pytest.raises(DataError, match="at least two"):
            call()
    tied = replace(case.target, labels=torch.zeros(3))
    with pytest.raises(DataError, match="same rank"):
        objective.count(tied)


# ---------------------------------------------------------------- kto


def trl_kto(case: Case) -> Tensor:
    from trl import KTOTrainer
    settings, labels = case.objective, case.target.labels
    trl_trainer = trainer(KTOTrainer, calculate_KL=True, loss_type="kto", precompute_ref_logps=True, beta=settings.beta,
                   desirable_weight=settings.desirable_weight, undesirable_weight=settings.undesirable_weight)
    judged, other = ((labels >= 0).nonzero()[:, 0].tolist(), (labels < 0).nonzero()[:, 0].tolist())
    given: dict[str, Any] = {"label": labels[judged] == 1}
    runs = []
    for prefix, items in (("", judged), ("KL_", other)):
        values, mask = rows(case, case.outputs.token_logps, items)
        runs.append((mask, values))
        given |= {f"{prefix}input_ids": torch.full_like(mask, len(runs)), f"{prefix}completion_mask": mask,
                  f"{prefix}attention_mask": torch.ones_like(mask),
                  f"ref_{prefix}logps": rows(case, case.outputs.reference_logps, items)[0].sum(1)}

    def model(input_ids: Tensor, **_: Any) -> Any:
        return model_output(runs[int(input_ids[0, 0]) - 1][1])

    return trl_trainer._compute_loss(model, given, False)


@pytest.mark.parametrize(("labels", "lifted"), [([[1, -1], [0, -1], [0, -1], [1, -1], [0, -1]], 0.0), ([[1, -1], [0, -1]], 2.0),
                                                ([[0, -1], [0, -1]], 2.0)])
def test_kto_equals_trl(labels: Any, lifted: float) -> None:
    case = make_case("kto", labels, desirable_weight=1.5, undesirable_weight=0.7, beta=0.4)
    below = case.outputs.reference_logps - 1.0 * (lifted == 0.0)  # z0 above 0, or clamped to it
    case = replace(case, outputs=replace(case.outputs, reference_logps=below + lifted))
    check_loss_and_gradient(case, trl_kto(case))
    z0 = float(case.loss().metrics["kl_estimate"][0])
    assert (z0 > 0) == (lifted == 0.0)
    gradient = torch.autograd.grad(case.loss().total, case.outputs.token_logps)[0]
    judged = (case.target.labels[case.target.item_of] >= 0) & (case.target.item_of >= 0)
    assert not gradient[~judged].any(), "z0 has no gradient"
    assert gradient[judged].all()


def test_kto_without_a_mismatched_completion_is_refused() -> None:
    with pytest.raises(DataError, match=r"another row.s prompt"):
        make_case("kto", [[1], [0]]).loss()


def test_kto_reference_has_no_gradient() -> None:
    """A batch that is computed in parts has leaves for all outputs; the reference's have no graph behind them."""
    case = cases()["kto"]
    leaves = {name: t.detach().requires_grad_() for name, t in case.outputs.tensors().items()}
    case.objective(Outputs(**leaves), case.target).total.backward()
    assert leaves["token_logps"].grad is not None
    assert leaves["reference_logps"].grad is None
