"""Names to objects: the only room that sees every axis. Assembly is a straight line; each line feeds the next.

    recipe -> base -> family -> method attached -> data -> feed

Read `core/protocols.py` first, then `recipe.py`, `objects.py`, `runs.py`. A verb calls these functions; nothing here
trains or prints.
"""

from luthier import data as rows
from luthier.build.candidates import candidate, least_gb
from luthier.build.combined import combined
from luthier.build.gguf import gguf_adapter, gguf_model
from luthier.build.objects import (
    attach,
    chat_prompt,
    check,
    context,
    datasets,
    device,
    family,
    fitted,
    held_out,
    micro_tokens,
    questions,
    tokenizer,
    with_heads,
)
from luthier.build.recipe import (
    Recipe,
    beforehand,
    changed,
    dump,
    idle,
    method_name,
    provenance,
    recipe,
    recorded,
    version,
)
from luthier.build.references import asked, price, untrained
from luthier.build.rollouts import begin, feed, judged, rolling, standing
from luthier.build.runs import open_run, save_tuned, save_whole, saved_dtype
from luthier.build.served import Served, called, served
from luthier.build.starts import banked, beside, same_base
from luthier.data import DataConfig
from luthier.families import ALIASES, BaseConfig, CausalLM, cache, cast, fingerprint, folder, resolve
from luthier.methods import METHODS
from luthier.methods.bank import Bank
from luthier.methods.readable import Reading, describe
from luthier.rollout import Rollouts
from luthier.runtime.run import Run

__all__ = ["ALIASES", "Bank", "BaseConfig", "CausalLM", "DataConfig", "METHODS", "Reading", "Recipe", "Rollouts",
           "Run", "Served", "asked", "attach", "banked", "beforehand", "begin", "beside", "cache", "called",
           "candidate", "cast", "changed", "chat_prompt", "check", "combined", "context", "datasets", "describe",
           "device", "dump", "family", "feed", "fingerprint", "fitted", "folder", "gguf_adapter", "gguf_model",
           "held_out", "idle", "judged", "least_gb", "method_name", "micro_tokens", "open_run", "price", "provenance",
           "questions", "recipe", "recorded", "resolve", "rolling", "rows", "same_base", "save_tuned", "save_whole",
           "saved_dtype", "served", "standing", "tokenizer", "untrained", "version", "with_heads"]
