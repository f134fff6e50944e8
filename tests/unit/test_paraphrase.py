"""`luthier paraphrase`: one column said anew, everything else kept, what came to nothing counted, the same every time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier import build
from luthier.cli import main
from luthier.core.errors import DataError, RecipeError, RunError
from luthier.core.examples import Message
from luthier.core.protocols import Generated, Sampling
from luthier.paraphrase import paraphrase
from tiny import save_tiny

ROWS = [{"text": f"some {word}", "label": word[0], "n": i} for i, word in enumerate(("alpha", "beta", "gamma"))]
ASKS = ["Say anew: {text}", "And back: {text}"]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "base", "llama", dtype=torch.float32)
    lines = [json.dumps(row) for row in ROWS] + ["no JSON", json.dumps({"label": "x"})]
    (tmp_path / "rows.jsonl").write_text("".join(line + "\n" for line in lines))
    return tmp_path


def said(home: Path, **given: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    settings: dict[str, Any] = {"model": home / "base", "max_new_tokens": 6, "quiet": True} | given
    told = paraphrase(str(home / "rows.jsonl"), "text", home / "new.jsonl", **settings)
    rows = [json.loads(line) for line in (home / "new.jsonl").read_text().splitlines()]
    (home / "new.jsonl").unlink()
    return told, rows


def test_one_column_is_what_the_model_answers_and_the_rest_is_kept(home: Path) -> None:
    base = build.family(build.BaseConfig(name=str(home / "base")))
    base.train(False)

    def answers(texts: list[str], ask: str) -> list[str]:
        prompts = [build.chat_prompt(base, [Message("user", ask.replace("{text}", text))], None) for text in texts]
        found = {one.index: one.tokens for one in base.generate(prompts, Sampling(max_new_tokens=6))}
        return [base.tokenizer.decode(found[i], skip_special_tokens=True).strip() for i in range(len(texts))]

    wanted = answers([row["text"] for row in ROWS], ASKS[0])
    told, rows = said(home, ask=ASKS[0])
    assert rows == [{**row, "text": text} for row, text in zip(ROWS, wanted, strict=True) if text]
    assert told["unreadable"] == 2
    assert told["rows"] == 3 == told["written"] + told["empty"] + told["unchanged"]
    _, twice = said(home, ask=ASKS)
    assert [row["text"] for row in twice] == [text for text in answers(wanted, ASKS[1]) if text], "there and back"
    recorded = json.loads((home / "new.json").read_text())
    assert recorded["ask"] == ASKS
    assert recorded["rows"] == 3


def test_a_seed_says_the_same_again(home: Path) -> None:
    first, again, other = (said(home, temperature=1.0, seed=seed)[1] for seed in (1, 1, 2))
    assert first == again != other


def test_what_teaches_nothing_new_is_counted(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = iter(["", "some beta", "other"])
    family = type(build.family(build.BaseConfig(name=str(home / "base"))))
    monkeypatch.setattr(family, "generate", lambda self, prompts, sampling: iter(
        Generated(i, tuple(self.tokenizer(next(words))["input_ids"]), True) for i in range(len(prompts))))
    told, rows = said(home)
    assert (told["empty"], told["unchanged"], told["written"]) == (1, 1, 1)
    assert rows == [{**ROWS[2], "text": "other"}]


def test_what_cannot_be_is_told_before_anything_is_loaded(home: Path) -> None:
    file, out = str(home / "rows.jsonl"), home / "new.jsonl"
    for error, words, given in ((RecipeError, "place for the words", {"ask": "Say it"}),
                                (DataError, "'words'", {"column": "words"}),
                                (RunError, "is not there yet", {"out": home / "rows.jsonl"})):
        settings: dict[str, Any] = {"column": "text", "out": out, "model": "nowhere/to be found"} | given
        with pytest.raises(error, match=words):
            paraphrase(file, **settings, quiet=True)
    assert not out.exists()


def test_the_command(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paraphrase", str(home / "rows.jsonl"), "--column", "text", "--out", str(home / "new.jsonl"), "--limit",
                 "2", "--model", str(home / "base"), "--max-new-tokens", "4", "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 2
