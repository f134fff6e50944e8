"""Collects rollouts: the policy completes prompts, and the completions are scored. Read `rollout_batch.py` first.

A rollout takes the next prompts, samples several completions of each, computes their rewards, and computes once what
the loss needs of every token.

Where several processes train one model, each completes, scores and measures its share of the prompts. All of them then
hold the same rollout, and every reward is computed once for a completion.

Shape letters: N completions of a rollout, those of one prompt consecutive; M tokens of all completions, in that order;
P predictions of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from luthier.core.protocols import Family, SamplingParams
from luthier.core.types import TokenizedExample
from luthier.data.batch_source import InMemoryBatchSource
from luthier.rl.rewards import Completion, Reward, compute_rewards
from luthier.rl.rollout_batch import RolloutBatch, build_micro_batches

MIN_REWARD_SPREAD = 1e-8  # rewards that differ by no more are equal, as in TRL
LOGGED_SAMPLES = 4  # completions of a rollout that are written to samples.jsonl


@dataclass(frozen=True)
class ScoredCompletions:
    """Completions with their rewards, [N], and values of their tokens, name -> [M]."""

    completions: list[Completion]
    rewards: list[float]
    token_values: dict[str, Tensor]


class MapShards(Protocol):
    """How processes share work; see `luthier.distributed.process_group.map_shards`."""

    def __call__(self, function: Callable[[Sequence[TokenizedExample], int], ScoredCompletions],
                 items: Sequence[TokenizedExample]) -> list[ScoredCompletions]: ...


def _map_locally(function: Callable[[Sequence[TokenizedExample], int], ScoredCompletions],
                 items: Sequence[TokenizedExample]) -> list[ScoredCompletions]:
    return [function(items, 0)]


class RolloutObjective(Protocol):
    """What a rollout needs of its objective; see `objectives/rl_config.py`."""

    @property
    def num_generations(self) -> int: ...
    @property
    def max_new_tokens(self) -> int: ...
    @property
    def temperature(self) -> float: ...
    @property
    def generation_batch_size(self) -> int: ...
    @property
    def epochs_per_rollout(self) -> int: ...
    @property
    def num_mini_batches(self) -> int: ...
    @property
    def missing_eos_penalty(self) -> float: ...
    @property
    def early_stop_kl(self) -> float | None: ...
    @property
    def kl_coef(self) -> float: ...
    @property
    def rollout_outputs(self) -> frozenset[str]: ...
    def compute_advantages(self, rewards: Tensor, lengths: Tensor, found: Mapping[str, Tensor],
                kl_coef: float) -> dict[str, Tensor]: ...
    def update_kl_coef(self, kl_coef: float, kl: float) -> float: ...


class RolloutCollector:
    """Makes rollouts and evaluates policies.

    Args:
        prompts: one token span each, in the order that `cursor` numbers.
        objective: its settings of a rollout, and its advantages.
        rewards: each with its weight.
        cursor: which prompts are next; its batch size is the number of prompts of a rollout.
        max_tokens: the most tokens of a micro-batch; the completions of a prompt are split over several where needed.
        reference: makes the context in which the policy is the reference model.
        autocast: makes the context for mixed precision.
        map_shards: how several processes share the prompts of a rollout.
    """

    def __init__(self, prompts: Sequence[TokenizedExample], objective: RolloutObjective,
                 rewards: Sequence[tuple[Reward, float]], cursor: InMemoryBatchSource, max_tokens: int, seed: int = 0,
                 reference: Callable[[], AbstractContextManager[None]] = nullcontext,
                 autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
                 map_shards: MapShards = _map_locally) -> None:
        self.prompts, self.objective, self.rewards = prompts, objective, rewards
        self.cursor, self.max_tokens, self.seed = cursor, max_tokens, seed
        self.reference, self.autocast, self.map_shards = reference, autocast, map_shards
        self.kl_coef = objective.kl_coef
        self.rollouts = 0  # collected so far

    def state(self) -> dict[str, Any]:
        return {"cursor": self.cursor.state(), "rollouts": self.rollouts, "kl_coef": self.kl_coef}

    def load(self, state: Mapping[str, Any]) -> None:
        self.cursor.load(state["cursor"])
        self.rollouts, self.kl_coef = state["rollouts"], state["kl_coef"]

    def collect(self, policy: Family) -> RolloutBatch:
        """Complete the next prompts with the policy, dropout off, and score the completions."""
        selected = self._next_prompts()  # [n] prompts; N = n * num_generations
        self.rollouts += 1
        scored = self._sample_and_score(policy, [self.prompts[i] for i in selected], self.objective.num_generations,
                                        self.seed * 1_000_003 + self.rollouts, self.objective.rollout_outputs)
        lengths = torch.tensor([len(completion.token_ids) for completion in scored.completions])  # [N]
        rewards = torch.tensor(scored.rewards, dtype=torch.float64)  # [N]
        advantages = self.objective.compute_advantages(rewards, lengths, scored.token_values, self.kl_coef)  # [M] each
        metrics = _compute_metrics(scored) | _compute_reward_std(scored.rewards, self.objective.num_generations)
        if "kl" in metrics:
            # The coefficient that this rollout used is logged; the updated one is for the next.
            metrics["kl_coef"] = self.kl_coef
            self.kl_coef = self.objective.update_kl_coef(self.kl_coef, metrics["kl"])
        samples = [{"prompt": completion.prompt, "answer": completion.text, "reward": reward}
                   for completion, reward in zip(scored.completions[:LOGGED_SAMPLES], scored.rewards, strict=False)]
        dtype = next((values.dtype for values in scored.token_values.values()), torch.float32)
        for_loss = {name: values for name, values in scored.token_values.items() if name != "entropies"}
        return RolloutBatch(self.rollouts, selected, tuple(completion.token_ids for completion in scored.completions),
                            tuple(scored.rewards),
                            {name: values.to(dtype) for name, values in {**for_loss, **advantages}.items()},
                            metrics, tuple(samples))

    def evaluate(self, policy: Family, prompts: Sequence[TokenizedExample]) -> dict[str, float]:
        """Mean reward, and KL from the reference, of one sample per prompt with a fixed seed.

        `loss` is the negative reward, so that the best evaluation has the lowest loss here too.
        """
        if not prompts:
            return {}
        outputs = self.objective.rollout_outputs & {"reference_logps"}
        scored = self._sample_and_score(policy, prompts, 1, self.seed,
                                        outputs | ({"token_logps"} if outputs else set()))
        metrics = _compute_metrics(scored)
        return {"loss": -metrics["reward"], **metrics}

    def _next_prompts(self) -> tuple[int, ...]:
        """Indices of the prompts of the next rollout."""
        cursor = self.cursor
        if cursor.row >= len(order := cursor.order(cursor.epoch)):
            cursor.epoch, cursor.row = cursor.epoch + 1, 0
            order = cursor.order(cursor.epoch)
        selected = tuple(int(i) for i in order[cursor.row:cursor.row + cursor.batch_size])
        cursor.row += len(selected)
        return selected

    # ------------------------------------------------------------ generation

    @torch.no_grad()
    def _sample_and_score(self, policy: Family, prompts: Sequence[TokenizedExample], num_generations: int, seed: int,
                          outputs: frozenset[str]) -> ScoredCompletions:
        """Completions, rewards, and the named model outputs of their tokens; the same on all ranks."""
        training = policy.training
        policy.train(False)
        shards = self.map_shards(partial(self._sample_and_score_shard, policy, num_generations, seed, outputs), prompts)
        policy.train(training)
        return ScoredCompletions([completion for shard in shards for completion in shard.completions],
                                 [reward for shard in shards for reward in shard.rewards],
                                 {name: torch.cat([shard.token_values[name] for shard in shards])  # [M]
                                  for name in shards[0].token_values})

    def _sample_and_score_shard(self, policy: Family, num_generations: int, seed: int, outputs: frozenset[str],
                                prompts: Sequence[TokenizedExample], start: int) -> ScoredCompletions:
        """`_sample_and_score` of consecutive prompts; `start` is the index of the first among those of all ranks."""
        with self.autocast():
            completions = self._sample(policy, prompts, num_generations, seed, start)
            rewards = compute_rewards(completions, self.rewards)
            token_values = self._compute_token_values(policy, prompts, completions, outputs)
        penalty = self.objective.missing_eos_penalty
        # After the rewards are computed: a reward never sees the penalty.
        rewards = [r - penalty * (not c.finished) for c, r in zip(completions, rewards, strict=True)]
        return ScoredCompletions(completions, rewards, token_values)

    def _sample(self, policy: Family, prompts: Sequence[TokenizedExample], num_generations: int, seed: int,
                start: int = 0) -> list[Completion]:
        prompt_ids = [prompt.spans[0].ids for prompt in prompts for _ in range(num_generations)]  # N tuples
        # A completion's random numbers follow from its number and the seed, so they do not depend on the sharding.
        params = SamplingParams(self.objective.max_new_tokens, self.objective.temperature,
                                batch_size=self.objective.generation_batch_size, seed=seed,
                                first_prompt_index=start * num_generations)
        generated = sorted(policy.generate(prompt_ids, params), key=lambda output: output.index)
        tokenizer = policy.tokenizer
        texts = [_format_prompt(prompt, tokenizer) for prompt in prompts]
        return [Completion(texts[i // num_generations], tokenizer.decode(output.token_ids, skip_special_tokens=True),
                           prompts[i // num_generations].origin, prompts[i // num_generations].metadata, prompt_ids[i],
                           output.token_ids + ((output.stop_token,) if output.stop_token is not None else ()),
                           output.finished)
                for i, output in enumerate(generated)]

    def _compute_token_values(self, policy: Family, prompts: Sequence[TokenizedExample],
                              completions: Sequence[Completion], outputs: frozenset[str]) -> dict[str, Tensor]:
        """`old_logps`, `old_values`, `entropies` and `reference_logps` of the completions' tokens, [M] each, as far as
        `outputs` names them."""
        token_values: dict[str, Tensor] = {}
        if not outputs:
            return token_values
        token_ids = [completion.token_ids for completion in completions]
        for micro_batch, token_index in build_micro_batches(prompts, token_ids, (0.0,) * len(token_ids),
                                                            range(len(prompts)), self.max_tokens,
                                                            self.objective.temperature):
            batch = micro_batch.to(policy.device)
            found = policy.forward(batch.inputs, batch.target, outputs - {"reference_logps"})
            assert found.token_logps is not None
            values = {"old_logps": found.token_logps}  # [P] each
            if found.token_scores is not None:
                values["old_values"] = found.token_scores[:, 0]  # [P]
            if found.token_entropies is not None:
                values["entropies"] = found.token_entropies  # [P]
            if "reference_logps" in outputs:
                with self.reference():
                    logps = policy.forward(batch.inputs, batch.target, frozenset({"token_logps"})).token_logps
                assert logps is not None
                values["reference_logps"] = logps  # [P]
            for name, of_batch in values.items():
                whole = token_values.setdefault(name, torch.zeros(sum(map(len, token_ids)),
                                                                  dtype=found.token_logps.dtype))  # [M]
                whole[token_index] = of_batch.to(whole)  # [P] of the M tokens
        return token_values


# ---------------------------------------------------------------- metrics


def _compute_metrics(scored: ScoredCompletions) -> dict[str, float]:
    """Means over the completions; `kl` in nats per completion, `entropy` in nats per token."""
    count, values = len(scored.completions), scored.token_values
    metrics = {"reward": sum(scored.rewards) / count,
               "completion_length": sum(len(completion.token_ids) for completion in scored.completions) / count,
               "eos_rate": sum(completion.finished for completion in scored.completions) / count}
    if "entropies" in values:
        metrics["entropy"] = float(values["entropies"].double().mean())  # [M] -> []
    if "reference_logps" in values:
        # In float64: a sum over all M tokens, of differences that are close to zero.
        metrics["kl"] = float((values["old_logps"] - values["reference_logps"]).double().sum()) / count
    return metrics


def _compute_reward_std(rewards: Sequence[float], num_generations: int) -> dict[str, float]:
    """`reward_std` of all completions, and the share of groups whose rewards are all equal."""
    table = torch.tensor(rewards, dtype=torch.float64).view(-1, num_generations)  # [prompts, completions of each]
    metrics = {"reward_std": float(table.std()) if table.numel() > 1 else 0.0}
    if num_generations > 1:
        is_flat = table.amax(1) - table.amin(1) <= MIN_REWARD_SPREAD  # [prompts]
        metrics["frac_reward_zero_std"] = float(is_flat.double().mean())
    return metrics


def _format_prompt(prompt: TokenizedExample, tokenizer: Any) -> str:
    """The prompt as readable text; of a conversation, its last message."""
    given = prompt.metadata.get("prompt", "")
    return (given if isinstance(given, str) else str(given[-1]["content"])) or \
        str(tokenizer.decode(prompt.spans[0].ids, skip_special_tokens=True))
