"""Builds each object of a recipe: model, method, data, batches. Read `recipe.py` first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from luthier import data as rows
from luthier.assembly.compatibility import check_compatibility
from luthier.assembly.recipe import AnyMethod, Recipe, precomputes_reference
from luthier.core.errors import BaseError, RecipeError
from luthier.core.examples import ChatExample, CompletionExample, Example, Message, Origin, TextExample
from luthier.core.protocols import BatchSource, ChatFormat, Family, Objective, Tuner
from luthier.core.types import Batch
from luthier.data import DataConfig, Datasets, InMemoryBatchSource, StreamingBatchSource
from luthier.evaluation.generation_eval import EvalPrompt, check_references
from luthier.methods.composite import CompositeMethod, list_parts
from luthier.methods.ia3 import Ia3Config
from luthier.methods.lora import LoraConfig
from luthier.methods.prompt import VirtualTokenConfig
from luthier.models import ModelConfig, get_context_length, load_tokenizer, open_family, resolve_device
from luthier.objectives import OBJECTIVES
from luthier.objectives.cross_entropy import PretrainConfig
from luthier.training.memory import trim_heap

DOCUMENTS = frozenset({"TextExample"})  # the only examples that masking applies to
HEAD_LEARNING_RATE = 1e-3  # learning rate of an objective's heads while the method trains at its default


def load_family(config: ModelConfig, words: bool = False) -> Family:
    """Load the base model; `words`: load an encoder with its masked-language-model head (objectives with
    `uses_masking`). Memory used only for loading is released."""
    base = open_family(config, words)
    if base.can_generate:
        base.chat_format = ChatFormat(rows.get_saved_chat_template(base.tokenizer),
                                      rows.find_stop_tokens(base.tokenizer))
    trim_heap(base.device)
    return base


def select_device(recipe: Recipe) -> torch.device:
    """The device that the base model would be loaded to."""
    return resolve_device(recipe.model.device)


def load_base_tokenizer(config: ModelConfig) -> Any:
    """The tokenizer of the base model, without its weights."""
    return load_tokenizer(config)


def read_context_length(config: ModelConfig) -> int:
    """The context length of the base model in tokens, read from its config without loading weights."""
    return get_context_length(config)


def attach_method(base: Family, method: AnyMethod, seed: int) -> Tuner:
    """Attach the method to the model; all other parameters are frozen."""
    base.structure.model.requires_grad_(False)
    return method.attach(base.structure, seed=seed)


def attach_heads(base: Family, tuner: Tuner, objective: Objective, seed: int,
                 default_learning_rate: float = HEAD_LEARNING_RATE) -> Tuner:
    """The method together with the heads of the objective.

    Heads are initialized at random: while the method trains at its `default_learning_rate`, they train at
    `HEAD_LEARNING_RATE`. If the
    recipe or the objective changes the learning rate, theirs changes by the same factor.
    """
    if not objective.heads:
        return tuner
    return CompositeMethod([tuner, base.add_heads(objective.heads, seed)],
                           [1.0, HEAD_LEARNING_RATE / default_learning_rate])


def fit_objective(recipe: Recipe, datasets: Datasets) -> Recipe:
    """The recipe, its objective fitted to the classes of the training rows. Raises `RecipeError` if the objective does
    not support these rows."""
    strange = datasets.kinds - recipe.objective.example_types
    if strange:
        raise RecipeError(f"objective {recipe.objective.name!r} does not support {', '.join(sorted(strange))}: it "
                          f"reads {', '.join(sorted(recipe.objective.example_types))}",
                          "choose an objective for these rows: " + ", ".join(
                              name for name, known in OBJECTIVES.items() if datasets.kinds <= known.example_types))
    return recipe.model_copy(update={"objective": recipe.objective.with_labels(datasets.labels, datasets.counts)})


def set_chat_format(base: Family, datasets: Datasets) -> None:
    """If the rows are conversations, save their chat template and stop tokens with the model from now on."""
    if base.can_generate:
        base.chat_format = replace(base.chat_format, trained=datasets.conversations)


def check_loaded_model(recipe: Recipe, base: Family) -> None:
    """Checks that need the loaded model. Raises `RecipeError`."""
    check_compatibility(recipe, base)
    if recipe.data.streaming and not recipe.training.max_steps:
        raise RecipeError("data.streaming: the number of rows in an epoch is unknown", "set training.max_steps")
    if recipe.data.streaming and precomputes_reference(recipe):
        raise RecipeError("data.streaming: reference values cannot be precomputed for streamed rows",
                          "omit data.streaming, or objective.precompute_reference")
    context, room = base.structure.sizes["context"], compute_text_length(recipe.method, base)
    if recipe.data.max_length and recipe.data.max_length > room:
        beside = f" and {context - room} virtual tokens are" if room < context else " is"
        raise RecipeError(f"data.max_length {recipe.data.max_length}{beside} longer than the base's context, {context} "
                          "tokens", f"set data.max_length to {room} or less" + (
                              ", or use fewer virtual tokens (method.num_virtual_tokens)" if room < context else ""))
    added = recipe.model.surgery is not None and recipe.model.surgery.expand_layers
    for part in list_parts(recipe.method) if added else ():
        if why := _explain_zero_start(part):
            raise RecipeError(f"model.surgery.expand_layers: the output projections of added blocks are zero, and "
                              f"method "
                              f"{part.name} {why}", "use another method: freeze, full, lora")


def compute_text_length(method: AnyMethod, base: Family) -> int:
    """Number of text tokens that fit in the context next to the virtual tokens. Raises `RecipeError` if none fit."""
    context = base.structure.sizes["context"]
    virtual = sum(part.num_virtual_tokens for part in list_parts(method) if isinstance(part, VirtualTokenConfig))
    if virtual + 2 > context:
        raise RecipeError(f"method.num_virtual_tokens: {virtual} virtual tokens leave no space for text in the base's "
                          f"context of {context} tokens", f"set method.num_virtual_tokens far below {context}")
    return context - virtual


def _explain_zero_start(method: AnyMethod) -> str:
    """Why the method cannot train a weight matrix that is zero; empty where it can."""
    if isinstance(method, Ia3Config):
        return "rescales their output, which stays zero"
    if isinstance(method, LoraConfig) and method.use_dora:
        return "with use_dora divides by their row norms"
    return "with init_lora_weights: pissa starts from their singular vectors" if isinstance(method, LoraConfig) \
        and method.init_lora_weights == "pissa" else ""


def load_datasets(recipe: Recipe, base: Family, progress: Any = None) -> Datasets:
    """The training and evaluation data of a recipe, as far as this model supports it."""
    objective, sees = recipe.objective, "channels" in base.structure.sizes
    reads = frozenset(kind for kind in objective.example_types if (kind == "ImageExample") == sees)
    if not reads:
        raise RecipeError(f"objective {objective.name!r} reads {', '.join(sorted(objective.example_types))}, "
                          f"and the base "
                          f"takes {'images' if sees else 'text'}", "choose another objective, or another base")
    masking = _build_masking(recipe, base)
    datasets = rows.read_datasets(resolve_data_config(recipe, base), base.tokenizer, seed=recipe.seed,
                               classes=objective.classes,
                               masking=masking,
                               reads=reads if masking is None else reads & DOCUMENTS,
                               flat=base.structure.task != "CAUSAL_LM",
                               reserved_tokens=objective.model_dump().get("max_new_tokens", 1),
                               others={name: known.example_types & DOCUMENTS if known.uses_masking
                                       and base.structure.task != "CAUSAL_LM" else
                                       known.example_types for name, known in OBJECTIVES.items()}, progress=progress)
    _check_tokens(base, datasets)
    return datasets


def _check_tokens(base: Family, datasets: Datasets) -> None:
    """Raises `BaseError` for a token id beyond the rows of the base's embedding."""
    size = base.structure.sizes.get("vocabulary")
    if size is None or "channels" in base.structure.sizes:
        return
    for example in (*datasets.train, *datasets.eval, *datasets.test):
        for span in example.spans:
            if max(span.ids) >= size:
                token = next(token for token in span.ids if token >= size)
                words = base.tokenizer.convert_ids_to_tokens(token)
                raise BaseError(
                    f"{example.origin}: the token {words!r} has the id {token}, and the base's embedding has {size} "
                    "rows",
                    "add the token to the base (model.surgery.new_tokens), or give the base its own tokenizer")


def _build_masking(recipe: Recipe, base: Family) -> rows.MaskingConfig | None:
    """The masking of documents, for models with bidirectional attention; None for causal models."""
    objective = recipe.objective
    if not isinstance(objective, PretrainConfig) or base.structure.task == "CAUSAL_LM":
        return None
    return rows.MaskingConfig.of(base.tokenizer, "spans" if base.is_encoder_decoder else "words",
                                 recipe.model.name_or_path,
                        objective.mlm_probability, objective.mean_noise_span_length, objective.whole_word_mask)


def resolve_data_config(recipe: Recipe, base: Family) -> DataConfig:
    """The data settings for this model; the default of `max_length` is limited by the context."""
    most = min(recipe.data.token_limit, compute_text_length(recipe.method, base))
    config = recipe.data.model_copy(update={"max_length": recipe.data.max_length or most})
    return rows.DividedConfig.of(config) if base.is_encoder_decoder else config


def resolve_micro_batch_tokens(recipe: Recipe, base: Family) -> int:
    """Maximum number of tokens of a micro-batch. Short rows fit in a CPU's caches; a GPU needs large matrices. For
    vision models, an image counts its patches."""
    tokens = recipe.training.max_tokens_per_micro_batch or (8192 if base.device.type == "cuda" else 320)
    return max(1, tokens // base.structure.sizes.get("unit", 1))


def build_batch_source(recipe: Recipe, base: Family, datasets: Datasets) -> BatchSource:
    """The batches of the run."""
    micro = resolve_micro_batch_tokens(recipe, base)
    if recipe.data.streaming:
        return StreamingBatchSource(resolve_data_config(recipe, base), base.tokenizer, recipe.training.batch_size,
                                    micro,
                      seed=recipe.seed, use=datasets.use)
    return InMemoryBatchSource(datasets.train, recipe.training.batch_size, micro, shuffle=recipe.data.shuffle,
                               seed=recipe.seed,
                  mix=datasets.mix)


def build_eval_batches(recipe: Recipe, base: Family, datasets: Datasets) -> list[Batch]:
    """Batches of the validation rows."""
    return rows.build_eval_batches(datasets.eval, resolve_micro_batch_tokens(recipe, base))


def build_eval_prompts(recipe: Recipe, base: Family, examples: Sequence[Example]) -> list[EvalPrompt]:
    """Prompts and references of test rows. Raises `DataError` where a metric cannot parse a reference, `RecipeError`
    for a row without a prompt."""
    prompts = []
    strange = next((example for example in examples if type(example).__name__ not in rows.TYPES_WITH_ANSWER), None)
    if strange is not None:
        raise RecipeError(f"evaluate.metrics: {strange.origin} is a {type(strange).__name__}, which has no answer "
                          "to generate",
                          "omit evaluate.metrics, or give rows with prompts in data.test")
    for example in examples[:recipe.evaluate.max_samples]:
        ids, reference = rows.encode_prompt(example, base.tokenizer, recipe.data)
        prompts.append(EvalPrompt(tuple(ids), _get_question_text(example), reference, example.origin))
    check_references(prompts, recipe.evaluate.metrics)
    return prompts


def _get_question_text(example: Example) -> str:
    """The question of an example as text, for reports."""
    if isinstance(example, ChatExample):
        return next((m.content for m in reversed(example.messages) if m.role != "assistant"), "")
    if isinstance(example, CompletionExample):
        return example.prompt
    return example.text if isinstance(example, TextExample) else ""


@dataclass(frozen=True)
class PromptFormat:
    """How the prompts of a run are rendered, the same as its training rows.

    Args:
        data: the data settings of the run.
        conversations: whether its rows had conversations, which use the fallback template if the base has none.
        Otherwise a
            message is a plain prompt.
    """

    data: DataConfig = field(default_factory=lambda: DataConfig.parse({"train": "-"}))
    conversations: bool = True


def encode_chat_prompt(base: Family, messages: Sequence[Message], form: PromptFormat,
                       tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
    """Token ids of a conversation that ends with a user turn, up to the start of the answer. Raises `RecipeError` if
    the chat template cannot render it, or if the run was trained on plain prompts and it has several turns."""
    tokenizer = base.tokenizer
    if not form.conversations and not rows.uses_chat_template(tokenizer, form.data):
        if [message.role for message in messages] != ["user"] or tools:
            roles = ", ".join(message.role for message in messages)
            raise RecipeError(f"turns of {roles}: this model was trained on plain prompts and does not support "
                              f"conversations",
                              "send one user message, without a system prompt or tools")
        return rows.encode_prompt_text(messages[0].content, tokenizer, form.data).ids
    example = ChatExample((*messages, Message("assistant", "")), Origin("chat", 1), tools=tuple(tools))
    try:
        return rows.encode_prompt(example, tokenizer, form.data)[0]
    except rows.RenderError as fault:
        raise RecipeError(f"the base's chat template cannot render this conversation: {fault}",
                          "alternate user and assistant turns, and end with a user turn") from fault


def count_trainable(base: Any, tuner: Tuner) -> dict[str, float]:
    """Number and fraction of trainable parameters, among those of the base and of the method."""
    trained = tuner.parameters()
    own = {id(p) for p in base.model.parameters()}
    whole = sum(p.numel() for p in [*base.model.parameters(), *(p for p in trained.values() if id(p) not in own)])
    # A quantized weight is one packed parameter; count the weights that it represents.
    whole += sum(s.in_features * s.out_features - s.weight.numel()
                 for s in base.structure.linears
                 if s.dequantize is not None)
    count = sum(p.numel() for p in trained.values())
    return {"trainable": count, "parameters": whole, "trainable_fraction": count / whole}
