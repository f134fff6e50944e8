"""A tokenizer as llama.cpp reads it: the words, their kinds, the merges, and how text is split before merging.

llama.cpp does not read how a tokenizer splits text; it knows some ways by name. So that it never splits otherwise than
the tokenizer that trained, the way is read off `tokenizer.json` and must be one of `SPLITS`. `gguf_out.py` goes on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import gguf

from luthier.core.errors import BaseError

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS, REST = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}", r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2, DIGITS = "as GPT-2", "each digit alone"
# (the splits one after another, whether a whole word of the vocabulary needs no merges) -> llama.cpp's name for it.
SPLITS: Mapping[tuple[tuple[str, ...], bool], str] = {
    ((GPT2,), False): "gpt-2",
    ((DIGITS, GPT2), False): "smollm",
    ((CONTRACTIONS + WORDS + REST,), False): "qwen2",
    ((CONTRACTIONS + WORDS + "{1,3}" + REST,), False): "smaug-bpe",
    ((CONTRACTIONS + WORDS + "{1,3}" + REST,), True): "llama-bpe",
}
REMEDY = "export with --to merged and give the folder to llama.cpp's own converter"


def write_words(writer: gguf.GGUFWriter, tokenizer: Any, size: int, ends: set[int], bos: int | None) -> None:
    """Add everything about the tokenizer to the file's metadata.

    NFC, which some tokenizers apply to a text first, is not known to llama.cpp: there text must come composed.

    Args:
        size: rows of the embedding; words are made up for those that the tokenizer leaves unused.
        ends: the tokens that end an answer.
        bos: the first token of a text, where the tokenizer has none of its own.

    Raises:
        BaseError: llama.cpp would make other tokens of a text, or none; the error says why.
    """
    if not tokenizer.is_fast:
        raise BaseError("the base's tokenizer has no tokenizer.json, so nobody knows how it splits", REMEDY)
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model, added = described["model"], described["added_tokens"]
    pre = split_name(described)
    words, kinds = _words(model["vocab"], added, size)
    writer.add_tokenizer_model("gpt2")  # llama.cpp's name for byte-level BPE
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]])
    _ends(writer, tokenizer, ends, bos)
    starts, closes = _around(tokenizer)
    writer.add_add_bos_token(starts)
    writer.add_add_eos_token(closes)
    writer.add_add_space_prefix(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def split_name(described: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer splits text. Raises `BaseError` where it has none.

    Args:
        described: the content of tokenizer.json.
    """
    model = described["model"]
    strange = [key for key in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout")
               if model.get(key)]
    if model.get("type") != "BPE" or strange:
        raise BaseError(f"the tokenizer is {model.get('type')}{f' with {strange[0]}' if strange else ''}, and only "
                        "byte-level BPE can be written", REMEDY)
    if not model["merges"]:
        raise BaseError("the tokenizer has no merges, and llama.cpp loads no BPE without them", "use another base")
    normalizer = (described.get("normalizer") or {}).get("type", "NFC")
    if normalizer != "NFC":
        raise BaseError(f"the tokenizer changes text first ({normalizer}), and llama.cpp would not", REMEDY)
    odd = [t["content"] for t in described["added_tokens"] if t["lstrip"] or t["rstrip"] or t["single_word"]]
    if odd:
        raise BaseError(f"the token {odd[0]!r} takes the spaces around it, or whole words alone, and llama.cpp's would "
                        "not", REMEDY)
    splits = tuple(_splits(described.get("pre_tokenizer") or {}))
    found = SPLITS.get((splits, bool(model.get("ignore_merges"))))
    if found is None:
        raise BaseError(f"the tokenizer splits text in a way that is not known here by llama.cpp's name: "
                        f"{'; '.join(splits) or 'not at all'}", REMEDY)
    return found


def _splits(step: Mapping[str, Any]) -> list[str]:
    """The splits that a pre-tokenizer makes, one after another; what is unknown stands there by its kind."""
    kind = step.get("type")
    if kind is None:
        return []
    if kind == "Sequence":
        return [split for inner in step["pretokenizers"] for split in _splits(inner)]
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return [GPT2] if step.get("use_regex", True) else []
    if kind == "Digits" and step.get("individual_digits"):
        return [DIGITS]
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return [str(step["pattern"].get("Regex"))]
    return [f"{kind} {json.dumps({key: value for key, value in step.items() if key != 'type'})}"]


def _words(vocabulary: Mapping[str, int], added: list[Mapping[str, Any]], size: int) -> tuple[list[str], list[int]]:
    """Every token's word and kind, by its id."""
    words = [f"[PAD{i}]" for i in range(size)]
    kinds = [int(gguf.TokenType.UNUSED)] * size
    last = max([*vocabulary.values(), *(token["id"] for token in added)])
    if last >= size:
        raise BaseError(f"the tokenizer has a token {last}, and the base an embedding of {size} rows",
                        "give the base its own tokenizer")
    for word, i in vocabulary.items():
        words[i], kinds[i] = word, int(gguf.TokenType.NORMAL)
    for token in added:
        words[token["id"]] = token["content"]
        kinds[token["id"]] = int(gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED)
    return words, kinds


def _ends(writer: gguf.GGUFWriter, tokenizer: Any, ends: set[int], bos: int | None) -> None:
    """The tokens with a task. llama.cpp takes token 11 for those that are not named, so a start is always named."""
    if not ends:
        raise BaseError("the base has no token that ends a text, and llama.cpp would take another word for it",
                        "give its tokenizer an eos_token")
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else min(ends)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else bos
    writer.add_eos_token_id(eos)
    writer.add_bos_token_id(eos if start is None else start)
    for token in sorted(ends - {eos})[:1]:  # of further ones llama.cpp knows the usual words by itself
        writer.add_eot_token_id(token)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)


def _around(tokenizer: Any) -> tuple[bool, bool]:
    """Whether the tokenizer puts its first token before a text, and its last behind."""
    bare = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    for starts in (False, True):
        for closes in (False, True):
            if whole == [tokenizer.bos_token_id] * starts + bare + [tokenizer.eos_token_id] * closes:
                return starts, closes
    raise BaseError(f"the tokenizer writes 'a' as {tokenizer.convert_ids_to_tokens(whole)}, and llama.cpp can only put "
                    "bos before and eos behind", REMEDY)
