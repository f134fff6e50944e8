"""PPO's and GRPO's numbers: against TRL's own method, and against the papers' sums written out one token at a time."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.core.types import LossInputs, Outputs
from luthier.objectives.grpo import GrpoConfig, compute_group_advantages
from luthier.objectives.ppo import PpoConfig, compute_gae, whiten

LENGTHS = torch.tensor([3, 1, 5, 2, 4, 4])
TOTAL = int(LENGTHS.sum())


def draw(seed: int, size: float = 1.0) -> Tensor:
    return size * torch.randn(TOTAL, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw_case() -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities with a gradient, some of them far enough from the old ones to be clipped, and columns."""
    old = -1 - draw(0).abs()
    return (old + draw(1, 0.3)).requires_grad_(True), {
        "old_logps": old, "reference_logps": old + draw(2, 0.2), "advantages": draw(3), "returns": draw(4),
        "old_values": draw(5), "kl_coef": torch.full((TOTAL,), 0.3, dtype=torch.float64)}


def target(known: dict[str, Tensor]) -> LossInputs:
    answers = len(LENGTHS)
    return LossInputs(torch.arange(TOTAL), torch.zeros(TOTAL, dtype=torch.long), torch.ones(TOTAL), 2,
                      labeled_segments=torch.arange(answers), labels=torch.zeros(answers), margins=torch.zeros(answers),
                      groups=torch.arange(answers) // 3, item_of=torch.repeat_interleave(torch.arange(answers), LENGTHS),
                      precomputed=known)


def mean(objective: Any, outputs: Outputs, known: dict[str, Tensor]) -> Tensor:
    """The loss as the step has it."""
    found = objective(outputs, target(known))
    assert float(found.count) == pytest.approx(objective.count(target(known)))
    return found.total / objective.count(target(known))


# ---------------------------------------------------------------- GRPO against TRL


def padded(flat: Tensor) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(flat.split(LENGTHS.tolist())), batch_first=True)


def compute_trl_loss(logps: Tensor, known: dict[str, Tensor], each: Tensor, kind: str, beta: float, high: float) -> Tensor:
    """`GRPOTrainer._compute_loss` on a trainer that has what that method reads, and nothing else."""
    trainer = pytest.importorskip("trl").GRPOTrainer.__new__(pytest.importorskip("trl").GRPOTrainer)
    gathered = SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1)
    vars(trainer).update(
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, beta=beta, loss_type=kind,
        importance_sampling_level="token", epsilon_low=0.2, epsilon_high=high, use_vllm=False, max_completion_length=7,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False), accelerator=gathered,
        model=SimpleNamespace(training=False), _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1, _metrics={"eval": defaultdict(list), "train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (padded(logps), padded(logps).detach() * 0, None))
    mask = padded(torch.ones(TOTAL))
    return trainer._compute_loss(None, {
        "prompt_ids": torch.zeros(6, 1, dtype=torch.long), "prompt_mask": torch.ones(6, 1, dtype=torch.long),
        "completion_ids": mask.long(), "completion_mask": mask.long(), "advantages": each,
        "old_per_token_logps": padded(known["old_logps"]), "ref_per_token_logps": padded(known["reference_logps"])})


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo"])
@pytest.mark.parametrize("beta", [0.0, 0.4])
@pytest.mark.parametrize("high", [None, 0.05])
def test_grpo_equals_trl(kind: Any, beta: float, high: float | None) -> None:
    logps, known = draw_case()
    each = torch.tensor([1.0, -2.0, 0.5, -0.3, 2.0, -1.0], dtype=torch.float64)
    known["advantages"] = torch.repeat_interleave(each, LENGTHS)
    objective = GrpoConfig(advantage_estimator=kind, beta=beta, max_new_tokens=7, epsilon_high=high)
    ours = mean(objective, Outputs(token_logps=logps, reference_logps=known["reference_logps"]), known)
    theirs = compute_trl_loss(logps, known, each, kind, beta, 0.2 if high is None else high)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    found, wanted = (torch.autograd.grad(loss, logps, retain_graph=True)[0] for loss in (ours, theirs))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    other = GrpoConfig(advantage_estimator="rloo", beta=beta, max_new_tokens=7, epsilon_high=high)
    control = mean(other, Outputs(token_logps=logps, reference_logps=known["reference_logps"]), known)
    assert abs(float(control - theirs)) > 1e-3


def test_policy_is_its_own_old_policy_without_old_logps() -> None:
    logps, known = draw_case()
    without = {"advantages": known["advantages"]}
    with_own = without | {"old_logps": logps.detach()}
    found, wanted = (mean(GrpoConfig(), Outputs(token_logps=logps), columns) for columns in (without, with_own))
    assert torch.equal(torch.autograd.grad(found, logps)[0], torch.autograd.grad(wanted, logps)[0])


def test_rloo_gradient_equals_reinforce_with_leave_one_out_baseline() -> None:
    logps, _ = draw_case()
    rewards = torch.tensor([[1.0, 0.0, 2.0], [5.0, 3.0, 3.5]], dtype=torch.float64)
    each = torch.stack([row[i] - (row.sum() - row[i]) / 2 for row in rewards for i in range(3)])
    wanted = -(torch.stack([part.sum() for part in logps.split(LENGTHS.tolist())]) * each).mean()
    columns = GrpoConfig(advantage_estimator="rloo", num_generations=3).compute_advantages(rewards.flatten(), LENGTHS, {}, 0.0)
    found = mean(GrpoConfig(advantage_estimator="rloo", num_generations=3), Outputs(token_logps=logps), columns)
    torch.testing.assert_close(torch.autograd.grad(found, logps)[0], torch.autograd.grad(wanted, logps)[0])


def test_group_advantages_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0, 2.0], [5.0, 5.0, 5.0]], dtype=torch.float64)
    torch.testing.assert_close(compute_group_advantages(rewards, "grpo")[0], torch.tensor([0.0, -1.0, 1.0]).double() / 1.0001)
    torch.testing.assert_close(compute_group_advantages(rewards, "dr_grpo")[0], torch.tensor([0.0, -1.0, 1.0]).double())
    torch.testing.assert_close(compute_group_advantages(rewards, "rloo")[0], torch.tensor([0.0, -1.5, 1.5]).double())
    for how in ("grpo", "dr_grpo", "rloo"):
        assert not compute_group_advantages(rewards, how)[1].any()  # answers alike teach nothing, and divide by nothing


# ---------------------------------------------------------------- PPO against the papers


def compute_by_hand(known: dict[str, Tensor], logps: Tensor, values: Tensor, entropies: Tensor, objective: PpoConfig) -> Tensor:
    """Schulman et al. 2017, eq. 9, one token at a time, with the value's clip of their code."""
    total = torch.zeros((), dtype=torch.float64)
    for t in range(TOTAL):
        ratio, a = torch.exp(logps[t] - known["old_logps"][t]), known["advantages"][t]
        policy = torch.min(ratio * a, torch.clamp(ratio, 1 - objective.cliprange, 1 + objective.cliprange) * a)
        error = (values[t] - known["returns"][t]) ** 2
        if objective.cliprange_value is not None:
            old = known["old_values"][t]
            near = old + torch.clamp(values[t] - old, -objective.cliprange_value, objective.cliprange_value)
            error = torch.max(error, (near - known["returns"][t]) ** 2)
        total = total - policy + objective.vf_coef * 0.5 * error - objective.entropy_coef * entropies[t]
        if objective.kl_coef and objective.kl_penalty_in == "loss":
            d = known["reference_logps"][t] - logps[t]
            total = total + 0.3 * (torch.exp(d) - 1 - d)
    return total / TOTAL


@pytest.mark.parametrize("settings", [
    {}, {"cliprange_value": None}, {"vf_coef": 2.0, "cliprange": 0.05}, {"entropy_coef": 0.1},
    {"kl_penalty_in": "loss", "kl_coef": 0.3}], ids=str)
def test_ppo_equals_the_paper(settings: dict[str, Any]) -> None:
    objective = PpoConfig(**settings)
    logps, known = draw_case()
    values, entropies = draw(6).requires_grad_(True), draw(7).abs().requires_grad_(True)
    outputs = Outputs(token_logps=logps, token_scores=values[:, None], token_entropies=entropies,
                      reference_logps=known["reference_logps"])
    ours, theirs = mean(objective, outputs, known), compute_by_hand(known, logps, values, entropies, objective)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad(theirs, [logps, values, entropies], allow_unused=True, materialize_grads=True)
    found = torch.autograd.grad(ours, [logps, values, entropies], allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    control = mean(PpoConfig(cliprange=0.5, vf_coef=0.9), outputs, known)
    assert abs(float(control - theirs)) > 1e-3


def test_metric_values_by_hand() -> None:
    logps, known = draw_case()
    values = draw(6)
    found = PpoConfig(entropy_coef=0.1)(Outputs(token_logps=logps, token_scores=values[:, None],
                                                  token_entropies=draw(7)), target(known)).metrics
    ratio = (logps - known["old_logps"]).exp()
    a = known["advantages"]
    decided = (ratio.clamp(0.8, 1.2) * a < ratio * a).double().mean()
    assert 0 < float(decided) < 1
    wanted = {"clip_fraction": decided, "value_loss": ((values - known["returns"]) ** 2).mean(),
              "entropy": draw(7).mean(), "approx_kl": (ratio - 1 - ratio.log()).mean()}
    for name, value in wanted.items():
        total, n = found[name]
        assert float(total) / float(n) == pytest.approx(float(value)), name
        assert not total.requires_grad


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.0), (0.9, 1.0), (1.0, 1.0)])
def test_gae_equals_the_paper(gamma: float, lam: float) -> None:
    rewards, values = draw(8), draw(9)
    wanted = []
    for r, v in zip(rewards.split(LENGTHS.tolist()), values.split(LENGTHS.tolist()), strict=True):
        after = [*v[1:].tolist(), 0.0]
        delta = [float(r[t]) + gamma * after[t] - float(v[t]) for t in range(len(r))]
        wanted += [sum((gamma * lam) ** k * delta[t + k] for k in range(len(r) - t)) for t in range(len(r))]
    found = compute_gae(rewards, values, LENGTHS, gamma, lam)
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    if (gamma, lam) == (1.0, 1.0):  # then it is the return to go, less the value
        last = LENGTHS.cumsum(0) - 1
        torch.testing.assert_close(found[last], rewards[last] - values[last])
        first = [float(part.sum()) for part in rewards.split(LENGTHS.tolist())]
        torch.testing.assert_close(found[last - LENGTHS + 1], torch.tensor(first).double() - values[last - LENGTHS + 1])


def test_kl_penalty_per_token_and_reward_at_the_last_token() -> None:
    _, known = draw_case()
    objective = PpoConfig(kl_coef=0.5, whiten_advantages=False, gae_lambda=1.0)
    rewards = torch.arange(6.0, dtype=torch.float64)
    found = objective.compute_advantages(rewards, LENGTHS, known, 0.7)  # 0.7: where the controller has steered it
    apart = known["old_logps"] - known["reference_logps"]
    begins = LENGTHS.cumsum(0) - LENGTHS
    paid = torch.stack([part.sum() for part in apart.split(LENGTHS.tolist())])
    torch.testing.assert_close(found["returns"][begins], rewards - 0.7 * paid)
    torch.testing.assert_close(found["advantages"], found["returns"] - known["old_values"])
    white = PpoConfig(kl_coef=0.5, gae_lambda=1.0).compute_advantages(rewards, LENGTHS, known, 0.7)
    torch.testing.assert_close(white["returns"], found["returns"])
    assert float(white["advantages"].mean()) == pytest.approx(0, abs=1e-12)
    assert float(white["advantages"].var()) == pytest.approx(1, rel=1e-6)
    assert not whiten(torch.ones(1)).any()


def test_adaptive_kl_coef_moves_towards_its_target() -> None:
    objective = PpoConfig(kl_coef=0.1, adaptive_kl_target=2.0)
    assert objective.update_kl_coef(0.1, 2.0) == 0.1
    assert objective.update_kl_coef(0.1, 100.0) == pytest.approx(0.1 * 1.02)
    assert objective.update_kl_coef(0.1, 1.9) == pytest.approx(0.1 * (1 - 0.1 * 0.05))
    assert objective.update_kl_coef(0.1, 0.0) == pytest.approx(0.1 * 0.98)
    assert PpoConfig(kl_coef=0.1).update_kl_coef(0.1, 100.0) == 0.1
    assert not math.isnan(objective.update_kl_coef(0.1, -5.0))


def test_advantage_of_each_token_by_hand() -> None:
    """With lambda 0 an advantage is r_t + gamma V(s_{t+1}) - V(s_t): the last token alone earns the reward."""
    lengths = torch.tensor([3, 1])
    known = {"old_logps": torch.tensor([-1.0, -2.0, -3.0, -4.0]), "reference_logps": torch.tensor([-1.5, -2.0, -2.0, -4.4]),
             "old_values": torch.tensor([0.5, 0.25, 1.0, 2.0])}
    objective = PpoConfig(kl_coef=0.2, whiten_advantages=False, gae_lambda=0.0, gamma=0.5)
    found = objective.compute_advantages(torch.tensor([10.0, 20.0]), lengths, known, 0.2)["advantages"]
    torch.testing.assert_close(found, torch.tensor([
        -0.2 * 0.5 + 0.5 * 0.25 - 0.5,
        0.0 + 0.5 * 1.0 - 0.25,
        10.0 + 0.2 * 1.0 + 0.0 - 1.0,
        20.0 - 0.2 * 0.4 + 0.0 - 2.0]))


def test_truncated_completion_is_worth_its_reward_only() -> None:
    """Of answers all of which are cut, a critic that has learned expects exactly R: with V = R everywhere nothing is better
    than expected. Counting V behind the cut, the control, would say that every answer is worth R too much."""
    rewards, lengths = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.tensor([3, 2])
    values = rewards.repeat_interleave(lengths)
    found = PpoConfig(kl_coef=0, whiten_advantages=False, gae_lambda=1.0).compute_advantages(
        rewards, lengths, {"old_logps": torch.zeros(5, dtype=torch.float64), "old_values": values}, 0.0)
    assert torch.equal(found["advantages"], torch.zeros(5, dtype=torch.float64))
    assert torch.equal(found["returns"], values)
    earned = torch.zeros(5, dtype=torch.float64)
    earned[lengths.cumsum(0) - 1] = rewards + values[lengths.cumsum(0) - 1]
    assert torch.equal(compute_gae(earned, values, lengths, 1.0, 1.0), values)
