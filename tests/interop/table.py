"""Runs of every kind of base and task, made without training: random weights everywhere, saved as a run is saved.

    made = make_run(tmp_path, "bert", "single")
    made.outputs(made.ids)        # what this package says of texts of unequal length
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from contract.lab import stir
from luthier import assembly
from luthier.assembly.factory import load_family
from luthier.assembly.recipe import Recipe
from luthier.assembly.rl_setup import init_rl_policy
from luthier.assembly.run_io import save_tuned
from luthier.core.types import Inputs, LossInputs, SegmentTree
from luthier.training.run_folder import Run
from tiny import CLS, ENCODERS, MASK, PAD, SEP, VISIONS, VOCABULARY, pair_tokenizer, save_tiny

_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
          "vocab_size": VOCABULARY, "max_position_embeddings": 128, "initializer_range": 0.15, "pad_token_id": PAD}
_MARKS = {"cls_token_id": CLS, "sep_token_id": SEP, "bos_token_id": CLS, "eos_token_id": SEP}
MORE: dict[str, dict[str, Any]] = {  # encoders besides those of tiny.py
    "modernbert": {"model_type": "modernbert", **_SIZES, **_MARKS, "local_attention": 8, "classifier_pooling": "cls"},
    "modernbert-mean": {"model_type": "modernbert", **_SIZES, **_MARKS, "local_attention": 8, "classifier_pooling": "mean"},
    "deberta": {"model_type": "deberta-v2", **_SIZES, "relative_attention": True, "position_biased_input": False,
                "pos_att_type": ["p2c", "c2p"]},
    "electra": {"model_type": "electra", **_SIZES, "embedding_size": 16},
    "albert": {"model_type": "albert", **_SIZES, "embedding_size": 16, "num_hidden_groups": 2},
    "xlm-roberta": {"model_type": "xlm-roberta", **_SIZES, "pad_token_id": 1, "type_vocab_size": 1},
}
ENCODER_KINDS = ("bert", "roberta", "distilbert", *MORE)
DECODER_KINDS = ("llama", "qwen2", "gpt2", "mistral", "gemma2")
OBJECTIVES: dict[str, dict[str, Any]] = {
    "single": {"name": "classify", "labels": ["no", "perhaps", "yes"]},
    "multi": {"name": "classify", "task": "multi", "labels": ["red", "green", "blue", "gray"]},
    "regression": {"name": "classify", "task": "regression"},
    "tags": {"name": "classify", "task": "tokens", "labels": ["O", "B-PER", "I-PER"]},
    "reward": {"name": "reward"},
    "embedding": {"name": "contrastive"},
    "embedding-learned": {"name": "contrastive", "learn_temperature": True},
}
TEXTS = ("a", "good food, and quickly", "not my taste at all; I would not go there again")


def save_base(path: Path, kind: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """A tiny random base of the kind, with its tokenizer."""
    if kind not in MORE:
        return save_tiny(path, kind, dtype=dtype, **overrides)
    settings = {**MORE[kind], **overrides}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModel.from_config(config, dtype=dtype).save_pretrained(path)
    tokenizer = pair_tokenizer()
    assert tokenizer.mask_token_id == MASK
    tokenizer.save_pretrained(path)
    return path


@dataclass
class Made:
    """A run that was saved, still open."""

    run: Run
    recipe: Recipe
    base: Any
    task: str

    def ids(self, end: bool = False) -> list[list[int]]:
        """Texts of unequal length as tokens; `end`: with the end mark behind each."""
        mark = [self.base.tokenizer.eos_token_id] if end else []
        return [self.base.tokenizer(text)["input_ids"] + mark for text in TEXTS]

    @torch.no_grad()
    def outputs(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """[texts, C] scores, [texts, D] vectors, or [T, C] scores of all tokens, one text behind the other."""
        tokens = torch.tensor([token for text in ids for token in text])
        segment_tree = SegmentTree(tuple(map(len, ids)), (-1,) * len(ids))
        places = torch.cat([torch.arange(len(text)) for text in ids])
        rows = torch.arange(len(ids))
        target = LossInputs(torch.arange(len(tokens)), tokens, torch.ones(len(tokens)), len(ids), labeled_segments=rows, groups=rows)
        return self._of(Inputs(tokens, places, segment_tree), target)

    @torch.no_grad()
    def of_images(self, pixels: Tensor) -> Tensor:
        rows = torch.arange(len(pixels))
        target = LossInputs(rows, rows, torch.ones(len(pixels)), len(pixels), labeled_segments=rows, groups=rows)
        return self._of(Inputs(rows * 0, rows * 0, SegmentTree((1,) * len(pixels), (-1,) * len(pixels)), pixels), target)

    def _of(self, inputs: Inputs, target: LossInputs) -> Tensor:
        self.base.train(False)
        needs = self.recipe.objective.required_outputs
        found = self.base.forward(inputs, target, needs).tensors()[next(iter(needs))]
        return torch.nn.functional.normalize(found, dim=-1) if needs == {"pooled"} else found


def make_run(path: Path, kind: str, task: str, method: Any = "lora", dtype: torch.dtype = torch.float32,
             **base_settings: Any) -> Made:
    """Attach, move every trainable weight at random, save as `luthier train` does."""
    base_path = save_base(path / "base", kind, dtype)
    recipe = assembly.build_recipe(None, {"model": {"name_or_path": str(base_path), **base_settings}, "method": method, "data": "rows.jsonl",
                                 "objective": OBJECTIVES[task]})
    base = load_family(recipe.model)
    attached, _ = init_rl_policy(recipe, base)
    stir(attached)
    run = Run(path / "run")
    run.create(assembly.dump_recipe(recipe), assembly.collect_provenance(recipe))
    save_tuned(run, recipe, base, attached)
    return Made(run, recipe, base, task)


__all__ = ["AutoModelForCausalLM", "DECODER_KINDS", "ENCODERS", "ENCODER_KINDS", "OBJECTIVES", "TEXTS", "VISIONS", "Made",
           "make_run", "save_base"]
