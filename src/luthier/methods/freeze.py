"""Training a part of the base's own weights: some blocks, some names, the embeddings, the head; or the norms alone.

Read `full.py` first: these are full fine-tuning with the rest held still. Where the base is to be switched back to, a
copy of just the chosen weights is kept. The run folder holds the whole model, as that of full fine-tuning does.

`freeze`, learning rate 5e-4: fewer weights must reach the same change as all of them, on top of a stack that stands
still, so each may move further than under full fine-tuning (2e-5); it stays below LoRA's, since these are real weights.

`ln_tuning`, learning rate 1e-3: a norm's weight is about one in size, and Adam moves it by about the rate in a step; a few
hundred steps at 1e-3 stretch a feature by some ten percent. Smaller rates leave a thousandth of the model's weights
with nothing to say. Norms alone: Zhao et al. 2023 (arXiv:2312.11420); in convolutional networks, Frankle et al. 2020
(2003.00152).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from luthier.core.config import Config
from luthier.core.errors import RecipeError
from luthier.core.protocols import Anatomy
from luthier.methods.full import EMBEDDING_LR_HELP, KEEP_BASE_HELP, Full, scale_embedding_lr


class FreezeConfig(Config):
    """Which part of the base trains: all that any of these settings names. Nothing named: the last two blocks."""

    default_learning_rate: ClassVar[float] = 5e-4

    name: Literal["freeze"] = "freeze"
    num_trainable_layers: int | None = Field(None, ge=1, description="the last so many blocks; 2 where nothing at all is chosen")
    layers: tuple[int, int] | None = Field(None, description="blocks from the first to the second number, both "
                                                             "included; negative ones count from the end")
    patterns: tuple[str, ...] = Field((), description="parameters by their names: whole parts between dots "
                                                      "(mlp.down_proj), or expressions that fit a whole name")
    embeddings: bool = Field(False, description="the input embeddings (and with them a head that shares their weight)")
    embedding_lr_multiplier: float = Field(1.0, gt=0, description=EMBEDDING_LR_HELP)
    head: bool = Field(False, description="the output projection (and with it embeddings that share its weight)")
    keep_base: bool | None = Field(None, description=KEEP_BASE_HELP)

    @property
    def num_trained_layers(self) -> int | None:
        """`last`, or what it is where nothing at all is chosen."""
        chosen = self.layers is not None or self.patterns or self.embeddings or self.head
        return self.num_trainable_layers if self.num_trainable_layers is not None or chosen else 2

    def attach(self, anatomy: Anatomy, *, seed: int) -> Full:
        wanted = {id(p) for module in self._modules(anatomy) for p in module.parameters()}
        named = dict(anatomy.model.named_parameters())  # tied weights are named once
        for pattern in self.patterns:
            found = {id(p) for name, p in named.items() if matches_name(name, pattern)}
            if not found:
                raise RecipeError(f"method.patterns: {pattern!r} fits no parameter of this model",
                                  "use parts of their names, such as: " + ", ".join(sorted(
                                      {name.removesuffix(".weight").rsplit(".", 1)[-1] for name in named})[:12]))
            wanted |= found
        trained = {name: p for name, p in named.items() if id(p) in wanted}
        return Full(trained, bool(self.keep_base), scale_embedding_lr(anatomy, trained, self.embedding_lr_multiplier))

    def _modules(self, anatomy: Anatomy) -> Iterable[nn.Module]:
        blocks = [block.module for block in anatomy.blocks]
        last = self.num_trained_layers or 0
        if last > len(blocks) and self.num_trainable_layers is not None:
            raise RecipeError(f"method.num_trainable_layers: {last} blocks, and this model has {len(blocks)}",
                              f"use {len(blocks)} or fewer")
        yield from blocks[max(0, len(blocks) - last):]
        if self.layers is not None:
            yield from _resolve_range(blocks, *self.layers)
        if self.embeddings:
            yield anatomy.embedding
        if self.head:
            if anatomy.head is None:
                raise RecipeError("method.head: this model has no output projection", "leave it out")
            yield anatomy.head


def _resolve_range(blocks: list[nn.Module], first: int, last: int) -> list[nn.Module]:
    count = len(blocks)
    start, end = (place + count if place < 0 else place for place in (first, last))
    if not 0 <= start <= end < count:
        raise RecipeError(f"method.layers: [{first}, {last}] are not blocks of this model, which has 0 to {count - 1}",
                          "give the first and the last block to train, in this order")
    return blocks[start:end + 1]


def matches_name(name: str, pattern: str) -> bool:
    """Whether the pattern is some whole parts of the dotted name, or an expression that fits all of it."""
    return f".{pattern}." in f".{name}." or re.fullmatch(pattern, name) is not None
