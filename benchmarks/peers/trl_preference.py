"""TRL's side of preferences: `DPOTrainer` and `RewardTrainer` with PEFT's LoRA. Read `trl_sft.py` first.

    python -m benchmarks.peers.trl_preference JOB.json

Both as their documentation shows them, recomputing activations as they do by default; what differs is the setting of the
comparison. The reference of DPO is the model without its adapter, computed at each step.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer  # type: ignore[attr-defined]

from benchmarks.peers.trl_sft import Clock
from benchmarks.peers.watch import Watch
from benchmarks.workload import Job, without_last_break


def settings(job: Job) -> dict[str, Any]:
    """The setting in TRL's words."""
    s = job.setting
    return {
        "output_dir": job.work, "per_device_train_batch_size": s.batch_size, "max_steps": job.steps,
        "learning_rate": s.learning_rate, "lr_scheduler_type": "constant", "adam_beta1": s.betas[0],
        "adam_beta2": s.betas[1], "adam_epsilon": s.epsilon, "weight_decay": s.weight_decay,
        "max_grad_norm": s.max_grad_norm, "max_length": s.max_length, "train_sampling_strategy": "sequential",
        "seed": s.seed, "bf16": s.dtype == "bfloat16", "use_cpu": not torch.cuda.is_available(), "logging_steps": 1,
        "save_strategy": "no", "report_to": [], "disable_tqdm": True,
    }


def noted(collate: Any, watch: Watch, reward: bool) -> Any:
    """The collator, which first tells the watch of both answers, each behind its prompt."""
    def noting(rows: list[dict[str, Any]]) -> Any:
        for row in rows:
            for name in ("chosen_ids", "rejected_ids"):
                prompt = [] if reward else row["prompt_ids"]
                ids = (prompt + row[name])[:watch.job.setting.max_length]
                watch.saw(ids, () if reward else range(len(prompt), len(ids)))
        return collate(rows)
    return noting


def main() -> None:
    job = Job.read(sys.argv[1])
    s, watch = job.setting, Watch(job, per_example=2)
    reward = s.objective == "reward"
    disable_progress_bars()
    torch.manual_seed(s.seed)
    load: dict[str, Any] = {"dtype": getattr(torch, s.dtype)}
    model = (AutoModelForSequenceClassification.from_pretrained(job.folder, num_labels=1, **load) if reward
             else AutoModelForCausalLM.from_pretrained(job.folder, **load))
    lora = LoraConfig(r=s.rank, lora_alpha=s.alpha, lora_dropout=0.0, target_modules="all-linear",
                      task_type="SEQ_CLS" if reward else "CAUSAL_LM", modules_to_save=["score"] if reward else None)
    tokenizer = AutoTokenizer.from_pretrained(job.folder)
    tokenizer.chat_template = without_last_break(tokenizer.chat_template)
    common: dict[str, Any] = {
        "model": model, "train_dataset": Dataset.from_list(job.examples()), "peft_config": lora,
        "processing_class": tokenizer, "callbacks": [Clock(watch)]}
    trainer: Any = (RewardTrainer(args=RewardConfig(**settings(job)), **common) if reward
                    else DPOTrainer(args=DPOConfig(**settings(job)), **common))
    trainer.data_collator = noted(trainer.data_collator, watch, reward)
    trainer.train()
    watch.account([line["loss"] for line in trainer.state.log_history if "loss" in line])


if __name__ == "__main__":
    main()
