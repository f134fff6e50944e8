"""The prose can be read at once: short sentences in README and docs, American spelling everywhere.

That links lead somewhere and commands run is in `unit/test_docs.py`.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
WORDS = 35  # of a sentence, at most
PROSE = ["README.md", "CONTRIBUTING.md", "docs", "src", "recipes"]
CODE = ["tests", "benchmarks"]  # of these the British spellings alone: tests misspell keys on purpose
IGNORED = "cancelled,writeable,te,hel,caf,lass"  # a status of OpenAI's jobs, an attribute of numpy, parts of words


def blocks(page: str) -> Iterator[str]:
    """Paragraphs, list items, table cells and headings of a page, without code, links' targets and comments."""
    page = re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)
    page = re.sub(r"<!--.*?-->", "", page, flags=re.DOTALL)
    page = re.sub(r"\]\([^)]*\)", "]", page)
    page = re.sub(r"`[^`]*`", "Code", page)
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:[*+-]|\d+\.)\s)|\n(?=#|\|)|(?<=\|)\n", page):
        if block.lstrip().startswith("|"):
            yield from (cell for cell in block.split("|") if cell.strip())
        elif not block.startswith("    "):
            yield re.sub(r"^\s*(?:[*+-]|\d+\.|#+)\s+", "", block)


def sentences(page: str) -> Iterator[str]:
    """
    >>> list(sentences("One, e.g. two. Three?\\n\\n* four"))
    ['One, e.g. two.', 'Three?', 'four']
    """
    for block in blocks(page):
        flat = " ".join(block.split())
        yield from (part for part in re.split(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<!al\.)(?<!vs\.)\s+(?=[A-Z`*\[(\"'\d])", flat) if part)


def long_sentences(page: str) -> list[str]:
    return [f"{count} words: {sentence}" for sentence in sentences(page)
            if (count := len(re.findall(r"[^\s]*[A-Za-z0-9][^\s]*", sentence))) > WORDS]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_sentence_is_too_long(page: Path) -> None:
    found = long_sentences(page.read_text(encoding="utf-8"))
    assert not found, f"{len(found)} sentences\n" + "\n".join(found)


def test_a_long_sentence_is_found() -> None:
    text = "A " + "word " * WORDS + "ends."
    assert len(long_sentences(text)) == len(long_sentences(f"* {text}")) == len(long_sentences(f"| a | {text} |")) == 1
    assert not long_sentences("A " + "word " * (WORDS - 2) + "ends. And another one begins here.")
    assert not long_sentences("```\n" + text + "\n```")


def spelling(*paths: str, dictionaries: str = "clear,en-GB_to_en-US", cwd: Path = ROOT) -> str:
    """What codespell finds in the files, a line each."""
    run = subprocess.run([sys.executable, "-m", "codespell_lib", "--builtin", dictionaries, "--ignore-words-list", IGNORED,
                          "--skip", "*.egg-info,*.jsonl,*.png,results,*.csv,demo_phrasings.yaml,test_prose.py", *paths],
                         cwd=cwd, capture_output=True, text=True)
    assert run.returncode in (0, 65), run.stderr
    return run.stdout


def test_the_spelling_is_american() -> None:
    assert spelling(*PROSE) + spelling(*CODE, dictionaries="en-GB_to_en-US") == ""


def test_a_misspelled_word_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("The optimiser recieves gradients.\n")
    found = spelling("a.md", cwd=tmp_path)
    assert "optimizer" in found
    assert "receives" in found
