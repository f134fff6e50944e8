"""Recipe to objects: the only package that sees models, methods, objectives and data together.

    recipe -> base -> family -> tuner -> data -> batches

Assembly is a straight line: the result of each line is an argument of the next. Nothing here trains or prints. Read
`core/protocols.py` first, then `recipe.py`, `factory.py`, `run_io.py`; verbs import these modules directly.

This file holds the little that verbs need of packages that they must not import themselves (data, models, methods,
rl), and the functions that every script needs to read and write a recipe.
"""

from luthier import data as rows
from luthier.assembly.recipe import Recipe, beforehand, changed, dump, provenance, recipe, recorded, version
from luthier.assembly.reference_model import asked
from luthier.assembly.rl_setup import begin, feed, standing
from luthier.methods.diagnostics import Reading, describe
from luthier.methods.multi_adapter import Bank
from luthier.methods.peft import BRIDGED
from luthier.models import (
    ALIASES,
    BaseConfig,
    CausalLM,
    cache,
    cast_weights,
    compute_fingerprint,
    identify_base,
    prepare_folder,
    resolve_name,
)
from luthier.rl import Rollouts

__all__ = [
    "ALIASES", "BRIDGED", "Bank", "BaseConfig", "CausalLM", "Reading", "Recipe", "Rollouts", "asked", "beforehand",
    "begin", "cache", "cast_weights", "changed", "compute_fingerprint", "describe", "dump", "feed", "identify_base",
    "prepare_folder", "provenance", "recipe", "recorded", "resolve_name", "rows", "standing", "version",
]
