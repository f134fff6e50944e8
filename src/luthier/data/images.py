"""Images from folders and IDX files, decoded when they are packed into a batch. Read `rows.py` first.

Subfolders are classes. IDX is the format of MNIST; the file of labels is in the same folder. Pixels are bytes,
[height, width] or [height, width, 3].
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from luthier.core.errors import DataError, MissingExtra
from luthier.core.examples import Origin
from luthier.data.row_values import InvalidRowError
from luthier.data.rows import RejectedRow, Row, Rows, open_file

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
IDX = re.compile(r"images[-.]idx3-ubyte(\.gz)?$")
LIMIT = 64_000_000  # maximum pixels of one image; more is a decompression bomb, or a scan that should be split


# ---------------------------------------------------------------- one file


def open_image(file: Path | io.BytesIO) -> Pixels:
    """Reads an image file as [height, width, 3], or [height, width] if it is gray. Raises `InvalidRowError`."""
    if importlib.util.find_spec("PIL") is None:
        raise MissingExtra("pillow", "vision", "reading images")
    from PIL import Image

    try:
        with Image.open(file) as image:
            if image.width * image.height > LIMIT:
                raise InvalidRowError("the image is too large", f"{image.width} x {image.height} pixels")
            gray = image.mode in ("1", "L")
            return np.asarray(image.convert("L" if gray else "RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as fault:
        if isinstance(fault, InvalidRowError):
            raise
        raise InvalidRowError("the image cannot be read", str(fault)) from fault


@dataclass(frozen=True)
class ImageFile:
    """An image file, decoded at every access."""

    path: Path

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Pixels:
        return open_image(self.path)

    def checked(self) -> ImageFile:
        """Decodes the file once, and returns it. Raises `InvalidRowError`."""
        open_image(self.path)
        return self


def list_images(folder: Path) -> list[Path]:
    """The image files of a folder, at any depth."""
    return [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in SUFFIXES and file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(folder).parts)]


def read_image_rows(files: Sequence[tuple[Path, Path]]) -> Rows:
    """A row for each image, given with the folder of its split. Its label is the name of the subfolder, or none if it
    is in that folder itself."""
    for folder, file in files:
        inside = file.relative_to(folder).parts
        yield Row({"pixels": ImageFile(file), **({"label": inside[0]} if len(inside) > 1 else {})},
                  Origin(str(file), 1))


# ---------------------------------------------------------------- IDX


def read_idx(file: Path) -> Iterator[Row | RejectedRow]:
    """Every image of an IDX file, with its label if the file of labels exists."""
    pixels = _read_idx_array(file, 3)
    beside = file.with_name(file.name.replace("images", "labels").replace("idx3", "idx1"))
    labels = _read_idx_array(beside, 1) if beside.exists() else None
    if labels is not None and len(labels) != len(pixels):
        raise DataError(f"{file} has {len(pixels)} images, and {beside.name} has {len(labels)} labels",
                        "download both files again")
    for number, image in enumerate(pixels):
        yield Row({"pixels": image, **({} if labels is None else {"label": int(labels[number])})},
                  Origin(str(file), number + 1))


def _read_idx_array(file: Path, dimensions: int) -> Pixels:
    with open_file(file) as stream:
        raw = stream.read()
    head = 4 + 4 * dimensions
    if len(raw) < head or raw[:4] != bytes((0, 0, 8, dimensions)):
        raise DataError(f"{file} is not an IDX file of bytes with {dimensions} dimensions", "download it again")
    shape = struct.unpack(f">{dimensions}I", raw[4:head])
    if len(raw) - head != int(np.prod(shape, dtype=np.int64)):
        raise DataError(f"{file} should have {' x '.join(map(str, shape))} bytes by its header, and has "
                        f"{len(raw) - head}",
                        "it is damaged: download it again")
    return np.frombuffer(raw, np.uint8, offset=head).reshape(shape)


# ---------------------------------------------------------------- images of tokenized examples


class ImageChange(Protocol):
    """A change to an image: `augmentation.ImageAugmentation`."""

    def apply(self, pixels: Pixels, rng: np.random.Generator) -> Pixels: ...


@dataclass(frozen=True)
class ImageInput:
    """An image of a tokenized example: pixels, their augmentations, and the processor that makes a tensor of them.

    Args:
        see: the model's image processor: pixels to a float tensor [channels, height, width].
        draw: seeds of the augmentations: run seed, epoch, row and view.
        other: an image that is mixed in with weight 1 - `share` (mixup); mixing the tensors equals mixing the pixels.
    """

    pixels: Any
    see: Callable[[Pixels], Tensor]
    changes: tuple[ImageChange, ...] = ()
    draw: tuple[int, ...] = (0,)
    other: ImageInput | None = None
    share: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """[height, width] or [height, width, 3]"""
        return np.shape(self.pixels)

    def tensor(self) -> Tensor:
        if self.other is None:
            return self._seen()
        return self.share * self._seen() + (1 - self.share) * replace(self.other, draw=(*self.draw, 1)).tensor()

    def _seen(self) -> Tensor:
        pixels = np.asarray(self.pixels)
        rng = np.random.default_rng(self.draw)
        for change in self.changes:
            pixels = change.apply(pixels, rng)
        return torch.as_tensor(self.see(np.array(pixels)))  # a copy: changes are views, and an IDX file is read-only

    @cached_property
    def digest(self) -> bytes:
        """Hash of the pixels (for a file, of its name and size) and the augmentations."""
        found = hashlib.blake2b(repr(self.changes).encode(), digest_size=16)
        if isinstance(self.pixels, ImageFile):
            found.update(f"{self.pixels.path} {self.pixels.path.stat().st_size}".encode())
        else:
            found.update(np.ascontiguousarray(self.pixels).tobytes())
        if self.other is not None:
            found.update(self.other.digest + repr(self.share).encode())
        return found.digest()
