"""Completions to train on, as plain data, and how they are packed into micro-batches. Read `data/packing.py` first.

A prompt and its completions are a segment tree, so the prompt is computed once for all of them.

Shape letters: N completions of a rollout, those of one prompt consecutive; M tokens of all completions, in that order;
P predictions of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luthier.core.types import Batch, LabeledSpan, TokenizedExample, TokenSpan
from luthier.data.packing import assign_rows, build_batch

DTYPES = {"torch.float32": torch.float32, "torch.float64": torch.float64}


@dataclass(frozen=True)
class RolloutBatch:
    """The completions of one rollout and what the loss needs of them.

    Args:
        number: of the rollout, from 1.
        prompts: indices of the prompts among all prompts, [n].
        completions: token ids of each completion, its stop token included, [N].
        rewards: [N].
        token_values: name -> [M]; `old_logps`, `advantages`, ...
        metrics: of the rollout, for the log. Not part of `state`.
        samples: some completions with their rewards, for `samples.jsonl`. Not part of `state`.
    """

    number: int
    prompts: tuple[int, ...]  # [n]
    completions: tuple[tuple[int, ...], ...]  # [N]
    rewards: tuple[float, ...]  # [N]
    token_values: Mapping[str, Tensor]  # name -> [M]
    metrics: Mapping[str, float] = field(default_factory=dict)
    samples: tuple[Mapping[str, Any], ...] = ()

    def state(self) -> dict[str, Any]:
        """A JSON value. The numbers are restored bit for bit."""
        dtype = next((str(values.dtype) for values in self.token_values.values()), "torch.float32")
        return {"number": self.number, "prompts": self.prompts, "completions": self.completions,
                "rewards": self.rewards, "dtype": dtype,
                "token_values": {name: values.tolist() for name, values in self.token_values.items()}}

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> RolloutBatch:
        dtype = DTYPES[state["dtype"]]
        token_values = {name: torch.tensor(values, dtype=dtype) for name, values in state["token_values"].items()}
        return RolloutBatch(state["number"], tuple(state["prompts"]), tuple(map(tuple, state["completions"])),
                            tuple(state["rewards"]), token_values)


def build_micro_batches(prompts: Sequence[TokenizedExample], completions: Sequence[tuple[int, ...]],
                        rewards: Sequence[float], selected: Sequence[int], max_tokens: int,
                        temperature: float) -> list[tuple[Batch, Tensor]]:
    """Micro-batches of the selected prompts and their completions.

    A tree that is longer than `max_tokens` is split into several, each with the prompt and some of its completions.

    Args:
        prompts: of the rollout, each with the same number of completions.
        completions, rewards: [N].
        selected: indices into `prompts`.
        temperature: of the log-probabilities; that of sampling.

    Returns:
        Each micro-batch with the indices of its predictions among all M tokens, [P].
    """
    per_prompt = len(completions) // len(prompts)
    starts = np.concatenate([[0], np.cumsum([len(completion) for completion in completions])])  # [N + 1]
    trees: list[tuple[TokenizedExample, list[int]]] = []
    for index in selected:
        prompt = prompts[index].spans[0].ids
        groups: list[list[int]] = []
        available = 0
        for n in range(index * per_prompt, (index + 1) * per_prompt):
            size = len(completions[n])
            if not groups or size > available:
                groups.append([])
                available = max_tokens - len(prompt)  # every part repeats the prompt
            groups[-1].append(n)
            available -= size
        trees += [(_build_tree(prompts[index], completions, rewards, group), group) for group in groups]
    micro_batches = []
    for row in assign_rows([tree for tree, _ in trees], max_tokens):
        # In the order of the row: `build_batch` lists the predictions of its trees one after another.
        owners = [n for i in row for n in trees[i][1]]
        token_index = np.concatenate([np.arange(starts[n], starts[n + 1]) for n in owners])  # [P]
        batch = build_batch([trees[i][0] for i in row])
        batch = replace(batch, target=replace(batch.target, temperature=temperature))
        micro_batches.append((batch, torch.from_numpy(token_index)))  # [P]
    return micro_batches


def _build_tree(prompt: TokenizedExample, completions: Sequence[tuple[int, ...]], rewards: Sequence[float],
                group: Sequence[int]) -> TokenizedExample:
    """The prompt as the root, with some of its completions as children. Only the completions have weight."""
    root = TokenSpan(prompt.spans[0].ids, (0.0,) * len(prompt.spans[0].ids))
    children = [TokenSpan(completions[n], (1.0,) * len(completions[n]), 0) for n in group]
    return TokenizedExample((root, *children), prompt.origin,
                            labeled_spans=tuple(LabeledSpan(1 + i, rewards[n]) for i, n in enumerate(group)))
