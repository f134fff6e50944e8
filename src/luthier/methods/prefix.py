"""Prefix tuning: N trained keys and values before every text in every layer. Read `ptuning.py` first.

    attention:  softmax(q [P_k; K]^T) [P_v; V]          P_k, P_v: [G, N, d] per layer, trained

Shapes: G key heads, N virtual tokens, d head size. Li and Liang 2021 (arXiv:2101.00190), section 4. Keys are added
after rotary position encoding, and every token of a text attends to all of them, in sliding-window layers too. The
text's positions are shifted by N. An encoder-decoder has three kinds of attention, each with its own pairs; "layer"
below means one attention.

The pairs are initialized with the keys and values that the base computes for N tokens (section 7.4: better than random
numbers). `prefix_projection: true` computes their change by an MLP, the paper's reparameterization (section 4.3); only
its result is saved, as in `ptuning.py`.

Learning rate 0.02, relative to the pairs: `lr_multiplier` is the root mean square of the initial keys (or values) of
that layer, since Adam moves every entry by about the learning rate at each step. Values are often ten times smaller
than keys, and deep layers' are larger, so one absolute rate would fit few of them. The MLP's weights are trained at
0.05 of the rate (1e-3), as usual for small networks. On the demo's rows 40 steps reduced the held-out loss from 4.54 to
0.53.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from luthier.core.errors import BaseError, RunError
from luthier.core.protocols import ModelStructure
from luthier.methods.hooks import check_state_shapes
from luthier.methods.prompt import (
    EMBEDDINGS,
    VirtualTokenConfig,
    VirtualTokenMethod,
    build_peft_config,
    build_saved_config,
    choose_init_tokens,
    compute_rms,
    draw_normal,
    get_injector,
    to_trainable_dtype,
)
from luthier.methods.ptuning import ReparameterizedPrompt, draw_with_seed

ENCODER_LR_MULTIPLIER = 0.05  # of the MLP's weights


class PrefixConfig(VirtualTokenConfig):
    """Settings of prefix tuning."""

    default_learning_rate: ClassVar[float] = 0.02

    name: Literal["prefix"] = "prefix"
    prefix_projection: bool = Field(False, description="train an MLP that computes the prefix; only its result is "
                                                       "saved")
    encoder_hidden_size: int | None = Field(None, ge=1, description="width of that MLP; default: the base's hidden "
                                                                    "size")

    @model_validator(mode="after")
    def _check_projection(self) -> Self:
        if self.encoder_hidden_size is not None and not self.prefix_projection:
            raise ValueError("encoder_hidden_size is the width of the MLP: set prefix_projection: true")
        return self

    @classmethod
    def from_peft(cls, adapter: Mapping[str, Any]) -> PrefixConfig:
        """Settings from PEFT's adapter_config.json; its file holds only keys and values. Raises `RunError` for a prefix
        of an encoder-decoder, which PEFT computes differently."""
        if adapter.get("task_type") == "SEQ_2_SEQ_LM":
            raise RunError("this is PEFT's prefix of an encoder-decoder: it changes only the decoder's self-attention, "
                           "with shared keys and values, which Luthier does not support",
                           "use it with PEFT, or train a prefix with Luthier, which changes all three attentions")
        return cls(num_virtual_tokens=adapter["num_virtual_tokens"])

    def attach(self, structure: ModelStructure, *, seed: int) -> Prefix | ProjectedPrefix:
        start, scale = init_key_values(structure, self, seed)
        if not self.prefix_projection:
            return Prefix(structure, self, start, scale)
        layers, _, heads, tokens, width = start.shape  # [layers, 2, G, N, d]
        encoder = draw_with_seed(seed, lambda: PrefixProjection(
            tokens, self.encoder_hidden_size or structure.sizes["hidden"], (layers, 2, heads, width),
            self.prompt_tuning_init))
        return ProjectedPrefix(structure, self, encoder.to(start),
                               torch.zeros_like(start) if self.prompt_tuning_init == "random" else start, scale)


def init_key_values(structure: ModelStructure, config: VirtualTokenConfig, seed: int) -> tuple[Tensor, Tensor]:
    """[layers, 2, G, N, d] initial keys and values, and their size in each layer, [layers, 2, 1, 1, 1]."""
    pairs = get_injector(structure).compute_keys_values(choose_init_tokens(structure, config, seed))
    if len({x.shape for pair in pairs for x in pair}) > 1:
        raise BaseError("the keys and values of this base's layers differ in shape, and a prefix needs one shape",
                        "use the method prompt")
    start = to_trainable_dtype(torch.stack([torch.stack(pair) for pair in pairs]))  # [layers, 2, G, N, d]
    scale = torch.tensor([[compute_rms(x) for x in layer] for layer in start]).to(start)[:, :, None, None, None]
    return (start if config.prompt_tuning_init == "text" else scale * draw_normal(start.shape, seed).to(start)), scale


def flatten_key_values(pairs: Tensor) -> Tensor:
    """[layers, 2, G, N, d] to the shape of PEFT's file, [N, layers * 2 * G * d]."""
    return pairs.permute(3, 0, 1, 2, 4).flatten(1)  # [N, layers, 2, G, d] -> [N, layers * 2 * G * d]


def unflatten_key_values(rows: Tensor, like: Tensor) -> Tensor:
    """`flatten` undone."""
    layers, two, heads, tokens, width = like.shape  # [layers, 2, G, N, d]
    return rows.view(tokens, layers, two, heads, width).permute(1, 2, 3, 0, 4)  # [layers, 2, G, N, d]


def build_prefix_config(structure: ModelStructure, pairs: Tensor) -> dict[str, Any]:
    """The content of PEFT's adapter_config.json. Its `token_dim` is the size of all key heads together."""
    _, _, heads, tokens, width = pairs.shape
    return {"peft_type": "PREFIX_TUNING", **build_peft_config(structure, tokens), "token_dim": heads * width,
            "num_attention_heads": heads, "prefix_projection": False, "encoder_hidden_size": heads * width}


class Prefix(VirtualTokenMethod):
    """Prefix tuning on a model."""

    def __init__(self, structure: ModelStructure, config: VirtualTokenConfig, start: Tensor, scale: Tensor) -> None:
        super().__init__()
        self._like, self._scale = start, scale
        # One parameter for each, since each has its own learning rate.
        self.pairs = [(nn.Parameter(key.clone()), nn.Parameter(value.clone())) for key, value in start]  # [G, N, d]
        self._peft_config = build_saved_config(structure, config, "prefix", build_prefix_config(structure, start))
        get_injector(structure).add_prefix(lambda: self.pairs, self.gate)

    def compute_virtual_tokens(self) -> Tensor:
        """[layers, 2, G, N, d]"""
        return torch.stack([torch.stack(pair) for pair in self.pairs])  # [layers, 2, G, N, d]

    def parameters(self) -> dict[str, nn.Parameter]:
        return {f"{EMBEDDINGS}.{i}.{kind}": parameter for i, pair in enumerate(self.pairs)
                for kind, parameter in zip(("key", "value"), pair, strict=True)}

    def lr_multiplier(self, name: str) -> float:
        _, layer, kind = name.split(".")
        return float(self._scale[int(layer), int(kind == "value")])  # _scale: [layers, 2, 1, 1, 1]

    def state(self) -> dict[str, Tensor]:
        return {EMBEDDINGS: flatten_key_values(self.compute_virtual_tokens().detach()).contiguous()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        check_state_shapes({EMBEDDINGS: flatten_key_values(self._like)}, state)
        for pair, layer in zip(self.pairs, unflatten_key_values(state[EMBEDDINGS], self._like), strict=True):
            for parameter, saved in zip(pair, layer, strict=True):  # [G, N, d] each
                parameter.copy_(saved)

    def get_peft_config(self) -> dict[str, Any] | None:
        return self._peft_config


class PrefixProjection(nn.Module):
    """[layers, 2, G, N, d] from an embedding of each virtual token, by two linear layers. Named as in PEFT."""

    def __init__(self, tokens: int, hidden: int, shape: tuple[int, int, int, int], init: str) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(tokens, hidden)
        last = nn.Linear(hidden, shape[0] * shape[1] * shape[2] * shape[3])
        self.transform = nn.Sequential(nn.Linear(hidden, hidden), nn.Tanh(), last)
        if init == "text":
            nn.init.zeros_(last.weight)  # the MLP adds nothing at first: the prefix starts as real tokens
            nn.init.zeros_(last.bias)

    def forward(self) -> Tensor:
        rows: Tensor = self.transform(self.embedding.weight)  # [N, layers * 2 * G * d]
        return rows.view(-1, *self.shape).permute(1, 2, 3, 0, 4)  # [layers, 2, G, N, d]


class ProjectedPrefix(ReparameterizedPrompt):
    """Prefix tuning through an MLP, on a model."""

    encoder_lr_multiplier = ENCODER_LR_MULTIPLIER

    def __init__(self, structure: ModelStructure, config: VirtualTokenConfig, encoder: nn.Module, start: Tensor,
                 scale: Tensor) -> None:
        super().__init__(encoder, start, scale)
        self._peft_config = build_saved_config(structure, config, "prefix", build_prefix_config(structure, start))
        get_injector(structure).add_prefix(
            # [G, N, d] each
            lambda: [(layer[0], layer[1]) for layer in self.compute_virtual_tokens()], self.gate)

    def flatten(self, virtual: Tensor) -> Tensor:
        return flatten_key_values(virtual).contiguous()

    def unflatten(self, rows: Tensor) -> Tensor:
        return unflatten_key_values(rows, self.start)

    def get_peft_config(self) -> dict[str, Any] | None:
        return self._peft_config
