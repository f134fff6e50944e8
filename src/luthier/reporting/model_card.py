"""The model card: README.md of a run, and of every folder that is exported from it.

A card is text made of plain facts (`ModelCardFacts`); `assembly/model_card_facts.py` collects them. Its code loads the
folder that contains it, head included, with the library that reads it: Sentence Transformers for text embeddings,
Transformers or PEFT for the rest, and Luthier for what neither of them supports. No local path is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CLASSES = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM"}
PEFT_CLASSES = {"CAUSAL_LM": "AutoPeftModelForCausalLM", "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM"}
TAGS = {"item": "text-classification", "token": "token-classification", "image": "image-classification",
        "CAUSAL_LM": "text-generation", "SEQ_2_SEQ_LM": "text-generation"}  # the hub's pipeline tags
HEADS = {"item": "SequenceClassification", "token": "TokenClassification", "image": "ImageClassification"}
# The first metrics of the table; the others follow in alphabetical order.
FIRST = ("accuracy", "f1_macro", "f1_micro", "mcc", "pearson", "spearman", "rewards/accuracies", "mrr", "recall_at_1",
         "reward", "win_rate", "perplexity", "loss")
LEFT_OUT = re.compile(r"confusion_|calibration_|bin_")
HERE = 'FOLDER = "."  # this folder, or its name on the hub'


@dataclass(frozen=True)
class TaskHeadFacts:
    """A classification head that the saved model keeps in Transformers' own class.

    Args:
        kind: a key of `HEADS`.
        labels: class names; empty where the task has none.
        width: number of outputs.
        pooling: which state of a text the head reads.
    """

    kind: str
    labels: tuple[str, ...]
    width: int
    pooling: str


@dataclass(frozen=True)
class ModelCardFacts:
    """Everything that a model card states, as plain values.

    Args:
        title: name of the folder that the card is for.
        base_model: the base model's id on the hub; empty where it is unknown.
        base_name: how the text names the base model.
        license: of the base model; empty where it is unknown.
        gguf_file: name of the GGUF file that the base weights were read from; empty for other formats.
        method, objective: their names.
        train_sources: paths or hub ids of the training data.
        adapter: PEFT's adapter_config.json of the folder; None for a full model.
        has_recipe, has_loss_plot: whether the folder has recipe.yaml, loss.png.
        results: the contents of results.json.
        task: PEFT's task type of the base.
        head_kind: kind of the objective's task head; empty where it has none.
        task_head: the head as Transformers stores it; None where it has no class for it.
        no_task_head_reason: why `task_head` is None for an objective with a head.
        uses_chat_template: whether prompts are rendered with the chat template.
        system_prompt: of the training data; empty where it has none.
    """

    title: str
    base_model: str
    base_name: str
    license: str
    gguf_file: str
    method: str
    objective: str
    train_sources: tuple[str, ...]
    adapter: Mapping[str, Any] | None
    has_recipe: bool
    has_loss_plot: bool
    results: Mapping[str, Any]
    task: str
    head_kind: str
    task_head: TaskHeadFacts | None
    no_task_head_reason: str
    reads_images: bool
    can_generate: bool
    is_encoder_decoder: bool
    is_embedding: bool
    uses_masking: bool
    uses_chat_template: bool
    system_prompt: str

    @property
    def is_adapter(self) -> bool:
        return bool(self.adapter)


def build_model_card(facts: ModelCardFacts) -> str:
    """The text of README.md."""
    library, code = build_loading_code(facts)
    front: dict[str, Any] = {"library_name": library}
    if facts.base_model:
        front |= {"base_model": facts.base_model,
                  "base_model_relation": "adapter" if facts.is_adapter else "finetune"}
    front["pipeline_tag"] = pick_pipeline_tag(facts)
    if datasets := [path for path in facts.train_sources if _is_on_hub(path)]:
        front["datasets"] = sorted(set(datasets))
    if facts.license:
        front["license"] = facts.license
    front["tags"] = ["luthier", facts.method, facts.objective]
    names = ", ".join(f"`{path if _is_on_hub(path) else Path(path).name}`"
                      for path in dict.fromkeys(facts.train_sources))
    kind = "An adapter" if facts.is_adapter else "A model"
    plot = ["![loss](loss.png)", ""] if facts.has_loss_plot else []
    recipe = "`recipe.yaml` holds every setting, version and data digest." * facts.has_recipe
    return "\n".join([
        "---", yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(), "---", "",
        f"# {facts.title}", "",
        f"{kind} made with Luthier from `{facts.base_name}` by the method `{facts.method}` with the objective "
        f"`{facts.objective}` on {names}. {recipe}".rstrip(), "",
        *_summarize_results(facts.results), *_describe_gguf_origin(facts),
        "## Usage", "", *_explain_native_loading(facts), "```python", *code,
        "```", "",
        *_format_results(facts.results), *plot])


def _describe_gguf_origin(facts: ModelCardFacts) -> list[str]:
    """A note on a base that was read from a quantized file: its weights differ from those on the hub."""
    if not facts.gguf_file:
        return []
    return [f"The weights of the base were read from `{facts.gguf_file}`. Those on the hub differ from them by the "
            "rounding of that file, so an adapter gives slightly different outputs on them.", ""]


def _is_on_hub(path: str) -> bool:
    """Whether this is a dataset id on the hub and not a local path."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path)) and not Path(path).exists() and not re.search(
        r"\.(jsonl?|csv|tsv|parquet|txt|ndjson|gz|bz2|xz|zst|zip)$", path)


def pick_pipeline_tag(facts: ModelCardFacts) -> str:
    """The hub's pipeline tag."""
    if facts.head_kind:
        return TAGS["image" if facts.reads_images and facts.head_kind == "item" else facts.head_kind]
    if facts.reads_images:
        return "image-feature-extraction"
    if facts.is_embedding:
        return "sentence-similarity"
    return TAGS.get(facts.task, "fill-mask" if facts.uses_masking else "feature-extraction")


# ---------------------------------------------------------------- how it is loaded


def build_loading_code(facts: ModelCardFacts) -> tuple[str, list[str]]:
    """The library that loads the folder, and Python code that loads it and computes an output."""
    if _explain_native_loading(facts):
        return "luthier", ["from luthier.assembly.run_io import open_run",
                           "from luthier.training.run_folder import Run", "", HERE, "",
                           "recipe, model, method = open_run(Run(FOLDER))"]
    library = "peft" if facts.is_adapter else "transformers"
    if facts.task_head is not None:
        return library, list(_write_classifier_code(facts, facts.task_head))
    if facts.is_embedding and not facts.reads_images and not facts.is_encoder_decoder:
        return "sentence-transformers", [
            "from sentence_transformers import SentenceTransformer", "", HERE, "",
            "model = SentenceTransformer(FOLDER)",
            'vectors = model.encode(["A first text.", "A second text."])', "print(model.similarity(vectors, vectors))"]
    if facts.can_generate:
        return library, list(_write_generation_code(facts))
    return library, list(_write_encoder_code(facts))


def _explain_native_loading(facts: ModelCardFacts) -> list[str]:
    """Why neither Transformers nor PEFT loads the folder; empty where they do."""
    form, has_head = facts.adapter, bool(facts.head_kind)
    kind = None if form is None else form.get("peft_type")
    if kind == "LUTHIER":
        why = f"PEFT has no format for `{facts.method}`"
    elif has_head and facts.task_head is None:
        why = facts.no_task_head_reason or "Transformers has no class with this head"
    elif kind in ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING") and (has_head or facts.is_embedding):
        why = "PEFT's virtual tokens move the position of the state that is pooled"
    elif form is not None and facts.is_embedding and not facts.reads_images and (
            form.get("use_dora") or kind == "ADALORA"):
        why = ("Sentence Transformers loads adapters by Transformers, which reads no DoRA and no AdaLoRA; "
               "`luthier export --to merged` writes a model that it loads")
    else:
        return []
    return [f"Load this folder with Luthier: {why}.", ""]


def _write_classifier_code(facts: ModelCardFacts, head: TaskHeadFacts) -> Iterator[str]:
    """For a model with a classification head of Transformers: the logits of one input."""
    auto, labels = f"AutoModelFor{HEADS[head.kind]}", head.labels
    reader = "AutoImageProcessor" if head.kind == "image" else "AutoTokenizer"
    peft = f"AutoPeftModelFor{HEADS[head.kind]}"
    yield "import torch"
    if facts.adapter is None:
        yield f"from transformers import {auto}" + ("" if head.kind == "image" else f", {reader}")
    elif head.kind == "image":
        yield from ("from peft import PeftConfig, PeftModel", f"from transformers import {auto}")
    else:
        yield from (f"from peft import {peft}", f"from transformers import {reader}")
    yield from ("", HERE)
    if facts.adapter is not None:
        names = list(labels) or [f"LABEL_{i}" for i in range(head.width)]
        yield from (f"labels = {names!r}", "id2label = dict(enumerate(labels))",
                    "label2id = {name: i for i, name in id2label.items()}")
    yield ""
    if head.kind != "image":
        yield f"tokenizer = {reader}.from_pretrained(FOLDER)"
    if facts.adapter is None:
        yield f"model = {auto}.from_pretrained(FOLDER)"
    elif head.kind == "image":
        yield from ("base = PeftConfig.from_pretrained(FOLDER).base_model_name_or_path",
                    f"model = {auto}.from_pretrained(base, id2label=id2label, label2id=label2id)",
                    "model = PeftModel.from_pretrained(model, FOLDER)")
    else:
        yield f"model = {peft}.from_pretrained(FOLDER, id2label=id2label, label2id=label2id)"
        if head.pooling == "last":
            yield "model.config.pad_token_id = tokenizer.pad_token_id"
    if head.kind == "image":
        yield from ("side = model.config.image_size", "inputs = {\"pixel_values\": torch.zeros(1, "
                    "model.config.num_channels, side, side)}  # as the processor of the base makes them")
    else:
        yield 'inputs = tokenizer("A text to classify.", return_tensors="pt")'
    yield from ("with torch.no_grad():", "    logits = model.eval()(**inputs).logits",
                "print(logits)" if not labels else "print(model.config.id2label, logits)")


def _write_generation_code(facts: ModelCardFacts) -> Iterator[str]:
    name = PEFT_CLASSES[facts.task] if facts.is_adapter else CLASSES[facts.task]
    if facts.is_adapter:
        yield f"from peft import {name}"
    yield "from transformers import " + ("AutoTokenizer" if facts.is_adapter else f"{name}, AutoTokenizer")
    yield from ("", HERE, "", "tokenizer = AutoTokenizer.from_pretrained(FOLDER)",
                f"model = {name}.from_pretrained(FOLDER)")
    if facts.uses_chat_template:
        system = [{"role": "system", "content": facts.system_prompt}] if facts.system_prompt else []
        yield f"messages = {[*system, {'role': 'user', 'content': 'Hello!'}]!r}"
        yield ('inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", '
               "return_dict=True)")
    else:
        yield 'inputs = tokenizer("Once upon a time", return_tensors="pt")'
    if facts.is_encoder_decoder:
        start = "0"
    else:
        yield 'start = inputs["input_ids"].shape[1]'
        start = "start"
    yield ('output = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], '
           "max_new_tokens=64)")
    yield f"print(tokenizer.decode(output[0, {start}:], skip_special_tokens=True))"


def _write_encoder_code(facts: ModelCardFacts) -> Iterator[str]:
    auto = "AutoModelForMaskedLM" if facts.uses_masking else "AutoModel"
    if facts.is_adapter:
        yield "from peft import PeftConfig, PeftModel"
    yield f"from transformers import {auto}" + ("" if facts.reads_images else ", AutoTokenizer")
    yield from ("", HERE, "")
    if facts.is_adapter:
        yield from ("base = PeftConfig.from_pretrained(FOLDER).base_model_name_or_path",
                    f"model = PeftModel.from_pretrained({auto}.from_pretrained(base), FOLDER)")
    else:
        yield f"model = {auto}.from_pretrained(FOLDER)"
    if not facts.reads_images:
        yield "tokenizer = AutoTokenizer.from_pretrained(FOLDER)"


# ---------------------------------------------------------------- the figures


def _summarize_results(results: Mapping[str, Any]) -> list[str]:
    """One paragraph with the main figure before and after training, and the cost; the tables follow further below.

    >>> print(_summarize_results({"metric": "perplexity", "before": 94.2, "after": 3.51234, "examples": 20, "steps": 40,
    ...                           "trainable_fraction": 0.0123, "train_seconds": 61.2})[0])
    **perplexity: 94.2 before training, 3.512 after** (20 held-out rows). 40 steps, 61.2 seconds, 1.23% of the weights.
    """
    sentences = []
    metric, before, after = (results.get(name) for name in ("metric", "before", "after"))
    if isinstance(metric, str) and isinstance(after, int | float):
        start = f"{_round_value(before)} before training, " if isinstance(before, int | float) else ""
        rows = results.get("examples")
        counted = f" ({rows:,} held-out row{'' if rows == 1 else 's'})" if isinstance(rows, int) else ""
        sentences.append(f"**{metric}: {start}{_round_value(after)} after**{counted}.")
    costs = [text for name, text in (("steps", "{:,} steps"), ("train_seconds", "{:.4g} seconds"),
                                     ("trainable_fraction", "{:.2%} of the weights"))
             if isinstance(value := results.get(name), int | float) for text in [text.format(value)]]
    sentences += [", ".join(costs) + "."] if costs else []
    return [" ".join(sentences), ""] if sentences else []


def _format_results(results: Mapping[str, Any]) -> Iterator[str]:
    """Tables of the metrics before and after training, and of the cost of training."""
    before, after = (_select_metrics(results, when) for when in ("before", "after"))
    rows = results.get("examples")
    if after:
        held = f"{rows:,} held-out row{'' if rows == 1 else 's'}" if isinstance(rows, int) else "held-out rows"
        yield from ("## Results", "", f"Measured on {held}.", "", "| measure | before | after |", "|---|---|---|")
        for name in sorted(after, key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name)):
            yield f"| {name} | {_round_value(before.get(name, ''))} | {_round_value(after[name])} |"
        yield ""
    shown = [(label, results[name]) for name, label in (
        ("steps", "steps"), ("train_tokens", "trained tokens"), ("train_seconds", "seconds"),
        ("trainable", "trained parameters"), ("parameters", "parameters"), ("trainable_fraction", "trainable fraction"),
        ("peak_memory_gb", "peak memory, GB"), ("file_bytes", "bytes of the saved weights"), ("stopped", "ended by"))
        if results.get(name) not in (None, "")]
    if shown:
        yield from ("## Training", "", "| figure | value |", "|---|---|")
        yield from (f"| {label} | {_round_value(value)} |" for label, value in shown)
        yield ""


def _select_metrics(results: Mapping[str, Any], when: str) -> dict[str, float]:
    test, single, metric = results.get("test_before" if when == "before" else "test"), results.get(when), \
        results.get("metric")
    found = dict(test) if isinstance(test, Mapping) else {}
    if when == "after" and isinstance(results.get("scores"), Mapping):
        found |= results["scores"]
    if isinstance(single, Mapping):
        found |= single
    elif isinstance(single, int | float) and isinstance(metric, str):
        found[metric] = single
    return {name: value for name, value in found.items()
            if isinstance(value, int | float) and not LEFT_OUT.match(name)}


def _round_value(value: Any) -> str:
    """Four significant digits; integers with thousands separators."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
