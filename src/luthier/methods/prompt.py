"""Prompt tuning: N virtual tokens before every text, whose embeddings alone train. Read `full.py` first.

    rows of embeddings  [e(x_1), ..., e(x_L)]  ->  [p_1, ..., p_N, e(x_1), ..., e(x_L)]          p: [N, D], trained

Lester et al. 2021 (arXiv:2104.08691), section 2. The p start as the embeddings of real words (section 3.2): a random
start lies where no word ever was, and what the layers make of such a place hardly depends on it, so that it learns late
or not at all.

Learning rate 0.3, in units of the embeddings: `rate` is the root mean square of an entry of the words' embeddings that
the p start from (N of them: drawn, or those of `text`), since Adam moves every entry by about the rate at each step,
whatever the gradient's size. A base whose embeddings are of size 0.1 thus learns at 0.03, one of size 2 at 0.6, and
both go the same way relative to their words. So much more than weights want, because a prompt must leave the words
behind, and nothing but itself helps it: on the demo's rows 40 steps at 0.05, 0.15 and 0.3 brought the held-out loss to
1.45, 0.94 and 0.76. The paper's rate is 0.3 too, with Adafactor.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from luthier.core.config import Config
from luthier.core.errors import NotMergeable, RecipeError
from luthier.core.protocols import AdapterGate, Anatomy
from luthier.core.soft_prompts import Kind, Ports
from luthier.methods.adapter_format import build_native_config
from luthier.methods.hooks import load_into

EMBEDDINGS = "prompt_embeddings"  # PEFT's name of all that it keeps of virtual tokens
MAX_SAMPLED_TOKEN_ID = 5000  # words to start from are drawn from so many first entries of the vocabulary, the most frequent ones
PromptTuningInit = Literal["text", "random"]
INIT_TEXT_HELP = "start from this text, repeated or cut to length, instead of words that are drawn"


class VirtualTokenConfig(Config):
    """Settings that all virtual tokens share."""

    num_virtual_tokens: int = Field(20, ge=1, description="how many virtual tokens; each takes a place of the context")
    prompt_tuning_init: PromptTuningInit = Field("text", description="start as real words, or at random (learns late)")
    prompt_tuning_init_text: str | None = Field(None, min_length=1, description=INIT_TEXT_HELP)

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if self.prompt_tuning_init_text is not None and self.prompt_tuning_init == "random":
            raise ValueError("text is a start from words: set prompt_tuning_init: text, or leave the text out")
        return self


class PromptConfig(VirtualTokenConfig):
    """Settings of prompt tuning."""

    default_learning_rate: ClassVar[float] = 0.3

    name: Literal["prompt"] = "prompt"

    @classmethod
    def from_peft(cls, adapter: Mapping[str, Any]) -> PromptConfig:
        """The settings that PEFT's adapter_config.json describes."""
        return cls(num_virtual_tokens=adapter["num_virtual_tokens"])

    def attach(self, anatomy: Anatomy, *, seed: int) -> Prompt:
        start, scale = embed_init_tokens(anatomy, self, seed)
        return Prompt(anatomy, self, start, scale)


# ---------------------------------------------------------------- where virtual tokens start


def get_injector(anatomy: Anatomy) -> Ports:
    """Where virtual tokens enter. Raises `RecipeError` where they cannot."""
    if anatomy.ports is None:
        raise RecipeError("this base has no place for virtual tokens: its family computes positions or pictures that "
                          "nothing can be put before", "use lora or another method that changes its layers")
    return anatomy.ports


def choose_init_tokens(anatomy: Anatomy, config: VirtualTokenConfig, seed: int) -> list[int] | Tensor:
    """N token ids to start from: those of the text, or frequent words drawn without repetition while they last. Of a
    base without words [N, D], vectors of the kind that its first layer gets. Raises as `ports_of` does."""
    n, usual = config.num_virtual_tokens, get_injector(anatomy).usual
    if usual is None:
        return sample_token_ids(anatomy, n, config.prompt_tuning_init_text, seed)
    if config.prompt_tuning_init_text is not None:
        raise RecipeError("method.prompt_tuning_init_text: this base has no words that virtual tokens could start from", "leave it out: "
                          "prompt_tuning_init: text then starts from what the base's first layer usually gets")
    return usual(n, seed)


def sample_token_ids(anatomy: Anatomy, n: int, text: str | None, seed: int) -> list[int]:
    """See `starting`."""
    tokenizer = anatomy.tokenizer
    if text is not None:
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if not ids:
            raise RecipeError(f"method.prompt_tuning_init_text {text!r} has no tokens", "give words to start from")
        return (ids * (n // len(ids) + 1))[:n]
    special = set(tokenizer.all_special_ids)
    common = [i for i in range(min(anatomy.sizes["vocabulary"], MAX_SAMPLED_TOKEN_ID)) if i not in special]
    found = [i for i in common if tokenizer.decode([i]).strip().isalpha()] or common
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
    return [found[i] for i in (order * (n // len(order) + 1))[:n]]


@torch.no_grad()
def embed_init_tokens(anatomy: Anatomy, config: VirtualTokenConfig, seed: int) -> tuple[Tensor, float]:
    """[N, D] embeddings to start from, and the root mean square of an entry of the N words' embeddings."""
    start = choose_init_tokens(anatomy, config, seed)
    if isinstance(start, list):
        start = anatomy.embedding(torch.tensor(start, device=next(anatomy.embedding.parameters()).device))
    real = to_trainable_dtype(start)
    scale = compute_rms(real)
    if config.prompt_tuning_init == "random":
        real = scale * draw_normal(real.shape, seed).to(real)
    return real, scale


def to_trainable_dtype(x: Tensor) -> Tensor:
    """A copy to train: in float32 or wider, whatever the base is kept in; small updates vanish in sixteen bits."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32), copy=True)


def compute_rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def draw_normal(shape: torch.Size | tuple[int, ...], seed: int) -> Tensor:
    """Standard normal numbers, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- on a model


class VirtualTokenMethod:
    """What all virtual tokens on a model share: their switch, and that they cannot be folded into weights."""

    optimizer_hooks = ()

    def __init__(self) -> None:
        self.gate = AdapterGate()
        self.gates = (self.gate,)

    def disabled(self) -> AbstractContextManager[None]:
        return self.gate.disabled()

    def merge(self) -> None:
        raise NotMergeable("virtual tokens stand beside the words, in no weight of the base that could hold them",
                           "use the run folder as it is (PEFT loads it), or tune with lora for a model of its own")

    unmerge = merge


class Prompt(VirtualTokenMethod):
    """Prompt tuning on a model."""

    def __init__(self, anatomy: Anatomy, config: VirtualTokenConfig, start: Tensor, scale: float) -> None:
        super().__init__()
        self.embeddings, self._scale = nn.Parameter(start), scale
        self._peft_config = build_saved_config(anatomy, config, "prompt", {
            "peft_type": "PROMPT_TUNING", **build_peft_config(anatomy, len(start)), "prompt_tuning_init": "RANDOM"})
        get_injector(anatomy).prompt(self.compute_virtual_tokens, self.gate)

    def compute_virtual_tokens(self) -> Tensor:
        """[N, D] the virtual tokens' embeddings."""
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


def build_peft_config(anatomy: Anatomy, tokens: int) -> dict[str, Any]:
    """What PEFT's adapter_config.json says of all virtual tokens."""
    sizes = anatomy.sizes
    return {"task_type": anatomy.task, "num_virtual_tokens": tokens, "token_dim": sizes["hidden"],
            "num_transformer_submodules": 1, "num_attention_heads": sizes["heads"], "num_layers": sizes["layers"],
            "inference_mode": True}


def build_saved_config(anatomy: Anatomy, config: VirtualTokenConfig, kind: Kind, theirs: dict[str, Any]) -> dict[str, Any]:
    """What adapter_config.json says: in PEFT's form where PEFT would do the same with it, else in one of our own."""
    return theirs if kind in get_injector(anatomy).peft else build_native_config(config, anatomy.task)


def drop_unused_tokens(state: Mapping[str, Tensor], tokens: int) -> Mapping[str, Tensor]:
    """A saved prompt without what nobody uses: PEFT keeps a second set of N for the decoder of an encoder-decoder
    (`num_transformer_submodules` 2, its default there), and puts in the first N, before the source, alone."""
    found = state.get(EMBEDDINGS)
    return state if found is None or len(found) != 2 * tokens else {**state, EMBEDDINGS: found[:tokens]}
