"""What a setting, a metric, an option or a file was called before the rename, and what it is called since.

`digests.py` writes recipes in the old names and translates them here for a tree that speaks the new ones; metrics are
compared under the new names. Add a rename by adding a row. A name that has no row is the same in both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Recipe = dict[str, Any]

SECTIONS = {"base": "model", "start": "init_from", "run": "output_dir"}

# Section -> old field -> new field. A dot goes one level down: of a section inside, or of every entry of a list.
FIELDS: dict[str, dict[str, str]] = {
    "base": {"name": "name_or_path", "structure": "surgery", "structure.add_blocks": "expand_layers",
             "structure.drop_blocks": "drop_layers"},
    "training": {"steps": "max_steps", "epochs": "num_train_epochs", "micro_tokens": "max_tokens_per_micro_batch",
                 "eval_every": "eval_steps", "save_every": "save_steps", "keep": "save_total_limit",
                 "patience": "early_stopping_patience", "keep_best": "load_best_model_at_end", "trackers": "report_to"},
    "optimizer": {"schedule": "lr_scheduler_type", "floor": "min_lr_ratio", "clip": "max_grad_norm",
                  "beta1": "adam_beta1", "beta2": "adam_beta2", "epsilon": "adam_epsilon"},
    "data": {"overlong": "truncation", "limit": "max_samples", "train_on": "loss_on", "augment.chance": "probability"},
    "evaluate": {"limit": "max_samples", "before": "before_training"},
}
_ROLLOUT = {"answers": "num_generations", "at_once": "generation_batch_size", "minibatches": "num_mini_batches",
            "unfinished": "missing_eos_penalty", "target_kl": "early_stop_kl", "reward.run": "model"}
_VIRTUAL = {"tokens": "num_virtual_tokens", "hidden": "encoder_hidden_size", "text": "prompt_tuning_init_text",
            "projection": "prefix_projection", "init": "prompt_tuning_init", "encoder": "encoder_reparameterization_type"}
# The same of methods and objectives, by the old name of the one that it is.
OBJECTIVE_FIELDS: dict[str, dict[str, str]] = {
    "ppo": {**_ROLLOUT, "epochs": "num_ppo_epochs", "clip": "cliprange", "value_clip": "cliprange_value",
            "value_weight": "vf_coef", "entropy_weight": "entropy_coef", "kl_weight": "kl_coef", "lam": "gae_lambda",
            "whiten": "whiten_advantages", "kl_target": "adaptive_kl_target", "kl_in": "kl_penalty_in"},
    "grpo": {**_ROLLOUT, "epochs": "num_iterations", "clip": "epsilon", "clip_high": "epsilon_high",
             "kl_weight": "beta", "advantage": "advantage_estimator"},
    "kto": {"good_weight": "desirable_weight", "bad_weight": "undesirable_weight"},
    "cdpo": {"flipped": "label_smoothing"}, "robust": {"flipped": "label_smoothing"},
    "contrastive": {"kind": "loss", "both": "symmetric", "learned": "learn_temperature"},
    "reward": {"centring": "center_rewards_coefficient"},
    "pretrain": {"rate": "mlm_probability", "whole_words": "whole_word_mask", "span": "mean_noise_span_length"},
}
METHOD_FIELDS: dict[str, dict[str, str]] = {
    "full": {"embedding_rate": "embedding_lr_multiplier"},
    "freeze": {"embedding_rate": "embedding_lr_multiplier", "last": "num_trainable_layers"},
    "lora": {"targets": "target_modules", "plus": "loraplus_lr_ratio", "rslora": "use_rslora", "dora": "use_dora",
             "init": "init_lora_weights"},
    "adalora": {"targets": "target_modules", "rank": "target_r", "start_rank": "init_r", "wait": "warmup_fraction",
                "settle": "final_fraction", "every": "prune_interval", "orthogonal": "orth_reg_weight"},
    "ia3": {"targets": "target_modules", "feedforward": "feedforward_modules"},
    "adapter": {"reduction": "reduction_factor"},
    "bitfit": {"which": "bias_scope"},
    **dict.fromkeys(("prompt", "ptuning", "prefix", "ptuning_v2"), _VIRTUAL),
}

# (section, old field) -> old value -> new value.
VALUES: dict[tuple[str, str], dict[str, str]] = {
    ("objective", "name"): {"choice": "multiple_choice"},
    ("objective", "kind"): {"pairs": "infonce", "labels": "supcon", "scores": "cosent"},
    ("method", "name"): {"ln": "ln_tuning"},
    ("method", "init"): {"words": "text"},  # of virtual tokens; LoRA has no start of that name
    ("data", "format"): {"judged": "unpaired_preference", "judged_chat": "unpaired_preference_chat",
                         "transcripts": "implicit_prompt_preference", "picture": "image"},
    ("evaluate", "metrics"): {"exact": "exact_match", "number": "numeric_match"},
}

# Old metric -> new metric, with or without the prefix of held-out rows.
METRICS = {
    "clip_share": "clip_fraction", "kl_old": "approx_kl", "finished_share": "eos_rate",
    "answer_tokens": "completion_length", "reward_chosen": "rewards/chosen", "reward_rejected": "rewards/rejected",
    "reward_margin": "rewards/margins", "pair_accuracy": "rewards/accuracies", "trainable_share": "trainable_fraction",
    "value_error": "value_loss", "logps_chosen": "logps/chosen", "logps_rejected": "logps/rejected",
    "reward_good": "rewards/chosen", "reward_bad": "rewards/rejected", "logps_good": "logps/chosen",
    "logps_bad": "logps/rejected", "kl_weight": "kl_coef",
    "exact": "exact_match", "number": "numeric_match",
}
PREFIX = re.compile(r"^(eval_|test_|validation_)?(.*)$")

# Old word -> new word of a command line, by its command (an option's value too); then commands themselves.
WORDS: dict[str, dict[str, str]] = {
    "evaluate": {"--base": "--base-model-only", "--limit": "--max-samples"},
    "export": {"whole": "bundle"},
    "combine": {"--how": "--combination-type", "sum": "linear", "concatenation": "cat"},
    "paraphrase": {"--ask": "--prompt-template", "--limit": "--max-samples"},
}
COMMANDS = {"combine": "merge-adapters"}

# Old name -> new name of a file or a key in a run folder, and of the start of a tensor's name.
FILES: dict[str, str] = {}
KEYS: dict[str, str] = {}
TENSORS: dict[str, str] = {}

PREFERENCES = ("ipo", "cdpo", "robust", "hinge")  # objectives of their own once, now loss types of dpo


def new_recipe(old: Recipe) -> Recipe:
    """A recipe of old names, every part a mapping, in the new ones."""
    made: Recipe = {}
    for section, value in old.items():
        if section in ("method", "objective"):
            parts = [_named(section, part) for part in (value if isinstance(value, list) else [value])]
            new: Any = parts if isinstance(value, list) else parts[0]
        elif isinstance(value, dict):
            new = _fields(section, value, FIELDS.get(section, {}))
        else:
            new = value
        made[SECTIONS.get(section, section)] = new
    return made


def _named(section: str, part: Recipe) -> Recipe:
    """A method or an objective, whose fields depend on which one it is."""
    name = part["name"]
    known = (METHOD_FIELDS if section == "method" else OBJECTIVE_FIELDS).get(name, {})
    made = _fields(section, part, known)
    return {**made, "name": "dpo", "loss_type": name} if section == "objective" and name in PREFERENCES else made


def _fields(section: str, part: Recipe, known: Mapping[str, str]) -> Recipe:
    made: Recipe = {}
    for name, value in part.items():
        if section == "optimizer" and name == "warmup":  # one number read in two ways became two fields
            made["warmup_steps" if value >= 1 else "warmup_ratio"] = value
            continue
        inner = {old.partition(".")[2]: new for old, new in known.items() if old.startswith(f"{name}.")}
        if isinstance(value, list):
            words = VALUES.get((section, name), {})
            value = [_fields("", one, inner) if isinstance(one, dict) else words.get(one, one) for one in value]
        elif isinstance(value, dict):
            value = _fields("", value, inner)
        elif isinstance(value, str):
            value = VALUES.get((section, name), {}).get(value, value)
        made[known.get(name, name)] = value
    return made


def new_command(old: list[str]) -> list[str]:
    """A command line of old words in the new ones."""
    command, *rest = old
    words = WORDS.get(command, {})
    return [COMMANDS.get(command, command), *(words.get(word, word) for word in rest)]


def new_metric(old: str) -> str:
    """The new name of a metric: of a step, of an evaluation, or of a result."""
    found = PREFIX.match(old)
    assert found is not None
    prefix, name = found.groups()
    return METRICS.get(old) or (prefix or "") + METRICS.get(name, name)


def new_file(old: str) -> str:
    """The new path of a file inside a run folder."""
    return "/".join(FILES.get(part, part) for part in old.split("/"))


def new_tensor(old: str) -> str:
    """The new name of a tensor that a file holds; names in PEFT's and Transformers' files stay."""
    return next((new + old.removeprefix(start) for start, new in TENSORS.items() if old.startswith(start)), old)
