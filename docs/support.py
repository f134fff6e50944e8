"""Writes `docs/support.md`: what goes with what, as the trials of `tests/trials.py` find it. Takes a minute or two.

    PYTHONPATH=src python docs/support.py

A test holds the page against the trials of its own run. Read `tests/trials.py` first.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from luthier.methods import METHODS
from luthier.objectives import expand_short_form
from trials import BASES, ELSEWHERE, FAMILIES, OBJECTIVE_NAMES, SIMPLEST, Pair, prepare, trial, tried

PAGE = Path(__file__).with_suffix(".md")
LONGEST = 150  # of a reason on the page
HEAD = """# Supported combinations

<!-- Made by docs/support.py from the trials of tests/trials.py; change those, not this page. -->

The tests try each pair below on tiny random base models, with default settings except sizes, learning rates and
steps.

* **yes**: the pair trains, and the loss on its rows decreases. Only the declared parameters change. A resumed run ends
  with the same bits. In the first table, the reopened run folder also gives the same loss. For `ppo` and `grpo` the
  loss need not decrease, but the method's parameters must change.
* **a number**: the pair is an error before the first step. The numbered reasons are at the end of this page.

A pair that trains is not always a good choice; see the pages of [methods and objectives](index.md).
"""


def page(verdicts: Mapping[Pair, str]) -> str:
    """The page, from each pair's reason of refusal (empty where it works)."""
    reasons: dict[str, int] = {}

    def cell(base: str, method: str, objective: str) -> str:
        why = verdicts[base, method, objective]
        return str(reasons.setdefault(short(why, base, method, objective), len(reasons) + 1)) if why else "yes"

    def table(title: str, corner: str, columns: Sequence[str], lines: Mapping[str, Sequence[Pair]]) -> str:
        cells = [[f"`{name}`", *(cell(*pair) for pair in pairs)] for name, pairs in lines.items()]
        return "\n".join([f"## {title}\n", *("| " + " | ".join(row) + " |" for row in (
            [corner, *columns], ["---"] * (len(columns) + 1), *cells))]) + "\n"

    parts = [
        HEAD,
        table("Methods on bases", "method", [f"{base} ({SIMPLEST[base]})" for base in BASES],
              {m: [(b, m, SIMPLEST[b]) for b in BASES] for m in METHODS}),
        table("Objectives on families, by LoRA", "objective", [f"{kind} ({base})" for base, kind in FAMILIES.items()],
              {o: [(b, "lora", o) for b in FAMILIES] for o in OBJECTIVE_NAMES}),
        table("Objectives by methods, on a causal language model (llama)", "objective", list(METHODS),
              {o: [("llama", m, o) for m in METHODS] for o in OBJECTIVE_NAMES}),
        table("More objectives by methods", "method", [f"{base} ({objective})" for base, objective in ELSEWHERE],
              {m: [(b, m, o) for b, o in ELSEWHERE] for m in METHODS})]
    return "\n".join([*parts, "## Reasons\n", *(f"{number}. {why}" for why, number in reasons.items())]) + "\n"


def short(why: str, base: str, method: str, objective: str) -> str:
    """The sentence of a refusal without the names of its pair, so that one reason is one."""
    full_name = expand_short_form({"name": objective})["name"]
    for name, word in ((f"objective {full_name!r}", "the objective"), (f"method {method!r}", "the method"),
                       (f"{base!r}", "the base"), ("<", "&lt;")):
        why = why.replace(name, word)
    why = " ".join(why.split())
    return why if len(why) <= LONGEST else why[:LONGEST].rpartition(" ")[0] + " ..."


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        home = prepare(Path(folder))
        PAGE.write_text(page({pair: trial(home, *pair) for pair in tried()}), encoding="utf-8")
