"""Instruction tuning side by side: Luthier against TRL's SFTTrainer with PEFT, and Unsloth where it is installed.

    python benchmarks/sft.py                  a table, and results/<date>-sft-<data>.json with a chart
    python benchmarks/sft.py --quick          three steps after one to warm up, one repeat: about five minutes
    python benchmarks/sft.py --quick --json   the same, as one JSON object and nothing else on stdout

Same machine, same base, same rows in the same order, same LoRA, optimizer and schedule; every run in a fresh process,
the sides in turn. The tokens and trained positions that reach each model are compared document by document, and so are
the first losses; a comparison of unequal work is refused. Tokens are real ones: padding is nowhere counted.
Read `workload.py` first, then `peers/watch.py`.

This process stays small on purpose (no torch): on Linux a child's `ru_maxrss` is never below what its parent held.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import report, workload  # noqa: E402
from benchmarks.workload import PROGRESS, Job, Setting  # noqa: E402

SIDES = {"luthier": "luthier_sft", "trl": "trl_sft", "trl-nockpt": "trl_sft",
         "unsloth": "unsloth_sft", "unsloth-nockpt": "unsloth_sft"}
DISTURBED = 0.2  # cores used by others from which on a measurement is doubtful
ROWS_AT = ROOT.parent / "shared" / "data"


def say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def environment() -> dict[str, str]:
    """What every side's process starts with: this checkout, no hub, no buffering."""
    paths = [os.environ.get("PYTHONPATH", ""), str(ROOT), str(ROOT / "src")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1"}


def probe(base: str) -> dict[str, Any]:
    """The base's folder and config, the machine, its matrix rate and the versions (see `machine.py`)."""
    command = [sys.executable, "-m", "benchmarks.machine", base]
    done = subprocess.run(command, env=environment() | {"HF_HUB_OFFLINE": "0"}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit("the machine could not be measured: its own words stand above")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def run(job: Job, python: str, file: Path, module: str = "") -> dict[str, Any]:
    """One side in a fresh process; its progress on stderr, its account as the answer."""
    job.write(file)
    command = [python, "-m", f"benchmarks.peers.{module or SIDES[job.side]}", str(file)]
    log: deque[str] = deque(maxlen=60)
    with subprocess.Popen(command, env=environment(), cwd=job.work, text=True, errors="replace",
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(PROGRESS):
                say(f"    {line.removeprefix(PROGRESS).rstrip()}")
            else:
                log.append(line)
    if process.returncode:
        raise SystemExit(f"{job.side} failed ({process.returncode}); the end of what it said:\n{''.join(log)}")
    account: dict[str, Any] = json.loads(Path(job.account).read_text(encoding="utf-8"))
    return account


def compare(setting: Setting, sides: Sequence[str], repeats: int, rows_at: Path, unsloth: str) -> dict[str, Any]:
    """Every side `repeats` times, in turn: A B A B. Returns the results with machine, versions and date."""
    rows = workload.rows(setting.data, (setting.warmup + setting.steps) * setting.batch_size, rows_at)
    accounts: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    rates = []
    with tempfile.TemporaryDirectory(prefix="sft-") as temporary:
        rows_file = Path(temporary) / "rows.jsonl"
        rows_file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        for repeat in range(repeats):
            say(f"repeat {repeat + 1} of {repeats}: the machine's matrix rate")
            facts = probe(setting.base)
            rates.append(facts["rate"])
            setting = replace(setting, dtype=facts["rate"]["dtype"])
            for index, side in enumerate(sides):
                say(f"repeat {repeat + 1} of {repeats}: {side}, {setting.warmup} + {setting.steps} steps; "
                    f"{remaining(accounts, repeats, len(sides) - index)}")
                work = Path(temporary) / f"{side}-{repeat}"
                work.mkdir()
                job = Job(side, setting, facts["folder"], str(rows_file), str(work), str(work / "account.json"), time.time())
                account = run(job, unsloth if side.startswith("unsloth") else sys.executable, work / "job.json")
                accounts[side].append(account)
                if account["cores_used_by_others"] > DISTURBED:
                    say(f"    warning: others used {account['cores_used_by_others']:.1f} cores meanwhile; "
                        "times of a busy machine say little")
                if side != sides[0]:
                    report.same_work(accounts[sides[0]][-1], account, setting)
    rate = rates[0] | {"gflops": statistics.median(rate["gflops"] for rate in rates)}
    return report.results(accounts, setting, facts["config"], rate) | {
        "date": datetime.date.today().isoformat(), "machine": facts["machine"], "versions": facts["versions"]}


def remaining(accounts: dict[str, list[dict[str, Any]]], repeats: int, left: int) -> str:
    """How much there is still to do, in minutes as soon as every side has been seen once."""
    if all(accounts.values()):
        seconds = sum((repeats - len(runs)) * statistics.median(run["total_seconds"] for run in runs)
                      for runs in accounts.values())
        return f"about {seconds / 60:.0f} min remain"
    return f"{left} of this repeat's runs remain"


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="sft.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", choices=workload.DATA, default="mix")
    parser.add_argument("--peers", nargs="+", choices=[*SIDES][1:], default=["trl", "trl-nockpt"])
    parser.add_argument("--steps", type=int, default=6, help="steps that are timed")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them that are not")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="3 steps after 1, one repeat")
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--rows", type=Path, default=ROWS_AT, help="folder with the public data files")
    parser.add_argument("--unsloth-python", default="", help="the interpreter of Unsloth's own environment")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--json", action="store_true", help="print the results as JSON and write no file")
    args = parser.parse_args(given)
    if args.unsloth_python:  # made absolute, but a link stays: it is what leads to the environment
        args.unsloth_python = os.path.abspath(args.unsloth_python)
    if args.quick:
        args.steps, args.warmup, args.repeats = 3, 1, 1
    if min(args.steps, args.repeats, args.batch_size) < 1 or args.warmup < 0:
        parser.error("--steps, --repeats and --batch-size are at least 1, --warmup at least 0")
    if any(peer.startswith("unsloth") for peer in args.peers) and not args.unsloth_python:
        parser.error("--peers unsloth needs --unsloth-python (benchmarks/peers/unsloth_sft.py says how to make one)")
    if not args.rows.is_dir():
        parser.error(f"--rows {args.rows} is not there: it holds alpaca_en_demo.json and gsm8k_train.jsonl")
    return args


def main() -> None:
    args = arguments()
    setting = Setting(base=args.base, data=args.data, steps=args.steps, warmup=args.warmup, batch_size=args.batch_size)
    found = compare(setting, ["luthier", *dict.fromkeys(args.peers)], args.repeats, args.rows, args.unsloth_python)
    if args.json:
        print(json.dumps(found))
        return
    from rich.console import Console

    args.results.mkdir(parents=True, exist_ok=True)
    written = args.results / f"{found['date']}-sft-{setting.data}.json"
    written.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    report.chart(found, written.with_suffix(".png"))
    Console().print(report.table(found))
    say(f"written: {written} and {written.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
