"""Generation: the decoding engine against `generate` of Transformers, on the same prompts, greedy.

    python -m benchmarks.generation --out benchmarks/results/<date>-generation.json [--quick] [--json]

Prompts are made from words by a seed, 50 to 130 tokens long. Each side decodes all of them at once, in turn, in one
process. No token ends an answer, so both sides write the same number of tokens. `lengths` shows how the time of a token
depends on the lengths of the sequences: all short, all long, and one long among short ones. Run it alone on the machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.machine import machine, versions
from luthier.assembly.factory import load_family
from luthier.core.protocols import SamplingParams
from luthier.models import ModelConfig, prepare_folder
from luthier.models.decoding import build_requests

WORDS = ["the", "river", "bridge", "carries", "seven", "red", "boats", "and", "a", "lantern", "over", "slow", "green", "water", "while", "nobody", "counts", "them"]


def make_prompts(tokenizer: Any, count: int, shortest: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Prompts of random words, each of a length between the two."""
    random, prompts = Random(seed), []
    for _ in range(count):
        text = " ".join(random.choice(WORDS) for _ in range(2 * longest))
        prompts.append(list(tokenizer(text)["input_ids"])[:random.randint(shortest, longest)])
    return prompts


def time_ours(family: Any, prompts: Sequence[Sequence[int]], new: int) -> float:
    """Tokens per second of the engine."""
    began = time.perf_counter()
    outputs = list(family.generate(prompts, SamplingParams(new, batch_size=len(prompts))))
    assert all(len(output.token_ids) == new for output in outputs)
    return len(prompts) * new / (time.perf_counter() - began)


def time_theirs(model: Any, prompts: Sequence[Sequence[int]], new: int) -> float:
    """Tokens per second of Transformers' `generate`, with padding on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    began = time.perf_counter()
    with torch.inference_mode():
        made: Tensor = model.generate(ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False,
                                      eos_token_id=None, pad_token_id=0)
    assert made.shape[1] == width + new
    return len(prompts) * new / (time.perf_counter() - began)


def measure_lengths(family: Any, new: int) -> dict[str, float]:
    """Milliseconds of a step of 8 sequences after their prompts: all short, one of them long, all long."""
    found = {}
    for name, lengths in (("short", [64] * 8), ("one long", [64] * 7 + [1024]), ("long", [1024] * 8)):
        prompts = [make_prompts(family.tokenizer, 1, length, length, seed)[0] for seed, length in enumerate(lengths)]
        engine = family.build_engine(8)
        for request in build_requests(prompts, SamplingParams(new)):
            engine.add(request)
        while engine.statistics["tokens_generated"] < 8:
            engine.step()
        times = []
        for _ in range(new - 2):
            began = time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - began)
        found[name] = round(1000 * statistics.median(times), 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="one batch size, fewer tokens, one repeat")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    sizes, new, repeats = ((64,), 32, 1) if options.quick else ((16, 64), 96, 3)
    family = load_family(ModelConfig(name_or_path="smollm2"))
    family.train(False)
    family.model.generation_config.eos_token_id = None  # nothing ends an answer
    family.tokenizer.eos_token = None
    theirs = AutoModelForCausalLM.from_pretrained(prepare_folder(ModelConfig(name_or_path="smollm2")), dtype=torch.float32)
    theirs.eval()
    found: dict[str, Any] = {"new_tokens": new, "repeats": repeats, "batches": {}}
    for size in sizes:
        prompts = make_prompts(family.tokenizer, size, 50, 130)
        sides: dict[str, Callable[[], float]] = {"luthier": lambda p=prompts: time_ours(family, p, new),  # type: ignore[misc]
                                                 "transformers": lambda p=prompts: time_theirs(theirs, p, new)}  # type: ignore[misc]
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(repeats):
            for name, run in sides.items():
                rates[name].append(round(run(), 1))
        middle = {name: statistics.median(each) for name, each in rates.items()}
        found["batches"][str(size)] = {"tokens_per_second": rates, "ratio": round(middle["luthier"] / middle["transformers"], 3)}
    found["milliseconds_per_step"] = measure_lengths(family, 12 if options.quick else 40)
    found |= {"machine": machine(), "versions": versions()}
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found) if options.json else json.dumps({key: found[key] for key in ("batches", "milliseconds_per_step")}, indent=1))


if __name__ == "__main__":
    main()
