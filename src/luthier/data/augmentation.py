"""More rows out of the same: words left out, swapped or exchanged for others, pictures cropped, flipped or made noisy.

Everything is drawn from the run's seed, the row and the change, so the same recipe gives the same rows. Only what a
model reads is changed, never what it is to answer. Read `core/examples.py` first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from luthier.core.config import Config
from luthier.core.errors import DataError
from luthier.core.examples import (
    ChatExample,
    ClassificationExample,
    CompletionExample,
    ContrastiveExample,
    Example,
    Message,
    TextExample,
    TokenClassificationExample,
)
from luthier.data.images import Pixels

UNSPACED = r"\u3040-\u30ff\u3400-\u9fff"  # scripts without spaces between words
# A word with the white space before it; of such scripts, a letter.
UNIT = re.compile(rf"\s*(?:[{UNSPACED}]|[^\s{UNSPACED}]+)")


class TextAugmentation(Config):
    """A change to the words that are read: deletion, swap or synonyms."""

    name: Literal["deletion", "swap", "synonyms"] = Field(description=(
        "deletion: words are left out; swap: pairs of words change places; synonyms: words are exchanged by a file"))
    rate: float = Field(0.1, gt=0, lt=1, description="the share of a row's words that is changed")
    copies: int = Field(1, ge=0, description="changed rows that are added for each row")
    replace: float = Field(0.0, ge=0, le=1, description="the probability with which a row itself is changed")
    file: str | None = Field(None, description="of synonyms: a line for each group of words, separated by commas")

    def text(self, text: str, chance: np.random.Generator) -> str:
        if self.name == "synonyms":
            return _replace_synonyms(text, self.rate, _read_synonyms(self.file), chance)
        units = UNIT.findall(text)
        return "".join(_delete_words(units, self.rate, chance) if self.name == "deletion"
                       else _swap_words(units, self.rate, chance))


class ImageAugmentation(Config):
    """A change to a picture, drawn anew in every epoch: crop, flip or noise."""

    name: Literal["crop", "flip", "noise"] = Field(description=(
        "crop: a part of at least `amount` of the area, at the old size; flip: left and right change places; "
        "noise: normal, with a deviation of `amount` of the range of brightness"))
    chance: float = Field(0.5, gt=0, le=1, description="the probability with which a picture is changed")
    amount: float = Field(0.3, gt=0, lt=1, description="see `name`")

    def picture(self, pixels: Pixels, chance: np.random.Generator) -> Pixels:
        if chance.random() >= self.chance:
            return pixels
        if self.name == "flip":
            return pixels[:, ::-1]
        return _crop_image(pixels, self.amount, chance) if self.name == "crop" else _add_noise(pixels, self.amount,
                                                                                               chance)


class MixupAugmentation(Config):
    """Rows mixed with one another, what is read and the label alike: see `mixup.py`."""

    name: Literal["mixup"] = Field("mixup", description="two rows and their labels are mixed; for objective: classify")
    alpha: float = Field(0.2, gt=0, description=(
        "a row's share is drawn from Beta(alpha, alpha): with a small alpha it is near 0 or 1"))
    copies: int = Field(1, ge=0, description="mixed rows that are added for each row")
    replace: float = Field(0.0, ge=0, le=1, description="the probability with which a row itself is mixed")


Augment = Annotated[TextAugmentation | ImageAugmentation | MixupAugmentation, Field(discriminator="name")]
VIEWS = (ImageAugmentation(name="crop", chance=1.0), ImageAugmentation(name="flip"),
         ImageAugmentation(name="noise", amount=0.05))  # of pictures without a label, where the recipe names no change


# ---------------------------------------------------------------- words


def _delete_words(units: Sequence[str], rate: float, chance: np.random.Generator) -> list[str]:
    """Each word is left out with probability `rate`; if all would be, one stays."""
    kept = chance.random(len(units)) >= rate
    if not kept.any():
        kept[chance.integers(len(units))] = True
    return [unit for unit, stays in zip(units, kept, strict=True) if stays]


def _swap_words(units: Sequence[str], rate: float, chance: np.random.Generator) -> list[str]:
    """`rate` of the words, at least two, change places in pairs; the white space stays where it is."""
    words = [unit.lstrip() for unit in units]
    if len(words) > 1:
        for _ in range(max(1, round(rate * len(words) / 2))):
            a, b = chance.choice(len(words), 2, replace=False)
            words[a], words[b] = words[b], words[a]
    return [unit[:len(unit) - len(unit.lstrip())] + word for unit, word in zip(units, words, strict=True)]


def _replace_synonyms(text: str, rate: float, groups: _SynonymGroups, chance: np.random.Generator) -> str:
    """Each word that has synonyms is exchanged with probability `rate`, by any of the others of its group."""
    def other(found: re.Match[str]) -> str:
        word = found.group()
        # A pattern without case takes some letters for one another that are not the same word: Turkish i with and
        # without its dot.
        group = groups.of.get(word.casefold(), ())
        others = [known for known in group if known.casefold() != word.casefold()]
        if not others or chance.random() >= rate:
            return word
        chosen = others[chance.integers(len(others))]
        return chosen[:1].upper() + chosen[1:] if word[:1].isupper() else chosen
    return groups.pattern.sub(other, text)


@dataclass(frozen=True)
class _SynonymGroups:
    of: dict[str, tuple[str, ...]]
    pattern: re.Pattern[str]


@cache
def _read_synonyms(file: str | None) -> _SynonymGroups:
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
    inside = rf"[^\W{UNSPACED}]"  # a letter of any script that has spaces: a word beside it is a part of another one
    return _SynonymGroups(of, re.compile(rf"(?<!{inside})(?:{listed})(?!{inside})", re.IGNORECASE))


# ---------------------------------------------------------------- pictures


def _crop_image(pixels: Pixels, smallest: float, chance: np.random.Generator) -> Pixels:
    """A part with the picture's own proportions and at least `smallest` of its area, stretched to its size."""
    height, width = pixels.shape[:2]
    side = float(np.sqrt(chance.uniform(smallest, 1.0)))
    rows, columns = max(1, round(side * height)), max(1, round(side * width))
    top, left = int(chance.integers(height - rows + 1)), int(chance.integers(width - columns + 1))
    part = pixels[top:top + rows, left:left + columns].astype(np.float32)
    planes = torch.from_numpy(part.reshape(rows, columns, -1)).permute(2, 0, 1)[None]
    grown = torch.nn.functional.interpolate(planes, (height, width), mode="bilinear", align_corners=False)[0]
    return grown.permute(1, 2, 0).reshape(pixels.shape).round().to(torch.uint8).numpy()


def _add_noise(pixels: Pixels, amount: float, chance: np.random.Generator) -> Pixels:
    return (pixels + chance.normal(0.0, 255 * amount, pixels.shape)).round().clip(0, 255).astype(np.uint8)


# ---------------------------------------------------------------- examples


def _augment_classification(example: Any, change: Callable[[str], str]) -> Example:
    first = change(example.text)
    return replace(example, text=first, second=None if example.second is None else change(example.second))


def _augment_chat(example: Any, change: Callable[[str], str]) -> Example:
    """Only the user's turns."""
    said: tuple[Message, ...] = tuple(replace(turn, content=change(turn.content))
                                      if turn.role == "user" and turn.content.strip() else turn
                                      for turn in example.messages)
    return replace(example, messages=said)


READ: dict[type, Callable[[Any, Callable[[str], str]], Example]] = {  # which words of an example are read, not answered
    ClassificationExample: _augment_classification,
    ChatExample: _augment_chat,
    TextExample: lambda example, change: replace(example, text=change(example.text)),
    CompletionExample: lambda example, change: replace(example, prompt=change(example.prompt)),
    ContrastiveExample: lambda example, change: replace(example, texts=tuple(map(change, example.texts))),
}


def augment_examples(example: Example, row: int, changes: Sequence[TextAugmentation],
                     seed: int) -> list[tuple[str, Example]]:
    """The row itself, changed or not, and its changed copies; each with the name of its change, or none.

    Args:
        row: its number among the train rows, which its chances are drawn from.
    """
    found: list[tuple[str, Example]] = [("", example)]
    for number, change in enumerate(changes):
        chance = np.random.default_rng([seed, row, number])
        if chance.random() < change.replace:
            found[0] = (change.name, _augment_example(found[0][1], change, chance))
        found += [(change.name, _augment_example(example, change, chance)) for _ in range(change.copies)]
    return found


def _augment_example(example: Example, change: TextAugmentation, chance: np.random.Generator) -> Example:
    if isinstance(example, TokenClassificationExample) and change.name != "synonyms":
        pairs = list(zip(example.words, example.tags, strict=True))
        kept = _augment_tagged_words(pairs, change, chance)
        return replace(example, words=tuple(word for word, _ in kept), tags=tuple(tag for _, tag in kept))
    if isinstance(example, TokenClassificationExample):
        return replace(example, words=tuple(change.text(word, chance) for word in example.words))
    if type(example) not in READ:
        raise DataError(f"{example.origin}: data.augment knows no {change.name} for {type(example).__name__}",
                        f"it changes "
                        f"{', '.join(sorted(kind.__name__ for kind in (*READ, TokenClassificationExample)))}")
    return READ[type(example)](example, lambda text: change.text(text, chance) if text.strip() else text)


def _augment_tagged_words(pairs: list[tuple[str, str]], change: TextAugmentation,
                          chance: np.random.Generator) -> list[tuple[str, str]]:
    """Words with their tags, by the same rules as a text's words."""
    places = [str(i) for i in range(len(pairs))]
    chosen = (_delete_words if change.name == "deletion" else _swap_words)(places, change.rate, chance)
    return [pairs[int(place)] for place in chosen]


def paraphrase_examples(examples: Sequence[Example], generate: Callable[[list[str]], list[str]],
                        ask: str = "Say this in other words, in the same language:\n{text}") -> list[Example]:
    """A copy of every example with its words said anew by a model.

    Args:
        generate: prompts to answers, in order. For back-translation: a function that translates there and back.
        ask: the prompt, with `{text}` where the words go.
    """
    texts: list[str] = []
    for example in examples:
        READ[type(example)](example, lambda text: texts.append(text) or text)  # type: ignore[func-returns-value]
    answers = iter(generate([ask.replace("{text}", text) for text in texts]))
    return [READ[type(example)](example, lambda text: next(answers).strip() or text) for example in examples]
