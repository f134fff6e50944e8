"""Writes rows for every recipe, made by a seed, for a machine without the hub.

    python recipes/make_rows.py rows

Each task is small and has an answer that follows from a rule, so that a model can learn it; it does not replace the
real data. `recipes/README.md` has the command of each recipe.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

Row = dict[str, Any]
NAMES = ("Ada", "Bo", "Cem", "Dana", "Eli", "Finn", "Gita", "Hugo")
THINGS = ("apples", "books", "coins", "eggs", "pens", "shells")
GOOD, BAD = ("a delight", "warm and clever", "great fun"), ("a bore", "cold and clumsy", "no fun")
GOOD_ZH, BAD_ZH = ("很好吃", "送得很快", "味道不错", "非常满意"), ("太难吃了", "送得太慢", "味道很差", "非常失望")
FILMS, DISHES = ("film", "play", "book", "song"), ("面条", "米饭", "饺子", "炒菜")


def make_word_problem(random: Random) -> Row:
    name, thing = random.choice(NAMES), random.choice(THINGS)
    first, second, lost = random.randint(2, 9), random.randint(2, 9), random.randint(1, 3)
    total = first * second
    question = f"{name} has {first} bags of {second} {thing} and loses {lost} {thing}. How many {thing} are left?"
    return {"question": question,
            "answer": f"{first} * {second} = {total}\n{total} - {lost} = {total - lost}\n#### {total - lost}"}


def make_instruction(random: Random) -> Row:
    words = random.sample(THINGS, 3)
    task = random.choice(("Sort the words.", "Reverse the order of the words."))
    answer = sorted(words) if task.startswith("Sort") else words[::-1]
    return {"instruction": task, "input": ", ".join(words), "output": ", ".join(answer)}


def make_chinese_instruction(random: Random) -> Row:
    first, second = random.randint(1, 9), random.randint(1, 9)
    return {"instruction": f"计算{first}加{second}。", "input": "",
            "output": f"{first}加{second}等于{first + second}。"}


def make_pair(random: Random) -> Row:
    name, thing = random.choice(NAMES), random.choice(THINGS)
    prompt = f"\n\nHuman: I am {name}. May I have some {thing}?\n\nAssistant:"
    return {"chosen": f"{prompt} Of course, {name}. Here are your {thing}.", "rejected": f"{prompt} No."}


def make_review(random: Random) -> Row:
    label = random.randint(0, 1)
    return {"sentence": f"this {random.choice(FILMS)} is {random.choice(GOOD if label else BAD)}", "label": label}


def make_chinese_review(random: Random) -> Row:
    label = random.randint(0, 1)
    return {"text": f"{random.choice(DISHES)}{random.choice(GOOD_ZH if label else BAD_ZH)}", "label": label}


def make_similar_pair(random: Random) -> Row:
    name, other = random.sample(NAMES, 2)
    thing, count = random.choice(THINGS), random.randint(2, 9)
    return {"sentence1": f"{name} buys {count} {thing}", **random.choice((
        {"sentence2": f"{count} {thing} are bought by {name}", "score": 1.0},
        {"sentence2": f"{other} buys {count} {thing}", "score": 0.5},
        {"sentence2": f"{other} sleeps", "score": 0.0}))}


FILES: dict[str, tuple[Callable[[Random], Row], int]] = {  # file -> what makes a row, and how many
    "gsm8k": (make_word_problem, 600), "gsm8k_test": (make_word_problem, 100),
    "alpaca": (make_instruction, 300), "alpaca_zh": (make_chinese_instruction, 300),
    "pairs": (make_pair, 440), "sst2": (make_review, 1000), "sst2_test": (make_review, 200),
    "waimai": (make_chinese_review, 1000), "sts": (make_similar_pair, 600), "sts_test": (make_similar_pair, 150)}


def make_rows(name: str) -> Iterator[Row]:
    """The rows of a file, the same ones at every call."""
    make, count = FILES[name]
    random = Random(name)
    for _ in range(count):
        yield make(random)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        lines = [json.dumps(row, ensure_ascii=False) for row in make_rows(name)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(folder / f"{name}.jsonl", len(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "rows"))
