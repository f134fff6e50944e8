"""Changes to the words of a text: deletion, swaps and synonyms. Read `augmentation.py` first."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from luthier.core.errors import DataError

UNSPACED_SCRIPTS = r"\u3040-\u30ff\u3400-\u9fff"  # scripts without spaces between words
# A word with the white space before it; of such scripts, a letter.
UNIT = re.compile(rf"\s*(?:[{UNSPACED_SCRIPTS}]|[^\s{UNSPACED_SCRIPTS}]+)")


def delete_words(units: Sequence[str], rate: float, rng: np.random.Generator) -> list[str]:
    """Each word is left out with probability `rate`; if all would be, one stays."""
    kept = rng.random(len(units)) >= rate
    if not kept.any():
        kept[rng.integers(len(units))] = True
    return [unit for unit, stays in zip(units, kept, strict=True) if stays]


def swap_words(units: Sequence[str], rate: float, rng: np.random.Generator) -> list[str]:
    """`rate` of the words, at least two, change places in pairs; the white space stays where it is."""
    words = [unit.lstrip() for unit in units]
    if len(words) > 1:
        for _ in range(max(1, round(rate * len(words) / 2))):
            a, b = rng.choice(len(words), 2, replace=False)
            words[a], words[b] = words[b], words[a]
    return [unit[:len(unit) - len(unit.lstrip())] + word for unit, word in zip(units, words, strict=True)]


def replace_synonyms(text: str, rate: float, groups: SynonymGroups, rng: np.random.Generator) -> str:
    """Each word that has synonyms is exchanged with probability `rate`, by any of the others of its group."""
    def other(found: re.Match[str]) -> str:
        word = found.group()
        # A pattern without case takes some letters for one another that are not the same word: Turkish i with and
        # without its dot.
        group = groups.of.get(word.casefold(), ())
        others = [known for known in group if known.casefold() != word.casefold()]
        if not others or rng.random() >= rate:
            return word
        chosen = others[rng.integers(len(others))]
        return chosen[:1].upper() + chosen[1:] if word[:1].isupper() else chosen
    return groups.pattern.sub(other, text)


@dataclass(frozen=True)
class SynonymGroups:
    of: dict[str, tuple[str, ...]]
    pattern: re.Pattern[str]


@cache
def read_synonyms(file: str | None) -> SynonymGroups:
    if file is None or not Path(file).is_file():
        raise DataError(f"data.augment: synonyms need a file of words, and {file!r} is none",
                        "name one with `file:`; a line is a group of words for one another: big, large, huge")
    of: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(Path(file).read_text(encoding="utf-8-sig").splitlines(), 1):
        group = tuple(word.strip() for word in line.split(",") if word.strip())
        if len(group) == 1:
            raise DataError(f"{file}:{number}: a word without another: {line!r}", "separate synonyms by commas")
        of |= {word.casefold(): group for word in group}
    if not of:
        raise DataError(f"{file} holds no synonyms", "a line is a group of words for one another: big, large, huge")
    listed = "|".join(re.escape(word) for word in sorted(of, key=len, reverse=True))
    # A letter of a script with spaces: next to it, a match would be a part of another word.
    inside = rf"[^\W{UNSPACED_SCRIPTS}]"
    return SynonymGroups(of, re.compile(rf"(?<!{inside})(?:{listed})(?!{inside})", re.IGNORECASE))
