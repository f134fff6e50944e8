"""What four and eight bits save of a LoRA's memory, and what they cost: whole, nf4 and int8 in turn on the same rows.

    python benchmarks/qlora.py                writes benchmarks/results/<date>-qlora.json
    python benchmarks/qlora.py --json         the same on stdout, and no file

Each side is a fresh process, and peaks are those that the kernel counted of it, pages of mapped files included. Two
bases: smollm2, where what the library itself holds is a good part of what four bits save, and a random Llama of 380
million parameters, where it is not. Read `machine.py` first.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

SIDES = ("none", "nf4", "int8")
ROWS = ROOT / "src" / "luthier" / "demo" / "train.jsonl"
STEPS = 3


def side(base: str, bits: str, work: Path) -> dict[str, Any]:
    """One side, in this process: peaks of reading the base and of three steps."""
    from luthier import assembly
    from luthier.assembly.factory import (
        check_loaded_model,
        load_datasets,
        load_family,
        resolve_micro_batch_tokens,
    )
    from luthier.training.loop import TrainJob, run_training_loop
    from luthier.training.memory import configure_malloc, measure_peak_gb
    from luthier.training.rng import seed_everything

    configure_malloc()
    imported = measure_peak_gb("cpu")
    made = assembly.build_recipe({"model": {"name_or_path": base, "quantize": bits}, "data": str(ROWS), "method": {"name": "lora", "rank": 8},
                         "training": {"max_steps": STEPS, "batch_size": 2}, "optimizer": {"learning_rate": 1e-3}})
    seed_everything(0)
    family = load_family(made.model)
    reading = measure_peak_gb("cpu")
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's peak starts anew
    held = sum(tensor.nbytes for tensor in family.structure.model.state_dict().values())
    check_loaded_model(made, family)
    family.enable_gradient_checkpointing(resolve_micro_batch_tokens(made, family))
    found = load_datasets(made, family)
    attached, reference = assembly.init_rl_policy(made, family)
    lines: list[dict[str, float]] = []
    run_training_loop(TrainJob(family, attached, made.objective, assembly.build_training_source(made, family, found, attached, reference), [], made.training,
                               made.optimizer, 1e-3, work, log=lambda step, numbers: lines.append(dict(numbers))))
    training = measure_peak_gb("cpu")
    return {"imported_gb": imported, "reading_gb": reading, "training_gb": training, "peak_gb": max(reading, training),
            "weights_gb": held / 1e9, "losses": [line["loss"] for line in lines],
            "tokens": [int(line["tokens"]) for line in lines], "user_seconds": [line["user_seconds"] for line in lines],
            "seconds": [line["step_seconds"] for line in lines]}


def large(folder: Path) -> None:
    """A random Llama of 380 million parameters with smollm2's words, in this process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from luthier import assembly
    from luthier.assembly.factory import load_base_tokenizer

    words = load_base_tokenizer(assembly.ModelConfig(name_or_path="smollm2"))
    config = LlamaConfig(hidden_size=1280, intermediate_size=3456, num_hidden_layers=16, num_attention_heads=20,
                         num_key_value_heads=20, vocab_size=49152, max_position_embeddings=2048,
                         tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)


def fresh(*arguments: str) -> str:
    """What this file says in a process of its own."""
    done = subprocess.run([sys.executable, "-W", "ignore", __file__, *arguments], stdout=subprocess.PIPE, text=True,
                          check=True)
    return done.stdout


def compared(base: str, work: Path) -> dict[str, Any]:
    found = {bits: json.loads(fresh("--side", bits, "--base", base, "--work", str(work / bits))) for bits in SIDES}
    whole = found["none"]
    for few in (found["nf4"], found["int8"]):
        assert few["tokens"] == whole["tokens"], "the sides did not train on the same rows"
        few["weights_saved_gb"] = whole["weights_gb"] - few["weights_gb"]
        few["peak_saved_gb"] = whole["peak_gb"] - few["peak_gb"]
        few["user_ratio"] = sum(few["user_seconds"]) / sum(whole["user_seconds"])
    return found


def main() -> None:
    known = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known.add_argument("--json", action="store_true")
    known.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    known.add_argument("--base", default="smollm2", help=argparse.SUPPRESS)
    known.add_argument("--work", help=argparse.SUPPRESS)
    known.add_argument("--make", help=argparse.SUPPRESS)
    asked = known.parse_args()
    if asked.make:
        large(Path(asked.make))
    elif asked.side:
        print(json.dumps(side(asked.base, asked.side, Path(asked.work))))
    else:
        report(asked.json)


def report(as_json: bool) -> None:
    """All sides on both bases, written down."""
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        fresh("--make", str(home / "large"))
        told = {"smollm2": compared("smollm2", home / "small"), "llama-380m": compared(str(home / "large"), home / "big")}
    from benchmarks.machine import machine, versions
    told = {"date": str(datetime.date.today()), "machine": machine(), "versions": versions(), "bases": told}
    if as_json:
        print(json.dumps(told))
        return
    file = ROOT / "benchmarks" / "results" / f"{told['date']}-qlora.json"
    file.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(file)


if __name__ == "__main__":
    main()
