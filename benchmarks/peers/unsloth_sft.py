"""Unsloth's side, on its CPU backend, from a virtual environment of its own. Read `trl_sft.py` first.

    python benchmarks/sft.py --peers trl trl-nockpt unsloth --unsloth-python unsloth-venv/bin/python

The environment, which is never Luthier's (Unsloth wants older packages, and asks for torchvision, triton, xformers and
bitsandbytes, none of which its CPU backend touches)::

    python3.11 -m venv unsloth-venv
    unsloth-venv/bin/pip install torch==2.13.0              # PyTorch's CPU build
    unsloth-venv/bin/pip install transformers==5.17.0 trl==1.15.0 "peft>=0.18" "datasets>=4.6,<5" accelerate
    unsloth-venv/bin/pip install numpy tqdm psutil packaging wheel protobuf sentencepiece huggingface_hub
    unsloth-venv/bin/pip install pillow regex msgspec requests filelock pyyaml pydantic rich
    unsloth-venv/bin/pip install --no-deps unsloth==2026.10.9 unsloth_zoo==2026.10.9

The two must match: over unsloth_zoo 2026.10.7, which has no CPU backend, `import unsloth` ends with "Unsloth cannot
find any torch accelerator? You need a GPU". Licenses: unsloth_zoo's CPU backend is AGPL-3.0; it is called here, and no
line of it is here. It turns packing and padding-free batches off. Side `unsloth` recomputes activations, which is
Unsloth's default; `unsloth-nockpt` does not.
"""

from __future__ import annotations

import sys

# Unsloth patches Transformers and TRL when it is imported, so it stands before them.
from unsloth import FastLanguageModel  # isort: skip
import torch
from datasets import Dataset, disable_progress_bars
from trl import SFTTrainer  # type: ignore[attr-defined]

from benchmarks.peers.trl_sft import Clock, config, train
from benchmarks.peers.watch import Watch
from benchmarks.workload import Job, without_last_break

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    job = Job.read(sys.argv[1])
    s, watch = job.setting, Watch(job)
    recompute = "unsloth" if job.side == "unsloth" else False
    disable_progress_bars()
    model, tokenizer = FastLanguageModel.from_pretrained(
        job.folder, max_seq_length=s.max_length, dtype=getattr(torch, s.dtype), load_in_4bit=False,
        use_gradient_checkpointing=recompute)
    model = FastLanguageModel.get_peft_model(
        model, r=s.rank, lora_alpha=s.alpha, lora_dropout=0.0, target_modules=LINEAR, random_state=s.seed,
        use_gradient_checkpointing=recompute)
    tokenizer.chat_template = without_last_break(tokenizer.chat_template)
    trainer = SFTTrainer(model=model, args=config(job, gradient_checkpointing=bool(recompute)),
                         train_dataset=Dataset.from_list(job.examples()), processing_class=tokenizer,
                         callbacks=[Clock(watch)])
    train(job, trainer, watch)


if __name__ == "__main__":
    main()
