"""Warnings before the first step: why a run cannot learn, or a setting has no effect.

Read `recipe.py` first. `training/learning_monitor.py` warns during training. Each function
returns sentences and needs:

| function                     | needs                                  |
|------------------------------|----------------------------------------|
| `find_unused_settings`       | the recipe alone                       |
| `find_data_problems`         | the encoded rows                       |
| `find_method_problems`       | the base with the method attached      |
| `find_schedule_problems`     | the number of steps                    |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from luthier.assembly.recipe import Recipe, list_unused_settings
from luthier.core.protocols import BatchSource, Family, Tuner
from luthier.core.types import TokenizedExample
from luthier.data import Datasets, InMemoryBatchSource
from luthier.methods.adalora import AdaLoraConfig
from luthier.methods.composite import list_parts
from luthier.methods.lora import LoraConfig
from luthier.methods.targets import matches_target
from luthier.models import ALIASES
from luthier.objectives.classify import ClassifyConfig
from luthier.objectives.contrastive import ContrastiveConfig
from luthier.objectives.grpo import GrpoConfig
from luthier.objectives.kto import KtoConfig
from luthier.objectives.ppo import PpoConfig
from luthier.objectives.reward import RewardConfig
from luthier.objectives.rl_config import OnlineRLConfig
from luthier.training.loop import count_total_steps
from luthier.training.optimizer import compute_lr_factor

MANY = 0.5  # share of the batches without a learning signal from which on they are worth a warning
TABLES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow")
UNUSED = "{} has no effect: {}"


# ---------------------------------------------------------------- of the recipe alone


def _has_other_loss(loss: str) -> Callable[[Recipe], bool]:
    """Whether the objective is contrastive, with another loss."""
    return lambda recipe: isinstance(recipe.objective, ContrastiveConfig) and recipe.objective.loss != loss


def _has_untrained_critic(recipe: Recipe) -> bool:
    return isinstance(recipe.objective, PpoConfig) and not recipe.objective.vf_coef


def _reads_none_of(*kinds: str) -> Callable[[Recipe], bool]:
    return lambda recipe: not recipe.objective.example_types & {f"{kind}Example" for kind in kinds}


def _has_eval_rows(recipe: Recipe) -> bool:
    return recipe.data.eval is not None


def _has_single_step_rounds(recipe: Recipe) -> bool:
    return isinstance(recipe.objective, OnlineRLConfig) and recipe.objective.is_single_step


SINGLE_STEP = "each round is one optimizer step (one epoch of one mini-batch) on the policy that generated it"
# (setting, when it has no effect, why). A setting is named only where it differs from its default.
RULES: tuple[tuple[str, Callable[[Recipe], bool], str], ...] = (
    ("training.save_total_limit", lambda recipe: not (_has_eval_rows(recipe) or recipe.training.save_steps),
     "only one checkpoint is written, at the end (set training.save_steps)"),
    ("optimizer.min_lr_ratio", lambda recipe: recipe.optimizer.lr_scheduler_type == "constant",
     "optimizer.lr_scheduler_type is constant"),
    ("evaluate.max_new_tokens", lambda recipe: not recipe.evaluate.metrics, "no answers are scored (evaluate.metrics)"),
    ("evaluate.batch_size", lambda recipe: not recipe.evaluate.metrics, "no answers are scored (evaluate.metrics)"),
    ("evaluate.max_samples", lambda recipe: not _has_eval_rows(recipe) and recipe.data.test is None,
     "there are no rows to evaluate on (data.test or data.eval)"),
    ("evaluate.before_training", lambda recipe: not _has_eval_rows(recipe) and recipe.data.test is None,
     "there are no rows to evaluate on (data.test or data.eval)"),
    ("model.pooling", lambda recipe: not recipe.objective.required_outputs & {"pooled", "scores"},
     "the objective uses no pooled state"),
    ("model.revision", lambda recipe: recipe.model.name_or_path in ALIASES or Path(recipe.model.name_or_path).exists(),
     "model.name_or_path is not a hub id"),
    ("data.loss_on", lambda recipe: "ChatExample" not in recipe.objective.example_types,
     "the objective does not read chats"),
    ("data.system", _reads_none_of("Chat", "Prompt", "Preference", "UnpairedPreference"),
     "the objective does not read chats or prompts"),
    ("data.share_prompt", _reads_none_of("Preference", "UnpairedPreference"),
     "the objective does not compare answers"),
    ("data.score_scale", lambda recipe: not (isinstance(recipe.objective, ContrastiveConfig)
                                            and recipe.objective.loss == "cosent"),
     "the objective reads no similarity scores (contrastive with loss: cosent)"),
    ("objective.symmetric", _has_other_loss("infonce"), "only loss: infonce uses it"),
    ("objective.mask_duplicates", _has_other_loss("infonce"), "only loss: infonce uses it"),
    ("objective.margin", _has_other_loss("triplet"), "only loss: triplet uses it"),
    ("objective.labels", _has_other_loss("supcon"), "only loss: supcon uses it"),
    ("objective.temperature", lambda recipe: isinstance(recipe.objective, ContrastiveConfig)
     and recipe.objective.loss == "triplet", "loss: triplet uses margin instead"),
    ("objective.cliprange", _has_single_step_rounds, SINGLE_STEP),
    ("objective.epsilon", _has_single_step_rounds, SINGLE_STEP),
    ("objective.epsilon_high", _has_single_step_rounds, SINGLE_STEP),
    ("objective.early_stop_kl", _has_single_step_rounds, SINGLE_STEP),
    ("objective.cliprange_value", _has_single_step_rounds, SINGLE_STEP),
    ("objective.cliprange_value", _has_untrained_critic, "objective.vf_coef is 0, so the critic is not trained"),
    ("objective.critic", _has_untrained_critic, "objective.vf_coef is 0, so the critic is not trained"),
    ("objective.kl_penalty_in", lambda recipe: isinstance(recipe.objective, PpoConfig) and not recipe.objective.kl_coef,
     "objective.kl_coef is 0"),
)


def find_unused_settings(recipe: Recipe) -> list[str]:
    """Settings that have no effect, each with the reason."""
    unused_settings = [UNUSED.format(setting, reason) for setting, unused, reason in RULES
             if _is_changed(recipe, setting) and unused(recipe)]
    return list(dict.fromkeys([*list_unused_settings(recipe), *unused_settings, *_find_unused_sources(recipe),
                               *_find_unused_rewards(recipe)]))


def _is_changed(recipe: Recipe, setting: str) -> bool:
    """Whether the recipe has this setting with another value than its default."""
    part, _, name = setting.partition(".")
    config = recipe.__dict__[part]
    field = type(config).model_fields.get(name)
    return field is not None and config.__dict__[name] != field.get_default(call_default_factory=True)


def _find_unused_sources(recipe: Recipe) -> Iterator[str]:
    sources = recipe.data.train
    weights = {source.weight for source in sources}
    if recipe.training.max_steps and len(weights) == 1 and weights != {1.0}:
        yield UNUSED.format("data.train: weight", "all sources have the same, and training.max_steps is given")
    for source in sources:
        if source.document != "auto" and source.path.endswith(TABLES):
            yield UNUSED.format("data.train: document", f"{source.path!r} is not plain text")


def _find_unused_rewards(recipe: Recipe) -> Iterator[str]:
    if not isinstance(recipe.objective, OnlineRLConfig):
        return
    rewards = recipe.objective.reward
    for reward in rewards:
        name = reward.function or reward.model or reward.url
        if not reward.weight:
            yield f"objective.reward: {name!r} has weight 0, so it has no effect on training"
    scaled = isinstance(recipe.objective, GrpoConfig) and recipe.objective.advantage_estimator == "grpo"
    if scaled and len(rewards) == 1 and rewards[0].weight > 0 and rewards[0].weight != 1:
        yield UNUSED.format("objective.reward: weight", "there is only one reward, and advantages are divided by its "
                                                        "standard deviation")


# ---------------------------------------------------------------- of the rows


def find_data_problems(recipe: Recipe, datasets: Datasets) -> list[str]:
    """Why nothing can be learned from the rows, or less than expected. Streamed rows are not known yet."""
    if not datasets.train:
        return []
    objective = recipe.objective
    if isinstance(objective, KtoConfig):
        return list(_check_verdicts(datasets.train))
    if isinstance(objective, ClassifyConfig):
        return list(_check_classes(recipe, objective, datasets))
    if isinstance(objective, ContrastiveConfig):
        return list(_check_contrast(recipe, objective, datasets))
    widest = max((len(one.labeled_spans) for one in datasets.train), default=0)
    if isinstance(objective, RewardConfig) and objective.ranking == "all_pairs" and widest == 2:
        return [UNUSED.format("objective.ranking", "every row has two answers, for which both losses are equal")]
    return []


def _check_verdicts(train: Sequence[TokenizedExample]) -> Iterator[str]:
    labels = {item.label for one in train for item in one.labeled_spans if item.label in (0.0, 1.0)}
    if len(labels) == 1:
        there, missing, weight = ("desirable", "undesirable", "undesirable_weight") if labels == {1.0} else (
            "undesirable", "desirable", "desirable_weight")
        yield (f"all {len(train)} train rows are {there} (label {'true' if labels == {1.0} else 'false'}), and KTO "
               f"needs both kinds: add {missing} rows (objective.{weight} balances them)"
               + ("; with good answers only, use objective: sft" if labels == {1.0} else ""))


def _check_classes(recipe: Recipe, objective: ClassifyConfig, datasets: Datasets) -> Iterator[str]:
    items = [item for one in datasets.train for item in one.labeled_spans]
    if objective.task == "regression":
        if len({item.label for item in items}) == 1:
            yield f"all {len(items)} train rows have the label {items[0].label:g}: only a constant can be learned"
        return
    if objective.task == "multi":
        for index, name in enumerate(objective.labels):
            flags = {item.label[index] for item in items if isinstance(item.label, tuple)}
            if len(flags) == 1:
                yield (f"{'all' if flags == {1.0} else 'none'} of the {len(items)} train rows have the class {name!r}: "
                       "it cannot be learned")
        return
    missing = [name for name in objective.labels if not datasets.counts.get(name)]
    if len(objective.labels) - len(missing) == 1:
        there = next(name for name in objective.labels if name not in missing)
        yield f"all train rows have the class {there!r}: add rows of other classes"
    elif missing:
        yield f"no train row has the class {missing[0]!r}" + (f", nor {len(missing) - 1} others" if missing[1:] else "")
    elif objective.task == "single" and not recipe.data.shuffle and recipe.training.batch_size > 1:
        flat, total = _count_batches(recipe, datasets, lambda batch: len({one.labeled_spans[0].label
                                                                          for one in batch}) == 1)
        if flat >= MANY * total:
            yield (f"in {flat} of {total} batches of an epoch all rows have one class, and data.shuffle is false: "
                   "shuffle the rows")


def _check_contrast(recipe: Recipe, objective: ContrastiveConfig, datasets: Datasets) -> Iterator[str]:
    kinds = {"infonce": _has_no_negative, "supcon": _has_no_contrast, "cosent": _has_no_order, "triplet": _has_no_gap}
    flat, total = _count_batches(recipe, datasets,
                                 lambda batch: kinds[objective.loss](batch, objective.mask_duplicates))
    reasons = {
        "infonce": "no anchor has a negative that differs from its positive (negatives are the batch's other "
                   "positives)",
        "supcon": "no row has both another row of its class and one of another class",
        "cosent": "all pairs have the same score, so there is no order to learn",
        "triplet": "every negative is the same text as its positive"}
    if flat >= MANY * total:
        what = "every batch" if flat == total else f"{flat} of {total} batches of an epoch"
        yield (f"nothing can be learned from {what}: {reasons[objective.loss]}; raise training.batch_size "
               f"({recipe.training.batch_size}), or give rows that differ")
    if objective.loss != "infonce":
        return
    seen = Counter(item.text_id for one in datasets.train for item in one.labeled_spans if item.label == 1)
    twice = sum(count for text, count in seen.items() if text is not None and count > 1)
    if twice and not objective.mask_duplicates and flat < total:
        yield (f"{twice} of {sum(seen.values())} positives occur more than once, and where two share a batch each "
               "counts as a negative of the other's anchor; objective.mask_duplicates: true leaves those negatives out")
    if objective.mask_duplicates and not _has_duplicates(datasets.train):
        yield UNUSED.format("objective.mask_duplicates", "no text occurs in two train rows")


def _has_duplicates(train: Sequence[TokenizedExample]) -> bool:
    texts = Counter(text for one in train for text in {item.text_id for item in one.labeled_spans})
    return any(count > 1 for count in texts.values())


def _get_text_key(one: TokenizedExample, place: int) -> Any:
    """A key by which texts are compared; every image has a key of its own."""
    text = one.labeled_spans[place].text_id
    return (id(one), place) if text is None else text


def _has_no_negative(batch: Sequence[TokenizedExample], masked: bool) -> bool:
    """Pairs: whether the loss of every anchor is a constant."""
    anchors = [_get_text_key(one, 0) for one in batch]
    positives = [{_get_text_key(one, i) for i, item in enumerate(one.labeled_spans) if item.label == 1}
                 for one in batch]
    others = {_get_text_key(one, i) for one in batch for i, item in enumerate(one.labeled_spans) if item.label != 0}
    if masked:  # see `objectives.contrastive.find_false_negatives`
        known: dict[Any, set[Any]] = {}
        for anchor, own in zip(anchors, positives, strict=True):
            known.setdefault(anchor, {anchor}).update(own)
        positives = [known[anchor] for anchor in anchors]
    return all(others <= own for own in positives)


def _has_no_contrast(batch: Sequence[TokenizedExample], _: bool) -> bool:
    counts = Counter(item.label for one in batch for item in one.labeled_spans)
    return len(counts) == 1 or max(counts.values()) == 1


def _has_no_order(batch: Sequence[TokenizedExample], _: bool) -> bool:
    return len({one.labeled_spans[0].label for one in batch}) == 1


def _has_no_gap(batch: Sequence[TokenizedExample], _: bool) -> bool:
    return all({_get_text_key(one, i) for i, item in enumerate(one.labeled_spans) if item.label != 0}
               == {_get_text_key(one, i) for i, item in enumerate(one.labeled_spans) if item.label == 1}
               for one in batch)


def _count_batches(recipe: Recipe, datasets: Datasets, is_flat: Callable[[Sequence[TokenizedExample]],
                                                                         bool]) -> tuple[int,
                                                                                                                  int]:
    """(number of the first epoch's batches for which `is_flat` holds, number of batches)."""
    size = recipe.training.batch_size
    order = InMemoryBatchSource(datasets.train, size, None, shuffle=recipe.data.shuffle, seed=recipe.seed,
                                mix=datasets.mix).order(0)
    batches = [[datasets.train[i] for i in order[at:at + size]] for at in range(0, len(order), size)]
    return sum(map(is_flat, batches)), len(batches)


# ---------------------------------------------------------------- of the method on its base


def find_method_problems(recipe: Recipe, base: Family, tuner: Tuner) -> list[str]:
    """Ranks above the size of a weight matrix, patterns without a match, weight decay of vectors."""
    parameters, problems = tuner.parameters(), []
    for part in list_parts(recipe.method):
        if isinstance(part, LoraConfig):
            for setting, patterns in (("rank_pattern", part.rank_pattern), ("alpha_pattern", part.alpha_pattern)):
                problems += [UNUSED.format(f"method.{setting}: {pattern!r}", "it matches no target")
                          for pattern in patterns
                          if not any(matches_target(site, pattern)
                                                             for site in base.structure.linears)]
        if isinstance(part, LoraConfig | AdaLoraConfig):
            problems += _check_ranks(part.name, [site for site in base.structure.linears if any(
                f".{site.name}." in f".{name}." for name in parameters)], {
                    name: tuple(parameter.shape) for name, parameter in parameters.items()})
    if recipe.optimizer.weight_decay and all(parameter.ndim < 2 for parameter in parameters.values()):
        problems.append(UNUSED.format("optimizer.weight_decay", "only vectors train, and weight decay skips vectors"))
    return problems


def _check_ranks(method: str, sites: Sequence[Any], shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """A sentence if a rank exceeds the largest possible rank of its weight matrix."""
    above = []
    for site in sites:
        ranks = [shape[0] for name, shape in shapes.items() if f".{site.name}.lora_A" in f".{name}" and len(shape) == 2]
        above += [(rank, site) for rank in ranks if rank > min(site.in_features, site.out_features)]
    if not above:
        return []
    rank, site = above[0]
    largest = min(site.in_features, site.out_features)
    field = "target_r" if method == "adalora" else "rank"
    return [f"method.{field}: {method} has rank {rank} on {site.name!r}, a linear layer from {site.in_features} to "
            f"{site.out_features} features, whose rank is at most {largest} ({len(above)} such layers); a higher rank "
            f"has no effect"]


# ---------------------------------------------------------------- of the number of steps


def find_schedule_problems(recipe: Recipe, feed: BatchSource) -> list[str]:
    """Settings whose step is never reached within the run."""
    training, problems = recipe.training, []
    total = count_total_steps(training, feed.steps_per_epoch)
    length = f"the run has {total} step{'s' if total > 1 else ''}"
    if all(compute_lr_factor(recipe.optimizer, step, total) < 1 for step in range(total)):
        warmup = recipe.optimizer.count_warmup_steps(total)
        problems.append(f"optimizer.learning_rate is never reached: the warm-up has {warmup} steps, and {length}")
    if training.save_steps and training.save_steps > total:
        problems.append(UNUSED.format(f"training.save_steps {training.save_steps}", length))
    every = training.eval_steps or feed.steps_per_epoch or total
    if recipe.data.eval is not None:
        if training.eval_steps and training.eval_steps > total:
            problems.append(UNUSED.format(f"training.eval_steps {training.eval_steps}",
                                       f"{length}; its end is evaluated anyway"))
        evaluations = total // every + (total % every > 0)
        if training.early_stopping_patience and training.early_stopping_patience >= evaluations:
            problems.append(UNUSED.format(f"training.early_stopping_patience {training.early_stopping_patience}",
                                       f"{length}, with {evaluations} evaluations"))
    return problems
