"""What every tokenizer's part of a GGUF file has: words and their kinds, tokens with a task, words cut out of a text.

`models/gguf/bpe.py` and `models/gguf/sentencepiece.py` write the two kinds of tokenizers with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gguf

from luthier.core.errors import BaseError

REMEDY = "export with --to merged and give the folder to llama.cpp's own converter"


def build_token_table(vocabulary: Mapping[str, int], added: Sequence[Mapping[str, Any]], size: int) -> tuple[list[str],
                                                                                                             list[int]]:
    """Every token's word and kind, by its id; `size` rows of the embedding, those without a word unused."""
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


def check_added_tokens(added: Sequence[Mapping[str, Any]]) -> None:
    """Refuse added tokens that llama.cpp would not find in a text where the tokenizer finds them."""
    odd = [t["content"] for t in added if t["lstrip"] or t["rstrip"] or t["single_word"]]
    if odd:
        raise BaseError(f"the token {odd[0]!r} takes the spaces around it, or whole words alone, and llama.cpp's would "
                        "not", REMEDY)
    pair = _find_ambiguous_tokens({t["content"].encode(): t["normalized"] for t in added})
    if pair is not None:
        raise BaseError(f"the tokens {pair[0]!r} and {pair[1]!r} can share a part of a text, and llama.cpp would take "
                        "the other one there", REMEDY)


def _find_ambiguous_tokens(late: Mapping[bytes, bool]) -> tuple[str, str] | None:
    """Two tokens for one part of a text of which the tokenizer takes the first and llama.cpp the second.

    A tokenizer takes the leftmost, of these the longest, and those that are looked for in the normalised text (`late`)
    only in what the others left. llama.cpp takes the longest wherever it is.
    """
    starts: dict[bytes, list[bytes]] = {}
    for word in late:
        for k in range(1, len(word)):
            starts.setdefault(word[:k], []).append(word)
    for left in late:
        for k in range(1, len(left)):
            for right in starts.get(left[-k:], ()):
                taken, other = (right, left) if late[left] and not late[right] else (left, right)
                # Of runs of one character the longest is leftmost too.
                alike = late[left] == late[right] and len({*left, *right}) == 1
                if left != right and len(other) >= len(taken) and not alike:
                    return taken.decode(), other.decode()
    first = [word for word in late if not late[word]]
    inside = ((word.decode(), whole.decode()) for whole in late if late[whole] for word in first if word in whole)
    return next(inside, None)


def write_special_tokens(writer: gguf.GGUFWriter, tokenizer: Any, ends: set[int], bos: int | None) -> None:
    """The tokens with a task, what stands around a text, and the chat template.

    llama.cpp takes tokens of its own choice for a start and an end that are not named, so both always are.
    """
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
    starts, closes = _detect_added_tokens(tokenizer)
    writer.add_add_bos_token(starts)
    writer.add_add_eos_token(closes)
    if tokenizer.chat_template:
        given = tokenizer.chat_template
        writer.add_chat_template([{"name": name, "template": source} for name, source in given.items()]
                                 if isinstance(given, Mapping) else given)


def _detect_added_tokens(tokenizer: Any) -> tuple[bool, bool]:
    """Whether the tokenizer puts its first token before a text, and its last behind."""
    bare = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    for starts in (False, True):
        for closes in (False, True):
            if whole == [tokenizer.bos_token_id] * starts + bare + [tokenizer.eos_token_id] * closes:
                return starts, closes
    raise BaseError(f"the tokenizer writes 'a' as {tokenizer.convert_ids_to_tokens(whole)}, and llama.cpp can only put "
                    "bos before and eos behind", REMEDY)
