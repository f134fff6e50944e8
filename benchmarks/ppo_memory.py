"""Peak memory of PPO's four roles on one base beside that of SFT, on the embedded base.

    python -m benchmarks.ppo_memory      writes benchmarks/results/<date>-ppo-memory.json

Policy, reference, reward and critic are LoRA adapters on one copy of the weights. The answers of PPO's rounds are kept, and
SFT then trains on them: the same prompts and answers in the same steps, the same method, optimizer and `max_tokens_per_micro_batch`. Every
training is a process of its own, and its peak is what its run folder says, loading and generation included.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, versions

DEMO = Path(__file__).resolve().parents[1] / "src/luthier/demo/rlhf"
STEPS, BATCH, ANSWER = 2, 8, 64
MOST = 1.5  # times SFT's peak that PPO's may be
KEEP = """
import json

def keep(prompts, completions, metadata):
    with open({file!r}, "a") as kept:
        for prompt, answer in zip(prompts, completions):
            kept.write(json.dumps({{"asked": prompt, "completion": answer}}) + "\\n")
    return [0.0] * len(completions)
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        found = measured(Path(place))
    file = Path(__file__).with_name("results") / f"{date.today()}-ppo-memory.json"
    file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(file.read_text(encoding="utf-8"))
    if found["ratio"]["peak_memory"] > MOST:
        raise SystemExit(f"PPO's peak is more than {MOST} times SFT's")


def measured(place: Path) -> dict[str, Any]:
    """Both sides, from the start that PPO needs on."""
    train(place, "start", {"data": {"train": str(DEMO / "sft.jsonl")}, "training": {"max_steps": 1, "batch_size": BATCH}})
    train(place, "reward", {"data": {"train": str(DEMO / "pairs.jsonl")}, "objective": "reward",
                            "training": {"max_steps": 1, "batch_size": BATCH}})
    kept, keeper = place / "kept.jsonl", place / "keep.py"
    keeper.write_text(KEEP.format(file=str(kept)), encoding="utf-8")
    steps = {"max_steps": STEPS, "batch_size": BATCH}
    ppo = train(place, "ppo", {
        "init_from": str(place / "start"), "data": {"train": str(DEMO / "prompts.jsonl"), "shuffle": False}, "training": steps,
        "objective": {"name": "ppo", "critic": "adapter", "num_generations": 1, "max_new_tokens": ANSWER, "generation_batch_size": BATCH,
                      "reward": [{"model": str(place / "reward")}, {"function": f"{keeper}:keep"}]}})
    prompts = [json.loads(line)["prompt"] for line in (DEMO / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    answers = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    rows = [{"prompt": next(p for p in prompts if p in row["asked"]), "completion": row["completion"]} for row in answers]
    said = [row for row in rows if row["completion"].strip()]  # SFT refuses an answer without a word
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said), encoding="utf-8")
    sft = train(place, "sft", {"data": {"train": str(place / "rows.jsonl"), "shuffle": False},
                               "training": {**steps, "batch_size": max(1, len(said) // STEPS)}})
    return {"machine": machine(), "versions": versions(), "model": "smollm2", "method": "lora", "steps": STEPS,
            "answers": len(rows), "answers_without_a_word": len(rows) - len(said), "ppo": ppo, "sft": sft,
            "ratio": {"peak_memory": round(ppo["peak_memory_gb"] / sft["peak_memory_gb"], 3)}}


def train(place: Path, name: str, recipe: dict[str, Any]) -> dict[str, Any]:
    """Run a recipe in a process of its own: its peak, and what its steps were of."""
    whole = {"model": "smollm2", "output_dir": str(place / name), "evaluate": {"before_training": False},
             **({} if "init_from" in recipe else {"method": "lora"}), **recipe}
    if "init_from" in recipe:
        del whole["model"]
    file = place / f"{name}.yaml"
    file.write_text(json.dumps(whole), encoding="utf-8")  # YAML holds JSON
    subprocess.run([sys.executable, "-m", "luthier", "train", str(file), "--json"], check=True, stdout=subprocess.DEVNULL)
    results = json.loads((place / name / "results.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (place / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {"peak_memory_gb": results["peak_memory_gb"], "train_seconds": results["train_seconds"],
            "tokens": [line["tokens"] for line in lines if "tokens" in line]}


if __name__ == "__main__":
    main()
