"""Where a model's parts are, and how to call it. The only room that imports transformers.

Reading order: `structure.py` (the parts), `models/attention/packed.py` (attention in packed rows),
`models/ops/fused_logprobs.py` (log-probabilities),
`hf_model.py` (what families share), `models/families/causal.py` (the first of them); `loading.py` and `decoding.py`
stand alone.
`models/families/encoder.py`, `models/families/vision.py` and `models/families/seq2seq.py` are the other families, and
`factory.py` chooses.
"""

from luthier.core.digests import cache
from luthier.models.factory import open_family
from luthier.models.families.causal import CausalLM
from luthier.models.families.encoder import Encoder
from luthier.models.families.vision import Vision
from luthier.models.hf_task_heads import read_weights
from luthier.models.identity import Identity, identify, is_local, public_name
from luthier.models.loading import (
    ALIASES,
    ModelConfig,
    context_of,
    device_of,
    fingerprint,
    folder,
    load,
    load_tokenizer,
    parameter_count,
    resolve,
    shards,
)
from luthier.models.padding_token import embedding_tokenizer
from luthier.models.precision import cast, stored_dtype
from luthier.models.sentence_files import write_sentence_files

__all__ = ["ALIASES", "ModelConfig", "CausalLM", "Encoder", "Identity", "Vision", "cache", "cast", "context_of",
           "device_of", "embedding_tokenizer", "fingerprint", "folder", "identify", "is_local", "load",
           "load_tokenizer", "open_family", "parameter_count", "public_name", "read_weights", "resolve", "shards",
           "stored_dtype", "write_sentence_files"]
