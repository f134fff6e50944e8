"""Every pair of axes, tried on tiny bases through Luthier's own assembly. `contract/test_sweep.py` runs the trials.

    why = trial(home, "llama", "lora", "dpo")       # "" where it works, else the sentence by which it is refused

A trial assembles a recipe as `luthier train` does. What is refused must be refused
there, before the first step; what raises later is a fault. What works must have learned, have changed nothing but what
it says it trains, and go on from a checkpoint to the same bits. Read `tiny.py` first.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from luthier import assembly
from luthier.assembly.factory import check_loaded_model, fit_objective, load_datasets, load_family
from luthier.assembly.recipe import Recipe, compute_default_learning_rate
from luthier.assembly.reference_model import precompute_reference
from luthier.assembly.rl_setup import build_training_source, init_rl_policy
from luthier.assembly.run_io import open_run, save_tuned
from luthier.core.errors import LuthierError
from luthier.core.types import Batch
from luthier.data.transforms import apply_fixed
from luthier.methods import METHODS
from luthier.models.task_heads import LOG_PROBS
from luthier.objectives import OBJECTIVES, SHORT_FORMS
from luthier.training import checkpoint
from luthier.training.loop import OnlineTrainJob, TrainJob, run_training_loop
from luthier.training.rng import seed_everything
from luthier.training.run_folder import Run
from luthier.training.step import evaluate_batches
from tiny import ENCODERS, END_OF_TEXT, IM_END, VISIONS, VOCABULARY, save_tiny, tiny_tokenizer, with_sentinels

Pair = tuple[str, str, str]  # base, method, objective
OBJECTIVE_NAMES = tuple(name for objective in OBJECTIVES
                        for name in ((objective, *SHORT_FORMS) if objective == "dpo" else (objective,)))

STEPS, SAVED = 3, 2  # a run's, and that of the checkpoint from which it goes on
SIMPLEST = {  # of each base, what it is tried with under every method
    "gpt2": "sft", "llama": "sft", "qwen2": "sft", "gemma2": "sft", "gemma3": "sft", "mixtral": "sft",
    "bert": "classify", "distilbert": "classify", "t5": "sft", "vit": "classify"}
BASES = tuple(SIMPLEST)
FAMILIES = {"llama": "causal", "bert": "encoder", "t5": "sequence to sequence", "vit": "vision"}
ELSEWHERE = (("bert", "contrastive"), ("bert", "reward"), ("bert", "pretrain"), ("t5", "pretrain"), ("vit", "contrastive"))  # tried with every method, besides
SETTINGS: dict[str, dict[str, Any]] = {  # of methods: small enough for a tiny base
    **{name: {"num_virtual_tokens": 3} for name in ("prompt", "ptuning", "prefix", "ptuning_v2")},
    "lora": {"rank": 2}, "adalora": {"target_r": 5, "init_r": 6, "final_fraction": 0.3},  # no map loses all of its ranks
    "adapter": {"reduction_factor": 8}, "peft": {"type": "LOHA", "config": {"r": 2}}}
RATES = {"full": 1e-3, "freeze": 1e-3,
         **dict.fromkeys(("ln_tuning", "bitfit", "lora", "adalora", "adapter", "peft", "ia3"), 3e-3)}
SMALLER: dict[str, dict[str, Any]] = {  # else one layer; Gemma's two are of two kinds
    "gpt2": {"n_layer": 1}, "distilbert": {"n_layers": 1}, "gemma2": {}, "gemma3": {}}
WORDS = ("alpha", "beta", "gamma", "delta")


# ---------------------------------------------------------------- bases and rows


def prepare(home: Path) -> Path:
    """Write every base and every file of rows into `home`."""
    for kind in sorted(set(BASES) - {"t5"}):
        save_tiny(home / kind, kind, dtype=torch.float32, words=kind in ENCODERS, **SMALLER.get(kind, {"num_hidden_layers": 1}))
    _t5(home / "t5")
    rows: dict[str, list[dict[str, Any]]] = {
        "sft": [{"prompt": f"{w}?", "completion": w[::-1]} for w in WORDS],
        "pretrain": [{"text": f"{w} and {w}"} for w in WORDS],
        "classify": [{"text": w, "label": "ab"[i % 2]} for i, w in enumerate(WORDS)],
        "contrastive": [{"anchor": w, "positive": w[::-1]} for w in WORDS],
        "kto": [{"prompt": f"{w}?", "completion": w[:2 + i], "label": i % 2} for i, w in enumerate(WORDS)],
        "ppo": [{"prompt": f"{w}?"} for w in WORDS],
        "reward": [{"prompt": f"{w}?", "chosen": w, "rejected": "no " + w[:2]} for w in WORDS]}
    for name, found in rows.items():
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    pixels = torch.randint(256, (4, 8, 8, 1), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    (home / "train-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, 4, 8, 8) + bytes(pixels.flatten().tolist()))
    (home / "train-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, 4) + bytes([0, 1, 0, 1]))
    return home


def _t5(path: Path) -> None:
    marks: dict[str, Any] = {"decoder_start_token_id": END_OF_TEXT, "pad_token_id": END_OF_TEXT, "eos_token_id": IM_END}
    config = T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, dropout_rate=0.0,
                      relative_attention_num_buckets=8, relative_attention_max_distance=16, **marks)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        T5ForConditionalGeneration(config).save_pretrained(path)
    words = with_sentinels(tiny_tokenizer())
    words.chat_template = None
    words.backend_tokenizer.post_processor = TemplateProcessing(single="$A <|im_end|>",
                                                                special_tokens=[("<|im_end|>", IM_END)])
    words.save_pretrained(path)


def rows_of(base: str, objective: str) -> str:
    """The file of rows that an objective learns from on a base."""
    if base in VISIONS and objective in ("classify", "contrastive"):
        return "train-images-idx3-ubyte"
    known = {"grpo": "ppo", **{name: name for name in ("sft", "pretrain", "classify", "contrastive", "kto", "ppo")}}
    return known.get(objective, "reward") + ".jsonl"


def recipe(home: Path, base: str, method: str, objective: str) -> Recipe:
    minimized: dict[str, Any] = {"name": objective}
    if objective in OBJECTIVES and OBJECTIVES[objective].is_online:
        minimized |= {"reward": f"{__file__}:vowels", "num_generations": 3, "max_new_tokens": 4}
    if base in VISIONS and objective == "contrastive":
        minimized |= {"loss": "supcon"}
    return assembly.build_recipe({
        "model": str(home / base), "method": {"name": method, **SETTINGS.get(method, {})}, "objective": minimized,
        "data": str(home / rows_of(base, objective)), "training": {"max_steps": STEPS, "batch_size": 4, "save_steps": SAVED},
        "optimizer": {"learning_rate": RATES.get(method), "lr_scheduler_type": "constant", "warmup_ratio": 0}, "seed": 1})


def vowels(prompts: Sequence[Any], completions: Sequence[str], metadata: Sequence[Any]) -> list[float]:
    """A reward: the share of an answer's characters that are in the first half of the alphabet of bytes."""
    return [sum(ord(letter) < 80 for letter in text) / (1 + len(text)) for text in completions]


# ---------------------------------------------------------------- one trial


class Trial:
    """A recipe, assembled. Raises the `LuthierError` by which it is refused."""

    def __init__(self, made: Recipe, folder: Path) -> None:
        seed_everything(made.seed)
        self.base = load_family(made.model, made.objective.uses_masking)
        check_loaded_model(made, self.base)
        found = load_datasets(made, self.base)
        self.made = fit_objective(made, found)
        self.attached, self.reference = init_rl_policy(self.made, self.base)
        found = precompute_reference(self.made, self.base, found, self.reference)
        self.feed = build_training_source(self.made, self.base, found, self.attached, self.reference)
        self.lines: list[dict[str, float]] = []
        job: type[TrainJob] = OnlineTrainJob if self.made.objective.is_online else TrainJob
        self.job = job(self.base, self.attached, self.made.objective, self.feed, [], self.made.training,
                       self.made.optimizer, made.optimizer.learning_rate or compute_default_learning_rate(made), folder,
                       reference=self.reference, log=lambda step, numbers: self.lines.append(dict(numbers)))
        self.batches: list[Batch] = [] if self.made.objective.is_online else assembly.rows.build_eval_batches([apply_fixed(one) for one in found.train], 1000)

    def loss(self) -> float:
        """On all rows, without dropout."""
        self.base.train(False)
        return evaluate_batches(self.base, self.made.objective, self.batches, self.reference)["loss"]


def trial(home: Path, base: str, method: str, objective: str) -> str:
    """What a pair is refused for, before its first step; empty where it works, which is then asserted."""
    made, folder = recipe(home, base, method, objective), home / "checkpoints"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        one = Trial(made, folder)
    except LuthierError as refused:
        return refused.what.replace(f"{home}/", "")
    before = copies(one)
    start = one.loss() if one.batches else 0.0
    run_training_loop(one.job)
    own = {id(p) for p in one.attached.parameters().values()}
    for name, (parameter, old) in before.items():
        if id(parameter) not in own:
            assert torch.equal(parameter, old), f"{name} changed, and is not said to train"
    learned(one, before)
    if one.batches:
        assert one.loss() < start, (start, one.loss())
    again = Trial(made, folder)
    run_training_loop(again.job, checkpoint.load_checkpoint(folder / f"step-{SAVED}"))
    assert [line["loss"] for line in again.lines] == [line["loss"] for line in one.lines[SAVED:]]
    same(one.attached.state(), again.attached.state())
    if objective == SIMPLEST[base]:
        reopens(home, one)
    return ""


def learned(one: Trial, before: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Everything that trains has moved, but for what the loss does not depend on: an output projection where no token is
    predicted, a bias of scores that are only compared with one another, and queries, keys and distances in a decoder that
    has written nothing: its one place sees itself alone."""
    head = one.base.structure.head
    spared = {id(p) for p in head.parameters()} if head and not one.made.objective.required_outputs & LOG_PROBS else set()
    silent = one.made.objective.name in ("classify", "contrastive")
    for name, parameter in one.attached.parameters().items():
        compared = one.made.objective.name == "reward" and parameter.ndim == 1
        single = one.base.is_encoder_decoder and silent and re.search(r"decoder.*SelfAttention\.([qk]\b|relative)", name)
        assert (not torch.equal(*before[f"trained {name}"]) or compared or single or id(parameter) in spared), \
            f"{name} did not learn"


def copies(one: Trial) -> dict[str, tuple[Tensor, Tensor]]:
    """Every parameter, of the base and of what trains, and its copy."""
    named = dict(one.base.structure.model.named_parameters())
    named |= {f"trained {name}": p for name, p in one.attached.parameters().items()}
    return {name: (p, p.detach().clone()) for name, p in named.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def reopens(home: Path, one: Trial) -> None:
    """The run folder gives the same loss as the model that it was written from."""
    run = Run(home / "run")
    shutil.rmtree(run.path, ignore_errors=True)
    run.create(assembly.dump_recipe(one.made), {})
    save_tuned(run, one.made, one.base, one.attached)
    made, opened, _ = open_run(run)
    opened.train(False)
    assert abs(evaluate_batches(opened, made.objective, one.batches)["loss"] - one.loss()) < 1e-6


def tried() -> list[Pair]:
    """Every (base, method, objective) of the page, each once."""
    found = [(base, method, SIMPLEST[base]) for base in BASES for method in METHODS]
    found += [(base, "lora", objective) for base in FAMILIES for objective in OBJECTIVE_NAMES]
    found += [("llama", method, objective) for method in METHODS for objective in OBJECTIVE_NAMES]
    found += [(base, method, objective) for method in METHODS for base, objective in ELSEWHERE]
    return list(dict.fromkeys(found))
