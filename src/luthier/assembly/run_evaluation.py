"""What `train` measures before and after training: the objective's metrics and the scores of generated answers.

Read `evaluation/generation_eval.py` first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from luthier import data as rows
from luthier.assembly.factory import resolve_micro_batch_tokens
from luthier.assembly.recipe import Recipe
from luthier.core.types import TokenizedExample
from luthier.evaluation.generation_eval import EvalPrompt, GenerationScores, add_perplexity, evaluate_generations
from luthier.reporting.progress import Progress
from luthier.training.loop import OnlineFeed
from luthier.training.step import Reference, evaluate_batches

# Metrics of objectives; the first one that an objective has is the headline of results.json.
HEADLINES = ("reward", "perplexity", "spearman", "accuracy", "mrr", "rewards/accuracies", "nll")


def evaluate_objective(recipe: Recipe, base: Any, test: list[TokenizedExample], reference: Reference,
                       rollouts: OnlineFeed | None) -> dict[str, float]:
    """The objective's metrics on test rows."""
    base.train(False)
    if rollouts:
        return rollouts.evaluate(test[:recipe.evaluate.max_samples])
    batches = rows.build_eval_batches(test[:recipe.evaluate.max_samples], resolve_micro_batch_tokens(recipe, base))
    return add_perplexity(evaluate_batches(base, recipe.objective, batches, reference))


def pick_headline(when: str, measured: Mapping[str, float]) -> dict[str, Any]:
    """The headline metric where no answers are scored."""
    name = next((name for name in HEADLINES if name in measured), "loss")
    return {when: measured[name], "metric": name} if measured else {}


def pick_score(scores: Any, metric: str) -> Any:
    return scores.get(metric) if isinstance(scores, dict) else scores


def evaluate_answers(title: str, base: Any, prompts: Sequence[EvalPrompt], recipe: Recipe,
                     quiet: bool) -> GenerationScores:
    base.train(False)
    with Progress(len(prompts), title=title, quiet=quiet) as bar:
        return evaluate_generations(base, prompts, recipe.evaluate, tick=lambda done, total: bar.update(done))


def format_answers(prompts: Sequence[EvalPrompt], scored: GenerationScores) -> list[dict[str, str]]:
    return [{"prompt": q.text, "reference": q.reference, "answer": a}
            for q, a in zip(prompts, scored.answers, strict=True)]
