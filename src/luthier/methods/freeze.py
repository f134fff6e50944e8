"""Freeze tuning: some layers, named parameters, the embeddings or the head are trained; all other weights are frozen.

Read `full.py` first: this is full fine-tuning of a part of the weights. Where the base must be restorable, only the
trained weights are copied. The run folder holds only what trained, in Luthier's own format (`adapter_format.py`).

Learning rate 5e-4: fewer weights must produce the same change, so each may change more than under full fine-tuning
(2e-5).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from luthier.core.config import Config
from luthier.core.errors import RecipeError
from luthier.core.protocols import ModelStructure
from luthier.methods.adapter_format import PEFT_PREFIX, build_native_config
from luthier.methods.full import EMBEDDING_LR_HELP, KEEP_BASE_HELP, PartOfBase, scale_embedding_lr


class FreezeConfig(Config):
    """Settings of freeze tuning: the union of what these fields select. If none is set: the last two layers."""

    default_learning_rate: ClassVar[float] = 5e-4

    name: Literal["freeze"] = "freeze"
    num_trainable_layers: int | None = Field(None, ge=1, description="train the last N layers; 2 if no other "
                                           "field selects anything")
    layers: tuple[int, int] | None = Field(None, description="train layers from the first to the second index, "
                                                             "inclusive; negative indices count from the end")
    patterns: tuple[str, ...] = Field((), description="parameters by name: whole dotted parts (mlp.down_proj), "
                                                      "or regular expressions for the whole name")
    embeddings: bool = Field(False, description="train the input embeddings (and a head tied to them)")
    embedding_lr_multiplier: float = Field(1.0, gt=0, description=EMBEDDING_LR_HELP)
    head: bool = Field(False, description="train the output projection (and embeddings tied to it)")
    keep_base: bool | None = Field(None, description=KEEP_BASE_HELP)

    @property
    def num_trained_layers(self) -> int | None:
        """`num_trainable_layers`, or its default if no other field selects anything."""
        chosen = self.layers is not None or self.patterns or self.embeddings or self.head
        return self.num_trainable_layers if self.num_trainable_layers is not None or chosen else 2

    def attach(self, structure: ModelStructure, *, seed: int) -> PartOfBase:
        trained_ids = {id(p) for module in self._select_modules(structure) for p in module.parameters()}
        named = dict(structure.model.named_parameters())  # tied weights are named once
        for pattern in self.patterns:
            found = {id(p) for name, p in named.items() if matches_name(name, pattern)}
            if not found:
                raise RecipeError(f"method.patterns: {pattern!r} matches no parameter of this model",
                                  "use parts of parameter names, such as: " + ", ".join(sorted(
                                      {name.removesuffix(".weight").rsplit(".", 1)[-1] for name in named})[:12]))
            trained_ids |= found
        trained = {name: p for name, p in named.items() if id(p) in trained_ids}
        return PartOfBase(trained, bool(self.keep_base),
                          scale_embedding_lr(structure, trained, self.embedding_lr_multiplier),
                          {PEFT_PREFIX + name: p for name, p in trained.items()},
                          build_native_config(self, structure.task))

    def _select_modules(self, structure: ModelStructure) -> Iterable[nn.Module]:
        blocks = [block.module for block in structure.layers]
        last = self.num_trained_layers or 0
        if last > len(blocks) and self.num_trainable_layers is not None:
            raise RecipeError(f"method.num_trainable_layers: {last}, but this model has {len(blocks)} layers",
                              f"use {len(blocks)} or fewer")
        yield from blocks[max(0, len(blocks) - last):]
        if self.layers is not None:
            yield from _resolve_range(blocks, *self.layers)
        if self.embeddings:
            yield structure.embedding
        if self.head:
            if structure.head is None:
                raise RecipeError("method.head: this model has no output projection", "omit it")
            yield structure.head


def _resolve_range(blocks: list[nn.Module], first: int, last: int) -> list[nn.Module]:
    count = len(blocks)
    start, end = (place + count if place < 0 else place for place in (first, last))
    if not 0 <= start <= end < count:
        raise RecipeError(f"method.layers: [{first}, {last}] is not a range of this model's layers, 0 to {count - 1}",
                          "give the first and the last layer to train, in this order")
    return blocks[start:end + 1]


def matches_name(name: str, pattern: str) -> bool:
    """Whether the pattern is a sequence of whole dotted parts of the name, or an expression for all of it."""
    return f".{pattern}." in f".{name}." or re.fullmatch(pattern, name) is not None
