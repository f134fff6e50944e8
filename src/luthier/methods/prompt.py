"""Prompt tuning: trains the embeddings of N virtual tokens before every text. Read `full.py` first.

    rows of embeddings  [e(x_1), ..., e(x_L)]  ->  [p_1, ..., p_N, e(x_1), ..., e(x_L)]          p: [N, D], trained

Lester et al. 2021 (arXiv:2104.08691), section 2. The p are initialized with embeddings of real tokens (section 3.2). A
random initialization is far from every token embedding; the layers' outputs hardly depend on it there, so it learns
late or not at all.

Learning rate 0.3, relative to the embeddings: `lr_multiplier` is the root mean square of the N initial embeddings,
since Adam moves every entry by about the learning rate at each step, whatever the gradient's size. A base with
embeddings of size 0.1 is thus trained at 0.03, one of size 2 at 0.6. The rate is far above that of weights, because a
prompt must move far and nothing else adapts. On the demo's rows 40 steps at 0.05, 0.15 and 0.3 reduced the held-out
loss to 1.45, 0.94 and 0.76. The paper's rate is 0.3 too, with Adafactor.

Shape letters: N virtual tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from luthier.core.adapter_gate import AdapterGate
from luthier.core.config import Config
from luthier.core.errors import NotMergeable, RecipeError
from luthier.core.protocols import ModelStructure
from luthier.core.soft_prompts import SoftPromptInjector, SoftPromptKind
from luthier.methods.adapter_format import build_native_config
from luthier.methods.hooks import load_into

EMBEDDINGS = "prompt_embeddings"  # the only tensor in PEFT's file of virtual tokens
# initial tokens are sampled below this id: the most frequent ones
MAX_SAMPLED_TOKEN_ID = 5000
PromptTuningInit = Literal["text", "random"]
INIT_TEXT_HELP = "initialize from this text, repeated or truncated to length, instead of sampled tokens"


class VirtualTokenConfig(Config):
    """Settings shared by all methods with virtual tokens."""

    num_virtual_tokens: int = Field(20, ge=1, description="number of virtual tokens; each uses one position of the "
                                                          "context")
    prompt_tuning_init: PromptTuningInit = Field(
        "text", description="text: the embeddings of real tokens; random: learns late")
    prompt_tuning_init_text: str | None = Field(None, min_length=1, description=INIT_TEXT_HELP)

    @model_validator(mode="after")
    def _check_init(self) -> Self:
        if self.prompt_tuning_init_text is not None and self.prompt_tuning_init == "random":
            raise ValueError("prompt_tuning_init_text needs prompt_tuning_init: text; set it, or omit the text")
        return self


class PromptConfig(VirtualTokenConfig):
    """Settings of prompt tuning."""

    default_learning_rate: ClassVar[float] = 0.3

    name: Literal["prompt"] = "prompt"

    @classmethod
    def from_peft(cls, adapter: Mapping[str, Any]) -> PromptConfig:
        """Settings from PEFT's adapter_config.json."""
        return cls(num_virtual_tokens=adapter["num_virtual_tokens"])

    def attach(self, structure: ModelStructure, *, seed: int) -> Prompt:
        start, scale = embed_init_tokens(structure, self, seed)
        return Prompt(structure, self, start, scale)


# ---------------------------------------------------------------- initialization


def get_injector(structure: ModelStructure) -> SoftPromptInjector:
    """The model's injector of virtual tokens. Raises `RecipeError` if it has none."""
    if structure.injector is None:
        raise RecipeError("this base does not support virtual tokens: its positions or images cannot be preceded by "
                          "other tokens", "use lora or another method that changes its layers")
    return structure.injector


def choose_init_tokens(structure: ModelStructure, config: VirtualTokenConfig, seed: int) -> list[int] | Tensor:
    """N initial token ids: those of the text, or frequent tokens sampled without replacement. For a base without a
    vocabulary, [N, D] typical inputs of its first layer. Raises as `get_injector` does."""
    n, usual = config.num_virtual_tokens, get_injector(structure).typical_embeddings
    if usual is None:
        return sample_token_ids(structure, n, config.prompt_tuning_init_text, seed)
    if config.prompt_tuning_init_text is not None:
        raise RecipeError("method.prompt_tuning_init_text: this base has no vocabulary",
                          "omit it: prompt_tuning_init: text then uses typical inputs of the first layer")
    return usual(n, seed)


def sample_token_ids(structure: ModelStructure, n: int, text: str | None, seed: int) -> list[int]:
    """See `choose_init_tokens`."""
    tokenizer = structure.tokenizer
    assert tokenizer is not None, "a base with a vocabulary has a tokenizer"
    if text is not None:
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if not ids:
            raise RecipeError(f"method.prompt_tuning_init_text {text!r} has no tokens", "use a longer text")
        return (ids * (n // len(ids) + 1))[:n]  # repeated until there are n
    special = set(tokenizer.all_special_ids)
    candidates = [i for i in range(min(structure.sizes["vocabulary"], MAX_SAMPLED_TOKEN_ID)) if i not in special]
    words = [i for i in candidates if tokenizer.decode([i]).strip().isalpha()] or candidates
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(seed)).tolist()
    return [words[i] for i in (order * (n // len(order) + 1))[:n]]


@torch.no_grad()
def embed_init_tokens(structure: ModelStructure, config: VirtualTokenConfig, seed: int) -> tuple[Tensor, float]:
    """[N, D] initial embeddings, and the root mean square of the embeddings of the N initial tokens."""
    start = choose_init_tokens(structure, config, seed)
    if isinstance(start, list):
        start = structure.embedding(torch.tensor(start, device=next(structure.embedding.parameters()).device))  # [N, D]
    embeddings = to_trainable_dtype(start)  # [N, D]
    scale = compute_rms(embeddings)
    if config.prompt_tuning_init == "random":
        embeddings = scale * draw_normal(embeddings.shape, seed).to(embeddings)  # [N, D]
    return embeddings, scale


def to_trainable_dtype(x: Tensor) -> Tensor:
    """A copy in float32 or wider, whatever the base's dtype: bfloat16 rounds small updates to nothing."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32), copy=True)  # a copy: x may be the base's own


def compute_rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def draw_normal(shape: torch.Size | tuple[int, ...], seed: int) -> Tensor:
    """Standard normal numbers, equal on every device."""
    # Drawn by the CPU's generator: a GPU's would give other numbers.
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- the tuner


class VirtualTokenMethod:
    """Base class of tuners of virtual tokens: their gate, and the refusal to merge."""

    optimizer_hooks = ()

    def __init__(self) -> None:
        self.gate = AdapterGate()
        self.gates = (self.gate,)

    def disabled(self) -> AbstractContextManager[None]:
        return self.gate.disabled()

    def merge(self) -> None:
        raise NotMergeable("virtual tokens cannot be merged into the base's weights",
                           "use the adapter as it is (PEFT loads it), or train with lora, which can be merged")

    unmerge = merge


class Prompt(VirtualTokenMethod):
    """Prompt tuning on a model."""

    def __init__(self, structure: ModelStructure, config: VirtualTokenConfig, start: Tensor, scale: float) -> None:
        super().__init__()
        self.embeddings, self._scale = nn.Parameter(start), scale  # [N, D]
        self._peft_config = build_saved_config(structure, config, "prompt", {
            "peft_type": "PROMPT_TUNING", **build_peft_config(structure, len(start)), "prompt_tuning_init": "RANDOM"})
        get_injector(structure).add_prompt(self.compute_virtual_tokens, self.gate)

    def compute_virtual_tokens(self) -> Tensor:
        """[N, D] embeddings of the virtual tokens."""
        return self.embeddings

    def parameters(self) -> dict[str, nn.Parameter]:
        return {EMBEDDINGS: self.embeddings}

    def lr_multiplier(self, name: str) -> float:
        return self._scale

    def state(self) -> dict[str, Tensor]:
        return {EMBEDDINGS: self.embeddings.detach()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        load_into(self.parameters(), drop_unused_tokens(state, len(self.embeddings)))

    def get_peft_config(self) -> dict[str, Any] | None:
        return self._peft_config


def build_peft_config(structure: ModelStructure, tokens: int) -> dict[str, Any]:
    """The fields of PEFT's adapter_config.json that all virtual tokens share."""
    sizes = structure.sizes
    return {"task_type": structure.task, "num_virtual_tokens": tokens, "token_dim": sizes["hidden"],
            "num_transformer_submodules": 1, "num_attention_heads": sizes["heads"], "num_layers": sizes["layers"],
            "inference_mode": True}


def build_saved_config(structure: ModelStructure, config: VirtualTokenConfig, kind: SoftPromptKind,
                       peft_config: dict[str, Any]) -> dict[str, Any]:
    """The content of adapter_config.json: PEFT's where PEFT computes the same on this base, else Luthier's own."""
    return peft_config if kind in get_injector(structure).peft_kinds else build_native_config(config, structure.task)


def drop_unused_tokens(state: Mapping[str, Tensor], tokens: int) -> Mapping[str, Tensor]:
    """Remove rows that PEFT saves but does not use. For an encoder-decoder it saves 2 N rows
    (`num_transformer_submodules` 2) and uses only the first N, before the source."""
    rows = state.get(EMBEDDINGS)
    return state if rows is None or len(rows) != 2 * tokens else {**state, EMBEDDINGS: rows[:tokens]}
