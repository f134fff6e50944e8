"""Preferences side by side: Luthier's `dpo` and `reward` against TRL's DPOTrainer and RewardTrainer with PEFT.

    python benchmarks/preference.py                  both objectives, HH-RLHF in natural order, then by the prompt's
                                                     share, with a chart: about a quarter of an hour on two cores
    python benchmarks/preference.py --quick          two steps after one to warm up, one repeat, natural order only
    python benchmarks/preference.py --quick --json   the same, as one JSON object and nothing else on stdout

Same machine, base, pairs and their order, LoRA, optimizer and rate; every run in a fresh process, the sides in turn. The
tokens that reach each model are compared answer by answer; unequal work is refused. Read `sft.py` first.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import workload  # noqa: E402
from benchmarks.sft import DISTURBED, ROWS_AT, probe, run, say  # noqa: E402
from benchmarks.workload import Job, Setting  # noqa: E402

SIDES = ("luthier", "trl")
OBJECTIVES = ("dpo", "reward")
SHARES = ("hh-short", "hh-middle", "hh-long")
RATIOS = {"pairs_per_second": "pairs_per_second", "peak_memory": "peak_memory_bytes", "user_cpu": "user_seconds"}


def figures(account: Mapping[str, Any], setting: Setting) -> dict[str, Any]:
    """What one run of one side comes to, without its warm-up steps. Tokens are those of both answers, each behind its
    prompt, as if nothing were shared: the work asked for, not the work done."""
    timed = account["steps"][setting.warmup:]
    seconds, user = (sum(step[name] for step in timed) for name in ("seconds", "user_seconds"))
    pairs = len(timed) * setting.batch_size
    return {"seconds": seconds, "user_seconds": user, "pairs": pairs, "pairs_per_second": pairs / seconds,
            "tokens": sum(step["tokens"] for step in timed),
            "peak_memory_bytes": account["gpu_peak_bytes"] or account["peak_bytes"],
            "cores_used_by_others": account["cores_used_by_others"]}


def same_work(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Refuses sides that were not given the same answers behind the same prompts."""
    for number, (mine, other) in enumerate(zip(ours["steps"], theirs["steps"], strict=True), 1):
        if [d["key"] for d in mine["documents"]] != [d["key"] for d in other["documents"]]:
            raise SystemExit(f"step {number}: the sides did not train on the same answers "
                             f"({mine['tokens']} tokens against {other['tokens']})")


def compare(setting: Setting, repeats: int, rows_at: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """One objective on one kind of pairs, both sides in turn. `facts`: of base and machine, as `probe` finds them."""
    rows = workload.pairs(setting.data, (setting.warmup + setting.steps) * setting.batch_size, rows_at)
    accounts: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory(prefix="preference-") as temporary:
        file = Path(temporary) / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        setting = replace(setting, dtype=facts["rate"]["dtype"])
        for repeat in range(repeats):
            for side in SIDES:
                say(f"{setting.objective}, {setting.data}, repeat {repeat + 1} of {repeats}: {side}, "
                    f"{setting.warmup} + {setting.steps} steps")
                work = Path(temporary) / f"{side}-{repeat}"
                work.mkdir()
                job = Job(side, setting, facts["folder"], str(file), str(work), str(work / "account.json"), time.time())
                accounts[side].append(run(job, sys.executable, work / "job.json", f"{side}_preference"))
                if accounts[side][-1]["cores_used_by_others"] > DISTURBED:
                    say("    warning: others used the machine meanwhile; times of a busy machine say little")
            same_work(accounts["luthier"][-1], accounts["trl"][-1])
    runs = {side: [figures(account, setting) for account in accounts[side]] for side in SIDES}
    ratios = {name: [a[key] / b[key] for a, b in zip(runs["luthier"], runs["trl"], strict=True)]
              for name, key in RATIOS.items()}
    return {
        **{side: {name: statistics.median(r[name] for r in runs[side]) for name in runs[side][0]}
           | {"losses": [step["loss"] for step in accounts[side][0]["steps"]], "repeats": runs[side]} for side in SIDES},
        "ratio": {name: statistics.median(values) for name, values in ratios.items()}, "ratios": ratios,
        "prompt_share": statistics.mean(workload.prompt_share(row) for row in rows),
        "setting": asdict(setting), "machine": facts["machine"], "versions": facts["versions"],
    }


def chart(found: Mapping[str, Any], path: Path) -> None:
    """Luthier over TRL by the prompt's share of the words: pairs a second, and peak memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_share = sorted(found["by_prompt_share"].values(), key=lambda one: one["prompt_share"])
    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    for axis, name, title, goal in zip(axes, ("pairs_per_second", "peak_memory"),
                                       ("pairs/s, times TRL's", "peak memory, share of TRL's"), (3, 0.25), strict=True):
        axis.plot([one["prompt_share"] for one in by_share], [one["ratio"][name] for one in by_share], marker="o",
                  color="#b5541c", label=by_share[0]["setting"]["objective"])
        for objective, marker in zip(OBJECTIVES, "sD", strict=True):
            if objective in found:
                axis.plot(found[objective]["prompt_share"], found[objective]["ratio"][name], marker, color="#5b6f8a",
                          label=f"{objective}, natural order")
        axis.axhline(goal, color="#aeb6c0", linestyle="--")
        axis.set_ylim(bottom=0)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("the prompt's share of the words")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="preference.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--objective", choices=OBJECTIVES, nargs="+", default=list(OBJECTIVES))
    parser.add_argument("--steps", type=int, default=2, help="steps that are timed")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="2 steps after 1, one repeat, natural order only")
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--rows", type=Path, default=ROWS_AT, help="folder with hh_rlhf_harmless.jsonl")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--json", action="store_true", help="print the results as JSON and write no file")
    args = parser.parse_args(given)
    if args.quick:
        args.steps, args.repeats = 2, 1
    if min(args.steps, args.repeats, args.batch_size) < 1:
        parser.error("--steps, --repeats and --batch-size are at least 1")
    if not (args.rows / "hh_rlhf_harmless.jsonl").exists():
        parser.error(f"--rows {args.rows} has no hh_rlhf_harmless.jsonl")
    return args


def main() -> None:
    args = arguments()
    setting = Setting(base=args.base, data="hh", steps=args.steps, batch_size=args.batch_size, learning_rate=5e-5)
    facts = probe(args.base)
    found: dict[str, Any] = {name: compare(replace(setting, objective=name), args.repeats, args.rows, facts)
                             for name in args.objective}
    if not args.quick:  # once each, by the objective that takes less time
        last = replace(setting, objective=args.objective[-1])
        found["by_prompt_share"] = {data: compare(replace(last, data=data), 1, args.rows, facts) for data in SHARES}
    # The figures that stand for all: the first objective's.
    found |= {name: found[args.objective[0]][name] for name in ("luthier", "trl", "ratio")}
    found["date"] = datetime.date.today().isoformat()
    if args.json:
        print(json.dumps(found))
        return
    args.results.mkdir(parents=True, exist_ok=True)
    written = args.results / f"{found['date']}-preference.json"
    written.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if "by_prompt_share" in found:
        chart(found, written.with_suffix(".png"))
    for name in (*args.objective, *found.get("by_prompt_share", {})):
        one = found.get(name) or found["by_prompt_share"][name]
        say(f"{name}: {one['luthier']['pairs_per_second']:.3f} against {one['trl']['pairs_per_second']:.3f} pairs/s; ratios "
            + ", ".join(f"{key} {value:.2f}" for key, value in one["ratio"].items()))
    say(f"written: {written}")


if __name__ == "__main__":
    main()
