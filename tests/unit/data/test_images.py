"""Pictures come out of folders, IDX files and columns; views are drawn anew in every epoch; bad ones are refused."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from luthier.core.errors import DataError
from luthier.core.examples import Origin
from luthier.data import (
    DataConfig,
    ImageAugmentation,
    InMemoryBatchSource,
    RejectedRow,
    Row,
    build_batch,
    format_preview,
    read_datasets,
    read_examples,
)
from luthier.data.images import ImageInput

SHARED = Path(__file__).parents[4] / "shared" / "data"


def see(pixels: np.ndarray) -> torch.Tensor:
    """A base that takes gray pictures as they are."""
    assert (pixels.dtype, pixels.flags.writeable) == (np.uint8, True)
    gray = pixels if pixels.ndim == 2 else pixels.mean(2)
    return torch.from_numpy(np.ascontiguousarray(gray, dtype=np.float32))[None] / 255


def config(**options: object) -> DataConfig:
    return DataConfig.parse({"train": "x", **options})


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def idx(pixels: np.ndarray) -> bytes:
    return bytes((0, 0, 8, pixels.ndim)) + struct.pack(f">{pixels.ndim}I", *pixels.shape) + pixels.tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of two pictures, a broken one and a text file."""
    image = pytest.importorskip("PIL.Image")
    for number, (name, mode) in enumerate([("cat/1.png", "L"), ("cat/2.jpg", "RGB"), ("dog/1.png", "RGBA"), ("dog/2.png", "L")]):
        file = tmp_path / "pets" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
        image.fromarray(noise(number, 6, 5, *channels), mode).save(file)
    (tmp_path / "pets" / "dog" / "3.png").write_bytes(b"\x89PNG no picture")
    return tmp_path / "pets"


def test_a_folder_of_pictures_has_its_classes_from_its_subfolders(folder) -> None:
    found = read_datasets(config(train=str(folder)), see, seed=0)
    part = found.report.parts["train"]
    assert (found.labels, part.kept, part.reasons, part.labels) == (("cat", "dog"), 4, {"the image cannot be read": 1}, {"cat": 2, "dog": 2})
    assert part.refused[0]["file"].endswith("dog/3.png")
    one = build_batch(found.train)
    assert (one.inputs.images.shape, one.inputs.tokens.shape, one.target.labels.tolist()) == ((4, 1, 6, 5), (4,), [0.0, 0.0, 1.0, 1.0])
    torch.testing.assert_close(one.inputs.images[0, 0], torch.from_numpy(noise(0, 6, 5)).float() / 255)
    assert format_preview(found.train[1], None, found.labels).plain == "--- label cat\n[image, 6 x 5 x 3]"


def test_a_column_may_name_a_picture_file_or_hold_its_bytes(folder) -> None:
    rows = [{"image": "cat/1.png", "label": "a"}, {"image": {"bytes": (folder / "cat/1.png").read_bytes()}},
            {"image": "cat/9.png", "label": "a"}, {"image": [[1, 2], [3]]}, {"image": [[[1, 2, 3, 4]]]}]
    named, packed, missing, ragged, deep = read_examples([Row(row, Origin(str(folder / "rows.jsonl"), i)) for i, row in enumerate(rows)])
    np.testing.assert_array_equal(np.asarray(named.pixels), packed.pixels)
    assert (named.label, packed.label) == ("a", None)
    assert [one.reason for one in (missing, ragged, deep)] == ["the image cannot be read", "pixels are not an array of bytes",
                                                               "pixels are not [height, width] or [height, width, 3]"]


@pytest.fixture
def mnist(write) -> Callable[..., str]:
    def written(count: int = 6, labels: int = 6, name: str = "train", cut: int = 0) -> str:
        write(f"{name}-labels-idx1-ubyte.gz", gzip.compress(idx(np.arange(labels, dtype=np.uint8) % 3)))
        raw = idx(noise(0, count, 4, 4))
        return write(f"{name}-images-idx3-ubyte.gz", gzip.compress(raw[:len(raw) - cut]))
    return written


def test_an_idx_file_finds_its_labels_beside_it(mnist) -> None:
    path = mnist()
    mnist(3, 3, "t10k")
    for given in (path, str(Path(path).parent)):
        found = read_datasets(config(train=given), see, seed=0)
        assert (found.labels, [one.labeled_spans[0].label for one in found.train]) == (("0", "1", "2"), [0.0, 1.0, 2.0] * 2)
        assert str(found.train[4].origin) == f"{path}:5"
    assert len(read_datasets(config(train={"path": str(Path(path).parent), "split": "test"}), see, seed=0).train) == 3
    with pytest.raises(DataError, match="has no split 'unseen'"):
        read_datasets(config(train={"path": str(Path(path).parent), "split": "unseen"}), see, seed=0)


def test_damaged_idx_files_are_named(mnist, write) -> None:
    with pytest.raises(DataError, match=r"has 6 images, and train-labels-idx1-ubyte\.gz has 5 labels"):
        read_datasets(config(train=mnist(labels=5)), see, seed=0)
    with pytest.raises(DataError, match="should have 6 x 4 x 4 bytes by its header, and has 95"):
        read_datasets(config(train=mnist(cut=1)), see, seed=0)
    with pytest.raises(DataError, match="not an IDX file"):
        read_datasets(config(train=write("a-images-idx3-ubyte", b"words")), see, seed=0)


def test_pictures_without_a_label_become_two_views_drawn_anew_in_every_epoch(mnist) -> None:
    found = read_datasets(config(train=mnist(), columns={"label": "none"}), see, seed=0)
    assert found.labels == ()
    assert [[i.label for i in one.labeled_spans] for one in found.train] == [[0.0, 1.0]] * 6

    def epochs(seed: int, count: int = 2) -> list[torch.Tensor]:
        loader = InMemoryBatchSource(found.train, 6, None, shuffle=False, seed=seed)
        return [next(loader)[0].inputs.images for _ in range(count)]

    first, second = epochs(0)
    assert first.shape == (12, 1, 4, 4)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, second)
    assert torch.equal(epochs(0)[1], second)
    assert not torch.equal(epochs(1)[0], first)
    resumed = InMemoryBatchSource(found.train, 6, None, shuffle=False, seed=0)
    resumed.load(resumed.state() | {"row": 6})
    assert torch.equal(next(resumed)[0].inputs.images, second)


def test_changes_of_labelled_pictures_are_for_training_alone(mnist) -> None:
    path = mnist()
    found = read_datasets(config(train=path, test=path, augment=[{"name": "flip", "probability": 1}]), see, seed=0)
    plain = read_datasets(config(train=path), see, seed=0)
    assert torch.equal(build_batch(found.train).inputs.images, build_batch(plain.train).inputs.images.flip(3))
    assert torch.equal(build_batch(found.test).inputs.images, build_batch(plain.train).inputs.images)


def test_crops_keep_the_size_and_noise_its_strength() -> None:
    chance = np.random.default_rng(0)
    ramp = np.tile(np.arange(64, dtype=np.uint8), (64, 1))
    crop = ImageAugmentation(name="crop", probability=1.0, amount=0.25).apply(ramp, chance)
    assert (crop.shape, crop.dtype) == ((64, 64), np.uint8)
    assert (crop[:1] == crop).all()
    assert 31 <= crop.max() - crop.min() < 63  # between a quarter of the area and all of it
    flat = np.full((200, 200, 3), 128, np.uint8)
    noisy = ImageAugmentation(name="noise", probability=1.0, amount=0.05).apply(flat, chance)
    assert abs(noisy.std() - 0.05 * 255) < 0.2
    seldom = ImageAugmentation(name="flip", probability=0.25)
    assert 200 < sum((seldom.apply(ramp, chance) != ramp).any() for _ in range(1000)) < 300


def test_the_cursor_knows_pictures_apart() -> None:
    pictures = [ImageInput(noise(seed, 3, 3), see) for seed in (0, 0, 1)]
    assert pictures[0].digest == pictures[1].digest != pictures[2].digest


def test_real_pictures_are_read_whole() -> None:
    file = SHARED / "fashion_mnist" / "t10k-images-idx3-ubyte.gz"
    if not file.is_file():
        pytest.skip("the shared data is not here")
    found = read_datasets(config(train=str(file), max_samples=500), see, seed=0)
    assert (len(found.train), len(found.labels)) == (500, 10)
    assert build_batch(found.train[:8]).inputs.images.shape == (8, 1, 28, 28)


def test_a_picture_with_two_labels_is_refused() -> None:
    (found,) = read_examples([Row({"pixels": noise(0, 2, 2), "label": ["a", "b"]}, Origin("f", 1))])
    assert isinstance(found, RejectedRow)
    assert found.reason == "an image has several labels"
