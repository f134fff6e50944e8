"""A SentencePiece tokenizer in a GGUF file makes of any text the tokens that trained; where that is not sure, no file is
written. The models behind these tokenizers are tiny; `test_gguf.py` has what a model's file must say."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from lab import logits
from lab_gguf import CORPUS, TEXTS, distance, llama, opened, theirs
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GemmaTokenizer, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from luthier.core.errors import BaseError
from luthier.models import CausalLM
from luthier.models.gguf import sentencepiece as pieces
from luthier.models.gguf import writer as out
from luthier.models.gguf.bpe import write_tokenizer
from tiny import CHATML, tiny

VOCABULARY = 800  # the tokenizers have fewer words, so some rows of the embedding are unused
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
REPLACE, PREPEND = normalizers.Replace(" ", "▁"), normalizers.Prepend("▁")
KINDS: dict[str, tuple[Any, Any]] = {
    "Llama's": (normalizers.Sequence([PREPEND, REPLACE]), None),
    "Gemma's": (REPLACE, pre_tokenizers.Split(" ", "merged_with_previous")),
    "Metaspace": (None, pre_tokenizers.Metaspace("▁", prepend_scheme="never", split=False)),
}


def trained() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Words and merges of a BPE over the corpus, merged across everything, so that nothing splits a text by chance."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = REPLACE
    backend.train_from_iterator(CORPUS * 3, trainers.BpeTrainer(
        vocab_size=700, min_frequency=1, max_token_length=8, special_tokens=[*SPECIAL, *pieces.BYTES], show_progress=False))
    model = json.loads(backend.to_str())["model"]
    rare = {"日", "Ω", "½"}  # to be written in bytes
    words = [*(word for word in model["vocab"] if not rare & {*word}), "▁▁"]
    merges = [("▁", "▁"), *((left, right) for left, right in model["merges"] if not rare & {*left, *right})]
    return {word: i for i, word in enumerate(words)}, merges


def tokenizer(kind: str, converted: bool = True) -> PreTrainedTokenizerFast:
    """As converters from SentencePiece write it, with a merge for every way to halve a word; or as it was trained."""
    vocabulary, merges = trained()
    if converted:
        merges = generate_merges(vocabulary, {word: -float(i) for word, i in vocabulary.items()})
    backend = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer, backend.pre_tokenizer = KINDS[kind]
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(word, normalized=False) for word in SPECIAL])
    backend.add_tokens([AddedToken(word, normalized=False) for word in ("<tool>", "\n\n", "▁▁")])  # Gemma has such runs
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    found = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    found.chat_template = CHATML
    return found


def family(words: Any) -> CausalLM:
    return CausalLM(tiny("llama", dtype=torch.float32, vocab_size=VOCABULARY, eos_token_id=2), words)


def texts(count: int = 2000, seed: int = 0) -> list[str]:
    """The hard texts, and random ones of the same letters, parts of the corpus and special words."""
    dice = random.Random(seed)
    letters = sorted({*"".join(TEXTS)})
    cuts = [line[i:i + k] for line in CORPUS for k in (3, 7) for i in range(0, len(line), k)]
    found = [*TEXTS, "</s>", "<s> a", "<tool>x <tool> y", "a\n\n\n\nb", "   ", "<unk>", "<0x41>", "日", "ΩΩ ½½½"]
    for _ in range(count):
        source = dice.choice([letters, cuts, [*cuts, *SPECIAL, "<tool>", "\n\n"], [" ", "1", "2", "3", "e", "."]])
        found.append("".join(dice.choices(source, k=dice.randint(1, 12))))
    return found


def wrong(file: Path, words: Any) -> list[str]:
    """The texts of which llama.cpp makes other tokens."""
    with opened(file) as found:
        return [text for text in texts() if found.tokenize(text.encode(), add_bos=True, special=True) != words(text).input_ids]


@llama
@pytest.mark.parametrize("converted", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_text_becomes_the_same_tokens(kind: str, converted: bool, tmp_path: Path) -> None:
    words = tokenizer(kind, converted)
    out.write_gguf(family(words), tmp_path / "a.gguf", "float32")
    assert wrong(tmp_path / "a.gguf", words) == []


@llama
def test_tokens_become_the_text_again(tmp_path: Path) -> None:
    words = tokenizer("Gemma's")
    out.write_gguf(family(words), tmp_path / "a.gguf", "float32")
    with opened(tmp_path / "a.gguf") as found:
        for text in (*TEXTS, "a  b   c"):
            tokens = words(text, add_special_tokens=False).input_ids
            assert found.detokenize(tokens, special=True).decode() == words.decode(tokens) == text


@llama
def test_the_model_behind_it_says_the_same(tmp_path: Path) -> None:
    words = tokenizer("Llama's")
    base = family(words)
    out.write_gguf(base, tmp_path / "a.gguf", "float32")
    tokens = words(CORPUS[0]).input_ids
    assert distance(theirs(tmp_path / "a.gguf", tokens), logits(base, tokens)) < 2e-5


@llama
@pytest.mark.parametrize(("kind", "forgotten"), [("Llama's", "space"), ("Gemma's", "space"), ("Llama's", "scores")])
def test_the_comparison_would_see_a_mistake(kind: str, forgotten: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = tokenizer(kind)
    if forgotten == "space":
        right = pieces.adds_space_prefix
        monkeypatch.setattr(pieces, "adds_space_prefix", lambda described: not right(described))
    else:
        monkeypatch.setattr(pieces, "compute_scores", lambda words, apart, merges: [-float(i % 7) for i in range(len(words))])
    out.write_gguf(family(words), tmp_path / "a.gguf", "float32")
    assert wrong(tmp_path / "a.gguf", words)


def test_what_the_file_says_of_words(tmp_path: Path) -> None:
    words = tokenizer("Llama's")
    out.write_gguf(family(words), tmp_path / "a.gguf", "float32")
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    said = [fields[f"tokenizer.ggml.{key}"].contents() for key in (
        "model", "bos_token_id", "eos_token_id", "unknown_token_id", "add_bos_token", "add_eos_token", "add_space_prefix")]
    assert said == ["llama", 1, 2, 0, True, False, True]
    kinds = fields["tokenizer.ggml.token_type"].contents()
    ids = [*words.convert_tokens_to_ids(["<unk>", "<s>", "<0x0A>", "<0xFF>", "th", "<tool>", "\n\n"]), VOCABULARY - 1]
    assert [kinds[i] for i in ids] == [2, 3, 6, 6, 1, 4, 4, 5]


# ---------------------------------------------------------------- words that merges do not make


def lone(word: str, left: str, right: str) -> PreTrainedTokenizerFast:
    """With one word more, which no merge makes, though both of its halves are there."""
    found = described("Gemma's")
    known = found["model"]["vocab"]
    for part in (left, right, word):
        known.setdefault(part, len(known))
    found["added_tokens"] = [token for token in found["added_tokens"] if token["content"] != "<tool>"]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(found)), bos_token="<s>", eos_token="</s>")


@llama
def test_a_word_that_llama_cpp_alone_would_make_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = lone("ze", "z", "e")
    with pytest.raises(BaseError, match="no merge produces the token 'ze', but llama"):
        out.write_gguf(family(words), tmp_path / "a.gguf", "float32")
    assert not list(tmp_path.iterdir())
    right = pieces.apply_merges
    monkeypatch.setattr(pieces, "apply_merges", lambda word, ranks: [] if word == "ze" else right(word, ranks))
    out.write_gguf(family(words), tmp_path / "a.gguf", "float32")
    with opened(tmp_path / "a.gguf") as found:  # the refusal was right
        assert found.tokenize(b"ze", add_bos=True, special=True) != words("ze").input_ids


def test_a_special_word_with_a_space_is_found_out_too(tmp_path: Path) -> None:
    words = lone("▁z", "▁", "z")
    words.backend_tokenizer.add_special_tokens([AddedToken("▁z", normalized=False)])
    with pytest.raises(BaseError, match="no merge produces the token '▁z'"):  # a text has ' z', which is no such word yet
        out.write_gguf(family(words), tmp_path / "a.gguf", "float32")


@llama
def test_a_word_that_neither_makes_does_no_harm(tmp_path: Path) -> None:
    words = lone("zqe", "z", "e")  # q is no word, so its text stays in three parts
    out.write_gguf(family(words), tmp_path / "a.gguf", "float32")
    with opened(tmp_path / "a.gguf") as found:
        for text in ("zqe", "a zqe zqezqe"):
            assert found.tokenize(text.encode(), add_bos=True, special=True) == words(text).input_ids


def chance(seed: int) -> PreTrainedTokenizerFast:
    """A few words over four letters, merges in any order: nearly every rule of precedence comes into play."""
    dice = random.Random(seed)
    words, merges = [*"ab▁c"], []
    for _ in range(dice.randint(3, 25)):
        left, right = dice.choice(words), dice.choice(words)
        if len(left + right) < 7 and (left, right) not in merges:
            merges.append((left, right))
            words += [left + right] if left + right not in words else []
    if dice.random() < 0.5:
        dice.shuffle(merges)
    if dice.random() < 0.5:
        halves = [(word[:i], word[i:]) for word in words for i in range(1, len(word))]
        for left, right in halves:
            if (left, right) not in merges and left in words and right in words:
                merges.insert(dice.randint(0, len(merges)), (left, right))
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *pieces.BYTES, *words])}
    backend = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = REPLACE
    backend.add_special_tokens([AddedToken(word, normalized=False) for word in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def same(words: PreTrainedTokenizerFast, file: Path, seed: int) -> bool:
    """Whether llama.cpp makes the same tokens of some texts by chance, from a file that has the tokenizer alone."""
    dice = random.Random(seed)
    writer = gguf.GGUFWriter(file, "llama")
    write_tokenizer(writer, words, 400, {2}, None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    lines = ["".join(dice.choices("ab cd", k=dice.randint(1, 40))) for _ in range(200)]
    with opened(file, vocab_only=True) as found:
        return all(found.tokenize(line.encode(), add_bos=False, special=True) == words(line).input_ids for line in lines)


@llama
def test_what_is_written_is_right_and_what_is_refused_would_be_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, refused = [], []
    for seed in range(60):
        try:
            written.append(same(chance(seed), tmp_path / "a.gguf", seed))
        except BaseError:
            refused.append(seed)
    assert all(written)
    assert len(written) > 30
    right = pieces.apply_merges
    monkeypatch.setattr(pieces, "apply_merges", lambda word, ranks: parts if len(parts := right(word, ranks)) != 2
                        or (parts[0], parts[1]) in ranks else [])
    forced = [same(chance(seed), tmp_path / "a.gguf", seed) for seed in refused]
    assert forced.count(False) > 0.8 * len(forced) > 5  # the texts do not meet every one


def test_the_place_of_the_pair_that_makes_a_word_counts() -> None:
    merges = [("a", "b"), ("c", "d"), ("b", "c"), ("a", "bc"), ("abc", "d"), ("ab", "c"), ("ab", "cd")]
    words = ["a", "ab", "bc", "abc", "cd", "abcd", "<s>"]
    assert pieces.compute_scores(words, {"<s>"}, merges) == [-7, 0, -2, -5, -1, -6, -7]


# ---------------------------------------------------------------- what is refused


def described(kind: str = "Llama's", **changes: Any) -> dict[str, Any]:
    found = json.loads(tokenizer(kind).backend_tokenizer.to_str())
    for key, value in changes.items():
        place = found["model"] if key in found["model"] else found
        place[key] = value
    return found


ODD: dict[str, Any] = {"id": 700, "content": "<odd>", "single_word": False, "lstrip": False, "rstrip": False,
                       "normalized": False, "special": False}


@pytest.mark.parametrize(("kind", "changes", "said"), [
    ("Llama's", {"ignore_merges": True}, "ignore_merges"), ("Llama's", {"dropout": 0.1}, "dropout"),
    ("Llama's", {"normalizer": None}, "spaces are not replaced"), ("Llama's", {"normalizer": {"type": "NFKC"}}, "NFKC"),
    ("Llama's", {"normalizer": {"type": "Prepend", "prepend": "▁"}}, "before a text"),
    ("Llama's", {"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
    ("Metaspace", {"normalizer": {"type": "Lowercase"}}, "Lowercase"),
    ("Llama's", {"added_tokens": [{**ODD, "normalized": True}]}, "matches '<odd>' after"),
    ("Gemma's", {"added_tokens": [{**ODD, "normalized": True, "content": "▁▁"}]}, "matches '▁▁' after"),
    ("Gemma's", {"added_tokens": [{**ODD, "rstrip": True}]}, "strips the spaces"),
    ("Gemma's", {"added_tokens": [{**ODD, "content": "ab"}, {**ODD, "content": "bc"}]}, "'ab' and 'bc' can overlap"),
    ("Gemma's", {"added_tokens": [{**ODD, "content": "b"}, {**ODD, "content": "abc", "normalized": True}]}, "'b' and 'abc'"),
])
def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(kind: str, changes: dict[str, Any], said: str) -> None:
    assert pieces.adds_space_prefix(described(kind)) == (kind == "Llama's")
    with pytest.raises(BaseError, match=said):
        pieces.adds_space_prefix(described(kind, **changes))


@llama
@pytest.mark.parametrize(("kind", "found", "text"), [
    ("Gemma's", {"ab": False, "bcd": False}, "abcd"), ("Gemma's", {"b": False, "abc": True}, "abc"),
    ("Llama's", {"<odd>": True}, "a<odd>")])
def test_and_the_refusal_of_words_cut_out_is_right(kind: str, found: dict[str, bool], text: str, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    words = tokenizer(kind)
    words.backend_tokenizer.add_tokens([AddedToken(word, normalized=late) for word, late in found.items()])
    with pytest.raises(BaseError, match=r"can overlap|matches .* after"):
        out.write_gguf(family(words), tmp_path / "a.gguf", "float32")
    monkeypatch.setattr(pieces, "adds_space_prefix", lambda described: kind == "Llama's")
    out.write_gguf(family(words), tmp_path / "a.gguf", "float32")
    with opened(tmp_path / "a.gguf") as opposite:
        assert opposite.tokenize(text.encode(), add_bos=True, special=True) != words(text).input_ids


def test_words_that_can_share_a_text_without_harm_are_none_to_refuse() -> None:
    runs = [{**ODD, "content": "\n" * k} for k in range(1, 5)]
    apart = [{**ODD, "content": word, "normalized": late} for word, late in (("abc", False), ("cd", False), ("xy", True))]
    assert pieces.adds_space_prefix(described("Gemma's", added_tokens=[*runs, *apart])) is False


@llama
@pytest.mark.parametrize("scheme", ["first", "always"])
def test_a_space_put_before_a_text_unless_one_is_there_is_refused(scheme: str, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "odd", (None, pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)))
    words = tokenizer("odd")
    with pytest.raises(BaseError, match="unless one is there"):
        out.write_gguf(family(words), tmp_path / "a.gguf", "float32")
    for before in (True, False):  # neither would do
        monkeypatch.setattr(pieces, "adds_space_prefix", lambda described, before=before: before)
        out.write_gguf(family(words), tmp_path / f"{before}.gguf", "float32")
        assert wrong(tmp_path / f"{before}.gguf", words)


@pytest.mark.parametrize(("missing", "said"), [("<0x7F>", "no token <0x7F>"), (None, "merges byte tokens")])
def test_bytes_must_be_whole_and_alone(missing: str | None, said: str, tmp_path: Path) -> None:
    found = described()
    if missing:
        found["model"]["vocab"]["another word"] = found["model"]["vocab"].pop(missing)
    else:
        found["model"]["vocab"]["<0x0A><0x0A>"] = VOCABULARY - 1
        found["model"]["merges"].append(["<0x0A>", "<0x0A>"])
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(found)), bos_token="<s>", eos_token="</s>")
    with pytest.raises(BaseError, match=said):
        out.write_gguf(family(words), tmp_path / "a.gguf", "float32")


# ---------------------------------------------------------------- as Transformers builds them


@llama
def test_transformers_own_gemma_tokenizer(tmp_path: Path) -> None:
    vocabulary, _ = trained()
    names = {"<unk>": "<unk>", "<s>": "<bos>", "</s>": "<eos>", "<|im_start|>": "<pad>", "<|im_end|>": "<mask>"}
    words = GemmaTokenizer(vocab={names.get(word, word): i for word, i in vocabulary.items()},
                           merges=generate_merges(vocabulary, {word: -float(i) for word, i in vocabulary.items()}))
    out.write_gguf(family(words), tmp_path / "a.gguf", "float32")
    assert wrong(tmp_path / "a.gguf", words) == []


def test_transformers_own_llama_tokenizer_is_refused_unless_told_to_put_no_space(tmp_path: Path) -> None:
    vocabulary, merges = trained()
    with pytest.raises(BaseError, match="before the first words of a text unless"):
        out.write_gguf(family(LlamaTokenizer(vocab=vocabulary, merges=merges)), tmp_path / "a.gguf")
    out.write_gguf(family(LlamaTokenizer(vocab=vocabulary, merges=merges, add_prefix_space=False)), tmp_path / "a.gguf")
