"""Writes a byte-level BPE tokenizer for llama.cpp: tokens, token types, merges, and the pre-tokenizer's name.

llama.cpp does not read a pre-tokenizer's rules; it knows some pre-tokenizers by name. To make sure that it splits text
like the trained tokenizer, the rules in `tokenizer.json` must equal one of `PRETOKENIZERS`. The other kind of tokenizer
is in `gguf/sentencepiece.py`, the common parts in `gguf/vocab.py`. `gguf/writer.py` continues.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import gguf

from luthier.core.errors import BaseError
from luthier.models.gguf.sentencepiece import write_sentencepiece
from luthier.models.gguf.vocab import REMEDY, build_token_table, check_added_tokens, write_special_tokens

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS, REST = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}", r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2, DIGITS = "as GPT-2", "each digit alone"
# (the splits in order, whether whole words of the vocabulary skip the merges) -> llama.cpp's name of the pre-tokenizer.
PRETOKENIZERS: Mapping[tuple[tuple[str, ...], bool], str] = {
    ((GPT2,), False): "gpt-2",
    ((DIGITS, GPT2), False): "smollm",
    ((CONTRACTIONS + WORDS + REST,), False): "qwen2",
    ((CONTRACTIONS + WORDS + "{1,3}" + REST,), False): "smaug-bpe",
    ((CONTRACTIONS + WORDS + "{1,3}" + REST,), True): "llama-bpe",
}


def write_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, size: int, ends: set[int], bos: int | None) -> None:
    """Add the tokenizer to the file's metadata.

    llama.cpp does not apply NFC normalization, which some tokenizers apply first: text must be given in NFC.

    Args:
        size: number of embedding rows; rows without a token get placeholder tokens.
        ends: the eos tokens.
        bos: the bos token, if the tokenizer has none.

    Raises:
        BaseError: llama.cpp would tokenize text differently; the error names the reason.
    """
    if not tokenizer.is_fast:
        raise BaseError("the base's tokenizer has no tokenizer.json, so its pre-tokenizer is unknown", REMEDY)
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    if model.get("type") == "BPE" and model.get("byte_fallback"):
        write_sentencepiece(writer, described, size)
    else:
        pre = get_pretokenizer_name(described)
        words, kinds = build_token_table(model["vocab"], described["added_tokens"], size)
        writer.add_tokenizer_model("gpt2")  # llama.cpp's name for byte-level BPE
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(words)
        writer.add_token_types(kinds)
        writer.add_token_merges([" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]])
        writer.add_add_space_prefix(False)
    write_special_tokens(writer, tokenizer, ends, bos)


def get_pretokenizer_name(described: Mapping[str, Any]) -> str:
    """llama.cpp's name of a tokenizer's pre-tokenizer. Raises `BaseError` if it has none.

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
        raise BaseError("the tokenizer has no merges, which llama.cpp needs for BPE", "use another base")
    normalizer = (described.get("normalizer") or {}).get("type", "NFC")
    if normalizer != "NFC":
        raise BaseError(f"the tokenizer normalizes text ({normalizer}), which llama.cpp does not do", REMEDY)
    check_added_tokens(described["added_tokens"])
    splits = tuple(_list_splits(described.get("pre_tokenizer") or {}))
    found = PRETOKENIZERS.get((splits, bool(model.get("ignore_merges"))))
    if found is None:
        raise BaseError(f"llama.cpp has no name for the tokenizer's pre-tokenizer: "
                        f"{'; '.join(splits) or 'no split'}", REMEDY)
    return found


def _list_splits(step: Mapping[str, Any]) -> list[str]:
    """The splits of a pre-tokenizer in order; an unknown one as its JSON."""
    kind = step.get("type")
    if kind is None:
        return []
    if kind == "Sequence":
        return [split for inner in step["pretokenizers"] for split in _list_splits(inner)]
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return [GPT2] if step.get("use_regex", True) else []
    if kind == "Digits" and step.get("individual_digits"):
        return [DIGITS]
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return [str(step["pattern"].get("Regex"))]
    return [f"{kind} {json.dumps({key: value for key, value in step.items() if key != 'type'})}"]
