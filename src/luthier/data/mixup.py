"""Mixup: one example from two rows, inputs and labels mixed. Read `augmentation.py` and `label_encoding.py` first.

    read     share * a + (1 - share) * b        share ~ Beta(alpha, alpha), drawn once from the seed, row and change
    label    share * label_a + (1 - share) * label_b

For images, mixup mixes the pixels: Zhang et al. 2018 (arXiv:1710.09412), section 2. For texts, it mixes the embeddings
of the tokens at equal positions: wordMixup of Guo et al. 2019 (arXiv:1905.08941). The shorter text is padded with
embeddings of zeros, and the token types are those of the longer one. Each mixture is one example, so results do not
depend on the division into micro-batches.

A label is a class (its mixture is a share of each class), one flag for each class, or a number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from luthier.core.embedding_mix import SpanMix
from luthier.core.errors import DataError
from luthier.core.examples import ClassificationExample, Example, ImageExample
from luthier.core.types import LabeledSpan, TokenizedExample, TokenSpan
from luthier.data.augmentation import MixupAugmentation
from luthier.data.images import ImageInput
from luthier.data.label_encoding import LabelEncoder


@dataclass(frozen=True)
class MixupDraw:
    """The index of the other row, and the share of the first row."""

    row: int
    share: float


def draw_pairs(examples: Sequence[Example], change: MixupAugmentation, seed: int,
               number: int) -> Iterator[list[MixupDraw | None]]:
    """For each row, the row to mix it with, or None; then the rows to mix its copies with.

    Raises `DataError` if there is nothing to mix. `number`: the index of this augmentation in the recipe.
    """
    for row, example in enumerate(examples):
        if not isinstance(example, ClassificationExample | ImageExample) or example.label is None:
            raise DataError(f"{example.origin}: data.augment: mixup does not support {type(example).__name__}",
                            "it mixes texts and images with a label")
        if len(examples) < 2:
            raise DataError("data.augment: mixup needs two rows, and there is one",
                            "give more rows, or omit mixup")
        rng = np.random.default_rng([seed, row, number, 1])  # one generator per row, so rows do not shift one another
        own = rng.random() < change.replace
        yield [_draw_pair(row, len(examples), change.alpha, rng) if place or own else None
               for place in range(1 + change.copies)]


def _draw_pair(row: int, rows: int, alpha: float, rng: np.random.Generator) -> MixupDraw:
    """A random other row; the share in float32, as in a batch."""
    # The offset is 1 to rows - 1, so a row is never mixed with itself.
    return MixupDraw(int((row + 1 + rng.integers(rows - 1)) % rows), float(np.float32(rng.beta(alpha, alpha))))


def mix_examples(a: TokenizedExample, b: TokenizedExample, share: float, what: LabelEncoder) -> TokenizedExample:
    """The mixture of `share` times `a` and 1 - `share` times `b`, labels included."""
    (one,), (other,) = a.labeled_spans, b.labeled_spans
    spans, images = a.spans, a.images
    if images:
        image, other_image = a.images[0], b.images[0]
        assert isinstance(image, ImageInput)
        assert isinstance(other_image, ImageInput)
        images = (replace(image, other=other_image, share=share),)
    else:
        spans = (_mix_spans(a.spans[0], b.spans[0], share),)
    return replace(a, spans=spans, images=images, labeled_spans=(_mix_labels(one, other, share, what),))


def _mix_spans(a: TokenSpan, b: TokenSpan, share: float) -> TokenSpan:
    """The tokens of the longer span, mixed with those of the other."""
    if len(a.ids) < len(b.ids):
        a, b, share = b, a, 1 - share
    # -1 has an embedding of zeros.
    return replace(a, mix=SpanMix(b.ids + (-1,) * (len(a.ids) - len(b.ids)), share))


def _mix_labels(a: LabeledSpan, b: LabeledSpan, share: float, what: LabelEncoder) -> LabeledSpan:
    weight = share * a.weight + (1 - share) * b.weight
    if isinstance(a.label, tuple) and isinstance(b.label, tuple):
        return replace(a, weight=weight, label=tuple(share * x + (1 - share) * y
                                                     for x, y in zip(a.label, b.label, strict=True)))
    assert not isinstance(a.label, tuple)
    assert not isinstance(b.label, tuple)
    if what.classes is None:
        return replace(a, weight=weight, label=share * a.label + (1 - share) * b.label)
    shares = [0.0] * len(what.classes)  # one for each class
    shares[int(a.label)] += share
    shares[int(b.label)] += 1 - share  # added: both rows may have the same class
    return replace(a, weight=weight, label=a.label if share >= 0.5 else b.label, soft_label=tuple(shares))
