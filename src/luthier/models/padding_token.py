"""A padding token for decoders that represent a text by the state of its last token that is not padding.

Transformers finds that token by its id, so the padding token must be different from all tokens that end a text. Many
decoders pad with eos: the class would then use the state before eos.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

NUL_TOKENS = ("\u0100", "<0x00>")  # the byte 0, which no text contains, in byte-level and SentencePiece vocabularies


def make_padding_tokenizer(tokenizer: Any, ends: Iterable[int]) -> Any:
    """A copy of the tokenizer that pads on the right, with a token that ends no text; if there is none, its own.

    Args:
        ends: tokens that may end a text.
    """
    made = copy.deepcopy(tokenizer)
    made.padding_side = "right"
    taken = {*ends, *tokenizer("a", verbose=False)["input_ids"][-1:]}
    for token in _list_candidates(made):
        found = made.convert_tokens_to_ids(token)
        if found is not None and found not in taken and made.convert_ids_to_tokens(found) == token:
            if made.pad_token != token:
                made.pad_token = token
            break
    return made


def _list_candidates(tokenizer: Any) -> Iterator[str]:
    template = str(tokenizer.chat_template or "")
    yield from (str(token) for token in (tokenizer.pad_token, tokenizer.unk_token) if token)
    yield from (token for token in sorted(tokenizer.get_added_vocab())
                if token not in template and token not in (tokenizer.bos_token, tokenizer.eos_token))
    yield from NUL_TOKENS


def make_embedding_tokenizer(tokenizer: Any) -> Any:
    """A copy that pads on the right with any token: text embeddings use the attention mask."""
    made = copy.deepcopy(tokenizer)
    made.padding_side = "right"
    made.pad_token = made.pad_token or made.eos_token or made.unk_token
    return made
