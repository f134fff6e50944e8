"""Loads a base model and selects its family by its config. Read `architectures.py` first."""

from __future__ import annotations

from pathlib import Path

from luthier.core.errors import BaseError
from luthier.core.protocols import Family
from luthier.models.architectures import detect_architecture
from luthier.models.families.causal import CausalLM
from luthier.models.families.encoder import Encoder
from luthier.models.families.seq2seq import Seq2Seq
from luthier.models.families.vision import Vision
from luthier.models.loading import load_model
from luthier.models.model_config import ModelConfig
from luthier.models.sentence_files import read_pooling


def open_family(config: ModelConfig, with_mlm_head: bool = False) -> Family:
    """Load the base as a `Family`. Raises `BaseError` with the reason if it cannot be loaded.

    Args:
        with_mlm_head: load an encoder with its masked-language-modeling head.
    """
    family = _load_family(config, with_mlm_head)
    family.has_explicit_pooling = config.pooling != "auto"
    return family


def _load_family(config: ModelConfig, with_mlm_head: bool) -> CausalLM | Encoder | Vision | Seq2Seq:
    model, tokenizer = load_model(config, with_mlm_head)
    kind = detect_architecture(model.config)
    if kind == "encoder":
        auto = read_pooling(Path(model.name_or_path)) if config.pooling == "auto" else config.pooling
        return Encoder(model, tokenizer, pooling=auto)
    if kind in ("vision", "seq2seq"):
        family = Vision(model, tokenizer) if kind == "vision" else Seq2Seq(model, tokenizer)
        if config.pooling not in ("auto", family.pooling):
            raise BaseError(f"model.pooling: {config.pooling!r}; with this base it is always {family.pooling!r}",
                            "omit model.pooling")
        return family
    return CausalLM(model, tokenizer, pooling="last" if config.pooling == "auto" else config.pooling)
