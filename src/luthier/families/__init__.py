"""Where a model's parts are, and how to call it. The only room that imports transformers.

Reading order: `anatomy.py` (the parts), `forest.py` (attention in packed rows), `head.py` (log-probabilities),
`causal.py` (joins them); `load.py` and `generate.py` stand alone.
"""

from luthier.families.causal import CausalLM
from luthier.families.load import ALIASES, BaseConfig, cache, folder, load, load_tokenizer, resolve

__all__ = ["ALIASES", "BaseConfig", "CausalLM", "cache", "folder", "load", "load_tokenizer", "resolve"]
