"""The shipped demo data: its two files are what the script makes, and nothing of the test stands in train."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]


def rows(split: str) -> list[list[dict[str, Any]]]:
    text = (resources.files("luthier") / "demo" / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line)["messages"] for line in text.splitlines()]


def test_files_are_what_the_seed_gives() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks/make_demo_data.py"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_splits_are_apart_and_know_the_same_facts() -> None:
    train, test = rows("train"), rows("test")
    assert (len(train), len(test)) == (360, 60)
    assert {roles for row in train + test for roles in [tuple(m["role"] for m in row)]} == {("system", "user", "assistant")}
    users = Counter(row[1]["content"].lower() for row in train + test)
    assert max(users.values()) == 1
    answers = [{row[2]["content"] for row in split} for split in (train, test)]
    assert answers[0] == answers[1]
    assert len(answers[0]) == 12


def test_whole_phrasings_openings_and_closings_are_held_out() -> None:
    spec = yaml.safe_load((ROOT / "benchmarks/demo_phrasings.yaml").read_text(encoding="utf-8"))
    train = {text.lower() for fact in spec["facts"] for text in fact["train"]}
    test = {text.lower() for fact in spec["facts"] for text in fact["test"]}
    assert not train & test
    held = {text for name in ("openings", "closings") for text in spec[name]["test"] if text}
    assert not held & {text for name in ("openings", "closings") for text in spec[name]["train"]}


def test_every_answer_is_one_of_the_facts_in_one_form() -> None:
    for row in rows("train") + rows("test"):
        answer = row[2]["content"]
        value = json.loads(answer)
        assert list(value) == ["part", "action", "days", "eur", "desk"]
        assert answer == json.dumps(value, separators=(",", ":"))
