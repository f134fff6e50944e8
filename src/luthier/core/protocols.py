"""The protocols between packages. Read `types.py` first. Each protocol is implemented in one package.

| name               | package     | purpose                                                            |
|--------------------|-------------|--------------------------------------------------------------------|
| Tokenizer          | models      | text to token ids and back, and the base's chat template           |
| TargetLinear       | models      | one linear layer of the model and its role (`q`, `up`, ...)        |
| ModelStructure     | models      | the model's parts: layers, linear layers, embedding, head          |
| SoftPromptInjector | models      | where virtual tokens enter the model (`soft_prompts.py`)           |
| Head               | models      | a small module over the states that an objective needs            |
| Heads              | models      | the heads of one objective on one model                            |
| Family             | models      | how to call the model                                              |
| Method             | methods     | which parameters train, and how they enter the forward pass        |
| AdapterGate        | methods     | whether, where and how strongly a method acts (`adapter_gate.py`)  |
| Router             | methods     | selects an adapter for each token                                  |
| Tuner              | methods     | a method attached to a model: parameters, disabling, merging       |
| Objective          | objectives  | the loss                                                           |
| BatchSource        | data        | the batches of a run, with a cursor for exact resuming             |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from luthier.core.adapter_gate import AdapterGate
from luthier.core.generation import ChatFormat as ChatFormat
from luthier.core.generation import GenerationOutput as GenerationOutput
from luthier.core.generation import SamplingParams as SamplingParams
from luthier.core.model_structure import ModelStructure as ModelStructure
from luthier.core.model_structure import TargetLinear as TargetLinear
from luthier.core.model_structure import TransformerLayer as TransformerLayer
from luthier.core.optimizer_hook import OptimizerHook
from luthier.core.tokenizer import Tokenizer as Tokenizer
from luthier.core.types import Batch, Inputs, Loss, LossInputs, Outputs

# ---------------------------------------------------------------- models


@dataclass(frozen=True)
class Head:
    """A small module over the states that the family adds for an objective. It trains under every method and is saved
    with it. Its output layer starts with small weights, so that the initial predictions are close to uniform.

    Args:
        name: of the module in the saved files.
        kind: `item` (over `pooled`, returns `scores`), `token` (over `states`, returns `token_scores`), or `scalar` (a
            trainable number, in `scalars`).
        width: C, the number of outputs.
        start: the initial value of a scalar.
        task: Transformers' name of the task (its `problem_type`, or token_classification); the head is then built
            like that of Transformers' class for the task. Empty: a linear layer.
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
    """A loaded base model and how to call it.

    Attributes:
        heads: those of the last `add_heads`.
        padding_reason: why rows are padded although the family normally packs them; empty otherwise.
        router: selects the adapters of routed batches.
        critic: makes the context in which values (`token_scores`) are computed; None: in the same pass.
        chat_format: set by assembly, since only `data` can determine it.
    """

    structure: ModelStructure
    tokenizer: Any
    padding_reason: str
    router: Router | None
    critic: Callable[[], AbstractContextManager[None]] | None
    chat_format: ChatFormat

    @property
    def heads(self) -> Heads: ...

    @property
    def can_generate(self) -> bool:
        """Whether `generate` is supported; otherwise it raises `BaseError`."""
        ...

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether an encoder reads a source and a decoder generates the target, each with its own eos token."""
        ...

    @property
    def device(self) -> torch.device: ...

    @property
    def training(self) -> bool: ...

    @property
    def pooling(self) -> Literal["last", "first", "mean"]:
        """Which state represents a whole text: last, first or mean."""
        ...

    @property
    def backbone_prefix(self) -> str:
        """The prefix of the backbone's weight names in the whole model; empty if the model is only the backbone."""
        ...

    def get_padded_tokenizer(self) -> Any:
        """The tokenizer to save, with the padding token that the class of the heads needs."""
        ...

    def forward(self, inputs: Inputs, target: LossInputs, needs: frozenset[str]) -> Outputs:
        """The outputs that the objective needs (names of `Outputs`' fields), at the target's positions."""
        ...

    def add_heads(self, heads: Sequence[Head], seed: int) -> Heads:
        """Add heads over the states, in place of those before. They train and are saved like a method."""
        ...

    def build_heads(self, heads: Sequence[Head], seed: int) -> Heads:
        """Create heads without adding them; see `using_heads`."""
        ...

    def using_heads(self, heads: Heads) -> AbstractContextManager[None]:
        """A context in which `heads` take the place of the family's own."""
        ...

    def train(self, mode: bool) -> None:
        """Turn training mode (dropout) on or off."""
        ...

    def enable_gradient_checkpointing(self, over: int = 0) -> None:
        """Recompute activations in the backward pass. A row of more than `over` tokens recomputes as many layers as are
        needed to use no more memory than a row of `over` tokens; 0: every layer."""
        ...

    def save(self, path: Path) -> None:
        """Write the whole model as a Transformers folder, including the tokenizer."""
        ...

    def get_saved_tokenizer(self) -> Any:
        """The tokenizer to save with the trained weights (see `ChatFormat`)."""
        ...

    def save_generation_config(self, path: Path) -> None:
        """Write the eos tokens next to an adapter that was trained on conversations."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> Iterator[GenerationOutput]:
        """Generate from prompts of token ids, in batches with a cache; outputs are yielded as they finish."""
        ...


# ---------------------------------------------------------------- methods


class Router(Protocol):
    """Selects an adapter, or none, for each token."""

    def route(self, dim: int, places: Sequence[int]) -> AbstractContextManager[None]:
        """While open, position i of dimension `dim` of every hidden state (0: rows of a batch, 1: tokens of a row)
        goes through the adapter with index `places[i]`; -1: through none."""
        ...

    def snapshot(self) -> AbstractContextManager[None]:
        """The current state, as a context to enter again when layers are recomputed in the backward pass."""
        ...


TRAINING = "training."  # prefix of entries in a method's state that resuming needs and the saved adapter does not


class Tuner(Protocol):
    """A method attached to a model. The model's inputs and output shapes stay the same for every objective."""

    @property
    def gates(self) -> tuple[AdapterGate, ...] | None:
        """Its gates, controlled by an adapter manager; None if the method changes the base's own weights."""
        ...

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters, by their names in the adapter file."""
        ...

    def lr_multiplier(self, name: str) -> float:
        """Factor on the learning rate of the named parameter (used by LoRA+); 1 for most."""
        ...

    @property
    def optimizer_hooks(self) -> tuple[OptimizerHook, ...]:
        """Its hook around optimizer steps; None for nearly all methods."""
        ...

    def disabled(self) -> AbstractContextManager[None]:
        """A context in which the model is exactly the base model. May be nested."""
        ...

    def merge(self) -> None:
        """Add the change to the base's weights and disable the method. Raises `NotMergeable` with the reason."""
        ...

    def unmerge(self) -> None:
        """Undo `merge`."""
        ...

    def state(self) -> dict[str, Tensor]:
        """The trained tensors, named as in PEFT's file if PEFT has the format. Names of entries that only resuming
        needs begin with `TRAINING`; these are saved in checkpoints only."""
        ...

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Load `state`. Raises `RunError` for missing, unknown and misshapen entries."""
        ...

    def get_peft_config(self) -> dict[str, Any] | None:
        """The content of PEFT's `adapter_config.json`, or None if PEFT has no such method."""
        ...


class ClassHead(Protocol):
    """A head with the architecture and parameter names of one of Transformers' own task classes."""

    @property
    def backbone_prefix(self) -> str:
        """The prefix of the backbone's weight names in the class."""
        ...

    def weights(self) -> dict[str, nn.Parameter]:
        """The head's parameters, by their names in the class."""
        ...

    def to(self, dtype: torch.dtype) -> Any: ...


class Heads(Tuner, Protocol):
    """The heads of one objective. They train and are saved with the method, and change nothing in the base.

    Attributes:
        scalars: trainable numbers, by name.
        no_task_head_reason: why a requested `task_head` is not available; empty if it is, or if none was requested.
    """

    scalars: dict[str, nn.Parameter]
    no_task_head_reason: str

    @property
    def task_head(self) -> ClassHead | None:
        """The head that is one of Transformers' own classes; None if there is no such head."""
        ...


class Method(Protocol):
    """The settings of a method; `attach` adds it to a model."""

    name: str

    def attach(self, structure: ModelStructure, *, seed: int) -> Tuner: ...


class Objective(Protocol):
    """A pure function of outputs and targets. It uses no rank, no device and no model.

    Args:
        example_types: names of the example types that it reads.
        required_outputs: the fields of `Outputs` that it reads.
        heads: the heads that the family must add.
        needs_full_batch: whether examples of a batch interact in the loss (in-batch negatives). Such a batch may be
        computed in
            parts, but its loss is that of the whole batch.
        has_eval_metrics: whether `compute_eval_metrics` returns anything.
        supports_soft_labels: whether a label may be a mixture of classes.
        learning_rate_factor: factor on the method's default learning rate, used if the recipe sets none.
    """

    name: str
    example_types: frozenset[str]
    required_outputs: frozenset[str]
    needs_full_batch: bool
    has_eval_metrics: bool
    supports_soft_labels: bool
    learning_rate_factor: float

    @property
    def heads(self) -> tuple[Head, ...]: ...

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The class names by index; empty: taken from the training rows; None: labels are numbers."""
        ...

    def with_labels(self, labels: tuple[str, ...], counts: Mapping[str, float] | None = None) -> Objective:
        """The objective for the classes of the training rows (`counts`: number of labels of each); unchanged without
        classes."""
        ...

    def count(self, target: LossInputs) -> float:
        """The count of this micro-batch, by which the sum is divided; known before the forward pass."""
        ...

    def __call__(self, outputs: Outputs, target: LossInputs) -> Loss: ...

    def compute_eval_metrics(self, outputs: Outputs, target: LossInputs) -> dict[str, float]:
        """Metrics over all held-out rows at once that cannot be summed over batches (F1, rank correlations)."""
        ...


class BatchSource(Protocol):
    """An endless iterator over optimizer steps, each a list of micro-batches, with an exact cursor."""

    steps_per_epoch: int

    def __next__(self) -> list[Batch]: ...

    def state(self) -> dict[str, Any]:
        """The cursor; loading it continues with the next batch."""
        ...

    def load(self, state: Mapping[str, Any]) -> None: ...
