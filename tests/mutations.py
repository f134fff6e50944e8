"""Lines broken on purpose, each of which a test must notice.

    python -m tests.mutations [NAME ...]      every break, or those whose names begin with one of NAME

Each break is data: its name, a file below src/luthier, a text that occurs in it exactly once, what stands there instead,
and the tests that must notice it. The runner copies src into a temporary folder, first runs all named tests there with
nothing broken (they must pass), then applies one break at a time and runs that break's tests alone. A break is noticed
when one of its tests fails. The exit status is not 0 where any break is not noticed, was not applied or could not be run.

`tests/test_mutations.py` checks in the normal suite that every break still applies. Whoever changes a line that a break
names changes the break with it; whoever adds a rule adds a break.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "luthier"
LIMIT = 240.0  # seconds that the tests of one break may take
PRELOADED = ("torch", "transformers", "datasets", "peft", "trl", "pytest", "hypothesis", "scipy", "sklearn", "openai", "starlette",
             "uvicorn", "accelerate", "sentence_transformers", "tokenizers", "safetensors", "numpy", "pandas")


class Break(NamedTuple):
    """A line broken on purpose.

    Args:
        file: below src/luthier.
        text: occurs in the file exactly once.
        tests: node ids, short ones; one of them at least must fail.
    """

    name: str
    file: str
    text: str
    replacement: str
    tests: tuple[str, ...]


def on(file: str, *tests: str) -> tuple[str, ...]:
    return tuple(f"tests/{file}::{test}" for test in tests)


OPTIM, STEP, ROUNDS, ENGINE = ("unit/training/test_optimizer_values.py", "contract/test_step_and_loop.py",
                             "contract/test_rollout_rounds.py", "unit/serving/test_engine.py")
PARTS, LOSSES, ROLLS = "contract/test_attention_and_pooling.py", "contract/test_rollout_losses.py", "contract/test_rollouts.py"
PREFERENCE, OBJECTIVE, REWARD = ("contract/test_objectives_preference.py", "contract/test_objectives_cross_entropy.py",
                                 "contract/test_objectives_reward.py")
CONTRASTIVE, CLASSIFY, LAWS = ("contract/test_objectives_contrastive.py", "contract/test_objectives_classify.py",
                               "contract/test_objectives_invariants.py")
GENERATE, PACK, LOADER, EQUAL = ("unit/models/test_generate.py", "unit/data/test_packing.py", "unit/data/test_batch_source.py",
                                 "contract/test_equivalence.py")
CHOICE, HIDE = "contract/test_objectives_multiple_choice.py", "unit/data/test_masking.py"
ROUND, CUT = "contract/test_round_trip.py", "unit/data/test_truncated_prompts.py"


def laws(template: str) -> tuple[str, ...]:
    return (f"test_the_laws[{template}-bytes-texts0]",)


SCHEDULE_BREAKS = (
    Break("schedule-warm-up-one-early", "training/optimizer.py", "return (step + 1) / (warm + 1)", "return step / (warm + 1)", on(OPTIM, "test_the_warm_up_is_torchs_linear_one")),
    Break("schedule-warm-up-reaches-peak-early", "training/optimizer.py", "return (step + 1) / (warm + 1)", "return (step + 1) / warm", on(OPTIM, "test_the_warm_up_is_torchs_linear_one")),
    Break("schedule-warm-up-one-step-shorter", "training/optimizer.py", "if step < warm:", "if step < warm - 1:", on(OPTIM, "test_rates_by_hand")),
    Break("schedule-warm-up-not-taken-off", "training/optimizer.py", "(step - warm) / max(1, total - warm)", "step / max(1, total)", on(OPTIM, "test_rates_by_hand")),
    Break("schedule-share-of-steps-read-as-steps", "training/optimizer.py", "if self.warmup_steps is not None", "if self.warmup_steps is None", on(OPTIM, "test_rates_by_hand")),
    Break("schedule-cosine-upside-down", "training/optimizer.py", "(1 + math.cos(", "(1 - math.cos(", on(OPTIM, "test_after_the_warm_up_the_rates_are_those_of_transformers")),
    Break("schedule-cosine-without-floor", "training/optimizer.py", "return config.min_lr_ratio + fall *", "return fall *", on(OPTIM, "test_after_the_warm_up_the_rates_are_those_of_transformers")),
    Break("schedule-linear-is-constant", "training/optimizer.py", "return 1.0 - fall * done", "return 1.0", on(OPTIM, "test_after_the_warm_up_the_rates_are_those_of_transformers")),
    Break("schedule-floor-lost", "training/optimizer.py", "fall = 1.0 - config.min_lr_ratio", "fall = 1.0", on(OPTIM, "test_rates_by_hand")),
    Break("schedule-wsd-breakpoint", "training/optimizer.py", "max(0.0, done - 0.8) / 0.2", "max(0.0, done - 0.9) / 0.1", on(OPTIM, "test_wsd_is_that_of_transformers_with_a_linear_decay_over_the_last_fifth")),
    Break("schedule-goes-on-beyond-the-end", "training/optimizer.py", "done = min(1.0, (step", "done = min(9.0, (step", on(OPTIM, "test_beyond_the_last_step_the_rate_stays_at_its_floor")),
)

OPTIMIZER_BREAKS = (
    Break("optimizer-vectors-decay", "training/optimizer.py", "if parameter.ndim > 1 else 0.0", "if parameter.ndim > 0 else 0.0", on(OPTIM, "test_only_matrices_decay_and_by_rate_times_weight_decay")),
    Break("optimizer-nothing-decays", "training/optimizer.py", "decay = config.weight_decay if", "decay = 0.0 if", on(OPTIM, "test_only_matrices_decay_and_by_rate_times_weight_decay")),
    Break("optimizer-decay-is-not-decoupled", "training/optimizer.py", "torch.optim.AdamW(", "torch.optim.Adam(", on(OPTIM, "test_only_matrices_decay_and_by_rate_times_weight_decay")),
    Break("optimizer-betas-swapped", "training/optimizer.py", "betas=(config.adam_beta1, config.adam_beta2)", "betas=(config.adam_beta2, config.adam_beta1)", on(OPTIM, "test_the_update_is_adamws_formula")),
    Break("optimizer-epsilon-left-out", "training/optimizer.py", "eps=config.adam_epsilon,", "", on(OPTIM, "test_the_update_is_adamws_formula")),
    Break("optimizer-group-factor-lost", "training/optimizer.py", 'group["lr"] = rate * group["factor"]', 'group["lr"] = rate', on(OPTIM, "test_each_group_has_the_rate_of_its_step_times_its_own_factor")),
    Break("optimizer-clipping-off", "training/optimizer.py", "limit = math.inf if self.config.max_grad_norm is None else self.config.max_grad_norm", "limit = math.inf", on(OPTIM, "test_a_gradient_that_is_too_long_is_shortened_as_a_whole")),
    Break("optimizer-clips-where-it-is-off", "training/optimizer.py", "limit = math.inf if self.config.max_grad_norm is None else", "limit = 1.0 if self.config.max_grad_norm is None else", on(OPTIM, "test_a_short_gradient_and_one_without_a_limit_stay_as_they_are")),
    Break("optimizer-steps-on-nan", "training/optimizer.py", "elif bool(norm.isfinite()):", "elif True:", on(OPTIM, "test_a_gradient_that_is_not_finite_updates_nothing_and_is_gone")),
    Break("optimizer-gradients-stay", "training/optimizer.py", "self.adam.zero_grad(set_to_none=True)", "pass", on(STEP, "test_two_steps_do_not_add_up_their_gradients")),
    Break("optimizer-update-step-off-by-one", "training/optimizer.py", "hook.post_step(self._step + 1,", "hook.post_step(self._step,", on(OPTIM, "test_a_methods_update_is_told_the_number_of_the_step_that_was_made")),
    Break("optimizer-one-moment-not-saved", "training/optimizer.py", "for key, value in self.adam.state.get(parameter, {}).items():", "for key, value in list(self.adam.state.get(parameter, {}).items())[:2]:", on("unit/training/test_optimizer.py", "test_saved_moments_are_those_of_their_own_entries")),
)

STEP_BREAKS = (
    Break("step-count-of-first-micro-batch", "training/step.py", "count = sum(objective.count(batch.target) for batch in batches)", "count = objective.count(batches[0].target)", on(STEP, "test_a_step_has_the_gradient_of_the_whole_batch_divided_once")),
    Break("step-divides-by-micro-batches-too", "training/step.py", "part, count,", "part, count * len(batches),", on(STEP, "test_a_step_has_the_gradient_of_the_whole_batch_divided_once")),
    Break("step-loss-not-divided", "training/grad_cache.py", "        (part.total / count).backward()\n        return", "        part.total.backward()\n        return", on(STEP, "test_a_step_has_the_gradient_of_the_whole_batch_divided_once")),
    Break("step-mean-of-micro-batches", "training/grad_cache.py", "        (part.total / count).backward()\n        return", "        (part.total / part.count).backward()\n        return", on(STEP, "test_a_step_has_the_gradient_of_the_whole_batch_divided_once")),
    Break("step-reported-loss-not-divided", "training/grad_cache.py", "return part.total.detach() / count, part.metrics\n    states", "return part.total.detach(), part.metrics\n    states", on(STEP, "test_a_step_has_the_gradient_of_the_whole_batch_divided_once")),
    Break("step-last-micro-batch-lost", "training/step.py", "else [[batch] for batch in mine]:", "else [[batch] for batch in mine[:-1]]:", on(STEP, "test_a_step_has_the_gradient_of_the_whole_batch_divided_once")),
    Break("step-not-clipped", "training/step.py", "norm = optimizer.clip_grad_norm()", "norm = torch.zeros((), device=device)", on(STEP, "test_a_step_updates_with_the_clipped_gradient", "test_a_step_has_the_gradient_of_the_whole_batch_divided_once")),
    Break("step-reference-with-dropout", "training/step.py", "    family.train(False)  # a reference without dropout\n    with torch.no_grad(), reference():", "    with torch.no_grad(), reference():", on(STEP, "test_the_reference_is_asked_without_dropout_and_the_mode_comes_back")),
    Break("step-reference-leaves-evaluation-mode", "training/step.py", "    family.train(training)\n", "", on(STEP, "test_the_reference_is_asked_without_dropout_and_the_mode_comes_back", "test_what_trains_is_computed_with_dropout_beside_the_reference")),
    Break("step-reference-is-the-policy", "training/step.py", "with torch.no_grad(), reference():", "with torch.no_grad():", on("contract/test_objectives_models.py", "test_reference_is_the_base_after_training")),
    Break("step-known-reference-asked-again", "training/step.py", 'batch.target.precomputed.get("reference_logps")', "None", on(STEP, "test_a_known_reference_is_not_asked_again")),
    Break("measure-divisor", "training/step.py", "            part = objective(outputs, batch.target)\n            _add_metrics(sums, {**part.metrics, \"loss\": (part.total, part.count)})", "            part = objective(outputs, batch.target)\n            _add_metrics(sums, {**part.metrics, \"loss\": (part.total, 1.0)})", on(STEP, "test_measured_numbers_are_sums_divided_once")),
    Break("measure-mean-of-means", "training/step.py", "            part = objective(outputs, batch.target)\n            _add_metrics(sums, {**part.metrics, \"loss\": (part.total, part.count)})", "            part = objective(outputs, batch.target)\n            _add_metrics(sums, {**part.metrics, \"loss\": (part.total / part.count, 1.0)})", on(STEP, "test_measured_numbers_are_sums_divided_once")),
    Break("measure-counts-do-not-add-up", "training/step.py", "(old[0] + total, old[1] + n)", "(old[0] + total, n)", on(STEP, "test_measured_numbers_are_sums_divided_once")),
    Break("cached-gradients-other-dropout", "training/grad_cache.py", "        rng.restore_rng_state(state)  # the same dropout as in the first pass\n", "", on(CONTRASTIVE, "test_recomputed_parts_use_the_same_dropout")),
    Break("cached-gradients-not-divided", "training/grad_cache.py", "(part.total / count).backward()  # gradients of", "part.total.backward()  # gradients of", on(CONTRASTIVE, "test_batch_in_parts_equals_the_whole_batch")),
)

LOOP_BREAKS = (
    Break("loop-rate-one-step-late", "training/loop.py", "optimizer.set_learning_rate(summary.steps)", "optimizer.set_learning_rate(max(0, summary.steps - 1))", on(STEP, "test_every_step_has_the_rate_of_its_number")),
    Break("loop-rate-not-set", "training/optimizer.py", "        for group in self.adam.param_groups:\n", "        for group in self.adam.param_groups[:0]:\n", on(STEP, "test_a_step_is_made_with_the_rate_that_it_reports")),
    Break("loop-evaluates-with-dropout", "training/loop.py", "    job.family.train(False)\n    found = ", "    found = ", on(STEP, "test_the_loop_evaluates_without_dropout_and_trains_with_it")),
    Break("loop-trains-without-dropout-after-evaluation", "training/loop.py", "    job.family.train(True)\n    if \"eval_nll\"", "    if \"eval_nll\"", on(STEP, "test_the_loop_evaluates_without_dropout_and_trains_with_it")),
    Break("loop-evaluates-off-by-one", "training/loop.py", "summary.steps % eval_every == 0", "(summary.steps + 1) % eval_every == 0", on(STEP, "test_evaluations_come_when_they_should_and_at_the_end")),
    Break("loop-no-last-evaluation", "training/loop.py", "% eval_every == 0 or at_end)", "% eval_every == 0)", on(STEP, "test_evaluations_come_when_they_should_and_at_the_end")),
    Break("loop-best-is-the-highest", "training/loop.py", 'better = metrics["eval_loss"] < summary.best.get("eval_loss", math.inf)', 'better = metrics["eval_loss"] > summary.best.get("eval_loss", -math.inf)', on(STEP, "test_it_ends_with_the_weights_of_the_lowest_evaluation")),
    Break("loop-best-is-the-last-of-equals", "training/loop.py", 'metrics["eval_loss"] < summary.best', 'metrics["eval_loss"] <= summary.best', on(STEP, "test_it_ends_with_the_weights_of_the_lowest_evaluation")),
    Break("loop-best-not-loaded", "training/loop.py", 'summary.best["step"] != summary.steps', 'summary.best["step"] == summary.steps', on(STEP, "test_it_ends_with_the_weights_of_the_lowest_evaluation")),
    Break("loop-patience-never-forgets", "training/loop.py", "bad_evaluations = 0 if better else bad_evaluations + 1", "bad_evaluations = bad_evaluations if better else bad_evaluations + 1", on(STEP, "test_it_gives_up_after_as_many_evaluations_without_a_better_one")),
    Break("loop-patience-off-by-one", "training/loop.py", "bad_evaluations >= training.early_stopping_patience", "bad_evaluations > training.early_stopping_patience", on(STEP, "test_it_gives_up_after_as_many_evaluations_without_a_better_one")),
    Break("loop-epochs-rounded-down", "training/loop.py", "math.ceil(training.num_train_epochs", "math.floor(training.num_train_epochs", on(STEP, "test_a_fraction_of_an_epoch_is_rounded_up_to_steps")),
    Break("loop-seconds-doubled", "training/loop.py", "summary.seconds += clock.wall()", "summary.seconds += 2 * clock.wall()", on(STEP, "test_seconds_are_those_that_passed")),
    Break("loop-moments-not-restored", "training/loop.py", '    optimizer.load(saved.tensors["optimizer"])\n', "", on(STEP, "test_a_resumed_run_is_the_whole_one_step_by_step")),
    Break("loop-cursor-not-restored", "training/loop.py", '    job.feed.load(saved.state["feed"])\n', "", on(STEP, "test_a_resumed_run_is_the_whole_one_step_by_step")),
    Break("loop-random-state-not-restored", "training/loop.py", "    for sentence in ", "    for sentence in () and ", on(STEP, "test_a_resumed_run_is_the_whole_one_step_by_step")),
    Break("loop-weights-not-restored", "training/loop.py", '    job.attached.load(saved.tensors["method"])\n    optimizer', "    optimizer", on(STEP, "test_a_resumed_run_is_the_whole_one_step_by_step")),
)

DATA_BREAKS = (
    Break("loader-drops-an-example-between-steps", "data/batch_source.py", "self.row += len(chosen)", "self.row += len(chosen) + 1", on(LOADER, "test_an_epoch_sees_everything_once_and_knows_its_steps", "test_the_order_is_of_seed_and_epoch_alone")),
    Break("loader-every-epoch-in-one-order", "data/batch_source.py", "np.random.default_rng([self.seed, epoch])", "np.random.default_rng([self.seed])", on(LOADER, "test_the_order_is_of_seed_and_epoch_alone")),
    Break("loader-cursor-off-by-one", "data/batch_source.py", 'self.epoch, self.row = state["epoch"], state["row"]', 'self.epoch, self.row = state["epoch"], state["row"] + 1', on(LOADER, "test_a_cursor_goes_on_exactly")),
    Break("loader-weight-of-a-source-lost", "data/batch_source.py", "parts += [own] * whole", "parts += [own] * min(whole, 1)", on(LOADER, "test_a_weight_is_how_often_an_epoch_sees_a_source")),
    Break("pack-predicts-the-token-itself", "data/packing.py", "start + i - 1 if i else before", "start + i if i else before", on(PACK, "test_one_row_by_hand")),
    Break("pack-child-predicted-from-its-neighbour", "data/packing.py", "start + i - 1 if i else before", "start + i - 1", on(PACK, "test_one_row_by_hand")),
    Break("pack-positions-of-children-start-anew", "data/packing.py", "range(depth, depth + length)", "range(length)", on(PACK, "test_one_row_by_hand")),
    Break("pack-depth-off-by-one", "data/packing.py", "(start + length - 1, depth + length)", "(start + length - 1, depth + length - 1)", on(PACK, "test_one_row_by_hand")),
    Break("pack-parents-of-the-wrong-example", "data/packing.py", "first + span.parent if", "span.parent if", on(PACK, "test_one_row_by_hand")),
    Break("pack-weights-are-ones", "data/packing.py", "weights.append(span.weights[i])", "weights.append(1.0)", on(PACK, "test_one_row_by_hand")),
    Break("pack-rows-too-long", "data/packing.py", "room[row] -= tokens", "room[row] -= tokens - 1", on(PACK, "test_rows_are_filled_first_fit_decreasing_and_keep_order")),
    Break("pack-prompt-tokens-predicted", "core/types.py", "if weight and (i or self.parent >= 0))", "if i or self.parent >= 0)", on(EQUAL, "test_a_prediction_without_weight_is_not_computed")),
    Break("pack-first-token-of-a-child-not-predicted", "core/types.py", "(i or self.parent >= 0)", "i", on(PACK, "test_one_row_by_hand")),
    Break("joined-groups-meet", "core/types.py", "t.groups + start for", "t.groups for", on(CONTRASTIVE, "test_batch_in_parts_equals_the_whole_batch")),
    Break("tree-prompt-shared-beyond-what-is-trained", "data/preference_encoding.py", "all(weight == 0 and token == column[0][0]", "all(token == column[0][0]", on("unit/data/test_preferences.py", "test_both_forms_hold_the_same_tokens")),
    Break("hide-rate", "data/masking.py", "wanted = max(1, round(masking.rate * len(places)))", "wanted = max(1, round(2 * masking.rate * len(places)))", on(HIDE, "test_words_are_hidden_in_the_shares_of_the_paper")),
    Break("masking-mask-never-random", "data/masking.py", "die < MASKED + RANDOM", "die < MASKED", on(HIDE, "test_words_are_hidden_in_the_shares_of_the_paper")),
    Break("mixup-share-of-the-other", "data/mixup.py", "a, b, share = b, a, 1 - share", "a, b = b, a", on("contract/test_mixup.py", "test_it_is_torchs_by_hand", "test_labels_of_every_kind_are_mixed")),
)

MODEL_BREAKS = (
    Break("attention-siblings-seen", "models/attention/packed.py", "        path = segment_tree.find_path(i)\n        k, v", "        path = tuple(range(i + 1))\n        k, v", on(PARTS, "test_each_token_sees_itself_its_past_and_its_ancestors")),
    Break("attention-ancestors-not-seen", "models/attention/packed.py", "        path = segment_tree.find_path(i)\n        k, v", "        path = (i,)\n        k, v", on(PARTS, "test_each_token_sees_itself_its_past_and_its_ancestors")),
    Break("attention-future-seen", "models/attention/packed.py", "causal and mask is None, scale, dropout", "False, scale, dropout", on(PARTS, "test_each_token_sees_itself_its_past_and_its_ancestors")),
    Break("attention-mask-off-by-one", "models/attention/packed.py", "seen = behind >= 0", "seen = behind > 0", on(PARTS, "test_each_token_sees_itself_its_past_and_its_ancestors")),
    Break("attention-window-off-by-one", "models/attention/packed.py", "seen & (behind < window)", "seen & (behind <= window)", on(PARTS, "test_each_token_sees_itself_its_past_and_its_ancestors")),
    Break("attention-scale-lost", "models/attention/packed.py", "query.shape[-1] ** -0.5 if scaling is None else scaling", "query.shape[-1] ** -0.5", on(PARTS, "test_each_token_sees_itself_its_past_and_its_ancestors")),
    Break("attention-soft-cap-not-multiplied", "models/attention/packed.py", "(scale / softcap)) * softcap", "(scale / softcap))", on(PARTS, "test_each_token_sees_itself_its_past_and_its_ancestors")),
    Break("attention-dropout-lost-in-packed-rows", "models/attention/packed.py", "_attend_per_segment(query, key, value, segment_tree, scale, dropout,", "_attend_per_segment(query, key, value, segment_tree, scale, 0.0,", on(PARTS, "test_dropout_reaches_attention_and_keeps_its_mean")),
    Break("attention-dropout-lost-under-a-soft-cap", "models/attention/packed.py", "F.dropout(weights, dropout) @ v", "weights @ v", on(PARTS, "test_dropout_reaches_attention_and_keeps_its_mean")),
    Break("attention-chain-lost", "models/attention/packed.py", "len(lengths) - 1 if link else ends[parent]", "ends[parent - 1] if link and parent > 0 else ends[parent]", on(EQUAL, "test_a_chopped_segment_is_the_whole")),
    Break("pool-first-of-the-child", "models/task_heads.py", "starts[roots[items]]", "starts[items]", on(PARTS, "test_items_of_a_tree_are_pooled_over_their_own_text")),
    Break("pool-last-off-by-one", "models/task_heads.py", "(starts + lengths - 1)[items]", "(starts + lengths - 2)[items]", on(PARTS, "test_items_of_a_tree_are_pooled_over_their_own_text")),
    Break("pool-mean-without-ancestors", "models/task_heads.py", "related = (to_device(x, row.device) for x in describe_segments(segment_tree))", "related = (to_device(x, row.device) for x in describe_segments(SegmentTree(segment_tree.lengths, (-1,) * len(segment_tree.lengths))))", on(PARTS, "test_items_of_a_tree_are_pooled_over_their_own_text")),
    Break("head-log-probability-without-the-maximum", "models/ops/fused_logprobs.py", "(chosen - max_logits - total.log())", "(chosen - total.log())", on(EQUAL, "test_log_probs_are_those_of_the_whole_logits")),
    Break("head-gradient-of-the-wrong-sign", "models/ops/fused_logprobs.py", "softmax(-1).mul_(-grad[rows, None])", "softmax(-1).mul_(grad[rows, None])", on(EQUAL, "test_log_probs_are_those_of_the_whole_logits")),
    Break("head-frozen-gradient-without-the-target", "models/ops/fused_logprobs.py", "weight[target] - (", "-(", on(EQUAL, "test_log_probs_are_those_of_the_whole_logits")),
    Break("head-scale-lost", "models/ops/fused_logprobs.py", "torch.float32)) * scale", "torch.float32))", on(EQUAL, "test_log_probs_are_those_of_the_whole_logits")),
    Break("padded-copies-trained-twice", "models/hf_model.py", "torch.arange(len(run)) + row * width", "torch.arange(len(run))", on(EQUAL, "test_packed_is_padded")),
    Break("lora-scale-without-rank", "methods/lora.py", "rank ** 0.5 if self.use_rslora else rank)", "rank ** 0.5 if self.use_rslora else 1)", on("contract/test_peft.py", "test_the_same_weights_give_the_same_function_and_gradients")),
    Break("lora-dropout-in-evaluation", "methods/lora.py", "F.dropout(x, self.p, self.site.module.training)", "F.dropout(x, self.p, True)", on("contract/test_methods.py", "test_dropout_acts_in_training_only")),
)

OBJECTIVE_BREAKS = (
    Break("sft-sign", "objectives/cross_entropy.py", "total = -(target.weights", "total = (target.weights", on(OBJECTIVE, "test_loss_and_gradient_equal_torch_cross_entropy")),
    Break("sft-weights-lost", "objectives/cross_entropy.py", "(target.weights.to(logps.dtype) * logps).sum()", "logps.sum()", on(OBJECTIVE, "test_loss_and_gradient_equal_torch_cross_entropy")),
    Break("sft-counts-tokens-not-weights", "objectives/cross_entropy.py", "weight = target.weights.sum()", "weight = torch.tensor(float(logps.shape[0]))", on(OBJECTIVE, "test_loss_and_gradient_equal_torch_cross_entropy")),
    Break("sft-bits-in-nats", "objectives/cross_entropy.py", "-unweighted / math.log(2)", "-unweighted", on(OBJECTIVE, "test_loss_and_gradient_equal_torch_cross_entropy")),
    Break("preference-chosen-and-rejected-swapped", "objectives/preference.py", "Logps(policy[best], policy[worst], ", "Logps(policy[worst], policy[best], ", on(PREFERENCE, "test_loss_and_gradient_equal_trl")),
    Break("preference-reference-swapped", "objectives/preference.py", "reference[best], reference[worst])", "reference[worst], reference[best])", on(PREFERENCE, "test_loss_and_gradient_equal_trl")),
    Break("preference-reference-forgotten", "objectives/preference.py", "return self.ratio_chosen - self.ratio_rejected", "return self.chosen - self.rejected", on(PREFERENCE, "test_loss_and_gradient_equal_trl")),
    Break("dpo-sign", "objectives/preference.py", "return -F.logsigmoid(beta * logps.margin)\n", "return -F.logsigmoid(-beta * logps.margin)\n", on(PREFERENCE, "test_loss_and_gradient_equal_trl")),
    Break("dpo-without-beta", "objectives/preference.py", "return -F.logsigmoid(beta * logps.margin)\n", "return -F.logsigmoid(logps.margin)\n", on(PREFERENCE, "test_loss_and_gradient_equal_trl")),
    Break("ipo-goal", "objectives/preference.py", "(logps.margin - 1 / (2 * beta))", "(logps.margin - 1 / beta)", on(PREFERENCE, "test_loss_and_gradient_equal_trl")),
    Break("ipo-per-answer", "objectives/preference.py", 'PER_TOKEN = frozenset({"ipo"})', "PER_TOKEN = frozenset()", on(PREFERENCE, "test_loss_and_gradient_equal_trl")),
    Break("simpo-and-orpo-per-answer", "objectives/preference.py", 'of a completion instead of sums."""\n        return True', 'of a completion instead of sums."""\n        return False', on(PREFERENCE, "test_loss_and_gradient_equal_trl")),
    Break("cdpo-shares-swapped", "objectives/preference.py", "return -(1 - label_smoothing) * right - label_smoothing * wrong", "return -label_smoothing * right - (1 - label_smoothing) * wrong", on(PREFERENCE, "test_loss_and_gradient_equal_trl")),
    Break("robust-not-divided", "objectives/preference.py", "(label_smoothing * wrong - (1 - label_smoothing) * right) / (1 - 2 * label_smoothing)", "(label_smoothing * wrong - (1 - label_smoothing) * right)", on(PREFERENCE, "test_loss_and_gradient_equal_trl", "test_mean_of_robust_over_flipped_labels_equals_sigmoid")),
    Break("hinge-without-zero", "objectives/preference.py", "torch.relu(1 - beta * logps.margin)", "(1 - beta * logps.margin)", on(PREFERENCE, "test_loss_and_gradient_equal_trl")),
    Break("simpo-margin-sign", "objectives/preference.py", "(logps.chosen - logps.rejected) - gamma)", "(logps.chosen - logps.rejected) + gamma)", on(PREFERENCE, "test_loss_and_gradient_equal_trl")),
    Break("orpo-odds-are-probabilities", "objectives/preference.py", "(logps.chosen - log1mexp(logps.chosen)) - (logps.rejected - log1mexp(logps.rejected))", "logps.chosen - logps.rejected", on(PREFERENCE, "test_loss_and_gradient_equal_trl")),
    Break("orpo-likelihood-lost", "objectives/preference.py", "return -logps.chosen - beta *", "return -beta *", on(PREFERENCE, "test_loss_and_gradient_equal_trl")),
    Break("preference-mean-not-divided", "objectives/preference.py", "    if mean:\n", "    if False:\n", on(PREFERENCE, "test_loss_and_gradient_equal_trl")),
    Break("preference-prompt-counts-for-the-first-answer", "objectives/preference.py", "torch.where(target.item_of < 0, items, target.item_of)", "target.item_of.clamp(min=0)", on(PREFERENCE, "test_weights_scale_log_probabilities_and_prompts_do_not_count")),
    Break("preference-weight-of-the-row-lost", "objectives/preference.py", "return Loss((weights.to(losses.dtype) * losses).sum(), weights.sum(), self.compute_metrics(logps))", "return Loss(losses.sum(), weights.sum(), self.compute_metrics(logps))", on("contract/test_weights.py", "test_a_weight_of_two_is_the_row_twice")),
    Break("ranking-order-turned", "objectives/base.py", "better = (ranks[:, :, None] < ranks[:, None, :])", "better = (ranks[:, :, None] > ranks[:, None, :])", on(PREFERENCE, "test_loss_and_gradient_equal_trl")),
    Break("kto-good-and-bad-swapped", "objectives/kto.py", "target.labels == 1, target.labels == 0, target", "target.labels == 0, target.labels == 1, target", on(PREFERENCE, "test_kto_equals_trl")),
    Break("kto-z0-not-clamped", "objectives/kto.py", ".clamp(min=0)", "", on(PREFERENCE, "test_kto_equals_trl")),
    Break("kto-z0-has-a-gradient", "objectives/kto.py", "(weights * ratios.detach())[mismatched]", "(weights * ratios)[mismatched]", on(PREFERENCE, "test_kto_equals_trl")),
    Break("kto-bad-sign", "objectives/kto.py", "self.beta * (z0 - ratios[undesirable])", "self.beta * (ratios[undesirable] - z0)", on(PREFERENCE, "test_kto_equals_trl")),
    Break("kto-weights-swapped", "objectives/kto.py", "self.desirable_weight * desirable_losses.sum() + self.undesirable_weight * undesirable_losses.sum()", "self.undesirable_weight * desirable_losses.sum() + self.desirable_weight * undesirable_losses.sum()", on(PREFERENCE, "test_kto_equals_trl")),
    Break("kto-counts-mismatched-answers", "objectives/kto.py", "return Loss(total, get_item_weights(target)[~mismatched].sum(), ", "return Loss(total, get_item_weights(target).sum(), ", on(LAWS, "test_count_is_known_before_the_forward_pass")),
    Break("reward-margin-sign", "objectives/reward.py", "scores[:, None, :] + margins[:, :, None] - scores", "scores[:, None, :] - margins[:, :, None] - scores", on(REWARD, "test_pair_loss_equals_trl")),
    Break("reward-plackett-luce-margin-sign", "objectives/reward.py", "(worse - (scores - margins))", "(worse - (scores + margins))", on(REWARD, "test_pair_loss_equals_trl")),
    Break("reward-sum-over-pairs", "objectives/reward.py", "torch.where(better, terms, 0).sum((1, 2)) / better.sum((1, 2))", "torch.where(better, terms, 0).sum((1, 2))", on(REWARD, "test_all_pairs_loss_equals_instructgpt")),
    Break("reward-last-of-a-ranking-counts", "objectives/reward.py", "torch.where(better.any(-1), terms, 0)", "torch.where(better.any(-2), terms, 0)", on(REWARD, "test_pair_loss_equals_trl")),
    Break("choice-wrong-answer", "objectives/multiple_choice.py", "better.sum(-1).argmax(-1", "better.sum(-2).argmax(-1", on(CHOICE, "test_loss_and_gradient_equal_the_formula")),
    Break("classify-class-weights-lost", "objectives/classify.py", "return weights[self._get_classes(target)] * row", "return weights.new_ones(()) * row", on(CLASSIFY, "test_class_weights_equal_torch")),
    Break("classify-regression-not-squared", "objectives/classify.py", ".to(scores.dtype)).square()", ".to(scores.dtype)).abs()", on(CLASSIFY, "test_loss_equals_transformers")),
    Break("contrastive-temperature-multiplies", "objectives/contrastive.py", "states.new_tensor(1 / self.temperature)", "states.new_tensor(self.temperature)", on(CONTRASTIVE, "test_infonce_equals_multiple_negatives_ranking_loss")),
    Break("contrastive-own-positives-are-negatives", "objectives/contrastive.py", "negatives = similar.masked_fill(positive, -torch.inf)", "negatives = similar.masked_fill(positive & False, -torch.inf)", on(CONTRASTIVE, "test_infonce_equals_multiple_negatives_ranking_loss")),
    Break("contrastive-states-not-normalised", "objectives/contrastive.py", "return F.normalize(upcast_to_float32(outputs.pooled), dim=-1)", "return upcast_to_float32(outputs.pooled)", on(CONTRASTIVE, "test_infonce_equals_multiple_negatives_ranking_loss")),
    Break("contrastive-item-is-its-own-positive", "objectives/contrastive.py", "(labels[:, None] == labels[None, :]) & ~itself", "(labels[:, None] == labels[None, :])", on(CONTRASTIVE, "test_supcon_equals_the_formula")),
    Break("contrastive-cosent-order-turned", "objectives/contrastive.py", "ordered = scores[:, None] < scores[None, :]", "ordered = scores[:, None] > scores[None, :]", on(CONTRASTIVE, "test_cosent_equals_sentence_transformers")),
    Break("contrastive-triplet-sign", "objectives/contrastive.py", "gaps = cosines[group, far] - cosines[group, near]", "gaps = cosines[group, near] - cosines[group, far]", on(CONTRASTIVE, "test_triplet_equals_sentence_transformers")),
)

POLICY_BREAKS = (
    Break("surrogate-ratio-without-exp", "objectives/rl_config.py", "ratio = (logps - old).exp()", "ratio = 1 + logps - old", on(LOSSES, "test_ppo_equals_the_paper")),
    Break("surrogate-ratio-turned", "objectives/rl_config.py", "ratio = (logps - old).exp()", "ratio = (old - logps).exp()", on(LOSSES, "test_ppo_equals_the_paper")),
    Break("surrogate-clip-bounds-swapped", "objectives/rl_config.py", "ratio.clamp(1 - low, 1 + high)", "ratio.clamp(1 - high, 1 + low)", on(LOSSES, "test_grpo_equals_trl")),
    Break("surrogate-optimist", "objectives/rl_config.py", "return torch.maximum(unclipped, clipped)", "return torch.minimum(unclipped, clipped)", on(LOSSES, "test_ppo_equals_the_paper")),
    Break("surrogate-never-clipped", "objectives/rl_config.py", "return torch.maximum(unclipped, clipped)", "return unclipped", on(LOSSES, "test_ppo_equals_the_paper")),
    Break("kl-direction", "objectives/rl_config.py", "log_ratio = reference - logps", "log_ratio = logps - reference", on(LOSSES, "test_ppo_equals_the_paper", "test_grpo_equals_trl")),
    Break("kl-without-its-control-variate", "objectives/rl_config.py", "return log_ratio.exp() - log_ratio - 1", "return log_ratio.exp() - 1", on(LOSSES, "test_grpo_equals_trl")),
    Break("ppo-kl-reward-sign", "objectives/ppo.py", "token_rewards -= kl_coef *", "token_rewards += kl_coef *", on(LOSSES, "test_kl_penalty_per_token_and_reward_at_the_last_token")),
    Break("ppo-kl-weight-not-the-steered-one", "objectives/ppo.py", "token_rewards -= kl_coef *", "token_rewards -= self.kl_coef *", on(LOSSES, "test_kl_penalty_per_token_and_reward_at_the_last_token")),
    Break("ppo-reward-at-the-first-token", "objectives/ppo.py", "token_rewards[lengths.cumsum(0) - 1] +=", "token_rewards[lengths.cumsum(0) - lengths] +=", on(LOSSES, "test_advantage_of_each_token_by_hand")),
    Break("ppo-returns-without-values", "objectives/ppo.py", '"returns": advantages + values}', '"returns": advantages}', on(LOSSES, "test_kl_penalty_per_token_and_reward_at_the_last_token")),
    Break("ppo-returns-of-whitened-advantages", "objectives/ppo.py", '"returns": advantages + values}', '"returns": whiten(advantages) + values}', on(LOSSES, "test_kl_penalty_per_token_and_reward_at_the_last_token")),
    Break("ppo-advantages-not-whitened", "objectives/ppo.py", "whiten(advantages) if self.whiten_advantages else advantages", "advantages", on(LOSSES, "test_kl_penalty_per_token_and_reward_at_the_last_token")),
    Break("ppo-whitening-keeps-the-mean", "objectives/ppo.py", "return (values - values.mean()) /", "return values /", on(LOSSES, "test_kl_penalty_per_token_and_reward_at_the_last_token")),
    Break("ppo-value-clip-takes-the-smaller", "objectives/ppo.py", "torch.maximum(error, (near", "torch.minimum(error, (near", on(LOSSES, "test_ppo_equals_the_paper")),
    Break("ppo-value-weight-not-halved", "objectives/ppo.py", "self.vf_coef * error / 2", "self.vf_coef * error", on(LOSSES, "test_ppo_equals_the_paper")),
    Break("ppo-entropy-sign", "objectives/ppo.py", "losses = losses - self.entropy_coef", "losses = losses + self.entropy_coef", on(LOSSES, "test_ppo_equals_the_paper")),
    Break("ppo-controller-sign", "objectives/ppo.py", "kl / self.adaptive_kl_target - 1", "1 - kl / self.adaptive_kl_target", on(LOSSES, "test_adaptive_kl_coef_moves_towards_its_target")),
    Break("gae-without-lambda", "objectives/ppo.py", "gamma * gae_lambda * next_advantage", "gamma * next_advantage", on(LOSSES, "test_gae_equals_the_paper")),
    Break("gae-without-the-next-value", "objectives/ppo.py", "rewards[:, t] + gamma * next_value - values[:, t]", "rewards[:, t] - values[:, t]", on(LOSSES, "test_gae_equals_the_paper")),
    Break("gae-wrong-way-round", "objectives/ppo.py", "for t in reversed(range(rewards.shape[1])):", "for t in range(rewards.shape[1]):", on(LOSSES, "test_gae_equals_the_paper")),
    Break("grpo-not-divided-by-the-spread", "objectives/grpo.py", 'if estimator == "grpo" else centered', 'if estimator == "never" else centered', on(LOSSES, "test_group_advantages_by_hand")),
    Break("grpo-centred-over-prompts", "objectives/grpo.py", "rewards.mean(1, keepdim=True)", "rewards.mean(0, keepdim=True)", on(LOSSES, "test_group_advantages_by_hand")),
    Break("grpo-rloo-includes-itself", "objectives/grpo.py", "return centered * (rewards.shape[1] / (rewards.shape[1] - 1))", "return centered", on(LOSSES, "test_group_advantages_by_hand")),
    Break("grpo-lengths-not-divided", "objectives/grpo.py", 'if self.advantage_estimator == "grpo":\n            lengths', 'if self.advantage_estimator == "never":\n            lengths', on(LOSSES, "test_grpo_equals_trl")),
    Break("grpo-old-has-a-gradient", "objectives/grpo.py", 'in rollout else logps.detach()', 'in rollout else logps', on(LOSSES, "test_policy_is_its_own_old_policy_without_old_logps")),
    Break("grpo-dr-count", "objectives/grpo.py", "longest = self.max_new_tokens if", "longest = 1 if", on(LOSSES, "test_grpo_equals_trl")),
)

ROLLOUT_BREAKS = (
    Break("rollout-skips-prompts-between-rounds", "rl/collector.py", "cursor.row += len(selected)", "cursor.row += len(selected) + 1", on(ROUNDS, "test_an_epoch_of_rounds_asks_every_prompt_once_in_the_order_of_the_cursor")),
    Break("rollout-end-token-not-trained", "rl/collector.py", "output.token_ids + ((output.stop_token,) if output.stop_token is not None else ())", "output.token_ids or (output.stop_token,)", on(ROUNDS, "test_the_token_that_ended_an_answer_is_trained_as_part_of_it")),
    Break("rollout-same-dice-in-every-round", "rl/collector.py", "self.seed * 1_000_003 + self.rollouts", "self.seed * 1_000_003", on(ROUNDS, "test_every_round_and_every_seed_throws_other_dice_and_an_evaluation_always_the_same")),
    Break("rollout-same-dice-for-every-seed", "rl/collector.py", "self.seed * 1_000_003 + self.rollouts", "self.rollouts", on(ROUNDS, "test_every_round_and_every_seed_throws_other_dice_and_an_evaluation_always_the_same")),
    Break("rollout-unfinished-is-rewarded", "rl/collector.py", "[r - penalty * (not c.finished)", "[r + penalty * (not c.finished)", on(ROLLS, "test_rewards_reach_their_answers_and_unfinished_ones_pay")),
    Break("rollout-finished-pay", "rl/collector.py", "[r - penalty * (not c.finished)", "[r - penalty * c.finished", on(ROLLS, "test_rewards_reach_their_answers_and_unfinished_ones_pay")),
    Break("rollout-evaluation-sign", "rl/collector.py", '{"loss": -metrics["reward"]', '{"loss": metrics["reward"]', on(ROUNDS, "test_what_is_judged_is_the_mean_reward_and_the_best_is_the_lowest_loss")),
    Break("rollout-kl-per-token", "rl/collector.py", 'values["reference_logps"]).double().sum()) / count', 'values["reference_logps"]).double().mean())', on(ROUNDS, "test_what_a_round_says_is_means_over_its_answers")),
    Break("rollout-kl-turned", "rl/collector.py", '(values["old_logps"] - values["reference_logps"])', '(values["reference_logps"] - values["old_logps"])', on(ROUNDS, "test_what_a_round_says_is_means_over_its_answers")),
    Break("rollout-metadata-of-the-wrong-prompt", "rl/collector.py", "prompts[i // num_generations].metadata", "prompts[i % len(prompts)].metadata", on(ROLLS, "test_rewards_reach_their_answers_and_unfinished_ones_pay")),
    Break("rollout-answers-unsorted", "rl/collector.py", "sorted(policy.generate(prompt_ids, params), key=lambda output: output.index)", "list(policy.generate(prompt_ids, params))", on(ROUNDS, "test_an_answer_is_the_policys_own_to_its_prompt")),
    Break("rollout-prompt-of-the-wrong-answer", "rl/collector.py", "prompts[i // num_generations].origin", "prompts[i % len(prompts)].origin", on(ROUNDS, "test_an_answer_is_the_policys_own_to_its_prompt")),
    Break("rollout-columns-at-the-wrong-answer", "rl/rollout_batch.py", "np.arange(starts[n], starts[n + 1]) for n in owners", "np.arange(starts[n], starts[n + 1]) for n in sorted(owners, reverse=True)", on(ROUNDS, "test_every_token_has_the_advantage_of_its_own_answer")),
    Break("rollout-reference-is-the-policy", "rl/collector.py", "with self.reference():", "if True:", on(ROLLS, "test_every_column_stands_at_its_token")),
    Break("rollout-with-dropout", "rl/collector.py", "        policy.train(False)\n", "", on(ROUNDS, "test_the_policy_is_asked_without_dropout_and_goes_on_training")),
    Break("rollout-trains-without-dropout", "rl/collector.py", "        policy.train(training)\n", "", on(ROUNDS, "test_the_policy_is_asked_without_dropout_and_goes_on_training")),
    Break("rollout-early-end-never", "training/loop.py", '["approx_kl"] > limit', '["approx_kl"] < limit', on(ROLLS, "test_a_round_ends_early_where_the_policy_has_moved_too_far")),
    Break("rollout-one-epoch-too-few", "rl/rollout_source.py", "for epoch in range(objective.epochs_per_rollout):", "for epoch in range(max(1, objective.epochs_per_rollout - 1)):", on(ROLLS, "test_a_round_is_learned_from_as_often_as_it_says")),
    Break("rollout-reward-weight-lost", "rl/rewards.py", "totals[i] += weight * value", "totals[i] += value", on("unit/rl/test_rewards.py", "test_several_rewards_are_added_by_their_weights")),
)

GENERATION_BREAKS = (
    Break("generate-positions-of-padding", "models/padded_decoder.py", "(self.mask.cumsum(1) - 1).clamp(min=0)", "torch.arange(self.mask.shape[1], device=device).expand_as(self.mask)", on(GENERATE, "test_greedy_in_a_batch_is_greedy_alone_is_transformers_own")),
    Break("generate-padding-seen", "models/padded_decoder.py", "[0] * (width - len(prompt)) + [1]", "[1] * (width - len(prompt)) + [1]", on(GENERATE, "test_greedy_in_a_batch_is_greedy_alone_is_transformers_own")),
    Break("generate-position-stays", "models/padded_decoder.py", "(self.positions[:, -1:] + 1)", "self.positions[:, -1:]", on(GENERATE, "test_greedy_in_a_batch_is_greedy_alone_is_transformers_own")),
    Break("generate-cache-of-rows-that-left", "models/padded_decoder.py", "            self.cache.batch_select_indices(kept_rows)\n            next_tokens, self.mask", "            self.cache.batch_select_indices(kept_rows.flip(0))\n            next_tokens, self.mask", on(GENERATE, "test_rows_that_leave_change_nothing_for_those_that_stay")),
    Break("generate-stop-token-in-the-answer", "models/decoding.py", "yield GenerationOutput(place, tuple(outputs[place]), True, output.token)", "yield GenerationOutput(place, (*outputs[place], output.token), True, output.token)", on(GENERATE, "test_rows_that_leave_change_nothing_for_those_that_stay")),
    Break("generate-own-stops-ignored", "models/decoding.py", "token in self.stops or token in request.sampling.stop", "token in self.stops", on(GENERATE, "test_rows_that_leave_change_nothing_for_those_that_stay")),
    Break("generate-eos-of-the-config-ignored", "models/decoding.py", "for token in [*eos_ids, tokenizer.eos_token_id]", "for token in [tokenizer.eos_token_id]", on(GENERATE, "test_eos_is_the_models_and_the_tokenizers")),
    Break("generate-one-token-too-many", "models/decoding.py", "min(sampling.max_new_tokens, context - len(request.prompt))", "min(sampling.max_new_tokens + 1, context - len(request.prompt))", on(GENERATE, "test_the_context_ends_an_answer", "test_greedy_in_a_batch_is_greedy_alone_is_transformers_own")),
    Break("generate-context-overrun", "models/decoding.py", "min(sampling.max_new_tokens, context - len(request.prompt))", "sampling.max_new_tokens", on(GENERATE, "test_the_context_ends_an_answer")),
    Break("generate-seed-ignored", "models/sampling.py", 'Random(f"{sampling.seed} {self', 'Random(f"{self', on(GENERATE, "test_sampling_does_not_depend_on_the_batch")),
    Break("generate-same-dice-for-all", "models/sampling.py", "{self.request.index}", "0", on(GENERATE, "test_the_same_prompt_gets_different_answers_at_different_places")),
    Break("sample-temperature-multiplies", "models/sampling.py", "logits.to(_wide(logits)) / sampling.temperature", "logits.to(_wide(logits)) * sampling.temperature", on(GENERATE, "test_choices_follow_the_distribution_of_transformers")),
    Break("sample-top-k-off-by-one", "models/sampling.py", "logits.topk(min(sampling.top_k,", "logits.topk(min(sampling.top_k + 1,", on(GENERATE, "test_choices_follow_the_distribution_of_transformers")),
    Break("sample-top-p-one-too-few", "models/sampling.py", "before = probabilities.cumsum(-1) - probabilities", "before = probabilities.cumsum(-1)", on(GENERATE, "test_choices_follow_the_distribution_of_transformers")),
    Break("sample-top-p-ignored", "models/sampling.py", "probabilities.where(before < sampling.top_p, 0)", "probabilities", on(GENERATE, "test_choices_follow_the_distribution_of_transformers")),
    Break("sample-not-renormalised", "models/sampling.py", "draws * reached[:, -1:]", "draws", on(GENERATE, "test_choices_follow_the_distribution_of_transformers")),
    Break("sample-place-for-token", "models/sampling.py", "picked if order is None else order.gather(-1, picked)", "picked", on(GENERATE, "test_choices_follow_the_distribution_of_transformers")),
    Break("sample-greedy-is-the-least", "models/sampling.py", "return logits.argmax(-1)", "return logits.argmin(-1)", on(GENERATE, "test_greedy_in_a_batch_is_greedy_alone_is_transformers_own")),
    Break("decode-window-forgotten", "models/attention/cached.py", "x[:, :, -window:] if not fixed", "x[:, :, -window - 1:] if not fixed", on(GENERATE, "test_greedy_in_a_batch_is_greedy_alone_is_transformers_own")),
    Break("decode-chunk-sees-what-follows", "models/attention/cached.py", "mask = causal_mask(queries, length, window, key.device)", "mask = torch.ones(queries, length, dtype=torch.bool)", on(GENERATE, "test_greedy_in_a_batch_is_greedy_alone_is_transformers_own")),
    Break("decode-keys-written-one-late", "models/attention/cached.py", "start, buffer.length = buffer.length, buffer.length + count", "start, buffer.length = max(buffer.length - 1, 0), buffer.length + count", on(GENERATE, "test_greedy_in_a_batch_is_greedy_alone_is_transformers_own")),
    Break("decode-positions-without-virtual-tokens", "models/sequence_decoder.py", "s.read + s.shift for s", "s.read for s", on("contract/test_virtual.py", "test_transformers_own_generation_gives_our_answers")),
    Break("decode-prefix-of-another-adapter", "models/sequence_decoder.py", "hashlib.blake2b(repr(key).encode()", "hashlib.blake2b(b''", on("unit/models/test_decoding_engine.py", "test_an_adapter_that_was_loaded_again_has_a_cache_of_its_own")),
    Break("decode-prefix-one-block-too-many", "models/sequence_decoder.py", "entry.buffer.clone(virtual + length), length", "entry.buffer.clone(virtual + length), length + 1", on("unit/models/test_decoding_engine.py", "test_the_prefix_cache_changes_no_output")),
    Break("decode-prefix-oldest-stays", "models/sequence_decoder.py", "self._drop(next(iter(self._entries)))", "self._drop(next(reversed(self._entries)))", on("unit/models/test_decoding_engine.py", "test_the_prefix_cache_drops_what_was_not_used_longest")),
    Break("decode-memory-unlimited", "models/decoding.py", "longest * buffers[0].bytes_per_token <= self.max_cache_bytes", "True", on("unit/models/test_decoding_engine.py", "test_the_memory_of_keys_and_values_is_limited")),
    Break("decode-long-prompt-at-once", "models/decoding.py", "budget = self.prefill_chunk if decoding else", "budget = 10**9 if decoding else", on("unit/models/test_decoding_engine.py", "test_long_prompts_together_are_read_within_the_budget_of_a_step")),
    Break("decode-cancelled-row-stays", "models/decoding.py", "                queue.remove(one)\n", "                pass\n", on("unit/models/test_decoding_engine.py", "test_a_cancelled_request_leaves_at_once_and_changes_nothing")),
    Break("decode-error-hits-all", "models/decoding.py", "logprob, top == top)", "logprob, all(x == x for x in highest))", on("unit/models/test_decoding_engine.py", "test_a_row_that_is_not_finite_fails_alone")),
    Break("decode-logprobs-after-penalties", "models/decoding.py", "compute_token_logprobs(logits, tokens, states)", "compute_token_logprobs(logits * 1.1, tokens, states)", on("unit/models/test_decoding_engine.py", "test_log_probabilities_are_those_of_a_plain_forward_pass")),
    Break("sample-settings-of-the-first-row", "models/sampling.py", "(s.temperature, s.top_p, s.top_k, s.min_p) if s.temperature else (0.0,)", "(0.0,)", on("unit/models/test_decoding_engine.py", "test_requests_of_all_settings_together_are_the_same_alone")),
    Break("sample-repetition-of-positive-logits", "models/sampling.py", "torch.where(old > 0, old / sampling", "torch.where(old < 0, old / sampling", on("unit/models/test_decoding_engine.py", "test_penalties_are_those_of_their_definitions")),
    Break("sample-frequency-counts-once", "models/sampling.py", "sampling.presence_penalty + sampling.frequency_penalty * counts", "sampling.presence_penalty + sampling.frequency_penalty", on("unit/models/test_decoding_engine.py", "test_penalties_are_those_of_their_definitions")),
    Break("sample-min-p-ignored", "models/sampling.py", "probabilities >= sampling.min_p * probabilities.amax(-1, keepdim=True)", "probabilities >= 0", on(GENERATE, "test_choices_follow_the_distribution_of_transformers")),
    Break("engine-last-of-several-stops", "serving/engine.py", "self.held[:min(starts)]", "self.held[:max(starts)]", on(ENGINE, "test_a_stop_string_ends_the_completion")),
    Break("engine-first-named-stop", "serving/engine.py", "self.held[:min(starts)]", "self.held[:starts[0]]", on(ENGINE, "test_a_stop_string_ends_the_completion")),
    Break("engine-stop-not-held-back", "serving/engine.py", "range(1, len(stop)) if", "range(1, 1) if", on(ENGINE, "test_no_part_of_a_stop_string_is_emitted")),
    Break("engine-held-words-lost", "serving/engine.py", "self._send(self.held, reason)", 'self._send("", reason)', on(ENGINE, "test_a_stop_string_ends_the_completion")),
    Break("engine-half-characters", "serving/detokenizer.py", "if text.endswith(INCOMPLETE) else", "if False else", on(ENGINE, "test_a_character_is_emitted_once_all_its_bytes_are_there")),
    Break("serve-usage-counts-a-prompt-for-every-answer", "serving/openai_protocol.py", "for request in requests[::body.n])", "for request in requests)", on(ENGINE, "test_a_prompt_counts_once_for_all_its_completions")),
)

RENDERING_BREAKS = (
    Break("render-generation-prompt-missing", "data/chat.py", "prompt = self.until(index, generate=True) if index else", "prompt = self.until(index) if index else", on(ROUND, *laws("qwen3"))),
    Break("render-end-mark-left-out", "data/chat.py", "text[:at + len(mark)]", "text[:at]", on(ROUND, *laws("chatml"))),
    Break("render-behind-the-mark-trained", "data/chat.py", "return text[:at + len(mark)] if at >=", "return text if at >=", on(ROUND, *laws("chatml"))),
    Break("render-spelt-mark-taken-for-the-end", "data/chat.py", "text[at - 1] != START else text", "text[at - 1] == START else text", on(ROUND, *laws("chatml"))),
    Break("render-thought-not-closed", "data/chat.py", "{THOUGHT_END}\\n\\n{words}", "{words}", on("unit/data/test_chat_weights.py", "test_a_thought_that_the_generation_prompt_opens_is_closed_where_the_turn_has_none")),
    Break("render-dropped-thoughts-not-noticed", "data/chat.py", "if not thought.strip():", "if thought.strip():", on("unit/data/test_chat_rules.py", "test_thoughts_that_a_template_drops_are_trained_or_refused")),
    Break("render-call-mark-not-cut-at", "data/templates.py", "for text in found if text is not None", "for text in found[:1] if text is not None", on(ROUND, "test_what_ends_a_trained_turn_stops_generation[call end]")),
    Break("render-answered-system-dropped", "data/templates.py", "return self.system and any(", "return not self.system and any(", on("unit/data/test_chat_rules.py", "test_the_saved_template_keeps_a_system_turn_that_the_given_one_drops")),
    Break("render-missing-key-not-named", "data/chat.py", "if keys and self._try(linked, generate) is not None:", "if keys and self._try(linked, generate) is None:", on("unit/data/test_chat_rules.py", "test_the_key_that_a_template_demands_is_named")),
    Break("render-dropped-words-not-refused", "data/chat.py", "if contents[i]:", "if not contents[i]:", on("unit/data/test_chat_rules.py", "test_a_turn_that_the_template_drops_is_refused")),
    Break("render-cut-words-of-the-system-turn", "data/chat.py", 'if turn["role"] in SYSTEM or not turn["content"]:', 'if not turn["content"]:', on(CUT, "test_what_is_cut_are_the_oldest_words_of_turns[chatml-True]")),
    Break("render-system-turn-not-folded", "data/conversation.py", "return self.template.system if place == 0 else self.template.late_system", "return True", on(ROUND, *laws("gemma"))),
    Break("render-folded-turn-lost", "data/conversation.py", "        if folded:\n            self._add_system_text(folded)\n        return", "        return", on("unit/data/test_chat_rules.py", "test_a_system_turn_at_the_very_end_is_not_lost")),
    Break("render-developer-kept", "data/conversation.py", 'role = "system" if message.role == "developer"', 'role = message.role if message.role == "developer"', on(ROUND, *laws("gemma"))),
    Break("render-thoughts-lost", "data/conversation.py", "{self._mark(value, role).strip(chr(10))}", "", on(ROUND, *laws("chatml"))),
    Break("render-calls-lost", "data/conversation.py", "said + [format_call(call) for call in self._mark(value, role)]", "said", on(ROUND, *laws("chatml"))),
    Break("render-tool-role-kept", "data/conversation.py", 'if role == "tool" and not self.template.tool:', "if False:", on(ROUND, *laws("mistral"))),
    Break("render-unknown-key-dropped", "data/conversation.py", "                raise RenderError(f\"{key!r} of a message", "                RenderError(f\"{key!r} of a message", on(ROUND, "test_the_remedy_of_a_key_that_is_not_rendered_works")),
    Break("render-template-without-calls-chosen", "data/templates.py", "if all(template.renders(*need) for need in needs)), usual)", "if True), usual)", on(ROUND, "test_the_template_that_renders_what_a_row_holds_is_chosen")),
    Break("render-eos-not-added", "data/templates.py", "if found.end_of_turn is None and eos:", "if found.end_of_turn is not None and eos:", on(ROUND, *laws("nomark"))),
    Break("control-tokens-of-the-user-kept", "data/control_tokens.py", "_compile_pattern(own), _compile_pattern(special | written)", "_compile_pattern(own), _compile_pattern(set())", on(ROUND, *laws("chatml"))),
    Break("control-tokens-of-the-assistant-kept", "data/control_tokens.py", "_compile_pattern(own), _compile_pattern(special | written)", "_compile_pattern(set()), _compile_pattern(special | written)", on(ROUND, *laws("chatml"))),
    Break("control-token-encoded-as-itself", "data/char_offsets.py", 'options["split_special_tokens"] = True', 'options["split_special_tokens"] = False', on(ROUND, *laws("chatml"))),
    Break("boundary-ignored", "data/control_tokens.py", "inner = [b for b in boundaries if at < b < start - 1]", "inner: list[int] = []", on(ROUND, "test_a_bare_prompt_is_asked_as_it_is_trained")),
    Break("opening-token-twice", "data/tokenization.py", "ids, starts, ends = tokenize_rendered(text, tokenizer, special=closed)", "ids, starts, ends = tokenize_rendered(text, tokenizer, special=True)", on(ROUND, *laws("llama3"))),
    Break("cut-newest-words", "data/preference_encoding.py", "frozenset(words[:excess])", "frozenset(words[-excess:])", on(CUT, "test_what_is_cut_are_the_oldest_words_of_turns[chatml-True]")),
    Break("cut-opening-token", "data/preference_encoding.py", "range(len(get_special_tokens(tokenizer)[0]), prompt)", "range(0, prompt)", on(CUT, "test_a_bare_prompt_keeps_its_opening_token")),
    Break("split-part-without-opening", "data/tokenization.py", "if start and opening:", "if not start and opening:", on("unit/data/test_encoding.py", "test_every_part_of_a_document_begins_as_the_tokenizer_opens_a_text")),
)
BREAKS = (*SCHEDULE_BREAKS, *OPTIMIZER_BREAKS, *STEP_BREAKS, *LOOP_BREAKS, *DATA_BREAKS, *MODEL_BREAKS, *OBJECTIVE_BREAKS,
          *RENDERING_BREAKS,
          *POLICY_BREAKS, *ROLLOUT_BREAKS, *GENERATION_BREAKS)


# ---------------------------------------------------------------- applying a break


def broken(one: Break, source: Path = SOURCE) -> str:
    """The file's text with the break in it. Raises `ValueError` where it does not apply."""
    text = (source / one.file).read_text(encoding="utf-8")
    if (count := text.count(one.text)) != 1:
        raise ValueError(f"{one.name}: the text occurs {count} times in {one.file}, and must once: {one.text!r}")
    return text.replace(one.text, one.replacement)


@contextlib.contextmanager
def copied(one: Break | None) -> Iterator[Path]:
    """A copy of src with the break in it, and a place for the tests' files beside it."""
    with tempfile.TemporaryDirectory(prefix="luthier-mutation-") as folder:
        there = Path(folder) / "src"
        shutil.copytree(ROOT / "src", there)
        if one is not None:
            file = there / "luthier" / one.file
            file.write_text(broken(one), encoding="utf-8")
            for compiled in file.parent.glob(f"__pycache__/{file.stem}.*"):
                compiled.unlink()
        yield there


# ---------------------------------------------------------------- running tests


@dataclass
class Trial:
    """A process that runs some tests on a copy of src."""

    what: Break | None
    tests: tuple[str, ...]
    process: int
    began: float
    output: Path
    place: contextlib.ExitStack


def begun(what: Break | None, tests: tuple[str, ...]) -> Trial:
    """Run the tests in a forked process, which has everything imported but luthier."""
    place = contextlib.ExitStack()
    there = place.enter_context(copied(what))
    output = there.parent / "output.txt"
    process = os.fork()
    if process == 0:
        status = 3
        try:
            os.setsid()
            handle = os.open(output, os.O_WRONLY | os.O_CREAT)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            sys.path.insert(0, str(there))
            os.environ["PYTHONPATH"] = str(there)
            os.chdir(ROOT)
            import hypothesis
            import pytest
            phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]  # a shrunken example is of no use here
            hypothesis.settings.register_profile("mutations", phases=phases, database=None, derandomize=True)
            hypothesis.settings.load_profile("mutations")
            status = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--basetemp",
                                      str(there.parent / "files"), *tests]))
            import luthier
            (there.parent / "modules.txt").write_text("\n".join(sys.modules))
            if not Path(luthier.__file__).is_relative_to(there):
                print(f"the tests ran on {luthier.__file__}, not on the copy")
                status = 3
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return Trial(what, tests, process, time.monotonic(), output, place)


def ended(trials: list[Trial]) -> tuple[Trial, int, str]:
    """Wait for the first of the trials to end: it, its exit status (-1: out of time), and what it printed."""
    while True:
        for trial in trials:
            process, status = os.waitpid(trial.process, os.WNOHANG)
            late = time.monotonic() - trial.began > LIMIT
            if process or late:
                if not process:
                    os.killpg(trial.process, signal.SIGKILL)
                    os.waitpid(trial.process, 0)
                text = trial.output.read_text(errors="replace") if trial.output.exists() else ""
                if trial.what is None:
                    preload(trial.output.parent / "modules.txt")
                trial.place.close()
                trials.remove(trial)
                return trial, os.waitstatus_to_exitcode(status) if process else -1, text
        time.sleep(0.02)


def preload(modules: Path) -> None:
    """Import what the tests imported of other libraries, once for all the processes to come."""
    for name in modules.read_text().splitlines() if modules.exists() else ():
        if name.partition(".")[0] in PRELOADED and name not in sys.modules:
            with contextlib.suppress(Exception):  # a part that is not meant to be imported by itself
                importlib.import_module(name)


VERDICTS = {0: "NOT noticed", 1: "noticed"}


def run(breaks: Sequence[Break], jobs: int) -> tuple[list[dict[str, object]], str]:
    """What became of every break; and what the tests say where they fail with nothing broken, in which case no break
    is tried."""
    for name in ("pytest", "torch", "transformers"):
        importlib.import_module(name)
    assert "luthier" not in sys.modules, "each process imports its own copy"
    every = sorted({test for one in breaks for test in one.tests})
    print(f"{len(every)} tests with nothing broken", flush=True)
    trials = [begun(None, tuple(every[i::jobs])) for i in range(jobs) if every[i::jobs]]
    while trials:
        _, status, text = ended(trials)
        if status != 0:
            for trial in [*trials]:
                os.killpg(trial.process, signal.SIGKILL)
                os.waitpid(trial.process, 0)
                trial.place.close()
            return [], text
    found: list[dict[str, object]] = []
    waiting, began = list(breaks), time.monotonic()
    while waiting or trials:
        while waiting and len(trials) < jobs:
            one = waiting.pop(0)
            try:
                trials.append(begun(one, one.tests))
            except ValueError as error:
                found.append(_told(one, "did not apply", 0.0, str(error), len(breaks), len(found), began))
        if trials:
            trial, status, text = ended(trials)
            assert trial.what is not None
            verdict = VERDICTS.get(status, "out of time" if status < 0 else "could not be run")
            found.append(_told(trial.what, verdict, time.monotonic() - trial.began, text, len(breaks), len(found), began))
    return found, ""


def _told(one: Break, verdict: str, seconds: float, text: str, total: int, done: int, began: float) -> dict[str, object]:
    left = (time.monotonic() - began) / (done + 1) * (total - done - 1)
    failed = [line.split(" - ")[0].removeprefix("FAILED ") for line in text.splitlines() if line.startswith("FAILED ")]
    print(f"{done + 1:>4}/{total}  {verdict:<12} {one.name}  {seconds:.1f} s, about {left / 60:.1f} min left", flush=True)
    if verdict != "noticed":
        print(f"      {one.file}: {one.text!r} -> {one.replacement!r}\n      {' '.join(one.tests)}\n{text[-1500:]}", flush=True)
    return {"name": one.name, "file": one.file, "verdict": verdict, "seconds": round(seconds, 1), "by": failed}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description="Breaks lines on purpose; a test must notice each.")
    parser.add_argument("names", nargs="*", help="beginnings of the breaks' names; none: all of them, and a result file is written")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1)), help="processes at once")
    asked = parser.parse_args(argv)
    breaks = [one for one in BREAKS if not asked.names or one.name.startswith(tuple(asked.names))]
    if not breaks:
        parser.error(f"no break has a name that begins with {' or '.join(asked.names)}")
    began = time.monotonic()
    found, failed = run(breaks, asked.jobs)
    if failed:
        print(f"{failed}\nThe tests fail with nothing broken, so no break was tried.")
        return 2
    missed = [one for one in found if one["verdict"] != "noticed"]
    minutes = (time.monotonic() - began) / 60
    print(f"{len(found) - len(missed)} of {len(found)} breaks noticed in {minutes:.1f} minutes"
          + "".join(f"\n  {one['verdict']}: {one['name']}" for one in missed))
    if not asked.names:
        path = ROOT / "benchmarks" / "results" / f"{date.today()}-mutations.json"
        path.write_text(json.dumps({"breaks": len(found), "noticed": len(found) - len(missed), "minutes": round(minutes, 1),
                                    "jobs": asked.jobs, "each": found}, indent=1) + "\n", encoding="utf-8")
        print(f"written to {path.relative_to(ROOT)}")
    return 1 if missed else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
