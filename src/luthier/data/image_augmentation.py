"""Changes to the pixels of an image: crops and noise. Read `augmentation.py` first."""

from __future__ import annotations

import numpy as np
import torch

from luthier.data.images import Pixels


def crop_image(pixels: Pixels, smallest: float, rng: np.random.Generator) -> Pixels:
    """A random region with the image's aspect ratio and at least `smallest` of its area, resized to the image's
    size."""
    height, width = pixels.shape[:2]
    side = float(np.sqrt(rng.uniform(smallest, 1.0)))
    rows, columns = max(1, round(side * height)), max(1, round(side * width))
    top, left = int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1))
    part = pixels[top:top + rows, left:left + columns].astype(np.float32)
    planes = torch.from_numpy(part.reshape(rows, columns, -1)).permute(2, 0, 1)[None]
    grown = torch.nn.functional.interpolate(planes, (height, width), mode="bilinear", align_corners=False)[0]
    return grown.permute(1, 2, 0).reshape(pixels.shape).round().to(torch.uint8).numpy()


def add_noise(pixels: Pixels, amount: float, rng: np.random.Generator) -> Pixels:
    return (pixels + rng.normal(0.0, 255 * amount, pixels.shape)).round().clip(0, 255).astype(np.uint8)
