"""What is judged as a whole becomes roots and items; classes and scales come from the training rows; bad rows are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from luthier.core.errors import DataError
from luthier.core.examples import ClassificationExample, ContrastiveExample, Origin, TokenClassificationExample
from luthier.data import (
    DataConfig,
    DatasetSpec,
    InMemoryBatchSource,
    RejectedRow,
    Row,
    RowReader,
    StreamingBatchSource,
    build_batch,
    encode_example,
    format_preview,
    read_datasets,
    read_examples,
)

SHARED = Path(__file__).parents[4] / "shared" / "data"
HERE = Origin("f", 1)


def become(*rows: dict, kinds: str | None = None, **options: object) -> list:
    reader = RowReader(frozenset({f"{kinds}Example"}) if kinds else None)
    return list(read_examples([Row(row, Origin("f", line)) for line, row in enumerate(rows, 1)], reader=reader, **options))


def config(**options: object) -> DataConfig:
    return DataConfig.parse({"train": "x", **options})


def lines(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def bert() -> PreTrainedTokenizerFast:
    """Whole words, [CLS] and [SEP], and a mark between two texts."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d", "good", "bad"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", [("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")


CASES = {
    "text": ({"text": "t", "label": "pos"}, ClassificationExample("t", "pos", HERE)),
    "sentence": ({"sentence": "t", "label": 1}, ClassificationExample("t", 1.0, HERE)),
    "two texts": ({"premise": "t", "hypothesis": "u", "label": 2}, ClassificationExample("t", 2.0, HERE, "u")),
    "several labels": ({"text": "t", "labels": ["x", 1]}, ClassificationExample("t", ("x", "1"), HERE)),
    "no label of several": ({"text": "t", "label": []}, ClassificationExample("t", (), HERE)),
    "tags": ({"words": ["t", "u"], "tags": ["O", "B"]}, TokenClassificationExample(("t", "u"), ("O", "B"), HERE)),
    "tokens": ({"tokens": ["t"], "ner_tags": [3], "weight": 2}, TokenClassificationExample(("t",), ("3",), HERE, 2.0)),
    "score": ({"sentence1": "t", "sentence2": "u", "score": "2.5"}, ContrastiveExample(("t", "u"), HERE, 2.5)),
    "triplet": ({"anchor": "t", "positive": "u", "negative": "v"}, ContrastiveExample(("t", "u", "v"), HERE)),
    "more negatives": ({"anchor": "t", "positive": "u", "negative_1": "v", "negative_2": "w"}, ContrastiveExample(("t", "u", "v", "w"), HERE)),
    "a list of negatives": ({"anchor": "t", "positive": "u", "negatives": ["v", "w"]}, ContrastiveExample(("t", "u", "v", "w"), HERE)),
    "a pair alone": ({"anchor": "t", "positive": "u"}, ContrastiveExample(("t", "u"), HERE)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_row_becomes_its_example(name) -> None:
    row, expected = CASES[name]
    assert become(row) == [expected]


REFUSED = {
    "no words": ({"text": " ", "label": 1}, "empty text"), "an empty label": ({"text": "t", "label": ""}, "empty label"),
    "an odd label": ({"text": "t", "label": {"a": 1}}, "label is neither a name, a number nor a list of names"),
    "not a number": ({"text": "t", "label": float("nan")}, "label is not a finite number"),
    "words and tags": ({"words": ["t"], "tags": ["O", "O"]}, "words and tags differ in number"),
    "an empty word": ({"words": ["t", ""], "tags": ["O", "O"]}, "a word is empty or not a string"),
    "a score in words": ({"sentence1": "t", "sentence2": "u", "score": "much"}, "score is not a number"),
    "a score below 0": ({"sentence1": "t", "sentence2": "u", "score": -1}, "score is below 0"),
    "an empty negative": ({"anchor": "t", "positive": "u", "negative": " "}, "empty negative"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_row_is_refused_with_its_reason(name) -> None:
    row, reason = REFUSED[name]
    (found,) = become(row)
    assert isinstance(found, RejectedRow)
    assert (found.reason, str(found.origin)) == (reason, "f:1")


# ---------------------------------------------------------------- tokens


def test_a_text_and_a_pair_have_the_tokenizers_own_marks(bert, letters) -> None:
    def ids(example: ClassificationExample, tokenizer: PreTrainedTokenizerFast, **options: object) -> list[int]:
        (found,) = encode_example(example, tokenizer, config(**options))
        assert (len(found.spans), found.spans[0].predicted, found.labeled_spans[0].span_index) == (1, (), 0)
        return list(found.spans[0].ids)

    assert ids(ClassificationExample("a b", 0.0, HERE), bert) == [2, 4, 5, 3]
    assert ids(ClassificationExample("a b", 0.0, HERE, "c"), bert) == [2, 4, 5, 3, 6, 3]
    assert ids(ClassificationExample("a b c d", 0.0, HERE, "c"), bert, max_length=6) == [2, 4, 5, 3, 6, 3]
    assert ids(ClassificationExample("ab", 0.0, HERE, "c"), letters) == list(b"ab\nc")
    refused = encode_example(ClassificationExample("a b c d", 0.0, HERE), bert, config(max_length=4, truncation="refuse"))
    assert (refused.reason, refused.detail) == ("longer than max_length", "6 tokens, at most 4")


def test_texts_are_roots_labelled_by_their_part(bert) -> None:
    (found,) = encode_example(ContrastiveExample(("a", "b b", "c"), HERE), bert, config())
    assert [(p.ids, p.parent) for p in found.spans] == [((2, 4, 3), -1), ((2, 5, 5, 3), -1), ((2, 6, 3), -1)]
    assert [(i.span_index, i.label) for i in found.labeled_spans] == [(0, 0.0), (1, 1.0), (2, 2.0)]


def test_each_words_first_token_has_its_tag(letters, words, bert, write) -> None:
    row = {"words": ["the", "ans🙂", "是"], "tags": ["O", "B", "I"]}
    for tokenizer in (letters, words, bert):
        (found,) = read_datasets(config(train=write("a.jsonl", lines(row))), tokenizer, seed=0).train
        (span,) = found.spans
        assert [tag for tag in span.tags if tag >= 0] == [2, 0, 1]
        assert [w for w in span.weights if w] == [1.0] * 3
        one = build_batch([found])
        assert one.target.token_ids.tolist() == [2, 0, 1]
        starts = [tokenizer.decode(span.ids[at:]).strip() for at in one.target.state_index.tolist()]
        if tokenizer is not bert:
            assert [said[:2] for said in starts] == ["th", "an", "是"]
        else:
            assert one.target.state_index.tolist() == [1, 2, 4]  # ans and the picture are two words to it


def test_words_of_a_script_without_spaces_stay_together_unless_they_merge(letters) -> None:
    def said(tokenizer: PreTrainedTokenizerFast) -> str:
        (found,) = encode_example(TokenClassificationExample(("你", "好", "ok"), ("x", "x", "x"), HERE), tokenizer, config())
        assert sum(tag >= 0 for tag in found.spans[0].tags) == 3
        return tokenizer.decode(found.spans[0].ids)

    assert said(letters) == "你好 ok"
    merging = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"[UNK]": 0, "你好": 1, "你": 2, "好": 3, "ok": 4}, unk_token="[UNK]")))
    merging.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert said(merging).split() == ["你", "好", "ok"]


# ---------------------------------------------------------------- what all the training rows say


def test_classes_are_found_sorted_and_numbered(write, letters) -> None:
    for given, wanted in ((["pos", "neg", "pos"], ("neg", "pos")), ([10, 9, "2"], ("2", "9", "10")), ([1.0, 0, True], ("0", "1"))):
        rows = lines(*({"text": f"t{i}", "label": label} for i, label in enumerate(given)))
        found = read_datasets(config(train=write("a.jsonl", rows)), letters, seed=0)
        assert found.labels == wanted
        names = [str(int(label)) if not isinstance(label, str) else label for label in given]
        assert [one.labeled_spans[0].label for one in found.train] == [float(wanted.index(name)) for name in names]
        assert sum(found.report.parts["train"].labels.values()) == 3


def test_a_label_never_seen_in_training_is_refused_with_its_line(write, letters) -> None:
    train = write("a.jsonl", lines({"text": "t", "label": "pos"}, {"text": "u", "label": "neg"}))
    test = write("b.jsonl", lines({"text": "t", "label": "pos"}, {"text": "v", "label": "mixed"}))
    found = read_datasets(config(train=train, test=test), letters, seed=0)
    (refused,) = found.report.parts["test"].refused
    assert (refused["line"], refused["reason"], refused["detail"]) == ("2", "a label that is not one of the classes", "'mixed'; known: neg, pos")
    assert (len(found.test), len(found.test_examples), found.report.parts["test"].kept) == (1, 1, 1)


def test_named_classes_take_names_and_never_positions(write, letters) -> None:
    path = write("a.jsonl", lines({"text": "t", "label": "neg"}, {"text": "u", "label": 0}, {"text": "v", "label": 2}))
    found = read_datasets(config(train=path), letters, seed=0, classes=("pos", "neg"))
    assert [one.labeled_spans[0].label for one in found.train] == [1.0]
    assert (found.labels, found.report.parts["train"].reasons) == (("pos", "neg"), {"a label that is not one of the classes": 2})
    assert "a number is not an index of a class" in found.report.parts["train"].refused[0]["detail"]


def test_without_classes_a_label_is_a_number(write, letters) -> None:
    path = write("a.jsonl", lines({"text": "t", "label": "2.5"}, {"text": "u", "label": -1}, {"text": "v", "label": "good"}, {"text": "w", "label": ["1"]}))
    found = read_datasets(config(train=path), letters, seed=0, classes=None)
    assert [one.labeled_spans[0].label for one in found.train] == [2.5, -1.0]
    assert found.labels == ()
    assert set(found.report.parts["train"].reasons) == {"label is not a number", "several labels instead of one number"}


def test_several_labels_are_flags(write, letters) -> None:
    path = write("a.jsonl", lines({"text": "t", "label": ["b", "a"]}, {"text": "u", "label": []}, {"text": "v", "label": "c"}))
    found = read_datasets(config(train=path), letters, seed=0)
    assert found.labels == ("a", "b", "c")
    assert build_batch(found.train).target.labels.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize(("scores", "scale", "wanted"), [
    ([0, 1, 0.5], None, [0, 1, 0.5]), ([0, 4, 2.5], None, [0, 0.8, 0.5]), ([7, 2], None, [0.7, 0.2]), ([1, 0.5], 2, [0.5, 0.25])])
def test_scores_are_scaled_over_the_file_or_by_the_setting(write, letters, scores, scale, wanted) -> None:
    path = write("a.jsonl", lines(*({"sentence1": "t", "sentence2": f"u{i}", "score": s} for i, s in enumerate(scores))))
    found = read_datasets(config(train=path, **({"score_scale": scale} if scale else {})), letters, seed=0)
    assert [[i.label for i in one.labeled_spans] for one in found.train] == [[pytest.approx(w)] * 2 for w in wanted]


def test_a_score_above_the_scale_is_refused(write, letters) -> None:
    train, test = (write(name, lines({"sentence1": "t", "sentence2": "u", "score": s})) for name, s in (("a.jsonl", 4), ("b.jsonl", 6)))
    with pytest.raises(DataError, match="score above the scale"):
        read_datasets(config(train=train, test=test), letters, seed=0)


def test_what_needs_all_rows_is_not_streamed(write, letters) -> None:
    rows = {"collected from all training rows": {"text": "t", "label": "a"}, "another row's answer": {"prompt": "q", "completion": "a", "label": 1},
            "scale of the scores": {"sentence1": "t", "sentence2": "u", "score": 1}}
    for reason, row in rows.items():
        with pytest.raises(DataError, match=reason):
            next(StreamingBatchSource(config(train=write("a.jsonl", lines(row))), letters, 1, None))
    path = write("a.jsonl", lines({"text": "t", "label": "b"}, {"text": "u", "label": "x"}))
    (one,) = next(StreamingBatchSource(config(train=path, shuffle=False), letters, 1, None, use=DatasetSpec(classes=("a", "b"))))
    assert one.target.labels.tolist() == [1.0]
    with pytest.raises(DataError, match="are not augmented"):
        StreamingBatchSource(config(train=path, augment=["deletion"]), letters, 1, None)


def test_the_cursor_knows_labels_apart(write, letters) -> None:
    def fingerprint(label: str) -> str:
        path = write("a.jsonl", lines({"text": "t", "label": label}, {"text": "u", "label": "b"}, {"text": "u", "label": "a"}))
        return InMemoryBatchSource(read_datasets(config(train=path), letters, seed=0).train, 1, None).fingerprint
    assert fingerprint("a") == fingerprint("a") != fingerprint("b")


def test_the_preview_says_how_each_span_is_labeled(letters, write) -> None:
    def shown(row: dict, **options: object) -> str:
        found = read_datasets(config(train=write("a.jsonl", lines(row, {**row, "id": 1})), **options), letters, seed=0)
        return format_preview(found.train[0], letters, found.labels).plain
    assert shown({"text": "abc", "label": "x"}) == "--- label x\nabc"
    assert shown({"words": ["ab", "c"], "tags": ["O", "B"]}) == "a/Ob c/B"
    assert shown({"anchor": "a", "positive": "b"}) == "--- label 0\na\n--- span 1, label 1\nb"
    pair = shown({"prompt": "q", "chosen": "a", "rejected": "b", "margin": 2}, format="pair", share_prompt=True)
    assert pair.split("\n---")[1:] == [" continues span 0, label 0, better by 2\na<|im_end|>", " continues span 0, label 1\nb<|im_end|>"]


def test_overlap_is_found_for_every_kind(write, letters) -> None:
    for row in ({"text": "One  two!", "label": 1}, {"words": ["One", "two"], "tags": [1, 2]}, {"anchor": "One", "positive": "two"},
                {"prompt": "one two", "chosen": "a", "rejected": "b"}, {"prompt": "one two"}):
        train, test = write("a.jsonl", lines(row, {**row, "id": 1})), write("b.jsonl", lines(row))
        assert read_datasets(config(train=train, test=test), letters, seed=0).report.overlaps["test"].count == 1, row


REAL = {"sst2_dev.tsv": (872, {"text": 0, "label": 1}, ("0", "1")), "waimai_10k.csv": (3000, {"text": "review"}, ("1",)),
        "sts2014_headlines.tsv": (750, {"score": 0, "sentence1": 1, "sentence2": 2}, ())}


@pytest.mark.parametrize("name", REAL)
def test_real_files_are_read_whole(name, letters) -> None:
    if not SHARED.is_dir():
        pytest.skip("the shared data is not here")
    count, columns, labels = REAL[name]
    found = read_datasets(config(train=str(SHARED / name), columns=columns, max_samples=3000), letters, seed=0)
    part = found.report.parts["train"]
    assert (part.read, part.kept, part.reasons, found.labels) == (count, count, {}, labels)
    assert torch.tensor([i.label for one in found.train for i in one.labeled_spans]).max() <= 1
