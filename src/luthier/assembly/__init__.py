"""Builds the objects of a recipe: the only package that imports models, methods, objectives and data.

    recipe -> base -> family -> tuner -> data -> batches

Each step uses the result of the previous one. Nothing here trains or prints. Read
`core/protocols.py` first, then `recipe.py`, `factory.py`, `run_io.py`; `luthier.api` imports these modules directly.

This file re-exports names of packages that `luthier.api` must not import (data, models, methods, rl), and the
functions that read and write recipes.
"""

from luthier import data as rows
from luthier.assembly.recipe import (
    Recipe,
    build_recipe,
    collect_provenance,
    diff_recipes,
    dump_recipe,
    get_version,
    load_recipe,
    precomputes_reference,
)
from luthier.assembly.reference_model import precompute_reference
from luthier.assembly.rl_setup import build_training_source, init_rl_policy
from luthier.core.digests import get_cache_folder
from luthier.methods.diagnostics import Diagnostic, diagnose
from luthier.methods.multi_adapter import AdapterManager
from luthier.methods.peft import PEFT_ONLY_FIELDS
from luthier.models import (
    ALIASES,
    CausalLM,
    ModelConfig,
    cast_weights,
    compute_fingerprint,
    identify_base,
    prepare_folder,
    resolve_name,
)
from luthier.rl import RolloutSource
from luthier.rl.sandbox import describe_isolation

__all__ = [
    "ALIASES", "AdapterManager", "CausalLM", "Diagnostic", "ModelConfig", "PEFT_ONLY_FIELDS", "Recipe",
    "RolloutSource", "build_training_source", "cast_weights", "diff_recipes", "compute_fingerprint", "diagnose",
    "describe_isolation",
    "dump_recipe",
    "get_cache_folder", "identify_base", "init_rl_policy", "load_recipe", "precompute_reference",
    "precomputes_reference", "prepare_folder", "collect_provenance", "build_recipe", "resolve_name", "rows",
    "get_version",
]
