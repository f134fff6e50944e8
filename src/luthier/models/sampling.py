"""Selects the next token of each sequence. Read `core/generation.py` first.

A token depends on the sequence's own logits, tokens and random numbers, never on the other sequences of a batch.

Shape letters: B sequences, V vocabulary, K most probable tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from random import Random

import torch
from torch import Tensor

from luthier.core.generation import SamplingParams, SequenceRequest, TokenLogprob

NUCLEUS = 256  # most nuclei are smaller, and selecting so many is much faster than sorting a whole vocabulary


@dataclass(eq=False)
class SamplingState:
    """What the selection of a sequence's next token depends on, besides its logits."""

    request: SequenceRequest
    generated: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        sampling = self.request.sampling
        self._random = Random(f"{sampling.seed} {self.request.index}")
        self._counts: Counter[int] = Counter()

    def push(self, token: int) -> None:
        self.generated.append(token)
        self._counts[token] += 1

    def draw(self) -> float:
        """The sequence's next random number in [0, 1); one for each token, also where greedy decoding ignores it."""
        return self._random.random()

    def adjust(self, logits: Tensor) -> Tensor:
        """[V] logits after penalties, bias and the grammar."""
        sampling = self.request.sampling
        if sampling.changes_logits:
            logits = self._apply_penalties(logits.clone(), sampling)
        if self.request.allowed_tokens is not None:
            allowed = self.request.allowed_tokens(self.generated)
            if allowed is not None:
                logits = logits.masked_fill(~allowed.to(logits.device), -torch.inf)
        return logits

    def _apply_penalties(self, logits: Tensor, sampling: SamplingParams) -> Tensor:
        if sampling.repetition_penalty != 1:
            seen = _index(sorted({*self.request.prompt, *self._counts}), logits)
            old = logits[seen]
            logits[seen] = torch.where(old > 0, old / sampling.repetition_penalty, old * sampling.repetition_penalty)
        if self._counts and (sampling.presence_penalty or sampling.frequency_penalty):
            counts = torch.tensor(list(self._counts.values()), dtype=logits.dtype, device=logits.device)
            logits[_index(self._counts, logits)] -= sampling.presence_penalty + sampling.frequency_penalty * counts
        if sampling.logit_bias:
            bias = torch.tensor(list(sampling.logit_bias.values()), dtype=logits.dtype, device=logits.device)
            logits[_index(sampling.logit_bias, logits)] += bias
        return logits


def _index(tokens: Iterable[int], like: Tensor) -> Tensor:
    return torch.tensor(list(tokens), dtype=torch.int64, device=like.device)


def select_tokens(logits: Tensor, states: Sequence[SamplingState]) -> list[int]:
    """The next token of each sequence, from its logits [B, V]."""
    uniforms = [state.draw() for state in states]
    adjusted = [i for i, state in enumerate(states)
                if state.request.sampling.changes_logits or state.request.allowed_tokens is not None]
    if adjusted:
        logits = logits.clone()
        for i in adjusted:
            logits[i] = states[i].adjust(logits[i])
    groups: dict[tuple[float, ...], list[int]] = {}
    for i, state in enumerate(states):
        s = state.request.sampling
        groups.setdefault((s.temperature, s.top_p, s.top_k, s.min_p) if s.temperature else (0.0,), []).append(i)
    tokens = [0] * len(states)
    for members in groups.values():
        rows = logits if len(members) == len(states) else logits[members]
        selected = sample_tokens(rows, states[members[0]].request.sampling, [uniforms[i] for i in members])
        for i, token in zip(members, selected.tolist(), strict=True):
            tokens[i] = token
    return tokens


def compute_token_logprobs(logits: Tensor, tokens: Sequence[int],
                           states: Sequence[SamplingState]) -> list[TokenLogprob | None]:
    """For each sequence that asks for it the log-probability of its token, from the logits [B, V] of the model."""
    found: list[TokenLogprob | None] = [None] * len(states)
    for i, state in enumerate(states):
        count = state.request.sampling.logprobs
        if count is None:
            continue
        every = logits[i].to(_wide(logits)).log_softmax(-1)  # [V]
        values, order = every.topk(min(count, every.shape[0]))  # [K]
        top = tuple(zip(order.tolist(), values.tolist(), strict=True))
        found[i] = TokenLogprob(tokens[i], float(every[tokens[i]]), top)
    return found


def sample_tokens(logits: Tensor, sampling: SamplingParams, uniforms: Sequence[float]) -> Tensor:
    """[B] The next token of each row, all rows with the same parameters.

    Greedy at temperature 0. Otherwise inverse transform sampling: the token at which the cumulative probability exceeds
    the row's uniform number u in [0, 1), after temperature, then `top_k`, then nucleus filtering by `top_p`, then
    `min_p`.

    Args:
        logits: [B, V].
        uniforms: [B] a uniform random number for each row.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits.to(_wide(logits)) / sampling.temperature
    draws = torch.tensor(uniforms, dtype=logits.dtype, device=logits.device)[:, None]  # [B, 1]
    if sampling.top_k:
        values, order = logits.topk(min(sampling.top_k, logits.shape[-1]))  # [B, K]
        return _pick(_filter(values.softmax(-1), sampling), draws, order)
    if sampling.top_p == 1:
        return _pick(_filter(logits.softmax(-1), sampling), draws, None)
    probabilities = logits.softmax(-1)  # [B, V]
    values, order = probabilities.topk(min(NUCLEUS, logits.shape[-1]))  # [B, K]
    tokens = _pick(_filter(values, sampling), draws, order)
    wide = (values.sum(-1) < sampling.top_p).nonzero()[:, 0]  # rows whose nucleus is larger than that
    if len(wide):
        values, order = probabilities[wide].sort(descending=True)
        tokens[wide] = _pick(_filter(values, sampling), draws[wide], order)
    return tokens


def _filter(probabilities: Tensor, sampling: SamplingParams) -> Tensor:
    """[B, K] probabilities with 0 for tokens outside the nucleus and below `min_p`. For `top_p` they are sorted."""
    if sampling.top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        before[:, 0] = 0  # exactly 0: rounding must never remove the most probable token
        probabilities = probabilities.where(before < sampling.top_p, 0)
    if sampling.min_p > 0:
        probabilities = probabilities.where(probabilities >= sampling.min_p * probabilities.amax(-1, keepdim=True), 0)
    return probabilities


def _pick(probabilities: Tensor, draws: Tensor, order: Tensor | None) -> Tensor:
    """[B] The token at which the cumulative probability exceeds the row's draw [B, 1]; `order` names the tokens."""
    reached = probabilities.cumsum(-1)  # [B, K]
    picked = torch.searchsorted(reached, draws * reached[:, -1:], right=True).clamp(max=probabilities.shape[-1] - 1)
    return (picked if order is None else order.gather(-1, picked))[:, 0]


def _wide(logits: Tensor) -> torch.dtype:
    return torch.float32 if logits.device.type == "mps" else torch.float64  # MPS does not support float64
