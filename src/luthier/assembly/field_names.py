"""Field names of other tools and older recipes: accepted, or answered with the name used here. Read `recipe.py` first.

`ACCEPTED` lists the names that are read as ours. `RENAMED` lists names that are refused with an error that gives the
right name. Both are keyed by the dotted name first, then by the bare name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.core.errors import RecipeError

# PEFT's names of a LoRA's settings; of the method lora alone.
ACCEPTED: Mapping[str, str] = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}

# Name in another tool, or in older recipes -> dotted name here. A key with a dot stands for that place alone.
RENAMED: Mapping[str, str] = {
    # the recipe's top level and `model`
    "base": "model", "start": "init_from", "run": "output_dir", "base.name": "model.name_or_path",
    "base.structure": "model.surgery", "model.name": "model.name_or_path", "model.structure": "model.surgery",
    "add_blocks": "model.surgery.expand_layers", "drop_blocks": "model.surgery.drop_layers",
    "model_name_or_path": "model.name_or_path", "model_name": "model.name_or_path", "model_id": "model.name_or_path",
    "base_model": "model.name_or_path", "pretrained_model_name_or_path": "model.name_or_path",
    "torch_dtype": "model.dtype", "load_in_4bit": "model.quantize: nf4", "load_in_8bit": "model.quantize: int8",
    "quantization_bit": "model.quantize", "adapter_name_or_path": "init_from", "model_revision": "model.revision",
    "finetuning_type": "method.name", "adapter": "method.name", "stage": "objective.name", "optim": "optimizer",
    # training
    "training.steps": "training.max_steps", "training.epochs": "training.num_train_epochs",
    "steps": "training.max_steps", "epochs": "training.num_train_epochs", "num_epochs": "training.num_train_epochs",
    "micro_tokens": "training.max_tokens_per_micro_batch", "eval_every": "training.eval_steps",
    "save_every": "training.save_steps", "keep": "training.save_total_limit",
    "patience": "training.early_stopping_patience", "keep_best": "training.load_best_model_at_end",
    "trackers": "training.report_to",
    "per_device_train_batch_size": "training.batch_size (examples per optimizer step, on all devices together)",
    "train_batch_size": "training.batch_size", "micro_batch_size": "training.max_tokens_per_micro_batch",
    "gradient_accumulation_steps": "training.batch_size (it is divided into micro-batches by itself)",
    "max_tokens": "training.max_tokens_per_micro_batch", "eval_strategy": "training.eval_steps",
    "evaluation_strategy": "training.eval_steps", "save_strategy": "training.save_steps",
    "logging_steps": "training.report_to (each step is logged to metrics.jsonl)",
    "bf16": "training.precision: bf16", "fp16": "training.precision: bf16",
    "mixed_precision": "training.precision", "use_gradient_checkpointing": "training.gradient_checkpointing",
    # optimizer
    "schedule": "optimizer.lr_scheduler_type", "lr_scheduler": "optimizer.lr_scheduler_type",
    "scheduler": "optimizer.lr_scheduler_type", "warmup": "optimizer.warmup_ratio or optimizer.warmup_steps",
    "num_warmup_steps": "optimizer.warmup_steps", "floor": "optimizer.min_lr_ratio",
    "min_lr": "optimizer.min_lr_ratio (a share of the peak rate)", "optimizer.clip": "optimizer.max_grad_norm",
    "gradient_clipping": "optimizer.max_grad_norm", "clip_grad_norm": "optimizer.max_grad_norm",
    "optimizer.beta1": "optimizer.adam_beta1", "optimizer.beta2": "optimizer.adam_beta2",
    "optimizer.epsilon": "optimizer.adam_epsilon", "betas": "optimizer.adam_beta1 and optimizer.adam_beta2",
    "lr": "optimizer.learning_rate",
    # data
    "overlong": "data.truncation", "limit": "data.max_samples", "data.limit": "data.max_samples",
    "train_on": "data.loss_on", "assistant_only_loss": "data.loss_on", "train_on_inputs": "data.loss_on",
    "dataset": "data.train", "datasets": "data.train", "dataset_name": "data.train", "train_file": "data.train",
    "train_dataset": "data.train", "eval_dataset": "data.eval", "val_size": "data.eval (a fraction of data.train)",
    "max_seq_length": "data.max_length", "max_seq_len": "data.max_length", "cutoff_len": "data.max_length",
    "sequence_len": "data.max_length", "model_max_length": "data.max_length",
    "max_train_samples": "data.max_samples", "dataset_text_field": "data.columns: {text: ...}",
    "chat_template": "data.chat", "template": "data.chat", "system_prompt": "data.system",
    # evaluate
    "evaluate.limit": "evaluate.max_samples", "evaluate.before": "evaluate.before_training",
    "max_eval_samples": "evaluate.max_samples", "per_device_eval_batch_size": "evaluate.batch_size",
    "predict_with_generate": "evaluate.metrics",
    # methods
    "method.targets": "method.target_modules", "target_modules": "method.target_modules",
    "lora_target": "method.target_modules", "lora_target_modules": "method.target_modules",
    "r": "method.rank", "lora_r": "method.rank", "lora_rank": "method.rank", "lora_alpha": "method.alpha",
    "lora_dropout": "method.dropout", "method.plus": "method.loraplus_lr_ratio",
    "method.rslora": "method.use_rslora", "method.dora": "method.use_dora",
    "method.init": "method.init_lora_weights (lora) or method.prompt_tuning_init (prompt)",
    "method.start_rank": "method.init_r", "method.wait": "method.warmup_fraction",
    "method.settle": "method.final_fraction", "method.every": "method.prune_interval",
    "method.orthogonal": "method.orth_reg_weight", "method.tokens": "method.num_virtual_tokens",
    "method.hidden": "method.encoder_hidden_size", "method.text": "method.prompt_tuning_init_text",
    "method.projection": "method.prefix_projection", "method.encoder": "method.encoder_reparameterization_type",
    "method.embedding_rate": "method.embedding_lr_multiplier", "method.reduction": "method.reduction_factor",
    "method.feedforward": "method.feedforward_modules", "method.which": "method.bias_scope",
    "method.last": "method.num_trainable_layers",
    # objectives
    "objective.answers": "objective.num_generations", "objective.at_once": "objective.generation_batch_size",
    "objective.epochs": "objective.num_ppo_epochs (ppo) or objective.num_iterations (grpo)",
    "objective.minibatches": "objective.num_mini_batches", "objective.unfinished": "objective.missing_eos_penalty",
    "objective.clip": "objective.cliprange (ppo) or objective.epsilon (grpo)",
    "objective.value_clip": "objective.cliprange_value", "objective.value_weight": "objective.vf_coef",
    "objective.entropy_weight": "objective.entropy_coef",
    "objective.kl_weight": "objective.kl_coef (ppo) or objective.beta (grpo)", "objective.lam": "objective.gae_lambda",
    "objective.whiten": "objective.whiten_advantages", "objective.kl_target": "objective.adaptive_kl_target",
    "objective.target_kl": "objective.early_stop_kl", "objective.kl_in": "objective.kl_penalty_in",
    "objective.clip_high": "objective.epsilon_high", "objective.advantage": "objective.advantage_estimator",
    "objective.good_weight": "objective.desirable_weight", "objective.bad_weight": "objective.undesirable_weight",
    "objective.flipped": "objective.label_smoothing", "objective.kind": "objective.loss",
    "objective.both": "objective.symmetric", "objective.learned": "objective.learn_temperature",
    "objective.centring": "objective.center_rewards_coefficient", "objective.rate": "objective.mlm_probability",
    "objective.whole_words": "objective.whole_word_mask", "objective.span": "objective.mean_noise_span_length",
    "beta": "objective.beta", "pref_beta": "objective.beta", "num_generations": "objective.num_generations",
}


def accept_peft_names(raw: Mapping[str, Any], override: bool = False) -> dict[str, Any]:
    """The recipe with PEFT's names of a LoRA's settings replaced by ours.

    Args:
        override: where both names are present, PEFT's wins, as it was given later.

    Raises:
        RecipeError: both names are present, and none was given later.
    """
    method = raw.get("method")
    if isinstance(method, Mapping):
        return {**raw, "method": _accept_in_method(method, override)}
    if isinstance(method, list | tuple):
        return {**raw, "method": [_accept_in_method(part, override) if isinstance(part, Mapping) else part
                                  for part in method]}
    return dict(raw)


def _accept_in_method(method: Mapping[str, Any], override: bool) -> dict[str, Any]:
    if method.get("name", "lora") != "lora":
        return dict(method)
    renamed = {key: value for key, value in method.items() if key not in ACCEPTED}
    for theirs, ours in ACCEPTED.items():
        if theirs in method:
            if ours in method and not override:
                raise RecipeError(f"method.{ours} and method.{theirs} are the same setting, and both are given",
                                  f"keep method.{ours}")
            renamed[ours] = method[theirs]
    return renamed


def take_renamed(raw: Mapping[str, Any], sections: Mapping[str, frozenset[str]]) -> tuple[dict[str, Any], list[str]]:
    """The recipe without the names in `RENAMED`, and one error line for each of them.

    Args:
        sections: the known fields of each section of a recipe; of the top level under "".
    """
    rest: dict[str, Any] = {}
    lines: list[str] = []
    for key, value in raw.items():
        if key not in sections[""] and (name := RENAMED.get(key)):
            inside = value if isinstance(value, Mapping) else {}
            lines += [_answer(f"{key}.{one}", RENAMED.get(f"{key}.{one}", f"{name}.{one}")) for one in inside]
            lines += [] if inside else [_answer(key, name)]
        elif isinstance(value, Mapping) and (known := sections.get(key)):
            inner = {name: one for name, one in value.items() if name in known or not _find_renamed(key, name)}
            lines += [_answer(f"{key}.{name}", str(_find_renamed(key, name))) for name in value if name not in inner]
            rest[key] = inner
        else:
            rest[key] = value
    return rest, lines


def _find_renamed(section: str, key: Any) -> str | None:
    return RENAMED.get(f"{section}.{key}") or RENAMED.get(key)


def _answer(given: str, name: str) -> str:
    return f"unknown setting {given!r}: use {name}"
