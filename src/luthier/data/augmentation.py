"""Data augmentation: settings, and augmented copies of examples. Read `core/examples.py` first.

Random numbers depend on the seed of the run, the row and the augmentation, so the same recipe gives the same rows. Only
the input of the model is changed, never its target.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
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
from luthier.data.image_augmentation import add_noise, crop_image
from luthier.data.images import Pixels
from luthier.data.text_augmentation import UNIT, delete_words, read_synonyms, replace_synonyms, swap_words


class TextAugmentation(Config):
    """Changes words of the input: deletion, swap or synonyms."""

    name: Literal["deletion", "swap", "synonyms"] = Field(description=(
        "deletion: removes words; swap: swaps pairs of words; synonyms: replaces words by synonyms from a file"))
    rate: float = Field(0.1, gt=0, lt=1, description="share of a row's words that is changed")
    copies: int = Field(1, ge=0, description="changed copies that are added for each row")
    replace: float = Field(0.0, ge=0, le=1, description="probability of changing the row itself")
    file: str | None = Field(None, description="synonyms, one comma-separated group on each line")

    def text(self, text: str, rng: np.random.Generator) -> str:
        if self.name == "synonyms":
            return replace_synonyms(text, self.rate, read_synonyms(self.file), rng)
        units = UNIT.findall(text)
        return "".join(delete_words(units, self.rate, rng) if self.name == "deletion"
                       else swap_words(units, self.rate, rng))


class ImageAugmentation(Config):
    """Changes an image in a new random way in every epoch: crop, flip or noise."""

    name: Literal["crop", "flip", "noise"] = Field(description=(
        "crop: a region of at least `amount` of the area, resized to the original size; flip: left and right swapped; "
        "noise: Gaussian, standard deviation `amount` of the brightness range"))
    probability: float = Field(0.5, gt=0, le=1, description="probability of changing an image")
    amount: float = Field(0.3, gt=0, lt=1, description="see `name`")

    def apply(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        if rng.random() >= self.probability:
            return pixels
        if self.name == "flip":
            return pixels[:, ::-1]
        return crop_image(pixels, self.amount, rng) if self.name == "crop" else add_noise(pixels, self.amount,
                                                                                               rng)


class MixupAugmentation(Config):
    """Mixes pairs of rows, inputs and labels: see `mixup.py`."""

    name: Literal["mixup"] = Field("mixup", description="mixes two rows and their labels; for objective: classify")
    alpha: float = Field(0.2, gt=0, description=(
        "a row's share is drawn from Beta(alpha, alpha); a small alpha gives shares near 0 or 1"))
    copies: int = Field(1, ge=0, description="mixed copies that are added for each row")
    replace: float = Field(0.0, ge=0, le=1, description="probability of mixing the row itself")


Augment = Annotated[TextAugmentation | ImageAugmentation | MixupAugmentation, Field(discriminator="name")]
VIEWS = (ImageAugmentation(name="crop", probability=1.0), ImageAugmentation(name="flip"),
         ImageAugmentation(name="noise", amount=0.05))  # of images without a label, if the recipe names no augmentation


def _augment_classification(example: Any, change: Callable[[str], str]) -> Example:
    first = change(example.text)
    return replace(example, text=first, second=None if example.second is None else change(example.second))


def _augment_chat(example: Any, change: Callable[[str], str]) -> Example:
    """Changes the user's turns only."""
    said: tuple[Message, ...] = tuple(replace(turn, content=change(turn.content))
                                      if turn.role == "user" and turn.content.strip() else turn
                                      for turn in example.messages)
    return replace(example, messages=said)


# Changes the text that the model reads, never the text that it predicts.
TEXT_EDITORS: dict[type, Callable[[Any, Callable[[str], str]], Example]] = {
    ClassificationExample: _augment_classification,
    ChatExample: _augment_chat,
    TextExample: lambda example, change: replace(example, text=change(example.text)),
    CompletionExample: lambda example, change: replace(example, prompt=change(example.prompt)),
    ContrastiveExample: lambda example, change: replace(example, texts=tuple(map(change, example.texts))),
}


def augment_examples(example: Example, row: int, changes: Sequence[TextAugmentation],
                     seed: int) -> list[tuple[str, Example]]:
    """The row itself, changed or not, and its changed copies; each with the name of its augmentation, or "".

    Args:
        row: its index among the train rows, a seed of the random numbers.
    """
    found: list[tuple[str, Example]] = [("", example)]
    for number, change in enumerate(changes):
        rng = np.random.default_rng([seed, row, number])
        if rng.random() < change.replace:
            found[0] = (change.name, _augment_example(found[0][1], change, rng))
        found += [(change.name, _augment_example(example, change, rng)) for _ in range(change.copies)]
    return found


def _augment_example(example: Example, change: TextAugmentation, rng: np.random.Generator) -> Example:
    if isinstance(example, TokenClassificationExample) and change.name != "synonyms":
        pairs = list(zip(example.words, example.tags, strict=True))
        kept = _augment_tagged_words(pairs, change, rng)
        return replace(example, words=tuple(word for word, _ in kept), tags=tuple(tag for _, tag in kept))
    if isinstance(example, TokenClassificationExample):
        return replace(example, words=tuple(change.text(word, rng) for word in example.words))
    if type(example) not in TEXT_EDITORS:
        raise DataError(f"{example.origin}: data.augment: {change.name} does not support {type(example).__name__}",
                        f"it changes "
                        f"{', '.join(sorted(kind.__name__ for kind in (*TEXT_EDITORS, TokenClassificationExample)))}")
    return TEXT_EDITORS[type(example)](example, lambda text: change.text(text, rng) if text.strip() else text)


def _augment_tagged_words(pairs: list[tuple[str, str]], change: TextAugmentation,
                          rng: np.random.Generator) -> list[tuple[str, str]]:
    """Words with their tags, by the same rules as the words of a text."""
    places = [str(i) for i in range(len(pairs))]
    chosen = (delete_words if change.name == "deletion" else swap_words)(places, change.rate, rng)
    return [pairs[int(place)] for place in chosen]
