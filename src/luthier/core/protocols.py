"""What the rooms promise one another. Read `types.py` first; every name below is implemented somewhere, in one room.

| protocol   | room        | one sentence                                                       |
|------------|-------------|--------------------------------------------------------------------|
| Tokenizer  | families    | text to ids and back, and the base's chat template                 |
| Site       | families    | one linear map of the model and what it is for (`q`, `up`, ...)    |
| Anatomy    | families    | where the model's parts are                                        |
| Family     | families    | how to call the model                                              |
| Method     | methods     | which parameters train, and how they enter the forward pass        |
| Attached   | methods     | a method on a model: its parameters, its off switch, its merge     |
| Objective  | objectives  | what is minimised                                                  |
| Feed       | data        | the batches of a run, with a cursor                                |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from luthier.core.types import Batch, Inputs, Loss, Outputs, Target


class Tokenizer(Protocol):
    """As much of a Transformers tokenizer as the data room uses."""

    eos_token: str | None
    eos_token_id: int | None
    bos_token_id: int | None
    chat_template: str | None
    is_fast: bool  # whether it can say which characters a token stands for

    def __call__(self, text: str, **options: Any) -> Any: ...
    def decode(self, ids: Sequence[int], **options: Any) -> str: ...
    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> Any: ...


# ---------------------------------------------------------------- where a model's parts are


@dataclass(frozen=True)
class Site:
    """One linear map inside a block.

    Args:
        name: its path in the model, as in `state_dict` and in PEFT's files.
        module: an `nn.Linear`, or GPT-2's `Conv1D`.
        role: q, k, v, qkv, o, gate, up, down, or other.
        block: index of the block that it stands in.
        transposed: whether `weight` is [in, out] (Conv1D) instead of [out, in].
    """

    name: str
    module: nn.Module
    role: str
    block: int
    inputs: int
    outputs: int
    transposed: bool = False

    @property
    def weight(self) -> nn.Parameter:
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        return weight


@dataclass(frozen=True)
class Block:
    """One layer of the stack."""

    index: int
    name: str
    module: nn.Module
    attention: nn.Module
    mlp: nn.Module
    norms: tuple[nn.Module, ...]


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of one loaded model are. Methods find their places here, never by an architecture's name.

    Args:
        model: the whole model, head included.
        backbone: the model without its head: tokens to states.
        head: the output projection [D -> V], or None.
        tied: whether the head's weight is the embedding's.
        sizes: hidden, layers, heads, kv_heads, head_dim, vocabulary, context.
    """

    model: nn.Module
    backbone: nn.Module
    blocks: tuple[Block, ...]
    sites: tuple[Site, ...]
    embedding: nn.Module
    head: nn.Module | None
    tied: bool
    sizes: Mapping[str, int] = field(default_factory=dict)


class Family(Protocol):
    """A loaded base and the knowledge of how to call it."""

    anatomy: Anatomy
    tokenizer: Any

    @property
    def device(self) -> torch.device: ...

    def forward(self, inputs: Inputs, target: Target, needs: frozenset[str]) -> Outputs:
        """What the objective asked for (names of `Outputs`' fields), at the target's positions."""
        ...

    def train(self, mode: bool) -> None:
        """Dropout and the like on or off."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[Generated]:
        """Answers to prompts of token ids, in batches with a cache; yielded as they finish, each with its index."""
        ...


@dataclass(frozen=True)
class Sampling:
    """How to generate. `temperature` 0 is greedy."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    batch_size: int = 16
    stop: tuple[int, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Generated:
    """One answer: which prompt, its token ids without the stop token, and whether it ended by itself."""

    index: int
    tokens: tuple[int, ...]
    finished: bool


# ---------------------------------------------------------------- methods


class Attached(Protocol):
    """A method on a model. Same call in, same shapes out: no objective can notice it."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """What trains, by its name in the adapter file."""
        ...

    def rate(self, name: str) -> float:
        """Factor on the learning rate for the named parameter (LoRA+ uses it); 1 for most."""
        ...

    def disabled(self) -> AbstractContextManager[None]:
        """While open, the model is the bare base, bit for bit. Nests."""
        ...

    def merge(self) -> None:
        """Fold the change into the base's weights and step aside. Raises `NotMergeable`, saying why."""
        ...

    def unmerge(self) -> None:
        """Undo `merge`."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Only what trained, named as in PEFT's file where PEFT has the format."""
        ...

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take `state` back. Refuses missing, unknown and misshapen entries."""
        ...

    def peft(self) -> dict[str, Any] | None:
        """The content of PEFT's `adapter_config.json`, or None where PEFT has no such method."""
        ...


class Method(Protocol):
    """Settings of a method; `attach` puts it on a model."""

    name: str

    def attach(self, anatomy: Anatomy, *, seed: int) -> Attached: ...


# ---------------------------------------------------------------- objectives


class Objective(Protocol):
    """Pure: no rank, no device move, no model.

    Args:
        needs: the fields of `Outputs` that it reads.
        coupled: whether examples of a batch meet in the loss (in-batch negatives); such a batch is never split.
    """

    name: str
    needs: frozenset[str]
    coupled: bool

    def count(self, target: Target) -> float:
        """What the sum over this micro-batch will be divided by, known before the forward pass."""
        ...

    def __call__(self, outputs: Outputs, target: Target) -> Loss: ...


# ---------------------------------------------------------------- data


class Feed(Protocol):
    """An endless run of optimiser steps' worth of micro-batches, with an exact cursor."""

    steps_per_epoch: int

    def __next__(self) -> list[Batch]: ...

    def state(self) -> dict[str, Any]:
        """The cursor: whoever loads it goes on with the very next batch."""
        ...

    def load(self, state: Mapping[str, Any]) -> None: ...
