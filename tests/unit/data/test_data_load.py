"""From a recipe's `data:` to data sets and the report: nothing is lost without a word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from luthier.core.errors import DataError, RecipeError
from luthier.core.examples import Origin
from luthier.core.types import TokenizedExample, TokenSpan
from luthier.data import DataConfig, InMemoryBatchSource, format_preview, read_datasets
from luthier.data.formats.registry import COLUMNS, FORMATS
from luthier.reporting.plots import plot_lengths

SHARED = Path(__file__).parents[4] / "shared" / "data"


def config(**options: object) -> DataConfig:
    return DataConfig.parse(options)


def rows(*texts: str) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def test_every_row_is_kept_truncated_or_refused(write, letters) -> None:
    path = write("a.jsonl", rows("one", "two two two two", "one") + "{broken\n" + rows("") + '{"text": 3}\n')
    found = read_datasets(config(train=path, max_length=8), letters, seed=0)
    part = found.report.parts["train"]
    assert (part.read, part.kept, part.truncated, part.encoded) == (6, 3, 1, 3)
    assert part.reasons == {"broken JSON": 1, "empty text": 1, "text is not text": 1}
    assert [(r["line"], r["reason"]) for r in part.refused] == [("4", "broken JSON"), ("5", "empty text"), ("6", "text is not text")]
    assert (part.duplicates, part.duplicate_pairs) == (1, ((f"{path}:1", f"{path}:3"),))
    assert (part.tokens, part.trained) == (4 + 8 + 4, 3 + 7 + 3)
    assert (part.lengths["min"], part.lengths["max"], sum(part.histogram["counts"])) == (4, 8, 3)
    assert json.loads(json.dumps(found.report.to_json()))["parts"]["train"]["kept"] == 3
    assert any("1 rejected: broken JSON" in line for line in found.report.lines())


def test_refusals_are_all_counted_and_the_first_thousand_named(write, letters) -> None:
    found = read_datasets(config(train=write("a.jsonl", rows("one") + "{broken\n" * 1500)), letters, seed=0)
    part = found.report.parts["train"]
    assert (len(part.refused), part.reasons["broken JSON"], part.read) == (1000, 1500, 1501)


def test_a_fraction_is_held_out_by_the_seed(write, letters) -> None:
    path = write("a.jsonl", rows(*(f"text {i}" for i in range(40))))
    first, again, other = (read_datasets(config(train=path, eval=0.25), letters, seed=seed) for seed in (1, 1, 2))
    assert (len(first.train), len(first.eval), len(first.eval_examples)) == (30, 10, 10)
    assert {e.origin.line for e in first.train} | {e.origin.line for e in first.eval} == set(range(1, 41))
    assert first.eval == again.eval != other.eval
    assert (first.report.parts["train"].read, first.report.parts["eval"].read) == (30, 10)


def test_eval_and_test_files_and_their_overlap_with_train(write, letters) -> None:
    ask = [{"prompt": p, "completion": c} for p, c in (("What is it?", "a"), ("Who?", "b"))]
    train = write("train.json", json.dumps(ask))
    near = write("eval.json", json.dumps([{"prompt": "what  is IT", "completion": "other"}, {"prompt": "When?", "completion": "c"}]))
    found = read_datasets(config(train=train, eval=near, test=train), letters, seed=0)
    assert (found.report.overlaps["eval"].count, found.report.overlaps["test"].count) == (1, 2)
    assert found.report.overlaps["eval"].pairs == ((f"{train}:1", f"{near}:1"),)
    assert (len(found.train), len(found.eval), len(found.test), len(found.test_examples)) == (2, 2, 2, 2)


def test_a_system_prompt_does_not_hide_an_overlap(write, letters) -> None:
    plain, led = {"instruction": "Who?", "output": "a"}, {"instruction": "who", "output": "b", "system": "Be brief."}
    paths = [write(f"{i}.json", json.dumps([row])) for i, row in enumerate((plain, led))]
    assert read_datasets(config(train=paths[0], eval=paths[1]), letters, seed=0).report.overlaps["eval"].count == 1


def test_several_sources_keep_their_weights(write, letters) -> None:
    first, second = write("a.txt", "one\ntwo\nthree\n"), write("b.txt", "four\nfive\n")
    found = read_datasets(config(train=[first, {"path": second, "weight": 2}], eval=0.34), letters, seed=0)
    assert found.mix == ((2, 1.0), (1, 2.0))
    assert InMemoryBatchSource(found.train, 1, None, mix=found.mix).steps_per_epoch == 4


def test_limit_and_progress(write, letters) -> None:
    told = []
    path = write("a.txt", "word\n" * 1000)
    found = read_datasets(config(train=path, max_samples=450), letters, seed=0, progress=lambda part, count: told.append((part, count)))
    assert len(found.train) == 450
    assert told == [("train", 200), ("train", 400)]


def test_a_limit_does_not_hide_columns_that_fit_nothing(write, letters) -> None:
    path = write("a.jsonl", '{"x": 1}\n' * 5)
    with pytest.raises(DataError, match="match no known format"):
        read_datasets(config(train=path, max_samples=3), letters, seed=0)
    both = [write(name, rows("one", "two")) for name in ("f/a.jsonl", "f/b.jsonl")]
    found = read_datasets(config(train=str(Path(both[0]).parent), max_samples=3), letters, seed=0)
    assert [str(one.origin) for one in found.train] == [f"{both[0]}:1", f"{both[0]}:2", f"{both[1]}:1"]


def test_nothing_usable_is_one_error_with_the_first_reasons(write, letters) -> None:
    with pytest.raises(DataError, match=r"none of the 2 train rows.*\n.*:1: no text"):
        read_datasets(config(train=write("a.jsonl", '{"a": 1}\n{"a": 2}\n'), format="text"), letters, seed=0)
    good = write("b.txt", "one\n")
    with pytest.raises(DataError, match="none of the 1 eval rows"):
        read_datasets(config(train=good, eval=write("c.jsonl", "{broken\n")), letters, seed=0)


def test_streaming_reads_no_train_rows_and_holds_nothing_out(write, letters) -> None:
    path = write("a.txt", "one\ntwo\n")
    found = read_datasets(config(train=path, eval=path, streaming=True), letters, seed=0)
    assert (len(found.train), len(found.eval)) == (0, 2)
    with pytest.raises(DataError, match=r"omit data\.streaming"):
        read_datasets(config(train=path, eval=0.5, streaming=True), letters, seed=0)


@pytest.mark.parametrize(("options", "words"), [
    ({"train": []}, "at least one file"), ({"train": "a", "eval": 1.5}, "between 0 and 1"), ({"train": "a", "max_length": 1}, "max_length"),
    ({"train": "a", "columns": {"promt": "x"}}, "did you mean 'prompt'"), ({"train": "a", "columns": {"prompt": 0, "completion": "x"}}, "numbers for all"),
    ({"train": {"path": "a", "wieght": 1}}, "did you mean 'weight'"), ({"train": "a", "format": "json"}, "format"), ({}, "required")])
def test_a_setting_that_cannot_be_is_refused(options, words) -> None:
    with pytest.raises(RecipeError, match=words):
        config(**options)


def test_the_config_goes_through_yaml_and_back() -> None:
    given = config(train=["a", {"path": "b", "weight": 2}], eval=0.1, test="c", columns={"text": 0})
    assert DataConfig.parse(json.loads(given.model_dump_json())) == given
    assert not given.header
    assert all(field.description for field in DataConfig.model_fields.values())
    assert "prompt" in COLUMNS
    assert set(FORMATS) < set(json.dumps(DataConfig.model_json_schema()["properties"]["format"]).replace('"', " ").replace(",", " ").split())


def test_the_preview_shows_what_is_trained_in_green(letters) -> None:
    shown = format_preview(TokenizedExample((TokenSpan((*b"ask",), (0.0,) * 3), TokenSpan((*"é!".encode(),), (1.0, 1.0, 0.0), 0)), Origin("f", 1)), letters)
    assert [(shown.plain[s.start:s.end], s.style) for s in shown.spans] == [
        ("ask", "dim"), ("\n--- continues span 0\n", "dim italic"), ("é", "green"), ("!", "dim")]


def test_the_lengths_are_drawn(write, letters, tmp_path) -> None:
    path = write("a.txt", "one\nthree\nseven seven\n")
    plot_lengths(read_datasets(config(train=path, eval=path), letters, seed=0).report.parts, tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


REAL = {"alpaca_en_demo.json": (999, {}), "alpaca_zh_demo.json": (1000, {}), "identity.json": (91, {}), "glaive_toolcall_en_demo.json": (300, {}),
        "kto_en_demo.json": (300, {}), "c4_demo.jsonl": (300, {}), "wiki_demo.txt": (30, {}), "sst2_dev.tsv": (872, {"columns": {"prompt": 0, "completion": 1}}),
        "gsm8k_test.jsonl": (659, {"columns": {"prompt": "question", "completion": "answer"}})}


@pytest.mark.parametrize("name", REAL)
def test_real_files_are_read_whole(name, letters) -> None:
    if not SHARED.is_dir():
        pytest.skip("the shared data is not here")
    count, options = REAL[name]
    words = frozenset({"ChatExample", "CompletionExample", "TextExample"})
    found = read_datasets(config(train=str(SHARED / name), max_length=10**6, **options), letters, seed=0, reads=words)
    part = found.report.parts["train"]
    assert (part.read, part.kept, part.reasons) == (count, count, {})
