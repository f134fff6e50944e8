"""Every `luthier` command that stands in a page runs, for a step, with tiny models behind the names of the embedded ones.

The words are those of the pages (`test_docs.py` finds them); only a length is put behind them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.cli.main import main, parse
from tiny import save_tiny
from unit.test_docs import PAGES, ROOT, blocks, commands, text

FOUND = {" ".join(words): words for page in PAGES for words in commands(text(page)) if len(words) > 1 or words[0] in ("doctor", "schema")}
ELSEWHERE = {  # the beginning of a command: who runs it, or what it needs that is not here
    "rlhf ": "unit/test_rlhf.py", "evaluate runs/rlhf": "unit/test_rlhf.py",
    "train --model google/": "a model of the hub; contract/test_seq2seq_runs.py",
    "train --model google-": "models of the hub; contract/test_hidden.py",
    "compare ": "many runs; unit/test_compare.py", "plan ": "processes of its own, on the embedded base", "serve ": "answers without end",
    "export runs/lora-smollm2 --to gguf": "a tokenizer with merges; contract/test_gguf.py",
    "data check": "no command without a file", "inspect RUN": "the same as with a name",
}
RUNNING = {line: words for line, words in FOUND.items()
           if line != "data check" and "../shared" not in line and not any(line.startswith(start) for start in ELSEWHERE if start != "data check")}


def rows(*columns: str) -> list[dict[str, Any]]:
    return [{name: f"{name} {i}" for name in columns} for i in range(8)]


def table(mark: str, *columns: str, **fixed: list[Any]) -> str:
    lines = [mark.join([*columns, *fixed])]
    return "\n".join([*lines, *(mark.join([*(f"{c} {i}" for c in columns), *(str(v[i % len(v)]) for v in fixed.values())]) for i in range(8))]) + "\n"


FILES: dict[str, str | list[dict[str, Any]]] = {
    "mine.jsonl": rows("prompt", "completion"), "unseen.jsonl": rows("prompt", "completion"),
    "compared.jsonl": rows("prompt", "chosen", "rejected"), "pairs.jsonl": rows("anchor", "positive"),
    "choices.jsonl": [{"question": f"What is {i}?", "choices": [f"{i}", "none"], "answer": 0} for i in range(4)],
    "feedback.jsonl": [{**row, "label": i % 2 == 0} for i, row in enumerate(rows("prompt", "completion"))],
    "questions.jsonl": [{"prompt": f"{i} + 1?", "reference": str(i + 1)} for i in range(8)],
    "topics.jsonl": [{"text": f"text {i}", "label": ["a", "b"][:i % 3]} for i in range(8)],
    "more.jsonl": [{"text": f"other {i}", "label": ["good", "bad"][i % 2]} for i in range(8)],
    "rewards.py": blocks(ROOT / "docs/own.md", "python")[0],
    "notes.txt": "a note\n" * 8, "field.txt": "a word of the field\n" * 8,
    "reviews.jsonl": [{"text": f"text {i}", "label": ["good", "bad"][i % 2]} for i in range(8)],
    "reviews.csv": table(",", "text", label=["good", "bad"]), "unseen.csv": table(",", "text", label=["good", "bad"]),
    "reviews.tsv": table("\t", "text", label=["good", "bad"]), "sts.tsv": table("\t", "sentence1", "sentence2", score=[0, 2, 5]),
}
SHORT = {"train": ["training.max_steps=1", "training.batch_size=4"], "evaluate": ["--max-new-tokens", "2"], "paraphrase": ["--max-new-tokens", "2"]}
BRIEF = {"grpo": ["objective.max_new_tokens=4"], "ppo": ["objective.max_new_tokens=4"], "demo.yaml": ["evaluate.max_samples=2", "evaluate.max_new_tokens=2", "data.max_length=256"]}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout's recipes, rows under the names of the pages, bases, and the runs that they speak of."""
    folder = tmp_path_factory.mktemp("pages")
    small = {"dtype": torch.float32, "max_position_embeddings": 512}
    save_tiny(folder / "smollm2", "llama", num_hidden_layers=7, **small)
    save_tiny(folder / "minilm", "bert", **small)
    (folder / "models").mkdir()
    (folder / "models/moved").symlink_to(folder / "smollm2")
    for name in ("recipes", "src"):
        (folder / name).symlink_to(ROOT / name)
    for name, content in FILES.items():
        (folder / name).write_text(content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content))
    return folder


@pytest.fixture
def run(home: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys.modules["luthier.models.model_names"], "_find_packaged", lambda alias, where: home / alias)
    monkeypatch.setattr("luthier.cli.console.read_line", lambda: None)  # whoever chats says nothing

    def call(*words: str) -> int:
        return main(words)

    for name in ("lora-smollm2", "law", "medicine"):
        if not (home / "runs" / name).exists():
            assert call("train", "--data", "mine.jsonl", "data.test=unseen.jsonl", "training.max_steps=1", "--output-dir", f"runs/{name}", "--quiet") == 0
    return call


@pytest.mark.parametrize("line", RUNNING)
def test_a_command_of_the_pages_runs(run: Callable[..., int], tmp_path: Path, line: str) -> None:
    words = ["runs/lora-smollm2" if word == "RUN" else word for word in RUNNING[line]]
    words += SHORT.get(words[0], []) if "--resume" not in words else []
    words += [word for part, more in BRIEF.items() for word in more if any(part in given for given in words)]
    if words[0] == "train" and "--resume" not in words:
        words += ["--output-dir", str(tmp_path / "run")]
    if words[0] == "paraphrase":
        words[words.index("--out") + 1] = str(tmp_path / "new.jsonl")
    if words[0] in ("export", "merge-adapters") or (words[0] == "data" and "--out" not in words):
        words = [*(words[:words.index("--out")] if "--out" in words else words), "--out", str(tmp_path / "out")]
    assert run(*words, *(["--quiet"] if "quiet" in parse(words) else [])) == 0


def test_what_is_left_out_is_known() -> None:
    left = [line for line in FOUND if line not in RUNNING]
    assert len(RUNNING) > 45
    assert len(left) < 20
    assert all(any(line.startswith(start) for line in left) for start in ELSEWHERE)
