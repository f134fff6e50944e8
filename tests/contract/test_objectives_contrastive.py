"""Contrastive losses against sentence-transformers' and the papers' formulas; parts and ranks against the whole batch.

Read `cases.py` and `training/grad_cache.py` first. Its losses are called with the embeddings themselves: they need no model.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lab import Dice, attach, base
from torch import Tensor, multiprocessing

from cases import Case, cases
from luthier.assembly.factory import attach_heads
from luthier.core.errors import DataError, RecipeError
from luthier.core.examples import Origin
from luthier.core.types import LabeledSpan, LossInputs, Outputs, TokenizedExample
from luthier.data.packing import pack_examples
from luthier.objectives import OBJECTIVES
from luthier.objectives.contrastive import MAX_LOG_SCALE, SCALE, ContrastiveConfig
from luthier.training import grad_cache
from luthier.training.optimizer import Optimizer, OptimizerConfig
from luthier.training.step import forward_objective, step


def make_case(labels: list[list[float]], **settings: object) -> Case:
    flat = torch.tensor([label for group in labels for label in group])
    states = torch.randn(len(flat), 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    nothing = torch.zeros(0, dtype=torch.int64)
    target = LossInputs(nothing, nothing, torch.zeros(0), len(labels), labeled_segments=torch.arange(len(flat)), labels=flat,
                        groups=torch.tensor([g for g, group in enumerate(labels) for _ in group]))
    return Case(OBJECTIVES["contrastive"](**settings), Outputs(pooled=(3 * states).requires_grad_()), target, nothing)


def columns(case: Case, count: int) -> list[Tensor]:
    """Anchors, positives, first negatives, ...: what sentence-transformers takes."""
    return [case.outputs.pooled[case.target.labels == i] for i in range(count)]


def check_loss_and_gradient(case: Case, wanted: Tensor) -> None:
    found = case.loss().total / case.objective.count(case.target)
    torch.testing.assert_close(found, wanted.double(), rtol=1e-6, atol=1e-9)
    mine, theirs = (torch.autograd.grad(x, case.outputs.pooled)[0] for x in (found, wanted))
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)
    assert theirs.abs().max() > 1e-3


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("negatives", [0, 1, 2])
def test_infonce_equals_multiple_negatives_ranking_loss(both: bool, negatives: int) -> None:
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    case = make_case([[0, 1, *range(2, 2 + negatives)]] * 5, temperature=0.1, symmetric=both)
    directions = ("query_to_doc", "doc_to_query") if both else ("query_to_doc",)
    theirs = losses.MultipleNegativesRankingLoss(None, scale=10.0, directions=directions, partition_mode="per_direction")
    check_loss_and_gradient(case, theirs.compute_loss_from_embeddings(columns(case, 2 + negatives), None))
    other = replace(case, objective=OBJECTIVES["contrastive"](temperature=0.1, symmetric=not both))
    assert abs(float(other.loss().total - case.loss().total)) > 1e-3


def test_cosent_equals_sentence_transformers() -> None:
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    case = make_case([[x, x] for x in (0.1, 0.9, 0.5, 0.5, 0.3, 1.0)], loss="cosent")
    pooled = case.outputs.pooled
    check_loss_and_gradient(case, losses.CoSENTLoss(None, scale=20.0).compute_loss_from_embeddings([pooled[::2], pooled[1::2]], case.target.labels[::2]))


def test_triplet_equals_sentence_transformers() -> None:
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    case = make_case([[0, 1, 2]] * 6, loss="triplet", margin=0.4)
    cosine = losses.TripletDistanceMetric.COSINE
    check_loss_and_gradient(case, losses.TripletLoss(None, distance_metric=cosine, triplet_margin=0.4)
         .compute_loss_from_embeddings(columns(case, 3), None))
    several = make_case([[0, 1, 2, 3], [0, 1, 1, 2]], loss="triplet", margin=0.4)
    z = F.normalize(several.outputs.pooled, dim=1)
    triples = [(0, 1, 2), (0, 1, 3), (4, 5, 7), (4, 6, 7)]
    check_loss_and_gradient(several, sum(torch.relu(z[a] @ z[n] - z[a] @ z[p] + 0.4) for a, p, n in triples) / 4)


def test_supcon_equals_the_formula() -> None:
    """Khosla et al. 2020, eq. 2, in loops; the only one of its class adds nothing."""
    labels = [[0], [1], [0], [2], [0], [1]]
    case = make_case(labels, loss="supcon", temperature=0.2)
    z = F.normalize(case.outputs.pooled, dim=1)
    wanted = torch.zeros((), dtype=torch.float64)
    for i in range(6):
        mates = [p for p in range(6) if p != i and labels[p] == labels[i]]
        under = sum(torch.exp(z[i] @ z[a] / 0.2) for a in range(6) if a != i)
        wanted = wanted - sum(torch.log(torch.exp(z[i] @ z[p] / 0.2) / under) for p in mates) / max(len(mates), 1) / 6
    check_loss_and_gradient(case, wanted)


def test_positives_of_one_anchor_are_not_negatives_of_one_another() -> None:
    case = make_case([[0, 1, 1], [0, 1, 2]], temperature=0.3)
    z = F.normalize(case.outputs.pooled, dim=1)
    e = torch.exp(z @ z.T / 0.3)
    wanted = -(torch.log(e[0, 1] / (e[0, 1] + e[0, 4] + e[0, 5])) + torch.log(e[0, 2] / (e[0, 2] + e[0, 4] + e[0, 5]))) / 2
    wanted = wanted - torch.log(e[3, 4] / (e[3, 1] + e[3, 2] + e[3, 4] + e[3, 5]))
    check_loss_and_gradient(case, wanted / 2)


def test_match_accuracy_uses_the_nearest_text() -> None:
    case = make_case([[0, 1], [0, 1], [0, 1]])
    states = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [-0.1, 1], [1, 1], [-1, 0]])
    hits, n = replace(case, outputs=Outputs(pooled=states)).loss().metrics["match_accuracy"]
    assert (float(hits), float(n)) == (2.0, 3.0)


@pytest.mark.parametrize("name", sorted(name for name in cases() if name.startswith("contrastive")))
def test_mixed_precision_does_not_reach_the_cosines(name: str) -> None:
    """A batch that is computed in parts has its loss outside of autocast, so inside it must be the same."""
    case = cases()[name]
    single = Outputs(pooled=case.outputs.pooled.detach().float(), scalars=case.outputs.scalars)
    with torch.autocast("cpu", torch.bfloat16):
        inside = case.objective(single, case.target).total
    torch.testing.assert_close(inside, case.objective(single, case.target).total, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- the temperature


def test_learned_temperature_equals_clip() -> None:
    case = cases()["contrastive-symmetric"]
    fixed = replace(case, objective=OBJECTIVES["contrastive"](symmetric=True), outputs=replace(case.outputs, scalars={}))
    assert float(case.loss().total) == pytest.approx(float(fixed.loss().total), rel=1e-12)
    head, = case.objective.heads
    assert (head.name, head.kind) == (SCALE, "scalar")
    assert head.start == pytest.approx(math.log(20))
    total, n = case.loss().metrics["temperature"]
    assert float(total) / n == pytest.approx(0.05)


@pytest.mark.parametrize(("good", "moves"), [(False, True), (True, False)])
def test_scale_is_limited_to_100_and_can_decrease_again(good: bool, moves: bool) -> None:
    """Beyond the limit the value is the limit's; a gradient that would lead further out is 0, one that leads back stays."""
    case = make_case([[0, 1], [0, 1]], learn_temperature=True)
    near = torch.eye(4, 6, dtype=torch.float64)[[0, 0, 1, 1]] + 0.1 * torch.arange(24, dtype=torch.float64).view(4, 6).sin()
    states = near if good else near[[0, 2, 1, 3]]  # each anchor beside its positive, or beside the other's
    beyond = torch.tensor(MAX_LOG_SCALE + 1, dtype=torch.float64, requires_grad=True)
    found = case.objective(Outputs(pooled=states, scalars={SCALE: beyond}), case.target).total
    limit = case.objective(Outputs(pooled=states, scalars={SCALE: torch.tensor(MAX_LOG_SCALE, dtype=torch.float64)}), case.target)
    assert float(found) == float(limit.total)
    gradient, = torch.autograd.grad(found, beyond)
    assert (float(gradient) > 0) == moves
    assert float(gradient) >= 0


def test_triplet_with_learned_temperature_is_refused() -> None:
    with pytest.raises(RecipeError, match="omit learn_temperature"):
        OBJECTIVES["contrastive"].parse({"loss": "triplet", "learn_temperature": True})


# ---------------------------------------------------------------- held-out rows


def test_retrieval_metrics_by_hand() -> None:
    case = make_case([[0, 1], [0, 1], [0, 1, 2]])
    states = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [1, 0.9], [1, 1], [0.1, 1], [1, 1.1]])
    # anchor 0: its positive is first; anchor 2: behind (0.1, 1) and (1, 1.1); anchor 4: behind both (1, 0.9) and (1, 1.1),
    # and before (1, 0.1) by less than nothing: their cosines with (1, 1) are equal, which counts half.
    found = case.objective.compute_eval_metrics(Outputs(pooled=states), case.target)
    assert found == pytest.approx({"mrr": (1 + 1 / 3 + 1 / 3.5) / 3, "recall_at_1": 1 / 3, "recall_at_5": 1.0, "recall_at_10": 1.0})


def test_retrieval_metrics_of_supcon_by_hand() -> None:
    case = make_case([[0], [0], [1], [1], [2]], loss="supcon")
    states = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [1, 0.3], [-1, 0]])
    found = case.objective.compute_eval_metrics(Outputs(pooled=states), case.target)  # 2 is nearest to 3, its mate; 3 is behind 0 and 1
    assert found == pytest.approx({"mrr": (1 + 1 + 1 + 1 / 3) / 4, "recall_at_1": 0.75, "recall_at_5": 1.0, "recall_at_10": 1.0})


def test_cosent_reports_spearman() -> None:
    stats = pytest.importorskip("scipy.stats")
    case = cases()["contrastive-cosent"]
    z = F.normalize(case.outputs.pooled.detach(), dim=1)
    cosines, scores = (z[::2] * z[1::2]).sum(1), case.target.labels[::2]
    found = case.objective.compute_eval_metrics(case.outputs, case.target)
    assert found == pytest.approx({"spearman": stats.spearmanr(cosines, scores)[0], "pearson": stats.pearsonr(cosines, scores)[0]})


# ---------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(("kind", "labels", "match"), [
    ("infonce", [[0, 1], [0]], "one anchor and at least one positive"), ("infonce", [[1, 1]], "one anchor"),
    ("infonce", [[0, 0, 1]], "one anchor"), ("triplet", [[0, 1, 2], [0, 1]], "no hard negative"),
    ("cosent", [[0.5, 0.5], [0.2]], "two texts"), ("cosent", [[0.5] * 3], "two texts")])
def test_example_without_the_required_items_is_refused(kind: str, labels: list, match: str) -> None:
    case = make_case(labels, loss=kind)
    for call in (lambda: case.objective.count(case.target), case.loss):
        with pytest.raises(DataError, match=match):
            call()


def test_only_supcon_has_classes() -> None:
    bare = OBJECTIVES["contrastive"](loss="supcon")
    assert (bare.classes, bare.with_labels(("cat", "dog")).classes) == ((), ("cat", "dog"))
    assert OBJECTIVES["contrastive"]().with_labels(("cat", "dog")).classes is None


# ---------------------------------------------------------------- in parts, and over ranks


def rows(objective: str, kind: str) -> list[TokenizedExample]:
    """Random examples for an objective whose rows meet, of several lengths."""
    rng = Dice(7)
    labels = {"supcon": [[0], [1], [0], [1], [0]], "cosent": [[x, x] for x in (0.1, 0.8, 0.4, 1.0)],
              "kto": [[1, -1], [0, -1], [0, -1], [1, -1]]}.get(kind, [[0, 1, 2], [0, 1, 2], [0, 1, 1, 2], [0, 1, 2, 3]])
    found = []
    for number, group in enumerate(labels):
        prompt = [rng.span(3 + number, masked=3 + number)] if objective == "kto" else []
        spans = [*prompt, *(rng.span(4 + (3 * number + i) % 5, len(prompt) - 1) for i in range(len(group)))]
        items = tuple(LabeledSpan(len(prompt) + i, float(label)) for i, label in enumerate(group))
        found.append(TokenizedExample(tuple(spans), Origin("lab", number), labeled_spans=items))
    return found


COUPLED = [("contrastive", kind, {"loss": kind}) for kind in ("supcon", "cosent", "triplet")]
COUPLED += [("contrastive", "infonce", {"learn_temperature": True, "symmetric": True}), ("kto", "kto", {})]


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("name", "kind", "settings"), COUPLED)
def test_batch_in_parts_equals_the_whole_batch(name: str, kind: str, settings: dict[str, Any]) -> None:
    """Loss and every gradient by gradient caching, against one row; the control: parts that know nothing of one another."""
    objective, examples = OBJECTIVES[name](**settings), rows(name, kind)
    family = base("llama")
    attached = attach_heads(family, attach(family, "lora"), objective, 3)

    def measured(micro: int | None, apart: bool = False) -> dict[str, Tensor]:
        for parameter in attached.parameters().values():
            parameter.grad = None
        batches = pack_examples(examples, micro)
        assert (len(batches) > 2) == (micro is not None)
        count = sum(objective.count(batch.target) for batch in batches)
        run = partial(forward_objective, family, objective, reference=attached.disabled)
        losses = [grad_cache.backward(run, objective, part, count, family.device, nullcontext)[0]
                  for part in ([[batch] for batch in batches] if apart else [batches])]
        return {"loss": sum(losses), **{n: p.grad for n, p in attached.parameters().items()}}

    def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        assert a.keys() == b.keys()
        return max(float((a[n] - b[n]).abs().max()) / max(float(b[n].abs().max()), 1e-6) for n in a)

    whole = measured(None)
    assert distance(measured(12), whole) < 1e-9
    assert kind == "triplet" or distance(measured(12, apart=True), whole) > 1e-4


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("name", "kind", "settings"), [COUPLED[3], COUPLED[4]])
def test_recomputed_parts_use_the_same_dropout(name: str, kind: str, settings: dict[str, Any]) -> None:
    """Else the gradients would be of other outputs than the loss is of. What is drawn afterwards goes on from there."""
    objective, examples = OBJECTIVES[name](**settings), rows(name, kind)
    family = base("llama")
    attached = attach_heads(family, attach(family, "lora", dropout=0.5), objective, 3)
    family.train(True)
    batches = pack_examples(examples, 12)
    recorded: list[Tensor] = []

    def run(batch: Any) -> Outputs:
        found = forward_objective(family, objective, batch, attached.disabled)
        recorded.append((found.pooled if name == "contrastive" else found.token_logps).detach())
        return found

    torch.manual_seed(5)
    grad_cache.backward(run, objective, batches, sum(objective.count(b.target) for b in batches), family.device, nullcontext)
    after = torch.rand(3)
    count = len(batches)
    assert len(recorded) == 2 * count > 4
    assert all(torch.equal(first, again) for first, again in zip(recorded[:count], recorded[count:], strict=True))
    run(batches[0])
    assert not torch.equal(recorded[-1], recorded[0])  # the control: other dropout masks, other outputs
    torch.manual_seed(5)
    for batch in batches:
        run(batch)
    assert torch.equal(torch.rand(3), after)


def trained(max_tokens: int, alone: bool = False) -> dict[str, Any]:
    """Weights and metrics after two steps of a contrastive tuning with a learned temperature; `alone`: of one part only."""
    torch.set_num_threads(1)
    objective, examples = OBJECTIVES["contrastive"](learn_temperature=True, symmetric=True), rows("contrastive", "infonce")
    family = base("llama")
    attached = attach_heads(family, attach(family, "lora"), objective, 3)
    adam = Optimizer(attached.parameters(), attached.lr_multiplier, 1e-2, OptimizerConfig(), 2)
    for i in range(2):
        adam.set_learning_rate(i)
        batches = pack_examples(examples, max_tokens)
        stepped = step(family, objective, batches[:1] if alone else batches, adam)
    return {"numbers": stepped.read_metrics(), "weights": {n: t.clone() for n, t in attached.state().items()}}


def work(rank: int, port: int, place: str) -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.save([trained(24), trained(1000)], f"{place}/{rank}.pt")  # several parts a rank; one part, so that a rank has none
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.start_processes(work, (port, str(tmp_path)), nprocs=2, start_method="fork")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    alone = trained(24)
    for rank in ranks:
        for found in rank:
            assert found["numbers"] == pytest.approx(alone["numbers"], rel=1e-9)
            assert max(float((found["weights"][n] - t).abs().max()) for n, t in alone["weights"].items()) < 1e-9
    assert all(torch.equal(t, ranks[1][0]["weights"][n]) for n, t in ranks[0][0]["weights"].items())
    part = trained(24, alone=True)["weights"]  # what a rank that heard of no other would have
    assert max(float((part[n] - t).abs().max()) for n, t in alone["weights"].items()) > 1e-3


# ---------------------------------------------------------------- duplicates


def compute_by_hand(rows: Sequence[Sequence[str]], states: Mapping[str, Tensor], temperature: float, both: bool) -> Tensor:
    """InfoNCE without known duplicates, anchor by anchor, from the texts; [rows]. A row: anchor, positive, negatives."""
    def close(a: str, b: str) -> Tensor:
        return (F.normalize(states[a], dim=0) @ F.normalize(states[b], dim=0) / temperature).exp()

    def belong(a: str, b: str) -> bool:
        return a == b or any(row[0] == a and row[1] == b for row in rows)

    found = []
    for place, (anchor, positive, *_) in enumerate(rows):
        others = [(r, c) for r, row in enumerate(rows) for c in range(1, len(row))]
        against = [close(anchor, rows[r][c]) for r, c in others
                   if (r, c) != (place, 1) and not belong(anchor, rows[r][c])]
        loss = -(close(anchor, positive) / sum([close(anchor, positive), *against])).log()
        if both:
            back = [close(row[0], positive) for r, row in enumerate(rows) if r != place and not belong(row[0], positive)]
            loss = (loss - (close(anchor, positive) / sum([close(anchor, positive), *back])).log()) / 2
        found.append(loss)
    return torch.stack(found)


def compute_loss(rows: Sequence[Sequence[str]], states: Mapping[str, Tensor], **settings: Any) -> Any:
    """The objective's loss of the rows, and what it was computed from."""
    texts = [text for row in rows for text in row]
    numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    labels = torch.tensor([float(c) for row in rows for c in range(len(row))])
    groups = torch.tensor([r for r, row in enumerate(rows) for _ in row])
    target = LossInputs(torch.zeros(0), torch.zeros(0), torch.zeros(0), len(rows), labeled_segments=torch.arange(len(texts)), labels=labels,
                        groups=groups, text_ids=torch.tensor([numbers[text] << 40 for text in texts]))
    return ContrastiveConfig(**settings)(Outputs(pooled=torch.stack([states[text] for text in texts])), target)


DUPLICATES = {
    "none": [("a", "1"), ("b", "2"), ("c", "3")],
    "a positive twice": [("a", "1"), ("b", "1"), ("c", "3")],
    "an anchor twice": [("a", "1"), ("a", "2"), ("c", "3")],
    "a row twice": [("a", "1"), ("a", "1"), ("c", "3")],
    "an anchor is another's positive": [("a", "1"), ("1", "b"), ("c", "a")],
    "hard negatives": [("a", "1", "2"), ("b", "2", "x"), ("c", "2", "1")],
    "all the same": [("a", "1"), ("b", "1"), ("c", "1")],
}


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("name", DUPLICATES)
def test_masked_duplicates_by_hand(name: str, both: bool) -> None:
    rows = DUPLICATES[name]
    rng = torch.Generator().manual_seed(5)
    states = {text: torch.randn(6, generator=rng, dtype=torch.float64).requires_grad_()
              for text in sorted({text for row in rows for text in row})}
    settings = {"temperature": 0.5, "symmetric": both}
    ours = compute_loss(rows, states, mask_duplicates=True, **settings)
    wanted = compute_by_hand(rows, states, 0.5, both).sum()
    torch.testing.assert_close(ours.total, wanted, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(torch.autograd.grad(ours.total, list(states.values()), allow_unused=True, materialize_grads=True),
                            torch.autograd.grad(wanted, list(states.values()), allow_unused=True, materialize_grads=True),
                            strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    plain = compute_loss(rows, states, **settings).total
    assert (abs(float(plain - ours.total)) < 1e-12) == (name == "none")  # the control: without the option they count


def test_mask_duplicates_without_text_ids_is_refused() -> None:
    states = {text: torch.randn(4) for text in "ab12"}
    assert compute_loss([("a", "1"), ("b", "2")], states, mask_duplicates=True).count == 2
    target = LossInputs(torch.zeros(0), torch.zeros(0), torch.zeros(0), 2, labeled_segments=torch.arange(4),
                        labels=torch.tensor([0.0, 1, 0, 1]), groups=torch.tensor([0, 0, 1, 1]))
    with pytest.raises(DataError, match="mask_duplicates compares texts"):
        ContrastiveConfig(mask_duplicates=True)(Outputs(pooled=torch.randn(4, 3)), target)


def test_triplet_ties_count_half() -> None:
    target = LossInputs(torch.zeros(0), torch.zeros(0), torch.zeros(0), 1, labeled_segments=torch.arange(3),
                        labels=torch.tensor([0.0, 1, 2]), groups=torch.zeros(3, dtype=torch.int64))
    for far, wanted in (((1.0, 0.0), 0.5), ((0.0, 1.0), 1.0)):
        states = torch.tensor([[1.0, 0.0], [1.0, 0.0], far])
        total, count = ContrastiveConfig(loss="triplet")(Outputs(pooled=states), target).metrics["match_accuracy"]
        assert float(total / count) == wanted
