"""The bases, the rows and the runs of `digests.py`. Recipes and commands are in the old names of `digest_names.py`.

A case is a recipe, and what is done with its run after it has ended. `{models}` and `{runs}` in any text are the folders.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from transformers import T5Config, T5ForConditionalGeneration

from tiny import ENCODERS, END_OF_TEXT, IM_END, VOCABULARY, save_tiny, tiny_tokenizer, with_sentinels

WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa")
REWARD = '''"""A reward: the share of an answer's characters that are in the first half of the alphabet of bytes."""


def early(*columns, **named):
    answers = columns[1] if len(columns) > 1 else named.get("answers", named.get("completions"))
    return [sum(ord(letter) < 80 for letter in answer) / (1 + len(answer)) for answer in answers]
'''


@dataclass(frozen=True)
class Case:
    """One run, and what is done with it.

    Args:
        after: commands that read it; `{run}` is its folder.
        resume: the step whose checkpoint it goes on from, after all that came later is taken away.
        needs: another case whose run it reads.
    """

    recipe: dict[str, Any]
    after: list[list[str]] = field(default_factory=list)
    resume: int = 0
    needs: str = ""


# ---------------------------------------------------------------- bases and rows


def prepare(models: Path) -> None:
    """Write every base and every file of rows, once: a folder that is whole is left as it is."""
    if (models / "whole").exists():
        return
    models.mkdir(parents=True, exist_ok=True)
    for kind in ("llama", "qwen2", "gpt2", "gemma2", "mixtral", "bert", "distilbert", "vit"):
        save_tiny(models / kind, kind, dtype=torch.float32, words=kind in ENCODERS)
    _t5(models / "t5")
    for name, rows in _rows().items():
        (models / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _pictures(models)
    (models / "reward.py").write_text(REWARD)
    (models / "synonyms.txt").write_text("alpha, first\nbeta, second\nand, plus\n")
    (models / "whole").write_text("")


def _rows() -> dict[str, list[dict[str, Any]]]:
    tagged = [{"words": [w, "and", w[::-1]], "tags": ["A" if i % 2 else "B", "O", "C"]} for i, w in enumerate(WORDS)]
    return {
        "sft": [{"prompt": f"{w}?", "completion": w[::-1]} for w in WORDS],
        "chat": [{"messages": [{"role": "user", "content": w}, {"role": "assistant", "content": w[:3]},
                               {"role": "user", "content": "again"}, {"role": "assistant", "content": w[::-1]}]}
                 for w in WORDS],
        "text": [{"text": f"{w} and {w[::-1]} and {w}"} for w in WORDS],
        "label": [{"text": f"{w} and {w}", "label": "aab"[i % 3]} for i, w in enumerate(WORDS)],
        "number": [{"text": w, "label": 0.37 * i} for i, w in enumerate(WORDS)],
        "tags": tagged,
        "positive": [{"anchor": w, "positive": w[::-1]} for w in WORDS],
        "negative": [{"anchor": w, "positive": w[::-1], "negative": f"not {w}"} for w in WORDS],
        "score": [{"sentence1": w, "sentence2": w[: 1 + i % 4], "score": i / 9} for i, w in enumerate(WORDS)],
        "pair": [{"prompt": f"{w}?", "chosen": w, "rejected": f"no {w[:2]}"} for w in WORDS],
        "judged": [{"prompt": f"{w}?", "completion": w[: 2 + i % 3], "label": i % 2} for i, w in enumerate(WORDS)],
        "choices": [{"question": f"{w}?", "choices": [w[::-1], w[:2], "none"], "answer": "ABC"[i % 3]}
                    for i, w in enumerate(WORDS)],
        "prompt": [{"prompt": f"{w}?", "reference": w, "length": 2} for w in WORDS],
    }


def _pictures(models: Path) -> None:
    pixels = torch.randint(256, (8, 8, 8, 1), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    head, labels = struct.pack(">IIII", 0x803, 8, 8, 8), bytes([0, 1, 2, 0, 1, 2, 0, 1])
    (models / "train-images-idx3-ubyte").write_bytes(head + bytes(pixels.flatten().tolist()))
    (models / "train-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, 8) + labels)


def _t5(path: Path) -> None:
    marks: dict[str, Any] = {"decoder_start_token_id": END_OF_TEXT, "pad_token_id": END_OF_TEXT, "eos_token_id": IM_END}
    config = T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.1,
                      relative_attention_num_buckets=8, relative_attention_max_distance=16, **marks)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        T5ForConditionalGeneration(config).save_pretrained(path)
    words = with_sentinels(tiny_tokenizer())
    words.chat_template = None
    words.backend_tokenizer.post_processor = TemplateProcessing(single="$A <|im_end|>",
                                                                special_tokens=[("<|im_end|>", IM_END)])
    words.save_pretrained(path)


# ---------------------------------------------------------------- runs


def _run(kind: str, method: Any, objective: dict[str, Any], rows: str, *, data: dict[str, Any] | None = None,
         training: dict[str, Any] | None = None, optimizer: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A recipe of four steps, with three rows held out and evaluated every second step."""
    return {
        "base": {"name": f"{{models}}/{kind}", **more.pop("base", {})}, "method": method, "objective": objective,
        "data": {"train": f"{{models}}/{rows}", "eval": 0.3, **(data or {})},
        "training": {"steps": 4, "batch_size": 4, "micro_tokens": 96, "eval_every": 2, "keep_best": False, **(training or {})},
        "optimizer": {"learning_rate": 3e-3, **(optimizer or {})}, "seed": 1, **more}


def _started(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe without the parts that are those of the run that it starts from."""
    return {name: part for name, part in recipe.items() if name not in ("base", "method")}


ANSWERS = {"metrics": ["exact", "contains"], "max_new_tokens": 6, "batch_size": 2, "limit": 3}
EARLY = {"function": "{models}/reward.py:early"}
CHAT = ["chat", "{run}", "--message", "alpha?", "--max-new-tokens", "8", "--quiet"]
EVALUATE = ["evaluate", "{run}", "--json", "--quiet"]
SAMPLED = ["paraphrase", "{models}/text.jsonl", "--column", "text", "--model", "{run}", "--temperature", "0.9",
           "--seed", "5", "--limit", "3", "--max-new-tokens", "8", "--quiet", "--out", "{run}/sampled.jsonl"]
FEATURES = ["features", "{run}", "--data", "{models}/label.jsonl", "--out", "{run}/features.safetensors", "--json", "--quiet"]


def _export(to: str, *more: str) -> list[str]:
    return ["export", "{run}", "--to", to, "--out", f"{{run}}/export-{to}", *more]


def _language() -> Iterator[tuple[str, Case]]:
    sft = {"name": "sft"}
    yield "sft-full-llama", Case(_run(
        "llama", {"name": "full"}, sft, "chat.jsonl", data={"train_on": "last", "max_length": 100, "system": "Be brief."},
        optimizer={"schedule": "cosine", "warmup": 0.25, "floor": 0.1, "weight_decay": 0.1, "clip": 0.5, "beta2": 0.95},
        training={"keep_best": True, "gradient_checkpointing": True}, evaluate=ANSWERS),
        [EVALUATE, CHAT, SAMPLED, _export("merged")])
    yield "sft-lora-qwen2", Case(_run(
        "qwen2", {"name": "lora", "rank": 4, "dropout": 0.1, "plus": 4, "rank_pattern": {"q": 2}, "targets": ["q", "v", "down"]},
        sft, "sft.jsonl", training={"steps": 6, "save_every": 2, "keep": 5}, optimizer={"schedule": "wsd", "warmup": 2},
        evaluate=ANSWERS), [EVALUATE, [*EVALUATE, "--base"], CHAT, _export("merged"), _export("whole"),
                            _export("adapter", "--lora-rank", "auto"),
                            ["export", "{run}", "--to", "gguf-adapter", "--out", "{run}/adapter.gguf"]], resume=2)
    yield "sft-dora-gemma2", Case(_run("gemma2", {"name": "lora", "rank": 2, "dora": True, "rslora": True}, sft, "sft.jsonl"),
                                  [EVALUATE, CHAT, _export("merged")])
    yield "sft-pissa-gpt2", Case(_run("gpt2", {"name": "lora", "rank": 3, "init": "pissa"}, sft, "sft.jsonl"), [EVALUATE])
    yield "sft-qlora-llama", Case(_run("llama", {"name": "lora", "rank": 2}, sft, "sft.jsonl", base={"quantize": "nf4"}),
                                  [EVALUATE, CHAT])
    yield "sft-lora-mixtral", Case(_run("mixtral", {"name": "lora", "rank": 2}, sft, "sft.jsonl"), [EVALUATE])
    yield "sft-list-qwen2", Case(_run("qwen2", [{"name": "lora", "rank": 2}, {"name": "bitfit", "which": "paper"}], sft,
                                      "sft.jsonl"), [EVALUATE, CHAT, FEATURES])
    yield "sft-loha-llama", Case(_run("llama", {"name": "peft", "type": "LOHA", "config": {"r": 2}}, sft, "sft.jsonl"),
                                 [EVALUATE])
    yield "sft-grown-llama", Case(_run(
        "llama", {"name": "freeze", "last": 1, "embeddings": True, "embedding_rate": 0.5}, sft, "sft.jsonl",
        base={"structure": {"new_tokens": {"omega": "the end"}, "add_blocks": [0]}}), [EVALUATE])
    yield "sft-lora-t5", Case(_run("t5", {"name": "lora", "rank": 2}, sft, "sft.jsonl", evaluate=ANSWERS), [EVALUATE])
    yield "sft-start-qwen2", Case(_started(_run("", {}, sft, "chat.jsonl", start="{runs}/sft-lora-qwen2")), [
        ["combine", "{run}", "{runs}/sft-lora-qwen2", "--how", "concatenation", "--weights", "0.5", "0.25", "--out",
         "{run}/combined", "--json"]], needs="sft-lora-qwen2")
    yield "pretrain-full-gpt2", Case(_run(
        "gpt2", {"name": "full", "embedding_rate": 0.5}, {"name": "pretrain"}, "text.jsonl",
        data={"overlong": "split", "max_length": 16}, training={"steps": None, "epochs": 2}), [EVALUATE])
    yield "pretrain-lora-bert", Case(_run(
        "bert", {"name": "lora", "rank": 2}, {"name": "pretrain", "rate": 0.3, "whole_words": True}, "text.jsonl"), [EVALUATE])
    yield "pretrain-full-t5", Case(_run("t5", {"name": "full"}, {"name": "pretrain", "rate": 0.3, "span": 4}, "text.jsonl"),
                                   [EVALUATE])


def _judged() -> Iterator[tuple[str, Case]]:
    yield "classify-bitfit-bert", Case(_run(
        "bert", {"name": "bitfit"}, {"name": "classify", "class_weights": "balanced"}, "label.jsonl",
        data={"augment": [{"name": "deletion", "rate": 0.3}, {"name": "synonyms", "file": "{models}/synonyms.txt", "replace": 0.5}]},
        training={"steps": 8, "eval_every": 1, "patience": 1, "keep_best": True}, optimizer={"learning_rate": 0.3}),
        [EVALUATE, _export("merged")])
    yield "classify-adapter-distilbert", Case(_run(
        "distilbert", {"name": "adapter", "reduction": 8, "placement": "houlsby"}, {"name": "classify"}, "label.jsonl",
        data={"augment": [{"name": "mixup", "replace": 0.5}]}), [EVALUATE])
    yield "regress-ia3-llama", Case(_run("llama", {"name": "ia3"}, {"name": "classify", "task": "regression"},
                                         "number.jsonl"), [EVALUATE])
    yield "tags-ln-bert", Case(_run("bert", {"name": "ln"}, {"name": "classify", "task": "tokens"}, "tags.jsonl"), [EVALUATE])
    yield "images-lora-vit", Case(_run(
        "vit", {"name": "lora", "rank": 2}, {"name": "classify"}, "train-images-idx3-ubyte",
        data={"augment": [{"name": "crop", "chance": 0.7}, {"name": "flip"}, {"name": "noise", "amount": 0.1}, {"name": "mixup"}]}),
        [EVALUATE, _export("merged")])
    yield "supcon-full-vit", Case(_run("vit", {"name": "full"}, {"name": "contrastive", "kind": "labels"},
                                       "train-images-idx3-ubyte"), [EVALUATE])
    yield "contrastive-ptuning-bert", Case(_run(
        "bert", {"name": "ptuning", "tokens": 3, "hidden": 16}, {"name": "contrastive", "learned": True, "both": True,
                                                                 "mask_duplicates": True}, "positive.jsonl"), [EVALUATE])
    yield "scores-full-bert", Case(_run("bert", {"name": "full"}, {"name": "contrastive", "kind": "scores"}, "score.jsonl",
                                        base={"pooling": "mean"}), [EVALUATE])
    yield "triplet-lora-bert", Case(_run("bert", {"name": "lora", "rank": 2}, {"name": "contrastive", "kind": "triplet"},
                                         "negative.jsonl"), [EVALUATE])


def _preferences() -> Iterator[tuple[str, Case]]:
    yield "dpo-lora-llama", Case(_run("llama", {"name": "lora", "rank": 2}, {"name": "dpo", "beta": 0.2}, "pair.jsonl",
                                      training={"save_every": 2}), [EVALUATE], resume=2)
    yield "ipo-full-llama", Case(_run("llama", {"name": "full"}, {"name": "ipo", "precompute_reference": True}, "pair.jsonl"))
    yield "cdpo-freeze-llama", Case(_run("llama", {"name": "freeze", "last": 1, "keep_base": True},
                                         {"name": "cdpo", "flipped": 0.2}, "pair.jsonl"))
    yield "robust-adapter-llama", Case(_run("llama", {"name": "adapter", "placement": "parallel"},
                                            {"name": "robust", "flipped": 0.2}, "pair.jsonl"), [EVALUATE])
    yield "hinge-bitfit-gpt2", Case(_run("gpt2", {"name": "bitfit"}, {"name": "hinge"}, "pair.jsonl",
                                        data={"streaming": True, "eval": "{models}/pair.jsonl", "limit": 9}), [EVALUATE])
    yield "simpo-prefix-llama", Case(_run("llama", {"name": "prefix", "tokens": 3, "projection": True, "hidden": 16},
                                          {"name": "simpo"}, "pair.jsonl"), [EVALUATE])
    yield "orpo-prompt-llama", Case(_run("llama", {"name": "prompt", "tokens": 3, "text": "be kind"}, {"name": "orpo"},
                                         "pair.jsonl"), [EVALUATE, CHAT])
    yield "kto-adalora-llama", Case(_run(
        "llama", {"name": "adalora", "rank": 3, "start_rank": 4, "wait": 0.2, "settle": 0.3, "every": 0.2, "orthogonal": 0.3},
        {"name": "kto", "good_weight": 1.5, "bad_weight": 0.7}, "judged.jsonl", data={"format": "judged"}), [EVALUATE])
    yield "choice-ptuning_v2-llama", Case(_run("llama", {"name": "ptuning_v2", "tokens": 3}, {"name": "choice"},
                                               "choices.jsonl"), [EVALUATE])
    yield "reward-lora-llama", Case(_run("llama", {"name": "lora", "rank": 2}, {"name": "reward", "centring": 0.1},
                                         "pair.jsonl"), [EVALUATE])


def _rollouts() -> Iterator[tuple[str, Case]]:
    short = {"max_new_tokens": 6, "at_once": 5, "unfinished": 0.1}
    yield "ppo-lora-llama", Case(_run(
        "llama", {"name": "lora", "rank": 2},
        {"name": "ppo", **short, "reward": [EARLY, {"function": "length", "weight": 0.01}], "answers": 2, "epochs": 2,
         "minibatches": 2, "value_weight": 0.2, "entropy_weight": 0.01, "kl_weight": 0.1, "lam": 0.9, "value_clip": 0.3,
         "clip": 0.3, "target_kl": 0.001}, "prompt.jsonl", training={"steps": 8, "save_every": 4, "eval_every": 4}), [EVALUATE], resume=4)
    yield "ppo-critic-llama", Case(_run(
        "llama", {"name": "lora", "rank": 2},
        {"name": "ppo", **short, "reward": [{"run": "{runs}/reward-lora-llama"}], "critic": "adapter", "kl_in": "loss",
         "kl_target": 0.5, "whiten": False, "gamma": 0.9, "answers": 2}, "prompt.jsonl"), [EVALUATE], needs="reward-lora-llama")
    yield "grpo-lora-llama", Case(_run(
        "llama", {"name": "lora", "rank": 2},
        {"name": "grpo", **short, "reward": [EARLY], "answers": 3, "clip": 0.1, "clip_high": 0.3, "kl_weight": 0.05,
         "epochs": 2, "minibatches": 2, "temperature": 0.8}, "prompt.jsonl", training={"steps": 8, "eval_every": 4}), [EVALUATE, CHAT])
    yield "rloo-full-t5", Case(_run("t5", {"name": "full"}, {"name": "grpo", **short, "reward": [EARLY], "answers": 3,
                                                            "advantage": "rloo"}, "prompt.jsonl"), [EVALUATE])


CASES: dict[str, Case] = dict([*_language(), *_judged(), *_preferences(), *_rollouts()])
