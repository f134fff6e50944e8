"""The reward model against TRL's trainer and the papers' formulas: values and gradients in float64. Read `cases.py` first."""

from __future__ import annotations

import math
from itertools import permutations
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_objectives_preference import trainer
from torch import Tensor

from cases import Case, cases
from luthier.core.types import LossInputs, Outputs
from luthier.objectives import OBJECTIVES, metrics


def make_case(ranks: list[list[int]], margins: bool = True, **settings: object) -> Case:
    rng = torch.Generator().manual_seed(3)
    n = sum(len(group) for group in ranks)
    target = LossInputs(torch.zeros(0), torch.zeros(0), torch.zeros(0), len(ranks), labeled_segments=torch.arange(n),
                        labels=torch.tensor([float(rank) for group in ranks for rank in group]),
                        margins=torch.rand(n, generator=rng) * margins,
                        groups=torch.tensor([g for g, group in enumerate(ranks) for _ in group]))
    scores = torch.randn(n, 1, generator=rng, dtype=torch.float64).requires_grad_()
    return Case(OBJECTIVES["reward"](**settings), Outputs(scores=scores), target, torch.zeros(0, dtype=torch.int64))


def check_loss_and_gradient(case: Case, wanted: Tensor) -> None:
    found = case.loss().total / case.objective.count(case.target)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    mine, theirs = (torch.autograd.grad(x, case.outputs.scores)[0] for x in (found, wanted))
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    assert theirs.abs().max() > 1e-2


@pytest.mark.parametrize("ranking", ["plackett_luce", "all_pairs"])
@pytest.mark.parametrize("centering", [0.0, 0.7])
@pytest.mark.parametrize("margins", [True, False])
def test_pair_loss_equals_trl(ranking: str, centering: float, margins: bool) -> None:
    trl = pytest.importorskip("trl")
    case = make_case([[0, 1], [1, 0], [1, 0], [0, 1]], margins, ranking=ranking, center_rewards_coefficient=centering)
    order = torch.tensor([0, 3, 5, 6, 1, 2, 4, 7])  # the better ones first
    trl_trainer = trainer(trl.RewardTrainer, args=SimpleNamespace(center_rewards_coefficient=centering or None))
    given = {"attention_mask": torch.ones(8, 1)} | ({"margin": case.target.margins[order[:4]].double()} if margins else {})
    wanted = trl_trainer.compute_loss(lambda **_: SimpleNamespace(logits=case.outputs.scores[order]), given)
    check_loss_and_gradient(case, wanted)
    theirs = {name: values[-1] for name, values in trl_trainer._metrics["train"].items()}
    ours = {name: float(total) / float(n) for name, (total, n) in case.loss().metrics.items()}
    assert ours["rewards/accuracies"] == pytest.approx(theirs["accuracy"])
    assert ours["rewards/margins"] == pytest.approx(theirs["margin"])
    assert ours["rewards/chosen"] - ours["rewards/rejected"] == pytest.approx(theirs["margin"])


def test_ranking_loss_equals_plackett_luce() -> None:
    """Drawing answer after answer from what is left, each in proportion to e^score."""
    case = make_case([[2, 0, 3, 1], [0, 1, 2]], margins=False)
    scores, wanted = case.outputs.scores[:, 0], 0.0
    for ranked in ([1, 3, 0, 2], [4, 5, 6]):
        for drawn in range(len(ranked)):
            wanted = wanted - torch.log_softmax(scores[ranked[drawn:]], 0)[0] / 2
    check_loss_and_gradient(case, wanted)
    chances = []  # of all orders of three answers: they are a distribution
    for order in permutations(range(3)):
        one = make_case([list(order)], margins=False)
        chances.append(math.exp(-float(one.loss().total)))
    assert sum(chances) == pytest.approx(1.0, rel=1e-12)
    assert float(make_case([[2, 0, 3, 1]], ranking="all_pairs").loss().total) != float(make_case([[2, 0, 3, 1]]).loss().total)


def test_all_pairs_loss_equals_instructgpt() -> None:
    case = make_case([[2, 0, 1], [0, 1]], ranking="all_pairs", center_rewards_coefficient=0.2)
    s, m = case.outputs.scores[:, 0], case.target.margins.double()
    groups = [[(1, 2), (1, 0), (2, 0)], [(3, 4)]]
    wanted = sum((-F.logsigmoid(s[i] - s[j] - m[i]) + 0.2 * (s[i] + s[j]) ** 2) / len(pairs) / 2
                 for pairs in groups for i, j in pairs)
    check_loss_and_gradient(case, wanted)


def test_ranking_with_only_the_best_known() -> None:
    """Ties below the best: what is equally good is not made."""
    case = make_case([[1, 0, 1]], margins=False)
    check_loss_and_gradient(case, -torch.log_softmax(case.outputs.scores[:, 0], 0)[1])


# ---------------------------------------------------------------- calibration


def test_calibration_by_hand() -> None:
    found = metrics.compute_calibration(torch.tensor([0.95, 0.91, 0.07, 0.62, 0.5]), bins=5)
    assert found == pytest.approx({
        "calibration_predicted_0": 0.5, "calibration_observed_0": 0.5, "calibration_count_0": 1.0,
        "calibration_predicted_1": 0.62, "calibration_observed_1": 1.0, "calibration_count_1": 1.0,
        "calibration_predicted_4": 0.93, "calibration_observed_4": 2 / 3, "calibration_count_4": 3.0,
        "calibration_error": (0 + 0.38 + 3 * (0.93 - 2 / 3)) / 5})


def test_calibration_error_of_true_and_overconfident_probabilities() -> None:
    generator = torch.Generator().manual_seed(0)
    chance = torch.rand(20_000, generator=generator, dtype=torch.float64)
    won = torch.rand(20_000, generator=generator, dtype=torch.float64) < chance
    given = torch.where(won, chance, 1 - chance)
    assert metrics.compute_calibration(given)["calibration_error"] < 0.02
    bold = torch.sigmoid(4 * torch.logit(given))
    assert metrics.compute_calibration(bold)["calibration_error"] > 0.1


def test_eval_metrics_use_all_pairs() -> None:
    case = cases()["reward"]
    found = case.objective.compute_eval_metrics(case.outputs, case.target)
    assert sum(value for name, value in found.items() if "_count_" in name) == 1 + 3 + 1 + 6
