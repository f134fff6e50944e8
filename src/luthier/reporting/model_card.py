"""The model card: README.md of a run, and of every folder that is exported from it. Read `assembly/run_io.py` first.

Its code loads what stands in its own folder, head included, by the library that reads it: Sentence Transformers for
vectors of texts, Transformers or PEFT for the rest, and this package for what neither of them has. Nothing in it names
a path of the machine that it was made on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from luthier import assembly
from luthier.assembly.recipe import Recipe, method_name
from luthier.core.errors import LuthierError
from luthier.core.protocols import Family
from luthier.training.run_folder import Run

# The embedded bases by their upstream names, and their licenses.
UPSTREAM = {"smollm2": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
            "minilm": ("sentence-transformers/all-MiniLM-L6-v2", "apache-2.0")}
CLASSES = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM"}
PEFT_CLASSES = {"CAUSAL_LM": "AutoPeftModelForCausalLM", "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM"}
TAGS = {"item": "text-classification", "token": "token-classification", "image": "image-classification",
        "CAUSAL_LM": "text-generation", "SEQ_2_SEQ_LM": "text-generation"}  # the hub's pipeline tags
HEADS = {"item": "SequenceClassification", "token": "TokenClassification", "image": "ImageClassification"}
# The measures that stand first in the table; the others follow by name.
FIRST = ("accuracy", "f1_macro", "f1_micro", "mcc", "pearson", "spearman", "rewards/accuracies", "mrr", "recall_at_1",
         "reward", "win_rate", "perplexity", "loss")
LEFT_OUT = re.compile(r"confusion_|calibration_|bin_")
HERE = 'FOLDER = "."  # this folder, or its name on the hub'


def build_model_card(out: Run, source: Run, made: Recipe, base: Family) -> str:
    """The text of README.md.

    Args:
        out: the folder that the card is for.
        source: the run with the results; the same folder, but for an export.
        made: the run's recipe, for the classes of its rows.
        base: as it is saved, with the heads of the objective.
    """
    upstream, license_of = find_base_model(made)
    library, code = build_loading_code(out, made, base)
    front: dict[str, Any] = {"library_name": library}
    if upstream:
        front |= {"base_model": upstream, "base_model_relation": "adapter" if out.adapter else "finetune"}
    front["pipeline_tag"] = pick_pipeline_tag(made, base)
    if data := [source.path for source in made.data.train if _is_on_hub(source.path)]:
        front["datasets"] = sorted(set(data))
    if license_of:
        front["license"] = license_of
    front["tags"] = ["luthier", method_name(made), made.objective.name]
    names = ", ".join(f"`{path if _is_on_hub(path) else Path(path).name}`" for path in
                      dict.fromkeys(source.path for source in made.data.train))
    kind = "An adapter" if out.adapter else "A model"
    picture = ["![loss](loss.png)", ""] if (out.path / "loss.png").exists() else []
    recipe = "`recipe.yaml` holds every setting, version and data digest." * (out.path / "recipe.yaml").exists()
    return "\n".join([
        "---", yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(), "---", "",
        f"# {out.path.name}", "",
        f"{kind} made with Luthier from `{upstream or Path(made.model.name_or_path).name}` by the method "
        f"`{method_name(made)}` with the objective `{made.objective.name}` on {names}. {recipe}".rstrip(), "",
        *_describe_origin(made), "## Use", "", *_explain_native_loading(out, made, base), "```python", *code, "```", "",
        *_format_results(source.results), *picture])


def _describe_origin(made: Recipe) -> list[str]:
    """What is said of a base that was read from a file in few bits: its weights are not those on the hub."""
    try:
        found = assembly.resolve_name(made.model.name_or_path)
    except LuthierError:  # the base is gone: nothing more is known of it
        return []
    if not isinstance(found, Path) or found.suffix != ".gguf":
        return []
    return [f"The weights of the base were read from `{found.name}`. Those on the hub differ from them by the rounding "
            "of that file, so an adapter gives slightly different outputs on them.", ""]


# ---------------------------------------------------------------- the front matter


def find_base_model(made: Recipe) -> tuple[str, str]:
    """The base's name on the hub and its license, each empty where it is not known. A folder tells in its own card."""
    name = made.model.name_or_path
    if name in UPSTREAM:
        return UPSTREAM[name]
    try:
        found = assembly.resolve_name(name)
        told = _read_front_matter(Path(found) / "README.md") if isinstance(found, Path) and found.is_dir() else {}
        if isinstance(found, str):
            told = _read_front_matter(assembly.prepare_folder(made.model) / "README.md")
            return found, str(told.get("license") or "")
    except LuthierError:  # the base is gone: nothing more is known of it
        return ("", "")
    known = told.get("base_model")
    known = known[0] if isinstance(known, list) and known else known
    return (known if isinstance(known, str) and "/" in known and not Path(known).is_absolute() else "",
            str(told.get("license") or ""))


def _read_front_matter(file: Path) -> Mapping[str, Any]:
    """The YAML at the beginning of a card; empty where there is none."""
    if not file.is_file():
        return {}
    text = file.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---\n"):
        return {}
    try:
        read = yaml.safe_load(text[4:].partition("\n---")[0])
    except yaml.YAMLError:  # a card written by hand
        return {}
    return read if isinstance(read, dict) else {}


def _is_on_hub(path: str) -> bool:
    """Whether this is the name of a data set on the hub, and of nothing here."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path)) and not Path(path).exists() and not re.search(
        r"\.(jsonl?|csv|tsv|parquet|txt|ndjson|gz|bz2|xz|zst|zip)$", path)


def pick_pipeline_tag(made: Recipe, base: Family) -> str:
    """The hub's pipeline tag."""
    head = next((head for head in made.objective.heads if head.task), None)
    images = "channels" in base.structure.sizes
    if head is not None:
        return TAGS["image" if images and head.kind == "item" else head.kind]
    if images:
        return "image-feature-extraction"
    if is_embedding(made):
        return "sentence-similarity"
    return TAGS.get(base.structure.task, "fill-mask" if made.objective.uses_masking else "feature-extraction")


def is_embedding(made: Recipe) -> bool:
    """Whether the run gives vectors."""
    return made.objective.required_outputs == frozenset({"pooled"})


# ---------------------------------------------------------------- how it is loaded


def build_loading_code(out: Run, made: Recipe, base: Family) -> tuple[str, list[str]]:
    """The library that loads the folder, and Python code that does and gives an output."""
    if _explain_native_loading(out, made, base):
        return "luthier", ["from luthier import assembly", "", HERE, "",
                           "recipe, model, method = assembly.open_run(assembly.Run(FOLDER))"]
    library = "peft" if out.adapter else "transformers"
    images = "channels" in base.structure.sizes
    if base.heads.task_head is not None:
        return library, list(_write_classifier_code(out, base.heads.task_head))
    if is_embedding(made) and not images and not base.is_encoder_decoder:
        return "sentence-transformers", [
            "from sentence_transformers import SentenceTransformer", "", HERE, "",
            "model = SentenceTransformer(FOLDER)",
            'vectors = model.encode(["A first text.", "A second text."])', "print(model.similarity(vectors, vectors))"]
    if base.can_generate:
        return library, list(_write_generation_code(out, made, base))
    auto = "AutoModelForMaskedLM" if made.objective.uses_masking else "AutoModel"
    return library, list(_write_encoder_code(out, auto, images))


def _explain_native_loading(out: Run, made: Recipe, base: Family) -> list[str]:
    """Why neither Transformers nor PEFT loads the folder; empty where they do."""
    form, headed = out.adapter, bool([head for head in made.objective.heads if head.task])
    if form is not None and form.get("peft_type") == "LUTHIER":
        why = f"PEFT has no format for `{method_name(made)}`"
    elif headed and base.heads.task_head is None:
        why = base.heads.no_task_head_reason or "Transformers has no class with this head"
    elif form is not None and form.get("peft_type") in ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING") and (
            headed or is_embedding(made)):
        why = "PEFT's virtual tokens move the place of the state that stands for a text"
    elif form is not None and is_embedding(made) and "channels" not in base.structure.sizes and (
            form.get("use_dora") or form.get("peft_type") == "ADALORA"):
        why = ("Sentence Transformers loads adapters by Transformers, which reads no DoRA and no AdaLoRA; "
               "`luthier export --to merged` writes a model that it loads")
    else:
        return []
    return [f"This folder is opened by Luthier: {why}.", ""]


def _write_classifier_code(out: Run, own: Any) -> Iterator[str]:
    """Of a run with a head of Transformers' class: the scores of two inputs."""
    auto, labels = f"AutoModelFor{HEADS[own.kind]}", own.head.labels
    reader = "AutoImageProcessor" if own.kind == "image" else "AutoTokenizer"
    peft = f"AutoPeftModelFor{HEADS[own.kind]}"
    yield "import torch"
    if out.adapter is None:
        yield f"from transformers import {auto}" + ("" if own.kind == "image" else f", {reader}")
    elif own.kind == "image":
        yield from ("from peft import PeftConfig, PeftModel", f"from transformers import {auto}")
    else:
        yield from (f"from peft import {peft}", f"from transformers import {reader}")
    yield from ("", HERE)
    if out.adapter is not None:
        names = list(labels) or [f"LABEL_{i}" for i in range(own.head.width)]
        yield from (f"labels = {names!r}", "id2label = dict(enumerate(labels))",
                    "label2id = {name: i for i, name in id2label.items()}")
    yield ""
    if own.kind != "image":
        yield f"tokenizer = {reader}.from_pretrained(FOLDER)"
    if out.adapter is None:
        yield f"model = {auto}.from_pretrained(FOLDER)"
    elif own.kind == "image":
        yield from ("base = PeftConfig.from_pretrained(FOLDER).base_model_name_or_path",
                    f"model = {auto}.from_pretrained(base, id2label=id2label, label2id=label2id)",
                    "model = PeftModel.from_pretrained(model, FOLDER)")
    else:
        yield f"model = {peft}.from_pretrained(FOLDER, id2label=id2label, label2id=label2id)"
        if own.pooling == "last":
            yield "model.config.pad_token_id = tokenizer.pad_token_id"
    if own.kind == "image":
        yield from ("side = model.config.image_size", "inputs = {\"pixel_values\": torch.zeros(1, "
                    "model.config.num_channels, side, side)}  # as the processor of the base makes them")
    else:
        yield 'inputs = tokenizer("A text to judge.", return_tensors="pt")'
    yield from ("with torch.no_grad():", "    logits = model.eval()(**inputs).logits",
                "print(logits)" if not labels else "print(model.config.id2label, logits)")


def _write_generation_code(out: Run, made: Recipe, base: Family) -> Iterator[str]:
    task = base.structure.task
    name = PEFT_CLASSES[task] if out.adapter else CLASSES[task]
    if out.adapter:
        yield f"from peft import {name}"
    yield "from transformers import " + ("AutoTokenizer" if out.adapter else f"{name}, AutoTokenizer")
    yield from ("", HERE, "", "tokenizer = AutoTokenizer.from_pretrained(FOLDER)",
                f"model = {name}.from_pretrained(FOLDER)")
    chat = base.tokenizer.chat_template and made.data.format != "completion" and made.objective.name != "pretrain"
    if chat:
        system = [{"role": "system", "content": made.data.system}] if made.data.system else []
        yield f"messages = {[*system, {'role': 'user', 'content': 'Hello!'}]!r}"
        yield ('inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", '
               "return_dict=True)")
    else:
        yield 'inputs = tokenizer("Once upon a time", return_tensors="pt")'
    if base.is_encoder_decoder:
        start = "0"
    else:
        yield 'start = inputs["input_ids"].shape[1]'
        start = "start"
    yield ('output = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], '
           "max_new_tokens=64)")
    yield f"print(tokenizer.decode(output[0, {start}:], skip_special_tokens=True))"


def _write_encoder_code(out: Run, auto: str, images: bool) -> Iterator[str]:
    if out.adapter:
        yield "from peft import PeftConfig, PeftModel"
    yield f"from transformers import {auto}" + ("" if images else ", AutoTokenizer")
    yield from ("", HERE, "")
    if out.adapter:
        yield from ("base = PeftConfig.from_pretrained(FOLDER).base_model_name_or_path",
                    f"model = PeftModel.from_pretrained({auto}.from_pretrained(base), FOLDER)")
    else:
        yield f"model = {auto}.from_pretrained(FOLDER)"
    if not images:
        yield "tokenizer = AutoTokenizer.from_pretrained(FOLDER)"


# ---------------------------------------------------------------- the figures


def _format_results(results: Mapping[str, Any]) -> Iterator[str]:
    """Tables of what was measured, on how many rows, and of what the training cost."""
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
        ("trainable", "trained parameters"), ("parameters", "parameters"), ("trainable_fraction", "share that trains"),
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
    """Four digits; whole numbers with their thousands set apart."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
