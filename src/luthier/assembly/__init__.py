"""Names to objects: the only room that sees every axis. Assembly is a straight line; each line feeds the next.

    recipe -> base -> family -> method attached -> data -> feed

Read `core/protocols.py` first, then `recipe.py`, `factory.py`, `run_io.py`. A verb calls these functions; nothing here
trains or prints.
"""

from luthier import data as rows
from luthier.assembly.adapter_merging import combined
from luthier.assembly.compatibility import check_dtype
from luthier.assembly.factory import (
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
    note_conversations,
    questions,
    resolve_max_tokens,
    tokenizer,
    with_heads,
)
from luthier.assembly.gguf_export import gguf_adapter, gguf_model
from luthier.assembly.initialization import banked, beside
from luthier.assembly.method_variants import candidate, least_gb
from luthier.assembly.multi_adapter_loading import Served, called, served
from luthier.assembly.provenance import (
    CheckpointRecord,
    base_conflict,
    check_base,
    check_resumable,
    check_runs,
    list_changes,
    list_differences,
    open_recipe,
    record_results,
    record_start,
    same_base,
)
from luthier.assembly.recipe import (
    Recipe,
    changed,
    default_learning_rate,
    describe_learning_rate,
    dump,
    load_recipe,
    method_name,
    precomputes_reference,
    provenance,
    recipe,
    version,
)
from luthier.assembly.reference_model import asked, master_price, price, untrained
from luthier.assembly.rl_setup import begin, check_rewards, feed, judged, rolling, standing
from luthier.assembly.run_io import (
    convert_to_plain_lora,
    kept_heads,
    name_base,
    open_run,
    prompt_format,
    save_tuned,
    save_whole,
    saved_dtype,
)
from luthier.assembly.run_warnings import (
    find_data_problems,
    find_method_problems,
    find_schedule_problems,
    find_unused_settings,
)
from luthier.assembly.settings import fill_left_out, list_resolved, make_paths_absolute, make_public, resolve_settings
from luthier.data import DataConfig
from luthier.methods import METHODS
from luthier.methods.diagnostics import Reading, describe
from luthier.methods.multi_adapter import Bank
from luthier.methods.peft import BRIDGED
from luthier.models import ALIASES, CausalLM, ModelConfig, cache, cast, fingerprint, folder, identify, resolve
from luthier.rl import Rollouts
from luthier.training.run_folder import Run

__all__ = [
    "ALIASES", "BRIDGED", "Bank", "ModelConfig", "CausalLM", "CheckpointRecord", "DataConfig", "METHODS",
    "PromptFormat", "Reading", "Recipe", "Rollouts", "Run", "Served", "asked", "attach", "banked", "base_conflict",
    "precomputes_reference", "begin", "beside", "cache", "called", "candidate", "cast", "changed", "chat_prompt",
    "check", "check_base", "check_dtype", "check_resumable", "check_rewards", "check_runs", "combined", "context",
    "convert_to_plain_lora", "datasets", "default_learning_rate", "describe", "describe_learning_rate", "device",
    "dump", "family", "feed", "fill_left_out", "find_data_problems", "find_method_problems",
    "find_schedule_problems", "find_unused_settings", "fingerprint", "fitted", "folder", "gguf_adapter",
    "gguf_model", "held_out", "identify", "judged", "kept_heads", "least_gb", "list_changes", "list_differences",
    "list_resolved", "make_paths_absolute", "make_public", "master_price", "method_name", "resolve_max_tokens",
    "name_base", "note_conversations", "open_recipe", "open_run", "price", "prompt_format", "provenance",
    "questions", "recipe", "record_results", "record_start", "load_recipe", "resolve", "resolve_settings", "rolling",
    "rows", "same_base", "save_tuned", "save_whole", "saved_dtype", "served", "standing", "tokenizer", "untrained",
    "version", "with_heads",
]
