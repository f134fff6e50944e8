"""Digests of what tiny runs train, measure and answer, so that an old tree and a new one can be compared bit by bit.

    python tests/digests.py --source OLD/src --names old --models M --out old.json
    python tests/digests.py --source NEW/src --names new --models M --out new.json
    python tests/digests.py --compare old.json new.json          # exit code 1 where anything differs

Only the command line of a tree is used, never its Python names. The bases are written once into `--models` (by the
tree that this script lies in) and read by both. `digest_cases.py` has the runs, `digest_names.py` what was renamed.
The result holds each tree's own names; comparing translates the old ones, so that a new row of the table needs no new run.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import queue
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

import digest_names as names

# What depends on the clock, the machine or the folder, in metrics.jsonl, results.json and what commands print.
LEFT_OUT = re.compile(r"(^|_)(seconds|gb)$|tokens_per_second|_per_second$|^(base|digests|rows|folder|file|out|time|peak_memory|"
                      r"file_bytes|path|run)$")
ANSWERS = ("answers.jsonl", "answers_before.jsonl", "samples.jsonl", "sampled.jsonl")
# Imports what every command imports, once; then runs each command in a fork of its own.
DRIVER = """
import contextlib, io, json, os, runpy, sys
import luthier, matplotlib.pyplot, pydantic, torch, transformers
assert luthier.__file__.startswith(sys.argv[1]), f"luthier is {luthier.__file__}, not that of {sys.argv[1]}"
def run(argv):
    sys.argv = ["luthier", *argv]
    try:
        runpy.run_module("luthier", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        return ended.code or 0
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    run(["train", "--method", "none-such", "--data", "none-such"])
for line in sys.stdin:
    argv, out, error = json.loads(line)
    child = os.fork()
    if not child:
        for stream, path in ((1, out), (2, error)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        code = 1
        try:
            code = run(argv)
            sys.stdout.flush()
        except BaseException:
            import traceback
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Tree:
    """The command line of a source tree, in a process of its own."""

    def __init__(self, source: Path, speaks: str) -> None:
        self.speaks = speaks
        environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                       "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen([sys.executable, "-c", DRIVER, str(source)], env=environment, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(self, command: list[str], scratch: Path) -> str:
        """What a command prints on stdout. Raises `RuntimeError` with its stderr where it fails."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        out, error = scratch / "stdout", scratch / "stderr"
        argv = names.new_command(command) if self.speaks == "new" else command
        self.process.stdin.write(json.dumps([argv, str(out), str(error)]) + "\n")
        self.process.stdin.flush()
        if (code := self.process.stdout.readline().strip()) != "0":
            lines = error.read_text().strip().splitlines() if error.exists() else []
            raise RuntimeError("\n".join([f"`luthier {' '.join(argv)}` ended with {code or 'a crash'}", *lines[-12:]]))
        return out.read_text()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


# ---------------------------------------------------------------- one case


def filled(value: Any, **places: str) -> Any:
    """The same with `{models}`, `{runs}` and `{run}` in its texts filled in."""
    if isinstance(value, str):
        for name, place in places.items():
            value = value.replace(f"{{{name}}}", place)
        return value
    if isinstance(value, dict):
        return {key: filled(one, **places) for key, one in value.items()}
    return [filled(one, **places) for one in value] if isinstance(value, list) else value


def run_case(tree: Tree, name: str, case: Any, models: Path, work: Path) -> dict[str, Any]:
    """Train, go on, do what is done after; the digests of all of it."""
    run, scratch = work / "runs" / name, work / "scratch" / name
    scratch.mkdir(parents=True)
    places = {"models": str(models), "runs": str(work / "runs"), "run": str(run)}
    recipe = filled(copy.deepcopy(case.recipe), **places) | {"run": str(run)}
    file = scratch / "recipe.yaml"
    file.write_text(yaml.safe_dump(names.new_recipe(recipe) if tree.speaks == "new" else recipe, sort_keys=False))
    tree.run(["train", str(file), "--quiet"], scratch)
    if case.resume:
        uninterrupted = trained(run)
        interrupt(run, case.resume)
        tree.run(["train", str(file), "--resume", "--quiet"], scratch)
        if trained(run) != uninterrupted:
            raise RuntimeError("the resumed run ended with other weights than the one that was not interrupted")
    printed = [tree.run(filled(command, **places), scratch).replace(str(work), "") for command in case.after]
    return digests(run) | {"printed": [parsed(text) for text in printed]}


def interrupt(run: Path, step: int) -> None:
    """Leave of a finished run what was there just after the checkpoint of `step`, as if it had been killed then."""
    (run / "README.md").unlink()
    for file in run.glob("*.safetensors"):
        file.unlink()
    for folder in (run / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    if not (run / "checkpoints" / f"step-{step}").is_dir():
        raise RuntimeError(f"{run} has no checkpoint of step {step}")


def trained(run: Path) -> dict[str, str]:
    """What a run trained: file and tensor -> digest, of the files beside the recipe."""
    return {key: value for file in sorted(run.glob("*.safetensors")) for key, value in tensors(file, file.name).items()}


def parsed(text: str) -> Any:
    """What a command printed: JSON without what depends on the machine, or the text as it is."""
    try:
        return kept(json.loads(text))
    except ValueError:
        return text


def kept(value: Any) -> Any:
    """Without the entries that depend on clock, machine or folder."""
    if isinstance(value, dict):
        return {key: kept(one) for key, one in value.items() if not LEFT_OUT.search(key)}
    return [kept(one) for one in value] if isinstance(value, list) else value


# ---------------------------------------------------------------- digests


def digests(run: Path) -> dict[str, Any]:
    """The weights, metrics and answers of a run folder."""
    weights: dict[str, str] = {}
    for file in sorted(run.rglob("*")):
        place = file.relative_to(run).as_posix()
        if file.suffix == ".safetensors":
            weights |= tensors(file, place)
        elif file.suffix == ".gguf":
            weights[place] = hashlib.sha256(file.read_bytes()).hexdigest()
    lines = [kept(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]
    answers = {file.name: file.read_text().splitlines() for file in sorted(run.iterdir()) if file.name in ANSWERS}
    return {"weights": {"sha": sha(weights), "tensors": weights}, "metrics": {"sha": sha(lines), "lines": lines},
            "results": kept(json.loads((run / "results.json").read_text())),
            "answers": {"sha": sha(answers), "lines": answers}}


def tensors(file: Path, place: str) -> dict[str, str]:
    """`place: name` -> digest of dtype, shape and bytes, of every tensor of a safetensors file."""
    content = file.read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    found = {}
    for name, one in json.loads(content[8:start]).items():
        if name != "__metadata__":
            first, last = one["data_offsets"]
            form = f"{one['dtype']} {one['shape']} ".encode()
            found[f"{place}: {name}"] = hashlib.sha256(form + content[start + first:start + last]).hexdigest()[:24]
    return found


def sha(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- comparing


def renamed(report: Mapping[str, Any]) -> dict[str, Any]:
    """case -> flat place -> value, every name in the new words. Raises `ValueError` where two names became one."""
    old = report["names"] == "old"
    found: dict[str, Any] = {}
    for case, one in report["cases"].items():
        flat: dict[str, Any] = {}
        for place, value in flattened(one, old):
            if place in flat:
                raise ValueError(f"{case}: two values are called {place}")
            flat[place] = value
        found[case] = flat
    return found


def flattened(one: Mapping[str, Any], old: bool) -> Iterator[tuple[str, Any]]:
    if "error" in one:
        return
    for key, value in one["weights"]["tensors"].items():
        file, colon, name = key.partition(": ")
        yield f"weights {names.new_file(file) + colon + names.new_tensor(name) if old else key}", value
    for line in one["metrics"]["lines"]:
        which = "evaluation" if any(name.startswith("eval_") for name in line) else "line"
        yield from leaves(f"metrics {which} of step {line.get('step')}:", line, old)
    yield from leaves("results", one["results"], old)
    for i, printed in enumerate(one["printed"]):
        yield from leaves(f"printed {i}", printed, old)
    for file, lines in one["answers"]["lines"].items():
        yield f"answers {names.new_file(file) if old else file}: number of lines", len(lines)
        for i, line in enumerate(lines):
            yield from leaves(f"answers {names.new_file(file) if old else file}:{i + 1}", kept(json.loads(line)), old)


def leaves(place: str, value: Any, old: bool) -> Iterator[tuple[str, Any]]:
    """Every number and text with the way to it; names of keys, and metrics that are named by a text, in the new words."""
    if isinstance(value, dict):
        for key, one in value.items():
            new = names.KEYS.get(key, names.new_metric(key)) if old else key
            named = key == "metric" and old and isinstance(one, str)
            yield from leaves(f"{place} {new}", names.new_metric(one) if named else one, old)
    elif isinstance(value, list):
        yield f"{place} length", len(value)
        for i, one in enumerate(value):
            yield from leaves(f"{place} {i}", one, old)
    else:
        yield place, json.dumps(value)  # every bit of a number; NaN is equal to itself


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each value that two reports do not share."""
    for which, report in (("first", first), ("second", second)):
        yield from (f"{case}: failed in the {which}: {found['error']}"
                    for case, found in report["cases"].items() if "error" in found)
    one, other = renamed(first), renamed(second)
    for case in sorted(one.keys() | other.keys()):
        if case not in one or case not in other:
            yield f"{case}: only in the {'second' if case in other else 'first'}"
            continue
        for place in sorted(one[case].keys() | other[case].keys()):
            before, after = one[case].get(place, "nothing"), other[case].get(place, "nothing")
            if before != after:
                yield f"{case}: {place}: {before} and {after}"


# ---------------------------------------------------------------- all cases


def chains(cases: Mapping[str, Any]) -> list[list[str]]:
    """Cases that need one another in order, the longest chain first."""
    found = [[name, *(other for other, case in cases.items() if case.needs == name)]
             for name, case in cases.items() if not case.needs]
    return sorted(found, key=len, reverse=True)


def collect(source: Path, speaks: str, models: Path, work: Path, workers: int, only: str) -> dict[str, Any]:
    """The digests of every case (whose name matches `only`), by so many processes."""
    from digest_cases import CASES, prepare  # imports torch, which comparing does not need
    prepare(models)
    waiting: queue.SimpleQueue[list[str]] = queue.SimpleQueue()
    for chain in chains(CASES):
        if any(re.search(only, name) for name in chain):
            waiting.put(chain)
    found: dict[str, Any] = {}

    def serve() -> None:
        tree = Tree(source, speaks)
        while not waiting.empty():
            try:
                chain = waiting.get_nowait()
            except queue.Empty:
                break
            for name in chain:
                began = time.monotonic()
                try:
                    found[name] = run_case(tree, name, CASES[name], models, work)
                except (RuntimeError, OSError) as failed:
                    found[name] = {"error": str(failed).replace(str(work), "")}
                sys.stdout.write(f"{name}: {time.monotonic() - began:.1f} s {found[name].get('error', '')}\n")
        tree.close()

    threads = [threading.Thread(target=serve) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"names": speaks, "cases": dict(sorted(found.items()))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=Path(__file__).parent.parent / "src", help="a tree's src")
    parser.add_argument("--names", choices=("old", "new"), default="new", help="which names that tree speaks")
    parser.add_argument("--models", type=Path, default=Path("digests/models"), help="where the tiny bases are or come")
    parser.add_argument("--work", type=Path, default=Path("digests/work"), help="runs are made here; removed at the start")
    parser.add_argument("--out", type=Path, default=Path("digests/digests.json"))
    parser.add_argument("--only", default="", help="a regular expression for names of cases")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--compare", nargs=2, type=Path, metavar="JSON", help="say what differs, and train nothing")
    options = parser.parse_args()
    if options.compare:
        found = list(differences(*(json.loads(path.read_text()) for path in options.compare)))
        print("\n".join([*found, f"{len(found)} differences"]))
        return int(bool(found))
    shutil.rmtree(options.work, ignore_errors=True)
    report = collect(options.source.resolve(), options.names, options.models.resolve(), options.work.resolve(),
                     options.workers, options.only)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
    broken = [name for name, one in report["cases"].items() if "error" in one]
    print(f"{len(report['cases'])} cases in {options.out}; failed: {', '.join(broken) or 'none'}")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
