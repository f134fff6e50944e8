"""A SentencePiece tokenizer as llama.cpp reads it: BPE over characters, '▁' for a space, bytes for characters unknown.

Read `models/gguf/bpe.py` first, which has the other kind. The two programs join words by different rules. Tokenizers
joins
the two neighbours whose pair stands first in its list of merges. llama.cpp joins those whose joined text has the
highest score, and any two that together are a word. They come to the same where a word's score is minus the place of
the pair that makes it. For the text of a word, taken alone, is joined in one order only, and in that order inside any
longer text too, as long as nothing is joined across its borders. So wherever a word's last two parts stand side by
side, they are the same two, with the same place in the list. What is left are words that no merge makes of their own
text: where such a text ends as two parts, llama.cpp alone would join them, and the tokenizer is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import gguf

from luthier.core.errors import BaseError
from luthier.models.gguf.vocab import REMEDY, build_token_table, check_added_tokens

SPACE = "▁"
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
REPLACE, PREPEND = "' ' -> '▁'", "'▁' before a text"
# What is done to a text -> whether llama.cpp is told to put a space before it.
NORMALIZERS: Mapping[tuple[str, ...], bool] = {(REPLACE,): False, (PREPEND, REPLACE): True, (REPLACE, PREPEND): True}

Ranks = Mapping[tuple[str, str], int]


def write_sentencepiece(writer: gguf.GGUFWriter, described: Mapping[str, Any], size: int) -> None:
    """Add words, kinds and scores to the file's metadata.

    Added tokens of several '▁' (Gemma's) are not looked for where a text holds that letter itself.

    Args:
        described: the content of tokenizer.json.
        size: rows of the embedding.

    Raises:
        BaseError: llama.cpp would make other tokens of a text; the error says why.
    """
    model, added = described["model"], described["added_tokens"]
    before = adds_space_prefix(described)
    words, kinds = build_token_table(model["vocab"], added, size)
    missing = [word for word in BYTES if word not in model["vocab"]]
    if missing:
        raise BaseError(f"the tokenizer has no token {missing[0]} for one of the bytes", REMEDY)
    for word in BYTES:
        kinds[model["vocab"][word]] = int(gguf.TokenType.BYTE)
    for token in added:
        if token["content"] == model.get("unk_token"):
            kinds[token["id"]] = int(gguf.TokenType.UNKNOWN)
        elif SPACE in token["content"] and not token["special"]:  # else it is shown as it stands
            kinds[token["id"]] = int(gguf.TokenType.NORMAL)
    apart = {token["content"] for token in added if SPACE not in token["content"]}
    writer.add_tokenizer_model("llama")  # llama.cpp's name for SentencePiece
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_scores(compute_scores(words, apart, model["merges"]))
    writer.add_token_types(kinds)
    writer.add_add_space_prefix(before)


def adds_space_prefix(described: Mapping[str, Any]) -> bool:
    """Whether a text, and what follows a special token, gets a space before it. Raises `BaseError` where llama.cpp has
    no word for what the tokenizer does to a text.

    Args:
        described: the content of tokenizer.json.
    """
    model, added = described["model"], described["added_tokens"]
    strange = [key for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout", "ignore_merges")
               if model.get(key)]
    if strange:
        raise BaseError(f"the tokenizer is BPE with byte_fallback and {strange[0]}, and llama.cpp's has none", REMEDY)
    check_added_tokens(added)
    done = tuple(_list_normalizers(described.get("normalizer") or {}))
    step = described.get("pre_tokenizer") or {}
    if step.get("type") == "Metaspace" and step.get("replacement") == SPACE and not step.get("split", True):
        if step["prepend_scheme"] != "never":
            where = "every text" if step["prepend_scheme"] == "always" else "the first words of a text"
            raise BaseError(f"the tokenizer puts a space before {where} unless one is there (Metaspace); llama.cpp "
                            "would put one there too, and behind every special token", REMEDY)
        done = done or (REPLACE,)
    elif step and not (step.get("type") == "Split" and step["pattern"] == {"String": " "} and REPLACE in done):
        raise BaseError(f"the tokenizer splits text first ({json.dumps(step, ensure_ascii=False)[:200]}), and "
                        "llama.cpp would not", REMEDY)
    if done not in NORMALIZERS:
        raise BaseError(f"the tokenizer changes text first, and llama.cpp would do it otherwise: "
                        f"{'; '.join(done) or 'spaces stay spaces'}", REMEDY)
    before = NORMALIZERS[done]
    late = [token["content"] for token in added if token["normalized"] and (before or SPACE in token["content"])]
    if late:
        raise BaseError(f"the tokenizer looks for {late[0]!r} after it has changed the spaces of a text, and llama.cpp "
                        "would before", REMEDY)
    return before


def _list_normalizers(step: Mapping[str, Any]) -> list[str]:
    """What a normalizer does to a text, one after another; what is unknown stands there as it is described."""
    kind = step.get("type")
    if kind is None:
        return []
    if kind == "Sequence":
        return [done for inner in step["normalizers"] for done in _list_normalizers(inner)]
    if kind == "Replace" and step["pattern"] == {"String": " "} and step["content"] == SPACE:
        return [REPLACE]
    if kind == "Prepend" and step["prepend"] == SPACE:
        return [PREPEND]
    return [json.dumps(step, ensure_ascii=False)[:200]]


def compute_scores(words: Sequence[str], apart: set[str], merges: Sequence[Sequence[str] | str]) -> list[float]:
    """Each word's score: minus the place, in the list of merges, of the pair that makes it.

    Args:
        apart: words that are cut out of a text before anything is joined.

    Raises:
        BaseError: llama.cpp would join two neighbours that the tokenizer leaves apart.
    """
    pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
    if any(part in BYTES for pair in pairs for part in pair):
        raise BaseError("the tokenizer merges bytes of unknown characters, and llama.cpp would not", REMEDY)
    ranks: Ranks = {(left, right): place for place, (left, right) in enumerate(pairs)}
    found = []
    for word in words:
        parts = [] if word in apart else apply_merges(word, ranks)
        if len(parts) == 2 and (parts[0], parts[1]) not in ranks:
            raise BaseError(f"no merge makes the word {word!r}, and llama.cpp would join {parts[0]!r} and {parts[1]!r} "
                            "to it", REMEDY)
        found.append(-float(ranks[parts[0], parts[1]] if len(parts) == 2 else len(pairs)))
    return found


def apply_merges(word: str, ranks: Ranks) -> list[str]:
    """The text of a word as merges leave it when two parts are left of it; more parts where they end before."""
    parts = list(word)
    while len(parts) > 2:
        place, i = min(((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(pairwise(parts))))
        if place == len(ranks):
            break
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts
