"""Everything that changes an example between loading and batching: masked tokens and augmented images.

Training samples the changes again in every epoch (`apply_random`, called by the batch sources). Held-out rows get fixed
ones once, when they are loaded (`disable_augmentation`). Read `masking.py` and `images.py` first.
"""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import replace

from luthier.core.types import TokenizedExample
from luthier.data.images import ImageInput


def apply_random(example: TokenizedExample, *draw: int) -> TokenizedExample:
    """The example with new masked tokens, or with new image augmentations; unchanged if it has neither.

    Args:
        draw: seeds of the random numbers: run seed, epoch, row.
    """
    if example.masking is not None:
        return example.masking.apply(example, draw)
    if not any(isinstance(image, ImageInput) and image.changes for image in example.images):
        return example
    return replace(example, images=tuple(replace(image, draw=(*draw, view)) if isinstance(image, ImageInput) else image
                                         for view, image in enumerate(example.images)))


def apply_fixed(example: TokenizedExample) -> TokenizedExample:
    """The example with masked tokens that depend on its own tokens alone; unchanged if nothing is to be masked."""
    if example.masking is None:
        return example
    tokens = array("q", example.spans[0].ids).tobytes()
    seed = list(hashlib.blake2b(tokens, digest_size=16).digest())
    return example.masking.apply(example, seed)


def disable_augmentation(example: TokenizedExample) -> TokenizedExample:
    """The form of held-out rows: images without augmentation, and fixed masked tokens. Two views of one image keep
    their augmentations, because they would be equal without them."""
    example = apply_fixed(example)
    if len(example.images) != 1 or not isinstance(example.images[0], ImageInput):
        return example
    return replace(example, images=(replace(example.images[0], changes=()),))
