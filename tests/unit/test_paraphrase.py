"""`luthier paraphrase`: one column said anew, everything else kept, what came to nothing counted, the same every time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier import assembly
from luthier.api.paraphrase import paraphrase
from luthier.assembly.factory import PromptFormat, encode_chat_prompt, load_family
from luthier.cli.main import main
from luthier.core.errors import DataError, RecipeError, RunError
from luthier.core.examples import Message
from luthier.core.protocols import GenerationOutput, SamplingParams
from tiny import save_tiny

ROWS = [{"text": f"some {word}", "label": word[0], "n": i} for i, word in enumerate(("alpha", "beta", "gamma"))]
ASKS = ["Say anew: {text}", "And back: {text}"]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "base", "llama", dtype=torch.float32)
    ends = {"eos_token_id": [*range(256, 266), *range(0, 256, 5)]}  # so that a tiny model's answers have an end
    (tmp_path / "base/generation_config.json").write_text(json.dumps(ends))
    lines = [json.dumps(row) for row in ROWS] + ["no JSON", json.dumps({"label": "x"})]
    (tmp_path / "rows.jsonl").write_text("".join(line + "\n" for line in lines))
    return tmp_path


def said(home: Path, **given: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    settings: dict[str, Any] = {"model": home / "base", "max_new_tokens": 30, "quiet": True} | given
    told = paraphrase(str(home / "rows.jsonl"), "text", home / "new.jsonl", **settings)
    rows = [json.loads(line) for line in (home / "new.jsonl").read_text().splitlines()]
    (home / "new.jsonl").unlink()
    return told, rows


def test_one_column_is_what_the_model_answers_and_the_rest_is_kept(home: Path) -> None:
    base = load_family(assembly.ModelConfig(name_or_path=str(home / "base")))
    base.train(False)

    def answers(texts: list[str], ask: str) -> list[str]:
        prompts = [encode_chat_prompt(base, [Message("user", ask.replace("{text}", text))], PromptFormat()) for text in texts]
        found = {one.index: one for one in base.generate(prompts, SamplingParams(max_new_tokens=30))}
        assert all(one.finished for one in found.values())
        return [base.tokenizer.decode(found[i].token_ids, skip_special_tokens=True).strip() for i in range(len(texts))]

    wanted = answers([row["text"] for row in ROWS], ASKS[0])
    told, rows = said(home, prompt_template=ASKS[0])
    assert rows == [{**row, "text": text} for row, text in zip(ROWS, wanted, strict=True) if text]
    assert told["unreadable"] == 2
    assert told["rows"] == 3 == told["written"] + told["empty"] + told["unchanged"] + told["cut_off"]
    assert told["written"] > 0
    _, twice = said(home, prompt_template=ASKS)
    assert [row["text"] for row in twice] == [text for text in answers(wanted, ASKS[1]) if text], "there and back"
    recorded = json.loads((home / "new.json").read_text())
    assert recorded["prompt_template"] == ASKS
    assert recorded["rows"] == 3


def test_a_seed_says_the_same_again(home: Path) -> None:
    first, again, other = (said(home, temperature=1.0, seed=seed)[1] for seed in (1, 1, 2))
    assert first == again != other


def test_what_teaches_nothing_new_is_counted(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, heard = type(load_family(assembly.ModelConfig(name_or_path=str(home / "base")))), []

    def says(*words: tuple[str, bool]) -> None:
        told = iter(words)

        def generate(self: Any, prompts: list[list[int]], sampling: SamplingParams) -> Any:
            heard.append([self.tokenizer.decode(prompt) for prompt in prompts])
            for i in range(len(prompts)):
                text, finished = next(told)
                yield GenerationOutput(i, tuple(self.tokenizer(text)["input_ids"]), finished)
        monkeypatch.setattr(family, "generate", generate)

    says(("", True), ("some beta", True), ("other", True))
    told, rows = said(home)
    assert (told["empty"], told["unchanged"], told["cut_off"], told["written"]) == (1, 1, 0, 1)
    assert rows == [{**ROWS[2], "text": "other"}]
    heard.clear()
    says(("", True), ("half of a", False), ("der dritte", True), ("the third", True))
    told, rows = said(home, prompt_template=ASKS)
    assert (told["empty"], told["unchanged"], told["cut_off"], told["written"]) == (1, 0, 1, 1)
    assert rows == [{**ROWS[2], "text": "the third"}]
    assert [len(prompts) for prompts in heard] == [3, 1], "nothing is asked about what is not there"
    assert "And back: der dritte" in heard[1][0]


def test_what_cannot_be_is_told_before_anything_is_loaded(home: Path) -> None:
    file, out = str(home / "rows.jsonl"), home / "new.jsonl"
    for error, words, given in ((RecipeError, "has no {text}", {"prompt_template": "Say it"}),
                                (DataError, "'words'", {"column": "words"}),
                                (RunError, "a new .jsonl file", {"out": home / "rows.jsonl"})):
        settings: dict[str, Any] = {"column": "text", "out": out, "model": "nowhere/to be found"} | given
        with pytest.raises(error, match=words):
            paraphrase(file, **settings, quiet=True)
    assert not out.exists()


def test_the_command(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paraphrase", str(home / "rows.jsonl"), "--column", "text", "--out", str(home / "new.jsonl"), "--max-samples",
                 "2", "--model", str(home / "base"), "--max-new-tokens", "4", "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 2
