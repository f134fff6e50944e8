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
    PromptFormat,
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
    note_conversations,
    questions,
    tokenizer,
    with_heads,
)
from luthier.build.pairs import check_dtype
from luthier.build.recipe import (
    Recipe,
    beforehand,
    changed,
    default_learning_rate,
    describe_learning_rate,
    dump,
    method_name,
    provenance,
    recipe,
    recorded,
    version,
)
from luthier.build.references import asked, master_price, price, untrained
from luthier.build.rollouts import begin, check_rewards, feed, judged, rolling, standing
from luthier.build.run_warnings import (
    find_data_problems,
    find_method_problems,
    find_schedule_problems,
    find_unused_settings,
)
from luthier.build.runs import convert_to_plain_lora, kept_heads, open_run, prompt_format, save_tuned, save_whole
from luthier.build.served import Served, called, served
from luthier.build.starts import banked, beside, same_base
from luthier.data import DataConfig
from luthier.families import ALIASES, BaseConfig, CausalLM, cache, fingerprint, folder, resolve
from luthier.methods import METHODS
from luthier.methods.bank import Bank
from luthier.methods.readable import Reading, describe
from luthier.rollout import Rollouts
from luthier.runtime.run import Run

__all__ = [
    "ALIASES", "Bank", "BaseConfig", "CausalLM", "DataConfig", "METHODS", "PromptFormat", "Reading", "Recipe",
    "Rollouts", "Run", "Served", "asked", "attach", "banked", "beforehand", "begin", "beside", "cache", "called",
    "candidate", "changed", "chat_prompt", "check", "check_dtype", "check_rewards", "combined", "context",
    "convert_to_plain_lora", "datasets", "default_learning_rate", "describe", "describe_learning_rate", "device",
    "dump", "family", "feed", "find_data_problems", "find_method_problems", "find_schedule_problems",
    "find_unused_settings", "fingerprint", "fitted", "folder", "gguf_adapter", "gguf_model", "held_out", "judged",
    "kept_heads", "least_gb", "master_price", "method_name", "micro_tokens", "note_conversations", "open_run",
    "price", "prompt_format", "provenance", "questions", "recipe", "recorded", "resolve", "rolling", "rows",
    "same_base", "save_tuned", "save_whole", "served", "standing", "tokenizer", "untrained", "version", "with_heads",
]
