"""Every objective by every method on every family: it trains, saves and resumes exactly, or is refused with a reason.

What a trial asserts stands in `trials.py`; here it is said, apart from the code, which pairs must be refused and for
what. `docs/support.md` is the same as a table.
"""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.methods import METHODS
from luthier.objectives import OBJECTIVES, SHORT_FORMS
from luthier.training import checkpoint
from luthier.training.loop import run_training_loop
from tiny import ENCODERS, VISIONS
from trials import BASES, ELSEWHERE, FAMILIES, SAVED, SIMPLEST, Pair, Trial, prepare, recipe, same, trial, tried

DOCS = Path(__file__).parents[2] / "docs"
WHOLE = ("classify", "contrastive", "reward")  # objectives that read no probabilities of tokens
VERDICTS: dict[Pair, str] = {}


def reason(base: str, method: str, objective: str) -> str:
    """Words by which the pair must be refused; empty where it must work."""
    if objective in ("ppo", "grpo") and base in (*ENCODERS, *VISIONS):
        return "trains on generated answers"
    if base in (*ENCODERS, *VISIONS) and objective not in WHOLE and (base in VISIONS or objective != "pretrain"):
        return "does not predict them"
    if base in VISIONS and objective == "reward":
        return "the base takes images"
    if method == "peft" and base == "gpt2":
        return "PEFT cannot apply LOHA to this model"
    return ""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the bases are too small for more
    yield prepare(tmp_path_factory.mktemp("sweep"))
    torch.set_num_threads(threads)


def verdict(home: Path, pair: Pair) -> str:
    if pair not in VERDICTS:
        VERDICTS[pair] = trial(home, *pair)
    return VERDICTS[pair]


@pytest.mark.parametrize("pair", tried(), ids=" ".join)
def test_a_pair_trains_or_is_refused(home: Path, pair: Pair) -> None:
    why, wanted = verdict(home, pair), reason(*pair)
    assert bool(why) == bool(wanted), why or wanted
    assert wanted in why


def test_a_checkpoint_that_lacks_something_is_not_gone_on_from_exactly(home: Path, tmp_path: Path) -> None:
    """The control: a trial would show that the optimiser's moments were left behind."""
    made = recipe(home, "llama", "lora", "sft")
    one, again = Trial(made, tmp_path), Trial(made, tmp_path)
    run_training_loop(one.job)
    saved = checkpoint.load_checkpoint(tmp_path / f"step-{SAVED}")
    run_training_loop(again.job, replace(saved, tensors={**saved.tensors, "optimizer": {}}))
    with pytest.raises(AssertionError):
        same(one.attached.state(), again.attached.state())


def test_no_axis_is_left_out() -> None:
    pairs = set(tried())
    assert all((base, method, SIMPLEST[base]) in pairs for base in BASES for method in METHODS)
    assert all((base, "lora", objective) in pairs for base in FAMILIES for objective in (*OBJECTIVES, *SHORT_FORMS))
    assert all(("llama", method, objective) in pairs for method in METHODS for objective in (*OBJECTIVES, *SHORT_FORMS))
    assert {base for base, _ in ELSEWHERE} < set(BASES)


def test_the_page_of_support_is_what_the_trials_found(home: Path) -> None:
    again = "PYTHONPATH=src python docs/support.py"
    found = {pair: verdict(home, pair) for pair in tried()}
    assert (DOCS / "support.md").read_text(encoding="utf-8") == runpy.run_path(str(DOCS / "support.py"))["page"](found), again
