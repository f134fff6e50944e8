"""Whoever names a folder trains on the rows of its train split alone, and what is not clear is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from luthier.core.errors import DataError, RecipeError
from luthier.data.config import DataConfig, Source
from luthier.data.load import read_datasets
from luthier.data.rows import Row
from luthier.data.sources import read_source
from luthier.data.splits import choose_files

Write = Callable[[str, str | bytes], str]


def make(folder: Path, names: list[str], readme: str = "") -> Path:
    """A folder whose files each hold one row: their own name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"text": name}) + "\n")
    if readme:
        (folder / "README.md").write_text(f"---\n{readme}\n---\n# A data set\n")
    return folder


def texts(folder: Path, **options: str) -> list[str]:
    return [row.values["text"] for _, rows in read_source(str(folder), **options) for row in rows if isinstance(row, Row)]


HUB = ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl"]
SFT = ["data/train_sft-00000-of-00001.jsonl", "data/test_sft-00000-of-00001.jsonl", "data/train_gen-00000-of-00001.jsonl"]
CONFIGS = """configs:
- config_name: main
  default: true
  data_files:
  - {split: train, path: main/a*}
  - {split: test, path: [main/b.jsonl]}
- config_name: socratic
  data_files: {train: "soc/*.jsonl"}
- {config_name: plain, data_files: main/a.jsonl}
- {config_name: below, data_dir: deep}
"""
MADE = ["main/a.jsonl", "main/a2.jsonl", "main/b.jsonl", "soc/c.jsonl", "deep/train.jsonl", "deep/dev.jsonl"]
# files, what is asked for, what is read
CLEAR: dict[str, tuple[list[str], dict[str, str], list[str]]] = {
    "shards": (HUB, {}, HUB[:2]),
    "shards, test": (HUB, {"split": "test"}, HUB[2:]),
    "shards, for the test": (HUB, {"part": "test"}, HUB[2:]),
    "a split with a name of its own": (SFT, {"split": "train_sft"}, SFT[:1]),
    "an unknown split beside known ones": ([*HUB, "data/unsupervised-00000-of-00001.jsonl"], {}, HUB[:2]),
    "folders": (["train/a.jsonl", "test/b.jsonl", "val/c.jsonl"], {}, ["train/a.jsonl"]),
    "folders, for the evaluation": (["train/a.jsonl", "test/b.jsonl", "val/c.jsonl"], {"part": "eval"}, ["val/c.jsonl"]),
    "a folder in a split": (["train/deep/a.jsonl", "train/b.jsonl", "test/deep/c.jsonl"], {}, ["train/b.jsonl", "train/deep/a.jsonl"]),
    "names": (["sst2_train.jsonl", "sst2_dev.jsonl"], {}, ["sst2_train.jsonl"]),
    "names, by another word": (["sst2_train.jsonl", "sst2_dev.jsonl"], {"split": "validation"}, ["sst2_dev.jsonl"]),
    "a held-out file in a train folder": (["train/train.jsonl", "train/test.jsonl"], {}, ["train/train.jsonl"]),
    "no name says anything": (["b.jsonl", "a.jsonl", "deep/c.jsonl", "latest.jsonl"], {}, ["a.jsonl", "b.jsonl", "deep/c.jsonl", "latest.jsonl"]),
    "no name says anything, for the test": (["a.jsonl", "b.jsonl"], {"part": "test"}, ["a.jsonl", "b.jsonl"]),
    "nothing is held out": (["train.jsonl", "more.jsonl"], {}, ["more.jsonl", "train.jsonl"]),
    "a subset": (["en/train.jsonl", "en/test.jsonl", "de/train.jsonl"], {"subset": "en"}, ["en/train.jsonl"]),
    "all": ([*HUB, "more.jsonl"], {"split": "all"}, [*sorted(HUB), "more.jsonl"]),
    "the default config": (MADE, {"readme": CONFIGS}, MADE[:2]),
    "the default config's test": (MADE, {"readme": CONFIGS, "split": "test"}, ["main/b.jsonl"]),
    "a named config": (MADE, {"readme": CONFIGS, "subset": "socratic"}, ["soc/c.jsonl"]),
    "a config of one file": (MADE, {"readme": CONFIGS, "subset": "plain"}, ["main/a.jsonl"]),
    "files at any depth": (MADE, {"readme": "configs: [{data_files: 'main/**'}]"}, MADE[:3]),
    "files from here": (MADE, {"readme": "configs: [{data_files: {train: ./main/a.jsonl, test: ./soc/*}}]\r\nlicense: mit\r"}, MADE[:1]),
    "a config of a folder": (MADE, {"readme": CONFIGS, "subset": "below", "part": "eval"}, ["deep/dev.jsonl"]),
}
UNCLEAR: dict[str, tuple[list[str], dict[str, str], str]] = {
    "no such split": (HUB, {"split": "validation"}, r"no split 'validation'\n.*it has: test, train"),
    "no train split": (["test.jsonl"], {}, r"no split 'train', which data.train reads\n.*it has: test"),
    "several train splits": (SFT, {}, r"no split 'train'.*\n.*train_sft"),
    "a name that says nothing": ([*HUB, "more.jsonl"], {}, r"the splits test, train, and more.jsonl, whose name contains no split"),
    "a name that says two things": (["train_test.jsonl"], {}, r"no split 'train'.*\n.*it has: train_test"),
    "several subsets": (["en/train.jsonl", "de/train.jsonl"], {}, r"several subsets, which are not mixed\n.*it has: de, en"),
    "no such subset": (["en/train.jsonl", "de/train.jsonl"], {"subset": "fr"}, r"no subset 'fr'\n.*it has: de, en"),
    "a subset of none": (["a.jsonl"], {"subset": "en"}, r"no subset 'en': it has no subsets"),
    "a split of none": (["a.jsonl"], {"split": "test"}, r"no split 'test'"),
    "no such config": (MADE, {"readme": CONFIGS, "subset": "fr"}, r"no subset 'fr'\n.*it has: main, socratic, plain, below"),
    "no default config": (MADE, {"readme": CONFIGS.replace("  default: true\n", "")}, r"several subsets"),
    "no such split of a config": (MADE, {"readme": CONFIGS, "split": "dev"}, r"no split 'dev'\n.*it has: train, test"),
    "a config without files": (MADE, {"readme": "configs: [{config_name: x, data_files: y/*}]"}, r"'y/\*' of the split 'train' matches no data file"),
    "files elsewhere": (MADE, {"readme": "configs: [{data_files: https://x.org/a.jsonl}]"}, r"matches no data file"),
    "files above": (MADE, {"readme": "configs: [{data_files: ../a.jsonl}]"}, r"matches no data file"),
    "a file in two splits": (MADE, {"readme": "configs: [{data_files: {train: main/*, test: main/b.jsonl}}]"}, r"b.jsonl belongs to the splits 'train' and 'test'"),
    "a broken head": (MADE, {"readme": "configs: ["}, r"YAML header cannot be read"),
    "an odd head": (MADE, {"readme": "configs: main"}, r"configs is not a list of mappings"),
    "an odd path": (MADE, {"readme": "configs: [{data_files: {train: 3}}]"}, r"data_files has no path"),
}


@pytest.mark.parametrize("name", CLEAR)
def test_a_split_and_a_subset_of_a_folder_are_what_was_asked_for(name: str, tmp_path: Path) -> None:
    files, asked, wanted = CLEAR[name]
    options = {key: value for key, value in asked.items() if key != "readme"}
    folder = make(tmp_path, files, asked.get("readme", ""))
    expected = list(options.items())  # the table, for the message of a failure
    assert texts(folder, **options) == sorted(wanted), expected


@pytest.mark.parametrize("name", UNCLEAR)
def test_what_is_not_clear_is_one_error_that_names_what_is_there(name: str, tmp_path: Path) -> None:
    files, asked, words = UNCLEAR[name]
    with pytest.raises(DataError, match=words):
        texts(make(tmp_path, files, asked.get("readme", "")), **{key: value for key, value in asked.items() if key != "readme"})


PARTS = st.sampled_from(["train", "test", "val", "dev", "eval", "validation", "training", "data", "en", "part", "a1", "x"])
NAMES = st.lists(PARTS, min_size=1, max_size=3).flatmap(
    lambda parts: st.sampled_from(["/".join(parts) + ".jsonl", "_".join(parts) + ".csv", "-".join(parts) + "-00000-of-00001.parquet"]))
HELD = {"test", "val", "dev", "eval", "validation"}


Choose = Callable[[Path, list[Path], str], list[Path]]


def by_names(folder: Path, files: list[Path], part: str) -> list[Path]:
    return choose_files(folder, files, None, None, part)


def breaches(folder: Path, names: list[str], choose: Choose) -> list[str]:
    """Files that are trained though their name says that they are held out, or that two parts of a recipe read."""
    def chosen(part: str) -> set[str]:
        try:
            return {str(file.relative_to(folder)) for file in choose(folder, [folder / name for name in sorted(names)], part)}
        except DataError:
            return set()

    def words(name: str) -> set[str]:
        return set(name.split(".")[0].replace("_", "/").replace("-", "/").split("/"))

    trained = chosen("train")
    said = any(words(name) & (HELD | {"train", "training"}) for name in names)
    both = trained & (chosen("test") | chosen("eval")) if said else set()
    return sorted({name for name in trained if words(name) & HELD} | both)


@given(st.lists(NAMES, min_size=1, max_size=6, unique=True))
@settings(max_examples=400, deadline=None)
def test_nothing_that_is_called_held_out_is_ever_trained(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    assert breaches(tmp_path_factory.getbasetemp(), names, by_names) == []


@pytest.mark.parametrize("broken", [lambda folder, files, part: files,
                                    lambda folder, files, part: [file for file in files if file.parent.name != "test"]])
def test_the_property_notices_a_reader_that_takes_held_out_files(broken: Choose, tmp_path: Path) -> None:
    assert breaches(tmp_path, ["test/a.jsonl", "train/a.jsonl", "my_dev.csv"], broken)


# ---------------------------------------------------------------- the other places that rows come from


def test_of_one_file_no_split_is_read(write: Write) -> None:
    path = write("a.jsonl", '{"text": "one"}\n')
    assert texts(Path(path), split="train") == texts(Path(path), part="test") == ["one"]
    with pytest.raises(DataError, match="one file, which has no split 'test'"):
        texts(Path(path), split="test")
    with pytest.raises(DataError, match="no subset 'en'"):
        texts(Path(path), subset="en")


def test_what_datasets_saved_is_read_by_the_part(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    splits = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("train", "validation", "test")}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    assert [texts(tmp_path / "saved", part=part) for part in ("train", "eval", "test")] == [["train"], ["validation"], ["test"]]
    assert texts(tmp_path / "saved", split="dev") == ["validation"]
    datasets.load_from_disk(str(tmp_path / "saved"))["test"].save_to_disk(str(tmp_path / "one"))
    assert texts(tmp_path / "one") == ["test"]
    with pytest.raises(DataError, match="one saved split"):
        texts(tmp_path / "one", split="validation")


def picture(file: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    file.parent.mkdir(parents=True, exist_ok=True)
    image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(file)


PICTURES: dict[str, tuple[list[str], dict[str, str], list[tuple[str, str | None]] | str]] = {
    "splits": (["train/cat/a.png", "train/dog/b.png", "test/cat/c.png"], {}, [("a.png", "cat"), ("b.png", "dog")]),
    "their test": (["train/cat/a.png", "train/dog/b.png", "test/cat/c.png"], {"part": "test"}, [("c.png", "cat")]),
    "train alone": (["train/cat/a.png"], {}, [("a.png", "cat")]),
    "classes": (["train/a.png", "car/b.png"], {}, [("b.png", "car"), ("a.png", "train")]),
    "no classes": (["a.png"], {}, [("a.png", None)]),
    "unclear": (["test/a.png", "car/b.png"], {}, r"the splits test, and car/b.png"),
    "classes, as they say": (["test/a.png", "car/b.png"], {"split": "all"}, [("b.png", "car"), ("a.png", "test")]),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_folder_of_pictures_has_splits_or_classes(name: str, tmp_path: Path) -> None:
    files, options, wanted = PICTURES[name]
    for file in files:
        picture(tmp_path / file)

    def found() -> list[tuple[str, str | None]]:
        return [(Path(row.origin.file).name, row.values.get("label")) for _, rows in read_source(str(tmp_path), **options)
                for row in rows if isinstance(row, Row)]
    if isinstance(wanted, str):
        with pytest.raises(DataError, match=wanted):
            found()
    else:
        assert found() == wanted


# ---------------------------------------------------------------- columns and format of each source


def config(train: object, **more: object) -> DataConfig:
    return DataConfig.parse({"train": train, **more})


@pytest.mark.parametrize("streaming", [False, True])
def test_each_source_of_a_mixture_has_its_own_columns(write: Write, letters: PreTrainedTokenizerFast, streaming: bool) -> None:
    from luthier.data.streaming import StreamingBatchSource

    one = write("one.jsonl", '{"question": "q", "answer": "a"}\n')
    two = write("two.tsv", "why\tbecause\n")
    three = write("three.jsonl", '{"ask": "w", "say": "y"}\n')
    made = config([{"path": one, "columns": {"prompt": "question", "completion": "answer"}},
                   {"path": two, "columns": {"prompt": 0, "completion": 1}, "format": "completion"}, three],
                  columns={"prompt": "ask", "completion": "say"}, shuffle=False)
    if streaming:
        (batch,) = next(StreamingBatchSource(made, letters, 3, None))
        found = letters.decode(batch.inputs.tokens.flatten().tolist())
    else:
        found = "".join(letters.decode(span.ids) for row in read_datasets(made, letters, seed=0).train for span in row.spans)
    assert "<|im_start|>user\nq<|im_end|>" in found
    assert "<|im_start|>user\nw<|im_end|>" in found
    assert "whybecause" in found, "its own format joins it bare"


def test_a_source_without_columns_has_those_of_all(write: Write, letters: PreTrainedTokenizerFast) -> None:
    path = write("a.jsonl", '{"ask": "w", "say": "y"}\n')
    columns: Mapping[str, str] = {"prompt": "ask", "completion": "say"}
    assert len(read_datasets(config(path, columns=columns), letters, seed=0).train) == 1
    with pytest.raises(DataError, match="match no known format"):
        read_datasets(config({"path": path, "columns": {}}, columns=columns), letters, seed=0)
    for faulty, words in (({"promt": "x"}, "did you mean 'prompt'"), ({"prompt": 0, "completion": "x"}, "or numbers for all")):
        with pytest.raises(RecipeError, match=words):
            config({"path": path, "columns": faulty})


def test_the_eval_and_the_test_of_a_folder_are_its_own_splits(tmp_path: Path, letters: PreTrainedTokenizerFast) -> None:
    folder = str(make(tmp_path, ["train.jsonl", "dev.jsonl", "test.jsonl"]))
    found = read_datasets(config(folder, eval=folder, test=folder), letters, seed=0)
    assert [letters.decode(part[0].spans[0].ids[:4]) for part in (found.train, found.eval, found.test)] == ["trai", "dev.", "test"]
    assert Source.parse({"path": folder}).split is None
