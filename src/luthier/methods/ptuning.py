"""P-tuning: virtual tokens computed by a trained encoder. Read `prompt.py` first.

    p = w + s F(z)          z: [N, D] trained   F: an encoder, trained   w: [N, D] token embeddings, frozen

F is a bidirectional LSTM with an MLP on it (Liu et al. 2021, arXiv:2103.10385, equation 3), or the MLP of three linear
layers
that PEFT and NeMo use. The paper starts with an untrained F alone (`prompt_tuning_init: random`, w = 0). Here F's last
linear layer starts at zero, so p starts as real tokens, for the reason given in `prompt.py`. s is the size of the
base's embeddings; F's weights thus have the usual size of network weights.

Only p is needed after training: the saved file holds p, as PEFT's does. What resuming needs besides is kept in the
checkpoints under names that begin with `training.`.

Learning rate 1e-2: high for a small network under Adam, since its output must move as far as a prompt without an
encoder. On the demo's rows 40 steps at 1e-3, 4e-3 and 1e-2 reduced the held-out loss to 2.25, 1.56 and 0.77. The
encoder amplifies each step, so the rate is far below prompt tuning's 0.3.

Shape letters: N virtual tokens, D hidden size, E width of the encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from luthier.core.protocols import TRAINING, ModelStructure
from luthier.methods.hooks import check_state_shapes, load_into
from luthier.methods.prompt import (
    EMBEDDINGS,
    PromptConfig,
    VirtualTokenConfig,
    VirtualTokenMethod,
    build_peft_config,
    build_saved_config,
    drop_unused_tokens,
    embed_init_tokens,
    get_injector,
)


class PTuningConfig(VirtualTokenConfig):
    """Settings of P-tuning."""

    default_learning_rate: ClassVar[float] = 1e-2

    name: Literal["ptuning"] = "ptuning"
    encoder_reparameterization_type: Literal["mlp", "lstm"] = Field(
        "mlp", description="the encoder: three linear layers, or an LSTM")
    encoder_hidden_size: int | None = Field(None, ge=1, description="width of the encoder; default: the base's "
                                            "hidden size")

    @classmethod
    def from_peft(cls, adapter: Mapping[str, Any]) -> PTuningConfig:
        """Settings from PEFT's adapter_config.json; its file holds only the encoder's output."""
        kind = str(adapter.get("encoder_reparameterization_type") or "MLP").rsplit(".", 1)[-1].lower()
        return cls.parse({"num_virtual_tokens": adapter["num_virtual_tokens"], "encoder_reparameterization_type": kind,
                          "encoder_hidden_size": adapter.get("encoder_hidden_size")})

    def attach(self, structure: ModelStructure, *, seed: int) -> PTuning:
        words, scale = embed_init_tokens(structure, self, seed)
        encoder = draw_with_seed(seed, lambda: PromptEncoder(
            self.encoder_reparameterization_type, words.shape, self.encoder_hidden_size or words.shape[1],
            self.prompt_tuning_init))
        start = torch.zeros_like(words) if self.prompt_tuning_init == "random" else words  # [N, D]
        return PTuning(structure, self, encoder.to(words), start, torch.tensor(scale).to(words))


def draw_with_seed(seed: int, make: Callable[[], nn.Module]) -> nn.Module:
    """Call `make` with the global random generator at this seed; the generator's state is restored."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


class PromptEncoder(nn.Module):
    """F(z): [N, D]. Its submodules are named as in PEFT."""

    def __init__(self, kind: str, shape: torch.Size, hidden: int, init: str) -> None:
        super().__init__()
        tokens, width = shape
        self.embedding = nn.Embedding(tokens, width)  # z, [N, D]
        if kind == "lstm":
            # [1, N, D] -> [1, N, 2 E]: one half for each direction.
            self.lstm_head = nn.LSTM(width, hidden, num_layers=2, bidirectional=True, batch_first=True)
            self.mlp_head = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width))
        else:
            self.mlp_head = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
                                          nn.Linear(hidden, width))
        self.kind = kind
        if init == "text":
            last = self.mlp_head[-1]
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)  # F(z) = 0 at first: p starts as the tokens w
            nn.init.zeros_(last.bias)

    def forward(self) -> Tensor:
        z: Tensor = self.embedding.weight  # [N, D]
        output: Tensor = self.mlp_head(self.lstm_head(z[None])[0][0] if self.kind == "lstm" else z)  # [N, D]
        return output


class ReparameterizedPrompt(VirtualTokenMethod):
    """Virtual tokens computed by a network during training: ``start + scale * encoder()``, of any shape.

    A saved file holds only the result. After loading it, the result is a parameter (`bare_tokens`) without an encoder.

    Args:
        encoder: computes the change.
        start: initial value, to which the change is added.
        scale: factor on the change; broadcasts over the result.

    Attributes:
        encoder_lr_multiplier: factor on the learning rate of the encoder's weights.
        bare_lr_multiplier: factor on the learning rate of `bare_tokens`, in units of `scale`.
    """

    encoder_lr_multiplier, bare_lr_multiplier = 1.0, 1.0

    def __init__(self, encoder: nn.Module, start: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.encoder, self.start, self.scale = encoder, start, scale
        self.bare_tokens: nn.Parameter | None = None

    def compute_virtual_tokens(self) -> Tensor:
        if self.bare_tokens is not None:
            return self.bare_tokens
        tokens: Tensor = self.start + self.scale * self.encoder()  # [N, D], or the shape of a prefix
        return tokens

    def parameters(self) -> dict[str, nn.Parameter]:
        if self.bare_tokens is not None:
            return {EMBEDDINGS: self.bare_tokens}
        return {TRAINING + name: parameter for name, parameter in self.encoder.named_parameters()}

    def lr_multiplier(self, name: str) -> float:
        if self.bare_tokens is None:
            return self.encoder_lr_multiplier
        return self.bare_lr_multiplier * float(self.scale.mean())

    def state(self) -> dict[str, Tensor]:
        with torch.no_grad():
            state = {EMBEDDINGS: self.flatten(self.compute_virtual_tokens()).detach()}
        return state if self.bare_tokens is not None else state | self._get_training_state()

    def _get_training_state(self) -> dict[str, Tensor]:
        """What resuming needs besides the result."""
        encoder = {TRAINING + name: parameter.detach() for name, parameter in self.encoder.named_parameters()}
        return {**encoder, f"{TRAINING}start": self.start, f"{TRAINING}scale": self.scale}

    def load(self, state: Mapping[str, Tensor]) -> None:
        expected = {EMBEDDINGS: self.flatten(self.start)}
        if state.keys() == expected.keys():
            check_state_shapes(expected, state)
            result = self.unflatten(state[EMBEDDINGS].to(self.start, copy=True))
            if self.bare_tokens is None:
                self.bare_tokens = nn.Parameter(result)
            self.bare_tokens.data.copy_(result)  # in place: an optimizer may hold this parameter
            return
        check_state_shapes(expected | self._get_training_state(), state)
        self.bare_tokens, self.start, self.scale = None, *(state[TRAINING + n].to(self.start, copy=True)
                                                      for n in ("start", "scale"))
        load_into(self.parameters(), {name: state[name] for name in self.parameters()})

    def flatten(self, virtual: Tensor) -> Tensor:
        """Reshape to PEFT's file: one row for each virtual token."""
        return virtual

    def unflatten(self, rows: Tensor) -> Tensor:
        """The inverse of `flatten`."""
        return rows


class PTuning(ReparameterizedPrompt):
    """P-tuning on a model."""

    bare_lr_multiplier = PromptConfig.default_learning_rate / PTuningConfig.default_learning_rate

    def __init__(self, structure: ModelStructure, config: PTuningConfig, encoder: nn.Module, start: Tensor,
                 scale: Tensor) -> None:
        super().__init__(encoder, start, scale)
        self._peft_config = build_saved_config(structure, config, "prompt", {
            "peft_type": "P_TUNING", **build_peft_config(structure, len(start)),
            "encoder_hidden_size": config.encoder_hidden_size or start.shape[1],
            "encoder_reparameterization_type": config.encoder_reparameterization_type.upper()})
        get_injector(structure).add_prompt(self.compute_virtual_tokens, self.gate)

    def load(self, state: Mapping[str, Tensor]) -> None:
        super().load(drop_unused_tokens(state, len(self.start)))

    def get_peft_config(self) -> dict[str, Any] | None:
        return self._peft_config
