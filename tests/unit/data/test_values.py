"""One value is one class, however a file spells it; what is no class is refused, and never read as a position."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from luthier.assembly import build_recipe
from luthier.core.errors import DataError, RecipeError
from luthier.core.examples import ClassificationExample, Origin, TokenClassificationExample, UnpairedPreferenceExample
from luthier.core.labels import collect_label_names, get_label_key, get_label_name, parse_number, sort_labels
from luthier.data import row_values
from luthier.data.config import DataConfig
from luthier.data.formats.registry import read_examples
from luthier.data.load import Datasets, read_datasets
from luthier.data.rows import RejectedRow, Row
from luthier.objectives.classify import ClassifyConfig
from luthier.objectives.contrastive import ContrastiveConfig
from luthier.objectives.kto import KtoConfig

Write = Callable[[str, str | bytes], str]
Letters = PreTrainedTokenizerFast

# ---------------------------------------------------------------- the rule itself

SAME = {  # key -> spellings
    "1": [1, 1.0, "1", "1.0", "1.", "+1", " 1 ", "1e0", "1.00", True, "true", "True", "TRUE", Decimal("1.00")],
    "0": [0, 0.0, -0.0, "0", "-0", "0.0", False, "false", "False", Decimal(0)],
    "-2": [-2, -2.0, "-2", "-2.0", Decimal(-2)],
    "0.5": [0.5, "0.5", "0.50", ".5", "5e-1", Decimal("0.5")],
    "9007199254740993": [2 ** 53 + 1, "9007199254740993"],
    "18446744073709551615": [2 ** 64 - 1, "18446744073709551615"],
    "1e+20": [1e20, "1e20", "1e+20"],
    "007": ["007", " 007"], "01": ["01"], "1_0": ["1_0"], "\uff11": ["\uff11"], "\u00b2": ["\u00b2"], "--5": ["--5"],
    "-": ["-"], "e5": ["e5"], "1e": ["1e"], "0x1": ["0x1"], "yes": ["yes"], "True story": ["True story"], "1,5": ["1,5"]}


def test_every_spelling_of_a_value_has_one_key_and_no_two_values_share_one() -> None:
    for key, spellings in SAME.items():
        assert {get_label_key(one) for one in spellings} == {key}


def breaches(key: Callable[[Any], str]) -> list[str]:
    return [wanted for wanted, spellings in SAME.items() if {key(one) for one in spellings} != {wanted}]


@pytest.mark.parametrize("broken", [str, lambda value: str(value).strip(), lambda value: str(value).lower(), lambda value: get_label_key(float(value)) if isinstance(value, int) else get_label_key(value)])
def test_the_table_notices_a_rule_that_is_broken(broken: Callable[[Any], str]) -> None:
    assert not breaches(get_label_key)
    assert breaches(broken)


@given(st.one_of(st.integers(-2 ** 63, 2 ** 64 - 1), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.text(max_size=6)))
@settings(max_examples=400, deadline=None)
def test_a_value_its_text_and_its_json_have_one_key_and_a_key_is_its_own(value: Any) -> None:
    key = get_label_key(value)
    assert get_label_key(str(value)) == get_label_key(json.loads(json.dumps(value))) == key == get_label_key(key)
    assert get_label_key(get_label_name(value)) == key
    if isinstance(value, float) and value.is_integer() and abs(value) < 2 ** 63:
        assert key == get_label_key(int(value))


@given(st.lists(st.one_of(st.integers(-99, 99), st.floats(-9, 9).map(lambda x: round(x, 2)), st.booleans(), st.sampled_from(["true", "x", "--5", "-", "\u00b2", "007"]))))
@settings(max_examples=200, deadline=None)
def test_classes_are_as_many_as_values_in_an_order_that_spelling_does_not_change(found: list[Any]) -> None:
    named = collect_label_names(found)
    ordered = [get_label_key(name) for name in sort_labels(named.values())]
    assert len(set(ordered)) == len(ordered) == len(set(map(get_label_key, found)))
    if all(parse_number(one) is not None for one in found):
        assert [parse_number(key) for key in ordered] == sorted(parse_number(key) for key in ordered)  # type: ignore[type-var]


def test_true_keeps_its_word_where_no_row_spells_it_as_a_number() -> None:
    assert collect_label_names([True, "True", "false"]) == {"1": "true", "0": "false"}
    assert collect_label_names([True, 1]) == {"1": "1"}


# ---------------------------------------------------------------- across files


def config(**settings: object) -> DataConfig:
    return DataConfig.parse(settings)


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def table(rows: list[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as files
    out = io.BytesIO()
    files.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


WRITERS: dict[str, Callable[[list[dict[str, Any]]], str | bytes]] = {"jsonl": jsonl, "csv": table, "parquet": parquet}
KINDS: dict[str, tuple[list[Any], tuple[str, ...]]] = {
    "whole": ([1, 0, 1, 2], ("0", "1", "2")), "whole floats": ([1.0, 0.0, 1.0, 2.0], ("0", "1", "2")),
    "texts": (["1", "0", "1", "2"], ("0", "1", "2")), "texts of floats": (["1.0", "0.0", "1.0", "2.0"], ("0", "1", "2"))}


@pytest.mark.parametrize("evaluated", WRITERS)
@pytest.mark.parametrize("trained", WRITERS)
@pytest.mark.parametrize("spelled", KINDS)
def test_every_file_and_spelling_trains_and_tests_the_same_classes(spelled: str, trained: str, evaluated: str, write: Write, letters: Letters) -> None:
    labels, classes = KINDS[spelled]
    train = write(f"train.{trained}", WRITERS[trained]([{"text": f"t{i}", "label": label} for i, label in enumerate(labels)]))
    for other, (same, _) in KINDS.items():
        test = write(f"{other}.{evaluated}", WRITERS[evaluated]([{"text": f"u{i}", "label": label} for i, label in enumerate(same)]))
        found = read_datasets(config(train=train, test=test), letters, seed=0)
        assert found.labels == classes
        assert numbers(found, "train") == numbers(found, "test") == [1, 0, 1, 2], other


def numbers(found: Datasets, part: str) -> list[Any]:
    return [one.labeled_spans[0].label for one in (found.train if part == "train" else found.test)]


@pytest.mark.parametrize("rows", [[True, False, True], ["true", "False", "TRUE"], [True, 0, "1"], [1, "false", True]])
def test_true_and_1_are_one_class(rows: list[Any], write: Write, letters: Letters) -> None:
    train = write("a.jsonl", jsonl([{"text": f"t{i}", "label": label} for i, label in enumerate(rows)]))
    test = write("b.csv", "text,label\nu,1\nv,True\nw,0.0\n")
    found = read_datasets(config(train=train, test=test), letters, seed=0)
    assert (numbers(found, "train"), numbers(found, "test")) == ([1, 0, 1], [1, 1, 0])
    assert set(found.counts.values()) == {1.0, 2.0}
    assert found.report.parts["train"].labels == dict(zip(found.labels, (1, 2), strict=True))


def test_mixed_spellings_in_one_file_are_one_class(write: Write, letters: Letters) -> None:
    found = read_datasets(config(train=write("a.csv", "text,label\na,1.0\nb,0\nc,1\n")), letters, seed=0)
    assert (found.labels, numbers(found, "train")) == (("0", "1"), [1, 0, 1])


def test_classes_that_are_hard_to_sort_are_names(write: Write, letters: Letters) -> None:
    rows = ["--5", "-", "3", "\u00b2", "007", "7"]
    found = read_datasets(config(train=write("a.jsonl", jsonl([{"text": f"t{i}", "label": label} for i, label in enumerate(rows)]))), letters, seed=0)
    assert found.labels == tuple(sorted(rows))


def test_two_spellings_of_a_decimal_are_not_guessed_at(write: Write, letters: Letters) -> None:
    with pytest.raises(DataError, match=r"a.csv:3: the label '1.10' is written '1.1' in another row"):
        read_datasets(config(train=write("a.csv", "text,label\na,1.1\nb,1.10\nc,2\n")), letters, seed=0)
    found = read_datasets(config(train=write("b.csv", "text,label\na,1.10\nb,1.10\nc,2\n")), letters, seed=0)
    assert found.labels == ("1.1", "2")


@pytest.mark.parametrize("label", [0, 1, "0", 1.0, True, "false", "pos ", "Pos", "2"])
def test_what_is_no_class_is_refused_and_no_position(label: Any, write: Write, letters: Letters) -> None:
    train = write("a.jsonl", jsonl([{"text": "t", "label": "pos"}, {"text": "u", "label": "neg"}]))
    test = write("b.jsonl", jsonl([{"text": "t", "label": "pos"}, {"text": "v", "label": label}]))
    for classes in ((), ("neg", "pos")):
        found = read_datasets(config(train=train, test=test), letters, seed=0, classes=classes)
        if label == "pos ":
            assert numbers(found, "test") == [1, 1]
            continue
        (refused,) = found.report.parts["test"].refused
        assert (refused["line"], refused["reason"]) == ("2", "a label that is not one of the classes")
        assert ("a number is not an index" in refused["detail"]) == (label != "Pos")


def test_several_labels_and_tags_follow_the_rule(write: Write, letters: Letters) -> None:
    train = write("a.jsonl", jsonl([{"text": "t", "label": [1, 2.0]}, {"text": "u", "label": ["1.0"]}, {"text": "v", "label": True}]))
    test = write("b.csv", 'text,label\nt,"[2, 1]"\nu,"[""1""]"\nv,1.0\nw,"[3]"\n')
    found = read_datasets(config(train=train, test=test), letters, seed=0)
    assert found.labels == ("1", "2")
    assert numbers(found, "train") == numbers(found, "test") == [(1, 1), (1, 0), (1, 0)]
    assert found.report.parts["test"].reasons == {"a label that is not one of the classes": 1}
    tagged = write("c.jsonl", jsonl([{"words": ["a", "b", "c"], "tags": [1, "1.0", True]}, {"words": ["a"], "tags": [0]}]))
    found = read_datasets(config(train=tagged), letters, seed=0)
    assert found.labels == ("0", "1")
    assert [[tag for tag in row.spans[0].tags if tag >= 0] for row in found.train] == [[1, 1, 1], [0]]


@pytest.mark.parametrize("classes", [[0, 1], [0.0, 1.0], ["0", "1"], ["0.0", "1.0"]])
def test_the_classes_of_a_recipe_follow_the_rule(classes: list[Any], write: Write, letters: Letters) -> None:
    made = ClassifyConfig.parse({"labels": classes, "class_weights": {classes[1]: 3.0}})
    assert (made.labels, dict(made.class_weights)) == (("0", "1"), {"1": 3.0})  # type: ignore[arg-type]
    assert ContrastiveConfig.parse({"loss": "supcon", "labels": classes}).labels == ("0", "1")
    found = read_datasets(config(train=write("a.csv", "text,label\na,1.0\nb,0\n")), letters, seed=0, classes=made.labels)
    assert numbers(found, "train") == [1, 0]
    assert made.with_labels(found.labels, found.counts).labels == ("0", "1")


def test_a_class_is_named_once_in_a_recipe() -> None:
    for made in (ClassifyConfig, ContrastiveConfig):
        with pytest.raises(RecipeError, match="a class appears twice"):
            made.parse({"labels": [1, "1.0"]})
    assert ClassifyConfig.parse({"labels": ["yes", "no", True]}).labels == ("yes", "no", "true")


def test_names_that_a_data_set_declares_are_its_classes(tmp_path: Path, letters: Letters) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    made = datasets.Dataset.from_dict({"text": ["t", "u", "v"], "label": [1, 0, -1]}, features=features)
    made.to_parquet(str(tmp_path / "a.parquet"))
    made.save_to_disk(str(tmp_path / "saved"))
    for path in (tmp_path / "a.parquet", tmp_path / "saved"):
        found = read_datasets(config(train=str(path)), letters, seed=0)
        assert (found.labels, numbers(found, "train"), found.report.parts["train"].reasons) == (("neg", "pos"), [1, 0], {"no label": 1})
        with pytest.raises(DataError, match="a label that is not one of the classes"):
            read_datasets(config(train=str(path)), letters, seed=0, classes=("bad", "good"))
    tags = datasets.Features({"tokens": datasets.List(datasets.Value("string")), "ner_tags": datasets.List(datasets.ClassLabel(names=["O", "PER"]))})
    datasets.Dataset.from_dict({"tokens": [["a", "b"]], "ner_tags": [[0, 1]]}, features=tags).to_parquet(str(tmp_path / "b.parquet"))
    assert read_datasets(config(train=str(tmp_path / "b.parquet")), letters, seed=0).labels == ("O", "PER")


# ---------------------------------------------------------------- what no value is


HERE = Origin("f", 1)
HUGE = 2 ** 64
BAD = {"NaN": math.nan, "infinity": math.inf, "its text": "nan", "text of infinity": "-Infinity", "1e999": "1e999",
       "beyond 64 bits": HUGE, "text beyond 64 bits": str(HUGE), "below 64 bits": -2 ** 63 - 1, "of a thousand digits": "9" * 1000,
       "NaN of a table": Decimal("NaN")}
PLACES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "label": lambda value: {"text": "t", "label": value},
    "one of several labels": lambda value: {"text": "t", "label": ["a", value]},
    "tag": lambda value: {"words": ["a", "b"], "tags": ["O", value]},
    "score": lambda value: {"sentence1": "a", "sentence2": "b", "score": value},
    "weight": lambda value: {"text": "t", "label": "a", "weight": value},
    "margin": lambda value: {"prompt": "q", "chosen": "a", "rejected": "b", "margin": value},
    "rank": lambda value: {"prompt": "q", "answers": [{"text": "a", "rank": value}, {"text": "b", "rank": 1}]},
    "verdict": lambda value: {"prompt": "q", "completion": "a", "label": value},
    "reference": lambda value: {"prompt": "q", "reference": value},
    "choice": lambda value: {"question": "q", "choices": [value, 2], "answer": 2},
    "answer": lambda value: {"question": "q", "choices": ["a", "b"], "answer": value},
}


@pytest.mark.parametrize(("name", "place"), [(name, place) for name in BAD for place in PLACES
                                             if place not in ("choice", "reference") or (
                                                 isinstance(BAD[name], float) or (place == "choice" and isinstance(BAD[name], int)))])
def test_what_is_no_finite_number_of_64_bits_is_refused(name: str, place: str) -> None:
    """But for a choice and a reference, which may be any text, and a reference any integer."""
    (found,) = read_examples([Row(PLACES[place](BAD[name]), HERE)])
    assert isinstance(found, RejectedRow)


@pytest.mark.parametrize("place", PLACES)
def test_the_rows_of_that_table_are_read_with_a_number_in_that_place(place: str) -> None:
    (found,) = read_examples([Row(PLACES[place](0), HERE)])
    assert not isinstance(found, RejectedRow)


def test_json_that_is_not_json_is_refused_with_its_line(write: Write, letters: Letters) -> None:
    rows = '{"text": "a", "label": 1}\n{"text": "b", "label": NaN}\n{"text": "c", "label": -Infinity}\n{"text": "d", "label": 1e999}\n' \
           f'{{"text": "e", "label": {HUGE}}}\n{{"text": "f", "label": 0}}\n'
    found = read_datasets(config(train=write("a.jsonl", rows)), letters, seed=0)
    assert {row["line"]: row["reason"] for row in found.report.parts["train"].refused} == {
        "2": "label is not a finite number", "3": "label is not a finite number", "4": "label is not a finite number",
        "5": "label is an integer beyond 64 bits"}
    assert found.labels == ("0", "1")


VERDICTS = {True: [True, 1, 1.0, "1", "1.0", "true", "True", " good ", "Desirable"], False: [False, 0, 0.0, "0", "0.0", "FALSE", "bad", "undesirable"]}


def test_verdicts_follow_the_rule() -> None:
    for good, spellings in VERDICTS.items():
        for one in spellings:
            (found,) = read_examples([Row({"prompt": "q", "completion": "a", "label": one}, HERE)])
            assert isinstance(found, UnpairedPreferenceExample)
            assert found.good is good
    for odd in (2, -1, 0.5, "yes", "", [], None, "nan"):
        with pytest.raises(row_values.InvalidRowError, match="not desirable or undesirable"):
            row_values.read_verdict(odd)
    assert KtoConfig.example_types == {"UnpairedPreferenceExample"}


@pytest.mark.parametrize("text", ["1_000", "\u0663", "1,5", "0x10", "one", "007"])
def test_text_that_only_pythons_float_reads_is_no_number(text: str) -> None:
    with pytest.raises(row_values.InvalidRowError, match="score is not a number"):
        row_values.read_number(text, "score")
    assert row_values.read_number("true", "score") == row_values.read_number(True, "score") == row_values.read_weight("1.0") == 1.0


def test_what_rows_become_keeps_all_digits() -> None:
    (found,) = read_examples([Row({"text": "t", "label": 2 ** 53 + 1}, HERE)])
    assert isinstance(found, ClassificationExample)
    assert found.label == "9007199254740993"
    (tagged,) = read_examples([Row({"words": ["a"], "tags": [2 ** 53 + 1]}, HERE)])
    assert isinstance(tagged, TokenClassificationExample)
    assert tagged.tags == ("9007199254740993",)


# ---------------------------------------------------------------- numbers that are no classes


@pytest.mark.parametrize("count", [20, 11, 5, 3])
def test_decimals_as_classes_propose_a_regression(count: int, write: Write, letters: Letters) -> None:
    rows = [{"text": f"t{i}", "label": 0.11 + 1.37 * i} for i in range(count)]
    found = read_datasets(config(train=write("a.jsonl", jsonl(rows))), letters, seed=0)
    with pytest.raises(RecipeError, match=rf"{count} different numbers for labels, such as 0.11 .*\n.*set objective.task to regression"):
        ClassifyConfig().with_labels(found.labels, found.counts)
    with pytest.raises(RecipeError, match=r"objective.loss: cosent"):
        ContrastiveConfig(loss="supcon").with_labels(found.labels, found.counts)
    named = ClassifyConfig(labels=found.labels)
    assert named.with_labels(found.labels, found.counts) == named
    found = read_datasets(config(train=write("a.jsonl", jsonl(rows))), letters, seed=0, classes=None)
    assert numbers(found, "train") == [row["label"] for row in rows]


@pytest.mark.parametrize("labels", [[0.5 * i for i in range(10)], list(range(200)), [f"v{i}.5" for i in range(40)]])
def test_half_stars_many_classes_and_names_are_classes(labels: list[Any], write: Write, letters: Letters) -> None:
    rows = [{"text": f"t{i}", "label": label} for i, label in enumerate([*labels, *labels])]
    found = read_datasets(config(train=write("a.jsonl", jsonl(rows))), letters, seed=0)
    assert len(ClassifyConfig().with_labels(found.labels, found.counts).labels) == len(labels)


# ---------------------------------------------------------------- what else such rows end in


@pytest.mark.parametrize("objective", ["classify", "contrastive"])
def test_scores_of_answers_need_rows_that_ask(objective: str) -> None:
    with pytest.raises(RecipeError, match=rf"evaluate.metrics exact_match: these score generated answers, and the rows of objective '{objective}' have no prompts"):
        build_recipe(None, {"data.train": "a.jsonl", "objective": objective, "evaluate.metrics": ["exact_match"]})
    build_recipe(None, {"data.train": "a.jsonl", "objective": "sft", "evaluate.metrics": ["exact_match"]})


@pytest.mark.parametrize("silent", ["\u200b", "\ufeff", "\u200d"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_word_that_becomes_no_token_is_the_reason(silent: str, place: int, write: Write) -> None:
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Sequence([normalizers.Replace(letter, "") for letter in ("\u200b", "\ufeff", "\u200d")])
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[UNK]")
    words = ["a", "b"]
    words.insert(place, silent)
    rows = [{"words": words, "tags": ["O", "X", "O"]}, {"words": ["a", "b"], "tags": ["O", "X"]}]
    found = read_datasets(config(train=write("a.jsonl", jsonl(rows))), tokenizer, seed=0)
    (refused,) = found.report.parts["train"].refused
    assert (refused["line"], refused["reason"], refused["detail"]) == ("1", "the tokenizer returns no tokens for a word", ascii(silent))
