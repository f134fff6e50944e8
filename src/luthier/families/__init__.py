"""Where a model's parts are, and how to call it. The only room that imports transformers.

Reading order: `anatomy.py` (the parts), `forest.py` (attention in packed rows), `head.py` (log-probabilities),
`packed.py` (what families share), `causal.py` (the first of them); `load.py` and `generate.py` stand alone.
`encoder.py`, `vision.py` and `seq2seq.py` are the other families, and `open.py` chooses.
"""

from luthier.core.digests import cache
from luthier.families.causal import CausalLM
from luthier.families.encoder import Encoder
from luthier.families.identity import Identity, identify, is_local, public_name
from luthier.families.load import (
    ALIASES,
    BaseConfig,
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
from luthier.families.open import open_family
from luthier.families.padding import embedding_tokenizer
from luthier.families.precision import cast, stored_dtype
from luthier.families.sentence import write_sentence_files
from luthier.families.task_heads import read_weights
from luthier.families.vision import Vision

__all__ = ["ALIASES", "BaseConfig", "CausalLM", "Encoder", "Identity", "Vision", "cache", "cast", "context_of",
           "device_of", "embedding_tokenizer", "fingerprint", "folder", "identify", "is_local", "load",
           "load_tokenizer", "open_family", "parameter_count", "public_name", "read_weights", "resolve", "shards",
           "stored_dtype", "write_sentence_files"]
