"""TRL's side: `SFTTrainer` with PEFT's LoRA, as its documentation shows it. Read `watch.py` first.

    python -m benchmarks.peers.trl_sft JOB.json

What differs from TRL's defaults, and why: the setting of the comparison (batch, rate, constant schedule, natural order,
number format) and the tokens (see `without_last_break`); no reports and no checkpoints, which would only cost time; and a log line each step instead of every
tenth, for the loss curve. Side `trl` recomputes activations, which is TRL's default; `trl-nockpt` does not, which is
faster and takes more memory. A step's clock runs from Trainer's `on_step_begin` to its `on_step_end`: collating
the batch and logging are not held against it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]

from benchmarks.peers.watch import Watch
from benchmarks.workload import Job, without_last_break


class Clock(TrainerCallback):
    """Tells the watch when a step begins and ends."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_step_begin(self, *args: Any, **more: Any) -> None:
        self.watch.begin()

    def on_step_end(self, *args: Any, **more: Any) -> None:
        self.watch.end()


def config(job: Job, **more: Any) -> SFTConfig:
    """The setting in TRL's words; `more` is a side's own."""
    s = job.setting
    return SFTConfig(
        output_dir=job.work, per_device_train_batch_size=s.batch_size, max_steps=job.steps,
        learning_rate=s.learning_rate, lr_scheduler_type="constant", adam_beta1=s.betas[0], adam_beta2=s.betas[1],
        adam_epsilon=s.epsilon, weight_decay=s.weight_decay, max_grad_norm=s.max_grad_norm, max_length=s.max_length,
        train_sampling_strategy="sequential", completion_only_loss=True, seed=s.seed,
        bf16=s.dtype == "bfloat16", use_cpu=not torch.cuda.is_available(),
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, **more)


def train(job: Job, trainer: SFTTrainer, watch: Watch) -> None:
    """Train, note every document on its way into a batch, and leave the account."""
    collate = trainer.data_collator

    def noting(features: list[dict[str, Any]]) -> Any:
        for row in features:
            watch.saw(row["input_ids"], (i for i, label in enumerate(row["labels"]) if i and label != -100))
        return collate(features)

    trainer.data_collator = noting
    trainer.train()
    watch.account([line["loss"] for line in trainer.state.log_history if "loss" in line])


def main() -> None:
    job = Job.read(sys.argv[1])
    s, watch = job.setting, Watch(job)
    disable_progress_bars()
    torch.manual_seed(s.seed)
    tokenizer = AutoTokenizer.from_pretrained(job.folder)
    tokenizer.chat_template = without_last_break(tokenizer.chat_template)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(job.folder, dtype=getattr(torch, s.dtype)),
        args=config(job, gradient_checkpointing=job.side == "trl"),
        train_dataset=Dataset.from_list(job.examples()),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=s.rank, lora_alpha=s.alpha, lora_dropout=0.0, target_modules="all-linear",
                               task_type="CAUSAL_LM"),
        callbacks=[Clock(watch)])
    train(job, trainer, watch)


if __name__ == "__main__":
    main()
