"""Heads of Transformers' own task classes: `...ForSequenceClassification` (or tokens, images) of the
architecture.

Read `task_heads.py` first. The class is built on the meta device, its backbone is replaced by a module that returns
given states, and the rest is the head: its parameters have the class's own names, and its computation is the class's
own `forward`. So a run is saved as exactly that class, or as a PEFT adapter of it, with the same outputs.

The class also determines the pooling: BERT uses the first token, Llama the last one that is not padding, ModernBERT
what its config says. The pooling is detected by calling the head with known states.

Dropout inside the head is off, in training as well. If Transformers has no class for an architecture, or the class
pools differently than requested, the head is a plain linear layer that only this package can load
(`no_task_head_reason` says why).

Shape letters: N rows, L tokens of a row, D hidden size, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from luthier.core.protocols import Head
from luthier.models.hf_attributes import get_optional
from luthier.models.hf_logging import silence_transformers

CLASSES: Mapping[str, Any] = {"item": AutoModelForSequenceClassification, "token": AutoModelForTokenClassification,
                              "image": AutoModelForImageClassification}
TASKS: Mapping[str, str | None] = {"item": "SEQ_CLS", "token": "TOKEN_CLS", "image": None}  # PEFT's names
POOLED = {"first": "cls", "mean": "mean"}  # ModernBERT's names of its two poolings
STD = 0.02  # of randomly initialized weights


class StackOutput(nn.Module):
    """Replaces the backbone of a class: returns the given states, and the pooler's output for them.

    Args:
        stack: the backbone that it replaces; its pooler is kept because it belongs to the head.
    """

    def __init__(self, stack: nn.Module) -> None:
        super().__init__()
        self.pooler: Any = get_optional(stack, "pooler")
        self.pooler_activation: Any = get_optional(stack, "pooler_activation")
        self.states: Tensor | None = None

    def forward(self, *_: Any, **__: Any) -> BaseModelOutputWithPoolingAndCrossAttentions:
        states, pooled = self.states, None
        if self.pooler is not None:
            pooled = self.pooler(states)
            pooled = pooled[:, 0] if pooled.dim() == 3 else pooled
            pooled = pooled if self.pooler_activation is None else self.pooler_activation(pooled)
        return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=states, pooler_output=pooled)


class TaskHead(nn.Module):
    """states [N, D] -> logits [N, C]; each state represents a text (image) or a token.

    Args:
        shell: the class of Transformers, with `StackOutput` in place of its backbone.
        kind: item, token or image.
    """

    def __init__(self, shell: Any, kind: str, head: Head) -> None:
        super().__init__()
        self.shell, self.kind, self.head = shell, kind, head
        self.backbone_prefix = f"{shell.base_model_prefix}."  # the prefix of the backbone's weight names in the class
        self.pooling: str = "first"
        self.train(False)

    @property
    def task(self) -> str | None:
        """PEFT's `task_type`."""
        return TASKS[self.kind]

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def train(self, mode: bool = True) -> TaskHead:
        """Keeps evaluation mode: dropout inside the head is off."""
        super().train(False)
        return self

    def weights(self) -> dict[str, nn.Parameter]:
        """The head's parameters by their names in the class."""
        return dict(self.shell.named_parameters())

    def modules_to_save(self) -> list[str]:
        """PEFT's names of the modules that are the head."""
        return sorted({name.removeprefix(self.backbone_prefix).partition(".")[0] for name in self.weights()})

    def forward(self, states: Tensor) -> Tensor:
        if self.kind == "token":
            logits: Tensor = self.compute_logits(states[None])[0]
            return logits
        return self.compute_logits(states[:, None])

    def compute_logits(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """The class's logits for a backbone's states [N, L, D]; `mask` [N, L] is 0 for padding."""
        seen = torch.ones(states.shape[:2], dtype=torch.long, device=states.device) if mask is None else mask
        stack = self.shell.get_submodule(self.shell.base_model_prefix)
        stack.states = states.to(self.dtype)
        try:
            given = ({"pixel_values": states} if self.kind == "image" else
                     {"input_ids": seen, "attention_mask": seen})  # 0 is padding in the shell's config
            logits: Tensor = self.shell(**given).logits
            return logits
        finally:
            stack.states = None

    @contextmanager
    def assembled(self, model: Any, backbone: Any) -> Iterator[Any]:
        """A context with the class that contains the trained backbone and the config to save."""
        name, own = self.shell.base_model_prefix, self.shell.config
        stand_in = self.shell.get_submodule(name)
        config = make_labeled_config(model.config, self.head)
        if get_optional(own, "classifier_pooling") is not None:
            config.classifier_pooling = own.classifier_pooling
        setattr(self.shell, name, backbone)
        if stand_in.pooler is not None:
            backbone.pooler = stand_in.pooler
        self.shell.config = config
        try:
            yield self.shell
        finally:
            if stand_in.pooler is not None:
                backbone.pooler = None
            setattr(self.shell, name, stand_in)
            self.shell.config = own


def make_labeled_config(config: Any, head: Head) -> Any:
    """A copy of the config with the head's labels and problem type, as Transformers names them."""
    config = copy.deepcopy(config)
    config.id2label = dict(enumerate(head.labels or [f"LABEL_{i}" for i in range(head.width)]))
    config.label2id = {name: i for i, name in config.id2label.items()}
    config.problem_type = None if head.task == "token_classification" else head.task
    return config


def build_task_head(head: Head, model: Any, backbone: nn.Module, pooling: str | None, images: bool,
              generator: torch.Generator) -> TaskHead | str:
    """The head, or the reason why there is none. Its parameters are random, except a pooler from the base's files.

    Args:
        pooling: last, first or mean; None: that of the class.
    """
    kind = "image" if images and head.kind == "item" else head.kind
    if kind not in CLASSES or type(model.config) not in CLASSES[kind]._model_mapping:
        return f"Transformers has no class for {head.task.replace('_', ' ')} with {model.config.model_type}"
    config = make_labeled_config(model.config, head)
    config.pad_token_id = 0
    if pooling in POOLED and get_optional(config, "classifier_pooling") is not None:
        config.classifier_pooling = POOLED[pooling]
    with silence_transformers(), torch.device("meta"):
        shell: Any = CLASSES[kind].from_config(config)
    stack = shell.get_submodule(shell.base_model_prefix)
    if type(stack) is not type(backbone):
        return f"{type(shell).__name__} has a {type(stack).__name__}, and the base is a {type(backbone).__name__}"
    setattr(shell, shell.base_model_prefix, StackOutput(stack))
    made = TaskHead(shell.to_empty(device="cpu"), kind, head)
    _init_weights(made, generator)
    found = _detect_pooling(made, config.hidden_size)
    if found is None or (pooling is not None and kind == "item" and found != pooling):
        return f"{type(shell).__name__} does not pool by {pooling or 'last, first or mean'}"
    made.pooling = found
    _load_pooler(made, Path(str(model.name_or_path)))
    return made


@torch.no_grad()
def _init_weights(head: TaskHead, generator: torch.Generator) -> None:
    for name, parameter in head.weights().items():
        if parameter.dim() > 1:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * STD)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


@torch.no_grad()
def _detect_pooling(head: TaskHead, hidden: int) -> str | None:
    """The pooling of the class, detected by known states; None if it is not supported."""
    states = torch.linspace(-3, 3, 6 * hidden).sin().view(2, 3, hidden) * torch.linspace(1, 2, 6).view(2, 3, 1)
    if head.kind != "item":
        alone = head(states.flatten(0, 1)) if head.kind == "token" else head(states[:, 0])
        whole = head.compute_logits(states)
        return "first" if torch.allclose(whole.flatten(0, -2), alone, rtol=1e-4, atol=1e-6) else None
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    whole = head.compute_logits(states, mask)
    ways = {"first": states[:, 0], "last": states[[0, 1], [2, 1]],
            "mean": (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)}
    return next((name for name, state in ways.items()
                 if torch.allclose(head(state), whole, rtol=1e-4, atol=1e-6)), None)


@torch.no_grad()
def _load_pooler(head: TaskHead, folder: Path) -> None:
    """Load a pooler, which belongs to the backbone, from the base's files if they contain one."""
    wanted = {name: parameter for name, parameter in head.weights().items() if name.startswith(head.backbone_prefix)}
    for file in sorted(folder.glob("*.safetensors")) if wanted and folder.is_dir() else ():
        with safe_open(file, framework="pt") as stored:
            there = set(stored.keys())
            for name, parameter in wanted.items():
                key = next((key for key in (name, name.removeprefix(head.backbone_prefix)) if key in there), None)
                if key is not None and tuple(stored.get_slice(key).get_shape()) == tuple(parameter.shape):
                    parameter.copy_(stored.get_tensor(key))


def read_weights(names: Sequence[str], files: Sequence[Path]) -> dict[str, Tensor]:
    """The tensors named `names` that the files contain."""
    found: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as stored:
            found |= {name: stored.get_tensor(name) for name in set(stored.keys()) & set(names)}
    return found
