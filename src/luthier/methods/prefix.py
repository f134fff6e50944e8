"""Prefix tuning: N more keys and values before every text in every layer, which train. Read `ptuning.py` first.

    an attention:  softmax(q [P_k; K]^T) [P_v; V]          P_k, P_v: [G, N, d] for each, trained

Li and Liang 2021 (arXiv:2101.00190), section 4. Keys enter as they are, after the rotation of positions, and every
token of a text sees all of them, in layers with a sliding window too; the text's positions move on by N. An encoder
with a decoder has three attentions, each with pairs of its own: what is called a layer below is one attention.

They start as the keys and values that the base itself computes for N words (section 7.4: real words start better than
random numbers do). `prefix_projection: true` makes them by an MLP, the paper's re-parameterisation (section 4.3), as a change
of that start; it is folded away on saving, as `ptuning.py` says.

Learning rate 0.02, in units of what stands there: `rate` is the root mean square of the words' keys (or values) in that
layer, since Adam moves every entry by about the rate at each step. Values are often ten times as small as keys, and
deep layers' are larger than early ones': one absolute rate would be wrong for most of them. A fiftieth of their size a
step lets them go far within a hundred steps. The MLP's weights have no such units; at 0.05 of the rate (1e-3) they
train as any small network. On the demo's rows 40 plain steps brought the held-out loss from 4.54 to 0.53.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from luthier.core.errors import BaseError, RunError
from luthier.core.protocols import Anatomy
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

ENCODER_LR_MULTIPLIER = 0.05  # factor on the learning rate for the weights of the MLP


class PrefixConfig(VirtualTokenConfig):
    """Settings of prefix tuning."""

    default_learning_rate: ClassVar[float] = 0.02

    name: Literal["prefix"] = "prefix"
    prefix_projection: bool = Field(False, description="train an MLP that makes the prefix, and fold it away on saving")
    encoder_hidden_size: int | None = Field(None, ge=1, description="width of that MLP; left out: the base's own")

    @model_validator(mode="after")
    def _used(self) -> Self:
        if self.encoder_hidden_size is not None and not self.prefix_projection:
            raise ValueError("hidden is the width of the MLP, and there is none: set prefix_projection: true")
        return self

    @classmethod
    def from_peft(cls, adapter: Mapping[str, Any]) -> PrefixConfig:
        """The settings that PEFT's adapter_config.json describes; its file holds keys and values alone. Raises
        `RunError` for one of an encoder-decoder, which is another method."""
        if adapter.get("task_type") == "SEQ_2_SEQ_LM":
            raise RunError("this is PEFT's prefix of an encoder-decoder: it acts on the decoder's own attention alone, "
                           "and its layers share keys and values, which no method here does",
                           "use it with PEFT, or train a prefix here, which acts on all three attentions")
        return cls(num_virtual_tokens=adapter["num_virtual_tokens"])

    def attach(self, anatomy: Anatomy, *, seed: int) -> Prefix | ProjectedPrefix:
        start, scale = init_key_values(anatomy, self, seed)
        if not self.prefix_projection:
            return Prefix(anatomy, self, start, scale)
        layers, _, heads, tokens, width = start.shape
        encoder = draw_with_seed(seed, lambda: PrefixProjection(tokens, self.encoder_hidden_size or anatomy.sizes["hidden"],
                                                  (layers, 2, heads, width), self.prompt_tuning_init))
        return ProjectedPrefix(anatomy, self, encoder.to(start),
                               torch.zeros_like(start) if self.prompt_tuning_init == "random" else start, scale)


def init_key_values(anatomy: Anatomy, config: VirtualTokenConfig, seed: int) -> tuple[Tensor, Tensor]:
    """[layers, 2, G, N, d] keys and values to start from, and their size in each layer, [layers, 2, 1, 1, 1]."""
    found = get_injector(anatomy).keys_values(choose_init_tokens(anatomy, config, seed))
    if len({x.shape for pair in found for x in pair}) > 1:
        raise BaseError("the keys and values of this base's layers differ in shape, and a prefix has one shape for all",
                        "use the method prompt")
    start = to_trainable_dtype(torch.stack([torch.stack(pair) for pair in found]))
    scale = torch.tensor([[compute_rms(x) for x in layer] for layer in start]).to(start)[:, :, None, None, None]
    return (start if config.prompt_tuning_init == "text" else scale * draw_normal(start.shape, seed).to(start)), scale


def flatten_key_values(pairs: Tensor) -> Tensor:
    """[layers, 2, G, N, d] as PEFT's file has it: [N, layers * 2 * G * d]."""
    return pairs.permute(3, 0, 1, 2, 4).flatten(1)


def unflatten_key_values(rows: Tensor, like: Tensor) -> Tensor:
    """`flatten` undone."""
    layers, two, heads, tokens, width = like.shape
    return rows.view(tokens, layers, two, heads, width).permute(1, 2, 3, 0, 4)


def build_prefix_config(anatomy: Anatomy, pairs: Tensor) -> dict[str, Any]:
    """What PEFT's adapter_config.json says. Its `token_dim` is that of all key heads together."""
    _, _, heads, tokens, width = pairs.shape
    return {"peft_type": "PREFIX_TUNING", **build_peft_config(anatomy, tokens), "token_dim": heads * width,
            "num_attention_heads": heads, "prefix_projection": False, "encoder_hidden_size": heads * width}


class Prefix(VirtualTokenMethod):
    """Prefix tuning on a model."""

    def __init__(self, anatomy: Anatomy, config: VirtualTokenConfig, start: Tensor, scale: Tensor) -> None:
        super().__init__()
        self._like, self._scale = start, scale
        # A parameter for each, since each has a rate of its own.
        self.pairs = [(nn.Parameter(key.clone()), nn.Parameter(value.clone())) for key, value in start]
        self._peft_config = build_saved_config(anatomy, config, "prefix", build_prefix_config(anatomy, start))
        get_injector(anatomy).prefix(lambda: self.pairs, self.gate)

    def compute_virtual_tokens(self) -> Tensor:
        """[layers, 2, G, N, d]"""
        return torch.stack([torch.stack(pair) for pair in self.pairs])

    def parameters(self) -> dict[str, nn.Parameter]:
        return {f"{EMBEDDINGS}.{i}.{kind}": parameter for i, pair in enumerate(self.pairs)
                for kind, parameter in zip(("key", "value"), pair, strict=True)}

    def lr_multiplier(self, name: str) -> float:
        _, layer, kind = name.split(".")
        return float(self._scale[int(layer), int(kind == "value")])

    def state(self) -> dict[str, Tensor]:
        return {EMBEDDINGS: flatten_key_values(self.compute_virtual_tokens().detach()).contiguous()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        check_state_shapes({EMBEDDINGS: flatten_key_values(self._like)}, state)
        for pair, layer in zip(self.pairs, unflatten_key_values(state[EMBEDDINGS], self._like), strict=True):
            for parameter, saved in zip(pair, layer, strict=True):
                parameter.copy_(saved)

    def get_peft_config(self) -> dict[str, Any] | None:
        return self._peft_config


class PrefixProjection(nn.Module):
    """[layers, 2, G, N, d] out of an embedding for each virtual token, by PEFT's two maps and their names."""

    def __init__(self, tokens: int, hidden: int, shape: tuple[int, int, int, int], init: str) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(tokens, hidden)
        last = nn.Linear(hidden, shape[0] * shape[1] * shape[2] * shape[3])
        self.transform = nn.Sequential(nn.Linear(hidden, hidden), nn.Tanh(), last)
        if init == "text":
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self) -> Tensor:
        rows: Tensor = self.transform(self.embedding.weight)
        return rows.view(-1, *self.shape).permute(1, 2, 3, 0, 4)


class ProjectedPrefix(ReparameterizedPrompt):
    """Prefix tuning through an MLP, on a model."""

    encoder_lr_multiplier = ENCODER_LR_MULTIPLIER

    def __init__(self, anatomy: Anatomy, config: VirtualTokenConfig, encoder: nn.Module, start: Tensor, scale: Tensor) -> None:
        super().__init__(encoder, start, scale)
        self._peft_config = build_saved_config(anatomy, config, "prefix", build_prefix_config(anatomy, start))
        get_injector(anatomy).prefix(lambda: [(layer[0], layer[1]) for layer in self.compute_virtual_tokens()], self.gate)

    def flatten(self, virtual: Tensor) -> Tensor:
        return flatten_key_values(virtual).contiguous()

    def unflatten(self, rows: Tensor) -> Tensor:
        return unflatten_key_values(rows, self.start)

    def get_peft_config(self) -> dict[str, Any] | None:
        return self._peft_config
