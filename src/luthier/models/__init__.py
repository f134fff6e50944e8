"""Loading pretrained models, finding their parts, and calling them. The only package that imports transformers.

Reading order: `structure.py` (the parts of a model), `attention/packed.py` (attention in packed rows),
`ops/fused_logprobs.py` (log-probabilities), `hf_model.py` (what all families share), `families/causal.py` (the first
family). `model_names.py`, `model_folder.py`, `loading.py` and `decoding.py` can be read on their own. `factory.py`
selects the family.
"""

from luthier.core.digests import get_cache_folder
from luthier.models.factory import open_family
from luthier.models.families.causal import CausalLM
from luthier.models.families.encoder import Encoder
from luthier.models.families.vision import Vision
from luthier.models.hf_task_heads import read_weights
from luthier.models.identity import Identity, get_public_name, identify_base, is_local_path
from luthier.models.loading import get_context_length, load_model, load_tokenizer, resolve_device
from luthier.models.model_config import ModelConfig
from luthier.models.model_folder import compute_fingerprint, count_parameters, list_weight_files, prepare_folder
from luthier.models.model_names import ALIASES, resolve_name
from luthier.models.padding_token import make_embedding_tokenizer
from luthier.models.precision import cast_weights, read_stored_dtype
from luthier.models.sentence_files import write_sentence_files

__all__ = ["ALIASES", "ModelConfig", "CausalLM", "Encoder", "Identity", "Vision", "get_cache_folder", "cast_weights",
           "compute_fingerprint", "count_parameters", "get_context_length", "get_public_name", "identify_base",
           "is_local_path", "list_weight_files", "load_model", "load_tokenizer", "make_embedding_tokenizer",
           "open_family", "prepare_folder", "read_stored_dtype", "read_weights", "resolve_device", "resolve_name",
           "write_sentence_files"]
