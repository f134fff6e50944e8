"""Detects a model's architecture from its config, and which Transformers class loads it. `loading.py` continues."""

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
from luthier.models.hf_attributes import get_optional

Architecture = Literal["causal", "encoder", "seq2seq", "vision"]

# `AutoModel` loads the backbone without a head: an objective adds its own head over the states.
AUTO_CLASSES: Mapping[Architecture, Any] = {"causal": AutoModelForCausalLM, "seq2seq": AutoModelForSeq2SeqLM,
                                            "encoder": AutoModel,
                               "vision": AutoModel}
# Weights of earlier heads that the files of a backbone may contain, by the first part of the name. They are not loaded,
# because nothing computes them. All other weights must match the model exactly.
IGNORED_WEIGHTS = {
    "pooler": "BERT's layer over the first state, for next-sentence prediction",
    "cls": "BERT's heads for masked tokens and next sentences",
    "lm_head": "RoBERTa's masked-language-modeling head",
    "vocab_transform": "DistilBERT's masked-language-modeling head, three modules",
    "vocab_layer_norm": "",
    "vocab_projector": "",
    "predictions": "ALBERT's masked-language-modeling head",
    "generator_predictions": "ELECTRA's generator head, two modules",
    "generator_lm_head": "",
    "discriminator_predictions": "ELECTRA's head for replaced tokens",
    "head": "ModernBERT's masked-language-modeling head, two modules",
    "decoder": "its second module; ViT's decoder from states to pixels",
    "classifier": "a classification head, of texts or images",
    "pre_classifier": "the first module of DistilBERT's classification head",
    "qa_outputs": "an extractive question-answering head",
}


CLASSIFIER_HEADS = ("score", "classifier")  # names of the head in decoders' classification classes


def detect_architecture(config: PreTrainedConfig) -> Architecture | None:
    """The architecture that `config` describes; None if it is not supported.

    BERT-like models can be built as encoders and as decoders: the class names in the config decide, then `is_decoder`.
    A config class unknown to transformers (with its own Python code) is assumed to be causal.
    """
    if config.is_encoder_decoder:
        return "seq2seq" if type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING else None
    if get_optional(config, "image_size") and get_optional(config, "patch_size"):
        return "vision" if get_optional(config, "vocab_size") is None else None
    writes = any(re.search("CausalLM|LMHead", name) for name in config.architectures or ())
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not writes and not get_optional(config, "is_decoder"):
        return "encoder"
    return "causal" if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) not in MODEL_MAPPING else None


def get_load_options(config: PreTrainedConfig, kind: Architecture) -> dict[str, Any]:
    """Extra arguments of the class: the backbone is built without a pooler, because nothing here uses it."""
    if AUTO_CLASSES[kind] is not AutoModel:
        return {}
    found: Any = MODEL_MAPPING[type(config)]
    stack = found[0] if isinstance(found, tuple) else found
    return {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(stack).parameters else {}


def is_ignored_weight(key: str, prefix: str) -> bool:
    """Whether `key` is one of `IGNORED_WEIGHTS`; `prefix` is the backbone's prefix in a model with a head."""
    return key.removeprefix(f"{prefix}.").partition(".")[0] in IGNORED_WEIGHTS


class MissingLMHead(nn.Module):
    """Replaces an output projection that a model's files do not contain."""

    def forward(self, *_: Any) -> Any:
        raise BaseError("the model was saved as a classifier without a language-modeling head, so it can predict no "
                        "tokens",
                        "use it as a classifier, or choose the base that it was trained from")


def ignore_classifier_head(model: Any, info: dict[str, Any]) -> None:
    """For a decoder that was saved as a classifier: ignores the classification head, and replaces the missing output
    projection by one that raises an error."""
    if not any(re.search("For(Sequence|Token)Classification", name) for name in model.config.architectures or ()):
        return
    info["unexpected_keys"] = {key for key in info["unexpected_keys"] if key.partition(".")[0] not in CLASSIFIER_HEADS}
    if lost := list_missing_head_weights(model, info["missing_keys"]):
        info["missing_keys"] = set(info["missing_keys"]) - set(lost)
        model.set_output_embeddings(MissingLMHead())


def list_missing_head_weights(model: Any, missing: Iterable[str]) -> list[str]:
    """The missing weights outside of the backbone: those of the head."""
    return sorted(key for key in missing if not key.startswith(f"{model.base_model_prefix}."))
