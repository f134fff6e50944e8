"""Makes the demo data set `src/luthier/demo/`: messages to a violin workshop's repair desk and its answers in JSON.

Run `python benchmarks/make_demo_data.py`: the same seed gives the same bytes; `--check` only compares. Read
`demo_phrasings.yaml` first: every fact and every phrasing stands there, and those under `test` are kept out of training.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
DEMO = HERE.parent / "src/luthier/demo"
SYSTEM = "Repair desk."
FIELDS = ("part", "action", "days", "eur", "desk")
TIMES = {"train": 3, "test": 1}  # rows made of each phrasing
TYPO, LOWER = 0.15, 0.15  # shares of messages with a misspelt word, and all in small letters


def misspell(text: str, rng: random.Random) -> str:
    """`text` with two neighboring letters inside one of its longer words swapped."""
    word = rng.choice(list(re.finditer(r"[A-Za-z]{4,}", text)))
    at = rng.randrange(word.start() + 1, word.end() - 2)
    return text[:at] + text[at + 1] + text[at] + text[at + 2:]


def message(phrasing: str, shells: dict[str, list[str]], rng: random.Random) -> str:
    """One customer's message: an opening, the phrasing, a closing, and now and then carelessness."""
    body = phrasing.format(i=rng.choice(shells["instruments"]))
    if rng.random() < TYPO:
        body = misspell(body, rng)
    text = " ".join(filter(None, [rng.choice(shells["openings"]), body, rng.choice(shells["closings"])]))
    return text.lower() if rng.random() < LOWER else text


def rows(spec: dict[str, Any], split: str, seed: int) -> list[dict[str, Any]]:
    """The rows of one split, each message once, in an order drawn from the seed."""
    rng = random.Random(f"{split} {seed}")
    shells = {name: spec[name][split] for name in ("instruments", "openings", "closings")}
    made: dict[str, str] = {}
    for fact in spec["facts"]:
        answer = json.dumps({name: fact[name] for name in FIELDS}, separators=(",", ":"))
        for phrasing in fact[split]:
            wanted = len(made) + TIMES[split]
            while len(made) < wanted:
                made.setdefault(message(phrasing, shells, rng), answer)
    pairs = list(made.items())
    rng.shuffle(pairs)
    return [{"messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user},
                          {"role": "assistant", "content": answer}]} for user, answer in pairs]


def files(seed: int) -> dict[Path, str]:
    spec = yaml.safe_load((HERE / "demo_phrasings.yaml").read_text(encoding="utf-8"))
    return {DEMO / f"{split}.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(spec, split, seed))
            for split in TIMES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the files differ")
    options = parser.parse_args()
    for path, text in files(options.seed).items():
        if not options.check:
            path.write_text(text, encoding="utf-8", newline="\n")
        elif path.read_text(encoding="utf-8") != text:
            raise SystemExit(f"{path} is not what seed {options.seed} gives")
        print(f"{path.name}: {len(text.splitlines())} rows")


if __name__ == "__main__":
    main()
