"""Writes a SentencePiece tokenizer for llama.cpp: BPE over characters, '▁' for a space, bytes for unknown characters.

Read `gguf/bpe.py` first, which has the other kind. The two programs merge tokens by different rules. The tokenizers
library merges the two neighbors whose pair comes first in its list of merges. llama.cpp merges the neighbors whose
result has the highest score, and any two whose concatenation is a token.

Both give the same result if a token's score is minus the rank of the pair that produces it. The text of a token is
merged in one order only, and in the same order inside any longer text, as long as nothing is merged across its borders.
So wherever the last two parts of a token are neighbors, they are the same pair, with the same rank.

What remains are tokens that no merge produces from their own text. If such a text ends as two parts, llama.cpp alone
would merge them, and the tokenizer is rejected.
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
# The normalization of a text -> whether llama.cpp's add_space_prefix is set.
NORMALIZERS: Mapping[tuple[str, ...], bool] = {(REPLACE,): False, (PREPEND, REPLACE): True, (REPLACE, PREPEND): True}

Ranks = Mapping[tuple[str, str], int]


def write_sentencepiece(writer: gguf.GGUFWriter, described: Mapping[str, Any], size: int) -> None:
    """Add tokens, token types and scores to the file's metadata.

    Added tokens of several '▁' (Gemma's) are not matched where a text contains that character itself.

    Args:
        described: the content of tokenizer.json.
        size: number of embedding rows.

    Raises:
        BaseError: llama.cpp would tokenize text differently; the error names the reason.
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
        elif SPACE in token["content"] and not token["special"]:  # otherwise it is shown unchanged
            kinds[token["id"]] = int(gguf.TokenType.NORMAL)
    added_texts = {token["content"] for token in added if SPACE not in token["content"]}
    writer.add_tokenizer_model("llama")  # llama.cpp's name for SentencePiece
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_scores(compute_scores(words, added_texts, model["merges"]))
    writer.add_token_types(kinds)
    writer.add_add_space_prefix(before)


def adds_space_prefix(described: Mapping[str, Any]) -> bool:
    """Whether a space is added before a text, and after a special token. Raises `BaseError` if llama.cpp has no setting
    for the tokenizer's normalization.

    Args:
        described: the content of tokenizer.json.
    """
    model, added = described["model"], described["added_tokens"]
    strange = [key for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout", "ignore_merges")
               if model.get(key)]
    if strange:
        raise BaseError(f"the tokenizer is BPE with byte_fallback and {strange[0]}, which llama.cpp does not "
                        f"support",
                        REMEDY)
    check_added_tokens(added)
    done = tuple(_list_normalizers(described.get("normalizer") or {}))
    step = described.get("pre_tokenizer") or {}
    if step.get("type") == "Metaspace" and step.get("replacement") == SPACE and not step.get("split", True):
        if step["prepend_scheme"] != "never":
            where = "every text" if step["prepend_scheme"] == "always" else "the first words of a text"
            raise BaseError(f"the tokenizer adds a space before {where} unless one is there (Metaspace); llama.cpp "
                            "adds one in any case, and after every special token", REMEDY)
        done = done or (REPLACE,)
    elif step and not (step.get("type") == "Split" and step["pattern"] == {"String": " "} and REPLACE in done):
        raise BaseError(f"the tokenizer splits text first ({json.dumps(step, ensure_ascii=False)[:200]}), which "
                        "llama.cpp does not do", REMEDY)
    if done not in NORMALIZERS:
        raise BaseError(f"the tokenizer normalizes text in a way that llama.cpp does not support: "
                        f"{'; '.join(done) or 'spaces are not replaced'}", REMEDY)
    before = NORMALIZERS[done]
    late = [token["content"] for token in added if token["normalized"] and (before or SPACE in token["content"])]
    if late:
        raise BaseError(f"the tokenizer matches {late[0]!r} after it has replaced the spaces of a text, but "
                        "llama.cpp before", REMEDY)
    return before


def _list_normalizers(step: Mapping[str, Any]) -> list[str]:
    """The steps of a normalizer in order; an unknown one as its JSON."""
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


def compute_scores(words: Sequence[str], added_texts: set[str], merges: Sequence[Sequence[str] | str]) -> list[float]:
    """Each token's score: minus the rank, in the list of merges, of the pair that produces it.

    Args:
        added_texts: added tokens, which are matched before anything is merged.

    Raises:
        BaseError: llama.cpp would merge two neighbors that the tokenizer does not merge.
    """
    pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
    if any(part in BYTES for pair in pairs for part in pair):
        raise BaseError("the tokenizer merges byte tokens, which llama.cpp does not do", REMEDY)
    ranks: Ranks = {(left, right): place for place, (left, right) in enumerate(pairs)}
    found = []
    for word in words:
        parts = [] if word in added_texts else apply_merges(word, ranks)
        if len(parts) == 2 and (parts[0], parts[1]) not in ranks:
            raise BaseError(f"no merge produces the token {word!r}, but llama.cpp would merge {parts[0]!r} and "
                            f"{parts[1]!r} to it", REMEDY)
        found.append(-float(ranks[parts[0], parts[1]] if len(parts) == 2 else len(pairs)))
    return found


def apply_merges(word: str, ranks: Ranks) -> list[str]:
    """The parts of a token's text after all merges, stopping at two parts."""
    parts = list(word)
    while len(parts) > 2:
        place, i = min(((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(pairwise(parts))))
        if place == len(ranks):
            break
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts
