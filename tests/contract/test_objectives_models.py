"""Objectives on a model: a shared prompt is a repeated one, cutting a batch changes nothing, and each of them learns.

Read `lab.py` and `cases.py` first; the losses themselves are held against others' in `test_objectives_*.py`.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from lab import Dice, apart, attach, base
from torch import Tensor

from cases import PREFERENCES, make_objective
from luthier.assembly.factory import attach_heads
from luthier.core.examples import Origin
from luthier.core.protocols import Tuner
from luthier.core.types import LabeledSpan, TokenizedExample, TokenSpan
from luthier.data.packing import pack_examples
from luthier.models import CausalLM
from luthier.training import grad_cache
from luthier.training.optimizer import Optimizer, OptimizerConfig
from luthier.training.step import evaluate_batches, forward_objective, step

COMPARED = (*PREFERENCES, "reward", "multiple_choice")
CLASSIFY: list[tuple[str, dict[str, Any]]] = [("classify", {"task": task, "labels": labels}) for task, labels in (
    ("single", ("a", "b", "c")), ("multi", ("a", "b", "c")), ("regression", ()), ("tokens", ("a", "b", "c")))]
CONTRASTIVE: list[tuple[str, dict[str, Any]]] = [("contrastive", {"loss": kind, "learn_temperature": kind != "triplet"})
                                                 for kind in ("infonce", "supcon", "cosent", "triplet")]
EVERY = [*((name, {}) for name in (*COMPARED, "kto")), *CLASSIFY, *CONTRASTIVE]
NAMED = pytest.mark.parametrize(("name", "settings"), EVERY, ids=[" ".join([n, *map(str, s.values())][:2]) for n, s in EVERY])


def with_prompts(labels: list[list[float]], shared: bool) -> list[TokenizedExample]:
    """A prompt and its answers: as a tree, or each answer as a document behind a prompt of its own."""
    rng, found = Dice(9), []
    for number, group in enumerate(labels):
        prompt = rng.span(9 - number, masked=9 - number)
        answers = [rng.span(3 + (number + 2 * i) % 5, 0) for i in range(len(group))]
        answers = [TokenSpan(span.ids, (1.0,) * len(span.ids), 0) for span in answers]
        alone = [TokenSpan(prompt.ids + span.ids, prompt.weights + span.weights) for span in answers]
        items = tuple(LabeledSpan(i + shared, label) for i, label in enumerate(group))
        found.append(TokenizedExample((prompt, *answers) if shared else tuple(alone), Origin("lab", number), labeled_spans=items))
    return found


def roots(labels: list[list[Any]]) -> list[TokenizedExample]:
    """Texts that are judged as a whole; where `labels` are empty, their words carry tags: the numbers 0 to 2."""
    rng, found = Dice(11), []
    for number, group in enumerate(labels):
        spans = [rng.span(4 + (number + 3 * i) % 6) for i in range(max(len(group), 1))]
        if not group:
            spans = [TokenSpan(tuple(token % 3 for token in span.ids), span.weights) for span in spans]
        found.append(TokenizedExample(tuple(spans), Origin("lab", number), labeled_spans=tuple(LabeledSpan(i, label) for i, label in enumerate(group))))
    return found


def rows(name: str, settings: dict[str, Any], shared: bool = True) -> list[TokenizedExample]:
    if name in COMPARED:
        return with_prompts([[0, 1], [1, 0], [2, 0, 1]], shared)
    if name == "kto":
        return with_prompts([[1, -1], [0, -1], [0, -1]], shared)
    flags = [(1.0, 0.0, 1.0), (0.0, 0.0, 1.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0)]
    kinds: dict[str, list[list[Any]]] = {
        "single": [[0], [1], [2], [0]], "multi": [[flag] for flag in flags], "regression": [[0.5], [-1.0], [2.0], [0.0]],
        "tokens": [[]] * 4, "supcon": [[0], [1], [0], [1]], "cosent": [[x, x] for x in (0.1, 0.8, 0.4)]}
    return roots(kinds.get(settings.get("task", settings.get("loss")), [[0, 1, 2], [0, 1, 2], [0, 1, 2]]))


def ready(name: str, settings: dict[str, Any]) -> tuple[CausalLM, Any, Tuner]:
    objective, family = make_objective(name, **settings), base("llama")
    attached = attach_heads(family, attach(family, "lora"), objective, 3)
    for head in family.heads.modules.values():
        head.double()  # heads are made in float32
    return family, objective, attached


def measured(family: CausalLM, objective: Any, attached: Tuner, examples: list[TokenizedExample], micro: int | None) -> dict[str, Tensor]:
    """Loss and gradients as a step takes them."""
    for parameter in attached.parameters().values():
        parameter.grad = None
    batches = pack_examples(examples, micro)
    count = sum(objective.count(batch.target) for batch in batches)
    run = partial(forward_objective, family, objective, reference=attached.disabled)
    losses = [grad_cache.backward(run, objective, part, count, family.device, nullcontext)[0]
              for part in ([batches] if objective.needs_full_batch else [[batch] for batch in batches])]
    return {"loss": sum(losses), **{n: p.grad for n, p in attached.parameters().items()}}


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", [*COMPARED, "kto"])
def test_shared_prompt_equals_repeated_prompt(name: str) -> None:
    family, objective, attached = ready(name, {})
    shared, repeated = (measured(family, objective, attached, rows(name, {}, way), None) for way in (True, False))
    assert apart(shared, repeated) < 1e-9
    other = [TokenizedExample(e.spans, e.origin, labeled_spans=e.labeled_spans[::-1]) for e in rows(name, {})]  # the control: other items' labels
    swapped = [TokenizedExample(e.spans, e.origin, labeled_spans=tuple(LabeledSpan(i.span_index, j.label) for i, j in zip(e.labeled_spans, e.labeled_spans[::-1], strict=True)))
               for e in rows(name, {})]
    assert apart(measured(family, objective, attached, other, None), shared) < 1e-9
    assert apart(measured(family, objective, attached, swapped, None), shared) > 1e-3


@pytest.mark.usefixtures("double")
@NAMED
def test_micro_batch_size_does_not_matter(name: str, settings: dict[str, Any]) -> None:
    family, objective, attached = ready(name, settings)
    examples = rows(name, settings)
    assert len(pack_examples(examples, 12)) > 1
    assert apart(measured(family, objective, attached, examples, 12), measured(family, objective, attached, examples, None)) < 1e-9


@NAMED
def test_training_lowers_the_loss_and_evaluation_runs(name: str, settings: dict[str, Any]) -> None:
    family, objective, attached = ready(name, settings)
    batches = pack_examples(rows(name, settings), 24)
    before = evaluate_batches(family, objective, batches, attached.disabled)
    adam = Optimizer(attached.parameters(), attached.lr_multiplier, 1e-2, OptimizerConfig(lr_scheduler_type="constant"), 5)
    for i in range(5):
        adam.set_learning_rate(i)
        found = step(family, objective, batches, adam, reference=attached.disabled).read_metrics()
    after = evaluate_batches(family, objective, batches, attached.disabled)
    assert after["loss"] < before["loss"] - 0.02 * abs(before["loss"])
    assert found.keys() - {"grad_norm"} <= after.keys()


def test_reference_is_the_base_after_training() -> None:
    """DPO's reward of an answer is beta times its gain over the base; with a method that does nothing, none."""
    family, objective, attached = ready("dpo", {"beta": 2.0})
    batch, = pack_examples(rows("dpo", {}), None)
    with torch.no_grad():
        gain = evaluate_batches(family, objective, [batch], attached.disabled)
        with attached.disabled():
            none = evaluate_batches(family, objective, [batch], attached.disabled)
    assert none["rewards/margins"] == 0.0
    assert none["loss"] == pytest.approx(torch.tensor(2.0).log().item(), rel=1e-6)
    assert gain["rewards/chosen"] == pytest.approx(2.0 * (gain["logps/chosen"] - none["logps/chosen"]), rel=1e-5)
    assert abs(gain["rewards/chosen"]) > 1e-3
