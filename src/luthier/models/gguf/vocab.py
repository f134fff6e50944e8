"""The parts of a GGUF tokenizer common to all tokenizers: token list, token types, special tokens, added tokens.

`gguf/bpe.py` and `gguf/sentencepiece.py` use it for the two kinds of tokenizers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gguf

from luthier.core.errors import BaseError

REMEDY = "export with --to merged and give the folder to llama.cpp's own converter"


def build_token_table(vocabulary: Mapping[str, int], added: Sequence[Mapping[str, Any]],
                      size: int) -> tuple[list[str],
                                                                                                             list[int]]:
    """Every token's text and type, by its id. `size` is the number of embedding rows; rows without a token are
    unused."""
    words = [f"[PAD{i}]" for i in range(size)]
    kinds = [int(gguf.TokenType.UNUSED)] * size
    last = max([*vocabulary.values(), *(token["id"] for token in added)])
    if last >= size:
        raise BaseError(f"the tokenizer has a token {last}, and the base an embedding of {size} rows",
                        "use the tokenizer that belongs to the base")
    for word, i in vocabulary.items():
        words[i], kinds[i] = word, int(gguf.TokenType.NORMAL)
    for token in added:
        words[token["id"]] = token["content"]
        kinds[token["id"]] = int(gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED)
    return words, kinds


def check_added_tokens(added: Sequence[Mapping[str, Any]]) -> None:
    """Raise `BaseError` for added tokens that llama.cpp would match in other places of a text than the tokenizer."""
    odd = [t["content"] for t in added if t["lstrip"] or t["rstrip"] or t["single_word"]]
    if odd:
        raise BaseError(f"the token {odd[0]!r} strips the spaces around it, or matches whole words only, which "
                        "llama.cpp does not do", REMEDY)
    pair = _find_ambiguous_tokens({t["content"].encode(): t["normalized"] for t in added})
    if pair is not None:
        raise BaseError(f"the tokens {pair[0]!r} and {pair[1]!r} can overlap in a text, where llama.cpp would match "
                        "the other one", REMEDY)


def _find_ambiguous_tokens(late: Mapping[bytes, bool]) -> tuple[str, str] | None:
    """Two overlapping tokens of which the tokenizer matches the first and llama.cpp the second.

    A tokenizer matches the leftmost token, of these the longest, and tokens that are matched in the normalized text
    (`late`) only in what the others left. llama.cpp matches the longest token anywhere.
    """
    starts: dict[bytes, list[bytes]] = {}
    for word in late:
        for k in range(1, len(word)):
            starts.setdefault(word[:k], []).append(word)
    for left in late:
        for k in range(1, len(left)):
            for right in starts.get(left[-k:], ()):
                taken, other = (right, left) if late[left] and not late[right] else (left, right)
                # For repetitions of one character, the longest match is also the leftmost.
                alike = late[left] == late[right] and len({*left, *right}) == 1
                if left != right and len(other) >= len(taken) and not alike:
                    return taken.decode(), other.decode()
    first = [word for word in late if not late[word]]
    inside = ((word.decode(), whole.decode()) for whole in late if late[whole] for word in first if word in whole)
    return next(inside, None)


def write_special_tokens(writer: gguf.GGUFWriter, tokenizer: Any, ends: set[int], bos: int | None) -> None:
    """Write the special tokens, which of them are added around a text, and the chat template.

    llama.cpp uses default tokens for bos and eos if they are not set, so both are always set.
    """
    if not ends:
        raise BaseError("the base has no eos token, and llama.cpp would use another token for it",
                        "give its tokenizer an eos_token")
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else min(ends)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else bos
    writer.add_eos_token_id(eos)
    writer.add_bos_token_id(eos if start is None else start)
    for token in sorted(ends - {eos})[:1]:  # llama.cpp detects the common names of further ones
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
    """Whether the tokenizer adds bos before a text, and eos after it."""
    bare = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    for starts in (False, True):
        for closes in (False, True):
            if whole == [tokenizer.bos_token_id] * starts + bare + [tokenizer.eos_token_id] * closes:
                return starts, closes
    raise BaseError(f"the tokenizer writes 'a' as {tokenizer.convert_ids_to_tokens(whole)}, and llama.cpp can only add "
                    "bos before and eos after it", REMEDY)
