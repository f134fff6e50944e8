"""Random outputs and targets for every objective, and parts and other orders of them. Read `core/types.py` first.

    for name, case in cases().items():            # "classify-multi": one objective, float64, gradients on
        loss = case.objective(case.outputs, case.target)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from luthier.core.types import Loss, LossInputs, Outputs
from luthier.objectives import OBJECTIVES, SHORT_FORMS, expand_short_form
from luthier.objectives.base import ObjectiveConfig

PREFERENCES = ("dpo", *SHORT_FORMS, "simpo", "orpo")
ROLLOUT_COLUMNS = ("old_logps", "old_values", "advantages", "returns")
WEIGHTED = ("classify", "classify-multi", "classify-regression", "contrastive", "contrastive-symmetric", "contrastive-supcon",
            "contrastive-cosent", "contrastive-triplet", "reward", "reward-pairs", *PREFERENCES, "kto", "multiple_choice")
BY_ITEM = ("pooled", "scores")


@dataclass(frozen=True)
class Case:
    """An objective with what it reads. `owner`: [P] the example that each prediction is of."""

    objective: ObjectiveConfig
    outputs: Outputs
    target: LossInputs
    owner: Tensor

    def loss(self) -> Loss:
        return self.objective(self.outputs, self.target)

    def leaves(self) -> dict[str, Tensor]:
        return {name: t for name, t in {**self.outputs.tensors(), **self.outputs.scalars}.items() if t.requires_grad}

    def select(self, examples: Sequence[int], generator: torch.Generator | None = None) -> Case:
        """Some of the examples, whose outputs stay in the same graph; with a generator in another order of everything."""
        number = torch.full((self.target.num_examples,), -1)
        number[torch.tensor(examples)] = torch.arange(len(examples))
        items = (number[self.target.groups] >= 0).nonzero()[:, 0]
        points = (number[self.owner] >= 0).nonzero()[:, 0]
        if generator is not None:
            items, points = (x[torch.randperm(len(x), generator=generator)] for x in (items, points))
        place = torch.full((self.target.labeled_segments.shape[0] + 1,), -1)  # the last entry: of predictions that are of no item
        place[items] = torch.arange(len(items))
        t = self.target
        part = replace(t, state_index=t.state_index[points], token_ids=t.token_ids[points], weights=t.weights[points], num_examples=len(examples),
                       labeled_segments=t.labeled_segments[items], labels=t.labels[items], margins=t.margins[items],
                       groups=number[t.groups[items]], item_of=place[t.item_of[points]],
                       precomputed={column: values[points] for column, values in t.precomputed.items()},
                       item_weights=t.item_weights[items] if len(t.item_weights) else t.item_weights,
                       soft_labels=t.soft_labels[items] if len(t.soft_labels) else t.soft_labels)
        outputs = {name: value[items if name in BY_ITEM else points] for name, value in self.outputs.tensors().items()}
        return Case(self.objective, Outputs(**outputs, scalars=self.outputs.scalars), part, number[self.owner[points]])


def cases(seed: int = 0) -> dict[str, Case]:
    """Name, with its variant after a dash, to a case; every objective has at least one."""
    rng = torch.Generator().manual_seed(seed)
    found = {name: _tokens(name, rng) for name in ("sft", "pretrain")}
    weights = {"a": 2.0, "c": 0.5}
    found |= {
        "classify": _items("classify", rng, [[i % 3] for i in range(9)], scores=3, classes="abc", class_weights=weights),
        "classify-multi": _items("classify", rng, [[(1.0, 0.0, 1.0)], [(0.0, 0.0, 0.0)], [(0.0, 1.0, 0.0)]], scores=3,
                                 task="multi", classes="abc", class_weights=weights),
        "classify-regression": _items("classify", rng, [[0.3], [-2.0], [5.5], [1.0]], scores=1, task="regression"),
        "classify-tokens": _tokens("classify", rng, 3, task="tokens", classes="abc", class_weights=weights),
        "contrastive": _items("contrastive", rng, [[0, 1, 2], [0, 1, 1], [0, 1], [0, 1, 2, 3]], pooled=5),
        "contrastive-symmetric": _items("contrastive", rng, [[0, 1, 2], [0, 1, 1], [0, 1]], pooled=5, symmetric=True, learn_temperature=True),
        "contrastive-supcon": _items("contrastive", rng, [[0], [1], [0], [2], [0], [1]], pooled=5, loss="supcon"),
        "contrastive-cosent": _items("contrastive", rng, [[x, x] for x in (0.1, 0.7, 0.3, 0.7, 1.0)], pooled=5, loss="cosent"),
        "contrastive-triplet": _items("contrastive", rng, [[0, 1, 2], [0, 1, 1, 2], [0, 1, 2, 3]], pooled=5, loss="triplet"),
        "reward": _items("reward", rng, [[0, 1], [2, 0, 1], [1, 0], [0, 3, 2, 1]], scores=1, margins=True),
        "reward-pairs": _items("reward", rng, [[0, 1], [2, 0, 1], [1, 0]], scores=1, margins=True, ranking="all_pairs",
                               center_rewards_coefficient=0.3),
    }
    found |= {name: answers(name, rng, [[0, 1], [2, 0, 1], [1, 0]]) for name in PREFERENCES}
    found |= {"kto": answers("kto", rng, [[1, -1], [0, -1], [0, -1], [1, -1]], desirable_weight=1.5)}
    found |= {"multiple_choice": answers("multiple_choice", rng, [[0, 1], [1, 0, 1], [1, 1, 1, 0]]),
              "multiple_choice-whole": answers("multiple_choice", rng, [[1, 0], [0, 1, 1]], per_token=False)}
    found |= {f"{name}-weighted": _weighted(found[name], rng) for name in WEIGHTED}
    return found | {
        name: answers(name, rng, [[0, 0, 0], [0, 0, 0]], 0, ROLLOUT_COLUMNS, **{kl: 0.1}) for name, kl in (("ppo", "kl_coef"), ("grpo", "beta"))}


def _weighted(case: Case, rng: torch.Generator) -> Case:
    """The case with a weight for each of its rows."""
    weights = torch.randint(1, 9, (case.target.num_examples,), generator=rng) / 4
    return replace(case, target=replace(case.target, item_weights=weights[case.target.groups]))


def answers(name: str, rng: torch.Generator, labels: Sequence[Sequence[float]], prompt: int = 2,
            known: Sequence[str] = (), **settings: object) -> Case:
    """Answers of 2 to 6 tokens, and `prompt` predicted tokens before each group; the weights are 1."""
    flat = [label for group in labels for label in group]
    groups = torch.tensor([g for g, group in enumerate(labels) for _ in group])
    lengths = torch.randint(2, 7, (len(flat),), generator=rng)
    item_of = torch.cat([torch.full((prompt * len(labels),), -1), torch.repeat_interleave(torch.arange(len(flat)), lengths)])
    owner = torch.cat([torch.arange(len(labels)).repeat_interleave(prompt), groups.repeat_interleave(lengths)])
    n = len(item_of)
    logps = [-size * torch.rand(n, generator=rng, dtype=torch.float64) for size in (1.5, 2)]  # KTO's z0 is above 0
    target = LossInputs(torch.arange(n), torch.zeros(n, dtype=torch.int64), torch.ones(n), len(labels),
                        labeled_segments=torch.arange(len(flat)), labels=torch.tensor(flat, dtype=torch.float32),
                        margins=torch.zeros(len(flat)), groups=groups, item_of=item_of,
                        precomputed={column: torch.randn(n, generator=rng, dtype=torch.float64) for column in known})
    outputs = Outputs(token_logps=logps[0].requires_grad_(), reference_logps=logps[1])
    if "token_scores" in (made := make_objective(name, **settings)).required_outputs:
        outputs = replace(outputs, token_scores=torch.randn(n, 1, generator=rng, dtype=torch.float64).requires_grad_())
    return Case(made, outputs, target, owner)


def _tokens(name: str, rng: torch.Generator, width: int = 0, **settings: object) -> Case:
    """Twelve predictions of four examples, each with another weight."""
    n = 12
    target = LossInputs(torch.arange(n), torch.arange(n) % 3, torch.rand(n, generator=rng) + 0.1, 4, 40,
                        item_of=torch.full((n,), -1))
    scores = torch.randn(n, max(width, 5), generator=rng, dtype=torch.float64)
    outputs = (Outputs(token_scores=scores[:, :width].clone().requires_grad_()) if width else
               Outputs(token_logps=scores.log_softmax(-1)[:, 0].requires_grad_(), token_hits=scores.argmax(-1) == 0))
    return Case(_made(name, settings), outputs, target, torch.arange(n) // 3)


def _items(name: str, rng: torch.Generator, labels: Sequence[Sequence[object]], pooled: int = 0, scores: int = 0,
           margins: bool = False, **settings: object) -> Case:
    """One group for each list of labels."""
    flat = torch.tensor([label for group in labels for label in group], dtype=torch.float32)
    groups = torch.tensor([g for g, group in enumerate(labels) for _ in group])
    values = torch.randn(len(flat), pooled or scores, generator=rng, dtype=torch.float64).requires_grad_()
    given = torch.rand(len(flat), generator=rng) if margins else torch.zeros(len(flat))
    target = LossInputs(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0), len(labels),
                        labeled_segments=torch.arange(len(flat)), labels=flat, margins=given, groups=groups)
    made = _made(name, settings)
    scalars = {head.name: torch.tensor(head.start, dtype=torch.float64, requires_grad=True)
               for head in made.heads if head.kind == "scalar"}
    return Case(made, Outputs(**{"pooled" if pooled else "scores": values}, scalars=scalars), target,
                torch.zeros(0, dtype=torch.int64))


def make_objective(name: str, **settings: object) -> ObjectiveConfig:
    """The objective of a name or of a short form (`ipo`), with these settings."""
    given = expand_short_form({"name": name, **settings})
    return OBJECTIVES[given["name"]](**given)


def _made(name: str, settings: dict[str, object]) -> ObjectiveConfig:
    named = {"labels": tuple(str(settings["classes"]))} if "classes" in settings else {}
    return OBJECTIVES[name](**{key: value for key, value in settings.items() if key != "classes"} | named)
