"""Domain adaptation, measured: more rows, states without training, another structure.

    python -m benchmarks.adaptation --data DATA --out benchmarks/results/<date>-adaptation.json

Every figure is of a command of Luthier's own, which stands beside it. Read `docs/adaptation.md` first.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.machine import machine, versions
from luthier.cli.main import main

PARTS = ("augmentation", "features", "structure")


def luthier(*args: str) -> tuple[str, float, str]:
    """A command's output, its seconds and its words."""
    started, out = time.perf_counter(), io.StringIO()
    with redirect_stdout(out):
        code = main(list(args))
    if code:
        raise SystemExit(f"luthier {' '.join(args)}: {code}")
    return out.getvalue(), round(time.perf_counter() - started, 1), "luthier " + " ".join(args)


def trained(folder: Path, *args: str) -> dict[str, Any]:
    """A run's measures of unseen rows before and after, and the command."""
    _, seconds, said = luthier("train", "--output-dir", str(folder), *args)
    found = json.loads((folder / "results.json").read_text())
    return {"before": found["test_before"], "after": found["test"], "rows": found["examples"], "steps": found["steps"],
            "seconds": seconds, "command": said.replace(f"--output-dir {folder} ", "")}


def augmentation(home: Path, data: Path) -> dict[str, Any]:
    """Accuracy on all 872 unseen sentences of SST-2 after equally many steps on 300, as they are or changed, over three seeds."""
    few = home / "few.tsv"  # head -n 300 DATA/sst2_train.tsv
    few.write_text("".join((data / "sst2_train.tsv").read_text().splitlines(keepends=True)[:300]))
    common = ("--model", "minilm", "--data", str(few), "--objective", "classify", "--method", "lora",
              f"data.test={data / 'sst2_dev.tsv'}", "data.columns={text: 0, label: 1}", "training.max_steps=150",
              "training.batch_size=16")
    changed = {"as they are": (), "deletion": ("data.augment=[{name: deletion, rate: 0.1, copies: 1}]",),
               "swap": ("data.augment=[{name: swap, copies: 1}]",), "mixup": ("data.augment=[{name: mixup, alpha: 0.2}]",)}
    found: dict[str, Any] = {}
    for name, settings in changed.items():
        runs = [trained(home / f"augmentation-{name}-{seed}", *common, *settings, f"seed={seed}") for seed in range(3)]
        accuracy = [round(run["after"]["accuracy"], 4) for run in runs]
        found[name] = {"accuracy": accuracy, "mean": round(sum(accuracy) / len(accuracy), 4),
                       "seconds": [run["seconds"] for run in runs],
                       **{key: runs[0][key] for key in ("rows", "steps", "command")}}
        print(name, found[name]["accuracy"], flush=True)
    return found


def features(home: Path, data: Path) -> dict[str, Any]:
    """A line through the base's states: logistic regression on 300 sentences of SST-2, judged on 300 unseen ones."""
    out, seconds, said = luthier("features", "minilm", "--data", str(data / "sst2_train.tsv"), "--out", str(home / "f.safetensors"),
                                 "--probe", "--test", str(data / "sst2_dev.tsv"), "--json", "data.columns={text: 0, label: 1}",
                                 "data.max_samples=300")
    return {"found": json.loads(out), "seconds": seconds, "command": said}


def structure(home: Path, data: Path) -> dict[str, Any]:
    """Perplexity of the embedded base on the questions of GSM8K as bare texts: as it is; a block added and trained alone;
    a block dropped, then healed."""
    common = ("--model", "smollm2", "--data", str(data / "gsm8k_train.jsonl"), "--objective", "pretrain",
              "data.columns={text: question}", f"data.test={data / 'gsm8k_test.jsonl'}", "data.max_samples=192", "training.max_steps=24",
              "training.batch_size=8")
    changed = {"as it is, lora": ("method=lora",),
               "a block added, trained alone": ("model.surgery={expand_layers: [22]}", "method={name: freeze, layers: [23, 23]}"),
               "a block dropped, the rest trained by lora": ("model.surgery={drop_layers: [22]}", "method=lora")}
    found = {}
    for number, (name, settings) in enumerate(changed.items()):
        run = trained(home / f"structure-{number}", *common, *settings)
        found[name] = {"perplexity_before": round(run["before"]["perplexity"], 2),
                       "perplexity_after": round(run["after"]["perplexity"], 2),
                       **{key: run[key] for key in ("rows", "steps", "seconds", "command")}}
        print(name, found[name]["perplexity_before"], found[name]["perplexity_after"], flush=True)
    return found


def measure() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True,
                        help="folder with gsm8k_train.jsonl, sst2_train.tsv, sst2_dev.tsv, ...")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    with TemporaryDirectory() as folder:
        for name in options.parts:
            made = globals()[name](Path(folder), options.data)
            found |= {name: json.loads(json.dumps(made).replace(folder + "/", "")
                                       .replace(f"{options.data}/", "DATA/"))}
            found |= {"machine": machine(), "versions": versions()}
            options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    measure()
