"""Names to objects: the only room that sees every axis. Assembly is a straight line; each line feeds the next.

    recipe -> base -> family -> method attached -> data -> feed

Read `core/protocols.py` first, then `recipe.py`, `factory.py`, `run_io.py`. A verb calls these functions; nothing here
trains or prints.
"""

from luthier import data as rows
from luthier.assembly.adapter_merging import merge_adapters
from luthier.assembly.compatibility import check_dtype
from luthier.assembly.factory import (
    PromptFormat,
    attach_heads,
    attach_method,
    build_eval_batches,
    build_eval_prompts,
    check_loaded_model,
    encode_chat_prompt,
    fit_objective,
    load_base_tokenizer,
    load_datasets,
    load_family,
    read_context_length,
    resolve_micro_batch_tokens,
    select_device,
    set_chat_format,
)
from luthier.assembly.gguf_export import export_gguf_adapter, export_gguf_model
from luthier.assembly.initialization import attach_runs, reference_context
from luthier.assembly.method_variants import build_variant, estimate_weight_gb
from luthier.assembly.multi_adapter_loading import ServedModels, display_name, load_served_models
from luthier.assembly.policy_evaluation import evaluate_policies, evaluate_policy
from luthier.assembly.provenance import (
    CheckpointRecord,
    check_base,
    check_resumable,
    check_runs,
    describe_model_conflict,
    is_same_model,
    list_changes,
    list_differences,
    open_recipe,
    record_results,
    record_start,
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
from luthier.assembly.reference_model import (
    describe_master_copy_cost,
    describe_reference_cost,
    initial_model,
    precompute_reference,
)
from luthier.assembly.rl_setup import build_rollout_source, build_training_source, check_rewards, init_rl_policy
from luthier.assembly.run_io import (
    build_prompt_format,
    convert_to_plain_lora,
    has_saved_heads,
    name_base,
    open_run,
    resolve_saved_dtype,
    save_full_model,
    save_tuned,
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
from luthier.methods.diagnostics import Diagnostic, diagnose
from luthier.methods.multi_adapter import AdapterManager
from luthier.methods.peft import PEFT_ONLY_FIELDS
from luthier.models import (
    ALIASES,
    CausalLM,
    ModelConfig,
    cast_weights,
    compute_fingerprint,
    get_cache_folder,
    identify_base,
    prepare_folder,
    resolve_name,
)
from luthier.rl import RolloutSource
from luthier.training.run_folder import Run

__all__ = [
    "ALIASES", "PEFT_ONLY_FIELDS", "AdapterManager", "ModelConfig", "CausalLM", "CheckpointRecord", "DataConfig",
    "METHODS",
    "PromptFormat", "Diagnostic", "Recipe", "RolloutSource", "Run", "ServedModels", "precompute_reference",
    "attach_method", "attach_runs",
    "describe_model_conflict",
    "precomputes_reference", "init_rl_policy", "reference_context", "get_cache_folder", "display_name", "build_variant",
    "cast_weights", "changed",
    "encode_chat_prompt",
    "check_loaded_model", "check_base", "check_dtype", "check_resumable", "check_rewards", "check_runs", "merge_adapters",
    "read_context_length",
    "convert_to_plain_lora", "load_datasets", "default_learning_rate", "diagnose", "describe_learning_rate",
    "select_device",
    "dump", "load_family", "build_training_source", "fill_left_out", "find_data_problems", "find_method_problems",
    "find_schedule_problems", "find_unused_settings", "compute_fingerprint", "fit_objective", "prepare_folder",
    "export_gguf_adapter",
    "export_gguf_model", "build_eval_batches", "identify_base", "evaluate_policy", "has_saved_heads",
    "estimate_weight_gb",
    "list_changes", "list_differences",
    "list_resolved", "make_paths_absolute", "make_public", "describe_master_copy_cost", "method_name",
    "resolve_micro_batch_tokens",
    "name_base", "set_chat_format", "open_recipe", "open_run", "describe_reference_cost", "build_prompt_format",
    "provenance",
    "build_eval_prompts", "recipe", "record_results", "record_start", "load_recipe", "resolve_name", "resolve_settings",
    "build_rollout_source",
    "rows", "is_same_model", "save_tuned", "save_full_model", "resolve_saved_dtype", "load_served_models",
    "evaluate_policies",
    "load_base_tokenizer", "initial_model",
    "version", "attach_heads",
]
