"""A recipe to objects, one function for each: base, method, data, feed. Read `recipe.py` first."""

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

DOCUMENTS = frozenset({"TextExample"})  # of which alone a part is hidden
HEAD_LEARNING_RATE = 1e-3  # of an objective's heads, while the method trains at its default


def load_family(config: ModelConfig, words: bool = False) -> Family:
    """The base, loaded; `words`: an encoder with its own head for masked words (objectives that `hides`). What its
    loading held besides is given back."""
    base = open_family(config, words)
    if base.can_generate:
        base.chat_format = ChatFormat(rows.get_saved_chat_template(base.tokenizer),
                                      rows.find_stop_tokens(base.tokenizer))
    trim_heap(base.device)
    return base


def select_device(made: Recipe) -> torch.device:
    """The device that the base would be loaded to."""
    return resolve_device(made.model.device)


def load_base_tokenizer(config: ModelConfig) -> Any:
    """The base's tokenizer, without its weights."""
    return load_tokenizer(config)


def read_context_length(config: ModelConfig) -> int:
    """Tokens that the base can read at once, as its own config says, without its weights."""
    return get_context_length(config)


def attach_method(base: Family, method: AnyMethod, seed: int) -> Tuner:
    """The method on the base; everything that it does not train is frozen."""
    base.structure.model.requires_grad_(False)
    return method.attach(base.structure, seed=seed)


def attach_heads(base: Family, attached: Tuner, objective: Objective, seed: int,
                 default_learning_rate: float = HEAD_LEARNING_RATE) -> Tuner:
    """The method together with what the objective adds to the base's states.

    Heads start from nothing, so where the method would train at its `default_learning_rate` they train at
    `HEAD_LEARNING_RATE`; where the
    learning rate is another, by the recipe or by the objective's factor, theirs moves with it.
    """
    if not objective.heads:
        return attached
    return CompositeMethod([attached, base.add_heads(objective.heads, seed)],
                           [1.0, HEAD_LEARNING_RATE / default_learning_rate])


def fit_objective(made: Recipe, found: Datasets) -> Recipe:
    """The recipe with its objective made for the classes in the training rows. Raises `RecipeError` where the rows mean
    nothing to it."""
    strange = found.kinds - made.objective.example_types
    if strange:
        raise RecipeError(f"objective {made.objective.name!r} cannot learn from {', '.join(sorted(strange))}: it reads "
                          f"{', '.join(sorted(made.objective.example_types))}",
                          "choose an objective for these rows: " + ", ".join(
                              name for name, known in OBJECTIVES.items() if found.kinds <= known.example_types))
    return made.model_copy(update={"objective": made.objective.with_labels(found.labels, found.counts)})


def set_chat_format(base: Family, found: Datasets) -> None:
    """From now on, what is saved holds the rows' chat template and stop tokens, where the rows are conversations."""
    if base.can_generate:
        base.chat_format = replace(base.chat_format, trained=found.conversations)


def check_loaded_model(made: Recipe, base: Family) -> None:
    """What can only be known once the base is loaded. Raises `RecipeError`."""
    check_compatibility(made, base)
    if made.data.streaming and not made.training.max_steps:
        raise RecipeError("data.streaming: nobody knows how many rows an epoch has", "say how long: training.max_steps")
    if made.data.streaming and precomputes_reference(made):
        raise RecipeError("data.streaming: rows that are read anew in every epoch keep nothing computed before",
                          "leave out data.streaming, or objective.precompute_reference")
    context, room = base.structure.sizes["context"], compute_text_length(made.method, base)
    if made.data.max_length and made.data.max_length > room:
        beside = f" and {context - room} virtual tokens are" if room < context else " is"
        raise RecipeError(f"data.max_length {made.data.max_length}{beside} longer than the base's context, {context} "
                          "tokens", f"set data.max_length to {room} or less" + (
                              ", or use fewer virtual tokens (method.num_virtual_tokens)" if room < context else ""))
    added = made.model.surgery is not None and made.model.surgery.expand_layers
    for part in list_parts(made.method) if added else ():
        if why := _explain_zero_start(part):
            raise RecipeError(f"model.surgery.expand_layers: the last maps of added blocks are zero, and method "
                              f"{part.name} {why}", "train them by another method: freeze, full, lora")


def compute_text_length(method: AnyMethod, base: Family) -> int:
    """How many tokens of a text the base's context holds beside the virtual ones. Raises `RecipeError` for none."""
    context = base.structure.sizes["context"]
    virtual = sum(part.num_virtual_tokens for part in list_parts(method) if isinstance(part, VirtualTokenConfig))
    if virtual + 2 > context:
        raise RecipeError(f"method.num_virtual_tokens: {virtual} virtual tokens leave no room for a text in the base's "
                          f"context of {context} tokens", f"set method.num_virtual_tokens far below {context}")
    return context - virtual


def _explain_zero_start(method: AnyMethod) -> str:
    """Why the method cannot train a map that is zero; empty where it can."""
    if isinstance(method, Ia3Config):
        return "multiplies what they give, which stays zero"
    if isinstance(method, LoraConfig) and method.use_dora:
        return "with use_dora divides by their rows' lengths"
    return "with init_lora_weights: pissa starts from their largest directions" if isinstance(method, LoraConfig) \
        and method.init_lora_weights == "pissa" else ""


def load_datasets(made: Recipe, base: Family, progress: Any = None) -> Datasets:
    """Everything the recipe trains and evaluates on, as far as this base can read it."""
    objective, sees = made.objective, "channels" in base.structure.sizes
    reads = frozenset(kind for kind in objective.example_types if (kind == "ImageExample") == sees)
    if not reads:
        raise RecipeError(f"objective {objective.name!r} reads {', '.join(sorted(objective.example_types))}, "
                          f"and the base "
                          f"takes {'pictures' if sees else 'text'}", "choose another objective, or another base")
    hide = _build_masking(made, base)
    found = rows.read_datasets(resolve_data_config(made, base), base.tokenizer, seed=made.seed,
                               classes=objective.classes,
                               hide=hide,
                               reads=reads if hide is None else reads & DOCUMENTS,
                               flat=base.structure.task != "CAUSAL_LM",
                               room=objective.model_dump().get("max_new_tokens", 1),
                               others={name: known.example_types & DOCUMENTS if known.uses_masking
                                       and base.structure.task != "CAUSAL_LM" else
                                       known.example_types for name, known in OBJECTIVES.items()}, progress=progress)
    _check_tokens(base, found)
    return found


def _check_tokens(base: Family, found: Datasets) -> None:
    """Raises `BaseError` where a row holds a token that the base's embedding has no row for."""
    size = base.structure.sizes.get("vocabulary")
    if size is None or "channels" in base.structure.sizes:
        return
    for example in (*found.train, *found.eval, *found.test):
        for span in example.spans:
            if max(span.ids) >= size:
                token = next(token for token in span.ids if token >= size)
                words = base.tokenizer.convert_ids_to_tokens(token)
                raise BaseError(
                    f"{example.origin}: the token {words!r} has the id {token}, and the base's embedding has {size} "
                    "rows",
                    "add the token to the base (model.surgery.new_tokens), or give the base its own tokenizer")


def _build_masking(made: Recipe, base: Family) -> rows.MaskingConfig | None:
    """How a part of each document is hidden, of bases that read a text whole."""
    told = made.objective
    if not isinstance(told, PretrainConfig) or base.structure.task == "CAUSAL_LM":
        return None
    return rows.MaskingConfig.of(base.tokenizer, "spans" if base.is_encoder_decoder else "words",
                                 made.model.name_or_path,
                                 told.mlm_probability,
                                 told.mean_noise_span_length,
                                 told.whole_word_mask)


def resolve_data_config(made: Recipe, base: Family) -> DataConfig:
    """The settings of the data for this base; without a `max_length`, what the base's context has room for
    where that is less."""
    most = min(made.data.token_limit, compute_text_length(made.method, base))
    found = made.data.model_copy(update={"max_length": made.data.max_length or most})
    return rows.DividedConfig.of(found) if base.is_encoder_decoder else found


def resolve_micro_batch_tokens(made: Recipe, base: Family) -> int:
    """Places of a row in memory at once: small rows keep a CPU's caches and memory small, a GPU wants large products.
    A place is a token; of a vision base a picture, which is as many tokens as it has patches."""
    tokens = made.training.max_tokens_per_micro_batch or (8192 if base.device.type == "cuda" else 320)
    return max(1, tokens // base.structure.sizes.get("unit", 1))


def build_batch_source(made: Recipe, base: Family, found: Datasets) -> BatchSource:
    """The batches of the run."""
    micro = resolve_micro_batch_tokens(made, base)
    if made.data.streaming:
        return StreamingBatchSource(resolve_data_config(made, base), base.tokenizer, made.training.batch_size, micro,
                                    seed=made.seed,
                                    use=found.use)
    return InMemoryBatchSource(found.train, made.training.batch_size, micro, shuffle=made.data.shuffle, seed=made.seed,
                               mix=found.mix)


def build_eval_batches(made: Recipe, base: Family, found: Datasets) -> list[Batch]:
    """The rows to evaluate on while training."""
    return rows.build_eval_batches(found.eval, resolve_micro_batch_tokens(made, base))


def build_eval_prompts(made: Recipe, base: Family, examples: Sequence[Example]) -> list[EvalPrompt]:
    """Prompts and right answers of test rows. Raises `DataError` where a metric cannot read a right answer,
    `RecipeError` where a row asks nothing."""
    found = []
    strange = next((example for example in examples if type(example).__name__ not in rows.TYPES_WITH_ANSWER), None)
    if strange is not None:
        raise RecipeError(f"evaluate.metrics: {strange.origin} is a {type(strange).__name__}, which asks for no answer",
                          "leave evaluate.metrics out, or name rows with prompts in data.test")
    for example in examples[:made.evaluate.max_samples]:
        ids, reference = rows.encode_prompt(example, base.tokenizer, made.data)
        found.append(EvalPrompt(tuple(ids), _get_question_text(example), reference, example.origin))
    check_references(found, made.evaluate.metrics)
    return found


def _get_question_text(example: Example) -> str:
    """What a person would say was asked."""
    if isinstance(example, ChatExample):
        return next((m.content for m in reversed(example.messages) if m.role != "assistant"), "")
    if isinstance(example, CompletionExample):
        return example.prompt
    return example.text if isinstance(example, TextExample) else ""


@dataclass(frozen=True)
class PromptFormat:
    """How the prompts of a run are written, as its rows were.

    Args:
        data: the settings that its rows were read with.
        conversations: whether there were conversations among them; where the base has no chat template, they are
            written by the fallback. Else a message is a bare prompt.
    """

    data: DataConfig = field(default_factory=lambda: DataConfig.parse({"train": "-"}))
    conversations: bool = True


def encode_chat_prompt(base: Family, messages: Sequence[Message], form: PromptFormat,
                       tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
    """Token ids of a conversation that ends with the user's turn, up to where the answer begins. Raises `RecipeError`
    for one that the base's chat template refuses, or that a run of bare prompts has no place for."""
    tokenizer = base.tokenizer
    if not form.conversations and not rows.uses_chat_template(tokenizer, form.data):
        if [message.role for message in messages] != ["user"] or tools:
            roles = ", ".join(message.role for message in messages)
            raise RecipeError(f"turns of {roles}: this model was tuned on bare prompts, and knows no conversations",
                              "send one message of the user, without a system prompt or tools")
        return rows.encode_prompt_text(messages[0].content, tokenizer, form.data).ids
    example = ChatExample((*messages, Message("assistant", "")), Origin("chat", 1), tools=tuple(tools))
    try:
        return rows.encode_prompt(example, tokenizer, form.data)[0]
    except rows.RenderError as fault:
        raise RecipeError(f"the base's chat template refuses this conversation: {fault}",
                          "let user and assistant take turns, the user last") from fault
