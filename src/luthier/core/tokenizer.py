"""The parts of a tokenizer that this package uses. Nothing simpler to read first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Tokenizer(Protocol):
    """The parts of a Transformers tokenizer that this package uses."""

    eos_token: str | None
    eos_token_id: int | None
    bos_token_id: int | None
    unk_token_id: int | None
    mask_token_id: int | None
    all_special_ids: list[int]
    chat_template: Any  # Jinja source, or several by name; None if it has none
    added_tokens_decoder: Any  # id -> a token that is matched in the text before tokenization
    is_fast: bool  # whether it can map tokens to character offsets

    def __len__(self) -> int: ...
    def __hash__(self) -> int: ...
    def __call__(self, text: str, **options: Any) -> Any: ...
    def convert_tokens_to_ids(self, tokens: str) -> Any: ...
    def decode(self, ids: Sequence[int], **options: Any) -> str: ...
    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> Any: ...
