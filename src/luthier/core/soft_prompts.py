"""The protocol for inserting virtual tokens (soft prompts, prefixes) into a model. Read `protocols.py`
(ModelStructure)
first.

Each family implements it for its own kind of input; `ModelStructure.injector` holds the implementation.

Shape letters: N virtual tokens, D hidden size, G key-value heads of width d.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

from torch import Tensor

from luthier.core.adapter_gate import AdapterGate

SoftPromptKind = Literal["prompt", "prefix"]


class SoftPromptInjector(Protocol):
    """Inserts virtual tokens into a model. They are computed again in every forward pass, so that they can train. The
    states of virtual tokens are removed from the model's output. A method's `AdapterGate` enables and disables them."""

    @property
    def typical_embeddings(self) -> Callable[[int, int], Tensor] | None:
        """For a base without a vocabulary, `typical_embeddings(n, seed) -> [n, D]`: vectors that are typical inputs of
        its first layer, to initialize virtual tokens. None: they are initialized from token embeddings."""
        ...

    @property
    def peft_kinds(self) -> frozenset[SoftPromptKind]:
        """The kinds for which PEFT computes the same outputs with this base, so that its format can be used."""
        ...

    def add_prompt(self, make: Callable[[], Tensor], gate: AdapterGate) -> None:
        """`make() -> [N, D]`: N virtual tokens before every document that the gate selects, computed once per row."""
        ...

    def add_prefix(self, make: Callable[[], Sequence[tuple[Tensor, Tensor]]], gate: AdapterGate) -> None:
        """`make()` returns one (keys, values) pair for each attention of the model, each [G, N, d]. Every token of the
        documents that the gate selects attends to them, as to N tokens before the text; positions increase by N."""
        ...

    def compute_keys_values(self, start: Sequence[int] | Tensor) -> list[tuple[Tensor, Tensor]]:
        """The base's keys and values, [G, N, d] each, of some tokens (token ids, or [N, D] `typical_embeddings`), for
        each attention: an initialization for `add_prefix`."""
        ...

    def compute_first_layer_keys(self, ids: Sequence[int], place: int) -> Tensor:
        """[n, G d] The first layer's key of each of n tokens, each at position `place` of its own text."""
        ...
