"""What the rooms promise one another. Read `types.py` first; every name below is implemented somewhere, in one room.

| protocol   | room        | one sentence                                                       |
|------------|-------------|--------------------------------------------------------------------|
| Tokenizer  | families    | text to ids and back, and the base's chat template                 |
| Site       | families    | one linear map of the model and what it is for (`q`, `up`, ...)    |
| Anatomy    | families    | where the model's parts are                                        |
| Ports      | families    | where virtual tokens enter (`soft_prompts.py`)                            |
| Head       | families    | a small map over the states that an objective asked for            |
| Family     | families    | how to call the model                                              |
| Method     | methods     | which parameters train, and how they enter the forward pass        |
| Scope      | methods     | whether, where and how strongly a method acts (`adapter_gate.py`)         |
| Router     | methods     | who sends each token through its own adapter                       |
| Attached   | methods     | a method on a model: its parameters, its off switch, its merge     |
| Objective  | objectives  | what is minimised                                                  |
| Feed       | data        | the batches of a run, with a cursor                                |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from luthier.core.adapter_gate import AdapterGate as AdapterGate
from luthier.core.expert_layers import Experts
from luthier.core.generation import ChatFormat as ChatFormat
from luthier.core.generation import Generated as Generated
from luthier.core.generation import Sampling as Sampling
from luthier.core.optimizer_hook import OptimizerHook
from luthier.core.soft_prompts import Ports
from luthier.core.types import Batch, Inputs, Loss, Outputs, Target


class Tokenizer(Protocol):
    """As much of a Transformers tokenizer as the data room uses."""

    eos_token: str | None
    eos_token_id: int | None
    bos_token_id: int | None
    unk_token_id: int | None
    mask_token_id: int | None
    all_special_ids: list[int]
    chat_template: Any  # Jinja source, or several by name; None where there is none
    added_tokens_decoder: Any  # id -> a token that is looked for in a text as it stands
    is_fast: bool  # whether it can say which characters a token stands for

    def __len__(self) -> int: ...
    def __hash__(self) -> int: ...
    def __call__(self, text: str, **options: Any) -> Any: ...
    def convert_tokens_to_ids(self, tokens: str) -> Any: ...
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
        expand: for a map kept in few bits, the [out, in] weight that it stands for; nothing can be written to it.
    """

    name: str
    module: nn.Module
    role: str
    block: int
    inputs: int
    outputs: int
    transposed: bool = False
    expand: Callable[[], Tensor] | None = None

    def base_weight(self) -> Tensor:
        """The frozen weight, [out, in], however the module keeps it."""
        if self.expand is not None:
            return self.expand()
        weight = self.weight.detach()
        return weight.T if self.transposed else weight

    @property
    def weight(self) -> nn.Parameter:
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        return weight


@dataclass(frozen=True)
class Block:
    """One layer of the stack.

    Args:
        attention: the attention module, the one that attention functions are called with.
        attention_out: the module whose output is the attention's part of the residual sum.
        mlp_in, mlp_out: the modules whose input and whose output are the MLP's (often one and the same).
        norms: every norm in the block.
    """

    index: int
    name: str
    module: nn.Module
    attention: nn.Module
    mlp: nn.Module
    norms: tuple[nn.Module, ...]
    attention_out: nn.Module
    mlp_in: nn.Module
    mlp_out: nn.Module


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of one loaded model are. Methods find their places here, never by an architecture's name.

    Args:
        model: the whole model, head included.
        backbone: the model without its head: tokens to states.
        head: the output projection [D -> V], or None.
        tied: whether the head's weight is the embedding's.
        sizes: hidden, layers, heads, kv_heads, head_dim, vocabulary, context.
        task: PEFT's name of what the model is for: CAUSAL_LM, SEQ_2_SEQ_LM, FEATURE_EXTRACTION.
        tokenizer: of the base, for methods that start from words.
        ports: where virtual tokens enter; None where the family has no place for them.
        experts: the maps of mixtures that are one parameter for all experts.
    """

    model: nn.Module
    backbone: nn.Module
    blocks: tuple[Block, ...]
    sites: tuple[Site, ...]
    embedding: nn.Module
    head: nn.Module | None
    tied: bool
    sizes: Mapping[str, int] = field(default_factory=dict)
    task: str = "CAUSAL_LM"
    tokenizer: Any = None
    ports: Ports | None = None
    experts: tuple[Experts, ...] = ()


@dataclass(frozen=True)
class Head:
    """A small map over the states that the family adds for an objective. It trains under every method and is saved
    with it. The output layer starts small, so that the loss starts as that of a coin.

    Args:
        name: of the module in the saved files.
        kind: `item` (over `pooled`, gives `scores`), `token` (over `states`, gives `token_scores`), or `scalar` (a
            number that trains, in `scalars`).
        width: C.
        start: the value that a scalar starts at.
        task: what Transformers calls the task (its `problem_type`, or token_classification), whose own class the head
            then takes its shape from; empty: a linear map.
        labels: the names of the C classes.
    """

    name: str
    kind: Literal["item", "token", "scalar"]
    width: int = 1
    start: float = 0.0
    task: Literal["", "single_label_classification", "multi_label_classification", "regression",
                  "token_classification"] = ""
    labels: tuple[str, ...] = ()


class Family(Protocol):
    """A loaded base and the knowledge of how to call it. `heads` are those of the last `add` (an `Attached`).

    `padded_why` says why its rows are padded where others of its kind pack them; empty where there is nothing to say.

    A family that writes asks a `critic`, where there is one, for the context in which its values are read.
    """

    anatomy: Anatomy
    tokenizer: Any
    padded_why: str
    heads: Any
    router: Router | None
    critic: Callable[[], AbstractContextManager[None]] | None
    chat_format: ChatFormat  # set by assembly: only `data` can find it

    @property
    def writes(self) -> bool:
        """Whether `generate` answers prompts; else it refuses."""
        ...

    @property
    def divided(self) -> bool:
        """Whether it reads a source and writes its answer, each a piece of tokens with an end mark of its own."""
        ...

    @property
    def device(self) -> torch.device: ...

    @property
    def training(self) -> bool: ...

    @property
    def pooling(self) -> Literal["last", "first", "mean"]:
        """Which state stands for a whole text: last, first or mean."""
        ...

    @property
    def home(self) -> str:
        """What the names of the stack's weights begin with in the whole model; empty where it is the stack alone."""
        ...

    def padded_tokenizer(self) -> Any:
        """The tokenizer as it is saved: it pads as the heads' class wants it."""
        ...

    def forward(self, inputs: Inputs, target: Target, needs: frozenset[str]) -> Outputs:
        """What the objective asked for (names of `Outputs`' fields), at the target's positions."""
        ...

    def add(self, heads: Sequence[Head], seed: int) -> Tuner:
        """Put heads on the states; what comes back trains and is saved like a method."""
        ...

    def train(self, mode: bool) -> None:
        """Dropout and the like on or off."""
        ...

    def checkpointing(self, over: int = 0) -> None:
        """In rows of more than `over` tokens, recompute blocks in the backward pass that a row of `over` has no room
        for; 0: every block."""
        ...

    def save(self, path: Path) -> None:
        """Write the whole model as a Transformers folder, tokenizer included."""
        ...

    def saved_tokenizer(self) -> Any:
        """The tokenizer as it is written beside what was trained (see `ChatFormat`)."""
        ...

    def save_generation_config(self, path: Path) -> None:
        """Write which tokens end an answer beside an adapter, where it was tuned on conversations."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[Generated]:
        """Answers to prompts of token ids, in batches with a cache; yielded as they finish, each with its index."""
        ...


# ---------------------------------------------------------------- methods


class Router(Protocol):
    """Who sends each token through its own adapter, or none; a manager. A family that has one asks it."""

    def route(self, dim: int, places: Sequence[int]) -> AbstractContextManager[None]:
        """While open, the i-th place along dimension `dim` of every hidden state (0: rows of a batch, 1: tokens of a
        row) goes through the adapter `places[i]`, an index into the manager; through none at -1."""
        ...

    def snapshot(self) -> AbstractContextManager[None]:
        """The setting of now, to be entered once more later: by what is recomputed in the backward pass."""
        ...


TRAINING = "training."  # begins the names in a method's state that going on needs and the saved adapter does not


class Tuner(Protocol):
    """A method on a model. Same call in, same shapes out: no objective can notice it."""

    @property
    def gates(self) -> tuple[AdapterGate, ...] | None:
        """Its switch, which a manager turns; None where the method has changed the base's own weights."""
        ...

    def parameters(self) -> dict[str, nn.Parameter]:
        """What trains, by its name in the adapter file."""
        ...

    def lr_multiplier(self, name: str) -> float:
        """Factor on the learning rate for the named parameter (LoRA+ uses it); 1 for most."""
        ...

    @property
    def optimizer_hooks(self) -> tuple[OptimizerHook, ...]:
        """What it does at each update of the weights; None where that is nothing, as for nearly all."""
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
        """Only what trained, named as in PEFT's file where PEFT has the format. What only going on needs is named
        `TRAINING` and more, and stays in the checkpoints."""
        ...

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take `state` back. Refuses missing, unknown and misshapen entries."""
        ...

    def get_peft_config(self) -> dict[str, Any] | None:
        """The content of PEFT's `adapter_config.json`, or None where PEFT has no such method."""
        ...


class Method(Protocol):
    """Settings of a method; `attach` puts it on a model."""

    name: str

    def attach(self, anatomy: Anatomy, *, seed: int) -> Tuner: ...


class Objective(Protocol):
    """Pure: no rank, no device move, no model.

    Args:
        reads: the kinds of example that mean something to it, by the names of their types.
        needs: the fields of `Outputs` that it reads.
        heads: what the family must add to its states.
        coupled: whether examples of a batch meet in the loss (in-batch negatives). Such a batch may be computed in
            parts, but its loss is always of the whole.
        judged: whether `quality` says something about held-out rows.
        mixes: whether a label may be a mixture of others.
        learning_rate_factor: times the method's default learning rate: the rate where a recipe gives none.
    """

    name: str
    reads: frozenset[str]
    needs: frozenset[str]
    coupled: bool
    judged: bool
    mixes: bool
    learning_rate_factor: float

    @property
    def heads(self) -> tuple[Head, ...]: ...

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The names of its classes by their numbers; empty where the training rows decide; None: labels are numbers."""
        ...

    def fitted(self, labels: tuple[str, ...], counts: Mapping[str, float] | None = None) -> Objective:
        """The objective for these classes of the training rows, `counts` labels of each; itself where it has none."""
        ...

    def count(self, target: Target) -> float:
        """What the sum over this micro-batch will be divided by, known before the forward pass."""
        ...

    def __call__(self, outputs: Outputs, target: Target) -> Loss: ...

    def quality(self, outputs: Outputs, target: Target) -> dict[str, float]:
        """Measures that no sum over batches gives (F1, rank correlations), over all held-out rows at once."""
        ...


class Feed(Protocol):
    """An endless run of optimiser steps' worth of micro-batches, with an exact cursor."""

    steps_per_epoch: int

    def __next__(self) -> list[Batch]: ...

    def state(self) -> dict[str, Any]:
        """The cursor: whoever loads it goes on with the very next batch."""
        ...

    def load(self, state: Mapping[str, Any]) -> None: ...
