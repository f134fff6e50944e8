"""Converts images to a vision model's inputs: resizing, rescaling, normalization. The counterpart of a tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.core.errors import BaseError

CONFIG_FILE = "preprocessor_config.json"
FILTERS = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}  # by Pillow's numbers
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601: luminance weights of red, green and blue


@dataclass(frozen=True)
class ImageProcessor:
    """pixels -> (resized * rescale_factor - mean) / std, by the base's own settings.

    Args:
        channels: of the model; gray images are repeated, color images converted to gray.
        size: (height, width) of the model's input.
        resize_size: (height, width) before the center crop to `size`; (edge,) is the length of the shorter side.
        mean, std: one value for each channel.
        rescale_factor: factor on the bytes.
        interpolation: mode of `torch.nn.functional.interpolate`.
        source: the settings file as read, to be saved with a trained model.
    """

    channels: int
    size: tuple[int, int]
    resize_size: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale_factor: float
    interpolation: str
    source: str = field(compare=False)

    @classmethod
    def from_pretrained(cls, path: Path) -> ImageProcessor:
        """From a Transformers folder; without a `preprocessor_config.json`, ViT's default settings."""
        model = json.loads((path / "config.json").read_text(encoding="utf-8"))
        source = (path / CONFIG_FILE).read_text(encoding="utf-8") if (path / CONFIG_FILE).is_file() else "{}"
        try:
            settings: dict[str, Any] = json.loads(source)
        except ValueError as error:
            raise BaseError(f"{path / CONFIG_FILE} is not valid JSON ({error})",
                            "copy or download the file again") from error
        # Transformers omits default values from config.json.
        channels, side = model.get("num_channels", 3), _parse_size(model.get("image_size", 224))
        resized = _parse_resize(settings.get("size") or side)
        size = _parse_resize(settings.get("crop_size") or side) if settings.get("do_center_crop") else resized
        if len(size) != 2 or size != side:
            raise BaseError(f"{path / CONFIG_FILE}: images of {size}, but the model takes {side}",
                            "give both files of one model: size (or crop_size) is config.json's image_size")
        number = settings.get("resample", 2)
        if number not in FILTERS or not settings.get("do_resize", True):
            raise BaseError(f"{path / CONFIG_FILE}: resample {number}, do_resize {settings.get('do_resize', True)}; "
                            f"supported is resizing by {FILTERS}", "set one of them")
        plain = not settings.get("do_normalize", True)
        mean, std = (_expand_channels([other] if plain else settings.get(name, [0.5]), channels, path)
                     for name, other in (("image_mean", 0.0), ("image_std", 1.0)))
        scale = settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1.0
        return cls(channels, (size[0], size[1]), resized, mean, std, scale, FILTERS[number], source)

    def __call__(self, pixels: Any) -> Tensor:
        """Convert an image of bytes, [H, W] or [H, W, 3], to [channels, height, width] float32."""
        image = torch.as_tensor(pixels)
        assert image.dtype == torch.uint8, image.dtype
        assert image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3)), tuple(image.shape)
        planes = (image[None] if image.ndim == 2 else image.permute(2, 0, 1)).float()  # [1 or 3, H, W]
        if self.channels == 1 and planes.shape[0] == 3:
            planes = torch.einsum("chw,c->hw", planes, torch.tensor(LUMA))[None].round()
        elif planes.shape[0] == 1:
            planes = planes.expand(self.channels, -1, -1)
        planes = self._resize(planes)
        mean, std = (torch.tensor(x)[:, None, None] for x in (self.mean, self.std))
        return (planes * self.rescale_factor - mean) / std

    def _resize(self, planes: Tensor) -> Tensor:
        height, width = planes.shape[1:]
        if len(self.resize_size) == 1:
            (edge,) = self.resize_size
            shorter = min(height, width)
            wanted = (edge * height // shorter, edge * width // shorter)
        else:
            wanted = (self.resize_size[0], self.resize_size[1])
        smooth = self.interpolation in ("bilinear", "bicubic")
        for size in ((height, wanted[1]), wanted):  # width first, rounded to bytes after each, like Pillow
            if size != planes.shape[1:]:
                planes = F.interpolate(planes[None], size, mode=self.interpolation,
                                       antialias=smooth)[0].round().clamp(0, 255)
        top, left = ((have - want) // 2 for have, want in zip(wanted, self.size, strict=True))
        return planes[:, top:top + self.size[0], left:left + self.size[1]]

    def save_pretrained(self, path: Path) -> None:
        """Write the settings file as read, with the default settings if it does not name an image processor class of
        Transformers."""
        settings: dict[str, Any] = json.loads(self.source)
        if "image_processor_type" not in settings:
            settings = {"do_resize": True, "size": dict(zip(("height", "width"), self.size, strict=True)),
                        "resample": 2, "do_rescale": True, "rescale_factor": self.rescale_factor, "do_normalize": True,
                        "image_mean": list(self.mean), "image_std": list(self.std),
                        "image_processor_type": "ViTImageProcessor", **settings}
        text = self.source if settings == json.loads(self.source) else json.dumps(settings, indent=2) + "\n"
        (Path(path) / CONFIG_FILE).write_text(text, encoding="utf-8")


def _parse_size(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _parse_resize(size: Any) -> tuple[int, ...]:
    """(height, width), or (shorter edge,), from the formats used in such files."""
    if isinstance(size, dict):
        return (size["shortest_edge"],) if "shortest_edge" in size else (size["height"], size["width"])
    return _parse_size(size)


def _expand_channels(values: list[float], channels: int, path: Path) -> tuple[float, ...]:
    if len(values) not in (1, channels):
        raise BaseError(f"{path / CONFIG_FILE}: {len(values)} numbers for {channels} channels",
                        "give one for each channel")
    return tuple(float(v) for v in (values * channels if len(values) == 1 else values))
