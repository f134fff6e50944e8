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
from luthier.models.identity import Identity, get_public_name, identify_base, is_local_path
from luthier.models.loading import (
    ALIASES,
    BaseConfig,
    compute_fingerprint,
    count_parameters,
    get_context_length,
    list_weight_files,
    load_model,
    load_tokenizer,
    prepare_folder,
    resolve_device,
    resolve_name,
)
from luthier.models.padding_token import make_embedding_tokenizer
from luthier.models.precision import cast_weights, read_stored_dtype
from luthier.models.sentence_files import write_sentence_files

__all__ = ["ALIASES", "BaseConfig", "CausalLM", "Encoder", "Identity", "Vision", "cache", "cast_weights", "get_context_length",
           "resolve_device", "make_embedding_tokenizer", "compute_fingerprint", "prepare_folder", "identify_base", "is_local_path", "load_model",
           "load_tokenizer", "open_family", "count_parameters", "get_public_name", "read_weights", "resolve_name", "list_weight_files",
           "read_stored_dtype", "write_sentence_files"]
