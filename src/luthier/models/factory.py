"""From a name to a family: the base is loaded, and its own config says of which kind it is. Read `architectures.py`
first."""

from __future__ import annotations

from pathlib import Path

from luthier.core.errors import BaseError
from luthier.core.protocols import Family
from luthier.models.architectures import kind_of
from luthier.models.families.causal import CausalLM
from luthier.models.families.encoder import Encoder
from luthier.models.families.seq2seq import Seq2Seq
from luthier.models.families.vision import Vision
from luthier.models.loading import ModelConfig, load
from luthier.models.sentence_files import pooling_of


def open_family(config: ModelConfig, words: bool = False) -> Family:
    """The base, loaded, behind the contract of its kind. Raises `BaseError` where it cannot be, saying why.

    Args:
        words: load an encoder with its own head for masked words.
    """
    made = _family(config, words)
    made.pooling_given = config.pooling != "auto"
    return made


def _family(config: ModelConfig, words: bool) -> CausalLM | Encoder | Vision | Seq2Seq:
    model, tokenizer = load(config, words)
    kind = kind_of(model.config)
    if kind == "encoder":
        auto = pooling_of(Path(model.name_or_path)) if config.pooling == "auto" else config.pooling
        return Encoder(model, tokenizer, pooling=auto)
    if kind in ("vision", "seq2seq"):
        made = Vision(model, tokenizer) if kind == "vision" else Seq2Seq(model, tokenizer)
        if config.pooling not in ("auto", made.pooling):
            raise BaseError(f"model.pooling: {config.pooling!r}; with this base it is always {made.pooling!r}",
                            "leave model.pooling out")
        return made
    return CausalLM(model, tokenizer, pooling="last" if config.pooling == "auto" else config.pooling)
