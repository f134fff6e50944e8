"""What kind of architecture a folder holds, by its own config, and how Transformers loads each. `loading.py` goes
on."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
)

from luthier.core.errors import BaseError

Architecture = Literal["causal", "encoder", "seq2seq", "vision"]

# `AutoModel` is the stack alone: states are what an objective's head stands on.
AUTO_CLASSES: Mapping[Architecture, Any] = {"causal": AutoModelForCausalLM, "seq2seq": AutoModelForSeq2SeqLM,
                                            "encoder": AutoModel,
                               "vision": AutoModel}
# What files of a bare stack may hold besides it, by the first part of the name: what earlier training stood on the
# states. Nothing here is ever computed, so it is left where it is. All other weights must fit exactly.
IGNORED_WEIGHTS = {
    "pooler": "a map of the first state, for BERT's guess whether two texts follow each other",
    "cls": "BERT's heads for masked words and next sentences",
    "lm_head": "RoBERTa's head for masked words",
    "vocab_transform": "DistilBERT's head for masked words, three parts",
    "vocab_layer_norm": "",
    "vocab_projector": "",
    "predictions": "ALBERT's head for masked words",
    "generator_predictions": "ELECTRA's heads, two parts",
    "generator_lm_head": "",
    "discriminator_predictions": "ELECTRA's head for replaced words",
    "head": "ModernBERT's head for masked words, two parts",
    "decoder": "its second part; ViT's map from states back to pixels",
    "classifier": "the head of a classification, of texts or pictures",
    "pre_classifier": "DistilBERT's, its first part",
    "qa_outputs": "the head of a search for answers in a text",
}


CLASSIFIER_HEADS = ("score", "classifier")  # what decoders' classes call their head


def detect_architecture(config: PreTrainedConfig) -> Architecture | None:
    """The kind of model that `config` describes; None where it is none of them.

    BERT and its like can be built as encoders and as decoders: the classes named in the config decide, then
    `is_decoder`. Of a class that transformers does not know (it comes with code of its own) nothing is known: causal.
    """
    if config.is_encoder_decoder:
        return "seq2seq" if type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING else None
    if getattr(config, "image_size", None) and getattr(config, "patch_size", None):
        return "vision" if getattr(config, "vocab_size", None) is None else None
    writes = any(re.search("CausalLM|LMHead", name) for name in config.architectures or ())
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not writes and not getattr(config, "is_decoder", False):
        return "encoder"
    return "causal" if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) not in MODEL_MAPPING else None


def get_load_options(config: PreTrainedConfig, kind: Architecture) -> dict[str, Any]:
    """What the class is to be told besides its config: a stack without the pooler, which nothing here would use."""
    if AUTO_CLASSES[kind] is not AutoModel:
        return {}
    found: Any = MODEL_MAPPING[type(config)]
    stack = found[0] if isinstance(found, tuple) else found
    return {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(stack).parameters else {}


def is_ignored_weight(key: str, prefix: str) -> bool:
    """Whether the weight `key` is one of `IGNORED_WEIGHTS`; `prefix` is what the names of a model with a head begin
    with."""
    return key.removeprefix(f"{prefix}.").partition(".")[0] in IGNORED_WEIGHTS


class MissingLMHead(nn.Module):
    """In the place of an output projection that a model's files do not hold."""

    def forward(self, *_: Any) -> Any:
        raise BaseError("the model was saved as a classifier, without the projection onto the vocabulary, so it can "
                        "predict no tokens", "use it for its classes, or take the base that it was made from")


def ignore_classifier_head(model: Any, info: dict[str, Any]) -> None:
    """Of a decoder that was saved as a classifier: its class's head is not read here, and the projection onto the
    vocabulary, which its files do not hold, refuses to be used."""
    if not any(re.search("For(Sequence|Token)Classification", name) for name in model.config.architectures or ()):
        return
    info["unexpected_keys"] = {key for key in info["unexpected_keys"] if key.partition(".")[0] not in CLASSIFIER_HEADS}
    if lost := list_missing_head_weights(model, info["missing_keys"]):
        info["missing_keys"] = set(info["missing_keys"]) - set(lost)
        model.set_output_embeddings(MissingLMHead())


def list_missing_head_weights(model: Any, missing: Iterable[str]) -> list[str]:
    """Of the weights that a model's files lack, those that stand outside of its stack: its head's."""
    return sorted(key for key in missing if not key.startswith(f"{model.base_model_prefix}."))
