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
# A word with the whitespace before it; in scripts without spaces, a single character.
UNIT = re.compile(rf"\s*(?:[{UNSPACED_SCRIPTS}]|[^\s{UNSPACED_SCRIPTS}]+)")


def delete_words(units: Sequence[str], rate: float, rng: np.random.Generator) -> list[str]:
    """Deletes each word with probability `rate`; at least one word stays."""
    kept = rng.random(len(units)) >= rate
    if not kept.any():
        kept[rng.integers(len(units))] = True
    return [unit for unit, stays in zip(units, kept, strict=True) if stays]


def swap_words(units: Sequence[str], rate: float, rng: np.random.Generator) -> list[str]:
    """Swaps the fraction `rate` of the words, at least two, in pairs. Whitespace is unchanged."""
    words = [unit.lstrip() for unit in units]
    if len(words) > 1:
        for _ in range(max(1, round(rate * len(words) / 2))):
            a, b = rng.choice(len(words), 2, replace=False)
            words[a], words[b] = words[b], words[a]
    return [unit[:len(unit) - len(unit.lstrip())] + word for unit, word in zip(units, words, strict=True)]


def replace_synonyms(text: str, rate: float, groups: SynonymGroups, rng: np.random.Generator) -> str:
    """Replaces each word that has synonyms with probability `rate`, by a random other word of its group."""
    def other(found: re.Match[str]) -> str:
        word = found.group()
        # A case-insensitive pattern equates some letters of different words, such as the Turkish i with and without
        # a dot.
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
        raise DataError(f"data.augment: synonyms need a file of words, and {file!r} is not a file",
                        "set `file:` to a file in which each line is a group of synonyms, such as: big, large, huge")
    of: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(Path(file).read_text(encoding="utf-8-sig").splitlines(), 1):
        group = tuple(word.strip() for word in line.split(",") if word.strip())
        if len(group) == 1:
            raise DataError(f"{file}:{number}: a word without a synonym: {line!r}", "separate synonyms by commas")
        of |= {word.casefold(): group for word in group}
    if not of:
        raise DataError(f"{file} has no synonyms", "each line must be a group of synonyms, such as: big, large, huge")
    listed = "|".join(re.escape(word) for word in sorted(of, key=len, reverse=True))
    # A letter of a script with spaces: next to it, a match would be a part of another word.
    inside = rf"[^\W{UNSPACED_SCRIPTS}]"
    return SynonymGroups(of, re.compile(rf"(?<!{inside})(?:{listed})(?!{inside})", re.IGNORECASE))
