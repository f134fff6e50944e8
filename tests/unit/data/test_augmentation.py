"""Changes come out the same for the same seed, touch only what is read, and are counted."""

from __future__ import annotations

import json

import numpy as np
import pytest

from luthier.core.errors import DataError, RecipeError
from luthier.core.examples import (
    ChatExample,
    ClassificationExample,
    CompletionExample,
    ContrastiveExample,
    Message,
    Origin,
    TokenClassificationExample,
)
from luthier.data import DataConfig, TextAugmentation, augment_examples, paraphrase_examples, read_datasets

HERE = Origin("f", 1)
TEXT = "one two, three four five six seven eight nine ten"


def change(name: str, seed: int = 0, text: str = TEXT, **options: object) -> str:
    return TextAugmentation(name=name, **options).text(text, np.random.default_rng(seed))


def test_deletion_leaves_words_out_at_its_rate() -> None:
    assert change("deletion", rate=0.3) == change("deletion", rate=0.3) != change("deletion", 1, rate=0.3)
    lengths = [len(change("deletion", seed, rate=0.3).split()) for seed in range(300)]
    assert 6.7 < np.mean(lengths) < 7.3
    assert all(word in TEXT.split() for word in change("deletion", rate=0.3).split())
    assert all(change("deletion", seed, "word", rate=0.9) == "word" for seed in range(20))
    assert all(len(change("deletion", seed, "你好吗 朋友", rate=0.5)) > 0 for seed in range(20))
    assert any(change("deletion", seed, "你好吗", rate=0.5) == "你吗" for seed in range(50))


def test_a_swap_keeps_all_words_and_the_white_space() -> None:
    found = change("swap", rate=0.2, text="one  two\nthree four")
    assert sorted(found.split()) == sorted(["one", "two", "three", "four"])
    assert found != "one  two\nthree four"
    assert [c for c in found if c.isspace()] == [" ", " ", "\n", " "]
    assert change("swap", text="word") == "word"


def test_synonyms_come_from_the_users_file(write) -> None:
    file = write("words.txt", "big, large\nlittle dog, puppy\n好吃, 美味\n")
    said = change("synonyms", rate=0.99, text="Big bigger little dog, 很好吃", file=file)
    assert said == "Large bigger puppy, 很美味"
    assert change("synonyms", rate=0.01, text="none here", file=file) == "none here"
    letters = write("letters.txt", "кот, кошка\ntat, state\nkiz, girl\nbig, Big\n")
    said = change("synonyms", rate=0.99, text="Который кот? l'état kız Kiz, a big one", file=letters)
    assert said == "Который кошка? l'état kız Girl, a big one", "words of any script are whole, and those alone that are named"
    for content, words in (("alone\n", "a word without a synonym"), ("\n", "has no synonyms")):
        with pytest.raises(DataError, match=words):
            change("synonyms", file=write(f"{words[:4]}.txt", content))
    with pytest.raises(DataError, match="synonyms need a file of words, and None is not a file"):
        change("synonyms")


def test_only_what_is_read_is_changed() -> None:
    deletion = [TextAugmentation(name="deletion", rate=0.5)]

    def changed(example: object) -> object:
        (_, own), (name, copy) = augment_examples(example, 0, deletion, 3)
        assert (own, name) == (example, "deletion")
        return copy

    chat = changed(ChatExample((Message("system", TEXT), Message("user", TEXT), Message("assistant", TEXT)), HERE))
    assert [message.content == TEXT for message in chat.messages] == [True, False, True]
    completion = changed(CompletionExample(TEXT, TEXT, HERE))
    assert (completion.prompt != TEXT, completion.completion) == (True, TEXT)
    pair = changed(ClassificationExample(TEXT, "x", HERE, TEXT))
    assert pair.text != pair.second != TEXT
    assert all(text != TEXT for text in changed(ContrastiveExample((TEXT, TEXT), HERE)).texts)
    tagged = changed(TokenClassificationExample(tuple("abcdef"), tuple("ABCDEF"), HERE))
    assert 0 < len(tagged.words) < 6
    assert [word.upper() for word in tagged.words] == list(tagged.tags)


def test_copies_are_added_for_training_alone_and_counted(write, letters) -> None:
    rows = "".join(json.dumps({"text": f"{TEXT} {i}", "label": i % 2}) + "\n" for i in range(10))
    path = write("a.jsonl", rows)

    def loaded(seed: int = 0, **options: object) -> object:
        return read_datasets(DataConfig.parse({"train": path, "test": path, **options}), letters, seed=seed)

    added = loaded(augment=[{"name": "deletion", "copies": 2}, "swap"])
    part = added.report.parts["train"]
    assert (part.read, part.kept, part.encoded, part.augmented, part.labels) == (10, 10, 40, {"deletion": 20, "swap": 10}, {"0": 5, "1": 5})
    assert "train: 20 rows changed or added by deletion" in added.report.lines()
    assert (len(added.test), added.mix) == (10, ((40, 1.0),))
    assert added.train == loaded(augment=[{"name": "deletion", "copies": 2}, "swap"]).train
    assert added.train != loaded(1, augment=[{"name": "deletion", "copies": 2}, "swap"]).train
    assert [one.labeled_spans for one in added.train[:4]] == [added.train[0].labeled_spans] * 4
    replaced = loaded(augment=[{"name": "swap", "copies": 0, "replace": 0.5}])
    own = loaded().train
    assert len(replaced.train) == 10
    assert 2 <= sum(a != b for a, b in zip(replaced.train, own, strict=True)) == replaced.report.parts["train"].augmented["swap"] <= 8


def test_a_change_without_a_meaning_is_refused(write, letters) -> None:
    path = write("a.jsonl", json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"}))
    with pytest.raises(DataError, match="deletion does not support PreferenceExample"):
        read_datasets(DataConfig.parse({"train": path, "augment": ["deletion"]}), letters, seed=0)
    with pytest.raises(RecipeError, match="augment"):
        DataConfig.parse({"train": path, "augment": ["delete"]})


def test_a_model_says_it_in_other_words() -> None:
    asked: list[str] = []

    def generate(prompts: list[str]) -> list[str]:
        asked.extend(prompts)
        return [f" {prompt[-1]}! " for prompt in prompts]

    given = [ClassificationExample("t", "x", HERE, "u"), CompletionExample("v", "a", HERE)]
    assert paraphrase_examples(given, generate, "Again: {text}") == [ClassificationExample("t!", "x", HERE, "u!"), CompletionExample("v!", "a", HERE)]
    assert asked == ["Again: t", "Again: u", "Again: v"]
